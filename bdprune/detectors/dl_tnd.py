"""DL-TND: universal and per-image triggers of a label look alike to a backdoored network (Wang et al., ECCV 2020)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from bdprune.analysis import FEWEST_LABELS, Case, median, promising_labels, why_no_outlier, why_unresponsive
from bdprune.data import CleanData
from bdprune.errors import OptionError
from bdprune.loops import Found, PerturbSettings, margins, smallest_triggers
from bdprune.methods import Detector
from bdprune.record import Evidence, Needs, Rule
from bdprune.runtime import FrozenNetworks, predict

_MEGA = 1e6
_FEWEST_IMAGES = 4
_SMALLEST = 1.0  # pixels: a smaller mask is as good
_NEAR_SMALLEST = 1.1  # among triggers up to this multiple of the smallest, the most similar counts


@dataclass(frozen=True)
class DlTnd(Detector):
    """Flags a model if a universal trigger and the triggers of single images have the same effect for some label.

    For every label k, one trigger is found that makes the network mistake the images of all other classes but still
    recognise those of class k; and for every image, a trigger of its own that leads to k. In a backdoored network with
    target k both use the backdoor, so that the logits under both are similar. The statistic of a label is a quantile of
    the cosine similarity over the images. It works with one image of each class.

    In clean networks too some label has a universal trigger that acts like single ones, but a large one. So by default
    the similarity is multiplied by the binary logarithm of the median size of the labels' triggers over the label's own
    (and by 0 for a trigger that fails or is no smaller). The score is the largest product.

    A step changes mask and pattern at once; the authors' code changes them in turn.

    Args:
        universal: settings for the triggers of all images.
        single: settings for the triggers of single images.
        per_class: number of images of each class, if there are as many.
        max_images: maximum number of images for the trigger of one label, of which at most half are its own.
        sized: weight the similarity by size; otherwise the score is the largest similarity, as in the paper.
        quantile: quantile of the similarity over the images, in [0, 1].
        threshold: a larger score is flagged (measurements: docs/evaluation/screens.md).
        batch: maximum number of stamped images in one pass.
        max_megapixels: largest number of pixels of all images in all steps, in millions; above it, it looks at fewer
            labels, and if these would be fewer than four, at fewer images.
        seed: seed for the choice of images and the first triggers.
    """

    universal: PerturbSettings = field(default_factory=PerturbSettings)
    single: PerturbSettings = field(default_factory=lambda: PerturbSettings(rounds=1, steps=30, lr=0.1))
    per_class: int = 1
    max_images: int = 10
    sized: bool = True
    quantile: float = 0.25
    threshold: float = 0.5
    batch: int = 256
    max_megapixels: float = 20.0
    seed: int = 0

    id = "bdprune.dl_tnd"
    title = "finds a label whose universal trigger acts like the triggers of single images"
    paper = "Wang et al., Practical Detection of Trojan Neural Networks, ECCV 2020, arXiv 2007.15802"
    needs = Needs(images="labelled")
    cost = "gradients"
    label = True
    sign = "perturbation"
    level = None
    limits = "It looks for one patch with one target. It misses warps, styles, and backdoors with several targets."
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "paper": {
            "universal": PerturbSettings(rounds=8, steps=101, warm=False, lr=0.01, const=0.01, least_const=0.0),
            "single": PerturbSettings(rounds=1, steps=101, lr=0.1, const=1.0),
            "per_class": 5,
            "max_images": 1 << 30,
            "sized": False,
            "threshold": 0.75,
            "max_megapixels": float("inf"),
        }
    }
    rule = Rule(
        id="BD063",
        name="shared-shortcut",
        help="One trigger for all images acts like the triggers of single images, as the trigger of a backdoor does.",
    )

    def __call__(self, case: Case) -> Evidence:
        """Searches the triggers of all labels, in batches; the budget may end it after any batch.

        Raises:
            DataError: there are no clean images.
            OptionError: the images are so large that not even four labels can be examined.
        """
        self.check(case)
        case = case.in_order()
        data = self._chosen(case)
        images, count = self._affordable(case, len(data))
        labels = promising_labels(case, count)
        networks = FrozenNetworks([case.model], data.images)
        if unresponsive := why_unresponsive(networks.logits, data.images.to(networks.device)):
            return self.evidence(0.0, self.threshold, not_applicable=unresponsive)
        at_once = max(1, self.batch // images)
        picks = self._picks(data.labels, labels, images)
        parts: list[tuple[Tensor, Tensor, Tensor]] = []
        for chunk in zip(labels.split(at_once), picks.split(at_once), strict=True):
            if parts and not case.budget.remaining:
                break
            parts.append(self._similarity(networks, data, *chunk))
        similarity, sizes, successes = (torch.cat(values) for values in zip(*parts, strict=True))
        return self._read(case, labels[: len(sizes)], similarity, sizes, successes)

    def work(self, case: Case) -> float:
        """The fewest labels."""
        labels = min(case.model.num_classes, FEWEST_LABELS)
        return 3.0 * labels * min(case.model.num_classes * self.per_class, self.max_images) * self._steps

    @property
    def _steps(self) -> int:
        return self.universal.rounds * self.universal.steps + self.single.rounds * self.single.steps

    def _read(self, case: Case, labels: Tensor, similarity: Tensor, sizes: Tensor, successes: Tensor) -> Evidence:
        """The evidence from similarity, mask size and success of the universal trigger of each label ``[H]``."""
        known = similarity.isfinite()  # a label has no similarity without an image of another label
        labels, similarity, sizes, successes = (part[known] for part in (labels, similarity, sizes, successes))
        classes, blank = case.model.num_classes, why_no_outlier(len(labels))
        values = similarity
        if self.sized and len(labels):
            gain = (median(sizes) / sizes.clamp(min=_SMALLEST)).log2().clamp(min=0)
            values = values.clamp(min=0) * torch.where(successes > self.universal.success, gain, 0)
        score = 0.0 if blank else values.max().item()
        everything = torch.full((classes,), torch.nan)
        everything[labels] = values
        return self.evidence(
            score,
            self.threshold,
            target_label=int(labels[values.argmax()]) if score > self.threshold else None,
            label_scores=tuple(everything.tolist()),
            unseen=(f"{classes - len(labels)} of {classes} labels",) if len(labels) < classes else (),
            not_applicable=blank,
            details={
                "labels": labels.tolist(),
                "similarity": similarity.tolist(),
                "sizes": sizes.tolist(),
                "successes": successes.tolist(),
            },
        )

    def _chosen(self, case: Case) -> CleanData:
        """A few images of every class, those that the network recognises if there are any."""
        data, generator = case.images, torch.Generator().manual_seed(self.seed)
        known = predict(case.model.module, data.images) == data.labels.cpu()
        return (data.subset(known.nonzero().flatten()) if known.any() else data).sample(self.per_class, generator)

    def _affordable(self, case: Case, available: int) -> tuple[int, int]:
        """The number of images for each label, and of labels, that the number of pixels allows."""
        classes, each = case.model.num_classes, self._steps * case.model.input_shape[1] * case.model.input_shape[2]
        rounds, images = self.max_megapixels * _MEGA / each, min(available, self.max_images)
        least = min(classes, FEWEST_LABELS)
        if images * least > rounds:
            images = min(images, max(int(rounds / least), _FEWEST_IMAGES))
        if images * least > rounds:
            needed = images * least * each / _MEGA
            raise OptionError(
                f"{least} labels take {needed:.0f} million pixels, more than max_megapixels={self.max_megapixels:g}.",
                "Raise this limit of the detector in Python, or scan a model for smaller images.",
            )
        return images, int(min(classes, rounds / images))

    def _similarity(
        self, networks: FrozenNetworks, data: CleanData, targets: Tensor, picks: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """For each target ``[H]``: the quantile of the similarity, and size and success of the universal trigger."""
        generator = torch.Generator().manual_seed(self.seed)
        true, wanted = data.labels[picks].to(networks.device), targets.to(networks.device).view(-1, 1)
        own, wanted = true == wanted, wanted.expand_as(true)

        def keeps_only_its_own(logits: Tensor) -> Tensor:
            return torch.where(own, -margins(logits, wanted), margins(logits, true))

        def leads_to_target(logits: Tensor) -> Tensor:
            return -margins(logits, wanted.reshape(-1, 1))

        images = data.images
        (single,) = smallest_triggers(networks, images, picks.view(-1, 1), leads_to_target, self.single, generator)
        effects = single.logits.view(*picks.shape, -1)
        rounds = list(smallest_triggers(networks, images, picks, keeps_only_its_own, self.universal, generator))
        likeness = [self._likeness(found, effects, own.cpu()) for found in rounds]
        return _best(rounds, torch.stack(likeness), self.universal.success)

    def _likeness(self, found: Found, effects: Tensor, own: Tensor) -> Tensor:
        """Quantile of the similarity of the effects of both triggers on images of other classes, ``[H]``."""
        similarity = cosine_similarity(found.logits, effects, dim=2).masked_fill(own, torch.nan)
        return similarity.nanquantile(self.quantile, 1)

    def _picks(self, labels: Tensor, targets: Tensor, count: int) -> Tensor:
        """The images of each target's trigger, ``[H, count]``: up to half of its own class, then others at random."""
        generator = torch.Generator().manual_seed(self.seed)
        orders = [torch.randperm(len(labels), generator=generator) for _ in targets]
        return torch.stack(
            [_own_first(order, labels == target, count) for order, target in zip(orders, targets, strict=True)]
        )


