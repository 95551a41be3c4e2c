"""Channel Lipschitzness-based pruning (Zheng et al., ECCV 2022): prune filters with outlying Lipschitz constants."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from torch import Tensor

from bdprune.analysis import Case, Lipschitz, layer_z_scores
from bdprune.data import CleanData
from bdprune.loops import Sweep, SweepSettings, below, sweep
from bdprune.methods import CurvePoint, Phases, Purifier, Repair, shifted_views
from bdprune.model import Model, PruneMode, prune
from bdprune.record import Needs
from bdprune.runtime import DEFAULT, Precision

_LADDER = tuple(5 - 0.25 * step for step in range(17))  # 5 down to 1
_LOOKS = 500  # images on which each u is tried, including views


@dataclass(frozen=True)
class CLP(Purifier):
    """Prunes every filter whose channel Lipschitz constant is more than u standard deviations above its layer's mean.

    The constants come from the weights alone, so it also works without clean images. The right u differs from network
    to network: the published u of 3 leaves some backdoors, and it destroys other networks. So, if there are clean
    images, u falls from 5 in steps of a quarter to at least 1 while clean accuracy, over several mirrored and shifted
    views of every image, falls by at most ``max_drop``. A layer with n filters has no score above (n - 1) / sqrt(n), so
    u = 3 prunes nothing in a layer of fewer than 11 filters.

    Args:
        u: number of standard deviations; None to choose it on clean images, or to use ``published`` without them.
        published: u for a case without clean images.
        max_drop: largest fall of clean accuracy that a chosen u may cause, in [0, 1], on all clean images. It does not
            limit a given u.
        mode: how a filter is pruned; the paper zeroes gamma and beta.
        precision: whether convs run by Winograd's algorithm while u is chosen (:func:`bdprune.loops.sweep`).
        seed: seed for the views.
    """

    u: float | None = None
    published: float = 3.0
    max_drop: float = 0.02
    mode: PruneMode = "zero_gamma_beta"
    precision: Precision = DEFAULT
    seed: int = 0

    id = "bdprune.clp"
    title = "prunes filters with an outlying channel Lipschitz constant in their layer; needs no images"
    paper = "Zheng et al., Data-free Backdoor Removal based on Channel Lipschitzness, ECCV 2022, arXiv 2208.03111"
    needs = Needs(images="none", minimum=0)
    uses_more = True
    cost = "weights"
    threshold_name = "u"
    limits = "It prunes filters that stand out by themselves. Most backdoors are spread over several and stay."
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {"paper": {"u": 3.0}, "robust": {}}

    def __call__(self, case: Case) -> Repair:
        """Repairs a copy of the model. Without clean images, the accuracies of the repair are NaN."""
        data, phase = self.check(case), Phases()
        with phase("score"):
            scores = case.get(Lipschitz())
            # Like masks: the least is pruned first. An undefined score, as of a filter with a NaN, prunes nothing.
            ranked = {name: -z for name, z in layer_z_scores(scores).items()}
        with phase("sweep"):
            u, swept = self._choose(case.model, ranked, data)
        pruned = {} if math.isnan(u) else below(ranked, -u)
        points = swept.points if swept else ()
        return self.repair(
            case,
            prune(case.model, pruned, self.mode),
            data,
            pruned=pruned,
            selection=self._selection(u, data, bool(pruned)),
            masks=scores,
            threshold=u,
            curve=tuple(CurvePoint(-one.threshold, one.clean_accuracy, one.filters_pruned) for one in reversed(points)),
            seconds=phase.seconds,
            attachments=(case.attach("filter_scores", scores),),
        )

    def _choose(self, model: Model, ranked: Mapping[str, Tensor], data: CleanData | None) -> tuple[float, Sweep | None]:
        """The lowest u before the first that costs too much, NaN if there is none; and the sweep, if there was one."""
        if self.u is not None or data is None:
            return self.published if self.u is None else self.u, None
        count = max(_LOOKS // len(data), 1)
        views = replace(data, images=shifted_views(data, count, self.seed), labels=data.labels.repeat(count))
        settings = SweepSettings([-u for u in _LADDER], self.max_drop, self.mode, stop_early=True)
        swept = sweep(model, ranked, [views], settings, self.precision)
        best = swept.highest(self.max_drop)
        return -best.threshold if best else math.nan, swept

    def _selection(self, u: float, data: CleanData | None, found: bool) -> str:
        if math.isnan(u):
            return f"nothing is pruned: every number of standard deviations costs more than {self._bound(data)}"
        what = f"Lipschitz constant > mean + {u:g} std of its layer"
        if self.u is None and data is not None:
            what += f"; lowest that costs at most {self._bound(data)}"
        return what if found else f"nothing is pruned: no filter has a {what}"

    def _bound(self, data: CleanData | None) -> str:
        return f"{100 * self.max_drop:g} points on {len(data) if data else 0} clean images"
