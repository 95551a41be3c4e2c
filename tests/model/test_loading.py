"""From files to models: formats, wrappers, types, own architectures, options, and bytes changed at random."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from bdprune.errors import ArchitectureError, ArtifactError, BdpruneError, OptionError
from bdprune.model.architectures import build
from bdprune.model.handle import Model, Normalization
from bdprune.model.loading import load

Write = Callable[..., Path]


def images(model: Model) -> Tensor:
    return torch.rand(5, *model.input_shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("wrapper", [None, "state_dict", "net"])
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module.model.", "_orig_mod.module."])
def test_a_loaded_network_equals_the_saved_one(
    write: Write, small_network: nn.Module, legacy: bool, wrapper: str | None, prefix: str
) -> None:
    state = {prefix + name: tensor for name, tensor in small_network.state_dict().items()}
    path = write({wrapper: state, "epoch": 2} if wrapper else state, _use_new_zipfile_serialization=not legacy)
    model = load(path)
    assert (model.arch, model.num_classes, model.input_shape) == ("ibau_cnn", 4, (3, 8, 8))
    assert model.artifact is not None
    assert (model.artifact.prefix, model.artifact.state_key) == (prefix, wrapper or "")
    assert not model.network.training and model.normalization == Normalization()
    assert all(parameter.requires_grad for parameter in model.network.parameters())
    x = images(model)
    assert torch.equal(model.module(x), small_network(x))


def test_safetensors(write: Write, small_network: nn.Module) -> None:
    model = load(write(safetensors.torch.save(small_network.state_dict())))
    assert torch.equal(model.module(images(model)), small_network(images(model)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions_become_float32(write: Write, small_network: nn.Module, dtype: torch.dtype) -> None:
    state = {name: t.to(dtype) if t.is_floating_point() else t for name, t in small_network.state_dict().items()}
    model = load(write(state))
    assert {parameter.dtype for parameter in model.network.parameters()} == {torch.float32}
    assert torch.equal(model.network.get_parameter("features.0.weight"), state["features.0.weight"].float())


def test_counters_that_old_torch_did_not_write_may_be_missing(write: Write, small_network: nn.Module) -> None:
    state = {name: t for name, t in small_network.state_dict().items() if "num_batches" not in name}
    model = load(write(state))
    assert model.network.get_buffer("features.1.num_batches_tracked") == 0
    assert torch.equal(model.module(images(model)), small_network(images(model)))


def test_normalisation_and_size(write: Write) -> None:
    network = build("resnet18_cifar", 3, width=2).eval()
    normalization = Normalization((0.5, 0.4, 0.3), (0.2, 0.3, 0.4))
    model = load(write(network.state_dict()), normalize=normalization, input_shape=(3, 40, 48))
    assert model.input_shape == (3, 40, 48)
    x = images(model)
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (normalization.mean, normalization.std))
    assert torch.allclose(model.module(x), network((x - mean) / std), atol=1e-6)
    assert load(write(network.state_dict())).input_shape == (3, 32, 32)


def test_invalid_options_are_errors(write: Write, small_network: nn.Module) -> None:
    path = write(small_network.state_dict())
    with pytest.raises(OptionError, match="Invalid input shape"):
        load(path, input_shape=(3, 0, 8))
    with pytest.raises(ArchitectureError, match=r"cannot take images of shape \(3, 64, 64\)"):
        load(path, input_shape=(3, 64, 64))
    with pytest.raises(ArchitectureError, match="images of 3 channels, not 1") as caught:
        load(path, input_shape=(1, 8, 8))
    assert "--input-shape 3x8x8" in caught.value.hint
    with pytest.raises(ArchitectureError, match="4 classes, not 10") as caught:
        load(path, num_classes=10)
    assert "or give a checkpoint with 10 classes" in caught.value.hint
    with pytest.raises(ArchitectureError, match="not a resnet18_cifar"):
        load(path, arch="resnet18_cifar")
    assert load(path, arch="ibau_cnn", num_classes=4).num_classes == 4


def test_errors_about_shapes_nan_and_whole_numbers_name_the_weight(write: Write, small_network: nn.Module) -> None:
    state = small_network.state_dict()
    with pytest.raises(ArchitectureError, match=r"'features.3.weight' has shape \(2, 2, 5, 5\)"):
        load(write({**state, "features.3.weight": torch.ones(2, 2, 5, 5)}))
    with pytest.raises(ArtifactError, match=r"model.pth: 32 of 36 values of the tensor 'features.3.weight' are NaN"):
        load(write({**state, "features.3.weight": torch.full((2, 2, 3, 3), float("nan")).tril(1)}))
    with pytest.raises(ArtifactError, match="quantised"):
        load(write({**state, "features.3.weight": torch.ones(2, 2, 3, 3, dtype=torch.int8)}))


def test_the_random_state_is_unchanged(write: Write, small_network: nn.Module, own_module: str) -> None:
    path = write(small_network.state_dict())
    before = torch.get_rng_state()
    load(path)
    load(path, arch=f"{own_module}:make", input_shape=(3, 8, 8))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.fixture
def own_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A module of the user in the working directory."""
    code = """
import torch
from torch import nn
from bdprune.model.architectures import build
from bdprune.model.architectures.ibau import IbauCnn
def make(num_classes): return build("ibau_cnn", num_classes, width=2, input_size=8)
def plain(): return build("ibau_cnn", 4, width=2, input_size=8)
def other(num_classes=4): return build("ibau_cnn", num_classes, width=3, input_size=8)
def broken(): raise RuntimeError("no luck")
def leaves(): raise SystemExit(0)
def nothing(): return 3
class Wrapped(nn.Module):
    def __init__(self, num_classes=10):
        super().__init__()
        self.model = make(num_classes)
    def forward(self, x): return self.model(x)
class Maps(IbauCnn):
    def __init__(self): super().__init__(4, width=2, input_size=8)
    def forward(self, x): return self.features(x).flatten(2)
class Nothing(Maps):
    def forward(self, x): return "logits"
value = 3
"""
    (tmp_path / "own_networks.py").write_text(code)
    monkeypatch.chdir(tmp_path)
    yield "own_networks"
    sys.modules.pop("own_networks", None)


