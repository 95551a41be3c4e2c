from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from bdprune.errors import OptionError
from bdprune.loops.distillation import AttentionDistillation, FeatureMap, attention, last_maps, outputs_of
from bdprune.loops.finetune import FineTuneSettings, fine_tune
from bdprune.model.architectures import build
from bdprune.model.handle import Model


def test_attention_is_the_normalised_energy_of_each_position() -> None:
    features = torch.randn(2, 3, 4, 5)
    found = attention(features)
    assert found.shape == (2, 20)
    torch.testing.assert_close(found.norm(dim=1), torch.ones(2), rtol=1e-4, atol=1e-4)
    energy = features[1, :, 2, 3].pow(2).sum()
    norm = features[1].pow(2).sum(0).norm()
    assert found[1, 2 * 5 + 3].item() == pytest.approx((energy / norm).item(), rel=1e-4)


def test_the_maps_of_a_resnet_are_the_ends_of_its_last_three_groups() -> None:
    model = Model(build("resnet18_cifar", 10, width=4).eval(), "resnet18_cifar", 10, (3, 32, 32))
    maps = last_maps(model, 3)
    with outputs_of(model.module, maps) as seen:
        model.module(torch.rand(1, 3, 32, 32))
    assert [seen[one].shape[2] for one in maps] == [16, 8, 4]
    assert [one.path.split(".")[0] for one in maps] == ["layer2", "layer3", "layer4"]


def test_the_last_map_of_a_resolution_is_taken_also_of_a_shared_layer() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.down, self.act = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 2, 2), nn.ReLU()
            self.head = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = self.act(self.conv(x))
            return self.head(self.act(self.down(x)).mean((2, 3)))  # type: ignore[no-any-return]

    model = Model(Shared().eval(), "shared", 3, (3, 8, 8))
    assert last_maps(model, 3) == (FeatureMap("act", 0), FeatureMap("act", 1))
    assert last_maps(model, 1) == (FeatureMap("act", 1),)
    assert not model.network.act._forward_hooks  # type: ignore[union-attr]


def test_a_network_without_feature_maps_is_an_error() -> None:
    model = Model(nn.Sequential(nn.Flatten(), nn.Linear(12, 3)).eval(), "flat", 3, (3, 2, 2))
    with pytest.raises(OptionError, match="No layer of the network outputs a feature map"):
        last_maps(model, 3)


def test_the_loss_adds_the_differences_of_attention(bright: Any) -> None:
    maps = (FeatureMap("2"), FeatureMap("5"))
    teacher = fine_tune(bright.model, bright.data, FineTuneSettings(lr=0.1, epochs=2, padding=0))
    teacher.network.zero_grad()
    student = bright.model.clone().module.eval()
    objective = AttentionDistillation(teacher, maps, (3.0, 50.0))
    objective.start(student)
    images, labels = bright.data.images[:12], bright.data.labels[:12]
    loss = objective.backward(student, images, labels)
    expected = functional.cross_entropy(bright.model.module(images), labels)
    for beta, depth in ((3.0, 3), (50.0, 6)):
        ours, theirs = (one.network[:depth](images).square().sum(1).flatten(1) for one in (bright.model, teacher))
        expected = expected + beta * functional.mse_loss(functional.normalize(ours), functional.normalize(theirs))
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4)
    assert student.get_parameter("network.0.weight").grad is not None
    assert all(one.grad is None for one in teacher.network.parameters())


def test_distillation_brings_the_student_to_the_attention_of_the_teacher(bright: Any) -> None:
    maps = last_maps(bright.model, 3)
    teacher = fine_tune(bright.model, bright.data, FineTuneSettings(lr=0.2, epochs=3, padding=0))
    settings = FineTuneSettings(epochs=4, padding=0, small_data=10_000)

    def distance(model: Model) -> float:
        with outputs_of(model.module, maps) as ours, outputs_of(teacher.module, maps) as theirs, torch.no_grad():
            model.module(bright.data.images), teacher.module(bright.data.images)
        return sum(functional.mse_loss(attention(ours[one]), attention(theirs[one])).item() for one in maps)

    objective = AttentionDistillation(teacher, maps, [1000.0] * len(maps))
    assert distance(fine_tune(bright.model, bright.data, settings, objective=objective)) < distance(bright.model)
