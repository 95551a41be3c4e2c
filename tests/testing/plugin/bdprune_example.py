"""A detector and a purifier in a separate package."""

from dataclasses import dataclass

from torch import nn

from bdprune import BdpruneError, Case, Detector, Evidence, Needs, Purifier, Repair, Rule
from bdprune.analysis import Lipschitz, layer_z_scores
from bdprune.methods import what_changed
from bdprune.model import prune
from bdprune.runtime import clean_accuracy


@dataclass(frozen=True)
class PeakWeight(Detector):
    """Flags a label whose largest weight in the head is far above those of the other labels.

    Args:
        threshold: largest multiple of their median that is not flagged.
    """

    threshold: float = 1.6

    id = "example.peak_weight"
    title = "finds a label that depends on one feature"
    needs = Needs(images="none", minimum=0)
    cost = "weights"
    label = True
    rule = Rule(id="BD901", name="peak-weight", help="In the head, one label depends on a single feature.")

    def __call__(self, case: Case) -> Evidence:
        heads = [layer for layer in case.model.network.modules() if isinstance(layer, nn.Linear)]
        if not heads:
            raise BdpruneError("The network has no linear head.")
        weight = heads[-1].weight.detach()
        peaks = weight.amax(1) - weight.mean(1)
        score = float(peaks.max() / peaks.median())
        label = int(peaks.argmax()) if score > self.threshold else None
        return self.evidence(score, self.threshold, target_label=label, label_scores=tuple(peaks.tolist()))


@dataclass(frozen=True)
class LipschitzPruning(Purifier):
    """Prunes filters whose channel Lipschitz score is far above its layer's (Zheng et al., ECCV 2022).

    Args:
        u: number of standard deviations above its layer's mean at which a filter is pruned.
    """

    u: float = 3.0

    id = "example.peaks"
    title = "prunes the filters with an outlying spectral norm in their layer"
    paper = "Zheng et al., ECCV 2022, arXiv 2208.03111"
    needs = Needs(images="labelled")
    cost = "weights"
    limits = "It misses a backdoor whose filters are no stronger than the others of their layer."

    def __call__(self, case: Case) -> Repair:
        self.check(case)
        z = layer_z_scores(case.get(Lipschitz()))
        pruned = {name: (value > self.u).nonzero().flatten().tolist() for name, value in z.items()}
        repaired = prune(case.model, pruned, "zero_gamma_beta")
        before, after = (
            clean_accuracy(one.module, case.images.images, case.images.labels) for one in (case.model, repaired)
        )
        return Repair(
            model=repaired,
            method=self.id,
            change=what_changed(pruned=any(pruned.values()), retrained=False),
            selection=f"more than {self.u:g} standard deviations above the layer",
            accuracy_before=before,
            accuracy_after=after,
            pruned={name: index for name, index in pruned.items() if index},
            num_filters=sum(map(len, z.values())),
            masks=z,
            threshold=self.u,
            params=self.params,
        )
