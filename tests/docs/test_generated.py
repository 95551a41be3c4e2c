"""The pages of ``docs/reference`` that the code writes are up to date and complete."""

from __future__ import annotations

import importlib
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import get_args

import click
import pytest

from bdprune.cli import exit_codes
from bdprune.cli.main import main
from bdprune.environment import VARIABLES
from bdprune.record import Verdict

ROOT = Path(__file__).resolve().parents[2]
REFERENCE = ROOT / "docs" / "reference"
DECLARED = {one.name for one in VARIABLES}


@pytest.fixture
def generate(monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """Runs ``python tools/generate_docs.py ARGS`` in this process."""
    monkeypatch.syspath_prepend(ROOT / "tools")
    run = importlib.import_module("generate_docs").main
    return lambda *args: run([str(one) for one in args])


def test_pages_are_up_to_date(generate: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> None:
    """``python tools/generate_docs.py`` writes them."""
    assert generate("--check") == 0, capsys.readouterr().err


def test_a_stale_page_is_named_and_written_anew(
    generate: Callable[..., int], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    folder = tmp_path / "reference"
    shutil.copytree(REFERENCE, folder)
    (folder / "rules.md").write_text("old")
    results = (REFERENCE / "results.md").read_text()
    (folder / "results.md").write_text(results.replace("| 0 | ", "| 7 | "))
    assert generate("--folder", folder, "--check") == 1
    stale = re.findall(r"(\S+) is stale\. Run: python tools/generate_docs\.py", capsys.readouterr().err)
    assert {Path(one).name for one in stale} == {"rules.md", "results.md"}
    assert (folder / "rules.md").read_text() == "old"
    assert generate("--folder", folder) == 0
    assert (folder / "rules.md").read_text() == (REFERENCE / "rules.md").read_text()
    assert (folder / "results.md").read_text() == results


def test_every_command_and_option_is_on_the_page() -> None:
    text = (REFERENCE / "command-line.md").read_text()
    found = []

    def visit(command: click.Command, path: str) -> None:
        section = re.search(rf"^## {path}\n(.*?)(?=^## |\Z)", text, re.M | re.S)
        assert section is not None, path
        found.append(path)
        for option in command.params:
            if isinstance(option, click.Option):
                assert all(name in section[1] for name in option.opts), (path, option.opts)
        if isinstance(command, click.Group):
            for name, below in command.commands.items():
                visit(below, f"{path} {name}")

    visit(main, "bdprune")
    assert "bdprune zoo make" in found and len(found) == len(re.findall("^## ", text, re.M))


def test_all_verdicts_and_exit_codes_are_explained() -> None:
    text = (REFERENCE / "results.md").read_text()
    rows = re.findall(r"^\| `?(\w+)`? \| [A-Z].*\. \|$", text, re.M)
    codes = [value for name, value in vars(exit_codes).items() if name.isupper() and isinstance(value, int)]
    assert rows[:5] == list(get_args(Verdict))
    assert rows[5 : 5 + len(codes)] == [str(code) for code in codes]


@pytest.mark.parametrize("page", ["README.md", "docs/how-to/scan-in-ci.md"])
def test_pages_explain_the_exit_codes_in_the_words_of_the_program(page: str) -> None:
    text = (ROOT / page).read_text().replace("`", "")
    rows = re.findall(r"^\| (\d+) \| ([^|]+?) \|", text, re.M)
    assert rows == [(str(one), what) for one, what in exit_codes.CODES.items()]
    assert exit_codes.ORDER in text


def test_examples_after_as_in_and_options_become_code(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "tools")
    prose = importlib.import_module("docs.markdown").prose
    assert prose("repeatable, as in --format text -o a.html. See --data") == (
        "repeatable, as in `--format text -o a.html`. See `--data`"
    )
    assert prose("a drop, as in 0.02; [x]") == "a drop, as in `0.02`; \\[x\\]"


def test_every_rule_in_the_code_is_on_the_page() -> None:
    source = "".join(one.read_text() for one in (ROOT / "bdprune").rglob("*.py"))
    used = set(re.findall(r'"(BD\d{3})"', source))
    assert {"BD000", "BD020", "BD101"} <= used
    assert used == set(re.findall(r"`(BD\d{3})`", (REFERENCE / "rules.md").read_text()))


def sources() -> dict[str, str]:
    """The files that may read an environment variable, by their path in the repository."""
    folders = ("bdprune", "bench", "csrc", "tests", "tools")
    suffixes = {".py", ".cpp", ".cu", ".h", ".sh"}
    found = [one for folder in folders for one in (ROOT / folder).rglob("*") if one.suffix in suffixes]
    found += [ROOT / "setup.py", ROOT / "Makefile"]
    return {str(one.relative_to(ROOT)): one.read_text() for one in found}


def test_every_variable_that_a_source_file_names_is_declared() -> None:
    for path, text in sources().items():
        assert set(re.findall(r"\bBDPRUNE_[A-Z][A-Z_]*\b", text)) <= DECLARED, path


def test_every_variable_that_the_product_or_its_build_reads_is_declared() -> None:
    read = re.compile(r"""(?:environ(?:\.get\(|\[)|\bgetenv\(|\bflag\()\s*["']([A-Z_]+)["']""")
    product = {path: text for path, text in sources().items() if path.startswith(("bdprune/", "csrc/", "setup.py"))}
    names = {name for text in product.values() for name in read.findall(text)}
    assert {"BDPRUNE_ISA", "DEBUG", "BDPRUNE_NO_NATIVE"} <= names
    assert names <= DECLARED


def test_every_declared_variable_is_used() -> None:
    texts = {path: text for path, text in sources().items() if path != "bdprune/environment.py"}
    code = "\n".join(texts.values())
    constants = {one.name: one.name.removeprefix("BDPRUNE_") for one in VARIABLES}
    unused = [name for name, short in constants.items() if name not in code and f"environment.{short}" not in code]
    assert unused == []
