"""The comparison of the rule that chooses between Winograd's and direct convolutions."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from bench import winograd_rule
from bench.winograd_rule import Outcome, outcomes, shapes, summary


def outcome(direct: float, winograd: float, rule: bool) -> Outcome:
    return Outcome((1, 16, 8, 8), 16, False, direct, winograd, rule)


@pytest.mark.parametrize(("rule", "cost"), [(True, 1.0), (False, 3.0)])
def test_the_cost_of_a_choice(rule: bool, cost: float) -> None:
    one = outcome(3.0, 1.0, rule)
    assert (one.speedup, one.cost) == (3.0, cost)


def test_the_summary_counts_wrong_choices() -> None:
    text = summary([outcome(3.0, 1.0, False), outcome(3.0, 1.0, True), outcome(1.0, 3.0, False)])
    assert "geometric mean 1.442, above 1.1 in 1, at worst 3.00" in text
    assert "direct: 2.080; always Winograd's: 1.442" in text


def test_shapes_stay_within_their_size() -> None:
    found = list(shapes([1, 128], [8, 512], [4, 32]))
    assert (128, 512, 512, 32) not in found and (1, 512, 512, 32) in found
    assert (1, 3, 512, 4) in found


def test_both_algorithms_are_timed_with_and_without_gradients() -> None:
    found = outcomes(2, 16, 16, 8, rounds=1)
    assert [one.gradients for one in found] == [False, True]
    assert all(one.direct > 0 and one.winograd > 0 and one.rule for one in found)


def test_the_command_writes_its_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    record = tmp_path / "rule.json"
    options = ["--batches", "1", "--channels", "8", "--sizes", "4", "--rounds", "1", "--json", str(record)]
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)  # the other tests keep theirs
    monkeypatch.setattr("sys.argv", ["winograd_rule", *options])
    winograd_rule.main()
    assert "4 timings" in capsys.readouterr().out
    assert '"rule": false' in record.read_text()
