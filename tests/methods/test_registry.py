"""Detectors and purifiers by name: built-in ones and plug-ins."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest

import bdprune
import bdprune.detectors
from bdprune import registry
from bdprune.analysis import Case
from bdprune.errors import OptionError
from bdprune.methods import Detector
from bdprune.record import Evidence, Needs

SCANNED = [
    "lipschitz",
    "suspiciousness",
    "inversion",
    "unlearning",
    "trigger_pruning",
    "moved_filters",
    "pair_inversion",
]
"""The detectors of scans in their order."""
NAMED = ["neural_cleanse", "nu_neural_cleanse", "dl_tnd", "df_tnd", "feature_margin", "latent_margin"]
"""The detectors that run only by name."""
OURS = [*SCANNED, *NAMED]
ORIGINAL = EntryPoint.load


@dataclass(frozen=True)
class Seedless(Detector):
    id = "x.seedless"
    title = "nothing at all"
    needs = Needs(images="none", minimum=0)

    def __call__(self, case: Case) -> Evidence:
        return self.evidence(0.0, 1.0)


@dataclass(frozen=True)
class Plugged(Seedless):
    seed: int = 0
    id = "x.plugged"


@pytest.fixture
def reloaded_registry() -> Iterator[None]:
    """A registry that reloads before and after the test."""
    registry._method_places.cache_clear()
    yield
    registry._method_places.cache_clear()


@pytest.fixture
def plug(monkeypatch: pytest.MonkeyPatch, reloaded_registry: None) -> Any:
    """Makes objects of this file appear as installed entry points of the detectors."""

    def install(**names: object) -> None:
        monkeypatch.setattr(EntryPoint, "load", lambda point: names.get(point.name) or ORIGINAL(point))
        points = [EntryPoint(name, "anything:here", "bdprune.detectors") for name in names]
        monkeypatch.setattr(registry, "entry_points", lambda group: points if group == "bdprune.detectors" else [])
        registry._method_places.cache_clear()

    return install


def test_installed_packages_are_searched_once(monkeypatch: pytest.MonkeyPatch, reloaded_registry: None) -> None:
    asked: list[str] = []
    monkeypatch.setattr(registry, "entry_points", lambda group: asked.append(group) or [])
    for _ in range(3):
        registry.chosen_detectors(None, {})
        registry.methods("detector")
        registry.detector("lipschitz")
    assert asked == ["bdprune.detectors"]


def test_names_come_from_the_modules_without_importing_them() -> None:
    assert registry.names("detector") == sorted(OURS)
    assert {"rnp", "suspiciousness"} <= set(registry.names("purifier"))


def test_a_scan_runs_all_detectors_cheapest_first_with_the_seed() -> None:
    made = registry.chosen_detectors(None, {"seed": 7})
    scanned = [one for one in made if one.level is not None]
    assert [one.id for one in scanned] == [f"bdprune.{name}" for name in SCANNED]
    costs = ["weights", "forward", "gradients", "training", "gradients", "training", "gradients"]
    assert [one.cost for one in scanned] == costs
    assert not hasattr(made[0], "seed") and all(one.seed == 7 for one in scanned[1:])  # type: ignore[attr-defined]
    listed = [one.name for one in registry.methods("detector")]
    assert listed[: len(SCANNED)] == SCANNED and sorted(listed) == sorted(OURS)


def test_a_precision_reaches_the_detectors_that_accept_one() -> None:
    chosen = registry.chosen_detectors(["lipschitz", "unlearning"], {"seed": 0, "precision": "float32"})
    data_free, ascent = chosen
    assert ascent.precision == "float32" and not hasattr(data_free, "precision")  # type: ignore[attr-defined]
    (default,) = registry.chosen_detectors(["unlearning"], {"seed": 0, "precision": None})
    assert default.precision == "winograd"  # type: ignore[attr-defined]


def test_detectors_are_given_by_name_or_as_objects_in_order() -> None:
    own = Plugged(3)
    made = registry.chosen_detectors(["unlearning", own, "lipschitz"], {"seed": 7})
    assert [one.id for one in made] == ["bdprune.unlearning", "x.plugged", "bdprune.lipschitz"] and made[1] is own
    assert own.seed == 3, "an object keeps its settings"
    assert [one.id for one in registry.chosen_detectors(" unlearning, lipschitz,unlearning", {})] == [
        "bdprune.unlearning",
        "bdprune.lipschitz",
    ]


def test_plug_ins_are_found_and_get_a_seed_if_they_accept_one(plug: Any) -> None:
    plug(mine=Plugged, other=Seedless)
    assert registry.chosen_detectors(["mine", "other"], {"seed": 7}) == [Plugged(7), Seedless()]
    assert registry.names("detector") == [*sorted(OURS), "mine", "other"]
    order = [one.name for one in registry.methods("detector") if one.level is not None]
    assert order.index("unlearning") < min(order.index("mine"), order.index("other")), "larger budgets come later"


def test_a_plug_in_with_a_built_in_name_is_skipped_with_a_warning(plug: Any, caplog: pytest.LogCaptureFixture) -> None:
    plug(mine=Plugged)
    with caplog.at_level(logging.WARNING):
        plug(lipschitz=Plugged)
        assert registry.names("detector") == sorted(OURS)
    assert "lipschitz" in caplog.text
    assert registry.detector("lipschitz").id == "bdprune.lipschitz"


class OldDetector:
    """An old detector without a description."""

    id = "x.old"
    needs_data = False

    def __call__(self, model: object, data: object) -> None: ...


@pytest.mark.parametrize(
    "wrong",
    [OldDetector, len, "text", Plugged(), registry.method_class("purifier", "rnp")],
    ids=["old", "function", "text", "instance", "purifier"],
)
def test_a_plug_in_without_a_detector_is_skipped_with_a_clear_error(
    plug: Any, wrong: object, caplog: pytest.LogCaptureFixture
) -> None:
    plug(wrong=wrong, mine=Plugged)
    with pytest.raises(OptionError, match="plug-in 'wrong' is not a detector") as caught:
        registry.detector("wrong")
    assert "subclass of bdprune.Detector" in str(caught.value)
    assert [one.name for one in registry.methods("detector")][-1:] != ["wrong"]
    assert "skipped the plug-in wrong" in caplog.text
    assert "x.wrong" not in [one.id for one in registry.chosen_detectors(None, {})]
    assert registry.chosen_detectors(["mine"], {"seed": 2}) == [Plugged(2)], "the other plug-ins still load"


def test_a_plug_in_that_cannot_be_imported_is_skipped_and_named(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A broken package must not end every scan."""
    point = EntryPoint("broken", "no_such_module_of_anybody:Detector", "bdprune.detectors")
    monkeypatch.setattr(
        registry, "_method_places", lambda kind: {"lipschitz": "bdprune.detectors.lipschitz", "broken": point}
    )
    with pytest.raises(OptionError, match="plug-in 'broken' cannot be imported: ModuleNotFoundError"):
        registry.detector("broken")
    assert [one.id for one in registry.chosen_detectors(None, {})] == ["bdprune.lipschitz"]
    assert [one.name for one in registry.methods("detector")] == ["lipschitz"]
    assert "skipped the plug-in broken" in caplog.text
    root = Path(__file__).parents[2]
    result = bdprune.scan(root / "zoo" / "cifar10-w8" / "clean.safetensors")
    assert result.not_run == ("broken",) and "cannot be made: broken" in result.findings[-1].message


