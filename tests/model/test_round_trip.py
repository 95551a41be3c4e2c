"""Every kind of checkpoint is repaired, written back, and loaded strictly into the network that made it."""

from __future__ import annotations

import itertools
import json
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.utils import prune as torch_prune

from bdprune.errors import ArtifactError, OutputError
from bdprune.model.architectures import build
from bdprune.model.edit.pruning import prune
from bdprune.model.loading import load, load_all
from bdprune.model.saving import save

State = dict[str, Any]
FILTERS = {"features.0": [1], "features.3": [0]}

WRAPPERS: dict[str, Callable[[Any], Any]] = {
    "bare": lambda state: state,
    "state_dict": lambda state: {"epoch": 9, "state_dict": state, "arch": "x"},
    "nested": lambda state: {"ckpt": {"net": state, "lr": [0.1]}, "optimizer": {"state": {}, "param_groups": []}},
    "list": lambda state: {"models": [{"name": "a"}, state], "acc": 0.9},
}
UNWRAP: dict[str, Callable[[Any], Any]] = {
    "bare": lambda found: found,
    "state_dict": lambda found: found["state_dict"],
    "nested": lambda found: found["ckpt"]["net"],
    "list": lambda found: found["models"][1],
}
PREFIXES = ("", "module.", "_forward_module.", "some.thing.of.mine.")
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
EXTRAS: dict[str, State] = {
    "none": {},
    "all": {
        "n_averaged": torch.tensor(3),
        "features.total_ops": torch.zeros(1, dtype=torch.float64),
        "criterion.weight": torch.ones(4),
        "metric.confusion": torch.ones(4, 4, dtype=torch.int64),
    },
}
COMBINATIONS = [
    *itertools.product(("zip", "legacy"), WRAPPERS, PREFIXES, DTYPES, EXTRAS),
    *itertools.product(("safetensors", "shards"), ("bare",), PREFIXES, DTYPES, EXTRAS),
]


def test_there_are_enough_combinations() -> None:
    assert len(COMBINATIONS) >= 200


@pytest.mark.parametrize(
    ("kind", "wrapper", "prefix", "dtype", "extra"),
    COMBINATIONS,
    ids=lambda value: str(value).removeprefix("torch."),
)
def test_a_repaired_file_loads_into_the_original_network(
    tmp_path: Path, small_network: nn.Module, kind: str, wrapper: str, prefix: str, dtype: torch.dtype, extra: str
) -> None:
    state = stored(small_network, prefix, dtype) | EXTRAS[extra]
    path = write(tmp_path / "old", kind, WRAPPERS[wrapper](state))
    model = load(path)
    assert model.artifact is not None
    optimiser = {"optimizer (the state of an optimiser)"} if wrapper == "nested" else set()
    assert model.artifact.prefix == prefix and set(model.artifact.kept) == EXTRAS[extra].keys() | optimiser
    repaired = prune(model, FILTERS)
    out = tmp_path / "new" / path.name
    out.parent.mkdir()
    save(repaired, out)
    found = UNWRAP[wrapper](read(out, kind))
    assert list(found) == list(UNWRAP[wrapper](read(path, kind)))  # safetensors sorts them
    assert {key: value.dtype for key, value in found.items()} == {key: value.dtype for key, value in state.items()}
    assert all(torch.equal(found[key], value) for key, value in EXTRAS[extra].items())
    images = torch.rand(3, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    again = strictly(found, prefix, EXTRAS[extra])
    assert torch.allclose(again(images), repaired.network(images), atol=1e-6 if dtype in LOSSLESS else 0.05)
    assert not torch.equal(again(images), small_network(images))


LOSSLESS = (torch.float32, torch.float64)


def stored(network: nn.Module, prefix: str, dtype: torch.dtype) -> State:
    items = network.state_dict().items()
    return {prefix + name: value.to(dtype) if value.is_floating_point() else value.clone() for name, value in items}


def strictly(state: State, prefix: str, extras: State) -> nn.Module:
    """The network that made the checkpoint, with the weights of the new file."""
    network = build("ibau_cnn", 4, width=2, input_size=8)
    own = {key.removeprefix(prefix): value.float() for key, value in state.items() if key not in extras}
    network.load_state_dict(own, strict=True)
    return network.eval()


def write(folder: Path, kind: str, checkpoint: Any) -> Path:
    folder.mkdir()
    if kind == "safetensors":
        save_file(checkpoint, folder / "model.safetensors", {"format": "pt"})
        return folder / "model.safetensors"
    if kind == "shards":
        return write_shards(folder, checkpoint)
    torch.save(checkpoint, folder / "model.pth", _use_new_zipfile_serialization=kind == "zip")
    return folder / "model.pth"


def write_shards(folder: Path, state: State) -> Path:
    names = [f"model-0000{part}-of-00002.safetensors" for part in (1, 2)]
    where = {key: names[number % 2] for number, key in enumerate(state)}
    for name in names:
        save_file({key: value for key, value in state.items() if where[key] == name}, folder / name, {"format": "pt"})
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 1, "by": "us"}, "weight_map": where}))
    return index


