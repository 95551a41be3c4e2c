"""What the ladders are held to, and whether a record meets it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

Record = dict[str, Any]
Row = dict[str, Any]

ALIKE = 0.99
"""Least rank correlation of the masks of a fast path with those of the plain loop."""
NEAR = 0.02
"""Masks so near to the threshold may fall on either side of it."""


@dataclass(frozen=True)
class Target:
    """One demand on every ladder of a name.

    Attributes:
        what: the figure.
        ladder: words that the ladder's name and case hold.
        figure: works it out from a ladder; None where a rung is missing or broke down.
        limit: what it must reach, or stay within.
        at_least: whether more is better.
        unit: after the figure.
        against: kind or first word of the rung that ours is so many times faster than, where that is the figure.
        device: the only kind of device that it is meant for; empty for all.
    """

    what: str
    ladder: tuple[str, ...]
    figure: Callable[[Record], float | None]
    limit: float
    at_least: bool = True
    unit: str = "x"
    against: str = ""
    device: str = ""

    def concerns(self, ladder: Record) -> bool:
        """Whether it is about this ladder."""
        return all(word in f"{ladder['name']}: {ladder['case']}" for word in self.ladder)

    def met(self, figure: float) -> bool:
        """Whether ``figure`` is good enough; a figure that is not a number never is."""
        return figure >= self.limit if self.at_least else figure <= self.limit

    def reachable(self, ladder: Record) -> float | None:
        """What the figure would be if ours ran at the physical floor: with less than the limit it is out of reach."""
        other, floor = _rung(ladder, self.against), ladder["floor_seconds"]
        return float(other["seconds"] / floor) if other and floor else None

    @property
    def wanted(self) -> str:
        """The limit in words."""
        return f"{'at least' if self.at_least else 'at most'} {self.limit:g} {self.unit}".rstrip()


def best(ladder: Record, kind: str) -> Row | None:
    """The fastest row of that kind, None without one that worked. Of ours the first counts, not a variant of it."""
    rows = [row for row in ladder["rows"] if row["kind"] == kind and row["seconds"] is not None]
    if kind == "ours":
        return rows[0] if rows else None
    return min(rows, key=lambda row: float(row["seconds"]), default=None)


def ratio(other: Row | None, ours: Row | None) -> float | None:
    """How many times faster ours is; below one we lose."""
    return None if other is None or ours is None else other["seconds"] / ours["seconds"]


def _rung(ladder: Record, word: str) -> Row | None:
    """The fastest rung of that kind, or whose name begins with that word; None without one that worked."""
    rows = [
        row for row in ladder["rows"] if word in (row["kind"], row["rung"].split(",")[0]) and row["seconds"] is not None
    ]
    return min(rows, key=lambda row: float(row["seconds"]), default=None)


def _faster(ladder: tuple[str, ...], word: str, what: str, limit: float) -> Target:
    return Target(what, ladder, lambda one: ratio(_rung(one, word), best(one, "ours")), limit, against=word)


def _over_bound(ladder: Record) -> float | None:
    return ratio(best(ladder, "ours"), best(ladder, "bound"))


def _seconds(name: str) -> Callable[[Record], float | None]:
    return lambda ladder: next((row["seconds"] for row in ladder["rows"] if row["rung"] == name), None)


def _slowest_error(ladder: Record) -> float | None:
    ours = best(ladder, "ours")
    return None if ours is None or ours["error"] is None else float(ours["error"])


def _over_floor(ladder: Record) -> float | None:
    ours, floor = best(ladder, "ours"), ladder["floor_seconds"]
    return float(ours["seconds"] / floor) if ours and floor else None


def _over_torch(ladder: Record) -> float | None:
    """How many times faster than the best that PyTorch has, written by hand or compiled."""
    others = [row for kind in ("author", "eager", "compile") if (row := best(ladder, kind))]
    return ratio(min(others, key=lambda row: float(row["seconds"]), default=None), best(ladder, "ours"))


def _models_a_second(ladder: Record) -> float | None:
    ours = best(ladder, "ours")
    return int(ladder["case"].split(" x ")[0]) / ours["seconds"] if ours else None


def _over_loop(ladder: Record) -> float | None:
    stack, loop = (_seconds(name)(ladder) for name in ("bdprune.stack(models).unlearn", "ours, one after another"))
    return loop / stack if stack and loop else None


def _stack_conv(width: int, limit: float) -> Target:
    words = (*_STACK, "masked convolution", f"width {width}")
    return Target("faster than the best of PyTorch", words, _over_torch, limit, device="cuda")


_STACK = ("Stack of models",)
_SPECTRAL, _MOMENTS, _CONV = ("Spectral norms",), ("Channel moments",), ("Masked convolution",)

TARGETS = (
    _faster(_SPECTRAL, "eager", "faster than the best eager rung", 10),
    _faster(_SPECTRAL, "author", "faster than the author's loop", 50),
    Target("time over one reading of the weights", _SPECTRAL, _over_bound, 4, at_least=False),
    _faster((*_MOMENTS, "layers of"), "eager", "faster than the best eager rung", 1.5),
    Target("time over the floor", (*_MOMENTS, "layers of"), _over_floor, 2, at_least=False, device="cuda"),
    Target("error at a mean of 30 sigma", (*_MOMENTS, "mean = 30"), _slowest_error, 1e-5, at_least=False, unit=""),
    Target("time over the unmasked convolution", _CONV, _over_bound, 1.05, at_least=False),
    _faster(_CONV, "author", "faster than masking weights under autograd", 1.3),
    _faster(("RNP", ": unlearning"), "author", "faster than the published loop", 3),
    _faster(("RNP", ": recovery"), "author", "faster than the published loop", 3),
    _faster(("RNP", ": sweep"), "author", "faster than a plain sweep", 3),
    *(_faster(("Suspiciousness score",), name, f"faster than {name}", 3) for name in ("ANP", "NAD", "AWM", "CLP")),
    Target("time over the read floor", (*_STACK, "spectral norms"), _over_floor, 3, at_least=False, device="cuda"),
    replace(_faster((*_STACK, "spectral norms"), "svdvals", "faster than svdvals", 100), device="cuda"),
    *(_stack_conv(width, limit) for width, limit in ((16, 2), (32, 2), (64, 1))),
    Target("speed over the loop", (*_STACK, "unlearning"), _over_loop, 0.95),
    Target("models scored", (*_STACK, "data-free scores"), _models_a_second, 200, unit="a second", device="cuda"),
    Target("one model", (*_STACK, "RNP"), _seconds("bdprune.stack of one model"), 1, False, "s", device="cuda"),
    Target("a model of the stack", (*_STACK, "RNP"), _seconds("bdprune.stack(models)"), 0.3, False, "s", device="cuda"),
    Target("file to data-free scores", ("File to",), _seconds("bdprune.load + channel_lipschitz"), 0.5, False, "s"),
    Target("import for --help", ("Start of",), _seconds("bdprune --help"), 0.25, False, "s"),
)


def whole_rnp(run: Record) -> list[tuple[str, float]]:
    """For each width whose three phases were measured: its name, and how much faster they are together."""
    phases: dict[str, list[Record]] = {}
    for ladder in run["ladders"]:
        if ladder["name"].startswith("RNP"):
            phases.setdefault(ladder["name"].partition(":")[0], []).append(ladder)
    found = []
    for name, ladders in phases.items():
        pairs = [(best(ladder, "author"), best(ladder, "ours")) for ladder in ladders]
        if len(pairs) == 3 and all(author and ours for author, ours in pairs):
            plain, ours = (sum(pair[side]["seconds"] for pair in pairs) for side in (0, 1))  # type: ignore[index]
            found.append((name, plain / ours))
    return found
