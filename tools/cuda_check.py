"""Compiles csrc/cuda/*.cu without a GPU and reports the registers, shared memory and spills of every kernel.

    python tools/cuda_check.py [--all] [--arch 80 90] [--jobs 2]

Any torch works, including a CPU build: the kernels only use the headers of LibTorch's stable ABI. Exit codes: 0 all
sources compile and no kernel spills, 1 otherwise, 2 nvcc or torch is missing.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
STABLE_ABI = "0x020b000000000000"  # torch 2.11, as in setup.py


class MissingToolError(Exception):
    """A tool needed for the check is not installed; the message gives the remedy."""


@dataclass(frozen=True)
class Kernel:
    """The report of ptxas on one compiled kernel; sizes in bytes per thread, shared memory in bytes per block."""

    symbol: str
    arch: str
    registers: int
    stack: int
    spill_stores: int
    spill_loads: int
    shared: int

    @property
    def spills(self) -> bool:
        return self.spill_stores + self.spill_loads > 0


@dataclass(frozen=True)
class Compilation:
    """Result for one source: its kernels, or the compiler's messages if it failed."""

    source: Path
    kernels: tuple[Kernel, ...]
    error: str


def parse_ptxas(text: str) -> list[Kernel]:
    """Reads the output of `ptxas -v`, one block per kernel and architecture; kernel names stay mangled."""
    kernels = []
    for block in re.split(r"(?=Compiling entry function)", text)[1:]:
        header = re.match(r"Compiling entry function '([^']+)' for '([^']+)'", block)
        frame = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", block)
        used = re.search(r"Used (\d+) registers", block)
        if header is None or frame is None or used is None:
            raise ValueError(f"unexpected ptxas output: {block[:200]!r}")
        shared = re.search(r"(\d+) bytes smem", block)
        stack, stores, loads = (int(number) for number in frame.groups())
        kernels.append(
            Kernel(header[1], header[2], int(used[1]), stack, stores, loads, int(shared[1]) if shared else 0)
        )
    return kernels


def demangle(symbols: Sequence[str]) -> dict[str, str]:
    """Readable kernel name, such as `cross_kernel<float, true>`, of each symbol; the symbol itself without c++filt."""
    tool = shutil.which("c++filt")
    if tool is None or not symbols:
        return {symbol: symbol for symbol in symbols}
    done = subprocess.run([tool], input="\n".join(symbols), capture_output=True, text=True, check=True)
    return {symbol: short_name(full) for symbol, full in zip(symbols, done.stdout.splitlines(), strict=True)}


def short_name(signature: str) -> str:
    """The function's name and template arguments from a demangled signature."""
    plain = re.sub(r"\(anonymous namespace\)::|\b\w+::", "", signature)
    match = re.search(r"\w+_kernel(<([^()]|\(\w+\))*>)?", plain)
    return match[0] if match else signature


def find_nvcc() -> Path:
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    found = shutil.which("nvcc", path=f"{home}/bin" if home else None) or shutil.which("nvcc")
    if found is None:
        raise MissingToolError(
            "nvcc was not found on PATH or in CUDA_HOME: install a CUDA toolkit (12 or newer; no GPU is needed), "
            "or set CUDA_HOME to one"
        )
    return Path(found)


def find_torch_headers() -> Path:
    spec = importlib.util.find_spec("torch")
    if spec is None or not spec.submodule_search_locations:
        raise MissingToolError(f"torch is not installed for {sys.executable}: run `make env`, or set PYTHON=...")
    return Path(spec.submodule_search_locations[0]) / "include"


def compile_source(source: Path, nvcc: Path, headers: Path, archs: Sequence[str], folder: Path) -> Compilation:
    """Compiles one source for all architectures; the object file goes to `folder`."""
    targets = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]
    command = [str(nvcc), "-c", "-std=c++17", "-O3", *targets, "-Xptxas", "-v", "-Xcompiler", "-fPIC"]
    command += ["-DUSE_CUDA", f"-DTORCH_TARGET_VERSION={STABLE_ABI}", "-isystem", str(headers)]
    command += [str(source), "-o", str(folder / f"{source.stem}.o")]
    done = subprocess.run(command, capture_output=True, text=True)
    text = done.stdout + done.stderr
    if done.returncode != 0:
        return Compilation(source, (), text)
    return Compilation(source, tuple(parse_ptxas(text)), "")


def compile_all(sources: Iterable[Path], archs: Sequence[str], jobs: int) -> list[Compilation]:
    nvcc, headers = find_nvcc(), find_torch_headers()
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(jobs) as pool:
        return list(pool.map(lambda source: compile_source(source, nvcc, headers, archs, Path(folder)), sources))


def kernel_table(kernels: Sequence[Kernel], every_variant: bool) -> str:
    """A row per kernel and architecture: the largest figures of its template variants, or one row per variant."""
    names = demangle([kernel.symbol for kernel in kernels])
    rows: dict[tuple[str, str], list[Kernel]] = {}
    for kernel in kernels:
        name = names[kernel.symbol]
        rows.setdefault((name if every_variant else name.split("<")[0], kernel.arch), []).append(kernel)
    width = max(len(name) for name, _ in rows)
    lines = [f"{'kernel':{width}}  arch   variants  registers  stack B  spill B  shared B"]
    for (name, arch), variants in sorted(rows.items()):
        registers = max(kernel.registers for kernel in variants)
        stack = max(kernel.stack for kernel in variants)
        spill = max(kernel.spill_stores + kernel.spill_loads for kernel in variants)
        shared = max(kernel.shared for kernel in variants)
        lines.append(f"{name:{width}}  {arch:5}  {len(variants):8}  {registers:9}  {stack:7}  {spill:7}  {shared:8}")
    return "\n".join(lines)


def spilling_kernels(kernels: Sequence[Kernel]) -> list[str]:
    """Names of the kernels that spill registers; none may, because all are performance critical."""
    names = demangle([kernel.symbol for kernel in kernels])
    return [f"{names[kernel.symbol]} ({kernel.arch})" for kernel in kernels if kernel.spills]


def report(compilations: Sequence[Compilation], every_variant: bool) -> int:
    """Prints the findings; returns the exit code."""
    failed = [compilation for compilation in compilations if compilation.error]
    kernels = [kernel for compilation in compilations for kernel in compilation.kernels]
    spilling = spilling_kernels(kernels)
    if kernels:
        print(kernel_table(kernels, every_variant))
    for compilation in failed:
        print(f"\n{compilation.source} does not compile:\n{compilation.error}")
    for name in spilling:
        print(f"spills registers: {name}")
    good = len(compilations) - len(failed)
    print(f"\n{good} of {len(compilations)} sources compile, {len(kernels)} kernels, {len(spilling)} of them spill")
    return 1 if failed or spilling or not kernels else 0


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Compile the CUDA sources and report registers and spills.")
    parser.add_argument("sources", nargs="*", type=Path, help="default: csrc/cuda/*.cu")
    parser.add_argument("--arch", nargs="+", default=["80", "90"], help="compute capabilities without the dot")
    parser.add_argument("--jobs", type=int, default=min(2, os.cpu_count() or 1), help="sources compiled at a time")
    parser.add_argument("--all", action="store_true", help="one row per template variant")
    options = parser.parse_args(arguments)
    try:
        compilations = compile_all(options.sources or sorted(ROOT.glob("csrc/cuda/*.cu")), options.arch, options.jobs)
    except MissingToolError as error:
        print(f"cuda-check: {error}", file=sys.stderr)
        return 2
    return report(compilations, options.all)


if __name__ == "__main__":
    sys.exit(main())
