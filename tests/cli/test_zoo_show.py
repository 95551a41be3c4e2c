"""``bdprune zoo show``; ``tests/zoo/test_show.py`` tests the picture."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from click.testing import Result

Run = Callable[..., Result]
ROOT = Path(__file__).resolve().parent.parent.parent


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Three grey images of each of two classes, all of one value."""
    np.savez(tmp_path / "grey.npz", images=np.full((6, 16, 16, 1), 102, np.uint8), labels=np.arange(6) % 2)
    return tmp_path / "grey.npz"


def test_show_writes_a_picture_and_prints_the_strength_of_the_trigger(run: Run, images: Path, tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    out = tmp_path / "patch.png"
    done = run("zoo", "show", "badnets", "--data", images, "--set", "size=2", "--count", "2", "-o", out)
    assert done.exit_code == 0, done.output
    assert f"{out}: badnets, static trigger on 2 images" in done.stdout
    # Two white and two black pixels of 256, on 102/255.
    assert "by 2.0/255 on average and 153.0/255 at most, in 1.6 % of the pixels" in done.stdout
    with image.open(out) as opened:
        assert opened.size == (8 + 3 * 136, 20 + 2 * 136)


def test_the_picture_is_named_after_the_attack_by_default(
    run: Run, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("PIL.Image")
    monkeypatch.chdir(tmp_path)
    done = run("zoo", "show", "badnets", "--data", images)
    assert done.exit_code == 0, done.output
    assert done.stdout.startswith("badnets.png: ") and Path("badnets.png").exists()


def test_the_demos_images_are_the_default(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("PIL.Image")
    monkeypatch.chdir(tmp_path)
    missing = run("zoo", "show", "sig", "-o", "sig.png")
    assert missing.exit_code == 4 and "--data" in missing.stderr
    (tmp_path / "zoo" / "demo").mkdir(parents=True)
    shutil.copy(ROOT / "zoo" / "demo" / "test.npz", tmp_path / "zoo" / "demo")
    done = run("zoo", "show", "sig", "-o", "sig.png")
    assert done.exit_code == 0 and "40.0/255 at most" in done.stdout and Path("sig.png").exists()


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["nope"], "no attack 'nope'"),
        (["badnets", "--set", "size"], "Invalid setting 'size'"),
        (["badnets", "--set", "target=7"], "target is 7, but the images have 2 classes"),
        (["badnets", "--set", "size=99"], "the images are 16x16"),
        (["trojan-neuron"], "learned with a model"),
        (["badnets", "--data", "missing"], "no images at missing"),
    ],
)
def test_impossible_requests_exit_with_4_and_leave_no_file(
    run: Run, images: Path, tmp_path: Path, args: list[str], message: str
) -> None:
    done = run("zoo", "show", "--data", images, *args, "-o", tmp_path / "out.png")
    assert done.exit_code == 4 and message in done.stderr
    assert not (tmp_path / "out.png").exists()


def test_an_unwritable_picture_is_an_error_before_any_work(run: Run, tmp_path: Path) -> None:
    done = run("zoo", "show", "badnets", "-o", tmp_path)
    assert done.exit_code != 0 and "is a folder" in done.stderr


def test_help_has_examples(run: Run) -> None:
    assert "  bdprune zoo show blend" in run("zoo", "show", "--help").stdout
