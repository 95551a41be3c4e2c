"""bench/gpu.sh on a machine without a GPU, and the ops that it runs under the sanitizers."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench import gpu_ops
from bench.speed import __main__ as speed

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_reports_the_lack_and_writes_no_report(tmp_path: Path) -> None:
    report = ROOT / "bench/results/gpu.txt"
    before = report.read_bytes()
    done = subprocess.run(["bash", "bench/gpu.sh", sys.executable], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("bench/gpu.sh: ") and "GPU" in done.stderr
    # A driver that finds the GPU is not enough: torch must find it too.
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    env = {**os.environ, "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"}
    command = ["bash", "bench/gpu.sh", sys.executable]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=env)
    assert done.returncode == 2 and "CUDA build of torch" in done.stderr
    assert report.read_bytes() == before


def test_all_steps_end_within_nine_minutes() -> None:
    script = Path(ROOT / "bench/gpu.sh").read_text()
    limits = [int(found) for found in re.findall(r"^ *step (\d+) ", script, re.MULTILINE)]
    sanitizers = 2
    assert len(limits) == 6 and sum(limits) + limits[3] * (sanitizers - 1) <= 540


def test_every_test_that_it_names_exists() -> None:
    named = re.findall(r"\btests/[\w/.]+", Path(ROOT / "bench/gpu.sh").read_text())
    assert {"tests/ops", "tests/cuda", "tests/loops", "tests/runtime", "tests/model"} <= set(named)
    assert [name for name in named if not (ROOT / name).exists()] == []


@pytest.mark.source
def test_every_op_with_a_kernel_runs_under_the_sanitizers() -> None:
    sources = "".join(path.read_text() for path in (ROOT / "csrc/cuda").glob("*.cu"))
    checked = Path(gpu_ops.__file__).read_text()
    kernels = [line.split('"')[1] for line in sources.splitlines() if "m.impl(" in line]
    assert len(kernels) >= 6
    assert [name for name in kernels if f"torch.ops.bdprune.{name}(" not in checked] == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_the_ops_report_a_missing_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu_ops.main() == 2
    assert "no CUDA device" in capsys.readouterr().err


def test_it_keeps_the_python_path_and_resolves_a_script_to_its_toolkit() -> None:
    script = Path(ROOT / "bench/gpu.sh").read_text()
    assert "PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}" in script
    pattern = re.search(r"sed -n '(.*TOP.*)'", script)
    assert pattern
    output = "#$ _HERE_=/cuda/bin\n#$ TOP=/cuda/bin/..\n#$ PATH=/cuda/bin:/bin\n"
    found = subprocess.run(["sed", "-n", pattern[1]], input=output, capture_output=True, text=True, check=True)
    assert found.stdout == "/cuda/bin/..\n"


def test_the_benchmarks_accept_their_arguments() -> None:
    script = Path(ROOT / "bench/gpu.sh").read_text()
    line = next(line for line in script.splitlines() if "-m bench.speed " in line)
    options = speed._parser().parse_args(shlex.split(line.split("-m bench.speed ")[1]))
    assert (options.device, options.threads, options.only) == ("cuda", [1], None) and options.minutes < 2.5


@pytest.mark.parametrize("name", ["channel_moments_update_", "channel_scale", "filter_spectral_norms", "stamp"])
def test_inputs_of_the_ops_are_valid(name: str) -> None:
    gpu_ops.OPS[name]("cpu")
