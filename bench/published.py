"""Published figures of repairs: attack success and clean accuracy, in per cent, and numbers of pruned filters.

From Li et al. (RNP), ICML 2023, Tables 2, 3, 4, 10 and 15: ResNet-18 of width 64, 200 epochs, 500 clean images. Its
networks are larger and better trained than those of our zoos.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from bdprune.attacks import Attack

_ATTACKS = (
    "badnets",
    "trojan",
    "blend",
    "label-consistent",
    "sig",
    "dynamic",
    "wanet",
    "feature-collision",
    "dfst",
    "awp",
    "lira",
    "ablend",
)


def _by_attack(success: Sequence[float], accuracy: Sequence[float]) -> dict[str, tuple[float, float]]:
    return dict(zip(_ATTACKS, zip(success, accuracy, strict=True), strict=False))


_TABLE_2 = {
    "fine_pruning": _by_attack(
        (15.11, 56.51, 68.22, 24.38, 19.16, 41.73, 68.92, 98.45, 88.78, 23.17, 87.78, 85.22),
        (88.15, 85.43, 85.21, 88.75, 87.88, 83.28, 86.35, 87.62, 85.32, 86.04, 83.12, 81.82),
    ),
    "nad": _by_attack(
        (1.20, 5.68, 10.92, 13.17, 0.64, 13.60, 17.46, 36.07, 12.70, 1.71, 32.12, 18.51),
        (90.64, 88.72, 89.77, 89.76, 89.40, 88.64, 82.41, 88.02, 88.72, 89.13, 86.73, 85.23),
    ),
    "ibau": _by_attack(
        (15.50, 12.78, 1.62, 23.12, 29.32, 18.74, 23.18, 17.93, 25.58, 8.71, 51.33, 33.38),
        (91.18, 90.46, 90.16, 88.82, 89.67, 86.87, 87.38, 86.75, 87.44, 89.62, 82.56, 85.91),
    ),
    "anp": _by_attack(
        (0.53, 1.00, 0.50, 15.20, 1.19, 9.20, 13.14, 74.75, 10.80, 0.67, 20.25, 23.71),
        (91.61, 92.37, 92.31, 92.86, 92.97, 89.66, 92.64, 81.97, 90.66, 92.64, 87.78, 90.16),
    ),
    "rnp": _by_attack(
        (0.20, 2.23, 0.33, 8.87, 0.43, 15.24, 10.98, 1.80, 4.61, 1.04, 13.51, 1.09),
        (92.22, 92.56, 92.62, 93.12, 94.62, 90.18, 92.83, 90.93, 92.78, 94.24, 92.26, 90.38),
    ),
}
_TABLE_4 = {
    "anp": {"adapt-d": (24.81, 89.78), "adv-t": (54.01, 83.06)},
    "rnp": {"adapt-d": (13.22, 90.58), "adv-t": (18.09, 86.15)},
}
_TABLE_15 = {
    "nc_fine_tuning": _by_attack(
        (8.31, 1.64, 3.71, 3.51, 5.62, 9.71, 8.19, 43.69, 12.50, 3.20),
        (93.21, 92.96, 92.63, 92.28, 82.06, 91.28, 83.32, 87.62, 87.93, 94.16),
    ),
    "nu_nc_fine_tuning": _by_attack(
        (0.72, 0.78, 0.24, 0.58, 1.18, 8.67, 1.10, 34.58, 9.60, 0.87),
        (92.13, 93.14, 92.64, 83.79, 80.36, 91.08, 88.32, 92.76, 88.93, 94.70),
    ),
    "nu_nc_abl": _by_attack(
        (0.28, 1.02, 1.87, 0.24, 3.37, 46.86, 7.79, 0.0, 0.9, 0.01),
        (93.92, 93.28, 91.32, 93.23, 88.60, 81.19, 93.30, 85.06, 93.22, 94.36),
    ),
    "nu_fine_pruning": _by_attack(
        (0.37, 1.42, 0.0, 6.48, 0.04, 11.16, 10.19, 4.91, 4.89, 0.56),
        (89.94, 85.30, 92.0, 92.57, 93.88, 86.84, 92.23, 91.87, 92.58, 94.53),
    ),
}
REPAIRS: Mapping[str, Mapping[str, tuple[float, float]]] = {
    method: _TABLE_2.get(method, {}) | _TABLE_4.get(method, {}) | _TABLE_15.get(method, {})
    for method in {**_TABLE_2, **_TABLE_15}
}
"""Purifier -> kind of attack with one target label -> (attack success, clean accuracy) after it."""

ALL_TO_ALL: Mapping[str, Mapping[str, tuple[float, float]]] = {
    "anp": {"badnets": (6.16, 88.58), "trojan": (18.84, 88.14), "blend": (13.81, 86.26)},
    "rnp": {"badnets": (1.24, 92.56), "trojan": (8.78, 90.67), "blend": (11.56, 90.02)},
}
"""The same for attacks on all labels (Table 10)."""

PRUNED: Mapping[str, Mapping[str, int]] = {
    "anp": dict(zip(_ATTACKS, (94, 96, 42, 135, 88, 69, 126, 199, 165, 56, 158, 96), strict=True)),
    "rnp": dict(zip(_ATTACKS, (41, 48, 28, 103, 73, 59, 92, 155, 83, 40, 112, 78), strict=True)),
}
"""Purifier -> kind of attack -> number of pruned filters (Table 3)."""


_LEAST_RATE = 0.08
"""The smallest share of poisoned images in these tables (Table 6)."""


def has_published_settings(attack: Attack | None) -> bool:
    """Whether an attack has the settings of these tables: another rate, size or source is another attack."""
    if attack is None or attack.rate < _LEAST_RATE:
        return False
    return attack == type(attack)(target=attack.target, rate=attack.rate)


def published(method: str, kind: str | None, all_to_all: bool) -> str:
    """The published figures of a method, else those of RNP, as ``0.20 / 92.22, 41 filters``; a dash if there are none.

    Args:
        method: as ``bench/efficacy.py`` names it, such as ``nad``. Figures are for 500 images and one method, so
            ``rnp-100`` and ``rnp+nad`` have none.
        kind: of the attack; None for a clean model.
        all_to_all: whether the attack leads to all labels.
    """
    name = method.partition(":")[0]
    if "+" in name or name.rpartition("-")[2].isdigit():
        return "–"
    table = ALL_TO_ALL if all_to_all else REPAIRS
    found = name if kind in table.get(name, {}) else "rnp"
    figures = table[found].get(kind or "")
    if figures is None:
        return "–"
    pruned = None if all_to_all else PRUNED.get(found, {}).get(kind or "")
    of_rnp = "" if found == name else " (RNP)"
    return f"{figures[0]:.2f} / {figures[1]:.2f}{'' if pruned is None else f', {pruned} filters'}{of_rnp}"
