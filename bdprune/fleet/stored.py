"""Scans with a store: it takes what is there, and writes the results of each file as soon as they are complete."""

from __future__ import annotations

import errno
import hashlib
import importlib
import inspect
import itertools
import os
import stat
import sys
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

import bdprune
from bdprune.analysis import Case
from bdprune.data import CleanData
from bdprune.errors import BdpruneError, OutputError, StoreError
from bdprune.files import INDEX, description_path, kind_of_file, shard_names
from bdprune.fleet.executors.inline import Executor, Pause
from bdprune.hub import HubFile
from bdprune.methods import Detector
from bdprune.model import Model
from bdprune.pipeline import DataSource, Job, ModelSource, Outcome, Progress, parse_device
from bdprune.record import Evidence, Result, finite
from bdprune.store import EvidenceKey, ScanKey, Store

_LONGEST_LINE = 10_000
"""How many models wait at most for an earlier one; those in the store are read ahead, too."""


@dataclass(frozen=True)
class StoredOutcome:
    """An outcome, and whether it was in the store."""

    outcome: Outcome
    taken: bool


@dataclass(frozen=True)
class _Asked:
    """A model of the run: its place, its name, and its key; None for a model in memory, which is not stored."""

    number: int
    source: ModelSource
    name: str
    key: ScanKey | None


class StoredScans:
    """The scans of one job, with a store. The job then takes evidence from the store.

    Args:
        store: where results and evidence are kept.
        job: the settings, complete.
        data: the clean data.
    """

    def __init__(self, store: Store, job: Job, data: DataSource) -> None:
        self._store, self._job = store, job
        self._source, self._state = data, _state_of(data)
        self._settings, self._data = scan_settings(job), data_digest(data)
        ids = Counter(one.id for one in job.detectors)
        self._detectors = {one.id: one for one in job.detectors if ids[one.id] == 1}
        self._recall = Recalled(store, _evidence_settings(job))
        job.recall = self._recall

    def outcomes(
        self, executor: Executor, models: Iterable[ModelSource], progress: Progress
    ) -> Iterator[StoredOutcome]:
        """The outcomes of all models, in order.

        Raises:
            StoreError: the store cannot be read or written.
        """
        asked = (self._asked(number, source) for number, source in enumerate(models))
        for one in asked:  # those at the start need no executor
            if not (found := self._whole(one)):
                yield from self._run(executor, itertools.chain([one], asked), progress)
                return
            yield from self._taken(found)

    def _run(self, executor: Executor, asked: Iterator[_Asked], progress: Progress) -> Iterator[StoredOutcome]:
        """Writes the results of each model when it is done, and yields them in the order of all models."""
        line = deque[_Asked]()  # in order: those that run, and those between them that are in the store
        running, waiting, done = dict[int, _Asked](), set[int](), dict[int, list[Outcome]]()

        def missing() -> Iterator[ModelSource | Pause]:
            places = itertools.count()
            for one in asked:
                while len(line) >= _LONGEST_LINE:
                    yield Pause.FULL
                line.append(one)
                if self._whole(one):
                    yield Pause.LOOKING  # a run of many such models must not delay those that run
                    continue
                running[next(places)] = one
                waiting.add(one.number)
                yield one.source

        for found in executor.run(missing(), self._job, progress):
            if found is None:
                yield from self._finished(line, waiting, done)
                continue
            place, outcome = found
            one = running[place]
            outcomes = done.setdefault(one.number, [])
            outcomes.append(outcome)
            if len(outcomes) == outcome.sets:
                try:
                    self._save(running.pop(place), outcomes)
                except (StoreError, OutputError):
                    yield from (StoredOutcome(one, False) for one in outcomes)  # it is not lost to the caller
                    raise
                waiting.remove(one.number)
                yield from self._finished(line, waiting, done)
        yield from self._finished(line, waiting, done)

    def _finished(
        self, line: deque[_Asked], waiting: Set[int], done: dict[int, list[Outcome]]
    ) -> Iterator[StoredOutcome]:
        """Takes the models before the first one that still runs out of ``line``, and yields their outcomes."""
        while line and line[0].number not in waiting:
            one = line.popleft()
            if one.number in done:
                yield from (StoredOutcome(outcome, False) for outcome in done.pop(one.number))
            else:
                found = self._found(one)  # again: results in a long line would fill the memory
                if not found:
                    what = f"The store {self._store.path} no longer has the result of {one.name}."
                    raise StoreError(what, "Another process may have replaced it. Run the same command again.")
                yield from self._taken(found)

    def _asked(self, number: int, source: ModelSource) -> _Asked:
        if isinstance(source, Model | nn.Module):
            return _Asked(number, source, "", None)
        name = str(source) if isinstance(source, HubFile) else os.fspath(source)
        key = ScanKey(file_digest(source), self._data or "", self._settings, bdprune.__version__)
        return _Asked(number, source, name, key)

    def _found(self, one: _Asked) -> tuple[Result, ...]:
        return () if one.key is None or self._data is None else self._store.find(one.key, one.name)

    def _whole(self, one: _Asked) -> tuple[Result, ...]:
        """The results of a model in the store; none if an attachment is missing."""
        found = self._found(one)
        return found if not self._job.keeps or self._contents(found) is not None else ()

    def _taken(self, found: Sequence[Result]) -> Iterator[StoredOutcome]:
        contents = self._contents(found) if self._job.keeps else None
        return (StoredOutcome(Outcome(result, contents or {}, len(found)), True) for result in found)

    def _contents(self, results: Sequence[Result]) -> dict[str, bytes] | None:
        return self._store.contents([seen for result in results for seen in result.detectors])

    def _save(self, one: _Asked, outcomes: Sequence[Outcome]) -> None:
        results = [outcome.result for outcome in outcomes]
        if one.key is None:
            return
        no_weights = any(found.error is not None and found.error.holds_no_weights for found in results)
        if no_weights and not self._store.knows(one.name):
            return  # a file of a folder that never was a model
        if self._state != _state_of(self._source):
            what = f"The clean data {self._source} changed during the scan, so the result of {one.name} is not stored."
            raise StoreError(what, "Run the same command again when the data is complete.")
        contents = {digest: content for outcome in outcomes for digest, content in outcome.attachments.items()}
        evidence = [pair for result in results for pair in self._evidence(result)]
        key = self._scanned(one.source, one.key, results)
        if key is not None:
            self._store.save(key, one.name, results, contents=contents, evidence=evidence)

    def _scanned(self, source: ModelSource, key: ScanKey, results: Sequence[Result]) -> ScanKey | None:
        """The key with the digests of what was scanned: the file may have changed since, a dataset has no other. None
        if nobody knows what was scanned.
        """
        model = _scanned_file(source, key.model, results)
        if model is None:
            return None
        images = [one.data.digest for one in results if one.data]
        return replace(key, model=model, data=key.data if self._data is not None else next(iter(images), ""))

    def _evidence(self, result: Result) -> Iterator[tuple[EvidenceKey, Evidence]]:
        """The evidence that scans with other detectors may take."""
        model, data = result.model, result.data
        if model is None or not model.digest or ":" in model.arch or self._job.budget.seconds is not None:
            return
        digest = data.digest if data is not None and data.sanity is not None and data.sanity.ok else ""
        for one in result.detectors:
            detector = self._detectors.get(one.detector)
            if detector is not None and not one.error:
                yield self._recall.key(model.digest, digest, detector), one


