import time
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from bdprune.analysis import Case
from bdprune.data.clean import CleanData
from bdprune.detectors.unlearning import UnlearningDetector
from bdprune.errors import BudgetError, DataError, TrainingError
from bdprune.loops.unlearning import Unlearned, UnlearnSettings, UnlearnStep
from bdprune.methods import examine_stack
from bdprune.model.handle import Model
from bdprune.record import Evidence
from bdprune.runtime import Budget
from bdprune.runtime.precision import Plan

SETTINGS = UnlearnSettings(lr=0.05, weight_decay=0, batch_size=30, padding=0, max_epochs=40)
QUICK = UnlearnSettings(lr=0.1, weight_decay=0, batch_size=60, padding=1, max_epochs=3)


def unlearned(model: Any, *wrong: tuple[int, ...], each: int = 10) -> Unlearned:
    """A run with one step per tuple of wrong votes, and ``each`` images of every label per step."""
    steps = tuple(UnlearnStep(2.0, 0.1, votes, votes, (each,) * len(votes)) for votes in wrong)
    return Unlearned(model, steps, len(steps), 0.01, True)


def test_flags_one_sink_label_in_the_middle_of_the_steps(bright: Any) -> None:
    run = unlearned(bright.model, (20, 0, 0), (1, 18, 2), (0, 16, 2), (0, 0, 20))
    evidence = UnlearningDetector(threshold=0.5, two_class_threshold=0.5).read([run], 30)
    assert evidence.flagged
    assert evidence.score == pytest.approx(34 / 40 - 4 / 40)
    assert evidence.details["final_label"] == 1
    assert evidence.label_scores == pytest.approx([1 / 40, 34 / 40, 4 / 40])
    assert evidence.details["flip_shares"] == pytest.approx([1 / 40, 34 / 40, 4 / 40])


def test_spread_out_votes_are_not_flagged(bright: Any) -> None:
    evidence = UnlearningDetector(threshold=0.2).read([unlearned(bright.model, (9, 7, 8))], 30)
    assert not evidence.flagged
    assert evidence.score == pytest.approx(1 / 20)


def test_lead_is_the_mean_over_runs_with_its_standard_error(bright: Any) -> None:
    # Leads of label 1 over label 2, which has the second highest mean: 14, 10 and -2 of 20 images of other classes.
    runs = [unlearned(bright.model, votes) for votes in ((0, 16, 2), (5, 14, 4), (0, 8, 10))]
    evidence = UnlearningDetector().read(runs, 30)
    assert evidence.details["leads"] == pytest.approx([0.7, 0.5, -0.1])
    assert evidence.score == pytest.approx(1.1 / 3)
    # Deviations from 11/30: 10/30, 4/30, -14/30; their squares sum to 312/900; over 2 and over 3 runs.
    assert evidence.details["standard_error"] == pytest.approx((312 / 900 / 2 / 3) ** 0.5)
    assert evidence.details["runs"] == 3 and evidence.details["images"] == 30
    assert UnlearningDetector().read(runs[:1], 30).details["standard_error"] is None


def test_a_label_must_lead_in_both_halves_to_be_named(bright: Any) -> None:
    late = unlearned(bright.model, (9, 1, 1), (9, 8, 1), (0, 18, 2), (0, 18, 2))
    early = replace(late, trajectory=late.trajectory[::-1])
    steady = unlearned(bright.model, *[(0, 18, 2)] * 4)
    detector = UnlearningDetector(two_class_threshold=0.2)
    for run, label in ((late, None), (early, None), (steady, 1)):
        evidence = detector.read([run], 500)
        assert evidence.flagged and evidence.details["final_label"] == 1
        assert evidence.target_label == label


def test_a_network_that_forgets_slowly_has_no_named_label(bright: Any) -> None:
    steps = unlearned(bright.model, *[(0, 18, 2)] * 12)
    for within, label in ((12, 1), (11, None)):
        evidence = UnlearningDetector(named_within=within).read([steps], 500)
        assert evidence.flagged
        assert evidence.target_label == label


def test_threshold_falls_from_two_classes_to_ten(bright: Any) -> None:
    detector = UnlearningDetector(threshold=0.1, two_class_threshold=0.5)
    for classes, threshold in ((2, 0.5), (3, 0.45), (6, 0.3), (10, 0.1), (43, 0.1)):
        evidence = detector.read([unlearned(bright.model, (7, *(0,) * (classes - 1)))], 500)
        assert evidence.threshold == pytest.approx(threshold)


