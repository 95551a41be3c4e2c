"""Scans of files and modules: verdicts, and the treatment of errors."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bdprune.analysis import Case
from bdprune.data.clean import CleanData
from bdprune.data.load import load_clean
from bdprune.errors import OptionError, TrainingError
from bdprune.fleet.executors.process import ProcessExecutor
from bdprune.fleet.executors.stack import StackExecutor, StackOptions
from bdprune.fleet.scans import RunOptions, Scanner, scan, scan_many
from bdprune.methods import Detector
from bdprune.model import Normalization
from bdprune.pipeline import CleanSource, Job, Options
from bdprune.record import Evidence, Level, Needs, Result, Sign
from bdprune.verdict.calibration import Calibration, Input, References

LEADER = "x.leader"
NEEDS_NONE, NEEDS_SOME = Needs(images="none", minimum=0), Needs()


@dataclass
class Fake(Detector):
    """A detector with a fixed verdict that counts its calls."""

    score: float = 0.1
    id: str = LEADER
    needs: Needs = NEEDS_SOME
    label: int | None = None
    raises: Exception | None = None
    calls: int = 0

    sign: Sign = "collapse"
    passes: float = 0.0
    level: Level | None = "fast"

    title = "a fixed verdict"

    def work(self, case: Case) -> float:
        return self.passes

    def __call__(self, case: Case) -> Evidence:
        self.check(case)
        self.calls += 1
        if self.raises:
            raise self.raises
        return self.evidence(self.score, 0.5, target_label=self.label, details={"odd": math.nan}, params={})


@dataclass
class Everywhere(Fake):
    """A detector that finds a backdoor to several labels, from images of one."""

    named: tuple[int, ...] = (0, 1, 2)

    def __call__(self, case: Case) -> Evidence:
        return self.evidence(0.9, 0.5, targets=self.named, sources=(1,), params={})


def both(score: float = 0.1, label: int | None = None) -> list[Fake]:
    """Two detectors that suffice for any verdict."""
    return [Fake(score, label=label), Fake(score, "x.trigger", label=label, sign="trigger")]


@pytest.fixture
def check(tiny: Any) -> Callable[..., Result]:
    """Scans the tiny file with the tiny data by default."""

    def call(model: Any = None, data: Any = "tiny", **options: Any) -> Result:
        settings = {"arch": tiny.arch, "input_shape": tiny.input_shape, "detectors": both()} | options
        return scan(tiny.path if model is None else model, tiny.data if data == "tiny" else data, **settings)

    return call


def test_file_gives_a_full_record(check: Callable[..., Result], tiny: Any) -> None:
    found = check(seed=7, per_class=20)
    assert found.verdict == "clean" and found.error is None and found.seconds > 0
    assert found.artifact and found.artifact.path == str(tiny.path) and found.artifact.format == "torch-zip"
    assert found.artifact.bytes == tiny.path.stat().st_size and len(found.artifact.sha256 or "") == 64
    # conv 8x3, norm 2x8, head 3x8 and 3 biases
    assert found.model and found.model.parameters == 24 + 16 + 24 + 3
    assert (found.model.num_classes, found.model.input_shape, found.model.filters) == (3, (3, 8, 8), 8)
    assert found.data and (found.data.count, found.data.classes) == (60, 3)
    assert found.data.per_class == {0: 20, 1: 20, 2: 20} and found.data.clean_accuracy == 1.0
    assert found.data.sanity and found.data.sanity.ok
    assert found.env.seed == 7 and found.env.torch == torch.__version__
    assert found.detectors[0].details == {"odd": None} and found.detectors[0].seconds
    assert Result.from_json(found.to_json()) == found


def test_a_module_and_a_model_are_scanned_and_unchanged(check: Callable[..., Result], tiny: Any) -> None:
    from bdprune.model.loading import load

    model = load(tiny.path, arch=tiny.arch, input_shape=(3, 8, 8))
    module = tiny.module.train()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    assert check(module, detectors=["lipschitz"]).artifact is None
    assert check(model, arch=None, input_shape=None).artifact is not None
    assert module.training
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


def test_module_without_a_shape_is_an_error(tiny: Any) -> None:
    found = scan(tiny.module, tiny.data)
    assert found.verdict == "error" and found.error and "needs an input shape" in found.error.message


def test_a_module_without_logits_for_such_images_is_an_error(check: Callable[..., Result]) -> None:
    for module, words in ((torch.nn.Conv2d(3, 8, 1), "instead of logits"), (torch.nn.Conv2d(4, 8, 1), "channels")):
        found = check(module)
        assert found.verdict == "error" and found.error and found.error.type == "ArchitectureError"
        assert words in found.error.message and found.artifact is None


def test_real_detectors_all_run_on_a_tiny_network(check: Callable[..., Result], tiny: Any) -> None:
    few = load_clean(tiny.data)
    darker = few.subset(torch.arange(0, 90, 3))
    more = torch.cat([few.images, darker.images * 0.9]), torch.cat([few.labels, darker.labels])
    found = check(data=CleanData(*more), detectors=None)
    assert [one.detector for one in found.detectors] == [
        "bdprune.lipschitz",
        "bdprune.suspiciousness",
        "bdprune.inversion",
        "bdprune.unlearning",
        "bdprune.trigger_pruning",
        "bdprune.moved_filters",
    ]
    assert all(one.score is not None and one.seconds for one in found.detectors)


def test_too_few_images_are_never_called_clean(check: Callable[..., Result]) -> None:
    found = check(detectors=None)
    assert found.verdict == "inconclusive" and "90 clean images are too few" in found.findings[0].message


def test_two_kinds_of_evidence_name_the_label(check: Callable[..., Result]) -> None:
    found = check(detectors=both(0.9, label=2))
    assert (found.verdict, found.target_label) == ("backdoored", 2)


def test_without_data_only_data_free_detectors_run(check: Callable[..., Result]) -> None:
    needy, free = Fake(), Fake(id="x.free", needs=NEEDS_NONE)
    found = check(data=None, detectors=[needy, free])
    assert (found.verdict, found.data) == ("inconclusive", None)
    assert (needy.calls, free.calls) == (0, 1)
    assert "Not run, because there is no usable clean data: x.leader." in [one.message for one in found.findings]


def test_data_that_does_not_fit_is_inconclusive_and_the_result_says_what_fits(check: Callable[..., Result]) -> None:
    needy, free = Fake(), Fake(id="x.free", needs=NEEDS_NONE)
    dark = Normalization((5.0,), (1.0,))
    found = check(normalize=dark, detectors=[needy, free])
    assert found.verdict == "inconclusive" and found.risk is None
    assert (needy.calls, free.calls) == (0, 1)
    assert found.data and found.data.sanity and not found.data.sanity.ok and found.data.sanity.hint


def test_a_detector_that_fails_makes_the_scan_inconclusive(check: Callable[..., Result]) -> None:
    found = check(detectors=[Fake(raises=TrainingError("The loss blew up.", "Lower lr."))])
    assert found.verdict == "inconclusive"
    assert found.detectors[0].score is None and found.detectors[0].error == "The loss blew up. Lower lr."


def test_data_of_every_kind_is_accepted(check: Callable[..., Result], tiny: Any) -> None:
    clean = load_clean(tiny.data)
    dataset = torch.utils.data.TensorDataset(clean.images, clean.labels)
    digests = {check(data=data).data.digest for data in (tiny.data, str(tiny.data), clean, dataset)}  # type: ignore[union-attr]
    assert len(digests) == 1
    assert check(data=clean, per_class=5).data.count == 15  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: path.write_bytes(b"PK\x03\x04 cut off"), ""),
        (lambda path: path.write_bytes(b""), "empty"),
        (lambda path: path.write_text("hello"), ""),
        (lambda path: None, "No such file"),
    ],
)
def test_bad_file_is_an_error_verdict_with_message_and_hint(
    check: Callable[..., Result], tmp_path: Path, make: Callable[[Path], object], message: str
) -> None:
    path = tmp_path / "bad.pth"
    make(path)
    found = check(path)
    assert found.verdict == "error" and found.risk is None and found.error
    assert message in found.error.message and found.error.hint and str(path) in found.error.message
    assert found.artifact and found.artifact.path == str(path)
    assert Result.from_json(found.to_json()) == found


def test_bad_data_is_an_error_verdict_that_still_names_the_model(check: Callable[..., Result], tmp_path: Path) -> None:
    grey = tmp_path / "grey.npz"
    np.savez(grey, images=np.zeros((4, 8, 8), np.uint8), labels=np.array([0, 1, 2, 0]))
    high = tmp_path / "high.npz"
    np.savez(high, images=np.zeros((4, 8, 8, 3), np.uint8), labels=np.array([0, 1, 9, 0]))
    for data, words in ((grey, "grey"), (high, "label 9"), (tmp_path / "none.npz", "cannot be read")):
        found = check(data=data)
        assert found.verdict == "error" and found.error and found.error.type == "DataError"
        assert words in found.error.message and found.model and found.model.num_classes == 3


def test_data_in_memory_that_does_not_fit_is_also_an_error(check: Callable[..., Result]) -> None:
    wide = CleanData(torch.rand(6, 4, 8, 8), torch.tensor([0, 1, 2] * 2))
    high = CleanData(torch.rand(6, 3, 8, 8), torch.tensor([0, 1, 7] * 2))
    good = torch.rand(6, 3, 8, 8), torch.tensor([0, 1, 2] * 2)
    wrong = [
        (wide, "channels"),
        (high, "label 7"),
        (CleanData(good[0][:0], good[1][:0]), "0 images"),
        (CleanData(good[0][:1], good[1][:1]), "1 image"),
        (CleanData(good[0], good[1] * 0), "of class 0"),
        (CleanData(good[0], good[1] - 1), "hold -1"),
        (CleanData(good[0], good[1].float()), "not integers"),
        (CleanData(good[0], good[1][:5]), "6 images but 5 labels"),
        (CleanData(good[0] * 255, good[1]), "0 to 255"),
        (CleanData(good[0] * float("nan"), good[1]), "NaN"),
    ]
    for data, words in wrong:
        found = check(data=data)
        assert found.verdict == "error" and found.error and words in found.error.message


def test_data_in_memory_of_any_number_type_is_accepted(check: Callable[..., Result], tiny: Any) -> None:
    clean = load_clean(tiny.data)
    whole = CleanData((clean.images * 255).round().to(torch.uint8), clean.labels.int())
    for data in (whole, CleanData(clean.images.double(), clean.labels.short())):
        found = check(data=data)
        assert found.verdict == "clean" and found.data and found.data.clean_accuracy == 1.0


def test_module_without_parameters_is_an_error(check: Callable[..., Result]) -> None:
    found = check(torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten()))
    assert found.error and "no parameters" in found.error.message


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"device": "cuda:99"}, "no device"),
        ({"device": "warp"}, "Unknown device"),
        ({"device": "meta"}, "does not run on"),
        ({"normalize": "wrong"}, "Unknown normalisation"),
        ({"detectors": ["nonsense"]}, "no detector 'nonsense'"),
        ({"timeout": 0}, "timeout of 0 seconds"),
        ({"input_shape": (0, 8, 8)}, "Invalid input shape"),
        ({"class_order": "backwards"}, "backwards"),
        ({"per_class": 0}, "too few"),
        ({"seed": -1}, "Invalid seed -1"),
        ({"precision": "float8"}, "Unknown precision 'float8'"),
        ({"seed": 1 << 64}, "Invalid seed"),
    ],
)
def test_an_invalid_option_raises(check: Callable[..., Result], options: dict[str, Any], words: str) -> None:
    with pytest.raises(OptionError, match=words):
        check(**options)


def test_unknown_option_is_a_type_error(check: Callable[..., Result]) -> None:
    with pytest.raises(TypeError, match="colour"):
        check(colour="red")


def test_normalize_by_name_or_numbers(check: Callable[..., Result]) -> None:
    assert check(normalize="0.1,0.5", data=None, detectors=[]).model.mean == (0.1,)  # type: ignore[union-attr]
    assert check(normalize="cifar10", data=None, detectors=[]).model.std[0] == 0.247  # type: ignore[union-attr]


def test_progress_gets_every_stage(check: Callable[..., Result]) -> None:
    stages: list[str] = []
    check(progress=stages.append)
    assert stages == [
        "loading",
        "checking the clean data",
        f"running detector {LEADER} (1 of 2)",
        "running detector x.trigger (2 of 2)",
    ]


def test_a_bad_model_does_not_stop_the_others_and_the_data_are_read_once(
    tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads: list[object] = []

    def counted(*args: Any, **settings: Any) -> CleanData:
        reads.append(args)
        return load_clean(*args, **settings)

    monkeypatch.setattr("bdprune.pipeline.open.load_clean", counted)
    bad = tmp_path / "bad.pth"
    bad.write_bytes(b"nonsense")
    results = scan_many(
        [tiny.path, bad, tiny.path], tiny.data, arch=tiny.arch, input_shape=tiny.input_shape, detectors=both()
    )
    assert [one.verdict for one in results] == ["clean", "error", "clean"]
    assert len(reads) == 1


def test_an_unexpected_error_does_not_stop_the_other_models(tiny: Any) -> None:
    bugs = [Fake(raises=ZeroDivisionError("division by zero"))]
    options = {"arch": tiny.arch, "input_shape": tiny.input_shape, "detectors": bugs}
    found = list(scan_many([tiny.path, tiny.path], tiny.data, **options))
    assert [one.verdict for one in found] == ["inconclusive", "inconclusive"]
    assert found[0].detectors[0].error.startswith("Unexpected ZeroDivisionError: division by zero.")
    assert "ZeroDivisionError" in found[0].findings[0].message


def test_an_invalid_option_stops_the_whole_scan(tiny: Any) -> None:
    with pytest.raises(OptionError):
        list(scan_many([tiny.path], tiny.data, arch="tinynet:Missing"))
    with pytest.raises(OptionError):
        scan_many([tiny.path], device="warp")  # before the first model is read


def test_the_order_of_the_images_does_not_matter(check: Callable[..., Result], tiny: Any) -> None:
    clean = load_clean(tiny.data)
    few = clean.subset(torch.arange(120) % len(clean))
    mixed = few.subset(torch.randperm(len(few), generator=torch.Generator().manual_seed(3)))
    one, two = (check(data=data, detectors=["unlearning", "suspiciousness"]) for data in (few, mixed))
    assert one.data and two.data and one.data.digest == two.data.digest
    assert one.data.clean_accuracy == two.data.clean_accuracy and one.verdict == two.verdict
    assert [detector.score for detector in one.detectors] == [detector.score for detector in two.detectors]


def test_the_scan_of_chosen_detectors_stops_when_it_is_sure(
    check: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    three = [*both(0.9, label=2), Fake(0.9, "x.pruning", label=2, sign="pruning")]
    assert len(check(detectors=three).detectors) == 3, "all were asked for"
    monkeypatch.setattr("bdprune.fleet.scans.chosen_detectors", lambda chosen, defaults: three)
    found = check(detectors=None)
    assert (found.verdict, found.target_label, found.not_run) == ("backdoored", 2, ("x.pruning",))
    assert "Not run, because two kinds of evidence already agree: x.pruning." in [one.message for one in found.findings]


def test_several_targets_and_sources_reach_the_result(check: Callable[..., Result]) -> None:
    found = check(detectors=[Everywhere(sign=sign, id=f"x.{sign}") for sign in ("trigger", "pruning")])
    assert (found.verdict, found.target_label) == ("backdoored", None)
    assert (found.targets, found.sources) == ((0, 1, 2), (1,))
    assert Result.from_json(found.to_json()) == found
    wrong = check(detectors=[Everywhere(named=(0, 7))])
    assert wrong.detectors[0].error.startswith("Unexpected ValueError: it names label 7 of 3 classes")


@pytest.mark.parametrize("timeout", [None, 120])
def test_a_budget_reaches_every_executor(check: Callable[..., Result], timeout: float | None) -> None:
    costly = Fake(id="x.costly", passes=1e12)
    found = check(detectors=[*both(), costly], budget=50, timeout=timeout)
    assert (found.verdict, found.budget, found.not_run) == ("clean", "50 s", ("x.costly",))
    (message,) = [one.message for one in found.findings if one.rule_id == "BD000"]
    assert message.startswith("Not run, because the budget of 50 s does not suffice: x.costly (needs about ")
    assert check(detectors=both(), timeout=timeout).budget == "default"


def test_a_detector_of_no_budget_runs_only_by_name(
    check: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    fakes = [*both(), Fake(id="x.by_name", level=None)]
    monkeypatch.setattr("bdprune.fleet.scans.chosen_detectors", lambda chosen, defaults: fakes)
    assert len(check(detectors=None, budget="full").detectors) == 2
    assert len(check(detectors=fakes).detectors) == 3


def test_labels_without_clean_images_are_named(check: Callable[..., Result], tiny: Any) -> None:
    data = load_clean(tiny.data)
    found, whole = check(data=data.subset((data.labels != 1).nonzero().flatten())), check()
    (told,) = [one.message for one in found.findings if "no clean image" in one.message]
    assert told.startswith("These labels have no clean image: 1. A backdoor that works on such images only is not seen")
    assert found.verdict == whole.verdict == "clean" and not any(
        "no clean image" in one.message for one in whole.findings
    )


class Levels(torch.nn.Module):
    """Labels images by five levels of brightness."""

    def __init__(self) -> None:
        super().__init__()
        self.levels = torch.nn.Parameter((torch.arange(5) + 0.5) / 5)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return -100 * (images.mean((1, 2, 3)).unsqueeze(1) - self.levels).square()


@pytest.mark.parametrize(("given", "verdict"), [(2, "inconclusive"), (3, "clean")])
def test_no_model_is_clean_if_most_labels_have_no_image(check: Callable[..., Result], given: int, verdict: str) -> None:
    labels = torch.arange(60) % given
    images = ((labels + 0.5) / 5).view(-1, 1, 1, 1).expand(-1, 3, 8, 8).contiguous()
    found = check(Levels(), CleanData(images, labels), arch=None)
    assert found.verdict == verdict
    assert any(one.message.startswith("These labels have no clean image") for one in found.findings)


def test_a_scan_names_what_its_budget_leaves_out(check: Callable[..., Result], monkeypatch: pytest.MonkeyPatch) -> None:
    thorough = Fake(id="x.thorough", level="default")
    full = Fake(id="x.full", level="full")
    fakes = [*both(), thorough, full, Fake(id="x.by_name", level=None)]
    monkeypatch.setattr("bdprune.fleet.scans.chosen_detectors", lambda chosen, defaults: fakes)
    missing = {"fast": ("x.thorough", "x.full"), "default": ("x.full",), "full": (), "60 s": ("x.full",)}
    for budget, name in (("fast", "fast"), ("default", "default"), (None, "default"), ("full", "full"), (60, "60 s")):
        found, left_out = check(detectors=None, budget=budget), missing[name]
        assert (found.verdict, len(found.detectors), found.not_run) == ("clean", 4 - len(left_out), left_out)
        says = f"Not run, because the budget {name} leaves them out: {', '.join(left_out)}."
        assert [one.message for one in found.findings] == ([says] if left_out else [])
    for budget in ("slow", 0):
        with pytest.raises(OptionError, match="Invalid budget"):
            check(budget=budget)


def table(tmp_path: Path, arch: str, detectors: tuple[str, ...] = (LEADER, "x.trigger")) -> Path:
    """A table in which only the first detector counts."""
    inputs = tuple(
        Input(detector=one, centre=-1.0, scale=1.0, weight=2.0 if one == LEADER else 0.0) for one in detectors
    )
    clean = (References(arch=arch, log_odds=tuple(float(one) for one in range(-30, -10))),)
    found = Calibration(
        name="mine",
        budget="default",
        inputs=inputs,
        agreement=3.0,
        bias=-1.0,
        clean=clean,
        networks=30,
        backdoored=10,
    )
    path = tmp_path / "table.json"
    path.write_text(found.to_json())
    return path


@pytest.mark.parametrize("timeout", [None, 120])
def test_a_table_turns_the_evidence_into_a_probability(
    check: Callable[..., Result], tiny: Any, tmp_path: Path, timeout: float | None
) -> None:
    arch = check().model.arch  # type: ignore[union-attr]
    path = table(tmp_path, arch)
    found = check(calibration=path, detectors=both(0.5), timeout=timeout)
    assert found.verdict == "suspicious", "the scores are below their thresholds, but above those of clean networks"
    assert found.risk == pytest.approx(1 / (1 + math.exp(-1)))
    assert found.calibration is not None and found.calibration.table == "mine"
    assert (found.calibration.reservation, found.calibration.p_value) == ("", pytest.approx(1 / 21))
    found = check(calibration=path, detectors=both(0.9, label=2))
    assert found.verdict == "backdoored" and found.risk is not None and found.risk > 0.98
    assert Result.from_json(found.to_json()) == found


def test_a_probability_has_reservations(check: Callable[..., Result], tmp_path: Path) -> None:
    found = check(calibration=table(tmp_path, "other")).calibration
    assert found is not None and found.p_value is None and "has no reference for" in found.reservation
    arch = check().model.arch  # type: ignore[union-attr]
    found = check(calibration=table(tmp_path, arch, (LEADER, "x.trigger", "x.absent"))).calibration
    assert found is not None and "needs x.absent to the end" in found.reservation


def test_without_a_table_the_risk_is_the_strength_of_the_evidence(
    check: Callable[..., Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = check(detectors=both(0.5))
    assert plain.calibration is None and plain.risk == 0.5, "detectors that are chosen by name have no table"
    asked: list[str] = []
    monkeypatch.setattr("bdprune.verdict.calibration.own_table", lambda level: asked.append(level))
    monkeypatch.setattr("bdprune.fleet.scans.chosen_detectors", lambda chosen, defaults: both(0.5))
    assert check(detectors=None, calibration="none").calibration is None and not asked
    assert check(detectors=None, budget="full").calibration is None
    assert asked == ["full", "default", "fast"], "a larger budget falls back on the table of a smaller one"


def test_a_model_that_cannot_be_judged_has_no_probability(check: Callable[..., Result], tmp_path: Path) -> None:
    found = check(data=None, detectors=[Fake(needs=NEEDS_NONE)], calibration=table(tmp_path, "x"))
    assert (found.verdict, found.risk, found.calibration) == ("inconclusive", None, None)


def test_a_file_that_is_no_table_stops_the_scan(check: Callable[..., Result], tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="Cannot read the table"):
        check(calibration=tmp_path / "missing.json")


CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize(
    ("options", "kind"),
    [
        ({}, "inline"),
        ({"executor": "inline"}, "inline"),
        ({"timeout": 5}, "processes"),
        ({"memory_limit": 1 << 30}, "processes"),
        ({"workers": 1}, "processes"),
        ({"workers": "auto"}, "processes"),
        ({"executor": "processes"}, "processes"),
        ({"address": "auto", "timeout": 5}, "ray"),
        ({"executor": "ray"}, "ray"),
    ],
)
def test_the_executor_follows_from_the_options(options: dict[str, Any], kind: str) -> None:
    assert RunOptions(StackOptions(1), **options).kind == kind


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"executor": "cloud"}, "Unknown executor 'cloud'"),
        ({"executor": "inline", "timeout": 5}, "inline takes no limits"),
        ({"executor": "inline", "memory_limit": 5}, "inline takes no limits"),
        ({"executor": "inline", "workers": 2}, "inline takes no limits"),
        ({"executor": "processes", "address": "auto"}, "Only the executor ray takes an address"),
        ({"executor": "inline", "address": "auto"}, "Only the executor ray takes an address"),
        ({"workers": 0}, "Invalid number of workers 0"),
        ({"workers": "all"}, "Invalid number of workers all"),
        ({"memory_limit": 0}, "Invalid memory limit of 0 bytes"),
        ({"timeout": 0.0, "workers": 2}, "Invalid timeout of 0 seconds"),
    ],
)
def test_options_of_executors_that_make_no_sense_are_errors(options: dict[str, Any], words: str) -> None:
    with pytest.raises(OptionError, match=words):
        RunOptions(StackOptions(1), **options).make(CPU)
    with pytest.raises(OptionError, match=words):
        Scanner(**options)


def test_a_named_executor_uses_the_whole_machine_a_limit_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bdprune.fleet.executors.process.usable_cores", lambda: 7)
    job = Job(CleanSource(None), [], Options())

    def count(**options: Any) -> int:
        executor = RunOptions(StackOptions(1), **options).make(CPU)
        assert isinstance(executor, ProcessExecutor)
        return executor._count(job)

    assert count(executor="processes") == 7 and count(workers="auto", timeout=5) == 7
    assert count(timeout=5) == 1 and count(memory_limit=1 << 30) == 1
    assert count(executor="processes", workers=3) == 3


def test_stacks_share_the_memory_of_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bdprune.fleet.scans.free_memory", lambda device: 8000)

    def memory(device: torch.device = CPU, stack: StackOptions | None = None, **options: Any) -> int | None:
        executor: Any = RunOptions(stack or StackOptions(4), **options).make(device)
        return (executor if isinstance(executor, StackExecutor) else executor._inner).options.memory

    assert memory() is None and memory(timeout=5) is None, "an executor alone measures the memory itself"
    assert memory(workers=4) == 1000 and memory(workers=4, memory_limit=600) == 300
    assert memory(GPU, workers=4) is None and memory(stack=StackOptions(4, 50), workers=4) == 50
