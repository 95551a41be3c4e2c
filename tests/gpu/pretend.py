"""A stand-in for a GPU with the CPU's memory and kernels; it rejects the same operations as a GPU."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import types
from pathlib import Path

import torch
from torch.utils import cpp_extension

NAME = "pretend"
SOURCE = Path(__file__).with_suffix(".cpp")
BUILDS = Path(__file__).resolve().parents[2] / "build" / NAME
FLAGS = ["-O0", "-g0"]  # its own code takes no noticeable time


@functools.cache
def pretend_device() -> torch.device:
    """The device, registered for the rest of this process; it is built once per version of torch and of the source."""
    folder = BUILDS / hashlib.sha256(torch.__version__.encode() + SOURCE.read_bytes()).hexdigest()[:16]
    folder.mkdir(parents=True, exist_ok=True)
    name = f"bdprune_{NAME}"
    cpp_extension.load(name, str(SOURCE), extra_cflags=FLAGS, build_directory=str(folder), is_python_module=False)
    torch.utils.rename_privateuse1_backend(NAME)
    torch._register_device_module(NAME, _module())
    torch.utils.generate_methods_for_privateuse1_backend()
    return torch.device(NAME, 0)


def _module() -> types.ModuleType:
    """The attributes of ``torch.pretend`` that torch needs: one device, without its own generator."""
    answers = {
        "is_available": True,
        "is_initialized": True,
        "device_count": 1,
        "current_device": 0,
        "_is_in_bad_fork": False,
        "manual_seed_all": None,
        "get_rng_state": None,
        "set_rng_state": None,
        "get_amp_supported_dtype": [torch.bfloat16],
        "device": contextlib.nullcontext(),
    }
    module = types.ModuleType(f"torch.{NAME}")
    for name, answer in answers.items():
        setattr(module, name, lambda *_, answer=answer: answer)
    return module
