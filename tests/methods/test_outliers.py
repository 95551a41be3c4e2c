from typing import Any

import pytest
import torch
from safetensors.torch import load as read_tensors

from bdprune.analysis import Case, channel_lipschitz
from bdprune.detectors.lipschitz import LipschitzDetector
from bdprune.detectors.suspiciousness import SuspiciousnessDetector
from bdprune.errors import DataError


def spiked(bright: Any) -> Any:
    """The bright network with the norm scale of one filter multiplied by a hundred."""
    model = bright.model.clone()
    with torch.no_grad():
        model.network.get_parameter("4.weight")[7] *= 100
    return model


def test_lipschitz_finds_the_spike(bright: Any) -> None:
    evidence = LipschitzDetector(threshold=3)(Case(spiked(bright)))
    scores = channel_lipschitz(spiked(bright))["3"].double()
    assert evidence.score == pytest.approx(((scores[7] - scores.mean()) / scores.std()).item())
    assert evidence.flagged
    assert evidence.target_label is None
    worst = max(evidence.details["layers"], key=lambda layer: layer["max_z"])
    assert (worst["layer"], worst["filter"], worst["filters"]) == ("3", 7, 12)
    assert not LipschitzDetector(threshold=3)(Case(bright.model)).flagged


def test_the_scores_are_attached(bright: Any) -> None:
    case = Case(bright.model)
    (attached,) = LipschitzDetector()(case).attachments
    assert (attached.name, attached.media_type, attached.file) == ("filter_scores", "application/safetensors", "")
    scores, expected = read_tensors(case.attachments[attached.sha256]), channel_lipschitz(bright.model)
    assert scores.keys() == expected.keys() and all(torch.equal(scores[name], expected[name]) for name in scores)


def test_suspiciousness_finds_the_spike_reproducibly(bright: Any) -> None:
    detector = SuspiciousnessDetector(threshold=3, max_images=30, seed=1)
    evidence = detector(Case(spiked(bright), bright.data))
    again = detector(Case(spiked(bright), bright.data))
    assert evidence.flagged
    assert evidence.score == again.score
    assert evidence.details == again.details
    assert evidence.params["score"]["root"] == "coefficient"
    assert evidence.params["max_images"] == 30


def test_suspiciousness_without_data_is_an_error(bright: Any) -> None:
    with pytest.raises(DataError, match="needs clean images"):
        SuspiciousnessDetector()(Case(bright.model))