@pytest.mark.parametrize("name", ["make", "plain", "Wrapped"])
@pytest.mark.parametrize("prefix", ["", "module.", "module.model."])
def test_an_architecture_of_the_user_is_loaded(
    write: Write, small_network: nn.Module, own_module: str, name: str, prefix: str
) -> None:
    inner = "model." if name == "Wrapped" and not prefix.endswith("model.") else ""
    state = {prefix + inner + key: tensor for key, tensor in small_network.state_dict().items()}
    model = load(write(state), arch=f"{own_module}:{name}", input_shape=(3, 8, 8))
    assert (model.arch, model.num_classes, model.input_shape) == (f"{own_module}:{name}", 4, (3, 8, 8))
    assert torch.equal(model.module(images(model)), small_network(images(model)))
    assert not model.network.training
    assert model.artifact is not None
    assert model.artifact.prefix == ("module." if name == "Wrapped" and prefix else prefix)


@pytest.mark.parametrize(
    ("arch", "error", "message"),
    [
        ("no_such_module_here:make", OptionError, "Cannot import"),
        ("own_networks:missing", OptionError, "Cannot import"),
        ("own_networks:value", OptionError, "not callable"),
        ("own_networks:broken", OptionError, "RuntimeError: no luck"),
        ("own_networks:leaves", OptionError, "SystemExit: 0"),
        ("own_networks:nothing", OptionError, "returned a int"),
        ("own_networks:other", ArchitectureError, r"not a own_networks:other: 'features.0.weight' has shape"),
        ("own_networks:Maps", ArchitectureError, "instead of logits"),
        ("own_networks:Nothing", ArchitectureError, "returns a str instead of logits"),
    ],
)
def test_an_architecture_of_the_user_that_fails_is_an_error(
    write: Write, small_network: nn.Module, own_module: str, arch: str, error: type[BdpruneError], message: str
) -> None:
    with pytest.raises(error, match=message):
        load(write(small_network.state_dict()), arch=arch, input_shape=(3, 8, 8))
    assert sys.path[0] != str(Path.cwd())


def test_a_script_that_exits_is_an_error(write: Write, small_network: nn.Module, own_module: str) -> None:
    Path("script.py").write_text("import sys\nsys.exit(0)\n")
    with pytest.raises(OptionError, match=r"Cannot import script:main: SystemExit"):
        load(write(small_network.state_dict()), arch="script:main", input_shape=(3, 8, 8))


def files() -> dict[str, bytes]:
    """One small checkpoint in each format."""
    torch.manual_seed(0)
    state = build("ibau_cnn", 4, width=1, input_size=8).state_dict()
    result = {"safetensors": safetensors.torch.save(state)}
    for name, new in (("zip", True), ("legacy", False)):
        buffer = io.BytesIO()
        torch.save({"net": state, "epoch": 1}, buffer, _use_new_zipfile_serialization=new)
        result[name] = buffer.getvalue()
    return result


FILES = files()


@pytest.mark.parametrize("name", FILES)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_changed_bytes_load_or_raise_an_error(tmp_path: Path, name: str, data: st.DataObject) -> None:
    """Loading returns a model or raises an error with a message, and nothing else."""
    content = bytearray(FILES[name])
    interesting = st.integers(0, min(len(content) - 1, 3000)) | st.integers(0, len(content) - 1)
    for _ in range(data.draw(st.integers(1, 6))):
        place, value = data.draw(interesting), data.draw(st.integers(0, 255) | st.sampled_from(b"(.Rc}\x00\xff"))
        content[place] = value
    path = tmp_path / "model"
    path.write_bytes(content[: data.draw(st.just(len(content)) | st.integers(1, len(content)))])
    try:
        model = load(path)
    except (ArtifactError, ArchitectureError) as error:
        assert error.message and str(error).encode()
    else:
        assert model.arch == "ibau_cnn" and model.module(images(model)).shape == (5, 4)


def test_an_unknown_option_is_named(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="'archs'"):
        load(tmp_path / "any.pth", archs="resnet18_cifar")  # type: ignore[call-arg]
