"""Training a zoo: written files, existing models, and killed runs."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
import torch

from bdprune.data.load import load_clean
from bdprune.errors import ArtifactError, DataError, OptionError, OutputError
from bdprune.model.loading import load
from bdprune.zoo.making import make
from bdprune.zoo.manifest import read_manifest
from bdprune.zoo.store import Storage, Truth, locked, read_truth, work_path, write_truth
from bdprune.zoo.verification import verify

from .conftest import HEAD, write_parquet

Write = Callable[..., Path]


def test_making_writes_models_triggers_images_and_truth(made: Path) -> None:
    home = made.with_suffix("")
    names = sorted(path.name for path in home.iterdir())
    files = ["bad.safetensors", "bad.trigger", "clean.safetensors", "defence.npz", "test.npz", "truth.json"]
    assert names == files
    assert len({(home / name).stat().st_mode for name in names}) == 1  # all files have the same permissions
    truth = read_truth(home)
    assert list(truth) == ["clean", "bad"]
    clean, bad = truth["clean"], truth["bad"]
    assert (clean.target_label, clean.attack_success_rate, clean.class_success) == (None, None, ())
    assert bad.target_label == 1 and bad.class_success[1] is None
    assert 0 <= (bad.attack_success_rate or 0) <= 1
    assert bad.env is not None and (bad.env.torch, bad.env.threads) == (torch.__version__, 1)
    assert bad.seconds is not None and bad.seconds > 0
    model = load(home / "bad.safetensors")
    assert (model.arch, model.num_classes) == ("resnet18_cifar", 3)
    assert load_clean(home / "defence.npz").class_counts == {0: 2, 1: 2, 2: 2}
    assert load_clean(home / "test.npz").class_counts == {0: 3, 1: 3, 2: 3}


def test_the_same_manifest_gives_the_same_bytes_in_another_folder(made: Path, tiny_data: Path, tmp_path: Path) -> None:
    make(made, tiny_data, tmp_path / "out", only=["bad"])
    for name in ("bad.safetensors", "bad.trigger", "defence.npz", "test.npz"):
        assert (tmp_path / "out" / name).read_bytes() == (made.with_suffix("") / name).read_bytes()
    assert not (tmp_path / "out" / "clean.safetensors").exists()


def test_an_existing_model_is_not_changed(made: Path, tiny_data: Path) -> None:
    weights = made.with_suffix("") / "bad.safetensors"
    before = weights.stat().st_mtime_ns
    steps: list[str] = []
    truths = make(made, tiny_data, progress=lambda name, *_: steps.append(name))
    assert weights.stat().st_mtime_ns == before
    assert not steps
    assert [truth.name for truth in truths] == ["clean", "bad"]


def test_pending_models_are_made_only_by_name(made: Path, tiny_data: Path) -> None:
    assert [truth.name for truth in make(made, tiny_data, only=["late"])] == ["late"]
    assert list(read_truth(made.with_suffix(""))) == ["clean", "bad", "late"]


def test_a_model_without_its_truth_is_measured_and_not_trained(made: Path, tiny_data: Path) -> None:
    home = made.with_suffix("")
    known = read_truth(home)
    old = Truth("bad", 1, 0.5, 0.5, 0.5, 7059.0)  # from an older version that measured less
    write_truth(home, {"bad": old})
    steps: list[str] = []
    make(made, tiny_data, progress=lambda name, *_: steps.append(name))
    assert not steps
    found = read_truth(home)
    assert found["bad"].seconds == 7059.0 and found["clean"].seconds is None
    for name in ("clean", "bad"):
        assert found[name].clean_accuracy == known[name].clean_accuracy
        assert found[name].class_success == known[name].class_success


def test_settings_without_effect_do_not_change_the_recipe(made: Path, tiny_data: Path) -> None:
    """An explicit default, a note, threads; and a truth from an older version without recipes."""
    text = made.read_text().replace("target = 1, rate = 0.25", "target = 1, size = 3, rate = 0.25")
    made.write_text(text.replace("num_classes = 3", "num_classes = 3\nthreads = 1").replace("no time", "none"))
    assert [check.state for check in verify(made, tiny_data)] == ["agrees", "agrees", "pending"]
    home = made.with_suffix("")
    write_truth(home, {name: msgspec.structs.replace(one, recipe=None) for name, one in read_truth(home).items()})
    made.write_text(text.replace("seed = 2", "seed = 9"))
    assert [truth.name for truth in make(made, tiny_data)] == ["clean", "bad"]


def test_a_source_of_another_recipe_is_an_error(write: Write, tiny_data: Path) -> None:
    manifest = write(SOURCED)
    make(manifest, tiny_data, only=["origin"])
    write(SOURCED.replace("seed = 1", "seed = 5"))
    with pytest.raises(OptionError, match=r"origin\.safetensors was made by another recipe .*: seed 1, now 5"):
        make(manifest, tiny_data, only=["hard"])


def test_a_removed_folder_cannot_be_locked(tmp_path: Path) -> None:
    """Another process has just finished and removed it."""
    with locked(tmp_path / "gone", wait=False) as held:
        assert not held


def test_training_changes_neither_the_random_state_nor_the_threads(made: Path, tiny_data: Path, tmp_path: Path) -> None:
    torch.manual_seed(7)
    expected, threads = torch.rand(3), torch.get_num_threads()
    torch.manual_seed(7)
    make(made, tiny_data, tmp_path / "out", only=["bad"])
    assert torch.equal(torch.rand(3), expected)
    assert torch.get_num_threads() == threads


SOURCED = """
[[models]]
name = "hard"
seed = 4
source = "origin"
attack = {kind = "label-consistent", target = 1, rate = 0.25, steps = 1}
[[models]]
name = "origin"
seed = 1
"""


def test_sources_are_made_first(write: Write, tiny_data: Path) -> None:
    manifest = write(SOURCED)
    order: list[str] = []
    said: list[str] = []
    truths = make(manifest, tiny_data, progress=lambda name, *_: order.append(name), say=said.append)
    assert list(dict.fromkeys(order)) == ["origin", "hard"]
    assert [truth.name for truth in truths] == ["hard", "origin"]
    assert not said


def test_a_required_source_is_made_and_reported(write: Write, tiny_data: Path, tmp_path: Path) -> None:
    manifest = write(SOURCED.replace('name = "origin"', 'name = "origin"\npending = true'))
    said: list[str] = []
    make(manifest, tiny_data, only=["hard"], say=said.append)
    assert said == ["hard starts from origin, which does not exist yet and is trained first."]
    assert set(read_truth(tmp_path / "tiny")) == {"hard", "origin"}
    said.clear()
    make(manifest, tiny_data, tmp_path / "out", only=["hard"], say=said.append)  # the source is in its default folder
    assert not said and not (tmp_path / "out" / "origin.safetensors").exists()
    same = [(tmp_path / name / "hard.safetensors").read_bytes() for name in ("tiny", "out")]
    assert same[0] == same[1]


def test_included_models_stay_in_their_folder(made: Path, tiny_data: Path, write: Write, tmp_path: Path) -> None:
    own = '[[models]]\nname = "more"\nseed = 5\n'
    manifest = write(own, f'include = ["zoo/tiny.toml"]\n{HEAD}', "all.toml")
    steps: list[str] = []
    truths = make(manifest, tiny_data, progress=lambda name, *_: steps.append(name))
    assert [truth.name for truth in truths] == ["clean", "bad", "more"]
    assert set(steps) == {"more"}
    assert sorted(path.name for path in (tmp_path / "all").glob("*.safetensors")) == ["more.safetensors"]


def test_attacks_without_training_run_start_and_finish(
    write: Write, tiny_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from bdprune.attacks.registry import ATTACKS
    from bdprune.zoo.store import load_network

    calls: list[str] = []

    class Nudge(ATTACKS["badnets"]):  # type: ignore[misc]
        kind, trains, needs_source = "nudge", False, "clean"

        def start(self, network: torch.nn.Module, setting: object) -> None:
            network.load_state_dict(setting.source.state_dict())  # type: ignore[attr-defined]
            calls.append("start")

        def finish(self, network: torch.nn.Module, setting: object, trigger: object) -> None:
            network.linear.bias.data += 1  # type: ignore[union-attr, operator]
            calls.append("finish")

    monkeypatch.setitem(ATTACKS, "nudge", Nudge)
    models = '[[models]]\nname="origin"\nseed=1\n[[models]]\nname="n"\nseed=2\nsource="origin"\n'
    manifest = write(models + 'attack = {kind = "nudge", target = 1}\n')
    make(manifest, tiny_data)
    assert calls == ["start", "finish"]
    zoo = read_manifest(manifest)
    one, two = (load_network(zoo.entry(name), zoo.home).state_dict() for name in ("origin", "n"))
    assert torch.allclose(two["linear.bias"], one["linear.bias"] + 1, atol=2e-3)
    assert all(torch.equal(one[name], two[name]) for name in one if name != "linear.bias")


def test_partially_written_files_are_never_models(made: Path, tiny_data: Path) -> None:
    """The partial file of a killed process has another name, and scans of the folder skip it."""
    home = made.with_suffix("")
    whole = (home / "bad.safetensors").read_bytes()
    (home / ".bdprune-half").write_bytes(whole[:1000])
    (home / "bad.safetensors").unlink()
    storage = Storage(read_manifest(made))
    assert storage.state(storage.zoo.entry("bad")) == "not kept"
    make(made, tiny_data)
    assert (home / "bad.safetensors").read_bytes() == whole


def test_a_damaged_model_is_an_error(made: Path, tiny_data: Path) -> None:
    home = made.with_suffix("")
    (home / "bad.safetensors").write_bytes((home / "bad.safetensors").read_bytes()[:1000])
    write_truth(home, {})
    with pytest.raises(ArtifactError):
        make(made, tiny_data, only=["bad"])


def test_a_model_that_another_process_makes_is_skipped(made: Path, tiny_data: Path) -> None:
    zoo = read_manifest(made)
    work = work_path(zoo.home, "late")
    work.mkdir(parents=True)
    said: list[str] = []
    with locked(work) as held:
        assert held
        assert make(made, tiny_data, only=["late", "bad"], say=said.append) == [read_truth(zoo.home)["bad"]]
    assert said == ["Skipped late: another process is training it."]
    assert Storage(zoo).state(zoo.entry("late")) == "begun"


def test_missing_data_and_unknown_names_are_named(made: Path, tiny_data: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError):
        make(made, tmp_path, tmp_path / "out")
    with pytest.raises(OptionError, match="no model 'nope'"):
        make(made, tiny_data, tmp_path / "out", only=["nope"])


def test_fewer_images_than_classes_give_one_of_each_class(write: Write, tiny_data: Path, tmp_path: Path) -> None:
    manifest = write(head=HEAD.replace("defence_images = 6", "defence_images = 2"))
    make(manifest, tiny_data, tmp_path / "out", only=["clean"])
    assert load_clean(tmp_path / "out" / "defence.npz").class_counts == {0: 1, 1: 1, 2: 1}


def test_more_labels_than_classes_are_an_error(write: Write, tiny_data: Path) -> None:
    manifest = write('[[models]]\nname = "clean"\nseed = 1\nnum_classes = 2\n')
    with pytest.raises(DataError, match="has label 2, model 'clean' has classes 0 to 1"):
        make(manifest, tiny_data)


def test_a_model_that_cannot_be_measured_is_not_trained(write: Write, tiny_data: Path, tmp_path: Path) -> None:
    data, steps = tmp_path / "data", list[str]()
    shutil.copytree(tiny_data, data)

    def fails(message: str) -> None:
        with pytest.raises(DataError, match=message):
            make(manifest, data, progress=lambda name, *_: steps.append(name))
        assert not steps

    manifest = write(head=HEAD.replace("test_images = 9", "test_images = 0"))
    write_parquet(data / "tiny/test.parquet", 30, 1, size=40)
    fails(r"training images of tiny have shape \(3, 32, 32\), its test images \(3, 40, 40\)")
    (data / "tiny/test.parquet").unlink()
    fails("no data set 'tiny'")


@pytest.mark.parametrize(
    "name", ["defence.npz", "bad.trigger", "bad.safetensors", "truth.json", ".making/bad/cost.json"]
)
def test_an_unwritable_path_is_named(
    made: Path, tiny_data: Path, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk is full when the file is moved. In the next run it is not, and nothing is trained again."""
    replace = os.replace

    def full(source: str, target: Path) -> None:
        if str(target).endswith(name):
            raise OSError(errno.ENOSPC, "No space left on device")
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        with pytest.raises(OutputError, match=rf"Cannot write .*{name}: No space"):
            make(made, tiny_data, tmp_path / "out", only=["bad"])
    make(made, tiny_data, tmp_path / "out", only=["bad"])
    for file in ("bad.safetensors", "bad.trigger"):
        assert (tmp_path / "out" / file).read_bytes() == (made.with_suffix("") / file).read_bytes()