@pytest.mark.parametrize("wrong", [[3], [len], [registry.method_class("detector", "lipschitz")], 3])
def test_detectors_are_names_or_instances(wrong: Any) -> None:
    with pytest.raises(OptionError, match=r"(must be a list|is not a detector)"):
        registry.chosen_detectors(wrong, {})


MODULE = '''
from dataclasses import dataclass

from bdprune.methods import Detector
from bdprune.record import Needs


@dataclass(frozen=True)
class NewDetector(Detector):
    """A detector that a module was written for, and nothing else was touched."""

    threshold: float = 2.0

    id = "bdprune.brandnew"
    title = "something new"
    needs = Needs(images="none", minimum=0)
    cost = "weights"

    def __call__(self, case):
        return self.evidence(1.0, self.threshold)
'''


def test_a_module_in_the_folder_is_a_detector(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reloaded_registry: None, tiny: Any
) -> None:
    folder = tmp_path / "detectors"
    folder.mkdir()
    (folder / "brandnew.py").write_text(MODULE)
    monkeypatch.setattr(bdprune.detectors, "__path__", [*bdprune.detectors.__path__, str(folder)])
    importlib.invalidate_caches()
    assert "brandnew" in registry.names("detector")
    assert registry.detector("brandnew", threshold=3.0).params == {"threshold": 3.0}
    (info,) = [one for one in registry.methods("detector") if one.name == "brandnew"]
    assert (info.id, info.cost, info.settings, info.stackable) == (
        "bdprune.brandnew",
        "weights",
        {"threshold": 2.0},
        False,
    )
    found = bdprune.scan(tiny.path, arch=tiny.arch, input_shape=tiny.input_shape)
    assert "bdprune.brandnew" in [one.detector for one in found.detectors]