class Scripted:
    """Replaces ``unlearn``: returns the given runs one after another, and records the seeds."""

    def __init__(self, *runs: Unlearned) -> None:
        self.runs, self.seeds = list(runs), list[int]()

    def __call__(self, model: Any, data: Any, settings: Any, seed: int, *more: Any) -> Unlearned:
        self.seeds.append(seed)
        return self.runs[min(len(self.seeds), len(self.runs)) - 1]


@pytest.mark.parametrize(
    ("leads", "runs", "near"),
    [
        ((0.31,), 1, False),  # further than 0.1 above the threshold of 0.2
        ((0.09,), 1, False),
        ((0.25, 0.35), 2, False),  # mean 0.3, further than 0.1 / sqrt(2)
        ((0.25, 0.2, 0.22), 7, True),  # the mean stays within 0.03, and 0.1 / sqrt(7) is 0.038
    ],
)
def test_runs_are_repeated_while_the_lead_is_near_the_threshold(
    bright: Any, monkeypatch: pytest.MonkeyPatch, leads: tuple[float, ...], runs: int, near: bool
) -> None:
    # With 10 classes of 100 images per step, 900 images have another label than 3.
    votes = [(0, 0, 0, round(900 * lead), *(0,) * 6) for lead in leads]
    script = Scripted(*(unlearned(bright.model, one, each=100) for one in votes))
    monkeypatch.setattr("bdprune.analysis.unlearned.unlearn", script)
    data = CleanData(torch.rand(500, 3, 8, 8), torch.arange(500) % 3)
    evidence = UnlearningDetector(threshold=0.2, margin=0.1, max_runs=7, seed=5)(Case(bright.model, data))
    assert (evidence.details["runs"], evidence.details["near"]) == (runs, near)
    assert script.seeds[0] == 5 and len(set(script.seeds)) == runs


def test_fewer_images_need_a_larger_distance(bright: Any) -> None:
    run = unlearned(bright.model, (27, *(0,) * 9))  # a lead of 27/90 = 0.3
    detector = UnlearningDetector(threshold=0.15, margin=0.1)
    assert not detector.read([run], 500).details["near"]
    assert not detector.read([run], 2000).details["near"]
    assert detector.read([run], 125).details["near"]  # within 0.2