class Killed(Exception):
    pass


@pytest.mark.parametrize("step", [1, 3, 4, 6])
def test_a_training_interrupted_anywhere_resumes_to_the_same_model(
    made: Path, tiny_data: Path, tmp_path: Path, step: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Six steps, three in each of two cycles; every step is kept."""
    from bdprune.loops import resume as checkpoint

    monkeypatch.setattr(checkpoint.Checkpoint, "due", lambda self: True)

    def die(name: str, done: int, steps: int, loss: float) -> None:
        if done == step:
            raise Killed

    out, seen = tmp_path / "out", list[int]()
    with pytest.raises(Killed):
        make(made, tiny_data, out, only=["bad"], progress=die)
    assert not (out / "bad.safetensors").exists()
    make(made, tiny_data, out, only=["bad"], progress=lambda name, done, *_: seen.append(done))
    assert seen == list(range(step, 7))
    assert (out / "bad.safetensors").read_bytes() == (made.with_suffix("") / "bad.safetensors").read_bytes()
    assert not (out / ".making").exists()


def test_an_interruption_after_the_training_does_not_repeat_it(
    made: Path, tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    for place in ("store.save_trigger", "store.save_weights", "making.measure", "store.add_truth"):
        with monkeypatch.context() as patch:

            def die(*_: object) -> None:
                raise Killed

            patch.setattr(f"bdprune.zoo.{place}", die)
            with pytest.raises(Killed):
                make(made, tiny_data, out, only=["bad"])
        # Weights without their trigger would count as a model.
        assert (out / "bad.trigger").exists() or not (out / "bad.safetensors").exists()
    seen: list[int] = []
    make(made, tiny_data, out, only=["bad"], progress=lambda name, done, *_: seen.append(done))
    assert not seen
    assert (out / "bad.safetensors").read_bytes() == (made.with_suffix("") / "bad.safetensors").read_bytes()
    assert (read_truth(out)["bad"].seconds or 0) > 0


RUN = """
import sys
from pathlib import Path
from bdprune.loops import resume as checkpoint
from bdprune.zoo.making import make
checkpoint.Checkpoint.due = lambda self: True
make(Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]))
"""


@pytest.mark.slow
def test_a_training_killed_repeatedly_with_signal_9_gives_the_same_bytes(
    made: Path, tiny_data: Path, tmp_path: Path
) -> None:
    """The process is killed at arbitrary moments."""
    (tmp_path / "run.py").write_text(RUN)
    out = tmp_path / "out"
    root = Path(__file__).resolve().parent.parent.parent
    environment = os.environ | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(tmp_path / "run.py"), str(made), str(tiny_data), str(out)]
    kills = 0
    for round_ in range(30):
        process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE)
        waited = time.monotonic()
        while process.poll() is None and not (out / "defence.npz").exists() and time.monotonic() - waited < 300:
            time.sleep(0.01)  # until it has begun
        if kills < 4:
            time.sleep(0.4 + 0.2 * round_)
            if process.poll() is None:
                process.send_signal(signal.SIGKILL)
                kills += 1
        _, errors = process.communicate(timeout=300)
        for name in ("clean", "bad"):  # a file with this name is always a whole model
            if (out / f"{name}.safetensors").exists():
                load(out / f"{name}.safetensors")
        if process.returncode == 0:
            break
        assert process.returncode == -signal.SIGKILL, errors
    assert process.returncode == 0 and kills
    home = made.with_suffix("")
    for name in ("clean.safetensors", "bad.safetensors", "bad.trigger", "defence.npz", "test.npz"):
        assert (out / name).read_bytes() == (home / name).read_bytes()
    assert list(read_truth(out)) == ["clean", "bad"]
    assert not (out / ".making").exists()


def test_two_processes_divide_the_models(made: Path, tiny_data: Path, tmp_path: Path) -> None:
    """The second process skips the locked model and trains the other; both records are kept."""
    out = tmp_path / "out"
    inner: list[Truth] = []

    def second(name: str, done: int, steps: int, loss: float) -> None:
        if name == "clean" and done == 2:
            inner.extend(make(made, tiny_data, out))

    truths = make(made, tiny_data, out, progress=second)
    assert [truth.name for truth in inner] == ["bad"]
    assert [truth.name for truth in truths] == ["clean", "bad"]
    assert list(read_truth(out)) == ["clean", "bad"]
    shutil.rmtree(out)
