"""Networks that return tuples, objects, one logit or maps of one pixel, in eval and in training mode."""

from __future__ import annotations

import collections
import copy
import pickle
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from bdprune.errors import ArchitectureError
from bdprune.model.handle import Model
from bdprune.model.outputs import give_logits

Pair = collections.namedtuple("Pair", ["logits", "aux"])
SHAPE = (3, 4, 4)


class Net(nn.Module):
    """Two matrices of features, returned in different forms."""

    def __init__(self, kind: str, classes: int = 5) -> None:
        super().__init__()
        self.kind, self.head, self.aux = kind, nn.Linear(3, classes), nn.Linear(3, 7)

    def forward(self, images: Tensor) -> Any:
        features = images.mean((2, 3))
        z, aux = self.head(features), self.aux(features)
        made = {
            "plain": z,
            "tuple": (z, aux),
            "features first": (features, z),
            "list": [z],
            "dict": {"logits": z, "features": features},
            "out": {"out": z},
            "named": Pair(z, aux),
            "object": Output(logits=z),
            "maps": z[:, :, None, None],
            "aux in training": Pair(z, aux) if self.training else z,
            "only in training": {"logits": z, "loss": aux} if self.training else (z, aux),
            "squeezed": z.squeeze(1),
            "text": "logits",
            "cube": z[:, :, None],
            "nested": ((z, {}), None),
            "dataclass": Made(z),
        }
        return made[self.kind]


@dataclass
class Made:
    """An output object without a field named logits."""

    scores: Tensor


class Output(dict):  # type: ignore[type-arg]
    """Like the classes of Hugging Face."""

    @property
    def logits(self) -> Any:
        return self["logits"]


def test_the_main_output_in_training_mode_is_found_by_its_values() -> None:
    class Auxiliary(Net):
        def forward(self, images: Tensor) -> Any:
            main, other = self.head(images.mean((2, 3))), self.second(images.mean((2, 3)))
            return (other, main) if self.training else main

    network = Auxiliary("plain").eval()
    network.second = nn.Linear(3, 5)
    give_logits(network, SHAPE)
    images = torch.rand(4, *SHAPE)
    assert torch.equal(network.train()(images), network.head(images.mean((2, 3))))


def test_squeezed_logits_are_not_one_logit() -> None:
    class Squeezed(Net):
        def forward(self, images: Tensor) -> Any:
            return self.head(images.mean((2, 3))).squeeze()

    assert give_logits(Squeezed("plain").eval(), SHAPE) == 5
    assert give_logits(Squeezed("plain", classes=1).eval(), SHAPE) == 2


def test_weights_that_hooks_compute_can_be_copied() -> None:
    network = Net("plain")
    torch.nn.utils.spectral_norm(network.head)  # type: ignore[no-untyped-call]
    network.eval()
    assert give_logits(network, SHAPE) == 5
    copy.deepcopy(network)


def test_a_forward_pass_without_gradients_is_one_clear_error() -> None:
    class Silent(Net):
        def forward(self, images: Tensor) -> Any:
            with torch.no_grad():
                return super().forward(images)

    with pytest.raises(ArchitectureError, match="computes no gradients"):
        give_logits(Silent("plain").eval(), SHAPE)


KINDS = (
    "plain",
    "tuple",
    "list",
    "dict",
    "out",
    "named",
    "object",
    "maps",
    "aux in training",
    "only in training",
    "nested",
    "dataclass",
)


@pytest.mark.parametrize("kind", KINDS)
def test_both_modes_give_logits(kind: str) -> None:
    network = Net(kind).eval()
    names = list(network.state_dict())
    assert give_logits(network, SHAPE) == 5
    images = torch.rand(6, *SHAPE)
    expected = network.head(images.mean((2, 3)))
    assert torch.equal(network(images), expected) and torch.equal(network.train()(images), expected)
    assert list(network.state_dict()) == names
    for twin in (copy.deepcopy(network), pickle.loads(pickle.dumps(network))):
        assert torch.equal(twin(images), expected)


def test_the_number_of_classes_distinguishes_logits_from_features() -> None:
    network = Net("features first").eval()
    assert give_logits(network, SHAPE, 5) == 5
    images = torch.rand(2, *SHAPE)
    assert torch.equal(network(images), network.head(images.mean((2, 3))))
    assert give_logits(Net("features first").eval(), SHAPE) == 5, "the features have no classes"


@pytest.mark.parametrize("kind", ["plain", "squeezed", "tuple"])
def test_one_logit_becomes_two_classes(kind: str) -> None:
    network = Net(kind, classes=1).eval()
    images = torch.rand(4, *SHAPE)
    z = network.head(images.mean((2, 3)))
    assert give_logits(network, SHAPE) == 2
    logits = network(images)
    assert torch.equal(logits, torch.cat([torch.zeros(4, 1), z], 1))
    assert torch.allclose(logits.softmax(1)[:, 1:], z.sigmoid())


def test_a_plain_network_keeps_its_class() -> None:
    network = Net("plain").eval()
    give_logits(network, SHAPE)
    assert type(network) is Net


def test_networks_with_one_class_keep_one_class_and_can_be_traced() -> None:
    one, two = Net("tuple").eval(), Net("tuple").eval()
    for network in (one, two):
        give_logits(network, SHAPE)
    assert type(one) is type(two) is not Net and isinstance(one, Net)
    single = Net("plain", classes=1).eval()
    give_logits(single, SHAPE)
    images = torch.rand(2, *SHAPE)
    assert torch.equal(fx.Interpreter(fx.symbolic_trace(Traced(single))).run(images), single(images))
    assert Model(single, "net", 2, SHAPE).groups == ()


class Traced(nn.Module):
    """A network inside another module, such as a normalisation."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Any:
        return self.network(images)


@pytest.mark.parametrize(("kind", "words"), [("text", "a str instead of logits"), ("cube", r"shape \(2, 5, 1\)")])
def test_outputs_without_logits_are_errors_that_describe_the_output(kind: str, words: str) -> None:
    with pytest.raises(ArchitectureError, match=words) as caught:
        give_logits(Net(kind).eval(), SHAPE)
    assert "--arch" in caught.value.hint


def test_images_that_do_not_fit_are_an_error_that_names_the_option() -> None:
    with pytest.raises(ArchitectureError, match=r"cannot take images of shape \(1, 4, 4\)") as caught:
        give_logits(Net("plain").eval(), (1, 4, 4))
    assert "--input-shape" in caught.value.hint
