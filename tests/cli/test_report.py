"""``bdprune report``: a page over stores, and one clear error for bad input."""

from __future__ import annotations

import json
import re
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from click.testing import Result as Ran

from bdprune.store import ScanKey, Screens, Store

from ..report.fleet import fill

Run = Callable[..., Ran]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of thirty models. Tests copy it."""
    return fill(tmp_path_factory.mktemp("made") / "scans.db", 30)


@pytest.fixture
def db(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copy(made, tmp_path / "scans.db"))


def rows(page: str) -> list[Any]:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.S)
    assert found is not None
    return list(json.loads(found[1])["rows"])


def refused(done: Ran, word: str) -> None:
    """Two lines on standard error, the usage code, and nothing on standard output."""
    assert done.exit_code == 4 and done.stdout == "", done.output
    assert len(done.stderr.splitlines()) == 2 and word in done.stderr, done.stderr


def test_a_page_over_one_store_and_over_several(run: Run, db: Path, tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    done = run("report", db, "-o", page)
    assert (done.exit_code, done.output) == (0, "")
    assert len(rows(page.read_text())) == 30
    other = fill(tmp_path / "other.db", 5)
    assert run("report", db, other, "-o", page).exit_code == 0  # an older report is replaced
    assert len(rows(page.read_text())) == 30, "a model in both stores counts once"
    assert f'<td class="path">{other}</td>' in page.read_text()


def test_screens_are_left_out_but_named(run: Run, db: Path, tmp_path: Path) -> None:
    weights, only = tmp_path / "w.pth", tmp_path / "only.db"
    torch.save({"conv.weight": torch.randn(16, 3, 3, 3)}, weights)
    for path in (db, only):
        with Store(path) as store:
            list(Screens(store).run([weights]))
    done = run("report", db, "-o", tmp_path / "report.html")
    assert done.exit_code == 0 and "leaves out 1 screen;" in done.stderr
    refused(run("report", only, "-o", tmp_path / "none.html"), "no scans, only 1 screen.")


def test_a_page_on_standard_output_is_the_same(run: Run, db: Path, tmp_path: Path) -> None:
    run("report", db, "-o", tmp_path / "report.html")
    assert run("report", db, "-o", "-").stdout == (tmp_path / "report.html").read_text()


def test_only_the_latest_scan_of_a_model_counts(run: Run, db: Path, tmp_path: Path) -> None:
    before = rows(run("report", db, "-o", "-").stdout)
    with Store(db) as store:
        (first, *_) = store.scans()
        key = ScanKey(first.model, first.data, {"seed": 99}, first.version)
        store.save(key, first.name, [msgspec.structs.replace(one, verdict="suspicious") for one in first.results])
        latest = ScanKey(first.model, first.data, first.settings, first.version)
        assert store.find(latest, first.name) == first.results, "it is noted as the latest again"
    assert rows(run("report", db, "-o", "-").stdout) == before


def test_bad_stores_are_one_error(run: Run, db: Path, tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    (tmp_path / "notes.txt").write_text("notes")
    (tmp_path / "nothing.db").touch()
    Store(tmp_path / "empty.db").close()
    newer = Path(shutil.copy(db, tmp_path / "newer.db"))
    with sqlite3.connect(newer) as connection:
        connection.execute("PRAGMA user_version = 99")
    for name, word in {
        "none.db": "There is no store",
        "notes.txt": "not a store",
        "nothing.db": "is empty",
        "empty.db": "holds no results",
        "newer.db": "newer version",
        ".": "folder",
    }.items():
        refused(run("report", tmp_path / name, "-o", page), word)
        assert not page.exists()
    refused(run("report", db, tmp_path / "none.db", "-o", page), "There is no store")
    refused(run("report", db, db, "-o", page), "twice")


@pytest.mark.parametrize("share", [0.1, 0.3, 0.5, 0.7, 0.9])
def test_a_damaged_store_is_one_error(run: Run, db: Path, tmp_path: Path, share: float) -> None:
    content = bytearray(db.read_bytes())
    start = int(share * len(content)) // 4096 * 4096
    content[start : start + 8192] = b"\xa5" * 8192
    db.write_bytes(content)
    done = run("report", db, "-o", tmp_path / "report.html")
    if done.exit_code:  # a damaged page may hold nothing that a report needs
        refused(done, "damaged" if "damaged" in done.stderr else "cannot be read")
        assert not (tmp_path / "report.html").exists()


def test_a_cut_store_is_one_error(run: Run, db: Path, tmp_path: Path) -> None:
    content = db.read_bytes()
    db.write_bytes(content[: len(content) // 3])
    refused(run("report", db, "-o", tmp_path / "report.html"), "damaged")


@pytest.mark.parametrize("column", ["document", "settings"])
def test_a_damaged_row_is_one_error(run: Run, db: Path, tmp_path: Path, column: str) -> None:
    with sqlite3.connect(db) as connection:
        connection.execute(f"UPDATE {'results' if column == 'document' else 'scans'} SET {column} = '{{'")
    refused(run("report", db, "-o", tmp_path / "report.html"), "is damaged")


def test_bad_outputs_are_one_error(run: Run, db: Path, tmp_path: Path) -> None:
    before = db.read_bytes()
    link = tmp_path / "link.html"
    link.symlink_to(db)
    for output, word in {db: "overwritten", link: "overwritten", Path(f"{db}-wal"): "overwritten"}.items():
        refused(run("report", db, "-o", output), word)
    for output, word in {tmp_path: "folder", tmp_path / "none" / "x.html": "cannot be written"}.items():
        refused(run("report", db, "-o", output), word)
    assert db.read_bytes() == before
    assert run("report", db).exit_code == run("report", "-o", tmp_path / "x.html").exit_code == 4


def test_some_empty_stores_among_others_are_fine(run: Run, db: Path, tmp_path: Path) -> None:
    Store(tmp_path / "empty.db").close()
    assert len(rows(run("report", tmp_path / "empty.db", db, "-o", "-").stdout)) == 30


def test_it_does_not_import_torch(db: Path, tmp_path: Path) -> None:
    code = f"""
import sys
from click.testing import CliRunner
from bdprune.cli.main import main
done = CliRunner().invoke(main, ["report", "{db}", "-o", "{tmp_path}/report.html"])
assert done.exit_code == 0, done.output
print([name for name in ("torch", "numpy") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "[]\n", done.stderr