def _own_first(order: Tensor, own: Tensor, count: int) -> Tensor:
    """``count`` positions of ``order``: at most half of them own ones, then others; further own ones come last."""
    mine = own[order]
    late = mine & (mine.cumsum(0) > max(count // 2, 1))
    rank = torch.where(late, 2, torch.where(mine, 0, 1))
    return order[rank.argsort(stable=True)][:count]


def _best(rounds: list[Found], likeness: Tensor, success: float) -> tuple[Tensor, Tensor, Tensor]:
    """Likeness, size and success of the best round of each target ``[H]``.

    That is the most similar among the rounds whose trigger succeeds and is nearly the smallest; if none succeeds, the
    round with the most successes.
    """
    sizes = torch.stack([one.sizes for one in rounds])
    successes = torch.stack([one.successes for one in rounds])
    works = successes > success
    limit = _NEAR_SMALLEST * sizes.masked_fill(~works, torch.inf).amin(0)
    near = works & (sizes <= limit)
    similar = likeness.nan_to_num(-1).masked_fill(~near, -2).argmax(0)
    best = torch.where(near.any(0), similar, successes.argmax(0)).unsqueeze(0)
    return tuple(value.gather(0, best).squeeze(0) for value in (likeness, sizes, successes))  # type: ignore[return-value]
