"""What changed between two stores, and why: weights, data, settings, version, detectors."""

from __future__ import annotations

import math
from collections.abc import Container, Iterable, Iterator, Mapping
from typing import Any

from bdprune.hub import without_commit
from bdprune.record import Env, Evidence, Record, Result, Verdict
from bdprune.store.store import Kept, Store

_Side = tuple[Kept, Result]
_Key = tuple[str, str]
"""The name of a file, and what the name of a result adds to it."""
_RISK = 0.005
"""Smaller changes of the risk are not reported."""


class Changed(Record, frozen=True, kw_only=True):
    """One model whose result is not the same in both stores.

    Attributes:
        name: of the model.
        before: its verdict in the first store.
        after: its verdict in the second store.
        changes: what changed, a phrase each.
        reasons: what differs between both scans and so may be the cause, a phrase each.
    """

    name: str
    before: Verdict
    after: Verdict
    changes: tuple[str, ...]
    reasons: tuple[str, ...]


class Changes(Record, frozen=True, kw_only=True):
    """The difference between two stores.

    Attributes:
        changed: the models whose results differ.
        same: number of models with the same result.
        gone: names of models that only the first store has.
        new: names of models that only the second store has.
    """

    changed: tuple[Changed, ...]
    same: int
    gone: tuple[str, ...]
    new: tuple[str, ...]


def changes(first: Store, second: Store) -> Changes:
    """Compares the latest scan of every model in both stores; models are matched by name.

    A file on the Hugging Face Hub has its commit in its name. If only other commits of it are in the other store, and
    each store has one, they are matched.

    Raises:
        StoreError: a store cannot be read.
    """
    before, after = _sides(first), _sides(second)
    moved = _moved(before, after)
    after = {moved.get(name, name): side for name, side in after.items()}
    both = [name for name in before if name in after]
    changed = [one for name in both if (one := _changed("".join(name), before[name], after[name])) is not None]
    return Changes(
        changed=tuple(changed),
        same=len(both) - len(changed),
        gone=tuple("".join(name) for name in before if name not in after),
        new=tuple("".join(name) for name in after if name not in before),
    )


def _sides(store: Store) -> dict[_Key, _Side]:
    return {
        (scan.name, result.name.removeprefix(scan.name)): (scan, result)
        for scan in store.scans()
        for result in scan.results
    }


def _moved(before: Mapping[_Key, _Side], after: Mapping[_Key, _Side]) -> dict[_Key, _Key]:
    """Names of files on the Hub in ``after`` -> their names at another commit in ``before``."""
    left, right = (_by_place(one, other) for one, other in ((before, after), (after, before)))
    return {names[0]: left[place][0] for place, names in right.items() if len(names) == 1 == len(left.get(place, ()))}


def _by_place(names: Iterable[_Key], others: Container[_Key]) -> dict[_Key, list[_Key]]:
    """Names of files on the Hub that are not in ``others``, by their names without a commit."""
    found: dict[_Key, list[_Key]] = {}
    for name in names:
        place = without_commit(name[0]), name[1]
        if place != name and name not in others:
            found.setdefault(place, []).append(name)
    return found


def _changed(name: str, before: _Side, after: _Side) -> Changed | None:
    found = (*_of_result(before[1], after[1]), *_of_evidence(before[1], after[1]))
    if not found:
        return None
    reasons = tuple(_reasons(before, after)) or (
        "no cause is known: weights, data, settings and versions are the same",
    )
    return Changed(name=name, before=before[1].verdict, after=after[1].verdict, changes=tuple(found), reasons=reasons)


