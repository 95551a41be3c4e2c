"""The comparison of masks, and the profile of RNP's steps."""

from __future__ import annotations

import math

import pytest
import torch

from bench.precision import rank_correlation, ranks, same_pruned, timed_sweeps
from bench.speed.networks import clean_images, resnet18
from bench.speed.profile import KINDS, kind, profiles
from bench.speed.rnp import published_masks


def test_equal_values_share_their_mean_rank() -> None:
    assert ranks(torch.tensor([0.5, 1.0, 1.0, 0.2])).tolist() == [2.0, 3.5, 3.5, 1.0]


def test_rank_correlation_by_hand() -> None:
    a = torch.tensor([0.1, 0.2, 0.3, 0.4])
    assert rank_correlation(a, a.square()) == pytest.approx(1.0)
    assert rank_correlation(a, torch.tensor([0.2, 0.1, 0.3, 0.4])) == pytest.approx(0.8)
    assert math.isnan(rank_correlation(a, torch.ones(4)))


def test_only_masks_near_the_threshold_may_change_sides() -> None:
    a = torch.tensor([0.1, 0.49, 0.9])
    assert same_pruned(a, torch.tensor([0.2, 0.53, 0.8]), 0.5)
    assert not same_pruned(a, torch.tensor([0.6, 0.49, 0.9]), 0.5)


@pytest.mark.parametrize(
    ("operation", "expected"),
    [
        ("aten::convolution_backward", "convolutions, backward"),
        ("aten::mkldnn_convolution", "convolutions, forward"),
        ("aten::native_batch_norm_backward", "batch norm"),
        ("aten::copy_", "copies and finiteness checks"),
        ("Optimizer.step#SGD.step", "optimiser"),
        ("aten::empty", "other"),
    ],
)
def test_operations_by_kind(operation: str, expected: str) -> None:
    assert kind(operation) == expected


def test_shares_add_up_and_include_convolutions() -> None:
    for found in profiles(16, 16, torch.device("cpu")):
        assert sum(found["percent"].values()) == pytest.approx(100, abs=1)
        assert set(found["percent"]) <= {*KINDS, "other"}
        # Other work on the machine stretches the time between operations, so no exact share is certain.
        assert min(found["percent"][f"convolutions, {kind}"] for kind in ("forward", "backward")) > 0


def test_the_timed_sweeps_agree() -> None:
    model = resnet18(8, torch.device("cpu"))
    seconds = timed_sweeps(model, published_masks(model), clean_images(10, torch.device("cpu")))
    assert min(seconds.values()) > 0
