"""Drop-in checkpoints: same format, wrapper, names, order, types, extras; atomic; never over the input."""

from __future__ import annotations

import os
import shutil
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors
import safetensors.torch
import torch
from torch import nn

from bdprune.errors import OutputError
from bdprune.files.artifact import read_checkpoint
from bdprune.files.safetensors_file import dump_safetensors
from bdprune.model.edit.pruning import prune
from bdprune.model.handle import Model
from bdprune.model.loading import load
from bdprune.model.saving import rounded, save, to_bytes

Write = Callable[..., Path]


def assert_same(a: Any, b: Any) -> None:
    """Equal in type, order and every bit."""
    assert type(a) is type(b)
    if isinstance(a, dict):
        assert list(a) == list(b) and getattr(a, "_metadata", None) == getattr(b, "_metadata", None)
        for key in a:
            assert_same(a[key], b[key])
    elif isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype and a.shape == b.shape
        assert torch.equal(a.contiguous().view(-1).view(torch.uint8), b.contiguous().view(-1).view(torch.uint8))
    else:
        assert a == b


def mixed(network: nn.Module) -> OrderedDict[str, Any]:
    """A state dict with a prefix, an unusual order, several types, and entries that do not belong to the network."""
    state: OrderedDict[str, Any] = OrderedDict()
    for index, (name, tensor) in enumerate(reversed(network.state_dict().items())):
        dtypes = (torch.float32, torch.float16, torch.float64, torch.bfloat16)
        dtype = dtypes[index % 4] if tensor.is_floating_point() else tensor.dtype
        state["module." + name] = (tensor.double() * 1.000000001).to(dtype)
    state["module.total_ops"] = torch.zeros(1, dtype=torch.float64)
    state["version"] = "x"
    state._metadata = OrderedDict([("", {"version": 1})])  # type: ignore[attr-defined]
    return state


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("keys", [(), ("net",), ("model", "state_dict")])
def test_an_unchanged_checkpoint_is_written_bit_by_bit(
    write: Write, small_network: nn.Module, tmp_path: Path, legacy: bool, keys: tuple[str, ...]
) -> None:
    checkpoint: Any = mixed(small_network)
    for key in reversed(keys):
        checkpoint = {"epoch": 7, key: checkpoint, "optimizer": {"lr": [0.1], "buffer": torch.ones(3)}}
    path = write(checkpoint, _use_new_zipfile_serialization=not legacy)
    out = tmp_path / "out.pth"
    save(load(path), out)
    assert read_checkpoint(out).format == ("torch-legacy" if legacy else "torch-zip")
    assert_same(torch.load(out, weights_only=True), checkpoint)


def test_an_unchanged_safetensors_file_is_written_byte_by_byte(
    write: Write, small_network: nn.Module, tmp_path: Path
) -> None:
    state = {name: t.half() if t.is_floating_point() else t for name, t in small_network.state_dict().items()}
    for data in (dump_safetensors(state, {"format": "pt", "by": "us"}), dump_safetensors(state, {})):
        save(load(write(data)), tmp_path / "out.safetensors")
        assert (tmp_path / "out.safetensors").read_bytes() == data


def test_only_pruned_tensors_differ_and_the_original_code_reads_them(
    write: Write, small_network: nn.Module, tmp_path: Path
) -> None:
    state = {name: t.double() if t.is_floating_point() else t for name, t in small_network.state_dict().items()}
    state["features.4.weight"] = state["features.4.weight"] + 1e-12
    model = load(write({"net": state, "acc": 1.0}))
    pruned = prune(model, {"features.3": [0]})
    save(pruned, tmp_path / "out.pth")
    found = torch.load(tmp_path / "out.pth", weights_only=True)["net"]
    expected = dict(state, **{"features.4.weight": state["features.4.weight"] * torch.tensor([0.0, 1.0])})
    assert_same(dict(found), expected)
    again = load(tmp_path / "out.pth")
    x = torch.rand(2, 3, 8, 8)
    assert torch.equal(again.module(x), pruned.module(x))


def test_counters_that_the_file_did_not_have_are_not_added(
    write: Write, small_network: nn.Module, tmp_path: Path
) -> None:
    state = {name: t for name, t in small_network.state_dict().items() if "num_batches" not in name}
    save(load(write(state)), tmp_path / "out.pth")
    assert_same(torch.load(tmp_path / "out.pth", weights_only=True), state)


def test_a_model_without_a_file_is_written_as_safetensors(small_model: Model, tmp_path: Path) -> None:
    save(small_model, str(tmp_path / "out.safetensors"))
    found = safetensors.torch.load_file(tmp_path / "out.safetensors")
    state = small_model.network.state_dict()
    assert found.keys() == state.keys() and all(torch.equal(found[name], state[name]) for name in state)
    assert load(tmp_path / "out.safetensors").arch == "ibau_cnn"


