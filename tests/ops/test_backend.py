"""Choosing between compiled and plain ops, and the messages if that fails."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from bdprune.errors import OptionError
from bdprune.ops import ChannelMoments, _backend, backend, channel_scale, filter_spectral_norms, masked_conv2d

from .helpers import random

native = pytest.mark.skipif(not _backend.HAS_OPS, reason="the compiled ops are not built or switched off")


def answers() -> list[torch.Tensor]:
    """One result of every op, with gradients."""
    weights = [random((6, 5, 3, 3), torch.float32), random((2, 4, 3, 1, 1), torch.float16)]
    x = random((3, 5, 8, 8), torch.float32).requires_grad_()
    mask = random((6,), torch.float32, seed=1).requires_grad_()
    y = masked_conv2d(x, weights[0], mask, stride=2, padding=1)
    z = channel_scale(y.bfloat16(), mask)
    (y.square().sum() + z.float().sum()).backward()
    moments = ChannelMoments(6)
    moments.update(y)
    assert x.grad is not None and mask.grad is not None
    spread = [moments.mean, moments.covariance, moments.activation_norm, moments.correlation()]
    return [*filter_spectral_norms(weights), y.detach(), z.detach().float(), x.grad, mask.grad, *spread]


@native
def test_the_reference_gives_the_same_results(tmp_path: Path) -> None:
    out = tmp_path / "answers.pt"
    code = (
        "import sys, torch; sys.path.insert(0, sys.argv[2]); from ops.test_backend import answers; "
        "from bdprune.ops import backend; assert backend() == 'reference'; torch.save(answers(), sys.argv[1])"
    )
    environment = {**os.environ, "BDPRUNE_BACKEND": "reference"}
    tests = str(Path(__file__).resolve().parents[1])
    subprocess.run([sys.executable, "-c", code, str(out), tests], check=True, env=environment)
    for ours, plain in zip(answers(), torch.load(out, weights_only=True), strict=True):
        assert ours.dtype == plain.dtype
        assert torch.allclose(ours, plain, rtol=2e-5, atol=1e-5)


@native
def test_a_device_without_compiled_ops_falls_back() -> None:
    z = torch.ones(2, 3, 4, 4, device="meta")
    assert not _backend.is_native(z)
    assert channel_scale(z, torch.ones(3, device="meta")).shape == z.shape


def test_build_info_names_the_backend() -> None:
    info = _backend.build_info()
    assert info["backend"] == backend()
    assert info["torch"] == torch.__version__ and info["threads"] == torch.get_num_threads()
    assert (info["reason"] == "") == (backend() == "native")
    assert (info["cuda_reason"] == "") == info["cuda"]
    if backend() == "native":
        assert info["built_for_torch"] and info["compiler"]
        assert info["cpu_features"] in (None, "baseline", "avx2", "avx512")


def failing_import(error: ImportError) -> Any:
    def load(name: str) -> ModuleType:
        raise error

    return load


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (ModuleNotFoundError("no"), "bdprune._C was not built"),
        (ImportError("undefined symbol: x"), "does not load on torch .*undefined symbol: x"),
    ],
)
def test_ops_that_do_not_load_fall_back_or_raise_a_clear_error(
    error: ImportError, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib, "import_module", failing_import(error))
    assert _backend._load_cpu("auto").module is None
    with pytest.raises(OptionError, match=reason) as raised:
        _backend._load_cpu("native")
    assert "pip install" in raised.value.hint


def test_the_cuda_ops_need_the_cpu_ops_and_a_cuda_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    absent = _backend._Loaded(None, "some reason")
    assert _backend._load_cuda(absent).reason == "some reason"
    present = _backend._Loaded(ModuleType("_C"), "")
    monkeypatch.setattr(torch.version, "cuda", None)
    assert _backend._load_cuda(present).reason == "torch is a CPU build"
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(importlib, "import_module", failing_import(ModuleNotFoundError("no")))
    assert _backend._load_cuda(present).reason == "bdprune._C_cuda was not built"


def test_unknown_backend_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BDPRUNE_BACKEND", "gpu")
    with pytest.raises(OptionError, match="'gpu'"):
        _backend._requested()
    monkeypatch.setenv("BDPRUNE_BACKEND", "")
    assert _backend._requested() == "auto"
