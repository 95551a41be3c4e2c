"""Chooses the fastest of several variants of a computation on this machine: a short trial, whose result is stored.

A question has a name (``conv``) and variants (``kernel``, ``library``, ``grouped``), which :data:`QUESTIONS` lists. It
is answered separately for every shape, device and version of torch. Variants differ by rounding, so the answers are
stored in one file (:func:`kept_file`): later runs on this machine reuse them, and give the same bits.

``BDPRUNE_TUNE`` is ``on`` (the default), ``off`` (no trials and no stored answers: defaults run) or a list of pins such
as ``conv=kernel,stack=loop``. A pinned variant runs wherever it can, otherwise the default; other questions are
answered as with ``on``, or as with ``off`` if the list contains it.

No trial runs during a CUDA graph capture, a ``torch.compile`` trace, or if PyTorch must use deterministic algorithms.
Then the default runs, unless the answer is known (a trace does not look it up).
"""

from __future__ import annotations

import functools
import json
import os
import platform
import tempfile
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from bdprune import environment
from bdprune.errors import OptionError

QUESTIONS: Mapping[str, tuple[str, ...]] = {
    "conv": ("kernel", "library", "grouped"),
    "stack": ("stack", "loop"),
    "sweep": ("stack", "loop"),
    "precision": ("float32", "float32-nchw", "bfloat16", "bfloat16-nchw", "winograd"),
}
"""All questions with their variants; pins may name these."""

ROUNDS = 3
"""Rounds of a trial; the first pays for one-time setup."""

Run = Callable[[], object]
Timer = Callable[[Run, torch.device], float]


@dataclass(frozen=True)
class Choice:
    """The variant that runs, and why.

    Attributes:
        question: one of :data:`QUESTIONS`.
        winner: the variant.
        device: name of the device, with the other machine properties that times depend on.
        shape: the shape in the question, in words.
        seconds: shortest time of each variant; empty if there was no trial.
        reason: why there was no trial, in words.
    """

    question: str
    winner: str
    device: str
    shape: str
    seconds: Mapping[str, float] = field(default_factory=dict)
    reason: str = ""


def fastest(
    question: str,
    shape: str,
    device: torch.device,
    variants: Mapping[str, Run],
    *,
    default: str | None = None,
    worth: float = 1.0,
    timer: Timer | None = None,
) -> Choice:
    """The variant that runs ``question`` on ``shape``: pinned, or stored, or the winner of a trial.

    In a trial the variants take turns, so that other load on the machine affects all of them. The shortest of
    :data:`ROUNDS` times counts. A trial that does not fit into memory is abandoned, and its result is not stored.

    Args:
        question: one of :data:`QUESTIONS`.
        shape: everything that times depend on besides device and torch, in words; numbers that vary little from call to
            call (the last batch) should be rounded to powers of two.
        device: device of the variants.
        variants: functions that do the whole work once and change no state.
        default: variant to run if no answer is known and no trial is possible; the first variant if None.
        worth: a variant other than the default must take at most this share of the default's time.
        timer: measures the seconds of a run on a device, :func:`seconds_of` if None; tests pass their own.

    Raises:
        OptionError: BDPRUNE_TUNE has an unknown value.
    """
    default = next(iter(variants)) if default is None else default
    choice = settled(question, shape, device, variants, default)
    if choice is not None:
        return choice
    place = _place(device)
    try:
        times = least_seconds(device, ROUNDS, *variants.values(), timer=timer or seconds_of)
    except torch.OutOfMemoryError:
        return Choice(question, default, place, shape, reason="a trial does not fit into memory")
    seconds = dict(zip(variants, times, strict=True))
    best = min(seconds, key=seconds.__getitem__)
    choice = Choice(question, best if seconds[best] <= worth * seconds[default] else default, place, shape, seconds)
    _keep(choice)
    return choice


def settled(
    question: str, shape: str, device: torch.device, variants: Collection[str], default: str | None = None
) -> Choice | None:
    """The answer of :func:`fastest` without a trial, None if a trial is needed. Call it before an expensive setup.
    Takes the arguments of :func:`fastest`; the names of the variants are enough.
    """
    winner, reason = next(iter(variants)) if default is None else default, ""
    if torch.compiler.is_compiling():
        return Choice(question, winner, device.type, shape, reason="torch.compile traces")
    unknown = set(variants).difference(QUESTIONS[question])
    if unknown:
        raise ValueError(f"{question} has no variants {sorted(unknown)}: name them in QUESTIONS")
    tries, pins = _switch(environment.TUNE.get())
    place = _place(device)
    if question in pins:
        winner, reason = pins[question] if pins[question] in variants else winner, "pinned by BDPRUNE_TUNE"
    elif not tries:
        reason = "BDPRUNE_TUNE is off"
    elif len(variants) == 1:
        reason = "there is no other variant"
    else:
        kept = _known().get(_key(question, place, shape))
        if kept is not None and kept.winner in variants and kept.seconds.keys() >= set(variants):
            return kept
        reason = _objection(device)
    return Choice(question, winner, place, shape, reason=reason) if reason else None


