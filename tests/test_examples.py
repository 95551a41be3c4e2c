"""Every example in the documents and in the public docstrings runs, on a small trained network and real files.

In README.md and ``docs/``, all ``python`` blocks run, and all commands ``bdprune`` in ``console``, ``bash``, ``sh`` and
``shell`` blocks. The blocks of a page run one after another, in a separate folder with the files that ``folder`` makes.
A block that cannot run has the line ``<!-- not run: why -->`` before it.
"""

from __future__ import annotations

import doctest
import importlib
import inspect
import re
import shlex
import shutil
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import pytest
from click.testing import CliRunner

import bdprune
from bdprune.cli.main import main

from .hub_server import Hub

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = ["README.md", *sorted(str(one.relative_to(ROOT)) for one in (ROOT / "docs").rglob("*.md"))]
MOST_NOT_RUN = 15
"""The number of blocks that cannot run. Raise it only deliberately."""

SHELLS = ("console", "bash", "sh", "shell")
DATA = ("yaml", "toml", "json", "html", "dockerfile")  # languages in which a command is part of something else
FENCE = re.compile(
    r"(?:^ *<!-- not run:(?P<why>[^\n]*?)-->\n\s*)?"
    r"^(?P<indent> *)```(?P<language>\w*)[^\n`]*\n(?P<body>.*?)^(?P=indent)```$",
    re.M | re.S,
)
HOMES = (
    "analysis.case",
    "fleet.scans",
    "methods.base",
    "pipeline.inspection",
    "pipeline.inversion",
    "pipeline.open",
    "pipeline.repair",
    "pipeline.scores",
    "pipeline.triggers",
    "record.results",
    "registry",
    "screening.run",
)
MODULES = ["bdprune", *(f"bdprune.{home}" for home in HOMES)]


@dataclass(frozen=True)
class Block:
    """A fenced block of a document; ``why`` it does not run, None where it does."""

    language: str
    body: str
    why: str | None


@dataclass(frozen=True)
class Command:
    """A call of ``bdprune``: its arguments, the file its output goes to, and variables that are set for it."""

    args: list[str]
    target: str | None
    variables: dict[str, str]


def blocks(text: str) -> list[Block]:
    found = FENCE.finditer(text)
    return [Block(one["language"], textwrap.dedent(one["body"]), one["why"]) for one in found]


def runnable(text: str) -> list[Block]:
    return [one for one in blocks(text) if one.why is None and one.language in ("python", *SHELLS)]


def commands(block: Block) -> list[Command]:
    """The calls of ``bdprune`` in a block; other commands are left out, such as ``pip`` and ``jq``."""
    lines = block.body.replace("\\\n", " ").splitlines()
    if block.language == "console":  # the other lines are the output of the commands
        lines = [line[2:] for line in lines if line.startswith("$ ")]
    found = (command(words) for line in lines for words in simple_commands(line))
    return [one for one in found if one is not None]


def simple_commands(line: str) -> Iterator[list[str]]:
    """The words of each command of a line, which ``|``, ``;``, ``&&`` and ``||`` separate."""
    lexer = shlex.shlex(line, posix=True, punctuation_chars="|;&>")
    lexer.wordchars += "[]{}:,@%^+!"
    words: list[str] = []
    for word in lexer:
        if word in ("|", ";", "&&", "||"):
            yield words
            words = []
        else:
            words.append(word)
    yield words


def command(words: list[str]) -> Command | None:
    variables = {}
    while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
        name, _, variables[name] = words[0].partition("=")
        words = words[1:]
    if words[:3] == ["python", "-m", "bdprune"]:
        words = words[2:]
    if not words or words[0] != "bdprune":
        return None
    target = words[words.index(">") + 1] if ">" in words else None
    return Command(words[1 : words.index(">")] if target else words[1:], target, variables)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """A network this small is slower on two threads."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files that examples may use.

    ``model.pth`` and ``model.safetensors`` hold a narrow ResNet-18 that classifies red, green and blue images;
    ``models/`` has it as ``resnet.pth``. Its clean images are in ``clean_images/`` (and ``photos/`` and ``incoming/``),
    ``clean.npz`` and ``clean.parquet``. ``list.txt`` lists the models; ``before.db`` and ``after.db`` are stores.
    ``zoo/`` is the folder of the repository, and ``my.toml`` one of its manifests.
    """
    import torch
    from safetensors.torch import save_file

    from bdprune.data import RawImages
    from bdprune.loops.fitting import Schedule, fit
    from bdprune.model.architectures import build
    from bdprune.store import Store

    labels = torch.arange(90) % 3
    noise = torch.rand(90, 3, 32, 32, generator=torch.Generator().manual_seed(0)) / 2
    noise[torch.arange(90), labels] += 0.4
    images = (noise * 255).to(torch.uint8)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = build("resnet18_cifar", 3, width=4)
    schedule = Schedule(epochs=12, batch_size=30, peak_lr=0.05, bf16=False)  # enough for 100 % on any machine
    fit(network, RawImages(images, labels), schedule, seed=0)
    where = tmp_path_factory.mktemp("examples")
    (where / "models").mkdir()
    for name in ("model.pth", "models/resnet.pth"):
        torch.save({"net": network.state_dict(), "epoch": 12}, where / name)
    save_file(network.state_dict(), where / "model.safetensors")
    write_images(where, images.permute(0, 2, 3, 1).numpy(), labels.tolist())
    shutil.copytree(where / "clean_images", where / "photos")
    shutil.copytree(where / "clean_images", where / "incoming")
    (where / "zoo").symlink_to(ROOT / "zoo")
    shutil.copy(ROOT / "zoo" / "cifar10-w8.toml", where / "my.toml")
    (where / "list.txt").write_text("model.pth\nmodels/resnet.pth\n")
    for name in ("before.db", "after.db"):
        Store(where / name).close()
    return where


