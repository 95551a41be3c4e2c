"""Scans the networks of a zoo with every detector of a budget, and keeps the scores for a calibration."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from bdprune.data import RawImages, read_dataset
from bdprune.errors import DataError
from bdprune.files import check_writable, drop_half_line
from bdprune.fleet.scans import scan
from bdprune.pipeline import short_id
from bdprune.record import LEVELS, Evidence, Level, Record, Result, Verdict
from bdprune.registry import chosen_detectors
from bdprune.zoo import Entry, Manifest, Storage, clean_images, weights_path


class ReferenceScan(Record, frozen=True):
    """The scores of one network.

    Attributes:
        network: its name in the manifest.
        sha256: of its file, hex digits.
        budget: of the scan.
        seed: of the scan.
        arch: its architecture.
        verdict: on all evidence, by the version that made the scan.
        accuracy: on the clean images, in [0, 1]; None if the scan failed.
        evidence: of every detector, in the order of a scan, without triggers, pictures and details.
        reason: why the scan says nothing about the network, in a sentence; empty if it does.
        seconds: wall time of the scan.
    """

    network: str
    sha256: str
    budget: Level
    seed: int
    arch: str
    verdict: Verdict
    accuracy: float | None
    evidence: tuple[Evidence, ...] = ()
    reason: str = ""
    seconds: float = 0.0


@dataclass(frozen=True)
class ReferenceZoo:
    """The networks of a manifest with their files and images.

    Args:
        manifest: the zoo.
        data: folder of the data sets.
        models: folder of the models; the manifest's folder by default.
    """

    manifest: Manifest
    data: Path
    models: Path | None = None

    def made(self) -> list[Entry]:
        """The networks whose weights and measurements exist, ordered by data set, so that each set is read once."""
        storage = Storage(self.manifest, self.models)
        found = [entry for entry in self.manifest.models if storage.made(entry) and storage.truth(entry)]
        return sorted(found, key=lambda entry: entry.dataset)

    def path(self, entry: Entry) -> Path:
        """The weights of a network that is made."""
        folder = Storage(self.manifest, self.models).made(entry)
        assert folder is not None
        return weights_path(folder, entry.name)


def level_detectors(level: Level) -> list[str]:
    """Names of the detectors that a scan with this budget runs, in its order."""
    reached = LEVELS[: LEVELS.index(level) + 1]
    return [short_id(one) for one in chosen_detectors(None, {}) if one.level in reached]


def scan_references(
    zoo: ReferenceZoo,
    entries: Sequence[Entry],
    rows: Path | None,
    *,
    budget: Level = "default",
    seed: int = 0,
    progress: Callable[[Entry, str], None] = lambda entry, stage: None,
) -> Iterator[ReferenceScan]:
    """Yields the scan of each network, by every detector even if the verdict is sure before.

    Args:
        zoo: where the networks and images are.
        entries: the networks, as ``zoo.made`` gives them.
        rows: JSON lines file. A network that is in it with the same file, budget and seed is not scanned again. Each
            new scan is appended at once, so a killed run resumes, and several runs may share the file.
        budget: how far the scans go.
        seed: of the scans and of the draw of the clean images.
        progress: called with the network and the stage of its scan.

    Raises:
        DataError: the images or the rows cannot be read.
        OutputError: the rows cannot be written.
    """
    if rows is not None:
        check_writable(rows)
        drop_half_line(rows)
    train = functools.lru_cache(maxsize=1)(functools.partial(read_dataset, zoo.data, part="train"))
    for entry in entries:
        digest = hashlib.sha256(zoo.path(entry).read_bytes()).hexdigest()
        key = (entry.name, digest, budget, seed)
        found = next((one for one in read_rows(rows) if _key(one) == key), None)
        if found is None:
            found = _scanned(entry, zoo.path(entry), digest, train(entry.dataset), budget, seed, progress)
            _append(rows, found)
        yield found


def read_rows(path: Path | None) -> list[ReferenceScan]:
    """The scans in a JSON lines file; none if it does not exist.

    Raises:
        DataError: a line is not such a scan.
    """
    if path is None or not path.exists():
        return []
    try:
        return [ReferenceScan.from_json(line) for line in path.read_bytes().splitlines() if line.strip()]
    except (OSError, DataError) as error:
        what = f"Cannot read the scans in {path}: {error}"
        raise DataError(what, "Give another file for the rows, or remove its damaged lines.") from None


def _key(row: ReferenceScan) -> tuple[str, str, Level, int]:
    return row.network, row.sha256, row.budget, row.seed


def _append(path: Path | None, row: ReferenceScan) -> None:
    if path is not None:
        with path.open("a", encoding="utf-8") as file:  # one write, so that the lines of several runs do not mix
            file.write(row.to_json(indent=None) + "\n")


def _scanned(
    entry: Entry,
    path: Path,
    digest: str,
    train: RawImages,
    budget: Level,
    seed: int,
    progress: Callable[[Entry, str], None],
) -> ReferenceScan:
    result = scan(
        path,
        clean_images(entry, train, seed=seed),
        detectors=level_detectors(budget),
        budget=budget,
        seed=seed,
        progress=functools.partial(progress, entry),
    )
    return ReferenceScan(
        network=entry.name,
        sha256=digest,
        budget=budget,
        seed=seed,
        arch=result.model.arch if result.model else entry.arch,
        verdict=result.verdict,
        accuracy=result.data.clean_accuracy if result.data else None,
        evidence=tuple(_short(one) for one in result.detectors),
        reason=_reason(result),
        seconds=result.seconds,
    )


def _short(one: Evidence) -> Evidence:
    """The evidence without what a calibration does not need."""
    return msgspec.structs.replace(one, triggers=(), attachments=(), details={}, params={}, remarks=(), limits=())


def _reason(result: Result) -> str:
    """Why the evidence says nothing about the network; empty if it does."""
    if result.error is not None:
        return result.error.message
    sanity = result.data.sanity if result.data else None
    return "" if sanity is None or sanity.ok else sanity.message
