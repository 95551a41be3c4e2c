from pathlib import Path

import pytest
import torch

from bdprune.errors import OutputError
from bdprune.loops.resume import Checkpoint, digest


def test_a_state_is_read_back_as_written(tmp_path: Path) -> None:
    state = {"a": torch.arange(3), "b": [1, 2.5, "x", None, {"c": torch.ones(2, 2).half()}]}
    one = Checkpoint(tmp_path / "c", "recipe")
    assert one.load("training") is None
    one.save(state)
    kept = Checkpoint(tmp_path / "c", "recipe").load("training")
    assert kept is not None
    assert torch.equal(kept["a"], state["a"])
    assert kept["b"][:4] == [1, 2.5, "x", None]
    assert torch.equal(kept["b"][4]["c"], torch.ones(2, 2).half())
    assert [path.name for path in tmp_path.iterdir()] == ["c"]


@pytest.mark.parametrize(("recipe", "training"), [("other", "training"), ("recipe", "other")])
def test_a_state_of_another_recipe_is_never_used(tmp_path: Path, recipe: str, training: str) -> None:
    one = Checkpoint(tmp_path / "c", "recipe")
    one.load("training")
    one.save({"a": 1})
    said: list[str] = []
    assert Checkpoint(tmp_path / "c", recipe, say=said.append).load(training) is None
    assert len(said) == 1 and "other settings" in said[0]


@pytest.mark.parametrize("keep", [0, 10, 200, -1])
def test_a_damaged_file_is_never_used(tmp_path: Path, keep: int) -> None:
    one = Checkpoint(tmp_path / "c", "recipe")
    one.save({"a": torch.arange(100)})
    (tmp_path / "c").write_bytes((tmp_path / "c").read_bytes()[:keep])
    said: list[str] = []
    assert Checkpoint(tmp_path / "c", "recipe", say=said.append).load() is None
    assert "cannot be read" in said[0]


def test_nothing_in_a_file_is_executed(tmp_path: Path) -> None:
    torch.save({"key": "x", "seconds": 0.0, "state": Path("evil")}, tmp_path / "c")  # a class that is not allowed
    said: list[str] = []
    assert Checkpoint(tmp_path / "c", "x", say=said.append).load() is None
    assert "UnpicklingError" in said[0]


def test_seconds_add_up_and_the_next_write_waits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr("bdprune.loops.resume.time.monotonic", lambda: now)
    one = Checkpoint(tmp_path / "c", "r", every=60)
    one.load()
    now = 130.0
    assert not one.due()
    now = 160.0
    assert one.due()
    one.save({})
    assert one.seconds == 60
    now = 219.0
    assert not one.due()
    two = Checkpoint(tmp_path / "c", "r")
    two.load()
    now = 225.0
    assert two.seconds == 60 + 6


def test_slow_writes_are_less_frequent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    one = Checkpoint(tmp_path / "c", "r", every=60)

    def slow(*_: object) -> None:
        nonlocal now
        now += 3

    monkeypatch.setattr("bdprune.loops.resume.time.monotonic", lambda: now)
    monkeypatch.setattr("bdprune.files.output.os.fsync", slow)
    one.save({})
    now = 3 + 599.0  # 3 s are 0.5 % of 600 s
    assert not one.due()
    now = 3 + 600.0
    assert one.due()


def test_an_unwritable_path_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="Cannot write"):
        Checkpoint(tmp_path / "none" / "c", "r").save({})


def test_the_digest_covers_values_shapes_types_and_names() -> None:
    x = torch.arange(4, dtype=torch.int32)
    variants = [(x,), (x.view(2, 2),), (x.float(),), (x + 1,), ({"a": x},), ({"b": x},), (x, 1), (x, "1"), (1, x)]
    assert len({digest(*parts) for parts in variants}) == len(variants)
    assert digest(x, {"a": x}) == digest(x.clone(), {"a": x.clone()})
    assert digest(torch.ones(2, 3).t()) == digest(torch.ones(3, 2))
