import pytest
import torch
from torch import nn

from bdprune.analysis.lipschitz import channel_lipschitz, norm_gain
from bdprune.analysis.statistics import layer_z_scores
from bdprune.model.handle import Model


def network() -> nn.Sequential:
    torch.manual_seed(0)
    convs = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 4, 5, bias=False)
    net = nn.Sequential(convs[0], nn.BatchNorm2d(6), nn.ReLU(), convs[1], nn.AdaptiveAvgPool2d(1), nn.Flatten())
    with torch.no_grad():
        net[1].weight.copy_(torch.tensor([1.0, -2, 0.5, 0, 3, 1]))
        net[1].running_var.copy_(torch.tensor([1.0, 4, 0.25, 1, 9, 2]))
    return net


def test_spectral_norm_times_the_gain_of_the_norm() -> None:
    net = network()
    scores = channel_lipschitz(Model(net.eval(), "t", 4, (3, 16, 16)))
    matrices = net[0].weight.detach().double().flatten(2)
    gain = net[1].weight.detach().double().abs() / (net[1].running_var.double() + 1e-5).sqrt()
    assert torch.allclose(scores["0"].double(), torch.linalg.matrix_norm(matrices, 2) * gain, rtol=1e-5)


def test_without_a_norm_the_score_is_the_spectral_norm() -> None:
    net = network()
    scores = channel_lipschitz(Model(net.eval(), "t", 4, (3, 16, 16)))
    expected = torch.linalg.matrix_norm(net[3].weight.detach().double().flatten(2), 2)
    assert torch.allclose(scores["3"].double(), expected, rtol=1e-5)


def test_the_largest_gain_of_several_consumers_counts() -> None:
    class Dense(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3, bias=False)
            self.one, self.two = nn.BatchNorm2d(4), nn.BatchNorm2d(4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.conv(x)
            return (self.one(y).relu() + self.two(y)).mean((2, 3))

    net = Dense().eval()
    with torch.no_grad():
        net.one.weight.copy_(torch.tensor([1.0, 2, 3, 4]))
        net.two.weight.copy_(torch.tensor([4.0, 3, 2, 1]))
    scores = channel_lipschitz(Model(net, "t", 4, (3, 8, 8)))["conv"].double()
    plain = torch.linalg.matrix_norm(net.conv.weight.detach().double().flatten(2), 2)
    assert torch.allclose(scores, plain * torch.tensor([4.0, 3, 3, 4]) / (1 + 1e-5) ** 0.5, rtol=1e-5)


def test_a_norm_without_running_variance_has_variance_one_on_the_networks_device() -> None:
    norm = nn.BatchNorm2d(6, track_running_stats=False)
    net = nn.Sequential(nn.Conv2d(3, 6, 3), norm, nn.ReLU(), nn.Flatten(), nn.Linear(24, 2))
    (group,) = Model(net.eval(), "t", 2, (3, 4, 4)).groups
    assert torch.allclose(norm_gain(net, group), torch.full((6,), (1 + 1e-5) ** -0.5))
    assert norm_gain(net.to("meta"), group).device.type == "meta"


def test_z_scores_use_the_unbiased_standard_deviation() -> None:
    z = layer_z_scores({"a": torch.tensor([1.0, 2, 3, 6])})["a"]
    assert z.tolist() == pytest.approx([(v - 3) / (14 / 3) ** 0.5 for v in (1, 2, 3, 6)])


@pytest.mark.parametrize("scores", [[1.0], [1.0, 9.0], [2.0, 2.0, 2.0, 2.0]])
def test_a_tiny_or_constant_layer_has_no_outliers(scores: list[float]) -> None:
    assert layer_z_scores({"a": torch.tensor(scores)})["a"].tolist() == [0.0] * len(scores)
