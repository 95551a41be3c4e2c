"""The CUDA kernels, built by the C++ compiler with simt/cuda_runtime.h, so that they run without a GPU."""

import ctypes
import fcntl
import hashlib
import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.utils._pytree import tree_map_only

from bdprune.ops import _backend

ROOT = Path(__file__).resolve().parents[2]
SIMT = Path(__file__).parent / "simt"
TORCH = Path(torch.__file__).parent
FLAGS = ["-std=c++17", "-O2", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Werror"]
FLAGS += ["-Wno-unknown-pragmas", "-Wno-attributes"]  # the host compiler does not know CUDA's pragmas and attributes
FLAGS += ["-DUSE_CUDA", "-DTORCH_TARGET_VERSION=0x020b000000000000", f"-I{SIMT}", "-isystem", str(TORCH / "include")]
FLAGS += os.environ.get("SIMT_FLAGS", "").split()  # such as -fsanitize=address


def _run(*command: str | Path) -> str:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(map(str, command))}\n{done.stdout}{done.stderr}"
    return done.stdout


def _build(compiler: str, folder: Path) -> Path:
    """The library in this folder. One process compiles it and the others wait, so that no two write the same files."""
    library = folder / "simt.so"
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        return library if library.exists() else _compile(compiler, folder, library)


def _compile(compiler: str, folder: Path, library: Path) -> Path:
    sources = [SIMT / "simt.cpp", ROOT / "csrc/ops.cpp", *sorted((ROOT / "csrc/cuda").glob("*.cu"))]
    prelude = ["-include", SIMT / "prelude.h", "-x", "c++"]

    def compile_one(source: Path) -> Path:
        target = folder / f"{source.stem}.o"
        _run(compiler, *FLAGS, *prelude, "-c", source, "-o", target)
        return target

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compile_one, sources))
    linked = folder / "linked.so"
    _run(compiler, "-shared", *FLAGS, *objects, f"-L{TORCH / 'lib'}", "-ltorch_cpu", "-lc10", "-o", linked)
    linked.rename(library)
    return library


def _name_shared_memory(library: Path, handle: ctypes.CDLL) -> int:
    """Passes the __shared__ variables to the emulator: the function-local statics of the symbol table."""
    rows = [line.split() for line in _run("nm", "-S", library).splitlines()]
    base = next(int(row[0], 16) for row in rows if row[-1] == "simt_seed")
    shared = [row for row in rows if len(row) == 4 and row[2] == "b" and row[3].startswith("_ZZN7bdprune4cuda")]
    for address, size, *_ in shared:
        handle.simt_add_shared(ctypes.c_int64(int(address, 16) - base), ctypes.c_size_t(int(size, 16)))
    return len(shared)


class OnDevice:
    """The ops of `namespace` for CPU tensors, run on `device`: arguments are sent with their memory layout, strides
    and offset; results and overwritten arguments come back."""

    def __init__(self, namespace, device: str) -> None:
        self._namespace, self._device = namespace, device

    def __getattr__(self, name: str):
        op = getattr(self._namespace, name)

        def run(*arguments):
            moved = tree_map_only(torch.Tensor, self._sent, arguments)
            found = op(*moved)
            if name.endswith("_"):
                for ours, theirs in zip(arguments, moved, strict=True):
                    if ours is not theirs:
                        ours.copy_(theirs)
            return tree_map_only(torch.Tensor, lambda tensor: tensor.cpu(), found)

        return run

    def _sent(self, tensor: torch.Tensor) -> torch.Tensor:
        whole = tensor.untyped_storage().nbytes() // tensor.element_size()
        memory = tensor.as_strided((whole,), (1,), 0).to(self._device, copy=True)
        return memory.as_strided(tensor.size(), tensor.stride(), tensor.storage_offset())


def _targets() -> list[str]:
    return ["emulated", "cuda"] if _backend.build_info()["cuda"] else ["emulated"]


@pytest.fixture(scope="session", params=_targets())
def emulated(request: pytest.FixtureRequest) -> SimpleNamespace:
    """`ops`: the CUDA kernels for CPU tensors, emulated, and on the GPU where there is one; `seed(n)`: sets the order
    in which the emulator runs the threads of a block; `launches()`: kernels that it has run so far."""
    if request.param == "cuda":
        return SimpleNamespace(ops=OnDevice(torch.ops.bdprune, "cuda"), seed=lambda seed: None, launches=None)
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")
    if compiler is None or shutil.which("nm") is None:
        pytest.skip("the emulated CUDA build needs a C++ compiler and nm")
    digest = hashlib.sha256(" ".join([compiler, torch.__version__, *FLAGS]).encode())
    for path in sorted([*(ROOT / "csrc").rglob("*"), *SIMT.iterdir(), Path(__file__)]):
        if path.is_file():
            digest.update(path.read_bytes())
    library = _build(compiler, ROOT / "build" / "simt" / digest.hexdigest()[:16])
    torch.ops.load_library(library)
    handle = ctypes.CDLL(str(library))
    assert _name_shared_memory(library, handle) > 0
    handle.simt_launches.restype = ctypes.c_int64
    return SimpleNamespace(
        ops=torch.ops.bdprune_simt,
        seed=lambda seed: handle.simt_seed(ctypes.c_uint64(seed)),
        launches=handle.simt_launches,
    )


def randn(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


@pytest.fixture(name="randn", scope="session")
def _randn():
    return randn
