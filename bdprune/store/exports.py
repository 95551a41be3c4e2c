"""Writes the results of stores to one file: JSON lines, or parquet."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from bdprune.errors import OptionError
from bdprune.files import replaced
from bdprune.record import Result
from bdprune.store.store import Kept, Store

Format = Literal["jsonl", "parquet"]
FORMATS: tuple[Format, ...] = ("jsonl", "parquet")
_ROWS = 256
"""Rows of a parquet file that are in memory at a time."""


def export(stores: Sequence[Store], form: Format, path: Path) -> int:
    """Writes the latest results of every model in ``stores`` to ``path``, atomically; see :func:`latest`.

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
    results = ((scan, result) for scan in latest(stores) for result in scan.results)
    write = _write_lines if form == "jsonl" else _write_parquet
    with replaced(path) as file:
        return write(results, file)


def latest(stores: Sequence[Store]) -> Iterator[Kept]:
    """The latest scan of every model, store by store.

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
                yield scan


def lines(results: Iterable[Result]) -> Iterator[str]:
    """Each result as a line of JSON."""
    return (f"{one.to_json(indent=None)}\n" for one in results)


def _write_lines(results: Iterable[tuple[Kept, Result]], file: Any) -> int:
    count = 0
    for line in lines(result for _, result in results):
        file.write(line.encode())
        count += 1
    return count


def _write_parquet(results: Iterator[tuple[Kept, Result]], file: Any) -> int:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError:
        raise OptionError(
            "An export to parquet needs pyarrow.", "Install it (pip install pyarrow), or use -f jsonl."
        ) from None
    schema, count = _schema(pa), 0
    with pq.ParquetWriter(file, schema) as writer:
        while batch := [_row(*one) for one in itertools.islice(results, _ROWS)]:
            writer.write_table(pa.Table.from_pylist(batch, schema))
            count += len(batch)
    return count


def _schema(pa: Any) -> Any:
    text, number, whole = pa.string(), pa.float64(), pa.int64()
    return pa.schema(
        {
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
        "name": _valid(result.name),
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


def _valid(text: str) -> str:
    return text.encode(errors="replace").decode()
