"""Scans with a store: what is taken, what runs, and that both give the same results."""

from __future__ import annotations

import os
import shutil
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

import bdprune
from bdprune.analysis import Case
from bdprune.data import load_clean
from bdprune.errors import DataError, OptionError, StoreError
from bdprune.fleet.executors.stack import StackOptions
from bdprune.fleet.scans import Scanner, scan, scan_many
from bdprune.fleet.stored import _scanned_file, data_digest, file_digest
from bdprune.methods import Detector
from bdprune.model import build
from bdprune.pipeline import load
from bdprune.record import Evidence, Needs, Result
from bdprune.store import Store

ZOO = Path(__file__).parents[2] / "zoo"
IMAGES = ZOO / "demo" / "defence.npz"
CALLS: list[str] = []


@dataclass(frozen=True)
class Counted(Detector):
    """Counts its calls, attaches a tensor, and fails if it is told so."""

    score: float = 0.1
    id: str = "x.counted"
    fails: bool = False

    title = "a count of calls"
    needs = Needs(images="none", minimum=0)

    def __call__(self, case: Case) -> Evidence:
        CALLS.append(self.id)
        if self.fails:
            raise DataError("It failed.")
        attached = (case.attach("weights", {"x": torch.full((2,), self.score)}),)
        return self.evidence(self.score, 0.5, attachments=attached)


