"""``bdprune detectors`` and ``bdprune purifiers``: the registry as a table and as JSON."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import EntryPoint
from typing import Any

import msgspec
import pytest
from click.testing import Result as Ran

from bdprune import registry
from bdprune.analysis import Case
from bdprune.cli.methods import needs
from bdprune.methods import Detector
from bdprune.record import Evidence, MethodInfo, Needs

Run = Callable[..., Ran]


@dataclass(frozen=True)
class Hostile(Detector):
    """A detector whose texts contain control characters of a terminal."""

    id = "x.hostile"
    title = "\x1b[31mred"
    needs = Needs(images="labelled", minimum=30, per_class=3)
    cost = "gradients"
    limits = "It is\nnoisy."

    def __call__(self, case: Case) -> Evidence:
        raise NotImplementedError


@pytest.fixture
def hostile(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    point = EntryPoint("hostile", "anything:here", "bdprune.detectors")
    monkeypatch.setattr(EntryPoint, "load", lambda self: Hostile)
    monkeypatch.setattr(registry, "entry_points", lambda group: [point] if group == "bdprune.detectors" else [])
    registry._method_places.cache_clear()
    yield
    registry._method_places.cache_clear()


def test_detectors_are_listed_in_the_order_of_a_scan(run: Run) -> None:
    done = run("detectors")
    assert done.exit_code == 0
    head, *rows = done.stdout.splitlines()
    assert head.split()[:6] == ["name", "needs", "cost", "evidence", "budget", "gives"]
    order = ["lipschitz", "suspiciousness", "inversion", "unlearning", "trigger_pruning", "moved_filters"]
    assert [row.split()[0] for row in rows[:6]] == order
    assert "no images" in rows[0] and "weights" in rows[0]
    assert "100+ labelled images" in rows[3] and rows[3].split()[4:7] == ["training", "collapse", "fast"]
    assert any(row.strip().startswith("lipschitz: It finds backdoors") for row in rows), (
        "the limits are below the table"
    )


def test_detectors_of_no_budget_are_listed_last_as_by_name(run: Run) -> None:
    rows = run("detectors").stdout.splitlines()
    (row,) = [one for one in rows if one.split()[:1] == ["neural_cleanse"]]
    assert " by name " in row and "paper robust" in row
    (regular,) = [place for place, one in enumerate(rows) if one.split()[:1] == ["unlearning"]]
    assert regular < rows.index(row)


def test_purifiers_are_listed_with_their_presets(run: Run) -> None:
    done = run("purifiers")
    assert "evidence" not in done.stdout.splitlines()[0]
    (rnp,) = [line for line in done.stdout.splitlines() if line.split()[:1] == ["rnp"]]
    assert "paper code robust scan" in rnp and "detection, removal" in rnp
    (other,) = [line for line in done.stdout.splitlines() if line.split()[:1] == ["suspiciousness"]]
    assert " – " in other, "it has no presets"


@pytest.mark.parametrize("kind", ["detector", "purifier"])
def test_json_is_the_whole_description(run: Run, kind: Any) -> None:
    done = run(f"{kind}s", "--format", "json")
    found = [msgspec.convert(one, MethodInfo) for one in json.loads(done.stdout)]
    assert found == registry.methods(kind)


def test_a_plug_in_is_listed_and_cannot_rewrite_the_terminal(run: Run, hostile: None) -> None:
    done = run("detectors")
    (row,) = [line for line in done.stdout.splitlines() if line.split()[:1] == ["hostile"]]
    assert "30+ labelled images, 3 a class" in row and "gradients" in row and "\x1b" not in done.stdout
    assert "  hostile: It is\ufffdnoisy." in done.stdout
    assert "hostile" in run("scan", "--help").stdout, "help names it too"


def test_help_names_all_methods(run: Run) -> None:
    assert all(name in run("scan", "--help").stdout for name in registry.names("detector"))
    assert "rnp|suspiciousness" in run("purify", "--help").stdout


def test_needs_in_words() -> None:
    (first, *_) = registry.methods("detector")
    assert needs(first) == "no images"
    some = msgspec.structs.replace(first, needs=Needs(images="unlabelled", minimum=5))
    assert needs(some) == "5+ unlabelled images"
