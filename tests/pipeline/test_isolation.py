"""A faulty plug-in does not change models, images, memo and evidence of others."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

import bdprune
from bdprune.analysis import MEMO, Lipschitz
from bdprune.errors import DataError, OptionError
from bdprune.model import build
from bdprune.record import Evidence, Result


class Odd(bdprune.Detector):
    """Calls a given function."""

    id = "x.odd"
    title = "calls a given function"
    needs = bdprune.Needs(images="none", minimum=0)

    def __init__(self, act: Callable[[bdprune.Case, Odd], Any]) -> None:
        self.act = act

    @property
    def params(self) -> dict[str, Any]:
        return {}

    def __call__(self, case: bdprune.Case) -> Evidence:
        return self.act(case, self)  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Any:
    path = tmp_path_factory.mktemp("isolation") / "model.pth"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        torch.save(build("resnet18_cifar", 3, width=4).state_dict(), path)
    return path


def scan(file: Any, act: Callable[[bdprune.Case, Odd], Any], *others: Any) -> Result:
    return bdprune.scan(file, detectors=["lipschitz", Odd(act), *others])


def spoil(case: bdprune.Case, detector: Odd) -> Evidence:
    case.get(Lipschitz())
    with torch.no_grad():
        for value in case.model.network.parameters():
            value.mul_(3)
    return detector.evidence(0.0, 1.0)


def test_a_changed_model_is_detected_and_does_not_affect_other_detectors(file: Any) -> None:
    plain = bdprune.scan(file, detectors=["lipschitz"])
    MEMO.clear()
    found = scan(file, spoil, "lipschitz")
    assert "changed the model" in found.detectors[1].error and found.detectors[1].score is None
    assert found.detectors[0].score == found.detectors[2].score == plain.detectors[0].score
    assert found.model and plain.model and found.model.digest == plain.model.digest
    assert bdprune.scan(file, detectors=["lipschitz"]).detectors[0].score == plain.detectors[0].score


@pytest.mark.parametrize(
    ("act", "said"),
    [
        (lambda case, detector: 1 / 0, "Unexpected ZeroDivisionError: division by zero"),
        (lambda case, detector: None, "returned NoneType, not Evidence"),
        (lambda case, detector: detector.evidence(0.0, 1.0, target_label=99), "names label 99 of 3 classes"),
        (lambda case, detector: detector.evidence(0.0, 1.0, remarks="abc"), "ValidationError"),
        (lambda case, detector: detector.evidence(0.0, 1.0, p_value=2.0), "ValidationError"),
        (
            lambda case, detector: Evidence(detector="x.other", score=0.0, threshold=1.0, flagged=False),
            "names another detector",
        ),
    ],
    ids=["raises", "none", "label", "remarks", "p_value", "id"],
)
def test_a_detector_that_fails_does_not_change_the_evidence_of_others(
    file: Any, act: Callable[..., Any], said: str
) -> None:
    found = scan(file, act)
    assert found.verdict == "inconclusive" and found.error is None
    assert said in found.detectors[1].error and found.detectors[1].score is None
    assert found.detectors[0].score is not None


def test_numbers_of_other_libraries_become_python_numbers(file: Any) -> None:
    details = {"a": np.float32(0.5), "b": np.int64(3), "c": torch.tensor(1.5), "d": np.arange(2), "e": np.bool_(True)}
    found = scan(file, lambda case, detector: detector.evidence(np.float64(0.2), 1.0, details=details))
    assert found.detectors[1].details == {"a": 0.5, "b": 3, "c": 1.5, "d": [0, 1], "e": True}
    assert Result.from_json(found.to_json()) == found


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda images, labels: (images * 255, labels), "values from 0 to"),
        (lambda images, labels: (images * torch.nan, labels), "values from nan"),
        (lambda images, labels: (images, labels + 90), "labels range from 90"),
        (lambda images, labels: (images, labels[:-1]), "cannot take"),
        (lambda images, labels: (images, labels.float()), "cannot take"),
        (lambda images, labels: ((images * 255).byte(), labels), "cannot take"),
        (lambda images, labels: (images[:, :1], labels), "cannot take"),
    ],
)
def test_invalid_images_are_errors(file: Any, change: Callable[..., Any], said: str) -> None:
    images = torch.rand(6, 3, 32, 32)
    images[0, 0, 0, 0] = 0
    data = bdprune.CleanData(*change(images, torch.arange(6) % 3))
    with pytest.raises(DataError, match=said):
        bdprune.Case(bdprune.load(file), data)


def test_a_case_needs_a_model(file: Any) -> None:
    with pytest.raises(OptionError, match="takes a model, not"):
        bdprune.Case(str(file))  # type: ignore[arg-type]


def test_a_model_in_train_mode_or_frozen_is_scanned_as_from_a_file(file: Any) -> None:
    model = bdprune.load(file)
    model.network.train().requires_grad_(False)
    before = {name: value.clone() for name, value in model.network.state_dict().items()}

    def run(case: bdprune.Case, detector: Odd) -> Evidence:
        assert not case.model.network.training and all(one.requires_grad for one in case.model.network.parameters())
        return detector.evidence(float(case.model.module(torch.rand(4, 3, 32, 32)).sum().detach()) * 0, 1.0)

    found = bdprune.scan(model, detectors=[Odd(run)])
    assert found.detectors[0].error == ""
    assert all(torch.equal(value, before[name]) for name, value in model.network.state_dict().items())
    assert model.network.training