@dataclass(frozen=True)
class Recalled:
    """Takes the evidence of a detector from a store; it can be sent to another process.

    Args:
        store: where it is.
        settings: of the scan, that the evidence depends on.
    """

    store: Store
    settings: Mapping[str, Any]

    def __call__(self, case: Case, detector: Detector) -> tuple[Evidence, Mapping[str, bytes]] | None:
        """The evidence and the bytes of its attachments; None if there is none."""
        if not case.is_known or case.budget.seconds is not None:
            return None
        data = case.data.digest if case.data is not None else ""
        evidence = self.store.find_evidence(self.key(case.digest, data, detector))
        if evidence is None or (contents := self.store.contents([evidence])) is None:
            return None
        return evidence, contents

    def key(self, model: str, data: str, detector: Detector) -> EvidenceKey:
        """The key of the evidence of a detector."""
        return EvidenceKey(model, data, detector_settings(detector), self.settings, bdprune.__version__)


def scan_settings(job: Job) -> dict[str, Any]:
    """All settings that the results of a scan depend on, as JSON values."""
    options, normalization = job.options, job.options.normalization()
    images = {"per_class": options.per_class, "class_order": job.clean.class_order} if job.clean.source else {}
    found = {
        "arch": options.arch,
        "code": _code(options.arch),
        "num_classes": options.num_classes,
        "input_shape": options.input_shape,
        "normalize": asdict(normalization) if normalization else None,
        "seed": options.seed,
        "state_key": options.state_key,
        "skip_unknown": options.skip_unknown,
        **_evidence_settings(job),
        **images,
        "stops": job.stops,
        "beyond": list(job.beyond),
        "broken": sorted(job.broken),
        "calibration": _sha256(job.calibration.to_json().encode()) if job.calibration else None,
        "detectors": [detector_settings(one) for one in job.detectors],
    }
    plain: dict[str, Any] = finite(found)
    return plain


