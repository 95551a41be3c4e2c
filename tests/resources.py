"""Resources that some tests need and some machines lack: a GPU, real data, a browser, nvcc.

A test names its need with ``@pytest.mark.needs("cuda")`` or uses a fixture (``data_root``, ``browser``). Without the
resource the test is skipped. ``BDPRUNE_TEST_REQUIRE=cuda,data`` turns these skips into failures, for machines that must
have a resource.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NoReturn

import pytest

VARIABLE = "BDPRUNE_TEST_REQUIRE"
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")


def data_folder() -> Path:
    """Folder of the real data: ``BDPRUNE_DATA``, else ``../shared/data`` next to the repository."""
    default = Path(__file__).resolve().parents[2] / "shared" / "data"
    return Path(os.environ.get("BDPRUNE_DATA") or default)


def find_browser() -> str | None:
    """Path of the first browser on PATH that can run headless."""
    return next(filter(None, map(shutil.which, BROWSERS)), None)


def _no_cuda() -> str:
    import torch

    return "" if torch.cuda.is_available() else "torch finds no CUDA device"


def _no_data() -> str:
    return "" if data_folder().is_dir() else f"no real data at {data_folder()}; set BDPRUNE_DATA"


def _no_browser() -> str:
    return "" if find_browser() else f"none of {', '.join(BROWSERS)} is on PATH"


def _no_nvcc() -> str:
    return "" if shutil.which("nvcc") else "nvcc is not on PATH"


WHY_MISSING: Mapping[str, Callable[[], str]] = {
    "cuda": _no_cuda,
    "data": _no_data,
    "browser": _no_browser,
    "nvcc": _no_nvcc,
}
"""For every resource, a function that returns why this machine lacks it, or an empty string."""


def required() -> frozenset[str]:
    """The resources that ``BDPRUNE_TEST_REQUIRE`` lists; an unknown word is a usage error."""
    words = frozenset(filter(None, (word.strip() for word in os.environ.get(VARIABLE, "").split(","))))
    unknown = sorted(words - WHY_MISSING.keys())
    if unknown:
        raise pytest.UsageError(f"{VARIABLE}: unknown {', '.join(unknown)}; choose from {', '.join(WHY_MISSING)}")
    return words


def skip_without(resource: str, reason: str) -> NoReturn:
    """Skips the test, or fails it where ``BDPRUNE_TEST_REQUIRE`` lists the resource."""
    if resource in required():
        pytest.fail(f"{VARIABLE} lists {resource}, but {reason}", pytrace=False)
    pytest.skip(reason)


def check(resource: str) -> None:
    """Returns where this machine has the resource; skips or fails the test otherwise."""
    reason = WHY_MISSING[resource]()
    if reason:
        skip_without(resource, reason)
