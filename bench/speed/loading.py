"""Reads a checkpoint and computes data-free scores of every filter."""

from __future__ import annotations

import atexit
import shutil
import tempfile
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bdprune.analysis import MEMO, channel_lipschitz
from bdprune.model import ResNet18Cifar, load
from bdprune.pipeline import score
from bdprune.record import ScoreResult
from bench.speed import filter_spectral_norms
from bench.speed.benchmark import Benchmark, Variant, Work, relative_error
from bench.speed.networks import resnet18
from bench.speed.plan import Plan

Norms = Callable[[list[Tensor]], list[Tensor]]


def benchmarks(plan: Plan) -> list[Benchmark]:
    """One file of a ResNet-18. CPU only: a GPU does not read files."""
    if plan.device.type != "cpu":
        return []
    folder = tempfile.mkdtemp(prefix="bdprune-bench-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    path = Path(folder) / "model.pth"
    torch.save(resnet18(plan.width, plan.device).network.state_dict(), path)
    return [loading_benchmark(plan, path)]


def loading_benchmark(plan: Plan, path: Path) -> Benchmark:
    """The file is in the page cache, and everything is imported."""

    @cache
    def truth() -> list[Tensor]:
        state = torch.load(path, weights_only=True)
        network = ResNet18Cifar(10, width=plan.width).double()
        network.load_state_dict(state)
        return _scores(network, filter_spectral_norms.batched_svdvals)

    variants = (
        Variant(
            "unpickled, one svd per filter",
            "author",
            partial(_plain, plan.width, path, filter_spectral_norms.author_loop, {}),
        ),
        Variant(
            "weights only, batched svdvals",
            "eager",
            partial(_plain, plan.width, path, filter_spectral_norms.batched_svdvals, _SAFE),
        ),
        Variant(
            "weights only, Gram + eigvalsh",
            "eager",
            partial(_plain, plan.width, path, filter_spectral_norms.gram_eigvalsh, _SAFE),
        ),
        Variant("memory-mapped, assigned, Gram + eigvalsh", "eager", partial(_mapped, plan.width, path)),
        Variant("bdprune.load + channel_lipschitz", "ours", lambda: list(channel_lipschitz(load(path)).values())),
        Variant("bdprune.score, with digest and record", "ours", partial(_scored, path), exact=False),
        Variant("read the file", "required", path.read_bytes, exact=False),
    )
    size = path.stat().st_size
    return Benchmark(
        "File to data-free scores",
        f"ResNet-18 width {plan.width}, {size / 1e6:.1f} MB",
        variants,
        (Work(size),),
        lambda found: relative_error(found, truth()),
        "largest error of a score, relative to the largest of its layer",
        seconds=plan.seconds,
        host=True,
    )


_SAFE: dict[str, Any] = {"weights_only": True}


def _scored(path: Path) -> ScoreResult:
    """The score of a file that is not in the memo."""
    MEMO.clear()
    return score(path)


def _plain(width: int, path: Path, norms: Norms, how: dict[str, Any]) -> list[Tensor]:
    """Makes, fills and scores a network of known architecture."""
    network = ResNet18Cifar(10, width=width)
    # The authors' scripts unpickle arbitrary code, as torch.load then did by default.
    network.load_state_dict(torch.load(path, **(how or {"weights_only": False})))
    return _scores(network, norms)


def _mapped(width: int, path: Path) -> list[Tensor]:
    """Does not initialise weights that the file replaces, and does not copy them."""
    with torch.device("meta"):
        network = ResNet18Cifar(10, width=width)
    network.load_state_dict(torch.load(path, mmap=True, weights_only=True), assign=True)
    return _scores(network, filter_spectral_norms.gram_eigvalsh)


@torch.no_grad()
def _scores(network: nn.Module, norms: Norms) -> list[Tensor]:
    """Each filter's norm times the gain of the batch norm after it, in order of execution."""
    modules = dict(network.named_modules())
    pairs = [(conv, _norm_after(name, modules)) for name, conv in modules.items() if isinstance(conv, nn.Conv2d)]
    found = norms([conv.weight for conv, _ in pairs])
    gains = [norm.weight.abs() / (norm.running_var + norm.eps).sqrt() for _, norm in pairs]
    return [norm * gain for norm, gain in zip(found, gains, strict=True)]


def _norm_after(name: str, modules: dict[str, nn.Module]) -> Any:
    """The batch norm by its name in a ResNet: conv1 and bn1, or 0 and 1 of a shortcut."""
    home, _, last = name.rpartition(".")
    after = "1" if last == "0" else last.replace("conv", "bn")
    return modules[f"{home}.{after}" if home else after]
