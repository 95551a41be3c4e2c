import math

import torch
from torch import Tensor, nn

from bdprune.runtime.evaluate import attack_success_rate, clean_accuracy, predict, robust_accuracy, share_right, within


class FirstPixel(nn.Module):
    """Predicts ten times the first pixel."""

    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Parameter(torch.zeros(1))

    def forward(self, images: Tensor) -> Tensor:
        return nn.functional.one_hot((images[:, 0, 0, 0] * 10).round().long(), 10).float()


def pictures(labels: list[int]) -> Tensor:
    return (torch.tensor(labels).float() / 10).view(-1, 1, 1, 1).expand(-1, 1, 2, 2).clone()


def test_predict_over_several_batches() -> None:
    assert predict(FirstPixel(), pictures([3, 1, 4, 1, 5]), batch_size=2).tolist() == [3, 1, 4, 1, 5]


def test_no_images_give_no_predictions() -> None:
    assert predict(FirstPixel(), torch.empty(0, 1, 2, 2)).tolist() == []
    assert math.isnan(clean_accuracy(FirstPixel(), torch.empty(0, 1, 2, 2), torch.empty(0, dtype=torch.int64)))


def test_clean_accuracy_counts_all_classes() -> None:
    assert clean_accuracy(FirstPixel(), pictures([0, 1, 2, 3]), torch.tensor([0, 1, 2, 9])) == 0.75


def test_target_class_images_never_count() -> None:
    labels = torch.tensor([7, 7, 0, 1, 2, 3])

    def trigger(images: Tensor) -> Tensor:  # reaches label 7 on half of the images outside class 7
        out = images.clone()
        out[:2] = 0.7
        return out

    goal = torch.full_like(labels, 7)
    assert attack_success_rate(FirstPixel(), pictures([7, 7, 0, 1, 2, 3]), labels, trigger, goal) == 0.5
    assert robust_accuracy(FirstPixel(), pictures([7, 7, 0, 1, 2, 3]), labels, trigger, goal) == 0.5


def test_a_fall_of_exactly_the_limit_is_within_it_for_every_number_of_images() -> None:
    for count, lost in ((150, 3), (50, 1), (350, 7)):
        for right in range(count // 2, count + 1):
            before, after = (share_right(torch.arange(count), hits(one, count)) for one in (right, right - lost))
            assert within(before - after, 0.02)
            assert not within(before - after + 1 / count, 0.02)


def hits(right: int, count: int) -> Tensor:
    """Labels of which the first ``right`` are those of ``arange``."""
    return torch.where(torch.arange(count) < right, torch.arange(count), -1)
