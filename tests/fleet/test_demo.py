"""The main job on the shipped models: three right verdicts, two right labels, two repairs that hold."""

from pathlib import Path

import pytest

from bdprune.errors import OptionError
from bdprune.fleet.demo import Demo, run
from bdprune.model.loading import load
from bdprune.record import PurifyResult, Result

ZOO = Path(__file__).parents[2] / "zoo" / "demo"


def test_a_folder_without_a_zoo_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="There is no zoo"):
        run(tmp_path, tmp_path)


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[Demo, Path, list[tuple[str, str]]]:
    out = tmp_path_factory.mktemp("demo")
    said: list[tuple[str, str]] = []
    return run(ZOO, out, seed=0, progress=lambda name, stage: said.append((name, stage))), out, said


@pytest.mark.slow
def test_verdicts_and_labels_are_those_of_the_truth(done: tuple[Demo, Path, list[tuple[str, str]]]) -> None:
    rows = {row.name: row for row in done[0].rows}
    assert {name: (row.result.verdict, row.result.target_label) for name, row in rows.items()} == {
        "clean": ("clean", None),
        "badnets": ("backdoored", 7),
        "blend": ("backdoored", 5),
    }
    assert all(row.right for row in rows.values())


@pytest.mark.slow
def test_repairs_remove_the_backdoor_and_keep_the_task(done: tuple[Demo, Path, list[tuple[str, str]]]) -> None:
    for row in done[0].rows:
        if row.true_label is None:
            assert row.after is None
            continue
        assert row.after is not None
        assert (row.before.attack_success_rate or 0) > 0.95
        assert (row.after.attack_success_rate or 0) <= 0.05
        # 1.7 points on the full test set (docs/detection.md); the difference on 1,000 images has a spread of about 0.6.
        assert row.before.clean_accuracy - row.after.clean_accuracy <= 0.03


@pytest.mark.slow
def test_leaves_repaired_checkpoints_and_documents(done: tuple[Demo, Path, list[tuple[str, str]]]) -> None:
    demo, out, said = done
    assert sorted(path.name for path in out.iterdir()) == ["badnets-repaired.safetensors", "blend-repaired.safetensors"]
    original, repaired = load(ZOO / "badnets.safetensors"), load(out / "badnets-repaired.safetensors")
    assert list(original.network.state_dict()) == list(repaired.network.state_dict())
    assert [type(document) for document in demo.documents] == [Result, Result, PurifyResult, Result, PurifyResult]
    assert {name for name, _ in said} == {"clean", "badnets", "blend"}
