"""Writes the results and screens of stores to one file: JSON lines, or parquet."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from bdprune.errors import OptionError
from bdprune.files import replaced
from bdprune.record import Result, ScreenResult
from bdprune.store.screens import Screens
from bdprune.store.store import Kept, Store, plain_name

Format = Literal["jsonl", "parquet"]
_ROWS = 256
"""Rows of a parquet file that are in memory at a time."""


def export(stores: Sequence[Store], form: Format, path: Path) -> int:
    """Writes the latest results and screens of every model in ``stores`` to ``path``, atomically.

    See :func:`latest` and :func:`latest_screens`.

    Args:
        stores: such as those of the shards of one scan.
        form: ``jsonl``: one result a line, as ``scan --format jsonl`` writes it; ``parquet``: one row a result, with
            the main fields as columns and the whole result as JSON in ``document``.
        path: the file.

    Returns:
        The number of results.

    Raises:
        OptionError: parquet without pyarrow.
        StoreError: a store cannot be read.
        OutputError: the file cannot be written.
    """
    write = _write_lines if form == "jsonl" else _write_parquet
    with replaced(path) as file:
        return write(stores, file)


def latest(stores: Sequence[Store]) -> Iterator[tuple[Store, Kept]]:
    """The latest scan of every model with its store, store by store.

    A model with the same name in several stores comes from the store whose scan of it started last; of several that
    started in the same second, from the last of these stores.

    Raises:
        StoreError: a store cannot be read.
    """
    counts = Counter(name for store in stores for name in store.names())
    shared = {name for name, count in counts.items() if count > 1}
    winners: dict[str, tuple[str, int]] = {}
    for number, store in enumerate(stores):
        for name in shared.intersection(store.names()):
            scan = next(store.scans(name))
            winners[name] = max(winners.get(name, ("", 0)), (max(one.started for one in scan.results), number))
    for number, store in enumerate(stores):
        for scan in store.scans():
            if scan.name not in winners or winners[scan.name][1] == number:
                yield store, scan


def latest_screens(stores: Sequence[Store]) -> Iterator[ScreenResult]:
    """The latest screen of every model, store by store; of several stores, that which started last.

    Raises:
        StoreError: a store cannot be read.
    """
    winners: dict[str, tuple[str, int]] = {}
    if len(stores) > 1:
        for number, store in enumerate(stores):
            for one in Screens(store).all():
                winners[one.name] = max(winners.get(one.name, ("", 0)), (one.started, number))
    for number, store in enumerate(stores):
        yield from (one for one in Screens(store).all() if winners.get(one.name, ("", number))[1] == number)


def lines(stores: Sequence[Store]) -> Iterator[str]:
    """Each of the latest results, and then of the latest screens, as a line of JSON.

    Raises:
        StoreError: a store cannot be read.
    """
    results = (result for _, scan in latest(stores) for result in scan.results)
    return (f"{one.to_json(indent=None)}\n" for one in itertools.chain(results, latest_screens(stores)))


def _write_lines(stores: Sequence[Store], file: Any) -> int:
    count = 0
    for line in lines(stores):
        file.write(line.encode())
        count += 1
    return count


def _write_parquet(stores: Sequence[Store], file: Any) -> int:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError:
        raise OptionError(
            "An export to parquet needs pyarrow.", "Install it (pip install pyarrow), or use -f jsonl."
        ) from None
    schema, count = _schema(pa), 0
    scans = (_row(scan, result) for _, scan in latest(stores) for result in scan.results)
    rows = itertools.chain(scans, map(_screen_row, latest_screens(stores)))
    with pq.ParquetWriter(file, schema) as writer:
        while batch := list(itertools.islice(rows, _ROWS)):
            writer.write_table(pa.Table.from_pylist(batch, schema))
            count += len(batch)
    return count


def _schema(pa: Any) -> Any:
    text, number, whole = pa.string(), pa.float64(), pa.int64()
    return pa.schema(
        {
            "kind": text,
            "name": text,
            "verdict": text,
            "risk": number,
            "target_label": whole,
            "error": text,
            "arch": text,
            "file_sha256": text,
            "weights_sha256": text,
            "data": text,
            "images": whole,
            "clean_accuracy": number,
            "seed": pa.uint64(),
            "budget": text,
            "version": text,
            "started": text,
            "seconds": number,
            "scores": pa.map_(text, number),
            "settings": text,
            "document": text,
        }
    )


def _row(scan: Kept, result: Result) -> dict[str, Any]:
    model, data = result.model, result.data
    return {
        "kind": "scan",
        "name": plain_name(result.name),
        "verdict": result.verdict,
        "risk": result.risk,
        "target_label": result.target_label,
        "error": result.error.message if result.error else None,
        "arch": model.arch if model else None,
        "file_sha256": scan.model,
        "weights_sha256": model.digest if model else None,
        "data": scan.data,
        "images": data.count if data else None,
        "clean_accuracy": data.clean_accuracy if data else None,
        "seed": result.env.seed,
        "budget": result.budget,
        "version": scan.version,
        "started": result.started,
        "seconds": result.seconds,
        "scores": [(one.detector, one.score) for one in result.detectors],
        "settings": json.dumps(scan.settings, sort_keys=True),
        "document": result.to_json(indent=None),
    }


def _screen_row(result: ScreenResult) -> dict[str, Any]:
    """The row of a screen: its outcome as the verdict, and its largest z-score; other columns stay empty."""
    return {
        "kind": "screen",
        "name": plain_name(result.name),
        "verdict": result.outcome,
        "file_sha256": result.artifact.sha256,
        "version": result.version,
        "started": result.started,
        "seconds": result.seconds,
        "scores": [("screen", result.peak.max_z if result.peak else None)],
        "document": result.to_json(indent=None),
    }
