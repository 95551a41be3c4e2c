"""Zoos, scans and repairs on a GPU or its stand-in, in a new process: it must have the device from its start."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils import cpp_extension

CASES = sorted(Path(__file__).parent.glob("cases_*.py"))


@pytest.mark.slow
def test_all_cases_pass_on_a_gpu_or_its_stand_in() -> None:
    """One process runs all files: each start of torch costs seconds."""
    compiler = shutil.which(cpp_extension.get_cxx_compiler())
    if not torch.cuda.is_available() and not (compiler and cpp_extension.is_ninja_available()):
        pytest.skip("the device that stands for a GPU needs a C++ compiler and ninja")
    command = [sys.executable, "-m", "pytest", "-v", "-p", "no:xdist", "-p", "no:cacheprovider", *map(str, CASES)]
    done = subprocess.run(command, cwd=CASES[0].parents[2], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "skipped" not in done.stdout
    assert {Path(name).name for name in re.findall(r"^(\S+)::\S.* PASSED", done.stdout, re.M)} == {
        path.name for path in CASES
    }