def write_images(where: Path, images: object, labels: list[int]) -> None:
    """The images ``[N, H, W, C]`` in each layout that bdprune reads."""
    import io

    import numpy as np
    import pyarrow
    import pyarrow.parquet
    from PIL import Image

    pixels = np.asarray(images)
    np.savez(where / "clean.npz", images=pixels, labels=np.asarray(labels))
    encoded = []
    for index, (image, label) in enumerate(zip(pixels, labels, strict=True)):
        target = where / "clean_images" / ("0_red", "1_green", "2_blue")[label]
        target.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(target / f"{index}.png")
        buffer = io.BytesIO()
        Image.fromarray(image).save(buffer, "png")
        encoded.append({"bytes": buffer.getvalue(), "path": f"{index}.png"})
    pyarrow.parquet.write_table(pyarrow.table({"image": encoded, "label": labels}), where / "clean.parquet")


@pytest.mark.parametrize("document", [one for one in DOCUMENTS if runnable((ROOT / one).read_text())])
def test_blocks_run_one_after_another(
    document: str, folder: Path, tmp_path: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add("acme/resnet", {"model.safetensors": (folder / "model.safetensors").read_bytes(), "README.md": b""})
    shutil.copytree(folder, tmp_path / "here", symlinks=True)
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("BDPRUNE_CACHE", str(folder))
    module = ModuleType("examples")
    monkeypatch.setitem(sys.modules, "examples", module)
    for block in runnable((ROOT / document).read_text()):
        if block.language == "python":
            exec(compile(block.body, document, "exec"), module.__dict__)
        else:
            for one in commands(block):
                call(one)


def call(one: Command) -> None:
    """Runs a command. A scan, an inspection or a repair may end with 1 or 5: suspicious, or not judged."""
    done = CliRunner().invoke(main, for_this_network(one.args), prog_name="bdprune", env=one.variables)
    expected = (0, 1, 5) if one.args[0] in ("scan", "inspect", "purify") else (0,)
    assert done.exit_code in expected, f"bdprune {shlex.join(one.args)} ends with {done.exit_code}:\n{done.output}"
    if one.target is not None:
        Path(one.target).write_text(done.stdout)


def for_this_network(args: list[str]) -> list[str]:
    """Checks the normalisation in the arguments and removes it, because the network takes images in [0, 1]."""
    from bdprune.model import parse_normalization

    if "--normalize" not in args:
        return args
    place = args.index("--normalize") + 1
    parse_normalization(args[place])
    return [*args[:place], "none", *args[place + 1 :]]


def test_every_skipped_block_has_a_reason_and_few_are_skipped() -> None:
    left_out = [one for document in DOCUMENTS for one in blocks((ROOT / document).read_text()) if one.why is not None]
    assert all(one.why is not None and one.why.strip() for one in left_out)
    assert len(left_out) <= MOST_NOT_RUN


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_command_is_in_a_block_that_runs(document: str) -> None:
    """Indented blocks and blocks of other languages contain no command."""

    def rest(block: re.Match[str]) -> str:
        runs = block["language"] in (*SHELLS, *DATA) or block["why"] is not None
        return "" if runs else block["body"]

    text = FENCE.sub(rest, (ROOT / document).read_text())
    names = "|".join(main.commands)
    assert re.findall(rf"^\s*(?:\$ )?(?:python -m )?bdprune (?:{names})\b.*", text, re.M) == []


def test_blocks_are_found_with_their_marks() -> None:
    text = "```python\na\n```\n\n<!-- not run: slow -->\n\n```bash\nb\n```\n\n- item\n\n"
    text += "    ```console\n    $ c\n    d\n    ```\n"
    assert blocks(text) == [
        Block("python", "a\n", None),
        Block("bash", "b\n", " slow "),
        Block("console", "$ c\nd\n", None),
    ]


def test_commands_are_read_as_a_shell_reads_them() -> None:
    body = "A=1 bdprune scan 'a b' --x \\\n  y > out # why\npip install x && bdprune doctor | jq '.[0]'\n"
    assert commands(Block("bash", body, None)) == [
        Command(["scan", "a b", "--x", "y"], "out", {"A": "1"}),
        Command(["doctor"], None, {}),
    ]
    printed = "$ bdprune score m -f html=r.html --set k=1,2\nbdprune is not called here\n"
    assert commands(Block("console", printed, None)) == [
        Command(["score", "m", "-f", "html=r.html", "--set", "k=1,2"], None, {})
    ]


@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples_are_right(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    for public in (bdprune.scan, bdprune.purify):
        inspect.unwrap(public)  # type: ignore[arg-type]  # imports what doctest would import while it walks the package
    done = doctest.testmod(importlib.import_module(name), optionflags=doctest.ELLIPSIS)
    assert done.failed == 0
    assert done.attempted > 0
