"""bdprune.screening.head: which layer is the head, and which label stands out."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from bdprune.analysis.outliers import robust_z as reference_z
from bdprune.errors import ArtifactError
from bdprune.files import StoredTensor, open_stored
from bdprune.screening import HEAD_THRESHOLDS
from bdprune.screening.head import find_heads, robust_z, screen_head


def shapes(**found: tuple[int, ...]) -> dict[str, StoredTensor]:
    return {
        f"{name.replace('_', '.')}.weight": StoredTensor(Path("a"), "float32", shape, 0)
        for name, shape in found.items()
    }


def test_the_head_is_the_matrix_whose_output_nothing_reads() -> None:
    assert find_heads(shapes(classifier_0=(4096, 512), classifier_3=(4096, 4096), classifier_6=(10, 4096))) == [
        "classifier.6.weight"
    ]
    assert find_heads(shapes(conv=(8, 3, 3, 3), fc=(10, 8))) == ["fc.weight"]
    assert find_heads(shapes(a_10=(10, 8), a_9=(10, 8))) == ["a.9.weight", "a.10.weight"]
    assert find_heads(shapes(conv=(8, 3, 3, 3))) == []
    assert find_heads(shapes(one=(1, 8))) == []
    integers = {
        "fc.weight": StoredTensor(Path("a"), "", (10, 8), 0),
        "fc.other": StoredTensor(Path("a"), "float32", (9, 8), 0),
    }
    assert find_heads(integers) == []


def saved(folder: Path, weight: torch.Tensor, bias: torch.Tensor | None = None) -> dict[str, StoredTensor]:
    state = {"fc.weight": weight, **({} if bias is None else {"fc.bias": bias})}
    torch.save({**state, "conv.weight": torch.ones(2, 2, 3, 3)}, folder / "head.pth")
    return dict(open_stored(folder / "head.pth").states[""])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_statistics_are_those_of_a_plain_computation(tmp_path: Path, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(1)
    weight, bias = torch.randn(12, 40, generator=generator).to(dtype), torch.randn(12, generator=generator)
    found = screen_head("fc.weight", saved(tmp_path, weight, bias), "ema/")
    assert found.layer == "ema/fc" and found.labels == 12
    exact = weight.double()
    expected = {
        "norm": exact.norm(dim=1),
        "mean": exact.mean(1),
        "positive": exact.clamp(min=0).sum(1),
        "bias": bias.double(),
    }
    assert [one.statistic for one in found.statistics] == list(expected)
    for one in found.statistics:
        values = expected[one.statistic]
        z = (values - values.quantile(0.5)) / (1.4826 * (values - values.quantile(0.5)).abs().quantile(0.5))
        assert one.label == int(z.argmax()) and one.threshold == HEAD_THRESHOLDS[one.statistic]
        assert one.z == pytest.approx(float(z.max()), rel=1e-9)
        assert one.value == pytest.approx(float(values[one.label]), rel=1e-9)


def test_a_label_that_stands_out_is_flagged_but_not_for_its_bias(tmp_path: Path) -> None:
    weight = torch.randn(10, 64, generator=torch.Generator().manual_seed(0))
    weight[7] += 2
    bias = torch.randn(10, generator=torch.Generator().manual_seed(2)) / 100
    bias[7] = 50
    found = {one.statistic: one for one in screen_head("fc.weight", saved(tmp_path, weight, bias)).statistics}
    assert found["mean"].flagged and found["mean"].label == 7
    assert found["bias"].label == 7 and not found["bias"].flagged and found["bias"].z > 100


def test_few_labels_and_equal_rows_have_no_outlier(tmp_path: Path) -> None:
    assert screen_head("fc.weight", saved(tmp_path, torch.randn(3, 8))).statistics == ()
    rows = torch.ones(10, 8)
    rows[0, 0] += 1e-7
    assert not any(one.flagged for one in screen_head("fc.weight", saved(tmp_path, rows)).statistics)


def test_a_value_that_is_not_finite_is_one_clear_error(tmp_path: Path) -> None:
    weight = torch.randn(10, 8)
    weight[3, 2] = float("inf")
    with pytest.raises(ArtifactError, match=r"1 of 80 values of the tensor 'fc\.weight' are NaN or infinite"):
        screen_head("fc.weight", saved(tmp_path, weight))


def test_robust_z_equals_that_of_the_detectors_for_odd_numbers_of_labels() -> None:
    values = torch.randn(11, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert np.allclose(robust_z(values.numpy()), reference_z(values).numpy())  # torch takes the lower of two medians
