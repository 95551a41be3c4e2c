"""Zoos, scans and repairs on a GPU or its stand-in. A process gets its device at the start, so each has its own."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils import cpp_extension

CASES = sorted(Path(__file__).parent.glob("cases_*.py"))


@pytest.mark.slow
@pytest.mark.parametrize("cases", CASES, ids=lambda path: path.stem)
def test_on_a_gpu_or_what_stands_for_one(cases: Path) -> None:
    compiler = shutil.which(cpp_extension.get_cxx_compiler())
    if not torch.cuda.is_available() and not (compiler and cpp_extension.is_ninja_available()):
        pytest.skip("the device that stands for a GPU needs a C++ compiler and ninja")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:xdist", "-p", "no:cacheprovider", str(cases)]
    done = subprocess.run(command, cwd=cases.parents[2], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "skipped" not in done.stdout and "passed" in done.stdout
