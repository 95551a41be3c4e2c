"""Conformance checks for purifiers."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import cache, partial
from pathlib import Path

import msgspec
from torch import Tensor

from bdprune.analysis import Case, Memo
from bdprune.methods import Purifier, Repair
from bdprune.model import FilterGroup, Model
from bdprune.pipeline import purify
from bdprune.testing.planted import planted
from bdprune.testing.promises import (
    Check,
    Trial,
    asserted,
    check_attached,
    check_json,
    instance,
    reported,
    same,
    shared_checks,
    small_case,
)

_HOLDS, _GONE, _COST = 0.9, 0.2, 0.05
"""Minimum attack success before and maximum after a repair, and the clean accuracy that it may cost."""


def check_purifier(purifier: type[Purifier] | Purifier) -> dict[str, str]:
    """Runs all conformance checks on a purifier.

    It trains two small networks in a few seconds, once in each process.

    Args:
        purifier: a class, which is used with its default settings, or an instance.

    Returns:
        Each check by its name: ``passed``, or ``skipped: `` and the reason.

    Raises:
        AssertionError: a check fails; the message says which.
    """
    return reported(purifier_checks(purifier))


def purifier_checks(purifier: type[Purifier] | Purifier) -> Iterator[tuple[str, Check]]:
    """The single checks, for a test framework: a name, and the function to call (see :data:`bdprune.testing.Check`)."""
    return asserted(_checks(instance(purifier)))


def _checks(method: Purifier) -> Iterator[tuple[str, Check]]:
    repairs = cache(partial(_repairs, method))
    yield from shared_checks(Trial(method, _facts))
    yield "gives a record that can be stored", partial(_travels, method)
    yield "reports correctly what it changed", lambda: _is_truthful(repairs())
    yield "removes a planted backdoor", lambda: _removes(method, repairs()[0])
    yield "keeps the accuracy of the clean twin", lambda: _spares(repairs()[1])


def _repairs(purifier: Purifier) -> tuple[Repair, Repair]:
    """The repairs of the backdoored network and of its clean twin."""
    world = planted()
    return purifier(Case(world.backdoored, world.data)), purifier(Case(world.clean, world.data))


def _facts(repair: Repair) -> object:
    masks = {name: mask.tolist() for name, mask in repair.masks.items()}
    attempts = tuple(msgspec.structs.replace(one, seconds=0.0) for one in repair.attempts)
    said = replace(repair, model=None, masks=masks, seconds={}, attempts=attempts)  # type: ignore[arg-type]
    return Case(repair.model).digest, repr(said)


def _travels(purifier: Purifier) -> str:
    case = small_case(purifier, Memo())
    repair = purifier(case)
    assert isinstance(repair, Repair), f"The purifier returned {type(repair).__name__}, not Repair."
    assert repair.method == purifier.id, f"The repair names {repair.method!r}, not {purifier.id!r}."
    check_attached(repair.attachments, case.attachments)
    with tempfile.TemporaryDirectory() as folder:
        record = purify(case.model, case.images, method=purifier, attachments=folder).result
        written = {path.name for path in Path(folder).iterdir()}
    check_json(record)
    lost = [one.name for one in record.attachments if one.file not in written]
    assert not lost, f"Attachments were not written: {', '.join(lost)}."
    return ""


def _is_truthful(repairs: tuple[Repair, Repair]) -> str:
    world = planted()
    for model, repair in zip((world.backdoored, world.clean), repairs, strict=True):
        _says_what_changed(model, repair)
    return ""


def _says_what_changed(before: Model, repair: Repair) -> None:
    then, now = before.network.state_dict(), repair.model.network.state_dict()
    shapes = [{name: value.shape for name, value in state.items()} for state in (then, now)]
    assert shapes[0] == shapes[1], "The repaired network's tensors have other names or shapes."
    assert any(not same(then[name], now[name]) for name in now) == (repair.change != "nothing"), (
        f"The repair reports the change {repair.change!r}, but the weights show another."
    )
    cut = any(map(len, repair.pruned.values()))
    assert cut == ("pruned" in repair.change), f"The repair reports {repair.change!r} and prunes {repair.pruned}."
    groups = {group.name: group for group in before.groups}
    for name, index in repair.pruned.items():
        for one in index:
            assert _is_silent(now, groups[name], one), f"Filter {one} of {name} is reported as pruned but is not."
    if repair.change == "pruned":
        back = {name: value.clone() for name, value in now.items()}
        for name, index in repair.pruned.items():
            for tensor, start in _rows(groups[name]):
                if tensor in back:
                    back[tensor][[start + one for one in index]] = then[tensor][[start + one for one in index]]
        more = [name for name in back if not same(back[name], then[name])]
        assert not more, f"Other tensors than the pruned filters have changed: {', '.join(more[:5])}."


def _rows(group: FilterGroup) -> Iterator[tuple[str, int]]:
    """Names of the tensors with the filters of a group, and the row of the first filter."""
    for part in ("weight", "bias"):
        yield f"{group.conv}.{part}", 0
        yield from ((f"{norm.name}.{part}", norm.start) for norm in group.norms)


def _is_silent(state: Mapping[str, Tensor], group: FilterGroup, index: int) -> bool:
    """Whether a filter outputs a constant: its weights, or the scales of all its norms, are zero."""
    scales = [state[f"{norm.name}.weight"][norm.start + index] for norm in group.norms]
    return not state[f"{group.conv}.weight"][index].any() or (bool(scales) and not any(map(bool, scales)))


def _removes(purifier: Purifier, repair: Repair) -> str:
    if purifier.limits:
        return purifier.limits
    world = planted()
    before, after = world.attack_success(world.backdoored), world.attack_success(repair.model)
    assert before >= _HOLDS, f"The planted backdoor is too weak for the check: attack success {before:.2f}."
    assert after <= _GONE, f"Attack success is {after:.2f} after the repair; before it was {before:.2f}."
    assert repair.target_label in (None, world.target), f"It names label {repair.target_label}, not {world.target}."
    _keeps(world.accuracy(world.backdoored), world.accuracy(repair.model))
    return ""


def _keeps(before: float, after: float) -> None:
    assert before - after <= _COST, f"Clean accuracy falls from {before:.3f} to {after:.3f}."


def _spares(repair: Repair) -> str:
    world = planted()
    _keeps(world.accuracy(world.clean), world.accuracy(repair.model))
    return ""
