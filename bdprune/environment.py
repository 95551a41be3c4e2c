"""The environment variables that bdprune reads: while it runs, while it is built, and in its tests.

This is the one place that declares them. The package reads its own through :meth:`Variable.get`; ``setup.py`` and the
C++ code cannot import the package, so they use the names. ``docs/reference/environment.md`` is generated from here, and
``tests/docs`` fails where a source file uses a ``BDPRUNE_`` name that is not declared.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Variable:
    """One environment variable.

    Attributes:
        name: as in the environment.
        use: when it is read: while bdprune runs, while it is built, or in its tests.
        values: what it may be set to, in Markdown.
        default: the value that an unset or empty variable stands for; empty where no single value does.
        meaning: what it does, in Markdown, in one or more sentences.
    """

    name: str
    use: Literal["run", "build", "test"]
    values: str
    default: str
    meaning: str

    def get(self) -> str:
        """Its value in the environment, or the default where it is unset or empty."""
        return os.environ.get(self.name) or self.default


BACKEND = Variable(
    "BDPRUNE_BACKEND",
    "run",
    "`auto`, `native`, `reference`",
    "auto",
    "Which implementation of the ops runs. `auto` takes the compiled ops where they load and plain PyTorch elsewhere. "
    "`reference` always takes plain PyTorch. `native` raises an error instead of falling back. It is read once, when "
    "the ops are first imported.",
)
CACHE = Variable(
    "BDPRUNE_CACHE",
    "run",
    "a folder",
    "",
    "Where the outcomes of speed trials are kept, as `tuned.json`. By default that is `bdprune` in `XDG_CACHE_HOME`, "
    "or in `~/.cache`. `bdprune doctor --paths` shows the file.",
)
TUNE = Variable(
    "BDPRUNE_TUNE",
    "run",
    "`on`, `off`, or pins such as `conv=kernel,stack=loop`",
    "on",
    "Whether short trials choose the fastest variant of a computation. `off` runs the default variants: nothing is "
    "tried or looked up. A pin runs that variant wherever it can run. Values are separated by commas.",
)
GRAPHS = Variable(
    "BDPRUNE_GRAPHS",
    "run",
    "`0`, `1`",
    "1",
    "Whether training steps on a GPU are recorded as CUDA graphs. `0` runs every step as it is written.",
)
ISA = Variable(
    "BDPRUNE_ISA",
    "run",
    "`baseline`, `avx2`, `avx512`",
    "",
    "Limits the instruction set of the compiled CPU ops, for tests and comparisons. By default they use the best that "
    "the CPU has, and a larger value changes nothing. It is read once.",
)
CUDA_VISIBLE_DEVICES = Variable(
    "CUDA_VISIBLE_DEVICES",
    "run",
    "numbers or names of GPUs, separated by commas",
    "",
    "The GPUs that bdprune uses, by default all. With several processes (`--workers`), each gets one of them, in this "
    "order.",
)
RAY_USAGE_STATS_ENABLED = Variable(
    "RAY_USAGE_STATS_ENABLED",
    "run",
    "`0`, `1`",
    "0",
    "Whether Ray reports statistics of its use to its makers, if bdprune starts it. Ray's own default is `1`.",
)
NO_COLOR = Variable("NO_COLOR", "run", "any text", "", "Where it is set, `bdprune` prints no colours.")
XDG_CACHE_HOME = Variable(
    "XDG_CACHE_HOME",
    "run",
    "a folder",
    "",
    "The user's cache, where `BDPRUNE_CACHE` is unset. By default `~/.cache`.",
)
NO_NATIVE = Variable(
    "BDPRUNE_NO_NATIVE", "build", "`0`, `1`", "0", "`1` installs pure Python: every op then runs on plain PyTorch."
)
SANITIZE = Variable(
    "BDPRUNE_SANITIZE",
    "build",
    "such as `address,undefined`",
    "",
    "Sanitizers for the C++ code; the value goes to the compiler's `-fsanitize=`.",
)
FORCE_CUDA = Variable(
    "FORCE_CUDA",
    "build",
    "`0`, `1`",
    "",
    "Whether the CUDA ops are built. By default they are where torch is a CUDA build and `nvcc` is found.",
)
TORCH_CUDA_ARCH_LIST = Variable(
    "TORCH_CUDA_ARCH_LIST", "build", "such as `9.0`", "8.0;9.0", "CUDA architectures that the CUDA ops are built for."
)
CUDA_HOME = Variable(
    "CUDA_HOME",
    "build",
    "a folder",
    "",
    "The CUDA toolkit. Set it where the `nvcc` on `PATH` is not in the toolkit's folder: the linker does not find "
    "`-lcudart` then. By default it is the folder of that `nvcc`.",
)
DEBUG = Variable("DEBUG", "build", "`0`, `1`", "0", "`1` builds with `-O0 -g` and with assertions.")
MAX_JOBS = Variable(
    "MAX_JOBS", "build", "a number", "", "How many files are compiled at once. By default `ninja` decides."
)
DATA = Variable(
    "BDPRUNE_DATA",
    "test",
    "a folder",
    "",
    "Real data sets for the tests that need them, such as `cifar10/train.parquet`. By default it is `shared/data` "
    "beside the folder of the repository. Without it these tests are skipped.",
)
TEST_REQUIRE = Variable(
    "BDPRUNE_TEST_REQUIRE",
    "test",
    "`cuda`, `data`, `browser`, `nvcc`, separated by commas",
    "",
    "What this machine has: a test that is skipped because one of these is missing fails instead.",
)
WHEEL = Variable(
    "BDPRUNE_WHEEL",
    "test",
    "a file",
    "",
    "The wheel that is tested; `make wheel` sets it. By default the tests pack the modules that are built in place.",
)

VARIABLES: tuple[Variable, ...] = (
    BACKEND,
    CACHE,
    TUNE,
    GRAPHS,
    ISA,
    CUDA_VISIBLE_DEVICES,
    RAY_USAGE_STATS_ENABLED,
    NO_COLOR,
    XDG_CACHE_HOME,
    NO_NATIVE,
    SANITIZE,
    FORCE_CUDA,
    TORCH_CUDA_ARCH_LIST,
    CUDA_HOME,
    DEBUG,
    MAX_JOBS,
    DATA,
    TEST_REQUIRE,
    WHEEL,
)
"""All of them, in the order of the documents."""
