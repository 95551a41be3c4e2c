"""Chooses the implementation of the ops.

``BDPRUNE_BACKEND`` chooses: ``auto`` (the default: compiled ops if they load, otherwise plain PyTorch),
``reference`` (always plain PyTorch) or ``native`` (an error instead of a fallback). It is read once, at the first
import of the ops.
"""

from __future__ import annotations

import functools
import importlib
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from bdprune import environment
from bdprune.errors import OptionError

Backend = Literal["native", "reference"]

STABLE_ABI = "2.11"
"""Oldest torch whose stable ABI the compiled ops use."""

_REMEDY = "Build it with `pip install -e . --no-build-isolation`, or unset BDPRUNE_BACKEND to run on plain PyTorch."


@dataclass(frozen=True)
class BuildInfo:
    """The compiled ops: what was built, for which torch, and what runs here.

    Attributes:
        backend: implementation for CPU tensors, ``native`` or ``reference``.
        requested: value of BDPRUNE_BACKEND.
        reason: why the compiled ops do not run; empty if they do.
        torch: version of the running torch.
        built_for_torch: version of the torch headers that the ops were compiled with; None if they are absent.
        stable_abi: oldest torch that the compiled ops work with.
        compiler: version of the C++ compiler; None if the ops are absent.
        cpu_features: instruction set that the kernels use on this CPU: ``baseline``, ``avx2`` or ``avx512``.
        threads: threads the CPU kernels may use.
        cuda: whether the CUDA ops run.
        cuda_reason: why they do not run; empty if they do.
    """

    backend: Backend
    requested: str
    reason: str
    torch: str
    built_for_torch: str | None
    stable_abi: str
    compiler: str | None
    cpu_features: str | None
    threads: int
    cuda: bool
    cuda_reason: str


@dataclass(frozen=True)
class _Loaded:
    """One native module, or the reason why it is missing."""

    module: Any | None
    reason: str


def _import(name: str) -> _Loaded:
    try:
        return _Loaded(importlib.import_module(f"bdprune.{name}"), "")
    except ModuleNotFoundError:
        return _Loaded(None, f"bdprune.{name} was not built")
    except ImportError as error:
        return _Loaded(None, f"bdprune.{name} was built but does not load on torch {torch.__version__}: {error}")


def _requested() -> str:
    requested = environment.BACKEND.get()
    if requested not in ("auto", "native", "reference"):
        raise OptionError(f"Unknown value of BDPRUNE_BACKEND: {requested!r}.", "Set it to auto, native or reference.")
    return requested


def _load_cpu(requested: str) -> _Loaded:
    if requested == "reference":
        return _Loaded(None, "BDPRUNE_BACKEND=reference")
    loaded = _import("_C")
    if requested == "native" and loaded.module is None:
        raise OptionError(f"BDPRUNE_BACKEND is native, but {loaded.reason}.", _REMEDY)
    return loaded


def _load_cuda(cpu: _Loaded) -> _Loaded:
    if cpu.module is None:
        return _Loaded(None, cpu.reason)
    if torch.version.cuda is None:
        return _Loaded(None, "torch is a CPU build")
    return _import("_C_cuda")


REQUESTED = _requested()
_CPU = _load_cpu(REQUESTED)
_CUDA = _load_cuda(_CPU)

HAS_OPS = _CPU.module is not None
"""Whether the dispatcher knows the schemas of the ops."""

_NATIVE_DEVICES = frozenset(name for name, loaded in (("cpu", _CPU), ("cuda", _CUDA)) if loaded.module is not None)


def backend() -> Backend:
    """Implementation for CPU tensors: ``native`` (compiled) or ``reference`` (plain PyTorch)."""
    return "native" if HAS_OPS else "reference"


def is_native(tensor: Tensor) -> bool:
    """Whether the compiled ops take this tensor; otherwise plain PyTorch runs."""
    return tensor.device.type in _NATIVE_DEVICES


@functools.cache
def cpu_features() -> str | None:
    """The instruction set that the kernels use on this CPU; None if they are not built."""
    core = _import("_core").module
    return None if core is None else str(core.isa())


def _cuda_reason() -> str:
    if _CUDA.module is None:
        return _CUDA.reason
    return "" if torch.cuda.is_available() else "torch finds no CUDA device"


def build_info() -> dict[str, Any]:
    """The fields of :class:`BuildInfo` as a dict, for ``bdprune doctor`` and for the record of a result."""
    cuda_reason = _cuda_reason()
    info = BuildInfo(
        backend=backend(),
        requested=REQUESTED,
        reason=_CPU.reason,
        torch=torch.__version__,
        built_for_torch=getattr(_CPU.module, "built_for_torch", None),
        stable_abi=STABLE_ABI,
        compiler=getattr(_CPU.module, "compiler", None),
        cpu_features=cpu_features(),
        threads=torch.get_num_threads(),
        cuda=not cuda_reason,
        cuda_reason=cuda_reason,
    )
    return asdict(info)