@functools.cache
def _switch(text: str) -> tuple[bool, Mapping[str, str]]:
    """Whether trials are on, and the pins, from the value of BDPRUNE_TUNE."""
    tries, pins = True, {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        question, is_pin, variant = (word.strip() for word in part.partition("="))
        if part in ("on", "off"):
            tries = part == "on"
        elif is_pin and variant in QUESTIONS.get(question, ()):
            pins[question] = variant
        else:
            possible = "; ".join(f"{name}= {', '.join(variants)}" for name, variants in QUESTIONS.items())
            raise OptionError(
                f"Unknown part {part!r} in BDPRUNE_TUNE={text!r}.",
                f"Set it to on, off, or pins separated by commas, of these: {possible}.",
            )
    return tries, pins


def _objection(device: torch.device) -> str:
    """Why a trial would break a capture, or make results depend on it; empty if it is possible."""
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return "a CUDA graph is being captured"
    return "deterministic algorithms are required" if torch.are_deterministic_algorithms_enabled() else ""


# ------------------------------------------------------------------------------------------------- times


def seconds_of(run: Run, device: torch.device) -> float:
    """Time of one run, until ``device`` has finished it.

    With one thread on a CPU this is processor time, which depends less on other load than the wall clock.
    """
    clock = time.process_time if device.type == "cpu" and torch.get_num_threads() == 1 else time.perf_counter
    _wait(device)
    start = clock()
    run()
    _wait(device)
    return clock() - start


def least_seconds(device: torch.device, rounds: int, *runs: Run, timer: Timer = seconds_of) -> list[float]:
    """Shortest time of each run; they take turns, so that other load on the machine affects all of them."""
    times = [[timer(run, device) for run in runs] for _ in range(rounds)]
    return [min(of_one) for of_one in zip(*times, strict=True)]


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def device_name(device: torch.device) -> str:
    """The GPU's name, or the device's type."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _place(device: torch.device) -> str:
    """The device, and for a CPU its instruction set and threads: several machines may share one home folder."""
    if device.type != "cpu":
        return device_name(device)
    kind = f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}"
    return f"cpu {kind}, {torch.get_num_threads()} threads"


# ------------------------------------------------------------------------------------------------- stored choices


def kept_file() -> Path:
    """File of the stored choices: ``tuned.json`` in ``BDPRUNE_CACHE``, or in the user's cache directory."""
    return _file(environment.CACHE.get(), environment.XDG_CACHE_HOME.get())


@functools.cache
def _file(own: str, users: str) -> Path:
    return Path(own or Path(users or Path.home() / ".cache") / "bdprune") / "tuned.json"


def kept_choices() -> list[Choice]:
    """Every choice stored on this machine; none if the file is missing or cannot be parsed."""
    return list(_read().values())


def forget() -> None:
    """Drops the choices in memory, so that only the file counts; for tests and benchmarks."""
    _processes.clear()


_processes: dict[Path, dict[str, Choice]] = {}
"""The choices known to this process: the content of each file when read, and later additions."""


def _known() -> dict[str, Choice]:
    file = kept_file()
    if file not in _processes:
        _processes[file] = _read()
    return _processes[file]


def _read() -> dict[str, Choice]:
    try:
        entries = json.loads(kept_file().read_text())
    except (OSError, ValueError):
        return {}
    if not isinstance(entries, dict):
        return {}
    found = {key: _sound(entry) for key, entry in entries.items()}
    return {key: choice for key, choice in found.items() if choice is not None}


def _sound(entry: object) -> Choice | None:
    """The choice in an entry of the file, None if the entry is invalid."""
    try:
        choice = Choice(**entry)  # type: ignore[arg-type]
    except TypeError:
        return None
    texts = (choice.question, choice.winner, choice.device, choice.shape, choice.reason)
    if not all(isinstance(text, str) for text in texts) or not isinstance(choice.seconds, dict):
        return None
    variants = QUESTIONS.get(choice.question, ())
    timed = all(name in variants and isinstance(value, float) for name, value in choice.seconds.items())
    return choice if timed and choice.winner in choice.seconds else None


def _keep(choice: Choice) -> None:
    """Stores one more choice; the file is replaced in one move. If it cannot be written, only this process knows it."""
    key, target = _key(choice.question, choice.device, choice.shape), kept_file()
    _known()[key] = choice
    entries = {name: asdict(one) for name, one in {**_read(), key: choice}.items()}
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=target.parent, suffix=".json", delete=False) as file:
            json.dump(entries, file, indent=2)
        os.replace(file.name, target)
    except OSError:
        return


def _key(question: str, place: str, shape: str) -> str:
    return f"{question}; {place}; torch {torch.__version__}; {shape}"
