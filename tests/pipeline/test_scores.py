"""Scores of every filter, compared with values computed by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from bdprune.errors import OptionError
from bdprune.pipeline.scores import score
from bdprune.record import ScoreResult


@pytest.fixture
def options(tiny: Any) -> dict[str, Any]:
    return {"arch": tiny.arch, "input_shape": tiny.input_shape}


def test_lipschitz_needs_no_data_and_ranks_by_z(tiny: Any, options: dict[str, Any]) -> None:
    found = score(tiny.path, top=3, **options)
    # a 1x1 filter's spectral norm is its length; the norm has gamma 1, variance 1 and epsilon 1e-5
    lengths = tiny.module.conv.weight.detach().double().flatten(1).norm(dim=1) / (1 + 1e-5) ** 0.5
    z = (lengths - lengths.mean()) / lengths.std()
    layer = found.layers[0]
    assert (layer.layer, layer.filters) == ("conv", 8)
    assert layer.mean == pytest.approx(lengths.mean().item(), rel=1e-5)
    assert layer.max == pytest.approx(lengths.max().item(), rel=1e-5)
    assert layer.max_z == pytest.approx(z.max().item(), rel=1e-4)
    assert [one.filter for one in found.top] == z.argsort(descending=True)[:3].tolist()
    assert found.top[0].z == pytest.approx(z.max().item(), rel=1e-4)
    assert found.top[0].score == pytest.approx(lengths.max().item(), rel=1e-5)
    assert found.data is None and found.method == "lipschitz"
    assert ScoreResult.from_json(found.to_json()) == found


def test_suspiciousness_needs_data(tiny: Any, options: dict[str, Any]) -> None:
    with pytest.raises(OptionError, match="needs clean data"):
        score(tiny.path, method="suspiciousness", **options)
    found = score(tiny.path, tiny.data, method="suspiciousness", per_class=4, top=100, **options)
    assert found.data and found.data.count == 12 and len(found.top) == 8
    assert all(one.score is not None and one.score >= 0 for one in found.top)


def test_invalid_requests_are_errors(tiny: Any, options: dict[str, Any]) -> None:
    with pytest.raises(OptionError, match="no score 'magic'"):
        score(tiny.path, tiny.data, method="magic", **options)  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="not -1"):
        score(tiny.path, top=-1, **options)


def test_non_finite_scores_come_last_and_are_null(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    values = torch.tensor([1.0, float("nan"), 3.0, 2.0])
    monkeypatch.setattr("bdprune.analysis.lipschitz.channel_lipschitz", lambda model: {"conv": values})
    monkeypatch.setattr("bdprune.pipeline.scores.layer_z_scores", lambda scores: {"conv": values - 2})
    found = score(tiny.module, input_shape=(3, 8, 8))
    assert [one.filter for one in found.top] == [2, 3, 0, 1]
    assert found.top[-1].score is None and found.layers[0].mean is None
    assert ScoreResult.from_json(found.to_json()) == found
