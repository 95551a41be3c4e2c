"""STRIP: entropy by its formula, the threshold of the quantile rule by counting, and both on a planted backdoor."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from bdprune.analysis import Case, Judge, StripSettings, judge_for, predicted_labels, strip_settings
from bdprune.analysis.strip import half_unlearned, needed, split, superposed_entropy
from bdprune.data import CleanData
from bdprune.errors import OptionError
from bdprune.model import Model
from bdprune.testing.planted import planted

from ..written import TARGET, labelled_by, uncertain_model, white_corner

FEW = StripSettings(overlays=20, frr=0.1)


def judge(entropies: list[float], settings: StripSettings = FEW, limits: tuple[str, ...] = ()) -> Judge:
    network = nn.Sequential(nn.Flatten(), nn.Linear(3, 2))
    return Judge(Model(network, "x", 2, (3, 1, 1)), torch.empty(0), settings, torch.tensor(entropies).double(), limits)


def rand(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("weights", [(1.0, 1.0), (0.7, 0.3)])
def test_entropy_is_the_mean_over_the_overlays_in_bits(bright: Any, weights: tuple[float, float]) -> None:
    images, overlays = rand(5, 3, 8, 8), rand(7, 3, 8, 8, seed=1)
    settings = StripSettings(image_weight=weights[0], overlay_weight=weights[1])
    found = superposed_entropy(bright.model.module, images, overlays, settings)
    for image, value in zip(images, found, strict=True):
        total = 0.0
        for overlay in overlays:
            mixed = (weights[0] * image + weights[1] * overlay).clamp(0, 1)
            shares = bright.model.module(mixed[None]).detach().double().softmax(1)[0]
            total -= sum(float(share) * math.log2(share) for share in shares)
        assert value == pytest.approx(total / len(overlays), abs=1e-5)


def test_many_overlays_are_taken_in_several_passes(bright: Any) -> None:
    images, overlays = rand(3, 3, 8, 8), rand(130, 3, 8, 8, seed=1)
    counts: list[int] = []
    found = superposed_entropy(bright.model.module, images, overlays, FEW, counts.append)
    halves = [superposed_entropy(bright.model.module, images, one, FEW) for one in overlays.split(65)]
    torch.testing.assert_close(found, (halves[0] + halves[1]) / 2, atol=1e-5, rtol=0)
    assert counts == [1, 1, 1]


def test_the_quantile_rule_flags_at_most_the_share_of_exchangeable_images() -> None:
    """With 19 held-out images and a rate of 0.1, the threshold is the second lowest entropy."""
    found = judge([float(value) for value in range(1, 20)])
    assert found.threshold == 2.0
    p_values = found.p_values(torch.tensor([0.5, 1.0, 2.0, 30.0]).double()).tolist()
    assert p_values == pytest.approx([1 / 20, 2 / 20, 3 / 20, 1.0])
    # an image is below the threshold exactly if its p-value is at most the rate
    assert [value <= 0.1 for value in p_values] == [value < 2.0 for value in (0.5, 1.0, 2.0, 30.0)]


def test_equal_entropies_are_not_flagged() -> None:
    found = judge([1.0] * 30)
    assert found.threshold == 1.0 and found.p_values(torch.ones(1).double()).item() == 1.0


def test_the_normal_rule_is_the_quantile_of_a_normal_distribution() -> None:
    values = [1.0, 2.0, 3.0, 4.0, 5.0]
    found = judge(values, replace(FEW, rule="normal", frr=0.01))
    assert found.threshold == pytest.approx(3.0 - 2.326348 * 2.5**0.5, abs=1e-4)
    assert found.p_values(torch.tensor([3.0]).double()).item() == pytest.approx(0.5)


@pytest.mark.parametrize("rule", ["quantile", "normal"])
def test_the_chance_of_a_count_is_its_share_in_simulations(rule: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    frr, held, images = 0.1, 39, 12
    draws = torch.rand(20_000, held + images, generator=generator)
    cuts = draws[:, :held].kthvalue(4).values if rule == "quantile" else torch.full((len(draws),), frr)
    counts = (draws[:, held:] < cuts[:, None]).sum(1)
    found = judge([1.0] * held, StripSettings(frr=frr, rule=rule))
    for count in (0, 1, 3, 6):
        assert found.chance(count, images) == pytest.approx((counts >= count).double().mean().item(), abs=0.012)


@pytest.mark.parametrize(
    ("images", "overlays", "held"), [(500, 100, 400), (150, 51, 99), (2000, 100, 500), (60, 30, 30)]
)
def test_the_split_keeps_enough_held_out_images_if_it_can(images: int, overlays: int, held: int) -> None:
    data = CleanData(torch.arange(images).view(-1, 1, 1, 1) / images, torch.arange(images) % 2)
    parts = split(data, StripSettings(), seed=3)
    assert [len(one) for one in parts] == [overlays, held]
    assert not set(parts[0].images.flatten().tolist()) & set(parts[1].images.flatten().tolist())


def test_the_number_of_needed_images_gives_a_threshold() -> None:
    assert [needed(StripSettings(frr=frr)) for frr in (0.01, 0.05, 0.1, 0.5)] == [99, 19, 9, 1]
    assert judge([float(value) for value in range(99)], StripSettings()).threshold == 0.0


def test_too_few_images_give_no_threshold_and_say_how_many_are_needed(bright: Any) -> None:
    found = judge_for(Case(bright.model, bright.data.subset(torch.arange(60))), StripSettings(overlays=5))
    assert found.threshold is None and len(found.entropies) == 55
    assert found.limits[0].startswith(
        "55 held-out clean images cannot set a threshold for a false rejection rate of 0.01"
    )
    assert "that takes 99" in found.limits[0]


def test_a_network_that_ignores_its_input_judges_nothing(bright: Any) -> None:
    model = bright.model.clone()
    with torch.no_grad():
        model.network[-1].weight.zero_()
    found = judge_for(Case(model, bright.data), FEW)
    assert found.threshold is None and "the same output for every image" in found.limits[0]


def test_a_network_with_nan_judges_nothing(bright: Any) -> None:
    model = bright.model.clone()
    with torch.no_grad():
        model.network[-1].bias.fill_(math.nan)
    assert "NaN or infinite" in judge_for(Case(model, bright.data), FEW).limits[0]


def test_a_threshold_that_no_entropy_can_reach_is_a_limit(bright: Any) -> None:
    model = bright.model.clone()
    with torch.no_grad():
        model.network[-1].weight.mul_(1e6)  # the network is certain of every image
    found = judge_for(Case(model, bright.data), replace(FEW, rule="normal"))
    assert found.threshold is None and "no entropy is below 0" in found.limits[0]


def test_a_network_that_needs_contiguous_maps_is_measured(bright: Any) -> None:
    class Viewing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.head = nn.Conv2d(3, 4, 3, padding=1), nn.Linear(256, 3)

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return self.head(self.conv(images).view(len(images), -1))

    model = Model(Viewing().eval(), "viewing", 3, (3, 8, 8))
    found = judge_for(Case(model, bright.data), FEW)
    torch.testing.assert_close(
        found.entropies, superposed_entropy(model.module, split(bright.data, FEW, 0)[1].images, found.overlays, FEW)
    )


@pytest.mark.parametrize(
    "change", [{"overlays": 0}, {"held_out": 0}, {"frr": 0.0}, {"frr": 1.0}, {"rule": "x"}, {"image_weight": 0.0}]
)
def test_settings_out_of_range_are_errors(change: dict[str, Any]) -> None:
    with pytest.raises(OptionError):
        replace(StripSettings(), **change).check()


def test_presets_have_the_settings_of_the_paper() -> None:
    paper = strip_settings("paper", frr=0.05)
    assert (paper.image_weight, paper.overlay_weight, paper.rule, paper.overlays) == (1.0, 1.0, "normal", 100)
    assert paper.frr == 0.05 and not paper.unlearned and strip_settings(unlearned=True).unlearned
    with pytest.raises(OptionError, match="no preset 'x'"):
        strip_settings("x")


@pytest.mark.slow
def test_images_with_a_trigger_have_low_entropy() -> None:
    model = uncertain_model()
    found = judge_for(Case(model, labelled_by(model, 200, 0)), strip_settings(overlays=25, frr=0.05))
    plain = labelled_by(model, 60, 1).images
    assert found.threshold is not None
    assert (found.measure(white_corner(plain)) < found.threshold).all()
    assert (found.measure(plain) < found.threshold).double().mean() < 0.2
    assert (predicted_labels(model, white_corner(plain)) == TARGET).all()


@pytest.mark.slow
@pytest.mark.parametrize("unlearned", [False, True])
def test_the_model_does_not_change(unlearned: bool) -> None:
    known = planted()
    before = {name: value.clone() for name, value in known.backdoored.network.state_dict().items()}
    settings = strip_settings(overlays=25, frr=0.05, unlearned=unlearned)
    found = judge_for(Case(known.backdoored, known.data), settings)
    assert found.threshold is not None and found.measure(known.test.images[:3]).isfinite().all()
    after = known.backdoored.network.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())


@pytest.mark.slow
def test_the_unlearned_network_has_statistics_of_superposed_images() -> None:
    known = planted()
    overlays = known.data.images[:50]
    model = half_unlearned(Case(known.backdoored, known.data), overlays, FEW, seed=0)
    norm = next(one for one in model.network.modules() if isinstance(one, nn.BatchNorm2d))
    seen: list[torch.Tensor] = []
    hook = norm.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    for shift in (1, 2, 3, 4):
        model.module((FEW.image_weight * overlays + FEW.overlay_weight * overlays.roll(shift, 0)).clamp(0, 1))
    hook.remove()
    mean = torch.stack([one.mean((0, 2, 3)) for one in seen]).mean(0)
    torch.testing.assert_close(norm.running_mean, mean, atol=1e-4, rtol=1e-3)
    assert not model.network.training


def test_the_mean_share_of_suspicious_clean_images_is_that_of_the_counts() -> None:
    for held, frr in ((150, 0.01), (199, 0.01), (120, 0.1)):
        judge = Judge(*[None] * 2, StripSettings(frr=frr), torch.rand(held, dtype=torch.float64), ())  # type: ignore[arg-type]
        mean = sum(judge.chance(count, 40) for count in range(1, 41))
        assert judge.rate * 40 == pytest.approx(mean, rel=1e-6) and judge.rate <= frr