@pytest.fixture(autouse=True)
def no_calls() -> None:
    CALLS.clear()


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three checkpoints of a known architecture with different weights."""
    folder = tmp_path_factory.mktemp("models")
    for seed, name in enumerate("abc"):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            torch.save(build("resnet18_cifar", 3, width=4).state_dict(), folder / f"{name}.pth")
    return [folder / f"{name}.pth" for name in "abc"]


@pytest.fixture
def db(tmp_path: Path) -> Path:
    return tmp_path / "scans.db"


def alike(results: list[Result]) -> list[Result]:
    """The results without times."""
    return [
        msgspec.structs.replace(
            one,
            seconds=0.0,
            started="",
            detectors=tuple(msgspec.structs.replace(seen, seconds=0.0) for seen in one.detectors),
        )
        for one in results
    ]


def test_a_second_run_takes_everything_and_gives_the_same(made: list[Path], db: Path) -> None:
    first = list(scan_many(made, detectors=[Counted()], store=db))
    assert len(CALLS) == 3
    with Scanner(detectors=[Counted()], store=db) as scanner:
        second = list(scanner.scan_many(made))
        assert scanner.taken == 3
    assert second == first and len(CALLS) == 3


def test_an_unfinished_run_goes_on_and_keeps_the_order(made: list[Path], db: Path) -> None:
    whole = list(scan_many(made, detectors=[Counted()]))
    CALLS.clear()
    list(scan_many([made[1]], detectors=[Counted()], store=db))
    assert alike(list(scan_many(made, detectors=[Counted()], store=db))) == alike(whole) and len(CALLS) == 3


@pytest.mark.parametrize("stack", [1, 2, StackOptions(3)])
def test_results_are_written_as_they_come(made: list[Path], db: Path, stack: Any) -> None:
    with Scanner(detectors=[Counted()], store=db, stack=stack) as scanner, Store(db) as store:
        for result in scanner.scan_many(made):
            assert result.artifact and result.artifact.path in store.names()


def test_only_a_new_detector_runs(made: list[Path], db: Path) -> None:
    one, two = Counted(), Counted(0.2, "x.second")
    list(scan_many(made, detectors=[one], store=db))
    CALLS.clear()
    found = list(scan_many(made, detectors=[one, two], store=db))
    assert CALLS == ["x.second"] * 3
    assert alike(found) == alike(list(scan_many(made, detectors=[one, two])))


@pytest.mark.parametrize("stack", [1, 2])
def test_only_a_changed_detector_runs(made: list[Path], db: Path, stack: int) -> None:
    list(scan_many(made, detectors=[Counted(), Counted(0.2, "x.second")], store=db))
    CALLS.clear()
    changed = [Counted(), Counted(0.3, "x.second")]
    found = list(scan_many(made, detectors=changed, store=db, stack=stack))
    assert CALLS == ["x.second"] * 3 and [one.detectors[1].score for one in found] == [0.3] * 3


@pytest.mark.parametrize(
    "change",
    [
        {"seed": 1},
        {"normalize": "cifar10"},
        {"input_shape": (3, 64, 64)},
        {"budget": "fast"},
        {"skip_unknown": True},
    ],
    ids=lambda change: next(iter(change)),
)
def test_any_changed_setting_scans_again(made: list[Path], db: Path, change: dict[str, Any]) -> None:
    scan(made[0], detectors=[Counted()], store=db)
    with Scanner(detectors=[Counted()], store=db, **change) as scanner:
        scanner.scan(made[0])
        assert scanner.taken == 0


def test_other_images_other_files_and_another_version_scan_again(
    tiny: Any, db: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {"arch": tiny.arch, "input_shape": (3, 8, 8), "detectors": [Counted()], "store": db}

    def taken(data: Any, path: Path = tiny.path) -> int:
        with Scanner(data, **options) as scanner:
            scanner.scan(path)
            return scanner.taken

    images = load_clean(tiny.data)
    assert [taken(tiny.data), taken(tiny.data), taken(None), taken(images), taken(images)] == [0, 1, 0, 0, 1]
    assert taken(images.subset(torch.arange(80))) == 0
    state = torch.load(tiny.path)
    state["head.bias"] += 0.01
    torch.save(state, tiny.folder / "other.pth")
    assert taken(tiny.data, tiny.folder / "other.pth") == 0
    monkeypatch.setattr(bdprune, "__version__", "9")
    assert taken(tiny.data) == 0
    source = tiny.folder / "tinynet.py"
    assert taken(tiny.data) == 1
    source.write_text(source.read_text() + "# changed")
    assert taken(tiny.data) == 0, "the code of the architecture may have changed"


def test_a_copy_of_a_file_is_taken_under_its_own_name(made: list[Path], db: Path, tmp_path: Path) -> None:
    shutil.copy(made[0], tmp_path / "copy.pth")
    found = list(scan_many([made[0], tmp_path / "copy.pth"], detectors=[Counted()], store=db))
    assert len(CALLS) == 1 and [one.name for one in found] == [str(made[0]), str(tmp_path / "copy.pth")]


def test_failed_scans_are_stored_and_repeated(made: list[Path], db: Path, tmp_path: Path) -> None:
    bad = tmp_path / "bad.pth"
    bad.write_bytes(made[0].read_bytes()[:1000])
    missing = tmp_path / "missing.pth"
    for _ in range(2):
        with Scanner(detectors=[Counted()], store=db) as scanner:
            found = list(scanner.scan_many([bad, missing, made[0]]))
            assert [one.verdict for one in found[:2]] == ["error", "error"]
    assert scanner.taken == 1
    with Store(db) as store:
        assert {one.name for one in store.scans() if one.results[0].verdict == "error"} == {str(bad), str(missing)}


def test_the_evidence_of_a_detector_that_failed_is_not_taken(made: list[Path], db: Path) -> None:
    failing = Counted(fails=True, id="x.failing")
    scan(made[0], detectors=[failing], store=db)
    scan(made[0], detectors=[failing, Counted()], store=db)
    assert CALLS == ["x.failing", "x.failing", "x.counted"]


def test_attachments_come_from_the_store(made: list[Path], db: Path, tmp_path: Path) -> None:
    first = scan(made[0], detectors=[Counted()], store=db, attachments=tmp_path / "one")
    second = scan(made[0], detectors=[Counted()], store=db, attachments=tmp_path / "two")
    (name,) = [one.file for seen in second.detectors for one in seen.attachments]
    assert len(CALLS) == 1 and second == first
    assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    shutil.rmtree(tmp_path / "scans.db.attachments")
    assert alike([scan(made[0], detectors=[Counted()], store=db, attachments=tmp_path / "three")]) == alike([first])
    assert len(CALLS) == 2, "an attachment that is lost is computed again"


def test_known_evidence_brings_its_attachments(made: list[Path], db: Path, tmp_path: Path) -> None:
    scan(made[0], detectors=[Counted()], store=db, attachments=tmp_path / "one")
    more = [Counted(), Counted(0.2, "x.second")]
    scan(made[0], detectors=more, store=db, attachments=tmp_path / "two")
    assert CALLS == ["x.counted", "x.second"] and len(list((tmp_path / "two").iterdir())) == 2


def test_several_sets_of_one_file(made: list[Path], db: Path, tmp_path: Path) -> None:
    two = tmp_path / "two.pth"
    torch.save({"state_dict": torch.load(made[0]), "state_dict_ema": torch.load(made[1])}, two)
    first = list(scan_many([two, made[2]], detectors=[Counted()], store=db, stack=2))
    assert len(first) == 3 and list(scan_many([two, made[2]], detectors=[Counted()], store=db)) == first
    assert len(CALLS) == 3


def test_with_a_timeout_evidence_is_taken_in_the_other_process(made: list[Path], db: Path) -> None:
    list(scan_many(made[:1], detectors="lipschitz", store=db))
    (found,) = scan_many(made[:1], detectors="lipschitz,suspiciousness", store=db, timeout=100)
    (taken,) = scan_many(made[:1], detectors="lipschitz", store=db, timeout=100)
    assert found.detectors == taken.detectors  # with the seconds of the first run


def test_models_in_memory_are_scanned_but_not_stored(made: list[Path], db: Path) -> None:
    for _ in range(2):
        with Scanner(detectors=[Counted()], store=db) as scanner:
            assert len(list(scanner.scan_many([load(made[0]), made[1]]))) == 2
    assert len(CALLS) == 3
    with Store(db) as store:
        assert store.names() == [str(made[1])]


def test_a_torch_dataset_has_no_digest_but_its_results_are_stored(tiny: Any, db: Path) -> None:
    clean = load_clean(tiny.data)
    dataset = torch.utils.data.TensorDataset(clean.images, clean.labels)
    options: dict[str, Any] = {"arch": tiny.arch, "input_shape": (3, 8, 8), "detectors": [Counted()], "store": db}
    for _ in range(2):
        scan(tiny.path, dataset, **options)
    with Store(db) as store:
        (kept,) = store.scans()
        assert kept.data == kept.results[0].data.digest  # type: ignore[union-attr]


def test_a_scanner_is_used_from_several_threads(made: list[Path], db: Path) -> None:
    found: list[Result] = []
    with Scanner(detectors=[Counted()], store=db) as scanner:
        threads = [threading.Thread(target=lambda: found.extend(scanner.scan_many(made))) for _ in range(3)]
        for one in threads:
            one.start()
        for one in threads:
            one.join()
    assert len(found) == 9 and len({one.model.digest for one in found if one.model}) == 3
    with Store(db) as store:
        assert len(store.names()) == 3


def test_a_scanner_prints_nothing(made: list[Path], db: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with bdprune.Scanner(detectors="lipschitz", store=db) as scanner:
        list(scanner.scan_many(made[:1]))
    assert capfd.readouterr() == ("", "")


def test_a_closed_scanner_and_a_store_that_was_given_open(made: list[Path], db: Path) -> None:
    with Scanner(detectors=[Counted()], store=db) as scanner:
        pass
    with pytest.raises(StoreError, match="closed"):
        scanner.scan(made[0])
    with Store(db) as store:
        with Scanner(detectors=[Counted()], store=store) as scanner:
            scanner.scan(made[0])
        assert store.names() == [str(made[0])]


def test_bad_options_and_stores_raise_at_once(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="is a folder"):
        scan_many([], store=tmp_path)
    with pytest.raises(OptionError, match="no detector"):
        Scanner(detectors="none of these", store=tmp_path / "scans.db")
    assert not (tmp_path / "scans.db").exists()


def test_a_line_of_models_in_the_store_is_bounded(made: list[Path], db: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bdprune.fleet.stored._LONGEST_LINE", 3)
    a, b, c = made
    for stack in (1, StackOptions(4)):
        list(scan_many([b], detectors=[Counted()], store=db))
        models = [a, *[b] * 8, c, *[b] * 8]
        found = list(scan_many(models, detectors=[Counted()], store=db, stack=stack))
        assert [one.artifact.path for one in found if one.artifact] == list(map(str, models))
        db.unlink()


def test_a_result_that_leaves_the_store_during_a_run_is_an_error(
    made: list[Path], db: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    a, b, _ = made
    list(scan_many([b], detectors=[Counted()], store=db))
    find, asked = Store.find, list[str]()

    def once(store: Store, key: Any, name: str) -> tuple[Result, ...]:
        asked.append(name)
        return find(store, key, name) if asked.count(name) == 1 else ()

    monkeypatch.setattr(Store, "find", once)
    with pytest.raises(StoreError, match="no longer has the result"):
        list(scan_many([a, b], detectors=[Counted()], store=db))


def test_a_result_that_cannot_be_stored_is_given_out_before_the_error(
    made: list[Path], db: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*args: Any, **more: Any) -> None:
        raise StoreError("It is locked.", "Wait.")

    monkeypatch.setattr(Store, "save", fails)
    stream = scan_many(made, detectors=[Counted()], store=db)
    assert next(stream).error is None
    with pytest.raises(StoreError, match="locked"):
        next(stream)


@pytest.mark.parametrize("with_store", [True, False])
def test_values_that_are_no_models_stop_no_others(made: list[Path], db: Path, with_store: bool) -> None:
    odd: list[Any] = [None, 5, b"x", "a\0b.pth", "", made[0]]
    *bad, good = scan_many(odd, detectors=[Counted()], store=db if with_store else None)
    assert [one.verdict for one in bad] == ["error"] * 5 and good.error is None
    assert bad[0].error and bad[0].error.message == "None is no model."


def test_a_pipe_with_a_store_is_an_error(db: Path, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "model.pth")
    assert scan(tmp_path / "model.pth", detectors=[Counted()], store=db).verdict == "error"


@pytest.mark.parametrize("name", ["store", "attachments"])
def test_nothing_is_written_into_the_folder_of_the_clean_images(tmp_path: Path, name: str) -> None:
    images = tmp_path / "images"
    images.mkdir()
    options: dict[str, Any] = {name: images / "x.db"}
    with pytest.raises(OptionError, match="in the folder"):
        Scanner(images, **options)
    assert not list(images.iterdir())


def test_links_that_loop_below_the_clean_images_end(tmp_path: Path) -> None:
    folder = tmp_path / "a"
    folder.mkdir()
    (folder / "x.png").write_bytes(b"1")
    for name in ("l1", "l2"):
        (folder / name).symlink_to(".")
    assert data_digest(tmp_path)


def test_digests(made: list[Path], tmp_path: Path) -> None:
    result = scan(made[0], detectors=[Counted()])
    assert result.artifact and file_digest(made[0]) == result.artifact.sha256
    assert file_digest(tmp_path / "missing").startswith("unread:")
    assert data_digest(None) == data_digest("none") == ""
    folder = tmp_path / "images"
    folder.mkdir()
    (folder / "a.png").write_bytes(b"1")
    before = data_digest(folder)
    assert data_digest(folder) == before
    time.sleep(0.01)
    (folder / "a.png").write_bytes(b"2")
    assert data_digest(folder) != before
    assert str(data_digest(tmp_path / "missing")).startswith("unread:")


def test_another_version_of_torch_scans_again(made: list[Path], db: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scan(made[0], detectors=[Counted()], store=db)
    monkeypatch.setattr(torch, "__version__", "9.9")
    scan(made[0], detectors=[Counted()], store=db)
    assert len(CALLS) == 2


@dataclass(frozen=True)
class Meddling(Counted):
    """Replaces the file of the model while it is scanned."""

    path: Path = Path()
    content: bytes = b""

    def __call__(self, case: Case) -> Evidence:
        self.path.write_bytes(self.content) if self.content else self.path.unlink()
        return super().__call__(case)


@pytest.mark.parametrize("vanishes", [True, False])
def test_a_file_that_changes_during_its_scan_is_stored_as_it_was_read(
    made: list[Path], db: Path, tmp_path: Path, vanishes: bool
) -> None:
    path = tmp_path / "model.pth"
    path.write_bytes(made[0].read_bytes())
    content = b"" if vanishes else made[1].read_bytes()
    result = scan(path, detectors=[Meddling(path=path, content=content)], store=db)
    with Store(db) as store:
        (kept,) = store.scans()
    assert kept.model == file_digest(made[0]) and result.artifact and result.artifact.sha256 == kept.model


@pytest.mark.parametrize("vanishes", [True, False])
def test_a_file_that_changes_before_it_is_read_gives_its_digest_to_nothing_else(
    made: list[Path], db: Path, tmp_path: Path, vanishes: bool
) -> None:
    path = tmp_path / "model.pth"
    path.write_bytes(made[0].read_bytes())

    def change(stage: str) -> None:
        if stage == "loading":
            path.unlink() if vanishes else path.write_bytes(made[0].read_bytes()[:1000])

    with Scanner(detectors=[Counted()], store=db) as scanner:
        (failed,) = scanner.scan_many([path], change)
    with Store(db) as store:
        (kept,) = store.scans()
        assert failed.verdict == "error" and kept.model.startswith("unread:")
    with Scanner(detectors=[Counted()], store=db) as scanner:
        assert scanner.scan(made[0]).verdict == "inconclusive" and scanner.taken == 0


def test_the_description_of_a_compact_network_belongs_to_its_digest(made: list[Path], tmp_path: Path) -> None:
    path, description = tmp_path / "model.pth", tmp_path / "model.pth.arch.json"
    path.write_bytes(made[0].read_bytes())
    plain = file_digest(path)
    results = [scan(path, detectors=[Counted()])]
    description.write_text("{}")
    whole = file_digest(path)
    assert _scanned_file(path, whole, results) == whole != plain
    description.write_text("{ }")
    assert _scanned_file(path, whole, results) is None, "nobody knows which description was read"
    description.unlink()
    assert _scanned_file(path, whole, results) == plain


def test_clean_data_that_changes_during_a_scan_is_not_stored_under_its_old_digest(
    made: list[Path], tmp_path: Path
) -> None:
    data = Path(shutil.copy(IMAGES, tmp_path / "clean.npz"))
    with Scanner(data, detectors=[Counted()], store=tmp_path / "s.db") as scanner:
        os.utime(data, (0, 0))  # the same bytes, but nobody can know that without reading them
        with pytest.raises(StoreError, match=r"clean data .* changed during the scan"):
            list(scanner.scan_many(made))
    with Store(tmp_path / "s.db") as store:
        assert store.names() == []


def test_a_model_that_became_another_file_loses_its_old_result(made: list[Path], tmp_path: Path) -> None:
    path = Path(shutil.copy(made[0], tmp_path / "m.pth"))
    options: dict[str, Any] = {"detectors": [Counted()], "store": tmp_path / "s.db"}
    list(scan_many([path], **options))
    torch.save({"epoch": 1}, path)
    list(scan_many([path], **options))
    never = tmp_path / "never.pth"
    torch.save({"epoch": 1}, never)
    list(scan_many([never], **options))
    with Store(tmp_path / "s.db") as store:
        assert store.names() == [str(path)], "a file that never was a model is not stored"
        assert [one.verdict for one in next(store.scans()).results] == ["error"]


def test_threads_get_the_results_of_one_thread() -> None:
    """Tracing a network changes ``nn.Module`` for all threads, and so do seeds."""
    files = [ZOO / "cifar10-w8" / f"{name}.safetensors" for name in ("badnets", "clean")]

    def seen(result: Result) -> object:
        return result.name, result.verdict, [(one.detector, one.score, one.error) for one in result.detectors]

    torch.manual_seed(5)
    before = torch.get_rng_state()
    with Scanner(IMAGES, detectors="suspiciousness,moved_filters", per_class=10) as scanner:
        alone = [seen(scanner.scan(path)) for path in files]
        assert torch.equal(torch.get_rng_state(), before), "the caller's random numbers stay as they are"
        found: list[object] = []
        threads = [threading.Thread(target=lambda path=path: found.append(seen(scanner.scan(path)))) for path in files]
        for one in threads:
            one.start()
        for one in threads:
            one.join()
    assert sorted(map(str, found)) == sorted(map(str, alone))


def test_a_generator_of_models_takes_the_callers_random_numbers() -> None:
    def models() -> Iterator[torch.nn.Module]:
        for _ in range(3):
            yield build("resnet18_cifar", 3, width=4)

    def weights(module: torch.nn.Module) -> float:
        return next(module.parameters()).detach().flatten()[0].item()

    torch.manual_seed(3)
    plain, after = [weights(one) for one in models()], torch.get_rng_state()
    torch.manual_seed(3)
    made = list[float]()

    def noted() -> Iterator[torch.nn.Module]:
        for one in models():
            made.append(weights(one))
            yield one

    list(scan_many(noted(), detectors="lipschitz", input_shape="3x32x32"))
    assert made == plain and torch.equal(torch.get_rng_state(), after)


def test_one_path_instead_of_several_is_an_error() -> None:
    with Scanner(detectors="lipschitz") as scanner, pytest.raises(OptionError, match="is one path"):
        list(scanner.scan_many("models/"))
    with pytest.raises(OptionError, match="memory limit '4GiB' is not a number"):
        Scanner(detectors="lipschitz", memory_limit="4GiB")  # type: ignore[arg-type]
