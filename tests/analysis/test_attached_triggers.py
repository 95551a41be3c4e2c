"""Triggers as a part of evidence."""

from __future__ import annotations

import hashlib
from dataclasses import replace

import torch

from bdprune.analysis import MOST_PICTURED, Case, attach_triggers, parse_trigger, trigger_names
from bdprune.loops import Trigger

from ..conftest import Bright


def trigger(target: int | None = 1, sources: tuple[int, ...] = (), additive: bool = False) -> Trigger:
    mask = torch.zeros(1, 8, 8)
    mask[0, 6:, 6:] = 1
    mine = (None, "additive") if additive else (mask, "patch")
    return Trigger(mine[0], torch.full((3, 8, 8), 0.2), target, sources, 0.9, 20, mine[1])


def test_records_name_their_attachments_and_hold_pictures(bright: Bright) -> None:
    case = Case(bright.model, bright.data)
    given = trigger(), trigger(None, additive=True)
    infos, attached = attach_triggers(case, *given)
    assert [one.attachment for one in infos] == [one.name for one in attached] == ["trigger-1", "trigger-any-additive"]
    assert [set(one.pictures) for one in infos] == [
        {"mask", "pattern", "stamped", "difference"},
        {"pattern", "stamped", "difference"},
    ]
    for before, info, one in zip(given, infos, attached, strict=True):
        content = case.attachments[one.sha256]
        assert hashlib.sha256(content).hexdigest() == one.sha256 and one.media_type == "application/safetensors"
        assert torch.equal(parse_trigger(content).pattern, before.pattern)
        assert info.flip_rate == 0.9 and info.file == ""


def test_without_images_there_are_no_pictures_of_them(bright: Bright) -> None:
    (info,), (one,) = attach_triggers(Case(bright.model), trigger())
    assert info.pictures == {} and one.name == "trigger-1"


def test_only_the_first_triggers_have_pictures(bright: Bright) -> None:
    infos, attached = attach_triggers(Case(bright.model, bright.data), *[trigger()] * (MOST_PICTURED + 2))
    assert [bool(one.pictures) for one in infos] == [True] * MOST_PICTURED + [False] * 2
    assert len({one.name for one in attached}) == MOST_PICTURED + 2


def test_no_triggers_are_no_evidence(bright: Bright) -> None:
    assert attach_triggers(Case(bright.model)) == ((), ())


def test_names_differ_and_fit_an_attachment() -> None:
    many = tuple(range(10))
    given = trigger(8), trigger(8, (3, 5)), trigger(8), trigger(8), trigger(8, many), trigger(None)
    assert trigger_names(*given) == [
        "trigger-8",
        "trigger-8-from-3-5",
        "trigger-8-no-2",
        "trigger-8-no-3",
        "trigger-8-from-10-labels",
        "trigger-any",
    ]
    longest = replace(trigger(99_999, (99_998, 99_997, 99_996, 99_995)), mask=None)
    assert len(trigger_names(longest)[0]) <= 64
