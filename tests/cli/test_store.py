"""``bdprune scan --store``: killed runs, lists, shards, failures, interruptions; ``show``, ``diff``, ``export``."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from click.testing import Result as Ran

from bdprune.cli.main import main
from bdprune.model import build
from bdprune.store import Store

Run = Callable[..., Ran]
Start = Callable[..., subprocess.Popen[str]]
LIPSCHITZ = ("--detectors", "lipschitz", "--stack", "1")
COUNT = 8


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of checkpoints with different weights, which take some time each."""
    folder = tmp_path_factory.mktemp("fleet") / "models"
    folder.mkdir()
    with torch.random.fork_rng():
        for seed in range(COUNT):
            torch.manual_seed(seed)
            torch.save(build("resnet18_cifar", 3, width=16).state_dict(), folder / f"{seed}.pth")
    return folder


@pytest.fixture
def db(tmp_path: Path) -> Path:
    return tmp_path / "scans.db"


def without_times(lines: str) -> list[Any]:
    found = [json.loads(line) for line in lines.splitlines()]
    for one in found:
        one.pop("seconds", None)
        one.pop("started", None)
        one.get("env", {}).pop("threads", None)  # of this process and of one of its own
        for seen in one.get("detectors", ()):
            seen.pop("seconds")
    return found


def names(db: Path) -> list[str]:
    with Store(db) as store:
        return [Path(name).name for name in store.names()]


def test_a_run_that_is_killed_again_and_again_ends_with_the_results_of_one(
    start: Start, run: Run, models: Path, db: Path
) -> None:
    counts = []
    for lines in (1, 1, 2):
        process = start("scan", models, "--store", db, *LIPSCHITZ, "-f", "jsonl")
        assert process.stderr is not None
        while lines and (line := process.stderr.readline()):
            lines -= "(stored)" not in line and line.startswith("[")
        process.send_signal(signal.SIGKILL)
        process.communicate(timeout=60)
        counts.append(len(names(db)))
    assert counts == sorted(counts) and 1 <= counts[0] < COUNT
    done = run("scan", models, "--store", db, *LIPSCHITZ, "-f", "jsonl")
    assert done.stderr.count("(stored)") == counts[-1]
    whole = run("scan", models, *LIPSCHITZ, "-f", "jsonl")
    assert without_times(done.stdout) == without_times(whole.stdout) and done.exit_code == whole.exit_code == 5
    assert without_times(run("export", db).stdout) == without_times(whole.stdout)


def test_ctrl_c_says_how_to_go_on(start: Start, tiny: Any, tmp_path: Path, db: Path) -> None:
    (tmp_path / "sleeper.py").write_text(
        "import time\nfrom pathlib import Path\ndef build(num_classes=3):\n"
        "    Path(__file__).with_name('started').touch()\n    time.sleep(600)\n"
    )
    process = start("scan", tiny.path, "--arch", "sleeper:build", "--input-shape", "3x8x8", "--store", db)
    while not (tmp_path / "started").exists():
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130
    assert stderr.splitlines()[-2:] == [
        "bdprune: Interrupted; nothing was left half-written.",
        f"  The results of 0 of 1 files are in {db}. Run the same command again to go on.",
    ]


def test_a_second_run_says_what_is_stored(run: Run, models: Path, db: Path) -> None:
    two = [models / "0.pth", models / "1.pth"]
    assert "(stored)" not in run("scan", *two, "--store", db, *LIPSCHITZ).stderr
    again = run("scan", *two, "--store", db, *LIPSCHITZ, "--resume")
    assert again.stderr.count("(stored)") == 2 and f"Results from {db}: 2." in again.stderr


@pytest.mark.parametrize("args", [["--resume"], ["--resume", "--store", "none.db"]])
def test_resume_needs_a_store(run: Run, models: Path, args: list[str]) -> None:
    done = run("scan", models, *args, *LIPSCHITZ)
    assert done.exit_code == 4 and len(done.stderr.splitlines()) == 2


def test_bad_stores_are_one_error(run: Run, models: Path, tmp_path: Path) -> None:
    text = tmp_path / "notes.txt"
    text.write_text("notes")
    for store in (tmp_path, text, models / "0.pth", tmp_path / "none" / "scans.db", ""):
        done = run("scan", models / "0.pth", "--store", store, *LIPSCHITZ)
        assert done.exit_code == 4 and len(done.stderr.splitlines()) == 2 and done.stdout == ""
    for command in (["show", text], ["diff", text, text], ["export", text]):
        assert run(*command).exit_code == 4
    assert text.read_text() == "notes"


