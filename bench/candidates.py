"""Tries two ideas for backdoors that no trigger search finds: triggers that a repaired twin resists, and ET.

    python bench/candidates.py zoo/cifar10-w8.toml zoo/tuning.toml --data DIR [--only MODEL]
                               [--ideas transfer] [--rows bench/results/ideas.jsonl]

- `twin`: repairs a copy of the network by RNP. For each label it searches an additive trigger that leads the network to
  the label and lets the copy keep the true one. The score is the largest share of held-out images on which this works,
  minus the median over the labels.
- `transfer`: expected transferability (Xiang et al., Post-Training Detection of Backdoor Attacks for Two-Class and
  Multi-Attack Scenarios, ICLR 2022). For each label it searches a smallest perturbation of each single image. The score
  is the largest share of other images that such a perturbation leads to the label. The paper's threshold is 1/2.

Prints a Markdown table. The clean images are those of bench/screens.py. Each row is appended to FILE (JSON lines) when
it is done. Rows in FILE are not run again.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from rows import Row, Rows, auroc
from screens import cases
from torch import Tensor
from torch.nn.functional import cross_entropy

from bdprune.analysis import Case
from bdprune.data import CleanData
from bdprune.model import Model
from bdprune.purifiers import RNP
from bdprune.zoo import Entry

_STEPS, _IMAGES = 150, 16  # of one search against the twin
_BOUND = 0.1  # largest change of a colour by an additive trigger
_LR = 0.01
_SINGLE = 12  # images with a perturbation of their own, for each label
_STRIDE, _LONGEST = 0.1, 80  # length of a step of such a perturbation, and most steps


def twin_scores(case: Case) -> list[float]:
    """For each label the share of held-out images that a trigger flips in the network and not in its repaired twin."""
    model, twin = frozen(case.model), frozen(RNP()(case).model)
    search, held = case.images.split(0.5, torch.Generator().manual_seed(0))
    return [separated(model, twin, search, held, label) for label in range(case.model.num_classes)]


def separated(model: Model, twin: Model, search: CleanData, held: CleanData, target: int) -> float:
    """The share of held-out images of other labels that the best found trigger flips in ``model`` only."""
    generator = torch.Generator().manual_seed(target)
    search, held = (one.subset((one.labels != target).nonzero().flatten()) for one in (search, held))
    pattern = torch.zeros(1, *search.images.shape[1:], requires_grad=True)
    adam = torch.optim.Adam([pattern], lr=_LR)
    for _ in range(_STEPS):
        picks = torch.randint(len(search), (_IMAGES,), generator=generator)
        stamped = (search.images[picks] + _BOUND * pattern.tanh()).clamp(0, 1)
        own, other = model.module(stamped), twin.module(stamped)
        goal = torch.full((_IMAGES,), target)
        adam.zero_grad()
        (cross_entropy(own, goal) + cross_entropy(other, search.labels[picks])).backward()
        adam.step()
    with torch.no_grad():
        stamped = (held.images + _BOUND * pattern.tanh()).clamp(0, 1)
        own, other = model.module(stamped).argmax(1), twin.module(stamped).argmax(1)
    return ((own == target) & (other == held.labels)).float().mean().item()


def transfer_scores(case: Case) -> list[float]:
    """For each label the share of images that the perturbation of another image leads to it."""
    model = frozen(case.model)
    return [transferred(model, case.images, label) for label in range(case.model.num_classes)]


def transferred(model: Model, data: CleanData, target: int) -> float:
    """The share of pairs of two images in which the perturbation of the first leads the second to ``target``."""
    others = data.subset((data.labels != target).nonzero().flatten()).spread(_SINGLE)
    changes = smallest_changes(model, others.images, target)
    stamped = (others.images[None] + changes[:, None]).clamp(0, 1).flatten(0, 1)
    with torch.no_grad():
        flipped = (model.module(stamped).argmax(1) == target).view(len(others), len(others))
    pairs = ~torch.eye(len(others), dtype=torch.bool)
    return flipped[pairs].float().mean().item()


def smallest_changes(model: Model, images: Tensor, target: int) -> Tensor:
    """For each image the change after the first step along the gradient that leads it to ``target``."""
    changes = torch.zeros_like(images)
    goal = torch.full((len(images),), target)
    for _ in range(_LONGEST):
        leaf = changes.clone().requires_grad_()
        logits = model.module((images + leaf).clamp(0, 1))
        open_ones = logits.argmax(1) != target
        if not open_ones.any():
            break
        cross_entropy(logits, goal, reduction="sum").backward()
        assert leaf.grad is not None
        length = leaf.grad.flatten(1).norm(dim=1).clamp(min=1e-12).view(-1, 1, 1, 1)
        changes -= _STRIDE * open_ones.view(-1, 1, 1, 1) * leaf.grad / length
    return changes


def frozen(model: Model) -> Model:
    """A copy in eval mode whose weights need no gradient."""
    copy = model.clone()
    copy.module.eval().requires_grad_(False)
    return copy


def above_median(scores: list[float]) -> float:
    """The largest score minus the median."""
    return max(scores) - statistics.median(scores)


IDEAS: dict[str, tuple[Callable[[Case], list[float]], Callable[[list[float]], float]]] = {
    "twin": (twin_scores, above_median),
    "transfer": (transfer_scores, max),
}


def measured(entry: Entry, case: Case, idea: str) -> Row:
    """The row of one idea and one network."""
    start = time.perf_counter()
    compute, summary = IDEAS[idea]
    scores = compute(case)
    attack = entry.make_attack()
    return {
        "family": None if attack is None else attack.family,
        "target": None if attack is None else attack.target,
        "score": summary(scores),
        "label": scores.index(max(scores)),
        "details": scores,
        "seconds": time.perf_counter() - start,
    }


def table(rows: Rows) -> str:
    """A Markdown table with one line for each network, and the AUROC of each idea."""
    lines = ["| network | " + " | ".join(IDEAS) + " |", "|" + "---|" * (1 + len(IDEAS))]
    names = dict.fromkeys((row["zoo"], row["model"]) for row in rows.where())
    for zoo, model in names:
        cells = []
        for idea in IDEAS:
            for row in rows.where(zoo=zoo, model=model, idea=idea):
                right = "" if row["target"] is None else " (right)" if row["label"] == row["target"] else " (wrong)"
                cells.append(f"{row['score']:.2f}{right}")
        lines.append(f"| {model} | {' | '.join(cells)} |")
    for idea in IDEAS:
        mine = rows.where(idea=idea)
        sides = [[row["score"] for row in mine if (row["family"] is None) == clean] for clean in (False, True)]
        if all(sides):
            lines.append(f"\n{idea}: AUROC {auroc(*sides):.2f}")
    return "\n".join(lines)


def main() -> None:
    """Runs the missing measurements and prints the table of all rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("manifests", nargs="*", type=Path)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--models", type=Path, help="folder of the models, if not beside the manifest")
    parser.add_argument("--only", action="append", default=[], help="a model; repeatable")
    parser.add_argument("--ideas", type=lambda text: text.split(","), default=list(IDEAS))
    parser.add_argument("--rows", type=Path, help="JSON lines file for the rows")
    options = parser.parse_args()
    rows = Rows(options.rows, ("zoo", "model", "idea"))
    for zoo, entry, case in cases(options, seed=0):
        for idea in options.ideas:
            key = {"zoo": zoo, "model": entry.name, "idea": idea}
            rows.add(key, lambda entry=entry, case=case, idea=idea: measured(entry, case, idea))  # type: ignore[misc]
    print(table(rows))


if __name__ == "__main__":
    main()