def _of_result(before: Result, after: Result) -> Iterator[str]:
    if before.verdict != after.verdict:
        yield f"verdict {before.verdict} → {after.verdict}"
    if _label(before) != _label(after):
        yield f"label {_label(before)} → {_label(after)}"
    risks = before.risk, after.risk
    if (None in risks and risks[0] != risks[1]) or abs((risks[0] or 0.0) - (risks[1] or 0.0)) >= _RISK:
        yield f"risk {_number(before.risk)} → {_number(after.risk)}"
    errors = [one.error.message if one.error else "" for one in (before, after)]
    if errors[0] != errors[1] and errors[1]:
        yield f"error: {errors[1]}"


def _label(result: Result) -> str:
    labels = result.targets if result.target_label is None else (result.target_label,)
    return ", ".join(map(str, labels)) or "none"


def _of_evidence(before: Result, after: Result) -> Iterator[str]:
    old, new = ({one.detector: one for one in result.detectors} for result in (before, after))
    for name in dict.fromkeys((*old, *new)):
        if name not in new:
            yield f"no evidence of {_short(name)} any more"
        elif name not in old:
            yield f"new evidence of {_short(name)}: {_seen(new[name])}"
        elif not _alike(old[name], new[name]):
            yield f"{_short(name)}: {_seen(old[name])} → {_seen(new[name])}"


def _alike(one: Evidence, other: Evidence) -> bool:
    scores = one.score, other.score
    if None in scores:
        return scores[0] == scores[1] and one.error == other.error
    close = math.isclose(scores[0] or 0.0, scores[1] or 0.0, rel_tol=1e-5, abs_tol=1e-9)
    return close and (one.flagged, one.target_label) == (other.flagged, other.target_label)


def _seen(one: Evidence) -> str:
    if one.score is None:
        return "failed" if one.error else "no score"
    label = "" if one.target_label is None else f", label {one.target_label}"
    return f"{_number(one.score)}{' (flagged' + label + ')' if one.flagged else ''}"


def _reasons(before: _Side, after: _Side) -> Iterator[str]:
    old, new = before[0], after[0]
    if old.name != new.name:
        yield f"another commit: {new.name}"
    if old.model != new.model:
        digests = [result.model.digest if result.model else "" for _, result in (before, after)]
        yield "another file with the same weights" if digests[0] == digests[1] != "" else "other weights"
    digests = [result.data.digest if result.data else scan.data for scan, result in (before, after)]
    if digests[0] != digests[1]:
        counts = [str(result.data.count) if result.data else "no" for _, result in (before, after)]
        yield f"other clean data ({counts[0]} images → {counts[1]} images)"
    yield from _of_settings(old.settings, new.settings)
    if old.version != new.version:
        yield f"bdprune {old.version} → {new.version}"
    yield from _of_env(before[1].env, after[1].env)


def _of_settings(old: Mapping[str, Any], new: Mapping[str, Any]) -> Iterator[str]:
    for name in sorted((old.keys() | new.keys()) - {"detectors", "torch"}):  # results name torch themselves
        if old.get(name) != new.get(name):
            yield f"{name} {_value(old.get(name))} → {_value(new.get(name))}"
    one, other = (
        {detector["id"]: detector.get("params", {}) for detector in side.get("detectors", ())} for side in (old, new)
    )
    for name in dict.fromkeys((*one, *other)):
        if name not in one or name not in other:
            yield f"{'new detector' if name in other else 'without the detector'} {_short(name)}"
            continue
        for setting in sorted(one[name].keys() | other[name].keys()):
            values = one[name].get(setting), other[name].get(setting)
            if values[0] != values[1]:
                yield f"{setting} of {_short(name)} {_value(values[0])} → {_value(values[1])}"


def _of_env(old: Env, new: Env) -> Iterator[str]:
    for name in ("torch", "device", "backend"):
        if getattr(old, name) != getattr(new, name):
            yield f"{name} {getattr(old, name)} → {getattr(new, name)}"


def _value(value: object) -> str:
    return "none" if value is None else str(value)[:80]


def _number(value: float | None) -> str:
    return "none" if value is None else f"{value:.4g}"


def _short(detector: str) -> str:
    return detector.removeprefix("bdprune.")