def test_a_store_among_the_models_is_no_model(run: Run, models: Path, tmp_path: Path) -> None:
    folder = tmp_path / "models"
    folder.mkdir()
    (folder / "a.pth").write_bytes((models / "0.pth").read_bytes())
    options = [folder, "--store", folder / "scans.db", *LIPSCHITZ, "-f", "json"]
    (only,) = json.loads(run("scan", *options).stdout)
    assert only["artifact"]["path"] == str(folder / "a.pth")
    result, coverage = json.loads(run("scan", *options).stdout)
    assert result["artifact"]["path"] == str(folder / "a.pth")
    reasons = {one["reason"]: one["may_hold_weights"] for one in coverage["passed_over"]}
    assert reasons == {"an SQLite database": False, "the attachments of a store": False}
    assert (folder / "scans.db.attachments").is_dir()


def test_lists_of_paths(models: Path, tmp_path: Path) -> None:
    listed = tmp_path / "list.txt"
    listed.write_text(f"{models / '0.pth'}\r\n\n{models / '1.pth'}\n")
    zeros = f"{models / '2.pth'}\0{models / '3.pth'}\0"

    def scanned(*args: object, given: str | None = None) -> list[str]:
        words = ["scan", *map(str, args), *LIPSCHITZ, "-f", "jsonl", "-q"]
        done = CliRunner().invoke(main, words, input=given, prog_name="bdprune")
        assert done.exit_code == 5, done.stderr
        return [Path(json.loads(line)["artifact"]["path"]).name for line in done.stdout.splitlines()]

    assert scanned(f"@{listed}") == ["0.pth", "1.pth"]
    assert scanned("-", given=listed.read_text()) == ["0.pth", "1.pth"]
    assert scanned(f"@{listed}", "-", models / "4.pth", given=zeros) == [f"{place}.pth" for place in range(5)]


@pytest.mark.parametrize(
    "content", ["./a.pth\n".encode("utf-16"), "./a.pth\n".encode("utf-16-le"), b"PK\x03\x04\0/\0.\0x", b"a.pth\0b.pth"]
)
def test_a_binary_list_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "list.txt").write_bytes(content)
    done = CliRunner().invoke(main, ["scan", f"@{tmp_path / 'list.txt'}"], prog_name="bdprune")
    assert done.exit_code == 4 and "is no list of paths" in done.stderr


