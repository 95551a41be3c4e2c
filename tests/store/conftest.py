"""Results for stores, without any scan."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from bdprune.record import ArtifactInfo, Env, ErrorInfo, Evidence, ModelInfo, Result
from bdprune.store import ScanKey, Store

ENV = Env(
    tool="bdprune",
    version="1",
    torch="2",
    cuda=None,
    device="cpu",
    backend="native",
    threads=1,
    seed=0,
    python="3",
    platform="x",
)
LIPSCHITZ = Evidence(detector="bdprune.lipschitz", score=1.5, threshold=3.0, flagged=False)


def result(name: str = "a.pth", **more: Any) -> Result:
    """A result with one detector."""
    made = Result(
        started="2026-01-01T00:00:00+00:00",
        seconds=1.0,
        artifact=ArtifactInfo(path=name, sha256="1" * 64),
        model=ModelInfo(arch="x", parameters=1, num_classes=3, input_shape=(3, 8, 8), digest="2" * 64),
        data=None,
        env=ENV,
        verdict="inconclusive",
        risk=0.25,
        target_label=None,
        detectors=(LIPSCHITZ,),
    )
    return msgspec.structs.replace(made, **more)


def failed(name: str = "a.pth") -> Result:
    """The result of a scan that failed."""
    error = ErrorInfo(type="ArtifactError", message="It is damaged.", hint="")
    return result(name, verdict="error", risk=None, error=error, model=None, detectors=())


def key(model: str = "1" * 64, **settings: Any) -> ScanKey:
    """A key with the seed 0 and one detector."""
    detectors = [{"id": "bdprune.lipschitz", "params": {"threshold": 3.0}}]
    return ScanKey(model, "", {"seed": 0, "detectors": detectors} | settings, "1")


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    """An empty store."""
    with Store(tmp_path / "scans.db", wait=5) as made:
        yield made


@pytest.fixture
def filled(tmp_path: Path) -> Callable[..., Store]:
    """Makes a store with these results."""

    def make(file: str, *results: Result, **more: Any) -> Store:
        made = Store(tmp_path / file)
        for place, one in enumerate(results):
            assert one.artifact is not None
            used = more.get("key") or key(one.artifact.sha256 or f"{place}")
            made.save(used, one.artifact.path, [one])
        return made

    return make
