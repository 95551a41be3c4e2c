import torch
from torch import Tensor, nn

from bdprune.training.fit import Schedule, fit


def stripes(count: int = 256) -> tuple[Tensor, Tensor]:
    """Bright images of class 1, dark ones of class 0, with noise."""
    labels = torch.arange(count) % 2
    noise = torch.randint(0, 60, (count, 3, 8, 8), generator=torch.Generator().manual_seed(0))
    return (noise + 150 * labels.view(-1, 1, 1, 1)).to(torch.uint8), labels


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 2),
    )


def test_learns_and_ends_in_eval_mode() -> None:
    images, labels = stripes()
    net = network()
    seen: list[tuple[int, int, float]] = []
    fit(net, images, labels, Schedule(epochs=4, batch_size=32), 0, lambda *now: seen.append(now))
    assert not net.training
    assert (net(images.float() / 255).argmax(1) == labels).float().mean() == 1
    assert [done for done, _, _ in seen] == list(range(1, 33))
    assert seen[-1][2] < seen[0][2] / 2


def test_same_seed_same_weights_other_seed_others() -> None:
    images, labels = stripes(64)
    nets = [network() for _ in range(3)]
    for net, seed in zip(nets, (1, 1, 2), strict=True):
        fit(net, images, labels, Schedule(epochs=1, batch_size=32), seed)
    weights = [torch.cat([p.flatten() for p in net.parameters()]) for net in nets]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