def read(path: Path, kind: str) -> Any:
    if kind == "safetensors":
        tensors = load_file(path)
        return {key: tensors[key] for key in in_order(path)}
    if kind == "shards":
        where = json.loads(path.read_text())["weight_map"]
        parts = {name: load_file(path.parent / name) for name in set(where.values())}
        return {key: parts[name][key] for key, name in where.items()}
    return torch.load(path, weights_only=True)


def in_order(path: Path) -> list[str]:
    data = path.read_bytes()
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    return [key for key in header if key != "__metadata__"]


def test_shards_are_written_as_one_file_with_another_name(tmp_path: Path, small_network: nn.Module) -> None:
    state = stored(small_network, "", torch.float32)
    model = load(write(tmp_path / "old", "shards", state))
    written = save(prune(model, FILTERS), tmp_path / "one.safetensors")
    assert list(in_order(tmp_path / "one.safetensors")) == list(state)
    assert written.bytes == (tmp_path / "one.safetensors").stat().st_size
    strictly(load_file(tmp_path / "one.safetensors"), "", {})


def test_shards_never_overwrite_their_source(tmp_path: Path, small_network: nn.Module) -> None:
    index = write(tmp_path / "old", "shards", stored(small_network, "", torch.float32))
    before = {path.name: path.read_bytes() for path in index.parent.iterdir()}
    for name in ("model.safetensors.index.json", "model-00001-of-00002.safetensors"):
        with pytest.raises(OutputError, match="is the input checkpoint"):
            save(load(index), index.parent / name)
    assert {path.name: path.read_bytes() for path in index.parent.iterdir()} == before
    save(load(index), index.parent / "new.safetensors.index.json")
    assert {name: (index.parent / name).read_bytes() for name in before} == before
    assert load(index.parent / "new.safetensors.index.json").num_classes == 4
    assert json.loads((index.parent / "new.safetensors.index.json").read_text())["metadata"]["by"] == "us"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda index, folder: (folder / "model-00002-of-00002.safetensors").unlink(), "'model-00002.*No such file"),
        (lambda index, folder: index["weight_map"].update(other="model-00001-of-00002.safetensors"), "only the index"),
        (lambda index, folder: index["weight_map"].pop("classifier.bias"), "the index does not name"),
        (lambda index, folder: index["weight_map"].update(x="../../etc/passwd"), "not a file next to it"),
        (lambda index, folder: index["weight_map"].update(x=3), "no map of tensors"),
        (lambda index, folder: index.update(weight_map={}), "no map of tensors"),
        (lambda index, folder: index["weight_map"].update(x="model.safetensors.index.json"), "is an index itself"),
    ],
)
def test_shards_that_do_not_fit_their_index_are_one_clear_error(
    tmp_path: Path, small_network: nn.Module, change: Callable[[Any, Path], object], words: str
) -> None:
    path = write(tmp_path / "old", "shards", stored(small_network, "", torch.float32))
    index = json.loads(path.read_text())
    change(index, path.parent)
    path.write_text(json.dumps(index))
    with pytest.raises(ArtifactError, match=words) as caught:
        load(path)
    assert "model.safetensors.index.json" in caught.value.message and caught.value.hint


