"""Breaks fleet scans in many ways, goes on with them, and compares what they leave with a scan that was never broken.

    python bench/faults.py [--inline 120] [--processes 60] [--ray 20] [--flips 200] [--seed 0] [--models 20]

The models are copies of zoo/cifar10-w8 with changed weights. A scan runs data-free detectors with a store; one of them
attaches a tensor. Each part prints a row of a table:

- kills: ``kill -9`` after a random number of results was stored and a random part of the time of a model; the scan goes
  on until it is killed again or done. ``--inline`` scans in a forked process, ``--processes`` runs
  ``bdprune scan --executor processes --workers 2``, ``--ray`` runs ``--executor ray``.
- a full disk, a locked store, damaged stores, damaged attachments, models that change or vanish while they are
  scanned, and two scans of one list into one store.

It exits with 1 if anything was lost, doubled, left over or wrong.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from changed import changed_copies

from bdprune.analysis import Case
from bdprune.errors import StoreError
from bdprune.fleet import Scanner
from bdprune.methods import Detector
from bdprune.record import Evidence, Needs
from bdprune.store import Store, latest

FORK = multiprocessing.get_context("fork")
ROOT = Path(__file__).resolve().parents[1]
SOURCES = ("clean", "badnets", "blend", "wanet", "sig")
SAVING = FORK.RawValue("b", 0)
"""1 while a forked scan saves a result."""


@dataclass(frozen=True)
class Attaching(Detector):
    """Attaches a tensor of 150 KB that depends on the weights."""

    id: str = "bench.attaching"

    title = "a tensor"
    needs = Needs(images="none", minimum=0)

    def __call__(self, case: Case) -> Evidence:
        weights = next(case.model.network.parameters()).detach().flatten()
        tensor = weights.repeat(40_000 // len(weights) + 1)[:40_000].clone()
        return self.evidence(float(weights.abs().mean()), 9.0, attachments=(case.attach("weights", {"x": tensor}),))


@dataclass
class Part:
    """What a part did, and what went wrong."""

    name: str
    counts: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    start: float = field(default_factory=time.monotonic)

    def expect(self, is_right: bool, what: str) -> None:
        if not is_right:
            self.wrong.append(what)

    def row(self) -> str:
        figures = ", ".join(f"{name}: {count}" for name, count in self.counts.items())
        wrong = "; ".join(sorted(set(self.wrong))) or "nothing"
        return f"| {self.name} | {figures} | {wrong} | {time.monotonic() - self.start:.0f} s |"


@dataclass
class Kept:
    """All that a store holds, without times."""

    results: list[str]
    attachments: list[str]
    rows: dict[str, int]


@dataclass
class Fleet:
    """The models, and what a scan of them that nothing disturbs leaves; it makes its store after ``start`` seconds and
    ends after ``seconds``.
    """

    folder: Path
    models: list[Path]
    kept: Kept = field(default_factory=lambda: Kept([], [], {}))
    start: float = 0.0
    seconds: float = 0.0

    def fresh(self) -> Path:
        """The path of a new store."""
        return Path(tempfile.mkdtemp(dir=self.folder)) / "scans.db"


# --------------------------------------------------------------------------------------------------- scans and stores


def scan(models: Sequence[Path], db: Path, wait: float = 60.0) -> None:
    """Scans with a store, in this process. It notes in ``SAVING`` when a result is saved."""
    save = Store.save

    def noted(self: Store, *args: Any, **more: Any) -> None:
        SAVING.value = 1
        save(self, *args, **more)
        SAVING.value = 0

    Store.save = noted  # type: ignore[method-assign]
    try:
        with Store(db, wait=wait) as store, tempfile.TemporaryDirectory(dir=db.parent) as out:
            detectors = [*Scanner(detectors="lipschitz")._job.detectors, Attaching()]
            for _ in Scanner(detectors=detectors, stack=1, store=store, attachments=out).scan_many(models):
                pass
    finally:
        Store.save = save  # type: ignore[method-assign]


def forked(run: Callable[[], Any]) -> Any:
    """The value of ``run`` in a forked process; an exception becomes its class and text."""
    ours, theirs = FORK.Pipe()

    def child() -> None:
        try:
            theirs.send(run())
        except Exception as error:
            theirs.send((type(error).__mro__[1].__name__, type(error).__name__, str(error)))

    process = FORK.Process(target=child)
    process.start()
    theirs.close()
    try:
        return ours.recv()
    except EOFError:
        return ("died",)
    finally:
        process.join()


def kept(db: Path) -> Kept:
    """What a store holds; it reads every row."""
    with Store(db, writes=False) as store:
        results = [without_times(one.to_json()) for _, scan in latest([store]) for one in scan.results]
    with closing(sqlite3.connect(db)) as raw:
        tables = ("scans", "results", "sources", "evidence")
        rows = {one: raw.execute(f"SELECT count(*) FROM {one}").fetchone()[0] for one in tables}
    folder = db.with_name(f"{db.name}.attachments")
    return Kept(sorted(results), sorted(os.listdir(folder)) if folder.exists() else [], rows)


def without_times(text: str) -> str:
    one = json.loads(text)
    one |= {"seconds": 0, "started": ""}
    for seen in one["detectors"]:
        seen["seconds"] = 0
    return json.dumps(one, sort_keys=True)


def check_done(part: Part, fleet: Fleet, db: Path) -> None:
    """Compares a store after its scan is done with the one that nothing disturbed."""
    found, whole = kept(db), fleet.kept
    part.expect(not set(whole.results) - set(found.results), "results are lost or differ")
    part.expect(not Counter(found.results) - Counter(whole.results), "results are doubled or differ")
    part.expect(found.rows == whole.rows, "tables have more or fewer rows")
    part.expect(found.attachments == whole.attachments, "attachments are left over or lost")
    folder = db.with_name(f"{db.name}.attachments")
    digests = [hashlib.sha256((folder / one).read_bytes()).hexdigest() for one in found.attachments]
    part.expect(digests == found.attachments, "an attachment is damaged")
    files = {db.name, folder.name} if found.attachments else {db.name}
    left = {one.name for one in db.parent.iterdir() if not one.name.startswith("tmp")}
    part.expect(left == files, f"files are left over: {sorted(left - files)}")
    part.counts["scans that were done in the end"] += 1


def check_broken(part: Part, fleet: Fleet, db: Path) -> None:
    """Checks a store whose scan was broken off: it is sound, and all that it holds is right."""
    if not db.exists() or not db.stat().st_size:
        return
    with closing(sqlite3.connect(db)) as raw:
        part.expect(raw.execute("PRAGMA integrity_check").fetchone() == ("ok",), "integrity_check fails")
        if raw.execute("SELECT count(*) FROM sqlite_master").fetchone() == (0,):
            return
    part.expect(not set(kept(db).results) - set(fleet.kept.results), "a broken scan leaves a wrong result")


# -------------------------------------------------------------------------------------------------------------- kills


class Forked:
    """A scan in a forked process."""

    def __init__(self, fleet: Fleet, db: Path) -> None:
        SAVING.value = 0
        self._process = FORK.Process(target=scan, args=(fleet.models, db))
        self._process.start()

    def ends(self, seconds: float | None) -> bool:
        self._process.join(seconds)
        return self._process.exitcode is not None

    def kill(self) -> None:
        self._process.kill()
        self._process.join()

    @property
    def is_right(self) -> bool:
        return self._process.exitcode == 0


class Program:
    """A scan by the command line. After a kill, its processes must end by themselves; agents of Ray take a minute."""

    def __init__(self, fleet: Fleet, db: Path, options: Sequence[str]) -> None:
        command = [sys.executable, "-m", "bdprune", "scan", str(fleet.models[0].parent), "--store", str(db), "-q"]
        self._process = subprocess.Popen(
            [*command, "--detectors", "lipschitz", "--exit-zero", *options],
            env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
            start_new_session=True,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        self.orphans = 0

    def ends(self, seconds: float | None) -> bool:
        try:
            self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            return False
        return True

    def kill(self, patience: float = 180.0) -> None:
        self._process.kill()
        self._process.wait()
        deadline = time.monotonic() + patience
        while _in_session(self._process.pid) and time.monotonic() < deadline:
            time.sleep(0.05)
        self.orphans = _in_session(self._process.pid)
        if self.orphans:
            os.killpg(self._process.pid, signal.SIGKILL)

    @property
    def is_right(self) -> bool:
        return self._process.returncode == 0


def _in_session(session: int) -> int:
    """How many processes of a session live."""
    found = 0
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, _, number = path.read_text().rpartition(") ")[2].split()[:4]
        except OSError:
            continue
        found += number == str(session) and state != "Z"
    return found


def ends_before_kill(process: Forked | Program, fleet: Fleet, db: Path, chance: random.Random) -> bool:
    """Waits for the moment of a kill; whether the scan ended before."""
    begun = stored(db)
    more = chance.randrange(max(1, len(fleet.models) - begun))
    while stored(db) < begun + more:
        if process.ends(0.002):
            return True
    per_model = (fleet.seconds - fleet.start) / len(fleet.models)
    return process.ends(chance.uniform(0, per_model if more else 2 * (fleet.start + per_model)))


def stored(db: Path) -> int:
    """How many scans a store holds."""
    try:
        with closing(sqlite3.connect(f"file:{db}?mode=ro", uri=True)) as raw:
            return int(raw.execute("SELECT count(*) FROM scans").fetchone()[0])
    except sqlite3.OperationalError:  # it is made at this moment
        return 0


def kills(name: str, fleet: Fleet, count: int, start: Callable[[Path], Any], chance: random.Random) -> Part:
    """Kills scans until ``count`` were killed."""
    part = Part(name)
    while part.counts["kills"] < count:
        db = fleet.fresh()
        while True:
            process = start(db)
            if part.counts["kills"] == count or ends_before_kill(process, fleet, db, chance):
                process.ends(None)
                part.expect(process.is_right, "a scan failed")
                break
            process.kill()
            part.counts["kills"] += 1
            if isinstance(process, Forked):
                part.counts["kills while a result was saved"] += SAVING.value
            part.expect(not getattr(process, "orphans", 0), "processes live on")
            check_broken(part, fleet, db)
        check_done(part, fleet, db)
        shutil.rmtree(db.parent)
    return part


# ------------------------------------------------------------------------------------------------------- other faults


def full_disk(fleet: Fleet, sizes: int) -> Part:
    """Scans on disks that are too small, which then grow."""
    part = Part("full disk")
    needed = sum(path.stat().st_size for path in _stored(fleet)) + (256 << 10)
    for step in range(1, sizes + 1):
        folder = fleet.fresh().parent
        with small_disk(folder, needed * step // (sizes + 1), part) as (limited, grow):
            db = folder / "scans.db"
            ended = forked(lambda db=db, limited=limited: limited(lambda: scan(fleet.models, db)))
            clear = ended is not None and ended[1] in ("StoreError", "OutputError")
            part.counts["scans that ended with a clear error"] += clear
            part.expect(clear, f"a full disk gives {ended}")
            check_broken(part, fleet, db)
            grow()
            part.expect(forked(lambda db=db: scan(fleet.models, db)) is None, "a scan failed")
            check_done(part, fleet, db)
        shutil.rmtree(folder)
    return part


def _stored(fleet: Fleet) -> list[Path]:
    """The files of a store that is done."""
    db = fleet.folder / "whole" / "scans.db"
    return [db, *(db.parent / "scans.db.attachments").iterdir()]


Limited = Callable[[Callable[[], Any]], Any]


@contextmanager
def small_disk(folder: Path, size: int, part: Part) -> Iterator[tuple[Limited, Callable[[], Any]]]:
    """A disk of ``size`` bytes at ``folder``: how to run on it, and how to make it large. Without the right to mount
    one, files have a limit instead.
    """
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "none", str(folder)], capture_output=True)
    if mounted.returncode:
        part.counts["limits on the size of files instead of a small disk"] += 1
        yield lambda run: _with_small_files(size // 4, run), lambda: None
        return
    try:
        yield lambda run: run(), lambda: subprocess.run(["mount", "-o", "remount,size=1G", str(folder)], check=True)
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def _with_small_files(size: int, run: Callable[[], Any]) -> Any:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
    return run()


_HOLD = "import sqlite3, sys; c = sqlite3.connect(sys.argv[1], isolation_level=None); c.execute('BEGIN IMMEDIATE')"
"""A program of its own: a forked process would take the locks of its parent for its own."""


def locked(fleet: Fleet) -> Part:
    """Another process writes, for less and for more time than a scan waits."""
    part = Part("locked store")
    for held, wait in ((1.0, 30.0), (None, 1.0)):
        db = fleet.fresh()
        Store(db).close()
        code = f"{_HOLD}; import time; print(flush=True); time.sleep(600)"
        other = subprocess.Popen([sys.executable, "-c", code, db], stdout=subprocess.PIPE)
        assert other.stdout is not None
        other.stdout.readline()
        start = time.monotonic()
        if held:
            waiting = Forked(fleet, db)
            time.sleep(held)
            other.kill()
            other.communicate()
            waiting.ends(None)
            part.counts["scans that waited"] += 1
            part.expect(waiting.is_right and time.monotonic() - start >= held, "a scan does not wait for a lock")
        else:
            ended = forked(lambda db=db, wait=wait: scan(fleet.models, db, wait))
            other.kill()
            other.communicate()
            part.counts["scans that ended with a clear error"] += 1
            part.expect(ended is not None and "locked by another process" in ended[2], f"a long lock gives {ended}")
            part.expect(forked(lambda db=db: scan(fleet.models, db)) is None, "a scan failed")
        check_done(part, fleet, db)
    return part


def damaged_stores(fleet: Fleet, count: int, seed: int) -> Part:
    """Flips bytes of a store, or cuts it off; then reads it, and goes on with the scan."""
    part, few = Part("damaged store"), fleet.models[:3]
    for outcomes in forked(lambda: [_damaged(fleet, few, random.Random(seed * 1000 + one)) for one in range(count)]):
        for use, outcome in zip(("exports", "scans that went on"), outcomes, strict=True):
            part.counts[f"{use} {outcome if outcome in _FINE else 'wrong'}"] += 1
            part.expect(outcome in _FINE, outcome)
    return part


_FINE = ("with the right results", "with a clear error")


def _damaged(fleet: Fleet, models: Sequence[Path], chance: random.Random) -> list[str]:
    """What became of a store with damage: of an export, and of a scan of some models that went on with it."""
    db = fleet.fresh()
    content = bytearray((fleet.folder / "whole" / "scans.db").read_bytes())
    if chance.random() < 0.2:
        del content[chance.randrange(len(content)) :]
    else:
        for _ in range(chance.choice((1, 1, 2, 8, 64))):
            content[chance.randrange(len(content))] ^= chance.randrange(1, 256)
    whole = db.parent / "scans.db.attachments"
    os.symlink(fleet.folder / "whole" / "scans.db.attachments", whole)
    outcomes, names = [], {str(one) for one in models}
    expected = [one for one in fleet.kept.results if json.loads(one)["artifact"]["path"] in names]
    for use in (lambda: kept(db).results, lambda: _again(models, db)):
        db.write_bytes(content)
        try:
            found = use()
            outcomes.append(_FINE[0] if found in (fleet.kept.results, expected) else "a wrong result")
        except StoreError:
            outcomes.append(_FINE[1])
        except Exception as error:
            outcomes.append(f"the unclear error {type(error).__name__}: {error}")
    shutil.rmtree(db.parent)
    return outcomes


def _again(models: Sequence[Path], db: Path) -> list[str]:
    with Store(db) as store, tempfile.TemporaryDirectory(dir=db.parent) as out:
        detectors = [*Scanner(detectors="lipschitz")._job.detectors, Attaching()]
        scanner = Scanner(detectors=detectors, stack=1, store=store, attachments=out)
        found = [json.loads(one.to_json()) for one in scanner.scan_many(models)]
    for one in found:
        for seen in one["detectors"]:
            for attached in seen["attachments"]:
                attached["file"] = ""
    return sorted(without_times(json.dumps(one)) for one in found)


def damaged_attachments(fleet: Fleet, chance: random.Random) -> Part:
    """Flips a byte in every attachment, and scans again."""
    part, db = Part("damaged attachments"), fleet.fresh()
    shutil.copytree(fleet.folder / "whole", db.parent, dirs_exist_ok=True)
    for path in (db.parent / "scans.db.attachments").iterdir():
        content = bytearray(path.read_bytes())
        content[chance.randrange(len(content))] ^= 1
        path.write_bytes(content)
        part.counts["attachments damaged, size unchanged"] += 1
    part.expect(forked(lambda: scan(fleet.models, db)) is None, "a scan failed")
    check_done(part, fleet, db)
    return part


def changing_models(fleet: Fleet, rounds: int, chance: random.Random) -> Part:
    """Another process replaces, overwrites and removes the models during a scan."""
    part = Part("models that change")
    known = {_sha256(path): json.loads(one)["model"]["digest"] for path, one in _by_path(fleet)}
    for _ in range(rounds):
        db = fleet.fresh()
        folder = db.parent / "tmp-models"
        shutil.copytree(fleet.models[0].parent, folder)
        models = sorted(folder.iterdir())
        other = FORK.Process(target=_meddle, args=(models, fleet.models, chance.random()))
        other.start()
        ended = forked(lambda models=models, db=db: scan(models, db))
        other.kill()
        other.join()
        part.expect(ended is None, f"a scan gives {ended}")
        with Store(db, writes=False) as store:
            for one in store.scans():
                for result in one.results:
                    _check_digest(part, one.model, result, known)
        shutil.rmtree(db.parent)
    return part


def _by_path(fleet: Fleet) -> Iterable[tuple[Path, str]]:
    return ((Path(json.loads(one)["artifact"]["path"]), one) for one in fleet.kept.results)


def _meddle(models: Sequence[Path], originals: Sequence[Path], seed: float) -> None:
    chance = random.Random(seed)
    while True:
        path, content = chance.choice(models), chance.choice(originals).read_bytes()
        way = chance.randrange(3)
        if way == 0:
            path.unlink(missing_ok=True)
        elif way == 1:  # in place, so that a reader sees parts of both
            with path.open("r+b" if path.exists() else "wb") as file:
                for start in range(0, len(content), 50_000):
                    file.write(content[start : start + 50_000])
                    file.flush()
        else:
            new = path.with_suffix(".new")
            new.write_bytes(content)
            new.replace(path)
        time.sleep(chance.random() / 200)


def _check_digest(part: Part, digest: str, result: Any, known: dict[str, str]) -> None:
    """A result is stored under the digest of the bytes that it came from."""
    if result.model is None:
        part.counts["failed scans"] += 1
        part.expect(digest not in known, "a failure is stored under the digest of a sound file")
    elif digest in known:
        part.counts["results of a whole file"] += 1
        part.expect(known[digest] == result.model.digest, "a result has the digest of another file")
    else:
        part.counts["results of a file that was half overwritten"] += 1
        part.expect(digest == result.artifact.sha256, "a result has a digest of unknown bytes")


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def two_at_once(fleet: Fleet, rounds: int) -> Part:
    """Two processes scan the same list into one store."""
    part = Part("two scans at once")
    for _ in range(rounds):
        db = fleet.fresh()
        both = [Forked(fleet, db) for _ in range(2)]
        for one in both:
            one.ends(None)
            part.expect(one.is_right, "a scan failed")
        check_done(part, fleet, db)
        shutil.rmtree(db.parent)
    return part


# ------------------------------------------------------------------------------------------------------------ the run


def undisturbed(fleet: Fleet, start: Callable[[Path], Any], name: str) -> Fleet:
    """The fleet with what a scan leaves that nothing disturbs, and its time."""
    db = fleet.folder / name / "scans.db"
    db.parent.mkdir()
    begin = time.monotonic()
    process = start(db)
    while not db.exists() and not process.ends(0.01):
        pass
    made = time.monotonic() - begin
    process.ends(None)
    if not process.is_right:
        sys.exit(f"The {name} scan failed. Run it by hand to see why.")
    return Fleet(fleet.folder, fleet.models, kept(db), made, time.monotonic() - begin)


def parts(fleet: Fleet, chosen: argparse.Namespace) -> Iterator[Part]:
    chance = random.Random(chosen.seed)
    fleet = undisturbed(fleet, lambda db: Forked(fleet, db), "whole")
    if chosen.inline:
        yield kills("kill -9, inline", fleet, chosen.inline, lambda db: Forked(fleet, db), chance)
    options = {"processes": ["--executor", "processes", "--workers", "2"], "ray": ["--executor", "ray"]}
    for kind, more in options.items():
        if count := getattr(chosen, kind):
            own = undisturbed(fleet, lambda db, more=more: Program(fleet, db, more), kind)
            yield kills(f"kill -9, {kind}", own, count, lambda db, more=more: Program(fleet, db, more), chance)
    yield full_disk(fleet, chosen.rounds)
    yield locked(fleet)
    yield damaged_stores(fleet, chosen.flips, chosen.seed)
    yield damaged_attachments(fleet, chance)
    yield changing_models(fleet, chosen.rounds, chance)
    yield two_at_once(fleet, chosen.rounds)


def main() -> int:
    """Prints a row for each part."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, count in (("inline", 120), ("processes", 60), ("ray", 20), ("flips", 200), ("rounds", 5)):
        parser.add_argument(f"--{name}", type=int, default=count)
    parser.add_argument("--models", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    chosen = parser.parse_args()
    torch.set_num_threads(1)  # a forked process has no threads of its parent
    wrong = 0
    with tempfile.TemporaryDirectory() as folder:
        fleet = Fleet(Path(folder), changed_copies(Path(folder) / "models", chosen.models, SOURCES, chosen.seed))
        scan(fleet.models[:1], fleet.fresh())  # imports all that forked scans need
        print("| part | what happened | what was wrong | time |\n|---|---|---|---|", flush=True)
        for part in parts(fleet, chosen):
            print(part.row(), flush=True)
            wrong += len(part.wrong)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
