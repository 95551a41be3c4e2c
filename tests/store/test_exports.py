"""Exports to JSON lines and parquet."""

from __future__ import annotations

import builtins
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from bdprune.errors import OptionError, OutputError
from bdprune.record import ArtifactInfo, Result, ScreenResult, documents_from_json
from bdprune.store import Screens, Store, export, latest
from bdprune.store import exports as module

from .conftest import failed, key, result

Filled = Callable[..., Store]


def test_json_lines_of_several_stores(filled: Filled, tmp_path: Path) -> None:
    stores = [filled("a.db", result("a.pth")), filled("b.db", result("b.pth"))]
    assert export(stores, "jsonl", tmp_path / "out.jsonl") == 2
    assert documents_from_json((tmp_path / "out.jsonl").read_text()) == [result("a.pth"), result("b.pth")]


def test_parquet_has_columns_and_the_whole_result(
    filled: Filled, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pq = pytest.importorskip("pyarrow.parquet")
    monkeypatch.setattr(module, "_ROWS", 1)  # several row groups
    store = filled("a.db", result("a.pth"))
    store.save(key("bad"), "b.pth", [failed("b.pth")])
    assert export([store], "parquet", tmp_path / "out.parquet") == 2
    first, second = pq.read_table(tmp_path / "out.parquet").to_pylist()
    assert (first["name"], first["verdict"], first["risk"], first["arch"]) == ("a.pth", "inconclusive", 0.25, "x")
    assert first["scores"] == [("bdprune.lipschitz", 1.5)] and '"seed": 0' in first["settings"]
    assert Result.from_json(first["document"]) == result("a.pth")
    assert (second["error"], second["arch"]) == ("It is damaged.", None)


def test_a_model_in_several_stores_comes_from_its_latest_scan(filled: Filled, tmp_path: Path) -> None:
    early, late = "2026-01-01T00:00:00+00:00", "2026-01-02T00:00:00+00:00"
    old, new = result("a.pth", started=early), result("a.pth", started=late, risk=0.5)
    only, other = (result(name, artifact=ArtifactInfo(path=name, sha256=name[0] * 64)) for name in ("b.pth", "c.pth"))
    stores = [filled("1.db", new, only), filled("2.db", old, other)]
    for order in (stores, stores[::-1]):
        assert export(order, "jsonl", tmp_path / "out.jsonl") == 3
        found = documents_from_json((tmp_path / "out.jsonl").read_text())
        assert sorted(found, key=lambda one: one.name) == [new, only, other]  # type: ignore[attr-defined]


def test_of_scans_of_the_same_second_the_last_store_counts(filled: Filled) -> None:
    one, other = result("a.pth", risk=0.1), result("a.pth", risk=0.2)
    stores = [filled("1.db", one), filled("2.db", other)]
    assert [scan.results for _, scan in latest(stores)] == [(other,)]
    assert [scan.results for _, scan in latest(stores[::-1])] == [(one,)]


def test_an_empty_store(filled: Filled, tmp_path: Path) -> None:
    assert export([filled("a.db")], "jsonl", tmp_path / "out.jsonl") == 0
    assert (tmp_path / "out.jsonl").read_text() == ""


def test_parquet_without_pyarrow(filled: Filled, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *args: Any, **more: Any) -> Any:
        if name.startswith("pyarrow"):
            raise ImportError(name)
        return real(name, *args, **more)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(OptionError, match="pyarrow") as caught:
        export([filled("a.db")], "parquet", tmp_path / "out.parquet")
    assert "jsonl" in caught.value.hint and list(tmp_path.glob("*.parquet")) == []
    assert list(tmp_path.glob(".bdprune-*")) == []


def test_a_place_that_cannot_be_written(filled: Filled, tmp_path: Path) -> None:
    with pytest.raises(OutputError):
        export([filled("a.db")], "jsonl", tmp_path / "none" / "out.jsonl")


def test_screens_follow_the_scans(filled: Filled, tmp_path: Path) -> None:
    pq = pytest.importorskip("pyarrow.parquet")
    weights = tmp_path / "w.pth"
    torch.save({"conv.weight": torch.randn(16, 3, 3, 3)}, weights)
    stores = [filled("1.db", result("a.pth")), filled("2.db")]
    for store in stores:
        list(Screens(store).run([weights]))
    assert export(stores, "jsonl", tmp_path / "out.jsonl") == 2
    scan, screen = documents_from_json((tmp_path / "out.jsonl").read_text())
    assert isinstance(screen, ScreenResult) and scan == result("a.pth") and screen.name == str(weights)
    assert export(stores, "parquet", tmp_path / "out.parquet") == 2
    rows = pq.read_table(tmp_path / "out.parquet").to_pylist()
    assert [one["kind"] for one in rows] == ["scan", "screen"]
    assert rows[1]["verdict"] == screen.outcome and rows[1]["file_sha256"] == screen.artifact.sha256
    assert ScreenResult.from_json(rows[1]["document"]) == screen and rows[1]["risk"] is None
