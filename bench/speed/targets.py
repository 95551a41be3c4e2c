"""The targets of the benchmarks, and whether a record meets them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

Record = dict[str, Any]
Row = dict[str, Any]

ALIKE = 0.99
"""Least rank correlation between the masks of the fast variant and of the published loop."""
NEAR = 0.02
"""Masks this close to the threshold may fall on either side of it."""


@dataclass(frozen=True)
class Target:
    """A limit for one figure of some benchmarks.

    Attributes:
        what: the figure.
        words: the name and case of a benchmark must contain all of them.
        figure: computes the figure from a benchmark; None if a variant is missing or failed.
        limit: the figure must be at least, or at most, this number.
        at_least: whether more is better.
        unit: unit of the figure.
        against: kind or first word of the variant that ours is compared with, if the figure is such a ratio.
        device: the only type of device that the target applies to; empty for all.
    """

    what: str
    words: tuple[str, ...]
    figure: Callable[[Record], float | None]
    limit: float
    at_least: bool = True
    unit: str = "x"
    against: str = ""
    device: str = ""

    def concerns(self, benchmark: Record) -> bool:
        """Whether the target applies to this benchmark."""
        return all(word in f"{benchmark['name']}: {benchmark['case']}" for word in self.words)

    def met(self, figure: float) -> bool:
        """Whether ``figure`` meets the limit; NaN never does."""
        return figure >= self.limit if self.at_least else figure <= self.limit

    def reachable(self, benchmark: Record) -> float | None:
        """The figure if ours ran at the lower bound. A target beyond it is out of reach."""
        other, bound = _variant(benchmark, self.against), benchmark["lower_bound_seconds"]
        return float(other["seconds"] / bound) if other and bound else None

    @property
    def wanted(self) -> str:
        """The limit in words."""
        return f"{'at least' if self.at_least else 'at most'} {self.limit:g} {self.unit}".rstrip()


def best(benchmark: Record, kind: str) -> Row | None:
    """The fastest row of a kind that did not fail, or None. Of ours, the first row counts, not the fastest."""
    rows = [row for row in benchmark["rows"] if row["kind"] == kind and row["seconds"] is not None]
    if kind == "ours":
        return rows[0] if rows else None
    return min(rows, key=lambda row: float(row["seconds"]), default=None)


def ratio(other: Row | None, ours: Row | None) -> float | None:
    """How many times faster ours is; below 1, ours is slower."""
    return None if other is None or ours is None else other["seconds"] / ours["seconds"]


def _variant(benchmark: Record, word: str) -> Row | None:
    """The fastest row of a kind, or of a first word in the name, that did not fail; otherwise None."""
    rows = [
        row
        for row in benchmark["rows"]
        if word in (row["kind"], row["variant"].split(",")[0]) and row["seconds"] is not None
    ]
    return min(rows, key=lambda row: float(row["seconds"]), default=None)


def _faster(words: tuple[str, ...], word: str, what: str, limit: float) -> Target:
    return Target(what, words, lambda one: ratio(_variant(one, word), best(one, "ours")), limit, against=word)


def _over_required(benchmark: Record) -> float | None:
    return ratio(best(benchmark, "ours"), best(benchmark, "required"))


def _seconds(name: str) -> Callable[[Record], float | None]:
    return lambda benchmark: next((row["seconds"] for row in benchmark["rows"] if row["variant"] == name), None)


def _error(benchmark: Record) -> float | None:
    ours = best(benchmark, "ours")
    return None if ours is None or ours["error"] is None else float(ours["error"])


def _over_lower_bound(benchmark: Record) -> float | None:
    ours, bound = best(benchmark, "ours"), benchmark["lower_bound_seconds"]
    return float(ours["seconds"] / bound) if ours and bound else None


def _over_torch(benchmark: Record) -> float | None:
    """How many times faster ours is than the fastest PyTorch variant: author, eager or compiled."""
    others = [row for kind in ("author", "eager", "compile") if (row := best(benchmark, kind))]
    return ratio(min(others, key=lambda row: float(row["seconds"]), default=None), best(benchmark, "ours"))


def _models_a_second(benchmark: Record) -> float | None:
    ours = best(benchmark, "ours")
    return int(benchmark["case"].split(" x ")[0]) / ours["seconds"] if ours else None


def _over_loop(benchmark: Record) -> float | None:
    stack, loop = (_seconds(name)(benchmark) for name in ("bdprune.stack(models).unlearn", "ours, one after another"))
    return loop / stack if stack and loop else None


def _stack_conv(width: int, limit: float) -> Target:
    words = (*_STACK, "masked convolution", f"width {width}")
    return Target(f"faster than the best PyTorch, width {width}", words, _over_torch, limit, device="cuda")


_STACK = ("Stack of models",)
_SPECTRAL, _MOMENTS, _CONV = ("Spectral norms",), ("Channel moments",), ("Masked convolution",)
_STAMP = ("Stamped images",)

TARGETS = (
    _faster(_SPECTRAL, "eager", "faster than the best eager PyTorch", 10),
    _faster(_SPECTRAL, "author", "faster than the author's loop", 50),
    Target("time over one reading of the weights", _SPECTRAL, _over_required, 4, at_least=False),
    _faster((*_MOMENTS, "layers of"), "eager", "faster than the best eager PyTorch", 1.5),
    Target("time over the lower bound", (*_MOMENTS, "layers of"), _over_lower_bound, 2, at_least=False, device="cuda"),
    Target("error at mean = 30 standard deviations", (*_MOMENTS, "mean = 30"), _error, 1e-5, at_least=False, unit=""),
    Target("time over the unmasked convolution", _CONV, _over_required, 1.05, at_least=False),
    _faster(_CONV, "author", "faster than masking weights under autograd", 1.3),
    _faster(_STAMP, "eager", "faster than the best eager PyTorch", 1.5),
    Target("time over the lower bound", _STAMP, _over_lower_bound, 2, at_least=False),
    _faster(("Trigger inversion",), "eager", "faster than the best eager PyTorch", 3),
    _faster(("RNP", ": unlearning"), "author", "faster than the published loop", 3),
    _faster(("RNP", ": recovery"), "author", "faster than the published loop", 3),
    _faster(("RNP", ": sweep"), "author", "faster than a plain sweep", 3),
    *(_faster(("Suspiciousness score",), name, f"faster than {name}", 3) for name in ("ANP", "NAD", "AWM", "CLP")),
    Target(
        "time over the lower bound", (*_STACK, "spectral norms"), _over_lower_bound, 3, at_least=False, device="cuda"
    ),
    replace(_faster((*_STACK, "spectral norms"), "svdvals", "faster than svdvals", 100), device="cuda"),
    *(_stack_conv(width, limit) for width, limit in ((16, 2), (32, 2), (64, 1))),
    Target("faster than a loop over the models", (*_STACK, "unlearning"), _over_loop, 0.95),
    Target("scored models", (*_STACK, "data-free scores"), _models_a_second, 200, unit="per second", device="cuda"),
    Target("time of one model", (*_STACK, "RNP"), _seconds("bdprune.stack of one model"), 1, False, "s", device="cuda"),
    Target(
        "time per model of the stack",
        (*_STACK, "RNP"),
        _seconds("bdprune.stack(models)"),
        0.3,
        False,
        "s",
        device="cuda",
    ),
    Target("time", ("File to",), _seconds("bdprune.load + channel_lipschitz"), 0.5, False, "s"),
    Target("time of --help", ("Start of",), _seconds("bdprune --help"), 0.25, False, "s"),
)


def whole_rnp(run: Record) -> list[tuple[str, float]]:
    """For each width with all three phases: its name, and how many times faster the three are in total."""
    phases: dict[str, list[Record]] = {}
    for benchmark in run["benchmarks"]:
        if benchmark["name"].startswith("RNP"):
            phases.setdefault(benchmark["name"].partition(":")[0], []).append(benchmark)
    found = []
    for name, benchmarks in phases.items():
        pairs = [(best(benchmark, "author"), best(benchmark, "ours")) for benchmark in benchmarks]
        if len(pairs) == 3 and all(author and ours for author, ours in pairs):
            plain, ours = (sum(pair[side]["seconds"] for pair in pairs) for side in (0, 1))  # type: ignore[index]
            found.append((name, plain / ours))
    return found
