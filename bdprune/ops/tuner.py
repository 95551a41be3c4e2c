"""Which of several ways to compute the same thing is fastest here: a short trial, whose outcome is kept.

A question has a name (``conv``) and variants (``kernel``, ``library``, ``grouped``), which :data:`QUESTIONS` lists, and
is asked anew for every shape, device and version of torch. Variants differ by rounding, so the outcomes are kept in one
file (:func:`kept_file`): later runs on this machine go by them, and give the same bits.

``BDPRUNE_TUNE`` chooses: ``on`` (the default), ``off`` (nothing is tried or looked up, defaults run) or pins such as
``conv=kernel,stack=loop``: that variant runs wherever it can, the default elsewhere, and other questions are as with
``on``, or with ``off`` where that is listed too.

There is no trial while a CUDA graph is captured, while ``torch.compile`` traces, and where PyTorch is asked for
deterministic algorithms: then the default runs, unless the question has been answered before (the trace looks nothing
up).
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

from bdprune.errors import OptionError

QUESTIONS: Mapping[str, tuple[str, ...]] = {
    "conv": ("kernel", "library", "grouped"),
    "stack": ("stack", "loop"),
    "sweep": ("stack", "loop"),
    "precision": ("float32", "float32-nchw", "bfloat16", "bfloat16-nchw", "winograd"),
}
"""Everything that is tried anywhere in bdprune, with its variants: what pins may name."""

ROUNDS = 3
"""Of a trial; the first pays for what is set up once."""

Run = Callable[[], object]
Timer = Callable[[Run, torch.device], float]


@dataclass(frozen=True)
class Choice:
    """The variant that runs, and why.

    Attributes:
        question: one of :data:`QUESTIONS`.
        winner: the variant.
        device: name of the device, with what else of the machine times depend on.
        shape: what was asked about, in words.
        seconds: least seconds of one run of each variant; empty where there was no trial.
        reason: in words, where there was no trial.
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
    """The variant that runs ``question`` on ``shape``: pinned, or kept from before, or the winner of a trial.

    In a trial the variants take turns, so that a busy machine hurts them alike, and the least of :data:`ROUNDS` times
    counts. A trial that does not fit into memory is none, and is not kept.

    Args:
        question: one of :data:`QUESTIONS`.
        shape: in words, all that the times depend on but for device and torch; numbers that vary little from call to
            call (the last batch) should be rounded to powers of two.
        device: what the variants run on.
        variants: each does the whole work once, and leaves everything as it found it.
        default: what runs where nothing is known and nothing can be tried; the first variant if None.
        worth: a variant other than the default must take at most this share of the default's time.
        timer: seconds of a run on a device, :func:`seconds_of` if None; tests bring their own.

    Raises:
        OptionError: BDPRUNE_TUNE names what is unknown.
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
    """What :func:`fastest` says without a trial, None where it would run one: to be asked before what is costly to set
    up. The arguments are those of :func:`fastest`; of the variants the names are enough.
    """
    winner, reason = next(iter(variants)) if default is None else default, ""
    if torch.compiler.is_compiling():
        return Choice(question, winner, device.type, shape, reason="torch.compile traces")
    unknown = set(variants).difference(QUESTIONS[question])
    if unknown:
        raise ValueError(f"{question} has no variants {sorted(unknown)}: name them in QUESTIONS")
    tries, pins = _switch(os.environ.get("BDPRUNE_TUNE", ""))
    place = _place(device)
    if question in pins:
        winner, reason = pins[question] if pins[question] in variants else winner, "BDPRUNE_TUNE says so"
    elif not tries:
        reason = "BDPRUNE_TUNE is off"
    elif len(variants) == 1:
        reason = "there is no other way"
    else:
        kept = _known().get(_key(question, place, shape))
        if kept is not None and kept.winner in variants and kept.seconds.keys() >= set(variants):
            return kept
        reason = _objection(device)
    return Choice(question, winner, place, shape, reason=reason) if reason else None


@functools.cache
def _switch(text: str) -> tuple[bool, Mapping[str, str]]:
    """Whether anything is tried, and the pins, by the value of BDPRUNE_TUNE."""
    tries, pins = True, {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        question, is_pin, variant = (word.strip() for word in part.partition("="))
        if part in ("on", "off"):
            tries = part == "on"
        elif is_pin and variant in QUESTIONS.get(question, ()):
            pins[question] = variant
        else:
            possible = "; ".join(f"{name}= {', '.join(ways)}" for name, ways in QUESTIONS.items())
            raise OptionError(
                f"BDPRUNE_TUNE is {text!r}, where {part!r} is unknown.",
                f"Set it to on, off, or pins with commas between them, of these: {possible}.",
            )
    return tries, pins


def _objection(device: torch.device) -> str:
    """Why a trial would break a capture, or make results depend on it; empty where it would not."""
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return "a CUDA graph is captured"
    return "deterministic algorithms are wanted" if torch.are_deterministic_algorithms_enabled() else ""


# ------------------------------------------------------------------------------------------------- times


def seconds_of(run: Run, device: torch.device) -> float:
    """Time of one run, until ``device`` is done with it.

    With one thread on a CPU it is processor time, which a busy machine stretches less than the wall clock.
    """
    clock = time.process_time if device.type == "cpu" and torch.get_num_threads() == 1 else time.perf_counter
    _wait(device)
    start = clock()
    run()
    _wait(device)
    return clock() - start


def least_seconds(device: torch.device, rounds: int, *runs: Run, timer: Timer = seconds_of) -> list[float]:
    """Least seconds of each run; they take turns, so that a busy machine hurts them alike."""
    times = [[timer(run, device) for run in runs] for _ in range(rounds)]
    return [min(of_one) for of_one in zip(*times, strict=True)]


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def device_name(device: torch.device) -> str:
    """The GPU's own name, or the device's type."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _place(device: torch.device) -> str:
    """The device, and of a CPU the instruction set and the threads: one home may serve several machines."""
    if device.type != "cpu":
        return device_name(device)
    kind = f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}"
    return f"cpu {kind}, {torch.get_num_threads()} threads"


# ------------------------------------------------------------------------------------------------- what is kept


def kept_file() -> Path:
    """Where choices are kept: ``tuned.json`` in ``BDPRUNE_CACHE``, else in the user's cache directory."""
    return _file(os.environ.get("BDPRUNE_CACHE", ""), os.environ.get("XDG_CACHE_HOME", ""))


@functools.cache
def _file(own: str, users: str) -> Path:
    return Path(own or Path(users or Path.home() / ".cache") / "bdprune") / "tuned.json"


def kept_choices() -> list[Choice]:
    """Every choice that is kept on this machine; none where the file is missing or not ours to understand."""
    return list(_read().values())


def forget() -> None:
    """Starts like another process, which goes by the file alone."""
    _processes.clear()


_processes: dict[Path, dict[str, Choice]] = {}
"""What this process goes by: each file as it found it, and what it has added since."""


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
    """The choice that an entry of the file is, None where it is none."""
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
    """Keeps one more; the file is put in place in one move. Where none can be written, this process remembers it."""
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
