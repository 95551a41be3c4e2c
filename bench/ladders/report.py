"""The page of benchmarks, made from records.

    python -m bench.ladders.report RECORD.json ... [--precision RECORD.json ...] [--page docs/benchmarks.md]

Writes the page and one chart beside it for each record. Nothing is left out: rows where we lose are marked, rungs that
broke down say why, ladders that the time did not suffice for are named.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from bdprune.report import Axes, Bar, bars
from bench.ladders.targets import ALIKE, NEAR, TARGETS, Record, Row, best, ratio, whole_rnp

_KINDS = {
    "author": "author",
    "eager": "eager",
    "compile": "compile",
    "ours": "**ours**",
    "bound": "bound",
    "rival": "other method",
}
_STYLE = (
    "text{font:11px sans-serif;fill:#444}.grid{stroke:#ddd}.bar{fill:#3b6ea8}.bar.marked{fill:#c2492f}"
    ".cut{stroke:#222;stroke-dasharray:4 3}"
)
_INTRO = """# Benchmarks

Made by `python -m bench.ladders.report` from the records in `bench/results/`, which `make bench` and `make bench-gpu`
write. Each ladder goes from the author's loop over the best eager PyTorch that we found and `torch.compile` to ours.

* **Time** is the median of a whole run, with its quartiles; compile time is stated and not counted.
* **Floor** is the time that the bytes or the floating point operations of the task take at best, at the rates of a copy
  and of a float32 matrix product that were measured in the same run. 100 % is the floor. Data that lies in a cache is
  read faster than it is copied, so a row may be above it. A *bound* row is work that no rung can leave out.
* **Error** is the largest one against float64. Every rung takes and gives float32, without half precision, and without
  TF32 but where the case says so.
