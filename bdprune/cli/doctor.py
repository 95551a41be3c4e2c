"""``bdprune doctor``."""

from __future__ import annotations

import json
import os
import platform
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, Literal

import click

import bdprune
from bdprune.cli import exit_codes
from bdprune.cli.options import listing
from bdprune.cli.outputs import emit, use_colour
from bdprune.errors import BdpruneError
from bdprune.report import plain, table

_BUILD = "Build it in the source tree: pip install -e . --no-build-isolation (needs a C++ compiler)."
_PACKAGES = ("numpy", "safetensors", "click", "rich", "msgspec", "jinja2")
_COLOURS = {"ok": "32", "note": "33", "broken": "31"}


@dataclass(frozen=True)
class Check:
    """The outcome of one check: its state, what was found, and a hint."""

    name: str
    state: Literal["ok", "note", "broken"]
    found: str
    hint: str = ""


@click.command(short_help="Check the installation and this machine.")
@listing
@click.option(
    "--paths", is_flag=True, help="Also show the fastest variants of stacks, sweeps and convolutions on this machine."
)
def doctor(form: str, paths: bool) -> int:
    """Check the installation: the compiled parts, torch, CUDA, CPU and packages, with a hint for each problem.

    Exits with 2 if something that every scan needs is broken.

    \b
    bdprune doctor
    bdprune doctor --format json
    bdprune doctor --paths
    """
    checks = [*_checks(), *(_tuned() if paths else ())]
    emit(_json(checks) if form == "json" else _text(checks))
    return exit_codes.FAILED if any(check.state == "broken" for check in checks) else exit_codes.OK


def _checks() -> Iterator[Check]:
    yield Check("bdprune", "ok", f"{bdprune.__version__} in {os.path.dirname(bdprune.__file__)}")
    yield Check("Python", "ok", f"{platform.python_version()} at {sys.executable}")
    try:
        import torch
    except Exception as error:
        yield Check("torch", "broken", f"{type(error).__name__}: {error}", "Install it: pip install 'torch>=2.11'.")
        return
    cuda = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU build"
    yield Check("torch", "ok", f"{torch.__version__}, {cuda}, {torch.get_num_threads()} threads")
    yield _gpus(torch)
    yield from _ops()
    yield from _packages()


def _gpus(torch: Any) -> Check:
    names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    if names:
        return Check("GPU", "ok", ", ".join(names))
    hint = "" if torch.version.cuda is None else "This torch is built for CUDA: check the driver with nvidia-smi."
    return Check("GPU", "note", "none; everything runs on the CPU", hint)


def _ops() -> Iterator[Check]:
    try:
        from bdprune.ops import build_info

        info = build_info()
    except BdpruneError as error:
        yield Check("ops", "broken", error.message, error.hint)
        return
    yield _cpu_ops(info)
    if info["cuda"]:
        yield Check("CUDA ops", "ok", "built and running")
    else:
        yield Check("CUDA ops", "note", info["cuda_reason"], "GPU tensors use plain PyTorch, with the same results.")
    yield _self_test()


def _cpu_ops(info: dict[str, Any]) -> Check:
    if info["backend"] == "native":
        compiler = str(info["compiler"])
        compiler = f"GCC {compiler}" if compiler[:1].isdigit() else compiler  # Clang gives its name
        built = f"torch {info['built_for_torch']}, stable ABI {info['stable_abi']}, {compiler}"
        return Check("CPU ops", "ok", f"compiled, {info['cpu_features']} kernels; built with {built}")
    hint = "Unset BDPRUNE_BACKEND." if info["requested"] == "reference" else _BUILD
    return Check("CPU ops", "note", f"plain PyTorch, slower, with the same results: {info['reason']}", hint)


def _self_test() -> Check:
    """Computes two known spectral norms: 3 for a 3x3 filter of ones, and 2 for twice a unit matrix."""
    import torch

    from bdprune.ops import filter_spectral_norms

    weights = [torch.ones(1, 1, 3, 3), 2 * torch.eye(4).reshape(1, 4, 2, 2)]
    try:
        found = [float(norms[0]) for norms in filter_spectral_norms(weights)]
    except Exception as error:
        return Check("self-test", "broken", f"{type(error).__name__}: {error}", _BUILD)
    if max(abs(found[0] - 3), abs(found[1] - 2)) > 1e-5:
        return Check("self-test", "broken", f"spectral norms {found}, not [3, 2]", "Please report it.")
    return Check("self-test", "ok", "spectral norms are right")


def _tuned() -> Iterator[Check]:
    """The variants that trials have chosen on this machine."""
    from bdprune.ops import kept_choices, kept_file

    choices = kept_choices()
    if not choices:
        yield Check("tuned", "note", f"no trial has run yet; their results will be stored in {kept_file()}")
    for choice in choices:
        times = ", ".join(f"{name} {1000 * seconds:.2f} ms" for name, seconds in choice.seconds.items())
        yield Check(f"tuned {choice.question}", "ok", f"{choice.winner}: {choice.shape} on {choice.device}: {times}")


def _packages() -> Iterator[Check]:
    missing = [name for name in _PACKAGES if not _version(name)]
    found = ", ".join(f"{name} {_version(name)}" for name in _PACKAGES if name not in missing)
    hint = f"pip install {' '.join(missing)}" if missing else ""
    yield Check("packages", "broken" if missing else "ok", found if not missing else f"missing: {missing}", hint)
    yield _optional("hub", ("huggingface_hub",), "models on the Hugging Face Hub cannot be scanned")
    yield _optional("images", ("pillow",), "image files cannot be read, so clean data cannot be a folder")
    yield _optional("parquet", ("pyarrow", "pillow"), "clean data cannot be a parquet file")
    yield _optional("prune", ("torch-pruning",), "purify cannot remove pruned filters (--mode compact)")


def _optional(name: str, packages: tuple[str, ...], without: str) -> Check:
    """Packages that only some clean data needs."""
    missing = [package for package in packages if not _version(package)]
    if missing:
        return Check(name, "note", without, f"pip install {' '.join(missing)}")
    return Check(name, "ok", ", ".join(f"{package} {_version(package)}" for package in packages))


def _version(name: str) -> str:
    # Imported here to keep the start of the program fast.
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(name)
    except PackageNotFoundError:
        return ""


def _json(checks: list[Check]) -> str:
    try:
        from bdprune.ops import build_info

        build = build_info()
    except (BdpruneError, ImportError):
        build = {}
    return f"{json.dumps({'checks': [asdict(check) for check in checks], 'build': build}, indent=2)}\n"


def _text(checks: list[Check]) -> str:
    lines = table([(check.state, check.name, check.found) for check in checks], "lll")
    if use_colour():
        lines = [
            line.replace(check.state, f"\x1b[{_COLOURS[check.state]}m{check.state}\x1b[0m", 1)
            for line, check in zip(lines, checks, strict=True)
        ]
    hints = [[f"  {' ' * 8}{plain(check.hint)}"] if check.hint else [] for check in checks]
    return "\n".join(part for line, hint in zip(lines, hints, strict=True) for part in [line, *hint]) + "\n"