def test_every_method_describes_itself() -> None:
    kinds: list[registry.Kind] = ["detector", "purifier"]
    for kind in kinds:
        for info in registry.methods(kind):
            assert info.kind == kind and info.id == f"bdprune.{info.name}" and info.title
            assert info.paper or info.name == "auto"  # it chooses among published methods
            assert (info.rule is not None) == (kind == "detector")
            assert registry.method_class(kind, info.name).settings() == info.settings.keys()


def test_unknown_names_are_errors_that_list_the_known_ones() -> None:
    with pytest.raises(OptionError, match="no detector 'magic'") as caught:
        registry.chosen_detectors(["magic"], {"seed": 0})
    assert ", ".join(sorted(OURS)) in str(caught.value)
    with pytest.raises(OptionError, match="no purifier 'magic'"):
        registry.chosen_purifier("magic", None, {}, {"seed": 0})


def test_a_purifier_takes_settings_a_preset_and_a_seed() -> None:
    made: Any = registry.chosen_purifier("rnp", None, {"mode": "weights", "max_drop": 0.05}, {"seed": 7})
    assert (made.id, made.mode, made.max_drop, made.seed) == ("bdprune.rnp", "weights", 0.05, 7)
    paper: Any = registry.chosen_purifier("rnp", "paper", {"max_drop": 0.05}, {"seed": 7})
    assert paper.unlearning != made.unlearning and (paper.max_drop, paper.seed) == (0.05, 7)
    assert registry.chosen_purifier("rnp", None, {"seed": 1}, {"seed": 7}).seed == 1  # type: ignore[attr-defined]
    assert registry.chosen_purifier(made, None, {}, {"seed": 9}) is made


def test_unknown_settings_and_presets_are_errors() -> None:
    with pytest.raises(OptionError, match="'suspiciousness' has no setting max_share_of_it, strict"):
        registry.purifier("suspiciousness", strict=True, mu=2.0, max_share_of_it=1)
    with pytest.raises(OptionError, match=r"bdprune\.suspiciousness has no preset 'paper'"):
        registry.purifier("suspiciousness", preset="paper")
    with pytest.raises(OptionError, match="preset 'best'") as caught:
        registry.purifier("rnp", preset="best")
    assert "paper" in str(caught.value) and "robust" in str(caught.value)
    with pytest.raises(OptionError, match="has no setting seed"):
        registry.detector("lipschitz", seed=3)
