"""The clean images of a repair: missing labels, and the check on images that the repair does not learn from."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bdprune.analysis import Case
from bdprune.data import CleanData
from bdprune.errors import DataError, OptionError
from bdprune.methods import Purifier, Repair
from bdprune.model import Model
from bdprune.pipeline.repair import purify
from bdprune.pipeline.repair_data import checked, mirror_rule, missing_labels, with_images_for_check
from bdprune.purifiers.clp import CLP
from bdprune.purifiers.fine_tuning import FineTuning
from bdprune.purifiers.suspiciousness import SuspiciousnessPruning


class Halves(nn.Module):
    """Three labels: the left half of an image is brighter than the right one, both are bright, or the right one is."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, images: Tensor) -> Tensor:
        left, right = images[..., :4].mean((1, 2, 3)), images[..., 4:].mean((1, 2, 3))
        return self.scale * torch.stack([left - right, torch.minimum(left, right), right - left], 1)


def halves(*counts: int) -> tuple[Model, CleanData]:
    """The network, and this many images of each label."""
    images = torch.zeros(sum(counts), 3, 8, 8)
    labels = torch.repeat_interleave(torch.arange(3), torch.tensor(counts))
    images[labels != 2, ..., :4] = 0.9
    images[labels != 0, ..., 4:] = 0.9
    return Model(Halves(), "halves", 3, (3, 8, 8)), CleanData(images, labels)


@pytest.mark.parametrize(("counts", "mirror"), [((0, 50, 0), True), ((20, 20, 20), False), ((5, 195, 0), False)])
def test_images_are_mirrored_only_if_the_network_recognises_them_then(
    counts: tuple[int, int, int], mirror: bool
) -> None:
    """One label suffices to forbid it: most road signs are symmetric, but "keep left" becomes "keep right"."""
    model, data = halves(*counts)
    found, note = mirror_rule(model, data)
    assert found.mirror is mirror and bool(note) is not mirror
    assert found.by_content.subset(torch.arange(3)).mirror is mirror
    assert mirror_rule(model, replace(data, mirror=False))[0].mirror is False
    if counts[0] == 5:
        assert note.startswith("The network recognises 97.5 % of the mirrored images and 100.0 % of the others")


@dataclass(frozen=True)
class Ruin(Purifier):
    """Makes the network answer the same label always."""

    images: list[CleanData]
    id = "x.ruin"
    title = "ruins the network"

    def __call__(self, case: Case) -> Repair:
        self.images.append(case.images)
        model = case.model.clone()
        with torch.no_grad():
            for value in list(model.network.parameters())[-2:]:
                value.zero_()
        return self.repair(case, model, case.images, retrained=True, selection="all of it", params={})


def without(data: CleanData, label: int) -> CleanData:
    return data.subset((data.labels != label).nonzero().flatten())


def test_a_repair_refuses_images_that_lack_a_label(bright: Any) -> None:
    with pytest.raises(DataError, match="have no clean image, so the repair may forget them: 1") as caught:
        purify(bright.model, without(bright.data, 1), method="fine_tuning")
    assert "--allow-missing-labels" in caught.value.hint
    assert missing_labels(bright.model, bright.data, allowed=False) == ""


def test_a_repair_that_may_forget_a_label_says_so(bright: Any) -> None:
    found = purify(bright.model, without(bright.data, 1), method="clp", allow_missing_labels=True)
    assert found.result.data
    assert found.result.data.notes[-1] == "These labels have no clean image, so the repair may forget them: 1."
    assert not purify(bright.model, bright.data, method="clp").result.data.notes  # type: ignore[union-attr]


def test_a_ruined_network_is_not_repaired(bright: Any) -> None:
    ruin = Ruin([])
    result = purify(bright.model, bright.data, method=ruin, check=True).result
    assert result.outcome == "unrepaired"
    assert result.check and result.check.left[0].startswith("the repair costs at least 6")
    kept = purify(bright.model, bright.data, method="clp", check=True).result
    assert kept.check and not any("the repair costs" in one for one in kept.check.left)


def test_the_check_measures_on_images_that_the_repair_never_saw(bright: Any) -> None:
    ruin = Ruin([])
    purify(bright.model, bright.data, method=ruin, check=True)
    (seen,) = ruin.images
    case = Case(bright.model, bright.data)
    taken, held = with_images_for_check(ruin, case, seed=0)
    assert torch.equal(taken.images.images, seen.images) and len(seen) + len(held) == len(bright.data)
    assert not {one.numpy().tobytes() for one in held.images} & {one.numpy().tobytes() for one in seen.images}


def test_a_purifier_that_holds_images_out_gets_all_of_them(bright: Any) -> None:
    case = Case(bright.model, bright.data)
    taken, held = with_images_for_check(FineTuning(held_out=0.2), case, seed=0)
    assert taken is case and len(held) == 48


def test_one_image_of_each_class_cannot_be_checked_which_shows_before_the_repair(bright: Any) -> None:
    ruin, few = Ruin([]), bright.data.sample(1, torch.Generator().manual_seed(0))
    with pytest.raises(DataError, match="leave none to hold out") as caught:
        purify(bright.model, few, method=ruin, check=True)
    assert "without a check" in caught.value.hint and not ruin.images


def test_the_check_of_a_repair_that_changes_nothing_finds_no_cost(bright: Any) -> None:
    case = Case(bright.model, bright.data)
    nothing = SuspiciousnessPruning(mu=99.0)(case)
    assert nothing.change == "nothing"
    found = checked(case, bright.data, nothing, 0, "float32")
    assert not any("the repair costs" in one for one in found.left)


@pytest.mark.parametrize("method", ["clp", "anp"])
def test_a_limit_beside_a_given_threshold_is_refused(bright: Any, method: str) -> None:
    with pytest.raises(OptionError, match="No limit on clean accuracy changes the given threshold"):
        purify(bright.model, bright.data, method=method, preset="paper", max_acc_drop=0.01)


def test_a_limit_alone_is_taken(bright: Any) -> None:
    found = purify(bright.model, bright.data, method="clp", max_acc_drop=0.01)
    assert found.result.params["max_drop"] == 0.01
    CLP.preset("paper").refuse_two_limits(None)
    replace(CLP(), max_drop=0.5).refuse_two_limits(0.5)
