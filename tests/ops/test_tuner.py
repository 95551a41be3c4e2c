"""The tuner: trials run once, results are stored, the environment can fix the choice, some contexts allow no trial."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from bdprune.errors import OptionError
from bdprune.ops import Choice, fastest, kept_choices, kept_file, settled, tuner

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _untuned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("BDPRUNE_TUNE", raising=False)


class Question:
    """Variants that record their runs, and a timer that returns the seconds of each."""

    def __init__(self, **seconds: float) -> None:
        self.seconds = seconds
        self.ran: list[str] = []

    def __call__(
        self, shape: str = "8 x 8", *, question: str = "conv", default: str | None = None, worth: float = 1.0
    ) -> Choice:
        variants = {name: self._variant(name) for name in self.seconds}
        return fastest(question, shape, CPU, variants, default=default, worth=worth, timer=self._time)

    def _variant(self, name: str) -> Callable[[], object]:
        return lambda: self.ran.append(name)

    def _time(self, run: Callable[[], object], device: torch.device) -> float:
        run()
        return self.seconds[self.ran[-1]] + 0.1 * (len(self.ran) <= len(self.seconds))


def test_variants_take_turns_and_the_winner_is_kept() -> None:
    ask = Question(kernel=2.0, library=1.0)
    choice = ask()
    assert ask.ran == ["kernel", "library"] * tuner.ROUNDS
    assert choice.winner == "library" and choice.seconds == {"kernel": 2.0, "library": 1.0} and not choice.reason
    assert ask() == choice and len(ask.ran) == 2 * tuner.ROUNDS
    tuner.forget()  # as in another process
    later = Question(kernel=0.1, library=1.0)
    assert later() == choice and later.ran == []
    assert kept_choices() == [choice] and list(kept_file().parent.iterdir()) == [kept_file()]
    assert kept_file().name == "tuned.json"


@pytest.mark.parametrize(("seconds", "winner"), [(0.8, "stack"), (0.9, "stack"), (0.95, "loop")])
def test_the_default_runs_unless_the_winner_is_clearly_faster(seconds: float, winner: str) -> None:
    assert Question(stack=seconds, loop=1.0)(question="stack", default="loop", worth=0.9).winner == winner


def test_questions_shapes_and_threads_are_tried_separately(monkeypatch: pytest.MonkeyPatch) -> None:
    ask = Question(stack=1.0, loop=2.0)
    ask("a", question="stack")
    ask("b", question="stack")
    ask("a", question="sweep")
    monkeypatch.setattr(torch, "get_num_threads", lambda: 77)
    ask("a", question="stack")
    assert len(ask.ran) == 4 * 2 * tuner.ROUNDS
    assert {(one.question, one.shape) for one in kept_choices()} == {("stack", "a"), ("stack", "b"), ("sweep", "a")}


def test_a_new_variant_causes_a_new_trial() -> None:
    assert Question(kernel=2.0, library=1.0)().winner == "library"
    assert Question(kernel=2.0, library=1.0, grouped=0.5)().winner == "grouped"
    fewer = Question(kernel=2.0, grouped=0.5)
    assert fewer().winner == "grouped" and fewer.ran == []
    assert Question(kernel=2.0, library=1.0)().winner == "library", "the stored winner is not a variant here"


def test_settled_reports_whether_a_trial_is_needed() -> None:
    names = ("kernel", "library")
    assert settled("conv", "8 x 8", CPU, names) is None
    choice = Question(kernel=2.0, library=1.0)()
    assert settled("conv", "8 x 8", CPU, names) == choice
    alone = settled("conv", "8 x 8", CPU, ("kernel",))
    assert alone is not None and (alone.winner, alone.reason) == ("kernel", "there is no other variant")


def test_the_environment_fixes_the_variant(monkeypatch: pytest.MonkeyPatch) -> None:
    ask = Question(kernel=1.0, library=2.0)
    monkeypatch.setenv("BDPRUNE_TUNE", "stack=loop, conv=library")
    assert ask().winner == "library"
    monkeypatch.setenv("BDPRUNE_TUNE", "conv=grouped")
    assert ask().winner == "kernel" and ask(default="library").winner == "library", "the variant does not exist here"
    assert ask.ran == [] and not kept_choices()
    assert Question(stack=1.0, loop=2.0)(question="stack").winner == "stack", "other questions are still tried"
    monkeypatch.setenv("BDPRUNE_TUNE", "off,conv=library")
    assert ask().winner == "library" and ask("new", question="conv").winner == "library" and ask.ran == []


@pytest.mark.parametrize("text", ["off", " off ", "on,off"])
def test_off_runs_defaults_despite_stored_trials(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ask = Question(kernel=2.0, library=1.0)
    assert ask().winner == "library"
    monkeypatch.setenv("BDPRUNE_TUNE", text)
    assert (ask().winner, ask().reason) == ("kernel", "BDPRUNE_TUNE is off")
    monkeypatch.setenv("BDPRUNE_TUNE", "on")
    assert ask().winner == "library"


@pytest.mark.parametrize("text", ["fast", "conv", "conv=fast", "convs=kernel", "on,stack=kernel", "conv=kernel=loop"])
def test_unknown_words_are_named(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BDPRUNE_TUNE", text)
    with pytest.raises(OptionError, match=r"Unknown part '.*' in BDPRUNE_TUNE=") as raised:
        Question(kernel=1.0, library=2.0)()
    assert "stack= stack, loop" in raised.value.hint


def test_a_variant_that_the_environment_cannot_name_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"conv has no variants \['fft'\]"):
        Question(kernel=1.0, fft=2.0)()


@pytest.mark.parametrize("why", ["capture", "deterministic", "compile"])
def test_harmful_trials_do_not_run(why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ask = Question(kernel=2.0, library=1.0)
    with monkeypatch.context() as patch:
        if why == "capture":
            patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
            assert tuner._objection(torch.device("cuda")) == "a CUDA graph is being captured"
            patch.setattr(tuner, "_objection", lambda device: "a CUDA graph is being captured")
        elif why == "deterministic":
            patch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
        else:
            patch.setattr(torch.compiler, "is_compiling", lambda: True)
        choice = ask()
        assert choice.winner == "kernel" and choice.reason and ask.ran == [] and not kept_choices()
    assert ask().winner == "library"
    with monkeypatch.context() as patch:
        patch.setattr(tuner, "_objection", lambda device: "a CUDA graph is being captured")
        assert ask().winner == "library", "the stored choice is used"


def test_a_trial_without_enough_memory_gives_the_default() -> None:
    def broken() -> None:
        raise torch.OutOfMemoryError("full")

    choice = fastest("conv", "8 x 8", CPU, {"kernel": broken, "library": broken})
    assert choice.winner == "kernel" and "memory" in choice.reason and not kept_choices()


@pytest.mark.parametrize("text", ["", "[]", "{", '{"a": 1}', '{"a": {"winner": "kernel"}}', '{"a": [1, 2]}'])
def test_an_invalid_file_is_ignored(text: str) -> None:
    kept_file().write_text(text)
    ask = Question(kernel=1.0, library=2.0)
    assert ask().winner == "kernel" and len(ask.ran) == 2 * tuner.ROUNDS
    assert len(json.loads(kept_file().read_text())) == 1


@pytest.mark.parametrize(
    "change",
    [
        {"winner": "kernels"},
        {"winner": "grouped"},
        {"question": "convs"},
        {"question": ["conv"]},
        {"seconds": {"kernel": "1"}},
        {"seconds": [1.0]},
        {"shape": 8},
        {"more": 1},
    ],
    ids=str,
)
def test_invalid_entries_are_ignored_and_valid_ones_kept(change: dict[str, object]) -> None:
    choice = Question(kernel=1.0, library=2.0)()
    entries = json.loads(kept_file().read_text())
    kept_file().write_text(json.dumps({**entries, "other": {**next(iter(entries.values())), **change}}))
    assert kept_choices() == [choice]


def test_processes_add_to_one_file() -> None:
    Question(kernel=1.0, library=2.0)("a")
    ours = dict(tuner._known())
    tuner.forget()
    Question(kernel=1.0, library=2.0)("b")
    tuner._processes[kept_file()] = ours  # a process that has not read b
    Question(kernel=1.0, library=2.0)("c")
    assert {one.shape for one in kept_choices()} == {"a", "b", "c"}


def test_a_machine_without_a_writable_cache_stores_no_trials(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    monkeypatch.setenv("BDPRUNE_CACHE", str(blocked / "below"))
    ask = Question(kernel=1.0, library=2.0)
    assert ask() == ask() and len(ask.ran) == 2 * tuner.ROUNDS


def test_the_file_is_in_the_cache_of_the_user(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("BDPRUNE_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert kept_file() == tmp_path / "bdprune" / "tuned.json"


def test_seconds_of_times_a_run() -> None:
    seconds = tuner.seconds_of(lambda: sum(range(100_000)), CPU)
    assert 0 < seconds < 60
