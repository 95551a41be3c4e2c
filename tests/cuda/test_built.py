"""The CUDA module, built with a CUDA build of torch: it loads, and the dispatcher has its kernels."""

from __future__ import annotations

import importlib
import importlib.util
import re
from pathlib import Path

import pytest
import torch

from bdprune.ops import _backend

from ..resources import skip_without

SCHEMAS = Path(__file__).resolve().parents[2] / "csrc" / "ops.cpp"
OPS = re.findall(r'm\.def\(\s*"(\w+)', SCHEMAS.read_text())
CPU_ONLY = {
    "winograd_conv2d",
    "winograd_conv2d_input_grad",
    "winograd_conv2d_weight_grad",
    "winograd_masked_conv2d",
}


@pytest.fixture
def cuda_module() -> None:
    """The compiled module, which only a CUDA build of torch has."""
    if torch.version.cuda is None:
        skip_without("cuda", "torch is a CPU build")
    if importlib.util.find_spec("bdprune._C_cuda") is None:
        skip_without("cuda", "bdprune._C_cuda was not built")


def test_schemas_were_found() -> None:
    assert {"filter_spectral_norms", "channel_scale", "stacked_conv2d"} | CPU_ONLY <= set(OPS)


@pytest.mark.usefixtures("cuda_module")
@pytest.mark.parametrize("op", sorted(set(OPS) - CPU_ONLY))
def test_every_op_has_a_kernel_for_cuda(op: str) -> None:
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"bdprune::{op}", "CUDA")


@pytest.mark.usefixtures("cuda_module")
def test_the_module_uses_the_stable_abi() -> None:
    module = importlib.import_module("bdprune._C_cuda")
    assert module.__file__ and module.__file__.endswith(".abi3.so")
    assert _backend._CUDA.module is module
