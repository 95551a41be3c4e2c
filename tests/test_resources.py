"""``BDPRUNE_TEST_REQUIRE`` turns skips for lack of a resource into failures."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from . import resources

pytest_plugins = ["pytester"]

HERE = Path(__file__).parent
TESTS = """
import pytest

@pytest.mark.needs("cuda")
def test_cuda(): pass

@pytest.mark.needs("nvcc")
def test_nvcc(): pass

def test_data(data_root): pass

def test_browser(browser): pass

def test_device(device): pass
"""


@pytest.fixture
def suite(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> pytest.Pytester:
    """One test for each resource, on a machine that has none of them."""
    for name in ("conftest.py", "resources.py"):
        pytester.path.joinpath("tests").mkdir(exist_ok=True)
        pytester.path.joinpath("tests", name).write_text((HERE / name).read_text())
    pytester.path.joinpath("tests", "test_all.py").write_text(TESTS)
    pytester.makeini("[pytest]\nmarkers = needs: x\naddopts = --import-mode=importlib -p no:cacheprovider")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("BDPRUNE_DATA", str(pytester.path / "nowhere"))
    monkeypatch.setenv("PATH", str(pytester.path))
    monkeypatch.delenv(resources.VARIABLE, raising=False)
    return pytester


def test_without_the_variable_they_are_skipped(suite: pytest.Pytester) -> None:
    suite.runpytest_inprocess("-rs").assert_outcomes(skipped=4, passed=1)


@pytest.mark.parametrize(
    ("words", "failed", "skipped"),
    [("nvcc", 1, 3), ("cuda", 2, 3), (" nvcc, cuda ", 3, 2), ("nvcc,", 1, 3)],
)
def test_marked_tests_fail(
    suite: pytest.Pytester, monkeypatch: pytest.MonkeyPatch, words: str, failed: int, skipped: int
) -> None:
    """Without a GPU, ``device`` alone runs on the CPU; where CUDA is required, its run on CUDA fails."""
    monkeypatch.setenv(resources.VARIABLE, words)
    done = suite.runpytest_inprocess()
    done.assert_outcomes(errors=failed, skipped=skipped, passed=1)


@pytest.mark.parametrize("word", ["data", "browser"])
def test_fixtures_fail(suite: pytest.Pytester, monkeypatch: pytest.MonkeyPatch, word: str) -> None:
    monkeypatch.setenv(resources.VARIABLE, word)
    done = suite.runpytest_inprocess()
    done.assert_outcomes(errors=1, skipped=3, passed=1)
    done.stdout.fnmatch_lines([f"*BDPRUNE_TEST_REQUIRE lists {word}, but no*"])


def test_an_unknown_word_is_a_usage_error(suite: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(resources.VARIABLE, "data,gpu,tpu")
    done = suite.runpytest_inprocess()
    assert done.ret == pytest.ExitCode.USAGE_ERROR
    done.stderr.fnmatch_lines(["*unknown gpu, tpu; choose from cuda, data, browser, nvcc*"])


def test_resources_of_this_machine_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("BDPRUNE_DATA", str(tmp_path))
    assert resources.WHY_MISSING["data"]() == ""
    for name in ("nvcc", "chrome"):
        (tmp_path / name).write_text("")
        (tmp_path / name).chmod(0o755)
    assert resources.WHY_MISSING["nvcc"]() == resources.WHY_MISSING["browser"]() == ""
    assert resources.find_browser() == str(tmp_path / "chrome")
