"""The main job on the shipped models: three correct verdicts, two correct labels, two successful repairs."""

from __future__ import annotations

from pathlib import Path

import pytest

from bdprune.errors import OptionError
from bdprune.fleet.demo import Demo, TimeLeft, run
from bdprune.model.loading import load
from bdprune.record import PurifyResult, Result

ZOO = Path(__file__).parents[2] / "zoo" / "demo"


def test_a_folder_without_a_zoo_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="There is no zoo"):
        run(tmp_path, tmp_path)


class Recorder:
    """Records the messages of a demonstration."""

    def __init__(self) -> None:
        self.stages: list[tuple[str, str, float]] = []
        self.verdicts: list[tuple[str, str, int]] = []

    def stage(self, name: str, stage: str, left: float) -> None:
        self.stages.append((name, stage, left))

    def verdict(self, name: str, result: Result) -> None:
        self.verdicts.append((name, result.verdict, len(self.stages)))


def test_the_time_left_follows_the_pace_of_finished_steps() -> None:
    now = 0.0
    left = TimeLeft(2, lambda: now)
    assert left.seconds == 2 * (24 + 35 + 4)
    now = 6.0
    assert left.seconds == 2 * (24 + 35 + 4) - 6
    now = 48.0  # twice as long as a scan is expected to take
    left.finish("scan")
    left.skip("repair")
    assert left.seconds == 2 * (24 + 35 + 2 * 4)
    now = 1000.0
    assert left.seconds == 0


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[Demo, Path, Recorder]:
    out, recorder = tmp_path_factory.mktemp("demo"), Recorder()
    return run(ZOO, out, seed=0, watcher=recorder), out, recorder


@pytest.mark.slow
def test_verdicts_and_labels_are_correct(done: tuple[Demo, Path, Recorder]) -> None:
    rows = {row.name: row for row in done[0].rows}
    assert {name: (row.result.verdict, row.result.target_label) for name, row in rows.items()} == {
        "clean": ("clean", None),
        "badnets": ("backdoored", 7),
        "blend": ("backdoored", 5),
    }
    assert all(row.right for row in rows.values())


@pytest.mark.slow
def test_repairs_remove_the_backdoor_and_keep_the_task(done: tuple[Demo, Path, Recorder]) -> None:
    for row in done[0].rows:
        if row.true_label is None:
            assert row.after is None
            continue
        assert row.after is not None
        assert (row.before.attack_success_rate or 0) > 0.95
        assert (row.after.attack_success_rate or 0) <= 0.05
        # 1.7 points on the full test set (docs/evaluation/repair.md); on 1,000 images its spread is about 0.6.
        assert row.before.clean_accuracy - row.after.clean_accuracy <= 0.03


@pytest.mark.slow
def test_the_demo_writes_repaired_checkpoints_and_documents(done: tuple[Demo, Path, Recorder]) -> None:
    demo, out, _ = done
    assert sorted(path.name for path in out.iterdir()) == ["badnets-repaired.safetensors", "blend-repaired.safetensors"]
    original, repaired = load(ZOO / "badnets.safetensors"), load(out / "badnets-repaired.safetensors")
    assert list(original.network.state_dict()) == list(repaired.network.state_dict())
    assert [type(document) for document in demo.documents] == [Result, PurifyResult, Result, PurifyResult, Result]


@pytest.mark.slow
def test_scans_come_before_repairs_and_the_time_left_falls(done: tuple[Demo, Path, Recorder]) -> None:
    recorder = done[2]
    assert [(name, verdict) for name, verdict, _ in recorder.verdicts] == [
        ("badnets", "backdoored"),
        ("blend", "backdoored"),
        ("clean", "clean"),
    ]
    repairs = [index for index, (_, stage, _) in enumerate(recorder.stages) if "rnp" in stage]
    assert len(repairs) == 2 and all(place <= min(repairs) for _, _, place in recorder.verdicts)
    estimates = [left for _, _, left in recorder.stages]
    assert 0 <= estimates[-1] < max(estimates)
