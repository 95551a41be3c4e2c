"""Screens in a store: taken by content, named by path, and separate from scans."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import bdprune
from bdprune.errors import StoreError
from bdprune.record import ScreenResult
from bdprune.store import Screens, Store

from .conftest import key, result


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A checkpoint that can be screened."""
    return saved(tmp_path / "a.pth", 0)


def saved(path: Path, seed: int) -> Path:
    generator = torch.Generator().manual_seed(seed)
    torch.save({"conv.weight": torch.randn(16, 3, 3, 3, generator=generator)}, path)
    return path


def timeless(one: ScreenResult) -> object:
    return one.layers, one.heads, one.outcome, one.artifact


def test_a_screen_is_taken_by_the_content_of_its_file(store: Store, model: Path, tmp_path: Path) -> None:
    screens = Screens(store)
    (first,) = screens.run([model])
    assert screens.taken == 0 and timeless(first) == timeless(bdprune.screen(model))
    copy = tmp_path / "copy.pth"
    copy.write_bytes(model.read_bytes())
    again, named = screens.run([model, copy])
    assert screens.taken == 2 and again == first
    assert named.name == str(copy) and named.layers == first.layers and named.started == first.started
    assert screens.names() == [str(model), str(copy)] and list(screens.all()) == [first, named]


def test_a_changed_file_is_screened_again(store: Store, model: Path) -> None:
    screens = Screens(store)
    list(screens.run([model]))
    saved(model, 1)
    (new,) = screens.run([model])
    assert screens.taken == 0 and list(screens.all()) == [new], "the latest screen of a name counts"


def test_another_version_screens_again(store: Store, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    list(Screens(store).run([model]))
    monkeypatch.setattr(bdprune, "__version__", "99")
    screens = Screens(store)
    (new,) = screens.run([model])
    assert screens.taken == 0 and new.version == "99" and list(screens.all()) == [new]


def test_a_failed_screen_is_not_kept(store: Store, tmp_path: Path) -> None:
    bad = tmp_path / "bad.pth"
    bad.write_bytes(b"nothing")
    screens = Screens(store)
    for one in screens.run([bad, tmp_path / "missing.pth", bad]):
        assert one.outcome == "error"
    assert screens.names() == [] and list(screens.all()) == []


def test_scans_and_screens_share_a_store(store: Store, model: Path) -> None:
    store.save(key(), "b.pth", [result("b.pth")])
    list(Screens(store).run([model]))
    assert store.names() == ["b.pth"] and Screens(store).names() == [str(model)]


def test_a_store_that_fails_is_no_result_of_a_file(store: Store, model: Path) -> None:
    store.close()
    with pytest.raises(StoreError, match="is closed"):
        list(Screens(store).run([model]))


def test_many_screens_come_in_the_order_of_their_names(store: Store, model: Path, tmp_path: Path) -> None:
    names = [tmp_path / f"{number:03}.pth" for number in range(300)]
    for name in names:
        name.hardlink_to(model)
    list(Screens(store).run(reversed(names)))
    assert [one.name for one in Screens(store).all()] == [str(name) for name in names]


@pytest.mark.parametrize(
    "change",
    ["UPDATE screens SET document = replace(document, 'nothing', 'Nothing')", "UPDATE screened SET name = 'b.pth'"],
)
def test_a_changed_row_is_damage(store: Store, model: Path, change: str) -> None:
    list(Screens(store).run([model]))
    with store.database.transaction() as connection:
        connection.execute(change)
    with pytest.raises(StoreError, match="is damaged"):
        list(Screens(store).all())


def test_a_failed_screen_removes_the_earlier_one(store: Store, model: Path) -> None:
    screens = Screens(store)
    list(screens.run([model]))
    model.write_bytes(model.read_bytes()[:100])
    (bad,) = screens.run([model])
    assert bad.outcome == "error" and screens.names() == [] and list(screens.all()) == []
