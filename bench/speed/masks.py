"""The section about RNP's masks: whether the fast variants find those of the published loop."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from bench.speed.tables import span, table
from bench.speed.targets import ALIKE, NEAR, Record

_TEXT = f"""## Masks

`python -m bench.precision` runs RNP on a backdoored model of `zoo/demo` with the fast variant and with the published
loop. A seed passes if the rank correlation of the masks is at least {ALIKE:g} and both prune the same filters. Masks
within {NEAR:g} of the threshold may differ. *CA* and *ASR* are the largest differences, in points, after each variant
prunes at its own threshold and before any fine-tuning. *Sweep* is how many times faster our sweep of 19 thresholds is
than a plain one on these masks.
"""


def masks_section(precision: Mapping[str, Record]) -> str:
    """One line per record of ``bench.precision``; empty without records."""
    head = ["Record", "Model", "Fast variant", "Passed", "Rank correlation", "Largest difference", "Pruned by each"]
    head += ["CA", "ASR", "Sweep"]
    rows = [_row(source, record) for source, record in precision.items()]
    return f"{_TEXT}\n{table(head, rows)}" if rows else ""


def _row(source: str, record: Record) -> list[str]:
    seeds = record["seeds"]
    sweep = record["sweep_seconds"]
    counts = sum(passed(seed) for seed in seeds)
    score = f"{counts} of {len(seeds)} seeds"
    return [
        f"`{source}`",
        record["model"],
        fast_variant(seeds),
        score if counts == len(seeds) else f"**{score}**",
        span((seed["rank_correlation"] for seed in seeds), "{:.4f}".format),
        f"{max(seed['largest_difference'] for seed in seeds):.2g}",
        ", ".join("–" if seed["pruned"] is None else " and ".join(map(str, seed["pruned"])) for seed in seeds),
        *(_apart(seeds, what) for what in ("ca", "asr")),
        f"{sweep['plain'] / sweep['ours']:.2f}",
    ]


def passed(seed: Record) -> bool:
    """Whether the masks of one seed agree; NaN does not."""
    return bool(seed["rank_correlation"] >= ALIKE and seed["same_pruned"] is not False)


def fast_variant(seeds: Sequence[Record]) -> str:
    """How the fast variant computes unlearning or recovery."""
    plans = " ".join(plan for seed in seeds for plan in seed["plans"])
    names = [name for name, word in (("Winograd", "winograd=True"), ("bfloat16", "bfloat16=True")) if word in plans]
    return " and ".join(names) or "float32"


def _apart(seeds: Sequence[Record], what: str) -> str:
    """The largest difference between both variants over the seeds, in points."""
    pairs = [[one[what] for one in seed["left"]] for seed in seeds]
    known = [abs(fast - plain) for fast, plain in pairs if fast is not None and plain is not None]
    return f"{max(known):.2f}" if known else "–"
