"""Ranks signs and root of the suspiciousness score by AUROC, with trigger-activated change as the truth.

    python bench/suspiciousness_study.py [--images 100]

The truth per filter is its trigger-activated change (TAC) in the backdoored models of zoo/demo: the mean L2 distance
between its maps on an image and on the triggered image. A filter counts as backdoored if its TAC is among the top 5 %
of its layer. Every combination of signs and root is ranked by its mean AUROC over layers and models. The study may use
the truth because its result is a fixed default; the score itself never uses it.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from bdprune.analysis import Suspiciousness, channel_lipschitz, filter_statistics
from bdprune.attacks import Attack, shape_of
from bdprune.data import CleanData, load_clean
from bdprune.model import Model, load
from bdprune.zoo import read_manifest

ZOO = Path(__file__).parent.parent / "zoo" / "demo"


def trigger_activated_change(model: Model, data: CleanData, attack: Attack) -> dict[str, Tensor]:
    """Mean over images of the L2 distance between clean and triggered maps, for each filter of every group."""
    module = model.clone().module.eval()
    maps: dict[str, Tensor] = {}
    for group in model.groups:
        watched = group.norm.name if group.norm else group.conv
        module.get_submodule(f"network.{watched}").register_forward_hook(_keep(maps, group.name))
    with torch.no_grad():
        module(data.images)
        clean = dict(maps)
        module(attack.new_trigger(shape_of(data.images))(data.images))
    return {name: (maps[name] - clean[name]).flatten(2).norm(dim=2).mean(0) for name in clean}


def _keep(maps: dict[str, Tensor], name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
    def keep(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        maps[name] = output.detach().clone()

    return keep


def auroc(score: Tensor, positive: Tensor) -> float:
    """Probability that a positive scores above a negative (Mann-Whitney); ties count half."""
    high, low = score[positive].double(), score[~positive].double()
    above = (high[:, None] > low[None, :]).double().mean()
    ties = (high[:, None] == low[None, :]).double().mean()
    return (above + ties / 2).item()


def main() -> None:
    """Ranks all settings and prints a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=100)
    options = parser.parse_args()
    clean = load_clean(ZOO / "defence.npz").sample(options.images // 10, torch.Generator().manual_seed(0))
    parts = []
    for entry in read_manifest(ZOO / "manifest.toml").models:
        attack = entry.make_attack()
        if attack:
            model = load(ZOO / f"{entry.name}.safetensors")
            change = trigger_activated_change(model, clean, attack)
            truth = {name: tac >= tac.quantile(0.95) for name, tac in change.items()}
            for rectified in (False, True):
                statistics = filter_statistics(model, clean, rectified=rectified)
                parts.append((entry.name, rectified, statistics, channel_lipschitz(model), truth))
    names = list(dict.fromkeys(name for name, *_ in parts))
    rows = []
    signs = itertools.product((-1, 0, 1), (-1, 0, 1), (-1, 0, 1), (0, 1), ("coefficient", "spectral", "none"))
    for saliency, correlation, activation, spectral, root in signs:
        for rectified in (False, True):
            method = Suspiciousness(saliency, correlation, activation, spectral, root, rectified=rectified)
            means = {}
            for name, kind, statistics, sigma, truth in parts:
                if kind == rectified:
                    scores = method.combine(statistics, sigma)
                    values = [auroc(scores[layer], truth[layer]) for layer in scores]
                    means[name] = sum(values) / len(values)
            rows.append((sum(means.values()) / len(means), means, method))
    rows.sort(key=lambda row: -row[0])
    print(f"| rank | AUROC | {' | '.join(names)} | saliency | correlation | activation | spectral | root | rectified |")
    print("|" + "---|" * (len(names) + 8))
    reference = Suspiciousness()
    for rank, (mean, means, method) in enumerate(rows, 1):
        if rank <= 15 or method == reference:
            each = " | ".join(f"{means[name]:.3f}" for name in names)
            signs_text = (
                f"{method.saliency:+d} | {method.correlation:+d} | {method.activation:+d} | {method.spectral:+d}"
            )
            print(f"| {rank} | {mean:.3f} | {each} | {signs_text} | {method.root} | {method.rectified} |")


if __name__ == "__main__":
    main()