def test_flagged_run_whose_halves_disagree_is_repeated(bright: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    script = Scripted(unlearned(bright.model, (9, 1, 1), (0, 18, 2)), unlearned(bright.model, (0, 18, 2), (0, 18, 2)))
    monkeypatch.setattr("bdprune.analysis.unlearned.unlearn", script)
    data = CleanData(torch.rand(500, 3, 8, 8), torch.arange(500) % 3)
    evidence = UnlearningDetector(two_class_threshold=0.1, threshold=0.1)(Case(bright.model, data))
    assert evidence.details["runs"] == 2 and evidence.target_label == 1


def test_few_images_need_at_least_three_runs(bright: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bdprune.analysis.unlearned.unlearn", Scripted(unlearned(bright.model, (0, 18, 2))))
    for images, runs in ((299, 3), (300, 1)):
        data = CleanData(torch.rand(images, 3, 8, 8), torch.arange(images) % 3)
        details = UnlearningDetector(margin=0)(Case(bright.model, data)).details
        assert details["runs"] == runs and (details["standard_error"] is None) == (runs == 1)


def shuffled(data: CleanData) -> CleanData:
    return data.subset(torch.randperm(len(data), generator=torch.Generator().manual_seed(9)))


def test_the_order_of_the_images_does_not_matter(bright: Any) -> None:
    detector = UnlearningDetector(QUICK, max_runs=2, margin=1)
    one, two = (detector(Case(bright.model, data)) for data in (bright.data, shuffled(bright.data)))
    assert one.details == two.details and one.score == two.score
    assert one.details["runs"] == 2


def test_sorting_by_content_keeps_labels_with_their_images(bright: Any) -> None:
    one, two = bright.data.by_content, shuffled(bright.data).by_content
    assert torch.equal(one.images, two.images) and torch.equal(one.labels, two.labels)
    # The brightness of an image is its label.
    assert torch.equal((one.images.mean((1, 2, 3)) / 0.35 - 0.2).round().long(), one.labels)


def test_a_stack_gives_the_evidence_of_separate_runs(bright: Any) -> None:
    other = bright.model.clone()
    with torch.no_grad():
        other.network[-1].bias.add_(torch.tensor([0.5, 0.0, -0.5]))
    detector = UnlearningDetector(QUICK, threshold=0.3, two_class_threshold=0.3, margin=0.1, max_runs=3)
    alone = [detector(Case(model, bright.data)) for model in (bright.model, other)]
    cases = [Case(model, shuffled(bright.data)) for model in (bright.model, other)]
    for mine, its in zip(examine_stack(detector, cases), alone, strict=True):
        assert isinstance(mine, Evidence)
        assert mine.details["runs"] == its.details["runs"]
        assert mine.details["leads"] == pytest.approx(its.details["leads"], abs=1e-3)


def test_a_model_that_fails_in_a_later_run_does_not_stop_the_others(
    bright: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    near = unlearned(bright.model, (7, 3, 1))
    rounds: list[list[Unlearned | TrainingError]] = [[near, near], [TrainingError("Not finite.", ""), near], [near]]

    def failing_stack(models: list[Any], *_: Any) -> list[Unlearned | TrainingError]:
        outcomes = rounds.pop(0)
        assert len(models) == len(outcomes)
        return outcomes

    monkeypatch.setattr("bdprune.analysis.unlearned.unlearn_stack", failing_stack)
    detector = UnlearningDetector(two_class_threshold=0.2, threshold=0.2, margin=9, max_runs=3)
    broken, fine = examine_stack(detector, [Case(bright.model, bright.data) for _ in range(2)])
    assert isinstance(broken, TrainingError)
    assert isinstance(fine, Evidence) and fine.details["runs"] == 3


def test_an_idle_norm_before_the_head_changes_no_bit(bright: Any) -> None:
    norm = nn.BatchNorm1d(12).eval()
    norm.running_var.fill_(1 - norm.eps)  # type: ignore[union-attr]
    layers = list(bright.model.network)
    necked = Model(nn.Sequential(*layers[:-1], norm, layers[-1]).eval(), "necked", 3, (3, 8, 8))
    one, two = (UnlearningDetector(SETTINGS, max_runs=1)(Case(model, bright.data)) for model in (bright.model, necked))
    assert one.details == two.details


def test_precision_reaches_the_ascent(bright: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def plan_for(precision: str, module: object, images: object) -> Plan:
        asked.append(precision)
        return Plan()

    monkeypatch.setattr("bdprune.loops.unlearning.plan_for", plan_for)
    evidence = UnlearningDetector(SETTINGS, precision="auto", max_runs=1)(Case(bright.model, bright.data))
    assert asked and set(asked) == {"auto"} and evidence.params["precision"] == "auto"
    assert UnlearningDetector().precision == "winograd"


def test_the_evidence_records_how_a_network_was_tested(bright: Any) -> None:
    evidence = UnlearningDetector(SETTINGS, seed=3, max_runs=1)(Case(bright.model, bright.data))
    assert evidence.detector == "bdprune.unlearning"
    assert 0 < evidence.score <= 1
    assert evidence.params["seed"] == 3
    assert evidence.params["unlearning"]["lr"] == 0.05
    assert evidence.details["batch_norms"] == 2
    steps = evidence.details["trajectory"]
    assert steps[0]["accuracy"] > steps[-1]["accuracy"]
    assert all(sum(step["votes"]) == 30 for step in steps)


def test_too_few_images_are_an_error(bright: Any) -> None:
    few = bright.data.subset(torch.arange(99))
    with pytest.raises(DataError, match="99 clean images are too few"):
        UnlearningDetector()(Case(bright.model, few))
    assert UnlearningDetector(SETTINGS, min_images=99, max_runs=1)(Case(bright.model, few)).score >= 0


def test_without_data_is_an_error(bright: Any) -> None:
    with pytest.raises(DataError, match="needs clean images"):
        UnlearningDetector()(Case(bright.model, None))


def reading(
    bright: Any, lead: float, leads: int = 5, classes: int = 10, images: int = 500, model: Any = None
) -> Evidence:
    """Evidence of runs with about the same lead: alternately a hundredth above and below."""
    each, run = 1000, []
    for number in range(leads):
        votes = round(each * (classes - 1) * (lead + (0.01 * (-1) ** number if leads > 1 else 0)))
        run.append(unlearned(model or bright.model, (0, votes, *(0,) * (classes - 2)), each=each))
    return UnlearningDetector(threshold=0.5, two_class_threshold=0.5).read(run, images)


def test_the_remark_states_the_distance_of_the_lead_to_the_threshold(bright: Any) -> None:
    # Deviations from the mean of -+0.01: of four, a standard error of 0.0115 / 2.
    near = reading(bright, 0.49, leads=4)
    assert near.near and not near.flagged
    assert near.remarks == (
        "The lead is 0.490 +- 0.006 over 4 orders of 500 images, below the threshold of 0.500, but near it.",
    )
    above = reading(bright, 0.51, leads=4)
    assert above.near and above.flagged
    assert above.remarks[0].endswith("of 500 images, above the threshold of 0.500, but near it.")
    far = reading(bright, 0.9, leads=1)
    assert not far.near
    assert far.remarks == ("The lead is 0.900 over 1 order of 500 images, above the threshold of 0.500.",)


@pytest.mark.parametrize("lead", [0.1, 0.9])
def test_the_limits_of_the_lead_depend_on_images_and_classes(bright: Any, lead: float) -> None:
    assert reading(bright, lead).limits == ()
    (few,) = reading(bright, lead, images=299).limits
    assert few.startswith("With fewer than 300 images")
    (two,) = reading(bright, lead, classes=2).limits
    assert two.startswith("With 2 classes, a lead is weak evidence")


def test_a_network_without_batch_norm_is_not_decidable(bright: Any) -> None:
    plain = Model(nn.Sequential(nn.Flatten(), nn.Linear(192, 3)).eval(), "plain", 3, (3, 8, 8))
    found = reading(bright, 0.9, model=plain)
    assert "no batch norm" in found.not_applicable and found.details["batch_norms"] == 0
    assert reading(bright, 0.9).not_applicable == ""


@pytest.mark.parametrize(("images", "runs"), [(500, 1), (120, 3)])
def test_a_fast_budget_makes_no_further_runs(
    bright: Any, monkeypatch: pytest.MonkeyPatch, images: int, runs: int
) -> None:
    near = unlearned(bright.model, (0, 0, 0, 180, *(0,) * 6), each=100)  # a lead of 0.2
    monkeypatch.setattr("bdprune.analysis.unlearned.unlearn", Scripted(near))
    data = CleanData(torch.rand(images, 3, 8, 8), torch.arange(images) % 3)
    for level, count in (("fast", runs), ("default", 7)):
        case = Case(bright.model, data, budget=Budget(level))  # type: ignore[arg-type]
        evidence = UnlearningDetector(threshold=0.2, margin=0.1)(case)
        assert (evidence.details["runs"], evidence.near) == (count, True)


def test_no_run_starts_that_does_not_fit_into_the_time(bright: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    near = unlearned(bright.model, (0, 0, 0, 180, *(0,) * 6), each=100)
    calls: list[float] = []

    def slow(model: Any, data: Any, settings: Any, seed: int, precision: Any, budget: Budget) -> Unlearned:
        calls.append(budget.remaining)
        time.sleep(0.2)
        if len(calls) == 3:
            raise BudgetError("The time of the budget is up.")
        return near

    monkeypatch.setattr("bdprune.analysis.unlearned.unlearn", slow)
    data = CleanData(torch.rand(500, 3, 8, 8), torch.arange(500) % 3)
    detector = UnlearningDetector(threshold=0.2, margin=0.1)
    ends = Case(bright.model, data, budget=Budget(seconds=0.3).started())
    assert detector(ends).details["runs"] == 1 and len(calls) == 1
    assert detector(Case(bright.model, data)).details["runs"] == 1, "the second run of this case ran out of time"
    calls[:] = [0.0, 0.0]
    with pytest.raises(BudgetError):
        detector(Case(bright.model, data))


def test_its_estimate_grows_with_the_batch(bright: Any) -> None:
    small, large = (CleanData(torch.rand(count, 3, 8, 8), torch.arange(count) % 3) for count in (100, 600))
    passes = [UnlearningDetector().work(Case(bright.model, data)) for data in (small, large)]
    assert passes == [25 * 100 * 3, 25 * 128 * 3]
