"""Detectors and purifiers by name, ours and those that plug in."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from importlib.metadata import EntryPoint
from typing import Any

import pytest

from bdprune.errors import OptionError
from bdprune.methods import registry


@dataclass(frozen=True)
class Plugged:
    seed: int = 0
    id = "x.plugged"
    needs_data = False


@dataclass(frozen=True)
class Seedless:
    id = "x.seedless"
    needs_data = False


@pytest.fixture
def plug(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Makes classes of this file appear as installed entry points of the detectors."""

    def install(**names: type) -> None:
        monkeypatch.setattr(EntryPoint, "load", lambda point: names.get(point.name) or ORIGINAL(point))
        points = [EntryPoint(name, "anything:here", "bdprune.detectors") for name in names]
        monkeypatch.setattr(registry, "entry_points", lambda group: points if group == "bdprune.detectors" else [])
        registry._homes.cache_clear()

    yield install
    registry._homes.cache_clear()


def test_installed_packages_are_looked_through_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr(registry, "entry_points", lambda group: asked.append(group) or [])
    registry._homes.cache_clear()
    for _ in range(3):
        registry.detectors(None, 0)
    assert asked == ["bdprune.detectors"]
    registry._homes.cache_clear()


ORIGINAL = EntryPoint.load


def test_all_of_ours_come_first_and_carry_the_seed() -> None:
    assert registry.names("bdprune.detectors")[:3] == ["unlearning", "lipschitz", "suspiciousness"]
    assert registry.names("bdprune.purifiers")[:2] == ["rnp", "suspiciousness"]
    made = registry.detectors(None, seed=7)
    assert [one.id for one in made][:3] == ["bdprune.unlearning", "bdprune.lipschitz", "bdprune.suspiciousness"]
    assert made[0].seed == 7  # type: ignore[attr-defined]


def test_a_precision_reaches_those_that_take_one() -> None:
    ascent, data_free, _ = registry.detectors(None, seed=0, precision="float32")
    assert ascent.precision == "float32" and not hasattr(data_free, "precision")  # type: ignore[attr-defined]
    (default,) = registry.detectors(["unlearning"], seed=0)
    assert default.precision == "winograd"  # type: ignore[attr-defined]


def test_chosen_by_name_or_handed_over_in_order() -> None:
    own = Plugged(3)
    made = registry.detectors(["lipschitz", own], seed=7)
    assert made[0].id == "bdprune.lipschitz" and made[1] is own


def test_plug_ins_are_found_and_seeded_where_they_take_a_seed(plug: Any) -> None:
    plug(mine=Plugged, other=Seedless)
    made = registry.detectors(["mine", "other"], seed=7)
    assert made == [Plugged(7), Seedless()]
    assert registry.names("bdprune.detectors")[-2:] == ["mine", "other"]


def test_plug_in_with_a_name_of_ours_is_left_out_with_a_warning(plug: Any, caplog: pytest.LogCaptureFixture) -> None:
    plug(mine=Plugged)
    with caplog.at_level(logging.WARNING):
        plug(lipschitz=Plugged)
        assert registry.names("bdprune.detectors") == ["unlearning", "lipschitz", "suspiciousness"]
    assert "lipschitz" in caplog.text


def test_unknown_names_say_what_there_is() -> None:
    with pytest.raises(OptionError, match="no detector 'magic'") as caught:
        registry.detectors(["magic"], seed=0)
    assert "unlearning, lipschitz, suspiciousness" in caught.value.mend
    with pytest.raises(OptionError, match="no purifier 'magic'"):
        registry.purifier("magic", {}, 0)


def test_purifier_takes_settings_preset_and_seed() -> None:
    made: Any = registry.purifier("rnp", {"mode": "weights", "max_drop": 0.05}, 7)
    assert (made.id, made.mode, made.max_drop, made.seed) == ("bdprune.rnp", "weights", 0.05, 7)
    paper: Any = registry.purifier("rnp", {"preset": "paper", "max_drop": 0.05}, 7)
    assert paper.unlearning != made.unlearning and (paper.max_drop, paper.seed) == (0.05, 7)
    assert registry.purifier(made, {}, 9) is made


def test_purifier_refuses_settings_that_it_does_not_have() -> None:
    with pytest.raises(OptionError, match="takes no preset"):
        registry.purifier("suspiciousness", {"preset": "paper", "max_drop": 0.1, "mu": 2.0}, 0)
    with pytest.raises(OptionError, match="preset 'best'"):
        registry.purifier("rnp", {"preset": "best"}, 0)