def test_pruned_weights_and_their_masks_are_written_separately(tmp_path: Path, small_network: nn.Module) -> None:
    network = build("ibau_cnn", 4, width=2, input_size=8)
    network.load_state_dict(small_network.state_dict())
    for place in (0, 3):
        torch_prune.random_unstructured(network.features[place], "weight", amount=0.3)  # type: ignore[index,no-untyped-call]
    network.eval()
    torch.save(network.state_dict(), tmp_path / "old.pth")
    model = load(tmp_path / "old.pth")
    images = torch.rand(3, 3, 8, 8)
    assert torch.equal(model.network(images), network(images))
    save(model, tmp_path / "same.pth")
    same = torch.load(tmp_path / "same.pth", weights_only=True)
    assert all(torch.equal(same[key], value) for key, value in network.state_dict().items())
    repaired = prune(model, FILTERS, mode="weights")
    with torch.no_grad():  # a fine-tuning run that changes masked weights
        repaired.network.get_parameter("features.3.weight")[1] += 0.25
    save(repaired, tmp_path / "new.pth")
    found = torch.load(tmp_path / "new.pth", weights_only=True)
    network.load_state_dict(found, strict=True)
    assert list(found) == list(same)
    assert torch.allclose(network(images), repaired.network(images), atol=1e-6)


def test_masks_of_another_shape_are_one_clear_error(tmp_path: Path, small_network: nn.Module) -> None:
    state = dict(small_network.state_dict())
    weight = state.pop("features.3.weight")
    torch.save(state | {"features.3.weight_orig": weight, "features.3.weight_mask": torch.ones(2)}, tmp_path / "m.pth")
    with pytest.raises(ArtifactError, match=r"mask of 'features.3.weight_orig' has shape \(2,\)"):
        load(tmp_path / "m.pth")


def test_every_set_of_a_file_is_written_with_its_own_repair(tmp_path: Path, small_network: nn.Module) -> None:
    other = {
        name: value * 1.5 if value.is_floating_point() else value for name, value in small_network.state_dict().items()
    }
    mixed: OrderedDict[str, Tensor] = OrderedDict()
    mixed |= {f"student.{name}": value for name, value in small_network.state_dict().items()}
    mixed |= {f"teacher.{name}": value for name, value in other.items()}
    checkpoint = {"model": mixed, "ema": {"module": {f"net.{name}": v for name, v in other.items()}}, "epoch": 4}
    torch.save(checkpoint, tmp_path / "old.pth")
    models = load_all(tmp_path / "old.pth").models
    names = [one.artifact.state_key for one in models if one.artifact]
    assert names == ["model/student", "model/teacher", "ema/module"]
    repaired = [prune(one, {"features.0": [number % 2]}) for number, one in enumerate(models)]
    save(repaired, tmp_path / "new.pth")
    found = torch.load(tmp_path / "new.pth", weights_only=True)
    assert found["epoch"] == 4 and list(found["model"]) == list(mixed)
    for model, state, prefix in (
        (repaired[0], found["model"], "student."),
        (repaired[1], found["model"], "teacher."),
        (repaired[2], found["ema"]["module"], "net."),
    ):
        own = {key: value for key, value in state.items() if key.startswith(prefix)}
        images = torch.rand(2, 3, 8, 8)
        assert torch.equal(strictly(own, prefix, {})(images), model.network(images))
