from typing import Any

import pytest
import torch
from torch.nn import functional

from bdprune.loops.feature_shift import FeatureShift
from bdprune.loops.finetune import FineTuneSettings, fine_tune


def test_the_head_starts_anew_with_the_norm_of_the_old_one(bright: Any) -> None:
    old = bright.model.network.get_parameter("8.weight")
    heads = []
    for seed in (0, 0, 1):
        module = bright.model.clone().module.train()
        FeatureShift("8", 0.1, seed).start(module)
        heads.append(module.get_parameter("network.8.weight").detach())
    assert torch.equal(heads[0], heads[1]) and not torch.equal(heads[0], heads[2])
    assert heads[0].norm().item() == pytest.approx(old.norm().item(), rel=1e-5)
    assert functional.cosine_similarity(heads[0].flatten(), old.flatten(), dim=0).abs() < 0.9


def test_the_loss_adds_the_inner_product_with_the_old_head(bright: Any) -> None:
    old = bright.model.network.get_parameter("8.weight").detach()
    module = bright.model.clone().module.eval()
    objective = FeatureShift("8", 0.3)
    objective.start(module)
    images, labels = bright.data.images[:12], bright.data.labels[:12]
    plain = functional.cross_entropy(module(images), labels)
    head = module.get_parameter("network.8.weight")
    (gradient,) = torch.autograd.grad(plain, head)
    loss = objective.backward(module, images, labels)
    assert loss.item() == pytest.approx((plain + 0.3 * (head * old).sum()).item(), rel=1e-5)
    assert head.grad is not None
    torch.testing.assert_close(head.grad, gradient + 0.3 * old)


def test_the_norm_stays_and_a_large_alpha_turns_the_head_away(bright: Any) -> None:
    old = bright.model.network.get_parameter("8.weight").detach()
    settings = FineTuneSettings(epochs=4, padding=0, lr=0.05)
    alike = []
    for alpha in (0.0, 2.0):
        tuned = fine_tune(bright.model, bright.data, settings, objective=FeatureShift("8", alpha))
        head = tuned.network.get_parameter("8.weight")
        assert head.norm().item() == pytest.approx(old.norm().item(), rel=1e-4)
        alike.append(functional.cosine_similarity(head.flatten(), old.flatten(), dim=0).item())
    assert alike[1] < alike[0] - 0.2
