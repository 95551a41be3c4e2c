"""What changed between two stores, and why."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec
import pytest

from bdprune.record import Evidence
from bdprune.store import ScanKey, Store, changes

from .conftest import LIPSCHITZ, key, result

Filled = Callable[..., Store]
FLAGGED = msgspec.structs.replace(LIPSCHITZ, score=5.0, flagged=True, target_label=2)


def changed(filled: Filled, after: Any, used: ScanKey | None = None) -> Any:
    found = changes(filled("a.db", result()), filled("b.db", after, key=used))
    assert (found.gone, found.new) == ((), ())
    return found.changed[0] if found.changed else None


def test_the_same_results_are_no_change(filled: Filled) -> None:
    found = changes(filled("a.db", result()), filled("b.db", result(seconds=9.0, started="later")))
    assert found.changed == () and found.same == 1


def test_other_weights(filled: Filled) -> None:
    model = msgspec.structs.replace(result().model, digest="3" * 64)
    after = result(verdict="suspicious", risk=0.9, target_label=2, detectors=(FLAGGED,), model=model)
    found = changed(filled, after, key("9" * 64))
    assert (found.before, found.after) == ("inconclusive", "suspicious")
    assert found.changes == (
        "verdict inconclusive → suspicious",
        "label none → 2",
        "risk 0.25 → 0.9",
        "lipschitz: 1.5 → 5 (flagged, label 2)",
    )
    assert found.reasons == ("other weights",)


def test_settings_version_and_detectors_are_reasons(filled: Filled) -> None:
    detectors = [{"id": "bdprune.lipschitz", "params": {"threshold": 1.0}}, {"id": "x.new", "params": {}}]
    used = key(seed=7, detectors=detectors)
    more = Evidence(detector="x.new", score=0.5, threshold=1.0, flagged=False)
    found = changed(filled, result(detectors=(LIPSCHITZ, more)), ScanKey(used.model, "", used.settings, "2"))
    assert found.changes == ("new evidence of x.new: 0.5",)
    assert found.reasons == ("seed 0 → 7", "threshold of lipschitz 3.0 → 1.0", "new detector x.new", "bdprune 1 → 2")


def test_another_version_of_torch_is_one_reason(filled: Filled) -> None:
    env = msgspec.structs.replace(result().env, torch="3")
    assert changed(filled, result(risk=0.5, env=env), key(torch="3")).reasons == ("torch 2 → 3",)


def test_another_file_with_the_same_weights(filled: Filled) -> None:
    assert changed(filled, result(risk=0.5), key("9" * 64)).reasons == ("another file with the same weights",)


@pytest.mark.parametrize("risk", [0.251, 0.25])
def test_a_tiny_change_is_none(filled: Filled, risk: float) -> None:
    assert changed(filled, result(risk=risk)) is None


def test_a_change_without_a_cause_says_so(filled: Filled) -> None:
    assert "no cause is known" in changed(filled, result(risk=0.5)).reasons[0]


def test_models_of_one_store_only(filled: Filled) -> None:
    found = changes(filled("a.db", result("a.pth")), filled("b.db", result("b.pth")))
    assert (found.gone, found.new, found.same) == (("a.pth",), ("b.pth",), 0)


def test_a_file_named_like_a_set_of_weights_is_another_model(filled: Filled) -> None:
    info = result().artifact
    more = {"path": "x.pth", "state_key": "ema", "sets": ("model", "ema"), "sha256": "5" * 64}
    sets = result(artifact=msgspec.structs.replace(info, **more))
    assert sets.name == "x.pth#ema"
    found = changes(filled("a.db", sets, result("x.pth#ema")), filled("b.db", sets, result("x.pth#ema", risk=0.9)))
    assert (found.same, len(found.changed)) == (1, 1)


HUB = "hf:acme/resnet@{}/model.safetensors"
OLD, NEW, OTHER = (HUB.format(digit * 40) for digit in "abc")


def test_a_branch_that_moved_is_one_model_with_another_commit(filled: Filled) -> None:
    found = changes(filled("a.db", result(OLD)), filled("b.db", result(NEW, risk=0.9)))
    assert (found.gone, found.new) == ((), ())
    (one,) = found.changed
    assert (one.name, one.changes) == (OLD, ("risk 0.25 → 0.9",))
    assert one.reasons[0] == f"another commit: {NEW}"


def test_a_commit_in_both_stores_is_matched_with_itself(filled: Filled) -> None:
    found = changes(filled("a.db", result(OLD)), filled("b.db", result(OLD), result(NEW)))
    assert (found.same, found.gone, found.new) == (1, (), (NEW,))


def test_several_commits_are_not_matched(filled: Filled) -> None:
    found = changes(filled("a.db", result(OLD)), filled("b.db", result(NEW), result(OTHER)))
    assert (found.gone, found.new) == ((OLD,), (NEW, OTHER))