def _evidence_settings(job: Job) -> dict[str, Any]:
    device = parse_device(job.options.device).type
    # Another version of torch may compute other numbers.
    return {"budget": str(job.budget), "device": device, "attachments": job.keeps, "torch": str(torch.__version__)}


def detector_settings(detector: Detector) -> dict[str, Any]:
    """Id and settings of a detector, and of a plug-in also its class and the version of its package."""
    kind = type(detector)
    found = {"id": detector.id, "params": finite(detector.params)}
    if kind.__module__.startswith("bdprune."):
        return found
    package = sys.modules.get(kind.__module__.partition(".")[0])
    return found | {"class": f"{kind.__module__}.{kind.__qualname__} {getattr(package, '__version__', '')}".rstrip()}


def _code(arch: str | None) -> str | None:
    """The digest of the file of an architecture's callable; None for an architecture of bdprune."""
    if arch is None or ":" not in arch:
        return None
    try:
        source = inspect.getsourcefile(importlib.import_module(arch.partition(":")[0]))
        return _sha256(Path(source).read_bytes()) if source else ""
    except (ImportError, OSError, TypeError):
        return ""


def file_digest(source: str | os.PathLike[str]) -> str:
    """SHA-256 of a file, or of an index and its shards, as results record it; a file that cannot be read gets a digest
    of its name, so that its failure has a key.
    """
    try:
        path = Path(source)
        own = _of_file(path)
        description = description_path(path)
        if description.exists():  # of a compact network
            return _sha256(own + _of_file(description))
        if kind_of_file(path) != INDEX:
            return own.hex()
        names = dict.fromkeys(shard_names(path.read_bytes()).values())
        return _sha256(b"".join((own, *(_of_file(path.parent / name) for name in names))))
    except (OSError, ValueError, BdpruneError):
        return _unread(source)


def _scanned_file(source: ModelSource, asked: str, results: Sequence[Result]) -> str | None:
    """The digest of the file that was scanned; ``asked`` is its digest before the scan.

    A file that changed may have had any content, unless the results say which. Then there is no digest; a failed scan
    is noted under the name of the file.
    """
    assert isinstance(source, str | os.PathLike)
    read = next((one.artifact.sha256 for one in results if one.artifact and one.artifact.sha256), None)
    if read == asked:
        return asked
    if read is not None and not _is_described(source):
        return read
    if file_digest(source) == asked:
        return asked
    return _unread(source) if read is None else None


def _is_described(source: str | os.PathLike[str]) -> bool:
    """Whether the digest of the file also covers the description of a compact network."""
    return description_path(Path(source)).exists()


def _unread(source: str | os.PathLike[str]) -> str:
    name = str(source) if isinstance(source, HubFile) else source
    return f"unread:{_sha256(os.fsencode(name))}"


def data_digest(source: DataSource) -> str | None:
    """A digest of clean data that needs no decoding: of the content of a file, of names, sizes and times of the files
    of a folder; empty without data, None for a dataset.
    """
    if source is None or source == "none":
        return ""
    if isinstance(source, CleanData):
        more = (source.class_names, source.native_size, sorted(source.class_order.items()), source.notes)
        return _sha256(f"{source.digest} {more}".encode())
    if not isinstance(source, str | os.PathLike):
        return None
    try:
        return _of_folder(Path(source)) if os.path.isdir(source) else _of_file(Path(source)).hex()
    except OSError:
        return f"unread:{_sha256(os.fsencode(source))}"


def _state_of(source: DataSource) -> object:
    """What changes with a file or a folder of clean data, without reading it; None for other data."""
    if source is None or source == "none" or not isinstance(source, str | os.PathLike):
        return None
    try:
        if os.path.isdir(source):
            return _of_folder(Path(source))
        found = os.stat(source)
    except OSError:
        return None
    return found.st_size, found.st_mtime_ns, found.st_ino


def _of_folder(folder: Path) -> str:
    found, seen = [], set[tuple[int, int]]()
    for parent, folders, names in os.walk(folder, followlinks=True):
        place = os.stat(parent)
        if (place.st_dev, place.st_ino) in seen:  # by another link
            folders.clear()
            continue
        seen.add((place.st_dev, place.st_ino))
        for name in names:
            path = os.path.join(parent, name)
            facts = os.stat(path) if os.path.exists(path) else os.lstat(path)
            found.append((os.path.relpath(path, folder), facts.st_size, facts.st_mtime_ns))
    return _sha256(repr(sorted(found)).encode(errors="surrogateescape"))


def _of_file(path: Path) -> bytes:
    """The digest of a file.

    Raises:
        OSError: it cannot be read; a pipe or a device might not end.
    """
    with open(os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0)), "rb") as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise OSError(errno.EINVAL, "it is not a file")
        return hashlib.file_digest(file, "sha256").digest()


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
