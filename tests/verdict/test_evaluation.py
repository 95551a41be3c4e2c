"""The fit of tables to known networks, and their evaluation with groups held out."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest

from bdprune.record import Evidence
from bdprune.verdict.evaluation import (
    Known,
    arch_groups,
    evaluate,
    family_groups,
    fit_table,
    found_above,
    held_out,
    measures,
)
from bdprune.verdict.judgement import Judgement


def seen(detector: str, score: float) -> Evidence:
    return Evidence(detector=detector, score=score, threshold=1.0, flagged=score > 1)


def network(number: int, family: str, scores: Sequence[float], arch: str = "", target: int | None = None) -> Known:
    evidence = tuple(seen(name, score) for name, score in zip(("good", "bad", "same"), (*scores, 0.5), strict=True))
    verdict = Judgement("suspicious" if scores[0] > 1 else "clean", 0.0, target, ())
    targets = frozenset({1}) if family else frozenset[int]()
    return Known(f"n{number}", arch or f"arch{number % 2}", family, targets, evidence, verdict, evidence)


def zoo() -> list[Known]:
    """``good`` is high for backdoored networks, ``bad`` is low for them, and ``same`` is equal for all."""
    clean = [network(one, "", (0.3 + 0.02 * one, 0.9 + 0.01 * one)) for one in range(12)]
    bad = [network(one, "ab"[one % 2], (1.2 + 0.05 * one, 0.4 + 0.01 * one), target=one % 3) for one in range(8)]
    return clean + bad


def test_a_higher_score_never_looks_less_suspicious() -> None:
    table = fit_table("z", "default", zoo())
    assert [one.detector for one in table.inputs] == ["good"]
    assert table.inputs[0].weight > 0 and table.agreement == 0.0
    assert (table.networks, table.backdoored, table.name, table.budget) == (20, 8, "z", "default")
    assert table.log_odds({"good": 0.5}, False) > 0 > table.log_odds({"good": -1.0}, False)


def test_clean_references_come_from_tables_without_them() -> None:
    networks = zoo()
    table = fit_table("z", "default", networks)
    assert {one.arch: len(one.log_odds) for one in table.clean} == {"arch0": 6, "arch1": 6}
    values = held_out(networks, family_groups(networks))
    assert table.clean[0].log_odds == tuple(values[:12:2])


def test_a_held_out_network_does_not_change_its_own_table() -> None:
    networks = zoo()
    groups = arch_groups(networks)
    changed = [network(0, "", (0.31, 0.9)), *networks[1:]]
    before, after = held_out(networks, groups), held_out(changed, groups)
    assert before[0] != after[0], "its own score counts"
    assert [a == b for a, b, own in zip(before, after, groups, strict=True) if own == groups[0]][1:] == [True] * 9
    assert any(a != b for a, b, own in zip(before, after, groups, strict=True) if own != groups[0])


def test_a_group_whose_rest_is_of_one_kind_has_no_value() -> None:
    networks = [network(0, "", (0.3, 1), "x"), network(1, "a", (2, 1), "y"), network(2, "a", (2, 1), "y")]
    assert all(map(math.isnan, held_out(networks, arch_groups(networks))))


def test_groups() -> None:
    networks = zoo()
    groups = family_groups(networks)
    assert groups[12:] == [0, 1] * 4, "one for each family"
    assert groups[:12] == [0, 1] * 6, "clean networks are dealt out"
    assert arch_groups(networks) == [0, 1] * 10


def test_the_share_that_is_found_above_the_clean_ones() -> None:
    truth = [False] * 4 + [True] * 4
    assert found_above([0, 1, 2, 3, 2.5, 3, 4, 5], truth, 0.0) == 0.5
    assert found_above([0, 1, 2, 3, 2.5, 3, 4, 5], truth, 0.25) == 1.0
    assert math.isnan(found_above([1.0], [True], 0.0))


def test_measures_of_a_perfect_order() -> None:
    found = measures([-3.0, -2.0, -1.0, 1.0, 2.0, math.nan], [False, False, False, True, True, False])
    assert found.auroc.value == found.found.value == 1.0
    assert math.isnan(found.error.value), "too few networks for a calibration error"
    assert math.isnan(found.found_at_1.value), "too few clean networks for 1 %"
    assert 0 < found.entropy.value < 0.3 and found.entropy.low < found.entropy.value < found.entropy.high


def test_the_calibration_error_is_measured_with_enough_networks() -> None:
    found = measures([0.0] * 200, [True, False] * 100)
    assert found.error.value == pytest.approx(0.0) and found.found_at_1.value == 0.0


def test_the_evaluation_counts_verdicts_and_labels() -> None:
    found = evaluate(zoo())
    assert found.verdicts == {"suspicious": 8} and len(found.networks) == 20 and found.backdoored == 8
    assert (found.false_suspicious.hits, found.false_suspicious.count) == (0, 12)
    assert found.false_suspicious.bound == pytest.approx(1 - 0.05 ** (1 / 12), abs=1e-6)
    assert found.labels.count == 0 and found.labels.bound == 1.0
    assert found.by_family.auroc.value == 1.0 and found.alone["good"] == (1.0, 20)
    assert found.alone["bad"] == (0.0, 20)


def test_a_table_needs_two_families() -> None:
    with pytest.raises(ValueError, match="two families"):
        fit_table("z", "default", [one for one in zoo() if one.family != "b"])


def test_several_labels_are_right_for_an_all_to_all_backdoor() -> None:
    judgement = Judgement("backdoored", 0.9, None, (), targets=(1, 2))
    assert Known("n", "a", "f, all to all", frozenset(), (), judgement, ()).label_right


def test_an_evaluation_needs_both_kinds() -> None:
    with pytest.raises(ValueError, match="clean and backdoored"):
        evaluate(zoo()[:12])


@pytest.mark.parametrize(
    ("target", "targets", "right"), [(1, {1}, True), (2, {1}, False), (None, {1}, False), (2, set(), False)]
)
def test_a_label_is_right_if_it_is_the_target(target: int | None, targets: set[int], right: bool) -> None:
    judgement = Judgement("suspicious", 0.5, target, ())
    assert Known("n", "a", "f", frozenset(targets), (), judgement, ()).label_right is right


def test_a_network_beyond_the_clean_ones_is_not_called_clean() -> None:
    clean = [network(one, "", (0.3 + 0.02 * one, 0.9)) for one in range(24)]
    bad = [network(one, "ab"[one % 2], (0.95 if one == 0 else 1.2 + 0.05 * one, 0.9), target=1) for one in range(8)]
    found = evaluate(clean + bad)
    assert bad[0].judgement.verdict == "clean" and found.verdicts == {"suspicious": 8}
    assert found.false_suspicious.hits <= 1
    few = evaluate(clean[:12] + bad)
    assert few.verdicts == {"clean": 1, "suspicious": 7}, "too few clean networks for a p-value"
