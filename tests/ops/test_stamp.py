"""stamp: values and gradients for every layout and dtype, and the bits of the sums."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor

from bdprune.ops import reference, stamp

from .helpers import DTYPES, assert_error_ratio, layouts, native, random, rounding, threads

SHAPES = [(3, 32, 32), (3, 19, 23), (1, 7, 9), (5, 1, 1), (200, 5, 5), (2, 40, 33)]
"""Images of one tile, of several tiles, and of tiles with incomplete vectors."""
TRIGGERS, IMAGES = 3, 5
KINDS = pytest.mark.parametrize("additive", [False, True], ids=["blended", "additive"])


def uniform(shape: tuple[int, ...], dtype: torch.dtype = torch.float64, device: str = "cpu", seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(shape, dtype=torch.float64, generator=generator).to(device=device, dtype=dtype)


def arguments(
    shape: tuple[int, ...], additive: bool, dtype: torch.dtype = torch.float64, device: str = "cpu", count: int = 7
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """Images, masks, patterns and picks."""
    images = uniform((IMAGES, *shape), dtype, device)
    masks = None if additive else uniform((TRIGGERS, 1, *shape[1:]), dtype, device, seed=1)
    patterns = uniform((TRIGGERS, *shape), dtype, device, seed=2)
    picks = torch.randint(IMAGES, (TRIGGERS, count), generator=torch.Generator().manual_seed(3)).to(device)
    return images, masks, 2 * patterns - 1 if additive else patterns, picks


def plain(images: Tensor, masks: Tensor | None, patterns: Tensor, picks: Tensor) -> Tensor:
    """The formula, in the dtype of the images."""
    given, colours = images[picks], patterns.unsqueeze(1)
    return (given + colours).clamp(0, 1) if masks is None else torch.lerp(given, colours, masks.unsqueeze(1))


def results(function, images: Tensor, masks: Tensor | None, patterns: Tensor, picks: Tensor | None, grad: Tensor):  # type: ignore[no-untyped-def]
    """The stamped images and the gradients."""
    leaves = [None if one is None else one.detach().requires_grad_() for one in (masks, patterns)]
    stamped = function(images, *leaves, picks)
    needed = [one for one in leaves if one is not None]
    return (stamped.detach(), *torch.autograd.grad(stamped, needed, grad))


def gradient(shape: tuple[int, ...], dtype: torch.dtype, device: str, count: int = 7) -> Tensor:
    return random((TRIGGERS, count, *shape), dtype, device, seed=4)


@KINDS
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_error_is_at_most_twice_the_error_of_pytorch(
    shape: tuple[int, ...], dtype: torch.dtype, additive: bool, device: str
) -> None:
    images, masks, patterns, picks = arguments(shape, additive, dtype, device)
    grad = gradient(shape, dtype, device)
    wide = [None if one is None else one.double() for one in (images, masks, patterns)]
    exact = results(plain, wide[0], wide[1], wide[2], picks, grad.double())  # type: ignore[arg-type]
    theirs = results(plain, images, masks, patterns, picks, grad)
    grads = [grad, grad.movedim(2, -1).contiguous().movedim(-1, 2)]
    # Every layout of the images, of the patterns and of the gradient.
    for index, own_images in enumerate(layouts(images)):
        for own_patterns in layouts(patterns)[:2] if index < 2 else layouts(patterns)[2:]:
            ours = results(stamp, own_images, masks, own_patterns, picks, grads[index % 2])
            for mine, other, truth in zip(ours, theirs, exact, strict=True):
                assert mine.dtype == dtype
                assert_error_ratio(mine, other, truth, rounding(truth, dtype, picks.shape[1] * shape[0]))


@KINDS
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_reference_gives_the_same_results(shape: tuple[int, ...], additive: bool, device: str) -> None:
    images, masks, patterns, picks = arguments(shape, additive, torch.float32, device)
    for own in layouts(images):
        for some in (picks, None):
            count = picks.shape[1] if some is not None else len(images)
            grad = gradient(shape, torch.float32, device, count)
            ours, theirs = (results(one, own, masks, patterns, some, grad) for one in (stamp, reference.stamp))
            for mine, other in zip(ours, theirs, strict=True):
                assert mine.shape == other.shape
                torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-5)


@KINDS
def test_masks_and_patterns_may_have_other_dtypes(additive: bool, device: str) -> None:
    images, masks, patterns, picks = arguments((3, 9, 8), additive, torch.float32, device)
    grad = gradient((3, 9, 8), torch.float16, device)
    found = results(stamp, images.half(), masks, patterns.double(), picks, grad)
    expected = (torch.float16, torch.float64) if additive else (torch.float16, torch.float32, torch.float64)
    assert tuple(one.dtype for one in found) == expected
    assert torch.allclose(found[0].float(), plain(images, masks, patterns, picks), atol=2e-3)


@KINDS
def test_the_layout_of_the_images_is_kept(additive: bool, device: str) -> None:
    images, masks, patterns, picks = arguments((3, 8, 6), additive, torch.float32, device)
    assert stamp(images, masks, patterns, picks).is_contiguous()
    channels_last = images.contiguous(memory_format=torch.channels_last)
    stamped = stamp(channels_last, masks, patterns, picks)
    assert stamped.flatten(0, 1).is_contiguous(memory_format=torch.channels_last)
    own = patterns.contiguous(memory_format=torch.channels_last).requires_grad_()
    stamp(images, masks, own, picks).sum().backward()
    assert own.grad is not None and own.grad.stride() == own.stride()


def test_a_full_mask_gives_the_pattern_and_an_empty_mask_the_image(device: str) -> None:
    images, _, patterns, picks = arguments((3, 8, 6), False, torch.float32, device)
    full, empty = torch.ones(TRIGGERS, 1, 8, 6, device=device), torch.zeros(TRIGGERS, 1, 8, 6, device=device)
    assert torch.equal(stamp(images, full, patterns, picks), patterns.unsqueeze(1).expand(-1, 7, -1, -1, -1))
    assert torch.equal(stamp(images, empty, patterns, picks), images[picks])


def test_a_clipped_sum_passes_no_gradient_but_does_at_the_limits(device: str) -> None:
    images = torch.tensor([0.5, 0.5, 0.5, 0.5, 0.5, float("nan")], device=device).view(1, 1, 1, 6)
    patterns = torch.tensor([-0.75, -0.5, 0.25, 0.5, float("inf"), 0.0], device=device).view(1, 1, 1, 6)
    patterns.requires_grad_()
    stamped = stamp(images, None, patterns)
    assert torch.equal(stamped.flatten()[:5], torch.tensor([0.0, 0.0, 0.75, 1.0, 1.0], device=device))
    assert stamped.flatten()[5].isnan()
    stamped.backward(torch.full_like(stamped, 2.0))
    assert patterns.grad is not None
    assert patterns.grad.flatten().tolist() == [0.0, 2.0, 2.0, 2.0, 0.0, 0.0]


@KINDS
@pytest.mark.parametrize(
    ("shape", "images", "triggers", "count"),
    [((3, 4, 4), 2, 0, 3), ((3, 4, 4), 2, 2, 0), ((3, 0, 4), 2, 2, 3), ((0, 4, 4), 2, 2, 3), ((3, 4, 4), 0, 2, 0)],
    ids=["no triggers", "no picks", "no positions", "no channels", "no images"],
)
def test_empty(shape: tuple[int, ...], images: int, triggers: int, count: int, additive: bool, device: str) -> None:
    masks = None if additive else torch.ones(triggers, 1, *shape[1:], device=device)
    patterns = torch.ones(triggers, *shape, device=device)
    picks = torch.zeros(triggers, count, dtype=torch.int64, device=device)
    grad = torch.ones(triggers, count, *shape, device=device)
    stamped, *grads = results(stamp, torch.ones(images, *shape, device=device), masks, patterns, picks, grad)
    assert stamped.shape == (triggers, count, *shape)
    assert [one.shape for one in grads] == [one.shape for one in (masks, patterns) if one is not None]
    if not additive:
        assert torch.equal(grads[0], torch.zeros_like(grads[0]))


@KINDS
@pytest.mark.parametrize("picked", [False, True], ids=["all", "picked"])
def test_gradcheck(additive: bool, picked: bool, device: str) -> None:
    images, masks, patterns, picks = arguments((2, 3, 3), additive, device=device, count=5)
    some = picks if picked else None
    for own in layouts(images)[:2]:
        if masks is None:
            assert torch.autograd.gradcheck(lambda p, x=own: stamp(x, None, p, some), patterns.clone().requires_grad_())
            continue
        for needed in ((True, True), (True, False), (False, True)):
            leaves = [one.clone().requires_grad_(need) for one, need in zip((masks, patterns), needed, strict=True)]
            assert torch.autograd.gradcheck(partial(stamp, own, picks=some), leaves)


@KINDS
@pytest.mark.parametrize("fastest", [False, True], ids=["nchw", "channels_last"])
def test_same_bits_with_one_and_two_threads(fastest: bool, additive: bool, device: str) -> None:
    images, masks, patterns, picks = arguments((3, 61, 57), additive, torch.float32, device, count=9)
    images = images.contiguous(memory_format=torch.channels_last) if fastest else images
    grad = gradient((3, 61, 57), torch.float32, device, count=9)
    found = []
    for count in (1, 2, 2):
        with threads(count):
            found.append(results(stamp, images, masks, patterns, picks, grad))
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


@KINDS
def test_a_trigger_has_the_same_bits_alone(additive: bool, device: str) -> None:
    images, masks, patterns, picks = arguments((3, 25, 31), additive, torch.float32, device)
    grad = gradient((3, 25, 31), torch.float32, device)
    every = results(stamp, images, masks, patterns, picks, grad)
    for h in range(TRIGGERS):
        mask = None if masks is None else masks[h : h + 1]
        alone = results(stamp, images, mask, patterns[h : h + 1], picks[h : h + 1], grad[h : h + 1])
        assert all(torch.equal(a[h : h + 1], b) for a, b in zip(every, alone, strict=True))


def test_a_result_of_more_than_32_mb(device: str) -> None:
    images = uniform((64, 3, 224, 224), torch.float32, device)
    patterns = uniform((1, 3, 224, 224), torch.float32, device, seed=1)
    stamped = stamp(images, torch.full((1, 1, 224, 224), 0.25, device=device), patterns)
    assert stamped.nbytes > 32 << 20
    torch.testing.assert_close(stamped[0], torch.lerp(images, patterns, 0.25))


@native
@KINDS
def test_opcheck(additive: bool, device: str) -> None:
    images, masks, patterns, picks = arguments((3, 4, 5), additive, torch.float32, device)
    wanted = [None if one is None else one.clone().requires_grad_() for one in (masks, patterns)]
    for own in layouts(images):
        for some in (picks, None):
            torch.library.opcheck(torch.ops.bdprune.stamp.default, (own, *wanted, some))
        grad = gradient((3, 4, 5), torch.float32, device)
        for need in [(True, True), (True, False), (False, True), (False, False)]:
            for pattern in layouts(patterns):
                inputs = (grad, own, masks, pattern, picks, *need)
                torch.library.opcheck(torch.ops.bdprune.stamp_backward.default, inputs)


def test_picks_out_of_range_are_errors() -> None:
    images, masks, patterns, picks = arguments((3, 4, 4), False, torch.float32)
    for wrong in (IMAGES, -1):
        picks[1, 2] = wrong
        with pytest.raises(IndexError):
            stamp(images, masks, patterns, picks)
        with pytest.raises(IndexError):
            stamp(images, masks, patterns.clone().requires_grad_(), picks)


def test_wrong_arguments_are_errors_that_show_the_value() -> None:
    images, masks, patterns, picks = arguments((3, 4, 4), False, torch.float32)
    assert masks is not None
    with pytest.raises(ValueError, match=r"images must be \[M, C, h, w\], got shape \[3, 4\]"):
        stamp(images[0, 0, :3], masks, patterns, picks)
    with pytest.raises(ValueError, match=r"patterns must be \[H, 3, 4, 4\], got \[3, 2, 4, 4\]"):
        stamp(images, masks, patterns[:, :2], picks)
    with pytest.raises(ValueError, match=r"masks must be \[3, 1, 4, 4\], got shape \[2, 1, 4, 4\]"):
        stamp(images, masks[:2], patterns, picks)
    with pytest.raises(ValueError, match=r"picks must be \[3, N\], got shape \[2, 7\]"):
        stamp(images, masks, patterns, picks[:2])
    with pytest.raises(TypeError, match=r"picks must be int64, got torch\.int32"):
        stamp(images, masks, patterns, picks.int())
    with pytest.raises(TypeError, match=r"torch\.uint8"):
        stamp(images.byte(), masks, patterns, picks)
    with pytest.raises(ValueError, match="must be on cpu, got meta"):
        stamp(images, masks.to("meta"), patterns, picks)
    with pytest.raises(ValueError, match="images must not require a gradient"):
        stamp(images.requires_grad_(), masks, patterns, picks)


def test_a_device_without_compiled_ops_falls_back() -> None:
    images, masks, patterns, picks = (None if one is None else one.to("meta") for one in arguments((3, 4, 4), False))
    assert images is not None and patterns is not None
    assert stamp(images, masks, patterns, picks).shape == (TRIGGERS, 7, 3, 4, 4)
