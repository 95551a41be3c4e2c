"""Verifies a zoo: models that agree, models that differ, and the table for the documents."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from click.testing import Result as Ran

from bdprune.attacks.badnets import BadNets
from bdprune.attacks.blend import ABlend, Blend
from bdprune.attacks.feature_collision import FeatureCollision
from bdprune.attacks.sig import Sig
from bdprune.errors import DataError, OptionError
from bdprune.zoo.making import make
from bdprune.zoo.manifest import Entry, Manifest, read_manifest
from bdprune.zoo.store import Env, Truth, read_truth, write_truth
from bdprune.zoo.verification import Check, agrees, markdown, missed_bars, success_bar, verify, with_section

Run = Callable[..., Ran]


@pytest.fixture
def run() -> Run:
    from click.testing import CliRunner

    from bdprune.cli.main import main

    return lambda *args: CliRunner().invoke(main, [str(arg) for arg in args], prog_name="bdprune")


def test_a_zoo_agrees_with_itself(made: Path, tiny_data: Path) -> None:
    said: list[str] = []
    checks = verify(made, tiny_data, say=said.append)
    assert [(check.entry.name, check.state) for check in checks] == [
        ("clean", "agrees"),
        ("bad", "agrees"),
        ("late", "pending"),
    ]
    assert [check.found for check in checks[:2]] == list(read_truth(made.with_suffix("")).values())
    assert said == ["clean", "bad"]


def test_swapped_and_unmeasured_models_are_found(made: Path, tiny_data: Path, run: Run, tmp_path: Path) -> None:
    home, document = made.with_suffix(""), tmp_path / "zoo.md"
    truth = read_truth(home)
    wrong = msgspec.structs.replace(truth["bad"], clean_accuracy=truth["bad"].clean_accuracy + 0.0021)
    write_truth(home, {"bad": wrong})
    assert [check.state for check in verify(made, tiny_data)] == ["not measured", "differs", "pending"]
    done = run("zoo", "verify", made, "--data", tiny_data, "--write", document)
    assert done.exit_code == 1
    rows = {line.split()[0]: line for line in done.stdout.splitlines()}
    assert "NOT MEASURED" in rows["clean"] and "DIFFERS: clean accuracy " in rows["bad"] and "pending" in rows["late"]
    assert not document.exists()


def test_a_trigger_that_does_not_fit_the_attack_is_found(made: Path, tiny_data: Path) -> None:
    """The trigger in the file is used, and it must belong to the attack."""
    home = made.with_suffix("")
    from safetensors.torch import load_file, save_file

    path = home / "bad.trigger"
    patch = load_file(path)["patch"]
    assert patch.shape == (3, 3, 3)
    save_file({"patch": patch[:, :2, :2].contiguous()}, path)
    with pytest.raises(DataError, match=r"trigger .*bad\.trigger.* of model 'bad' cannot be read"):
        verify(made, tiny_data, only=["bad"])
    path.unlink()  # a static trigger is made from the settings
    assert [check.state for check in verify(made, tiny_data, only=["bad"])] == ["agrees"]


def test_the_file_of_a_learned_trigger_must_exist(made: Path, tiny_data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (made.with_suffix("") / "bad.trigger").unlink()
    monkeypatch.setattr(BadNets, "trigger_type", "learned")
    with pytest.raises(DataError, match="cannot be read"):
        verify(made, tiny_data, only=["bad"])


def test_models_in_another_folder_are_verified(made: Path, tiny_data: Path, tmp_path: Path) -> None:
    shutil.move(made.with_suffix(""), tmp_path / "there")
    assert [check.state for check in verify(made, tiny_data)] == ["not made", "not made", "pending"]
    assert [check.state for check in verify(made, tiny_data, tmp_path / "there")] == ["agrees", "agrees", "pending"]
    with pytest.raises(OptionError):
        verify(made, tiny_data, only=["nope"])


def test_measurements_of_removed_models_stay(made: Path, tiny_data: Path, run: Run) -> None:
    home = made.with_suffix("")
    known = read_truth(home)["bad"]
    on_gpu = msgspec.structs.replace(known, seconds=66.0, env=Env("2.11.0", 1, "NVIDIA H200"))
    write_truth(home, {**read_truth(home), "bad": on_gpu})
    (home / "bad.safetensors").unlink()
    checks = verify(made, tiny_data)
    assert [check.state for check in checks] == ["agrees", "not kept", "pending"]
    assert (checks[1].found, checks[1].known) == (None, on_gpu)
    text = markdown(read_manifest(made), checks)
    (row,) = (line for line in text.splitlines() if line.startswith("| bad |"))
    assert f"| {100 * known.clean_accuracy:.2f} |" in row and "| 1.1 (GPU) |" in row
    assert "\nMeasured after training; their weights are not kept here: bad.\n" in text
    rows = {line.split()[0]: line for line in run("zoo", "list", made).stdout.splitlines()}
    assert "not kept" in rows["bad"] and f"{100 * known.clean_accuracy:.1f} %" in rows["bad"]
    (made_again,) = make(made, tiny_data, only=["bad"])
    assert made_again.env == read_truth(home)["bad"].env != on_gpu.env
    assert [check.state for check in verify(made, tiny_data, only=["bad"])] == ["agrees"]


def test_a_changed_manifest_does_not_replace_the_recipe_of_a_model(made: Path, tiny_data: Path, run: Run) -> None:
    before = made.read_text()
    made.write_text(before.replace("target = 1, rate = 0.25", "target = 2, rate = 0.25"))
    weights = made.with_suffix("") / "bad.safetensors"
    with pytest.raises(OptionError, match=r"bad\.safetensors was made by another recipe .*: attack .*1.*, now .*2"):
        make(made, tiny_data)
    assert [check.state for check in verify(made, tiny_data)] == ["agrees", "other recipe", "pending"]
    assert verify(made, tiny_data, only=["bad"])[0].known is None
    done = run("zoo", "verify", made, "--data", tiny_data, "--only", "bad")
    assert done.exit_code == 1 and "OTHER RECIPE" in done.stdout
    assert "bad    other recipe" in run("zoo", "list", made).stdout
    weights.unlink()
    assert [check.state for check in verify(made, tiny_data)] == ["agrees", "not made", "pending"]
    assert make(made, tiny_data, only=["bad"])[0].target_label == 2
    assert [check.state for check in verify(made, tiny_data, only=["bad"])] == ["agrees"]


def test_the_table_is_written_into_the_document(made: Path, tiny_data: Path, run: Run, tmp_path: Path) -> None:
    document = tmp_path / "zoo.md"
    document.write_text("# The zoo\n\nBy hand.\n")
    done = run("zoo", "verify", made, "--data", tiny_data, "--write", document)
    assert done.exit_code == 0, done.output
    assert "measuring clean" in done.stderr
    text = document.read_text()
    assert text.startswith("# The zoo\n\nBy hand.\n\n## tiny\n\n<!-- zoo verify tiny: begin -->\n| model |")
    assert "- **late** (blend). There was no time." in text
    assert run("zoo", "verify", made, "--data", tiny_data, "--write", document, "-q").stderr == ""
    assert document.read_text() == text
    assert run("zoo", "verify", made, "--data", tiny_data, "--write", document, "--only", "bad").exit_code == 4


TRUTH = Truth("m", 1, 0.9, 0.99, 0.01, 60.0)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({}, True),
        ({"clean_accuracy": 0.9019}, True),
        ({"clean_accuracy": 0.8979}, False),
        ({"attack_success_rate": 0.9875}, False),
        ({"robust_accuracy": 0.0125}, False),
        ({"target_label": 2}, False),
        ({"sources": (3,)}, False),
        ({"cover_accuracy": 0.5}, False),
        ({"attack_success_rate": None}, False),
        ({"seconds": 1.0}, True),
    ],
)
def test_tolerance(change: dict[str, Any], expected: bool) -> None:
    assert agrees(TRUTH, msgspec.structs.replace(TRUTH, **change)) is expected


def test_the_required_success_rate_depends_on_the_attack() -> None:
    assert success_bar(BadNets(target=1)) == success_bar(Blend(target=0)) == 0.95
    assert success_bar(BadNets(target=None)) == success_bar(Blend(target=None)) == 0.80
    assert success_bar(ABlend(target=1)) == 0.70
    assert success_bar(Sig(target=1)) == success_bar(FeatureCollision(target=0)) == 0.85


def zoo_of(*models: tuple[str, float, dict[str, Any] | None, float | None]) -> tuple[Manifest, list[Check]]:
    checks = []
    for name, accuracy, attack, success in models:
        entry = Entry(name, 0, "cifar10", 10, "resnet18_cifar", 32, (), 1, Path(), attack, note=f"{name}'s note")
        target = attack["target"] if attack else None
        checks.append(Check(entry, "agrees", None, Truth(name, target, accuracy, success, success, 1234.0)))
    zoo = Manifest("z", "cifar10", (), Path(), tuple(check.entry for check in checks), 0, 0, 0.89)
    return zoo, checks


def test_minimum_rates_of_clean_accuracy_and_success() -> None:
    """The clean mean is 91.5 %, so that 90 % is the least."""
    bad = {"kind": "badnets", "target": 3}
    zoo, checks = zoo_of(
        ("c1", 0.90, None, None),
        ("c2", 0.93, None, None),
        ("good", 0.9001, bad, 0.95),
        ("near", 0.8999, bad, 0.96),
        ("weak", 0.91, bad, 0.9499),
        ("low", 0.88, bad, 1.0),
        ("all", 0.91, {"kind": "badnets", "target": "all-to-all"}, 0.81),
    )
    other = dataclasses.replace(checks[0].entry, name="c3", width=64)
    checks.append(Check(other, "agrees", None, Truth("c3", None, 0.95, None, None, 1.0)))
    assert missed_bars(zoo, checks) == {
        "near": ["CA is 1.51 points below the clean models' mean"],
        "weak": ["ASR 94.99 is below 95.00"],
        "low": ["CA 88.00 is below 89.00", "CA is 3.50 points below the clean models' mean"],
    }


def test_the_table_lists_the_checks() -> None:
    zoo, checks = zoo_of(("c1", 0.9, None, None), ("weak", 0.91, {"kind": "badnets", "target": 3, "rate": 0.005}, 0.5))
    late = dataclasses.replace(checks[1].entry, name="late", pending=True, note="No time.")
    text = markdown(zoo, [*checks, Check(late, "pending")])
    assert "| c1 | clean | – | – | 90.00 | – | – | 21 | met |" in text
    assert "| weak | badnets | 3 | 0.5 % | 91.00 | 50.00 | 50.00 | 21 | missed |" in text
    assert "Mean CA of the clean models (cifar10, resnet18_cifar, width 32; 1): 90.00 %." in text
    assert "- **weak**: ASR 50.00 is below 95.00. weak's note" in text
    assert "- **late** (badnets). No time." in text
    assert "Cover accuracy" not in text


def test_a_model_under_a_defence_is_named_and_has_no_bar_for_the_attack() -> None:
    zoo, checks = zoo_of(("c1", 0.9, None, None), ("abl", 0.9, {"kind": "badnets", "target": 3}, 0.005))
    checks[1] = dataclasses.replace(checks[1], entry=dataclasses.replace(checks[1].entry, defence={"kind": "abl"}))
    assert not missed_bars(zoo, checks)
    assert "| abl | badnets under abl | 3 | 10 % | 90.00 | 0.50 |" in markdown(zoo, checks)


def test_the_table_names_the_sources_and_how_other_labels_fare() -> None:
    zoo, checks = zoo_of(("all", 0.9, {"kind": "badnets", "target": 3}, 1.0))
    entry = dataclasses.replace(checks[0].entry, name="some", attack={"kind": "blend", "target": 3, "sources": [5, 1]})
    truth = Truth("some", 3, 0.9, 1.0, 0.0, 1234.0, sources=(1, 5), cover_accuracy=0.8123)
    text = markdown(zoo, [*checks, Check(entry, "agrees", truth, truth)])
    assert "| some | blend | 1, 5 to 3 | 10 % |" in text
    assert "\nCover accuracy: some 81.23 %.\n" in text


def test_sections_are_replaced_in_place() -> None:
    first = with_section("# Zoo\n", "a", "one\n")
    both = with_section(first, "b", "two\n")
    assert both.count("## ") == 2
    changed = with_section(both, "a", "three\n")
    assert changed == both.replace("one\n", "three\n")
    assert with_section("", "a", "one\n").startswith("## a\n")


def test_the_manifest_of_a_made_zoo_is_not_changed(made: Path, tiny_data: Path) -> None:
    before = {path: path.read_bytes() for path in made.parent.rglob("*") if path.is_file()}
    verify(made, tiny_data)
    assert {path: path.read_bytes() for path in made.parent.rglob("*") if path.is_file()} == before
    assert read_manifest(made).name == "tiny"
