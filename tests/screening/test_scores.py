"""bdprune.screening.scores: norms as exact as an independent computation, from any layout in a file."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from bdprune.analysis.statistics import layer_z_scores
from bdprune.errors import ArtifactError
from bdprune.files import StoredTensor, open_stored, stored
from bdprune.ops import reference
from bdprune.screening.scores import filter_scores, norm_gain, spectral_norms, z_scores


def tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    found = {
        "conv1.weight": torch.randn(20, 3, 3, 3, generator=generator),
        "conv2.weight": torch.randn(7, 40, 5, 5, generator=generator).double(),
        "half.weight": torch.randn(5, 9, 3, 3, generator=generator).half(),
        "brain.weight": torch.randn(5, 9, 1, 1, generator=generator).bfloat16(),
        "last.weight": torch.randn(6, 4, 3, 3, generator=generator).to(memory_format=torch.channels_last),
        "turned.weight": torch.randn(3, 3, 4, 6, generator=generator).permute(3, 2, 0, 1),
        "part.weight": torch.randn(9, 8, 3, 3, generator=generator)[2:7, 1:5],
        "empty.weight": torch.zeros(4, 0, 3, 3),
    }
    found["conv1.weight"][4, 0, 0, 0] = float("nan")
    return found


def written(folder: Path, form: str) -> Path:
    path = folder / f"model.{form}"
    if form == "safetensors":
        save_file({name: one.contiguous() for name, one in tensors().items()}, path)
    else:
        torch.save(tensors(), path, _use_new_zipfile_serialization=form == "zip")
    return path


@pytest.mark.parametrize("native", [True, False], ids=["core", "numpy"])
@pytest.mark.parametrize("form", ["safetensors", "zip", "legacy"])
@pytest.mark.parametrize("block", [1 << 20, 500], ids=["whole", "blocks"])
def test_norms_of_a_checkpoint(
    tmp_path: Path, form: str, native: bool, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not native:
        monkeypatch.setitem(sys.modules, "bdprune._core", None)
        monkeypatch.delattr("bdprune._core", raising=False)
    monkeypatch.setattr(stored, "_BLOCK_BYTES", block)
    state = open_stored(written(tmp_path, form)).states[""]
    assert set(state) == set(tensors())
    for name, tensor in tensors().items():
        exact = reference.spectral_norms(tensor.contiguous(), None).numpy()
        norms = spectral_norms(state[name])
        # The core sums products of narrower weights in float32 over short runs.
        rtol = 3e-7 if native and tensor.dtype != torch.float64 else 1e-13
        assert np.allclose(norms, exact, rtol=rtol, atol=0.0, equal_nan=True), name


def test_numbers_of_the_other_byte_order(tmp_path: Path) -> None:
    values = np.arange(36, dtype=np.float32).reshape(2, 2, 3, 3)
    (tmp_path / "raw").write_bytes(b"abc" + values.astype(">f4" if sys.byteorder == "little" else "<f4").tobytes())
    tensor = StoredTensor(tmp_path / "raw", "float32", (2, 2, 3, 3), 3, swapped=True)
    assert (tensor.read() == values).all()


def test_values_that_are_not_finite_are_one_clear_error(tmp_path: Path) -> None:
    state = open_stored(written(tmp_path, "zip")).states[""]
    with pytest.raises(ArtifactError, match=r"1 of 20 filters of the tensor 'conv1.weight' have values that are NaN"):
        filter_scores("conv1.weight", state["conv1.weight"], None)


def test_the_gain_of_a_norm(tmp_path: Path) -> None:
    norm = {
        "bn.weight": torch.tensor([-2.0, 1.0]),
        "bn.running_var": torch.tensor([4.0, 0.25]),
        "conv.weight": torch.ones(2, 1, 1, 1),
    }
    torch.save(norm, tmp_path / "a.pth")
    assert np.allclose(norm_gain("bn", open_stored(tmp_path / "a.pth").states[""]), [1.0, 2.0], rtol=1e-4)
    del norm["bn.weight"]
    torch.save(norm, tmp_path / "b.pth")
    assert np.allclose(norm_gain("bn", open_stored(tmp_path / "b.pth").states[""]), [0.5, 2.0], rtol=1e-4)
    norm["bn.running_var"][0] = -1
    torch.save(norm, tmp_path / "c.pth")
    with pytest.raises(ArtifactError, match=r"the variance 'bn\.running_var' is negative"):
        norm_gain("bn", open_stored(tmp_path / "c.pth").states[""])
    norm["bn.running_var"][0] = float("inf")
    torch.save(norm, tmp_path / "d.pth")
    with pytest.raises(ArtifactError, match=r"1 of 2 values of the tensor 'bn\.running_var' are NaN or infinite"):
        norm_gain("bn", open_stored(tmp_path / "d.pth").states[""])


@pytest.mark.parametrize("scores", [[1.0, 2.0, 9.0, 1.5], [3.0, 3.0, 3.0], [1.0, 9.0], [0.1] * 7, [0.0] * 4])
def test_z_scores_are_those_of_the_detector(scores: list[float]) -> None:
    expected = layer_z_scores({"a": torch.tensor(scores, dtype=torch.float64)})["a"]
    if len(set(scores)) > 1:
        assert np.allclose(z_scores(np.array(scores)), expected.numpy(), rtol=1e-12)
    else:
        assert (z_scores(np.array(scores)) == 0).all()
    assert len(z_scores(np.zeros(0))) == 0


def test_a_huge_score_stays_an_outlier() -> None:
    scores = np.ones(50)
    scores[7] = 1e200
    assert z_scores(scores).argmax() == 7 and z_scores(scores)[7] > 6
