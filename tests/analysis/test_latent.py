from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bdprune.analysis import Case
from bdprune.analysis.latent import (
    Latent,
    LatentFeatures,
    LatentMargins,
    latent_margins,
    promising_labels,
)
from bdprune.data import CleanData
from bdprune.model import Head, Model


def latent_of(weight: Tensor, features: Tensor) -> Latent:
    head = Head("head", weight, torch.zeros(len(weight)))
    return Latent(head, features, features @ weight.T)


def test_the_shift_between_two_labels_is_the_distance_to_their_boundary() -> None:
    latent = latent_of(torch.tensor([[1.0, 0.0], [-1.0, 0.0]]), torch.tensor([[3.0, 5.0], [-2.0, 1.0]]))
    # Label 1 is needed for the image at 3, label 0 for the image at -2: the boundary is at 0.
    assert latent_margins(latent, 1.0, False, 100).tolist() == pytest.approx([2.0, 3.0])


def test_the_shift_meets_all_constraints_and_none_can_be_smaller() -> None:
    generator = torch.Generator().manual_seed(0)
    weight, features = torch.randn(6, 8, generator=generator), torch.randn(200, 8, generator=generator)
    latent = latent_of(weight, features)
    found = latent_margins(latent, 0.95, False, 2000)
    logits, predicted = latent.logits.double(), latent.logits.argmax(1)
    for label in range(6):
        others = [other for other in range(6) if other != label]
        needed = (logits[predicted != label][:, others] - logits[predicted != label][:, [label]]).quantile(0.95, 0)
        rows = (weight[label] - weight[others]).double()
        # The duality theorem: the largest lower bound over directions is the norm of the smallest shift.
        shift = _by_descent(rows, needed)
        assert float(found[label]) == pytest.approx(float(shift.norm()), rel=1e-2)
        assert bool((rows @ shift >= needed - 1e-2 * needed.abs().max()).all())


def _by_descent(rows: Tensor, needed: Tensor) -> Tensor:
    """The smallest shift by many small projected steps on the dual."""
    gram, dual = rows @ rows.T, torch.zeros_like(needed)
    for _ in range(20000):
        dual = (dual + (needed - gram @ dual) / gram.trace()).clamp(min=0)
    return rows.T @ dual


def test_scaled_shifts_of_quiet_features_are_small() -> None:
    features = torch.tensor([[10.0, 0.01], [-10.0, -0.01], [9.0, 0.0], [-9.0, 0.0]])
    weight = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0]])
    plain = latent_margins(latent_of(weight, features), 1.0, False, 500)
    scaled = latent_margins(latent_of(weight, features), 1.0, True, 500)
    assert plain[2] / plain[0] > scaled[2] / scaled[0]


def test_features_of_unknown_scale_are_not_scaled() -> None:
    features = torch.tensor([[10.0, 0.01, 2.0], [-10.0, -0.01, 2.0], [9.0, 0.0, 2.0], [-9.0, 0.0, 2.0]])
    weight = torch.tensor([[1.0, 0.0, 0.0], [-1.0, 0.0, 0.0], [0.0, 1.0, 5.0], [0.0, -1.0, 0.0]])
    plain = latent_margins(latent_of(weight, features), 1.0, False, 500)
    assert plain.isfinite().all()
    assert torch.equal(latent_margins(latent_of(weight, features), 1.0, True, 500), plain)


def test_a_label_that_all_images_have_is_missing() -> None:
    latent = latent_of(torch.eye(3), torch.tensor([[5.0, 0.0, 1.0], [4.0, 1.0, 0.0]]))
    margins = latent_margins(latent, 1.0, False, 100)
    assert margins.isnan().tolist() == [True, False, False]


def test_features_of_a_case_do_not_depend_on_batches(bright: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = Case(bright.model, bright.data).get(LatentFeatures())
    monkeypatch.setattr("bdprune.analysis.latent._BATCH_PIXELS", 8 * 8 * 7)
    parts = Case(bright.model.clone(), bright.data).get(LatentFeatures())
    assert whole is not None and parts is not None
    torch.testing.assert_close(whole.features, parts.features)
    assert whole.features.shape == (240, 12) and whole.logits.shape == (240, 3)


def test_a_network_without_a_head_has_no_margins() -> None:
    network = nn.Sequential(nn.Conv2d(3, 5, 8), nn.Flatten()).eval()
    case = Case(Model(network, "conv", 5, (3, 8, 8)), CleanData(torch.rand(4, 3, 8, 8), torch.arange(4)))
    assert case.get(LatentMargins()) is None
    order = network(case.images.images).mean(0).argsort(descending=True)
    assert promising_labels(case, 2).tolist() == order[:2].tolist()


def test_promising_labels_are_the_easiest_to_reach(bright: Any) -> None:
    case = Case(bright.model, bright.data)
    margins = case.get(LatentMargins())
    assert margins is not None
    assert promising_labels(case, 2).tolist() == margins.argsort()[:2].tolist()
    assert promising_labels(case, 3).tolist() == [0, 1, 2]
