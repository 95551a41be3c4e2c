"""A task and a network on which an attack takes less than a second, and the steps of an attack."""

import torch
from torch import Tensor, nn

from bdprune.attacks.base import Attack, AttackSetting, shape_of
from bdprune.data import RawImages
from bdprune.loops.fitting import Schedule, fit
from bdprune.loops.resume import Checkpoint
from bdprune.runtime import seeded
from bdprune.runtime.evaluate import attack_success_rate, clean_accuracy

CLASSES = 4


def task(
    count: int = 256, channels: int = 3, size: int = 16, seed: int = 0, source: nn.Module | None = None
) -> AttackSetting:
    """Noisy grey images; the label is the corner that is brighter than the rest."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(40, 160, (count, channels, size, size), generator=generator, dtype=torch.uint8)
    labels = torch.arange(count) % CLASSES
    half = size // 2
    for label, (top, left) in enumerate(((0, 0), (0, half), (half, 0), (half, half))):
        images[labels == label, :, top : top + half, left : left + half] += 60
    return AttackSetting(images, labels, CLASSES, seed)


def network(width: int = 4, channels: int = 3, size: int = 16, seed: int = 0) -> nn.Module:
    """Two convs with batch norms, each halving the image, and a linear layer."""
    with seeded(seed):
        return nn.Sequential(
            nn.Conv2d(channels, width, 3, 2, 1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(inplace=True),
            nn.Conv2d(width, 2 * width, 3, 2, 1, bias=False),
            nn.BatchNorm2d(2 * width),
            nn.ReLU(inplace=True),
            nn.Flatten(),
            nn.Linear(2 * width * (size // 4) ** 2, CLASSES),
        )


SCHEDULE = Schedule(epochs=8, batch_size=16, peak_lr=0.1, padding=0, flip=False, bf16=False)


def attacked(
    attack: Attack,
    setting: AttackSetting,
    schedule: Schedule = SCHEDULE,
    width: int = 4,
    checkpoint: Checkpoint | None = None,
    stop_after: int | None = None,
) -> tuple[nn.Module, nn.Module]:
    """The network and the trigger after all six steps; ``KeyboardInterrupt`` after ``stop_after`` steps."""

    def stop(step: int, steps: int, loss: float) -> None:
        if step == stop_after:
            raise KeyboardInterrupt

    _, channels, size, _ = setting.images.shape
    victim = network(width, channels, size, setting.seed)
    trigger = attack.new_trigger(shape_of(setting.images))
    attack.learn(setting, trigger)
    poisoned = attack.poison(setting, trigger, torch.Generator().manual_seed(setting.seed))
    attack.start(victim, setting)
    if attack.trains:
        objective = attack.objective(setting, trigger)
        fit(victim, RawImages(poisoned.images, poisoned.labels), schedule, setting.seed, stop, objective, checkpoint)
    attack.finish(victim.eval(), setting, trigger)
    return victim, trigger


def measured(attack: Attack, victim: nn.Module, trigger: nn.Module, seed: int = 9) -> tuple[float, float]:
    """Clean accuracy and attack success rate on images that nothing was trained on."""
    fresh = task(200, seed=seed)
    images = fresh.images.float() / 255
    goal = attack.goal(fresh.labels, CLASSES)
    accuracy = clean_accuracy(victim, images, fresh.labels)
    return accuracy, attack_success_rate(victim, images, fresh.labels, trigger, goal)


def weights(module: nn.Module) -> Tensor:
    """Everything in the state dict in one vector."""
    return torch.cat([value.detach().flatten().double() for value in module.state_dict().values()])
