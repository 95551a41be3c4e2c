"""Shared by all methods: checked needs, presets, a description, and evidence from a threshold."""

from __future__ import annotations

import json
import math
import time
from dataclasses import dataclass, field
from typing import Any, ClassVar

import msgspec
import pytest
import torch

from bdprune.analysis import Case
from bdprune.errors import DataError, OptionError
from bdprune.loops import FineTuneSettings
from bdprune.methods import Detector, Phases, what_changed
from bdprune.record import Evidence, MethodInfo, Needs
from bdprune.registry import method_class


@dataclass(frozen=True)
class Example(Detector):
    """A detector whose needs the test sets."""

    tuning: FineTuneSettings = field(default_factory=FineTuneSettings)
    largest: float = math.inf
    least: int = 0

    id = "x.example"
    title = "an example"
    needs: ClassVar[Needs] = Needs(minimum=4, per_class=2)
    presets: ClassVar[dict[str, dict[str, Any]]] = {"small": {"largest": 1.0, "least": 3}}

    def __call__(self, case: Case) -> Evidence:
        data = self.check(case)
        return self.evidence(0.0 if data is None else len(data), 5)


@dataclass(frozen=True)
class Blind(Example):
    id = "x.blind"
    needs = Needs(images="none", minimum=0)


def test_needs_are_checked(bright: Any) -> None:
    def case(*index: int) -> Case:
        return Case(bright.model, bright.data.subset(torch.tensor(index)))

    with pytest.raises(DataError, match=r"x\.example needs clean images"):
        Example()(Case(bright.model))
    with pytest.raises(DataError, match="3 clean images are too few") as caught:
        Example()(case(0, 1, 2))
    assert "at least 4" in str(caught.value)
    with pytest.raises(DataError, match="2 clean images of every class"):
        Example()(case(0, 1, 2, 3, 4))
    assert Example()(case(0, 1, 2, 3, 4, 5)).score == 6
    assert Blind()(Case(bright.model)).score == 0 and Blind()(case(0)).score == 1


def test_evidence_is_flagged_above_its_threshold_and_carries_the_settings() -> None:
    detector = Example(least=2)
    at, above = detector.evidence(5, 5), detector.evidence(5.1, 5, target_label=3, params={})
    assert (at.flagged, above.flagged) == (False, True) and (above.detector, above.target_label) == ("x.example", 3)
    assert at.params == detector.params and above.params == {}
    assert at.params["least"] == 2 and at.params["tuning"]["lr"] == FineTuneSettings().lr
    assert Evidence.from_json(at.to_json()) == at.tidy()
    spoilt = detector.evidence(math.nan, 5)
    assert not spoilt.flagged and not spoilt.valid


def test_presets_are_named_settings() -> None:
    assert Example.preset("small") == Example(largest=1.0, least=3)
    assert Example.preset("small", least=9) == Example(largest=1.0, least=9)
    with pytest.raises(OptionError, match="no preset 'large'") as caught:
        Example.preset("large")
    assert "Choose one of small." in str(caught.value)
    with pytest.raises(OptionError) as caught:
        method_class("detector", "lipschitz").preset("small")
    assert "It has no presets." in str(caught.value)


def test_a_description_is_strict_json() -> None:
    info = Example.info("example")
    assert (info.id, info.name, info.kind, info.cost) == ("x.example", "example", "detector", "forward")
    assert info.settings["largest"] is None and info.settings["tuning"]["lr"] == FineTuneSettings().lr
    assert info.presets == {"small": {"largest": 1.0, "least": 3}}
    assert (info.stackable, info.sign, info.level, info.rule and info.rule.id) == (False, "other", "default", "BD010")
    text = json.dumps(msgspec.to_builtins(info), allow_nan=False)
    assert msgspec.json.decode(text, type=MethodInfo) == info


def test_changes_are_named_in_words() -> None:
    pairs = [(pruned, retrained) for pruned in (False, True) for retrained in (False, True)]
    assert [what_changed(pruned=pruned, retrained=retrained) for pruned, retrained in pairs] == [
        "nothing",
        "retrained",
        "pruned",
        "pruned and retrained",
    ]


def test_phases_are_timed_under_their_names() -> None:
    phase = Phases()
    with phase("one"):
        time.sleep(0.01)
    with phase("two"):
        pass
    assert list(phase.seconds) == ["one", "two"] and phase.seconds["one"] > 0.009 > phase.seconds["two"]
