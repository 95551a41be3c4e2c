"""The measurements of all records: by machine, the newest of each case, and those in which ours is slower."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from bench.speed.targets import Record, Row, best, ratio

_FEATURES = {"avx2": "AVX2", "avx512": "AVX-512", "default": "no vector extensions"}
_TF32 = ", TF32 in every variant"


@dataclass(frozen=True)
class Measured:
    """One benchmark of a record that has a row of ours.

    Attributes:
        source: name of the record's file.
        record: the whole record.
        threads: threads of the run.
        benchmark: the benchmark with its rows.
        ours: the row of ours that counts.
    """

    source: str
    record: Record
    threads: int
    benchmark: Record
    ours: Row

    @property
    def name(self) -> str:
        return str(self.benchmark["name"])

    @property
    def case(self) -> str:
        return str(self.benchmark["case"])

    @property
    def group(self) -> str:
        """Name of the table row: the benchmark, and TF32 where it is on."""
        return f"{self.name}, TF32" if self.case.endswith(_TF32) else self.name

    @property
    def label(self) -> str:
        """The case without what the group says."""
        return self.case.removesuffix(_TF32)

    @property
    def torch(self) -> Row | None:
        """The fastest plain or compiled PyTorch variant."""
        return _fastest(self.benchmark, ("eager", "compile"))

    @property
    def author(self) -> Row | None:
        return best(self.benchmark, "author")

    @property
    def fastest_other(self) -> Row:
        """The fastest variant of others, alternative methods included."""
        found = _fastest(self.benchmark, ("author", "eager", "compile", "alternative"))
        return found or self.ours

    @property
    def over_lower_bound(self) -> float | None:
        """Our time divided by the lower bound."""
        bound = self.benchmark["lower_bound_seconds"]
        return self.ours["seconds"] / bound if bound else None


def _fastest(benchmark: Record, kinds: Iterable[str]) -> Row | None:
    rows = [row for kind in kinds if (row := best(benchmark, kind)) is not None]
    return min(rows, key=lambda row: float(row["seconds"]), default=None)


def measurements(source: str, record: Record) -> Iterator[Measured]:
    """All benchmarks of a record with a row of ours that did not fail."""
    for run in record["runs"]:
        for benchmark in run["benchmarks"]:
            ours = best(benchmark, "ours")
            if ours is not None:
                yield Measured(source, record, run["threads"], benchmark, ours)


def slower(source: str, record: Record) -> list[Measured]:
    """The measurements in which another variant or method is faster than ours."""
    return [one for one in measurements(source, record) if (ratio(one.fastest_other, one.ours) or 1.0) < 1]


def machine_name(record: Record) -> str:
    """The GPU, or the CPU with its vector extension: heading of a section."""
    machine = record["machine"]
    if machine["device"] != "cpu":
        return str(machine["hardware"])
    features = machine["build"]["cpu_features"]
    return f"{machine['hardware']} with {_FEATURES.get(features, features)}"


def by_machine(records: Mapping[str, Record]) -> dict[str, list[Measured]]:
    """All measurements of each machine; the machine with most comes first."""
    found: dict[str, list[Measured]] = {}
    for source, record in records.items():
        found.setdefault(machine_name(record), []).extend(measurements(source, record))
    known = {name: measured for name, measured in found.items() if measured}
    return dict(sorted(known.items(), key=lambda item: (-len(item[1]), item[0])))


def newest(measured: Iterable[Measured]) -> list[Measured]:
    """The newest measurement of each case and number of threads, in the order of the first record."""
    found: dict[tuple[str, str, int], Measured] = {}
    for one in measured:
        key = one.name, one.case, one.threads
        if key not in found or one.record["started"] > found[key].record["started"]:
            found[key] = one
    return sorted(found.values(), key=lambda one: _ORDER.get(one.name.split(",")[0].split(":")[0], len(_ORDER)))


_ORDER = {
    name: index
    for index, name in enumerate(
        [
            "Spectral norms",
            "Channel moments",
            "Masked convolution",
            "3x3 convolution",
            "Stamped images",
            "Trigger inversion width 8",
            "Trigger inversion width 32",
            "File to data-free scores",
            "Start of the command line",
            "Suspiciousness score",
            "RNP width 32",
            "RNP width 64",
            "Stack of models",
        ]
    )
}
