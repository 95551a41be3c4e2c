import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bdprune.loops.margin import Cut, MarginSettings, cut_at, largest_margins


def frozen(bright: Any) -> nn.Module:
    return bright.model.clone().module.eval().requires_grad_(False)  # type: ignore[no-any-return]


def test_the_rest_of_a_network_continues_from_the_cut(bright: Any) -> None:
    module, images = frozen(bright), bright.data.images[:4]
    cut = cut_at(module, images, 0.05)
    assert cut.convs == 1 and cut.start.shape == (4, 12, 8, 8)
    torch.testing.assert_close(cut.tail(cut.start), module(images))


def test_a_deep_cut_is_behind_more_convs(bright: Any) -> None:
    module, images = frozen(bright), bright.data.images[:4]
    network = nn.Sequential(module, nn.Identity())
    assert cut_at(network, images, 0.0).convs == 0
    assert cut_at(network, images, 0.9).start is images  # no place is left behind the last conv


def test_pixels_are_free_where_nothing_can_be_traced() -> None:
    class Branching(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            return images.flatten(1)[:, :3] * (2 if images.sum() > 0 else 1)

    cut = cut_at(Branching().eval(), torch.rand(2, 1, 4, 4), 0.5)
    assert (cut.convs, cut.lowest, cut.highest) == (0, 0.0, 1.0)


def test_the_margin_of_a_linear_network_is_its_value_at_a_corner() -> None:
    weight = torch.tensor([[1.0, -2.0, 0.0], [0.0, 3.0, -1.0], [0.5, 0.0, 0.0]])
    start = torch.tensor([[0.2, 0.5, 0.9], [0.6, 0.1, 0.4]])
    cut = Cut(lambda value: value @ weight.T, start)
    margins = largest_margins(cut, torch.tensor([1, 0]), MarginSettings(steps=60, lr=1.0, batch=3))
    # Label 1: the corner (0, 1, 0) gives 3 against 0. Label 0: the corner (1, 0, ...) gives 1 against 0.5.
    torch.testing.assert_close(margins, torch.tensor([[3.0, 3.0], [0.5, 0.5]]), atol=0.05, rtol=0)


def test_values_behind_a_relu_stay_positive_and_have_no_upper_limit(bright: Any) -> None:
    cut = cut_at(frozen(bright), bright.data.images[:4], 0.05)
    assert cut.lowest in (0.0, -math.inf) and cut.highest == math.inf
    few, many = (largest_margins(cut, torch.arange(3), MarginSettings(steps=steps)) for steps in (1, 20))
    assert bool((many > few).all())


@pytest.mark.parametrize("batch", [1, 5, 100])
def test_batches_do_not_change_the_margins(bright: Any, batch: int) -> None:
    cut = cut_at(frozen(bright), bright.data.images[:4], 0.05)
    one, other = (largest_margins(cut, torch.arange(3), MarginSettings(steps=3, batch=size)) for size in (batch, 12))
    torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)


def test_plain_steps_follow_the_gradient_and_end_when_the_margin_is_still() -> None:
    weight = torch.tensor([[1.0, -2.0, 0.0], [0.0, 3.0, -1.0], [0.5, 0.0, 0.0]])
    start, reads = torch.full((1, 3), 0.5), []

    def tail(value: Tensor) -> Tensor:
        reads.append(value.detach().clone())
        return value @ weight.T

    plain = MarginSettings(steps=100, lr=0.1, signed=False)
    margins = largest_margins(Cut(tail, start), torch.tensor([1]), plain)
    # The other logits of the start are -0.5 and 0.25, so the slope of label 1 is its row minus that of label 2.
    torch.testing.assert_close(reads[1] - reads[0], 0.1 * torch.tensor([[-0.5, 3.0, -1.0]]))
    torch.testing.assert_close(margins, torch.tensor([[3.0]]))
    assert len(reads) < 100 and all(one.min() >= 0 and one.max() <= 1 for one in reads)


def test_each_label_of_a_plain_ascent_ends_on_its_own(bright: Any) -> None:
    cut = cut_at(frozen(bright), bright.data.images[:4], 0.0)
    plain = MarginSettings(steps=20, lr=0.05, signed=False)
    alone = [largest_margins(cut, torch.tensor([label]), plain) for label in range(3)]
    torch.testing.assert_close(largest_margins(cut, torch.arange(3), plain), torch.cat(alone))