def test_a_list_may_start_with_a_byte_order_mark(run: Run, models: Path, tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_bytes(b"\xef\xbb\xbf" + f"{models / '0.pth'}\n".encode())
    assert run("scan", f"@{tmp_path / 'list.txt'}", *LIPSCHITZ, "-q", "-f", "jsonl").exit_code == 5


@pytest.mark.parametrize(
    ("content", "args", "word"),
    [
        ("", ["@list.txt"], "empty"),
        ("", ["-"], "empty"),
        ("x", ["@none.txt"], "cannot be read"),
        ("x", ["-", "-"], "twice"),
    ],
)
def test_bad_lists(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str, args: list[str], word: str) -> None:
    monkeypatch.chdir(tmp_path)
    Path("list.txt").write_text(content)
    done = CliRunner().invoke(main, ["scan", *args], input=content, prog_name="bdprune")
    assert done.exit_code == 4 and word in done.stderr and len(done.stderr.splitlines()) == 2


def test_shards_cover_every_model_once(run: Run, models: Path, tmp_path: Path) -> None:
    stores = [tmp_path / f"{part}.db" for part in (1, 2, 3)]
    for part, store in enumerate(stores, 1):
        done = run("scan", models, "--shard", f"{part}/3", "--store", store, *LIPSCHITZ)
        assert done.exit_code in (0, 5)
    found = [name for store in stores for name in names(store)]
    assert sorted(found) == [f"{place}.pth" for place in range(COUNT)] and len(names(stores[0])) < COUNT
    assert len(run("export", *stores).stdout.splitlines()) == COUNT


def test_a_shard_without_models_is_fine(run: Run, models: Path) -> None:
    codes = {run("scan", models / "0.pth", "--shard", f"{part}/2", *LIPSCHITZ).exit_code for part in (1, 2)}
    assert codes == {0, 5}


@pytest.mark.parametrize("shard", ["0/2", "3/2", "1", "a/b", "1/0"])
def test_bad_shards(run: Run, models: Path, shard: str) -> None:
    assert run("scan", models, "--shard", shard).exit_code == 4


def test_too_many_failures_end_the_scan(run: Run, models: Path, tmp_path: Path, db: Path) -> None:
    folder = tmp_path / "models"
    folder.mkdir()
    for name in ("a", "b", "c", "d"):
        (folder / f"{name}.pth").write_bytes((models / "0.pth").read_bytes()[: 2000 if name in "bc" else None])
    options = [folder, "--store", db, *LIPSCHITZ, "-f", "json"]
    done = run("scan", *options, "--max-failures", "2")
    *results, coverage = json.loads(done.stdout)
    assert done.exit_code == 2 and [one["verdict"] for one in results] == ["inconclusive", "error", "error"]
    assert coverage["passed_over"][0]["paths"] == [str(folder / "d.pth")]
    assert "Stopped after 2 files failed; 1 file was not scanned." in done.stderr
    assert len(json.loads(run("scan", *options, "--max-failures", "3").stdout)) == 4
    for name in ("b", "c"):
        (folder / f"{name}.pth").write_bytes(b"GGUF" + bytes(100))  # unsupported, which --skip-unknown ignores
    assert run("scan", *options, "--skip-unknown", "--max-failures", "2").exit_code == 2


def test_a_file_with_several_sets_of_weights_fails_once(run: Run, models: Path, tmp_path: Path) -> None:
    folder = tmp_path / "models"
    folder.mkdir()
    one, other = (torch.load(models / f"{number}.pth") for number in range(2))
    for name in ("a", "b", "c", "d"):
        torch.save({"state_dict": one, "state_dict_ema": other}, folder / f"{name}.pth")
    data = tmp_path / "five_classes.npz"
    np.savez(data, images=np.zeros((50, 32, 32, 3), np.uint8), labels=np.arange(50) % 5)
    done = run("scan", folder, "--data", data, *LIPSCHITZ, "-f", "json", "--max-failures", "2")
    *results, coverage = json.loads(done.stdout)
    assert [one["verdict"] for one in results] == ["error"] * 4
    assert coverage["passed_over"][0]["paths"] == [str(folder / name) for name in ("c.pth", "d.pth")]
    assert "Stopped after 2 files failed; 2 files were not scanned." in done.stderr


@pytest.fixture
def filled(run: Run, models: Path, db: Path) -> Path:
    """A store with two models."""
    run("scan", models / "0.pth", models / "1.pth", "--store", db, *LIPSCHITZ)
    return db


def test_show_lists_models_and_shows_one(run: Run, models: Path, filled: Path) -> None:
    listed = run("show", filled).stdout.splitlines()
    assert listed[0].split() == ["verdict", "risk", "label", "scanned", "model"]
    assert [line.split()[-1] for line in listed[1:]] == [str(models / "0.pth"), str(models / "1.pth")]
    assert run("show", filled, "0.pth").stdout.startswith(f"INCONCLUSIVE  {models / '0.pth'}")
    assert json.loads(run("show", filled, models / "0.pth", "-f", "json").stdout)["kind"] == "scan"
    assert len(json.loads(run("show", filled, "-f", "json").stdout)) == 2


def test_show_has_the_earlier_scans(run: Run, models: Path, filled: Path) -> None:
    run("scan", models / "0.pth", "--store", filled, "--seed", "7", *LIPSCHITZ)
    every = json.loads(run("show", filled, "0.pth", "--all", "-f", "json").stdout)
    assert [one["env"]["seed"] for one in every] == [7, 0]
    assert json.loads(run("show", filled, "0.pth", "-f", "json").stdout)["env"]["seed"] == 7


@pytest.mark.parametrize(("args", "word"), [(["none.pth"], "no model"), (["pth"], "no model"), (["--all"], "NAME")])
def test_show_of_unknown_models(run: Run, filled: Path, args: list[str], word: str) -> None:
    done = run("show", filled, *args)
    assert done.exit_code == 4 and word in done.stderr


def test_diff_names_changes_and_causes(run: Run, models: Path, filled: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.db"
    run("scan", models / "0.pth", models / "2.pth", "--store", other, "--seed", "7", "--detectors", "suspiciousness")
    text = run("diff", filled, other).stdout
    assert "no evidence of lipschitz any more" in text and "because of without the detector lipschitz" in text
    assert text.splitlines()[-1] == "1 changed, 0 the same, 1 only in the first, 1 only in the second"
    assert json.loads(run("diff", filled, filled, "--format", "json").stdout)["same"] == 2


def test_export_to_files(run: Run, filled: Path, tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    assert run("export", filled, "-o", tmp_path / "x.parquet").exit_code == 0
    assert (tmp_path / "x.parquet").read_bytes()[:4] == b"PAR1"
    assert run("export", filled, "-f", "jsonl", "-o", tmp_path / "x.txt").exit_code == 0
    assert (tmp_path / "x.txt").read_text() == run("export", filled).stdout
    for args in (["-f", "parquet"], ["-o", filled], ["-o", tmp_path / "none" / "x.jsonl"]):
        assert run("export", filled, *args).exit_code == 4


def test_these_commands_do_not_import_torch(filled: Path) -> None:
    code = f"""
import sys
from click.testing import CliRunner
from bdprune.cli.main import main
for args in (["show"], ["show", "{filled}", "0.pth"], ["diff", "{filled}"], ["export"]):
    done = CliRunner().invoke(main, [*args, "{filled}"] if len(args) < 3 else args)
    assert done.exit_code == 0, done.output
print([name for name in ("torch", "numpy") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "[]\n", done.stderr
