"""Builds the native modules of bdprune; everything else about the package stands in pyproject.toml.

Modules:
    bdprune._C       dispatcher ops for the CPU, LibTorch stable ABI (torch >= 2.11)
    bdprune._C_cuda  the same ops for CUDA, where torch is a CUDA build and nvcc is found, or with FORCE_CUDA=1
    bdprune._core    the torch-free core on NumPy arrays
All three use CPython's limited API, so a wheel serves Python 3.11 and every later version.

Environment:
    BDPRUNE_NO_NATIVE=1   install pure Python; the ops then run on their plain-PyTorch reference
    FORCE_CUDA=1 / 0      build / leave out bdprune._C_cuda whatever is found
    TORCH_CUDA_ARCH_LIST  CUDA architectures, "8.0;9.0" if unset
    CUDA_HOME             the CUDA toolkit, for where the nvcc on PATH does not lie in it (-lcudart is not found then)
    DEBUG=1               -O0 -g, asserts on
    BDPRUNE_SANITIZE=...  passed to -fsanitize=, e.g. address,undefined
    MAX_JOBS              parallel compilations
"""

from __future__ import annotations

import os
import sys
import sysconfig
from pathlib import Path
from typing import Any

from setuptools import Extension, setup

STABLE_ABI = "0x020b000000000000"  # torch 2.11
MINIMUM_TORCH = (2, 11)
WHEEL_OPTIONS = {"bdist_wheel": {"py_limited_api": "cp311"}}


def flag(name: str) -> bool:
    return os.environ.get(name, "0") not in ("", "0")


def import_torch() -> Any | None:
    """torch, from the environment even when pip hides it behind build isolation; None where there is none."""
    try:
        import torch
    except ImportError:
        # An isolated build sees only its own requirements, but the ops should be built against the torch that is
        # installed, not against another one downloaded for the occasion. Appended last, so nothing else is shadowed.
        sys.path.append(sysconfig.get_path("platlib"))
        try:
            import torch
        except ImportError:
            return None
    version = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    if version < MINIMUM_TORCH:
        raise SystemExit(f"bdprune needs torch >= 2.11 to build, found {torch.__version__}")
    return torch


def torch_home() -> Path:
    """The folder that holds the torch package, or would."""
    torch = sys.modules.get("torch")
    return Path(torch.__file__).resolve().parents[1] if torch else Path(sysconfig.get_path("platlib"))


def compile_flags() -> list[str]:
    # No -fopenmp: the kernels run on libtorch's own threads, through torch::stable::parallel_for.
    flags = ["-fvisibility=hidden", "-Wall", "-Wextra", "-Wno-psabi", "-Wno-unknown-pragmas"]
    # Messages of failed checks name their source file: not by its place on the machine that built it.
    flags += [f"-ffile-prefix-map={folder}/=" for folder in (Path(__file__).resolve().parent, torch_home())]
    # Roots and maxima are vectorised only when they need not set errno or raise; neither changes a result.
    flags += ["-fno-math-errno", "-fno-trapping-math"]
    # With link_flags(), a module holds only what it uses of csrc/core.
    flags += ["-ffunction-sections"]
    flags += ["-O0", "-g", "-UNDEBUG"] if flag("DEBUG") else ["-O3", "-g0"]
    return flags + sanitize_flags()


def link_flags() -> list[str]:
    unused = ["-Wl,--gc-sections"] if sys.platform == "linux" else []
    return unused + sanitize_flags()


def sanitize_flags() -> list[str]:
    sanitizers = os.environ.get("BDPRUNE_SANITIZE", "")
    return [f"-fsanitize={sanitizers}", "-fno-omit-frame-pointer"] if sanitizers else []


def sources(*patterns: str) -> list[str]:
    root = Path(__file__).resolve().parent
    return sorted(str(path.relative_to(root)) for pattern in patterns for path in root.glob(pattern))


def core_extension() -> Extension:
    return Extension(
        "bdprune._core",
        sources("csrc/numpy.cpp", "csrc/core/*.cpp"),
        extra_compile_args=["-std=c++17", *compile_flags()],
        extra_link_args=link_flags(),
        py_limited_api=True,
        language="c++",
    )


def cpu_extension() -> Extension:
    from torch.utils.cpp_extension import CppExtension

    return CppExtension(
        "bdprune._C",
        sources("csrc/module.cpp", "csrc/ops.cpp", "csrc/cpu/*.cpp", "csrc/core/*.cpp"),
        define_macros=[("TORCH_TARGET_VERSION", STABLE_ABI)],
        extra_compile_args={"cxx": compile_flags()},
        extra_link_args=link_flags(),
        py_limited_api=True,
    )


def cuda_extension() -> Extension:
    from torch.utils.cpp_extension import CUDAExtension

    os.environ.setdefault("TORCH_CUDA_ARCH_LIST", "8.0;9.0")
    optimise = ["-O0", "-g"] if flag("DEBUG") else ["-O3"]
    return CUDAExtension(
        "bdprune._C_cuda",
        sources("csrc/module.cpp", "csrc/cuda/*.cu"),
        define_macros=[("TORCH_TARGET_VERSION", STABLE_ABI), ("USE_CUDA", None)],
        extra_compile_args={"cxx": compile_flags(), "nvcc": [*optimise, "-lineinfo", "-Xptxas=-v"]},
        extra_link_args=link_flags(),
        py_limited_api=True,
    )


def cuda_decision(torch: Any | None) -> tuple[bool, str]:
    """Whether to build the CUDA ops, and why."""
    if torch is None:
        return False, "no torch"
    if "FORCE_CUDA" in os.environ:
        return flag("FORCE_CUDA"), f"FORCE_CUDA={os.environ['FORCE_CUDA']}"
    from torch.utils.cpp_extension import CUDA_HOME

    if torch.version.cuda is None:
        return False, "torch is a CPU build"
    if CUDA_HOME is None:
        return False, "nvcc was not found"
    return True, f"torch for CUDA {torch.version.cuda}, toolkit in {CUDA_HOME}"


def settings() -> dict[str, Any]:
    """Arguments for setup(), after printing what was decided."""
    if flag("BDPRUNE_NO_NATIVE"):
        print("bdprune: BDPRUNE_NO_NATIVE=1, no native modules")
        return {}
    torch = import_torch()
    with_cuda, reason = cuda_decision(torch)
    build = "debug" if flag("DEBUG") else "release"
    print(f"bdprune: {build} build, sanitizers: {os.environ.get('BDPRUNE_SANITIZE') or 'none'}")
    print(f"bdprune: torch {torch.__version__ if torch else 'not found, will be fetched for the build'}")
    print(f"bdprune: CUDA ops {'on' if with_cuda else 'off'} ({reason})")
    if torch is None:
        # The first call of a PEP 517 build: ask for torch, the modules follow when it is there.
        return {"setup_requires": ["torch>=2.11"], "ext_modules": [core_extension()], "options": WHEEL_OPTIONS}
    from torch.utils.cpp_extension import BuildExtension

    extensions = [core_extension(), cpu_extension(), *([cuda_extension()] if with_cuda else [])]
    return {"ext_modules": extensions, "cmdclass": {"build_ext": BuildExtension}, "options": WHEEL_OPTIONS}


setup(**settings())