* **Peak** is by how much memory grew during one call: resident memory on a CPU, the allocator's on a GPU.
* Ratios are of medians. A ratio whose quartiles overlap is noise.
"""


def page(records: Sequence[tuple[str, Record]], charts: Sequence[str]) -> str:
    """The whole page; ``records`` with the name of their file, ``charts`` their pictures."""
    parts = [_INTRO]
    for (source, record), chart in zip(records, charts, strict=True):
        parts += [_heading(source, record), f"![How many times faster than the best eager PyTorch]({chart})\n"]
        parts += [summary(record), _left_out(record), targets(record), where_time_goes(record)]
        parts += [_section(run, ladder) for run, ladder in ladders(record)]
    return "\n".join(part for part in parts if part)


def ladders(record: Record) -> Iterator[tuple[Record, Record]]:
    """Every ladder with the run it belongs to."""
    for run in record["runs"]:
        for ladder in run["ladders"]:
            yield run, ladder


def summary(record: Record) -> str:
    """One line a ladder: ours against the best eager rung, the author's loop and the floor."""
    lines = [
        "| what | threads | best eager | ours | times faster than it | than compiled | than author | % of floor |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for run, ladder in ladders(record):
        eager, ours = best(ladder, "eager"), best(ladder, "ours")
        if ours is None:
            continue
        others = [ratio(best(ladder, kind), ours) for kind in ("eager", "compile", "author")]
        cells = [
            f"{ladder['name']}: {ladder['case']}",
            str(run["threads"]),
            "–" if eager is None else f"{eager['rung']}, {duration(eager['seconds'])}",
            duration(ours["seconds"]),
            *(_times(other) for other in others),
            _percent(ours["floor_percent"]),
        ]
        lines.append(_line(cells))
    return "\n".join(lines) + "\n"


def targets(record: Record) -> str:
    """Every target with what was measured, and whether that meets it."""
    lines = [
        "### Targets\n",
        "*At the floor* is what the figure would be if ours ran at the physical floor.\n",
        "| what | target | threads | wanted | measured | met | at the floor |",
        "|---|---|---|---|---|---|---|",
    ]
    device = record.get("machine", {}).get("device", "cpu")
    for target in TARGETS:
        if target.device not in ("", device):
            continue
        for run, ladder in ladders(record):
            figure = target.figure(ladder) if target.concerns(ladder) else None
            # What takes long runs with one number of threads only. A rung that broke down is a miss.
            if figure is not None or (target.concerns(ladder) and any(row["failure"] for row in ladder["rows"])):
                cells = [f"{ladder['name']}: {ladder['case']}", target.what, str(run["threads"]), target.wanted]
                met = figure is not None and target.met(figure)
                lines.append(_line([*cells, _figure(figure), _met(met), _figure(target.reachable(ladder))]))
    for run in record["runs"]:
        for name, figure in whole_rnp(run):
            cells = [name, "all three phases faster than the plain loops", str(run["threads"]), "at least 3 x"]
            lines.append(_line([*cells, _figure(figure), _met(figure >= 3), "–"]))
    return "\n".join(lines) + "\n"


def where_time_goes(record: Record) -> str:
    """The profile of the steps of RNP."""
    found = [(run, profile) for run in record["runs"] for profile in run.get("profiles", [])]
    if not found:
        return ""
    lines = [
        "### Where the time of RNP goes\n",
        "By `python -m bench.ladders.profile`, per cent of the time that operations take themselves.\n",
        "| what | threads | time | shares |",
        "|---|---|---|---|",
    ]
    for run, profile in found:
        shares = ", ".join(f"{name} {percent:.3g} %" for name, percent in profile["percent"].items())
        lines.append(_line([profile["phase"], str(run["threads"]), duration(profile["seconds"]), shares]))
    return "\n".join(lines) + "\n"


def precision(records: Sequence[Record]) -> str:
    """Whether RNP's fast path found the masks of the plain one; empty without a record."""
    if not records:
        return ""
    lines = [
        "## Masks of the fast path\n",
        "By `python -m bench.precision`: RNP unlearns and recovers by the fast path and by the published loop. Wanted",
        f"are a rank correlation of at least {ALIKE:g}, and the same filters pruned but for masks within {NEAR:g} of",
        "the threshold. CA and ASR, in per cent, are what the threshold that each path chooses leaves, before any",
        "fine-tuning, by the fast path and by the plain one.\n",
        "| model | fast path | seed | rank correlation | most apart | threshold | pruned by each | met | CA | ASR |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for record in records:
        for found in record["seeds"]:
            pruned = "–" if found["pruned"] is None else " and ".join(map(str, found["pruned"]))
            met = found["rank_correlation"] >= ALIKE and found["same_pruned"] is not False
            cells = [record["model"], _way(found), str(found["seed"]), f"{found['rank_correlation']:.4f}"]
            cells += [f"{found['largest_difference']:.2g}", _figure(found["threshold"]), pruned, _met(met)]
            cells += [" and ".join(_figure(one[what]) for one in found["left"]) for what in ("ca", "asr")]
            lines.append(_line(cells))
    return "\n".join([*lines, "", *map(_both_paths, records)]) + "\n"


def _way(found: Record) -> str:
    """What the fast path of unlearning or recovery was."""
    plans = " ".join(found["plans"])
    ways = [name for name, word in (("Winograd", "winograd=True"), ("bfloat16", "bfloat16=True")) if word in plans]
    return " and ".join(ways) or "float32"


def _both_paths(record: Record) -> str:
    """Whether the seeds of one model differ more than the paths, and what the sweeps took."""
    seconds = record["sweep_seconds"]
    parts = []
    for what, name in (("ca", "CA"), ("asr", "ASR")):
        fast, plain = ([found["left"][path][what] for found in record["seeds"]] for path in (0, 1))
        if None not in fast:
            noise = max(max(one) - min(one) for one in (fast, plain))
            apart = abs(sum(fast) - sum(plain)) / len(fast)
            parts.append(f"mean {name} differs by {apart:.2f} points, seeds by up to {noise:.2f}")
    return (
        f"* {record['model']}, {_way(record['seeds'][0])}: {'; '.join(parts)}. The sweep of 19 thresholds is "
        f"{seconds['plain'] / seconds['ours']:.3g} times faster than a plain one on these masks."
    )


def table(ladder: Record) -> str:
    """All rows of one ladder."""
    ours = best(ladder, "ours")
    lines = [
        "| rung | kind | time | quartiles | times ours | % of floor | error | peak | notes |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    fastest = best(ladder, "eager")
    for row in ladder["rows"]:
        if row["seconds"] is None:
            lines.append(_line([row["rung"], _KINDS[row["kind"]], *["–"] * 6, f"failed: {row['failure']}"]))
            continue
        times = ratio(row, ours)
        cells = [
            f"**{row['rung']}** (best eager)" if row is fastest else row["rung"],
            _KINDS[row["kind"]],
            duration(row["seconds"]),
            " to ".join(duration(one) for one in row["quartiles"]),
            "–" if times is None else f"{times:.2f}",
            _percent(row["floor_percent"]),
            "–" if row["error"] is None else f"{float(row['error']):.1e}",
            "–" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 1e6:.1f} MB",
            _notes(row),
        ]
        lines.append(_line(cells))
    return "\n".join(lines) + "\n"


def chart(record: Record) -> str:
    """A bar for each ladder: how many times faster than the best eager rung; red where we lose. A whole SVG file."""
    values: list[Bar] = []
    for run, ladder in ladders(record):
        times = ratio(best(ladder, "eager"), best(ladder, "ours"))
        if times is not None:
            what = f"{ladder['name']}, {ladder['case']}, {run['threads']} thread(s): {times:.2f} times"
            values.append(Bar(times, what, marked=times < 1, name=str(len(values) + 1)))
    title = "Times faster than the best eager PyTorch, in the order of the table"
    inline = str(bars(title, values, Axes("line of the table", "times faster"), cut=(1.0, "as fast")))
    # The page around the charts of a report styles them; a file of its own must bring its style along.
    head = '<svg xmlns="http://www.w3.org/2000/svg" width="840" '
    return inline.replace("<svg ", head, 1).replace("</title>", f"</title><style>{_STYLE}</style>", 1) + "\n"


def duration(seconds: float) -> str:
    """Three digits and a unit: µs, ms, s, min or h."""
    for unit, size, limit in (("µs", 1e-6, 1e-3), ("ms", 1e-3, 1.0), ("s", 1.0, 120.0), ("min", 60.0, 7200.0)):
        if seconds < limit:
            return f"{_digits(seconds / size)} {unit}"
    return f"{_digits(seconds / 3600)} h"


def _digits(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def _heading(source: str, record: Record) -> str:
    machine = record["machine"]
    build = machine["build"]
    lines = [
        f"## {machine['hardware']}\n",
        f"`{source}`, {record['started']}: commit {machine['commit']}, torch {machine['torch']}"
        + (f" with CUDA {machine['cuda']}" if machine["cuda"] else "")
        + f", Python {machine['python']}, {machine['cores']} cores, ops {build['backend']} ({build['cpu_features']}).",
    ]
    if record["quick"]:
        lines.append("**A quick run on tiny shapes: it shows that everything works, and its figures mean nothing.**")
    if record.get("clock") == "cpu":
        lines.append("**Processor time, not the wall clock's**: others used the machine.")
    for run in record["runs"]:
        copy, gemm = run["copy_bytes_per_second"] / 1e9, run["gemm_flops_per_second"] / 1e9
        lines.append(f"{run['threads']} thread(s): a copy moves {copy:.3g} GB/s, a product does {gemm:.4g} GFLOP/s.")
    load = machine["load"]
    if load is not None and load > 0.5:
        lines.append(f"The machine was not idle: {load} processes were ready to run as it began. Read times as bounds.")
    return "\n".join(lines) + "\n"


def _figure(value: float | None) -> str:
    return "–" if value is None else f"{value:.3g}"


def _met(met: bool) -> str:
    return "yes" if met else "**no**"


def _left_out(record: Record) -> str:
    lines = [
        f"Left out with {run['threads']} thread(s), because the time was over: {', '.join(run['left_out'])}."
        for run in record["runs"]
        if run["left_out"]
    ]
    return "\n".join(lines)


def _section(run: Record, ladder: Record) -> str:
    floor = ladder["floor_seconds"]
    lines = [f"### {ladder['name']}, {run['threads']} thread(s)\n", f"{ladder['case']}."]
    if floor is not None:
        lines.append(f"The floor is {duration(floor)}, by {ladder['floor_by']}.")
    if ladder["error_is"]:
        lines.append(f"Error: {ladder['error_is']}.")
    return "\n".join(lines) + "\n\n" + table(ladder)


def _notes(row: Row) -> str:
    notes = [row["note"]] if row["note"] else []
    if row["compile_seconds"] is not None:
        notes.append(f"compiled in {duration(row['compile_seconds'])}, not counted")
    if row["repeats"] == 1:
        notes.append("one call")
    return "; ".join(notes)


def _times(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:.2f}" if value >= 1 else f"{value:.2f}, **we lose**"


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{value:.3g} %"


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def main(arguments: list[str] | None = None) -> None:
    """Reads the records, writes the page and its charts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("records", type=Path, nargs="+")
    parser.add_argument("--precision", type=Path, nargs="*", default=[], help="records of bench.precision")
    parser.add_argument("--page", type=Path, default=Path("docs/benchmarks.md"))
    options = parser.parse_args(arguments)
    records = [(path.name, json.loads(path.read_text())) for path in options.records]
    charts = [f"{options.page.stem}-{path.stem}.svg" for path in options.records]
    options.page.parent.mkdir(parents=True, exist_ok=True)
    for (_, record), name in zip(records, charts, strict=True):
        (options.page.parent / name).write_text(chart(record))
    masks = precision([json.loads(path.read_text()) for path in options.precision])
    options.page.write_text(page(records, charts) + (f"\n{masks}" if masks else ""))


if __name__ == "__main__":
    main()