def test_saving_twice_gives_the_same_bytes(write: Write, small_network: nn.Module) -> None:
    for legacy in (False, True):
        path = write(small_network.state_dict(), _use_new_zipfile_serialization=not legacy)
        if not legacy:  # the older format stores memory addresses
            assert to_bytes(load(path)) == to_bytes(load(path))


def test_the_input_is_never_replaced(write: Write, small_network: nn.Module, tmp_path: Path) -> None:
    path = write(small_network.state_dict())
    os.symlink(path, tmp_path / "link.pth")
    os.link(path, tmp_path / "hard.pth")
    content = path.read_bytes()
    for name in ("model.pth", "link.pth", "hard.pth", "./x/../model.pth"):
        (tmp_path / "x").mkdir(exist_ok=True)
        with pytest.raises(OutputError, match="is the input checkpoint"):
            save(load(path), tmp_path / name)
    assert path.read_bytes() == content


def test_unwritable_paths_are_errors(small_model: Model, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("x")
    for path in (
        tmp_path / "none" / "out.pth",
        tmp_path / "folder",
        tmp_path / "file" / "out.pth",
        Path("/proc/out.pth"),
    ):
        with pytest.raises(OutputError, match="Cannot write") as caught:
            save(small_model, path)
        assert caught.value.hint
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["file", "folder"]


def test_a_failed_write_keeps_the_old_file(small_model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out.safetensors"
    out.write_text("old")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OutputError, match="No space left"):
        save(small_model, out)
    assert [entry.name for entry in tmp_path.iterdir()] == ["out.safetensors"] and out.read_text() == "old"


def test_an_interruption_leaves_no_file(small_model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(descriptor: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        save(small_model, tmp_path / "out.safetensors")
    assert list(tmp_path.iterdir()) == []


def test_an_existing_output_is_replaced_with_common_permissions(small_model: Model, tmp_path: Path) -> None:
    out = tmp_path / "out.safetensors"
    out.write_text("old")
    save(small_model, out)
    plain = tmp_path / "plain"
    plain.write_text("")
    assert out.stat().st_mode == plain.stat().st_mode
    assert load(out).num_classes == 4


def test_the_model_is_never_changed(
    small_model: Model, tmp_path: Path, fingerprint: Callable[[nn.Module], str]
) -> None:
    before = fingerprint(small_model.network)
    save(small_model, tmp_path / "out.safetensors")
    assert fingerprint(small_model.network) == before
    shutil.rmtree(tmp_path)


def test_a_finite_value_stays_finite_in_half_precision(write: Write, small_network: nn.Module, tmp_path: Path) -> None:
    model = load(write({name: value.half() for name, value in small_network.state_dict().items()}))
    name, value = next(iter(model.network.state_dict().items()))
    value.view(-1)[:3] = torch.tensor([70000.0, -1e9, 1.0001])
    save(model, tmp_path / "out.pth")
    key = next(key for key, slot in model.artifact.slots.items() if slot.name == name)
    written = torch.load(tmp_path / "out.pth", weights_only=True)[key].view(-1)[:3]
    assert written.tolist() == [65504.0, -65504.0, 1.0]
    assert torch.equal(rounded(model).network.state_dict()[name].view(-1)[:3], written.float())


def test_the_description_of_a_replaced_file_is_removed(
    small_model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    description = tmp_path / "out.safetensors.arch.json"
    description.write_text("{}")
    save(small_model, tmp_path / "out.safetensors")
    assert not description.exists() and load(tmp_path / "out.safetensors").num_classes == 4
    description.mkdir()
    with pytest.raises(OutputError, match="describes the file that was replaced"):
        save(small_model, tmp_path / "out.safetensors")


def test_a_masked_weight_in_half_precision_is_written_as_it_was_rounded(
    write: Write, small_network: nn.Module, tmp_path: Path
) -> None:
    state: dict[str, Any] = {name: value.half() for name, value in small_network.state_dict().items()}
    name = next(name for name, value in state.items() if value.ndim == 4)
    weight = state.pop(name)
    state |= {f"{name}_orig": weight, f"{name}_mask": (torch.arange(weight.numel()) % 2).view_as(weight).half()}
    model = load(write(state))
    value = model.network.state_dict()[name]
    value.view(-1)[:4] = torch.tensor([70000.0, -70000.0, 1.0001, 0.0])
    save(model, tmp_path / "out.pth")
    again = load(tmp_path / "out.pth").network.state_dict()[name]
    assert again.view(-1)[:4].tolist() == [65504.0, -65504.0, 1.0, 0.0]
    assert torch.equal(rounded(model).network.state_dict()[name], again)
