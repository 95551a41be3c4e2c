import pytest
import torch

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
# Whole and incomplete vectors, one channel, one position, many channels, several blocks of a trigger.
SHAPES = [(3, 8, 8), (3, 5, 7), (1, 6, 6), (8, 1, 1), (70, 3, 4), (3, 24, 20)]
TRIGGERS, IMAGES = 3, 4
KINDS = pytest.mark.parametrize("additive", [False, True], ids=["blended", "additive"])


def arguments(randn, shape, additive, dtype=torch.float32, count=11):
    """Images, masks, patterns and picks. Sums lie on either side of the clip, and never near it."""
    images = randn(IMAGES, *shape, dtype=dtype).abs().clamp(max=1)
    masks = None if additive else randn(TRIGGERS, 1, *shape[1:], dtype=dtype, seed=1).sigmoid()
    patterns = randn(TRIGGERS, *shape, dtype=dtype, seed=2)
    picks = torch.randint(IMAGES, (TRIGGERS, count), generator=torch.Generator().manual_seed(3))
    return images, masks, patterns, picks


def layouts(x):
    """x in both orders that the kernels read, and in one that they have to copy."""
    return [x, x.contiguous(memory_format=torch.channels_last), x.repeat_interleave(2, 1)[:, ::2]]


def exact(images, masks, patterns, picks, grad=None):
    """The stamped images and both gradients, in float64."""
    given = (images if picks is None else images[picks]).double()
    colours = patterns.double().unsqueeze(1)
    if masks is None:
        total = given + colours
        if grad is None:
            return total.clamp(0, 1)
        return None, grad.double().where((total >= 0) & (total <= 1), 0.0).sum(1)
    opacity = masks.double().unsqueeze(1)
    if grad is None:
        return given * (1 - opacity) + opacity * colours
    return (grad * (colours - given)).sum((1, 2)).unsqueeze(1), grad.double().sum(1) * masks


def assert_near(found, truth, dtype, terms=1):
    eps = torch.finfo(dtype).eps * (1 if dtype in (torch.float16, torch.bfloat16) else 4 + terms)
    assert found.dtype == dtype and found.shape == truth.shape
    assert ((found.double() - truth).abs() <= eps * truth.abs().max().clamp(min=1)).all()


@KINDS
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_both_directions(emulated, randn, shape, dtype, additive):
    images, masks, patterns, picks = arguments(randn, shape, additive, dtype)
    grad = randn(TRIGGERS, 11, *shape, dtype=dtype, seed=4)
    truth = exact(images, masks, patterns, picks)
    true_masks, true_patterns = exact(images, masks, patterns, picks, grad)
    for own in layouts(images):
        for some in layouts(patterns)[:2]:
            assert_near(emulated.ops.stamp(own, masks, some, picks), truth, dtype)
            for one in (grad, grad.movedim(2, -1).contiguous().movedim(-1, 2)):
                got_masks, got_patterns = emulated.ops.stamp_backward(one, own, masks, some, picks, True, True)
                assert_near(got_patterns, true_patterns, dtype, 11)
                if additive:
                    assert got_masks.shape == (0,)
                else:
                    assert_near(got_masks, true_masks, dtype, 11 * shape[0])


@KINDS
def test_without_picks_every_image_is_stamped(emulated, randn, additive):
    images, masks, patterns, _ = arguments(randn, (3, 8, 8), additive)
    every = torch.arange(IMAGES).expand(TRIGGERS, -1)
    assert torch.equal(
        emulated.ops.stamp(images, masks, patterns, None), emulated.ops.stamp(images, masks, patterns, every)
    )
    grad = randn(TRIGGERS, IMAGES, 3, 8, 8, seed=4)
    without, chosen = (
        emulated.ops.stamp_backward(grad, images, masks, patterns, some, True, True) for some in (None, every)
    )
    assert all(torch.equal(a, b) for a, b in zip(without, chosen, strict=True))


@KINDS
def test_layouts_and_dtypes_are_kept(emulated, randn, additive):
    images, masks, patterns, picks = arguments(randn, (3, 6, 4), additive)
    images, own = (one.contiguous(memory_format=torch.channels_last) for one in (images.half(), patterns.double()))
    stamped = emulated.ops.stamp(images, masks, own, picks)
    assert stamped.dtype == torch.float16
    assert stamped.flatten(0, 1).is_contiguous(memory_format=torch.channels_last)
    grad_masks, grad_patterns = emulated.ops.stamp_backward(stamped, images, masks, own, picks, True, True)
    assert grad_patterns.dtype == torch.float64 and grad_patterns.stride() == own.stride()
    assert additive or grad_masks.dtype == torch.float32


@pytest.mark.parametrize("offset", [1, 2])
def test_unaligned_images(emulated, randn, offset):
    images, masks, patterns, picks = arguments(randn, (3, 8, 8), False)
    moved = torch.cat([torch.zeros(offset), images.flatten()])[offset:].view(images.shape)
    grad = randn(TRIGGERS, 11, 3, 8, 8, seed=4)
    assert torch.equal(
        emulated.ops.stamp(moved, masks, patterns, picks), emulated.ops.stamp(images, masks, patterns, picks)
    )
    ours, theirs = (
        emulated.ops.stamp_backward(grad, one, masks, patterns, picks, True, True) for one in (moved, images)
    )
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_only_the_needed_gradients_are_computed(emulated, randn):
    images, masks, patterns, picks = arguments(randn, (3, 8, 8), False)
    grad = randn(TRIGGERS, 11, 3, 8, 8, seed=4)
    both = emulated.ops.stamp_backward(grad, images, masks, patterns, picks, True, True)
    grad_masks, none = emulated.ops.stamp_backward(grad, images, masks, patterns, picks, True, False)
    assert torch.equal(grad_masks, both[0]) and none.shape == (0,)
    none, grad_patterns = emulated.ops.stamp_backward(grad, images, masks, patterns, picks, False, True)
    assert torch.equal(grad_patterns, both[1]) and none.shape == (0,)


@KINDS
def test_an_image_that_is_not_there_gives_nan(emulated, randn, additive):
    images, masks, patterns, picks = arguments(randn, (3, 8, 8), additive)
    whole = emulated.ops.stamp(images, masks, patterns, picks)
    picks[1, 2], picks[2, 0] = IMAGES, -1
    stamped = emulated.ops.stamp(images, masks, patterns, picks)
    missing = torch.zeros(TRIGGERS, 11, dtype=torch.bool)
    missing[1, 2] = missing[2, 0] = True
    assert stamped[missing].isnan().all() and torch.equal(stamped[~missing], whole[~missing])
    assert emulated.ops.stamp(images[:0], masks, patterns, picks).isnan().all()


def test_a_clipped_sum_passes_no_gradient_but_does_at_the_limits(emulated):
    images = torch.full((1, 1, 1, 4), 0.5)
    patterns = torch.tensor([-0.75, -0.5, 0.5, 0.75]).view(1, 1, 1, 4)
    assert emulated.ops.stamp(images, None, patterns, None).flatten().tolist() == [0.0, 0.0, 1.0, 1.0]
    grad = torch.full((1, 1, 1, 1, 4), 2.0)
    _, found = emulated.ops.stamp_backward(grad, images, None, patterns, None, False, True)
    assert found.flatten().tolist() == [0.0, 2.0, 2.0, 0.0]


@KINDS
def test_result_does_not_depend_on_the_order_of_threads(emulated, randn, additive):
    images, masks, patterns, picks = arguments(randn, (3, 8, 8), additive)
    grad = randn(TRIGGERS, 11, 3, 8, 8, seed=4)
    results = []
    for seed in range(3):
        emulated.seed(seed)
        results.append(emulated.ops.stamp_backward(grad, images, masks, patterns, picks, True, True))
    assert all(torch.equal(a, b) for pair in results[1:] for a, b in zip(pair, results[0], strict=True))


@pytest.mark.parametrize(
    ("shape", "triggers", "count"), [((3, 4, 4), 0, 3), ((3, 4, 4), 2, 0), ((3, 0, 4), 2, 3), ((0, 4, 4), 2, 3)]
)
def test_empty(emulated, shape, triggers, count):
    images, masks, patterns = torch.ones(2, *shape), torch.ones(triggers, 1, *shape[1:]), torch.ones(triggers, *shape)
    picks = torch.zeros(triggers, count, dtype=torch.int64)
    stamped = emulated.ops.stamp(images, masks, patterns, picks)
    assert stamped.shape == (triggers, count, *shape)
    grad_masks, grad_patterns = emulated.ops.stamp_backward(stamped, images, masks, patterns, picks, True, True)
    assert torch.equal(grad_masks, torch.zeros_like(masks)) and torch.equal(grad_patterns, torch.zeros_like(patterns))


def test_wrong_arguments(emulated, randn):
    images, masks, patterns, picks = arguments(randn, (3, 8, 8), False)
    with pytest.raises(RuntimeError, match="size of an image"):
        emulated.ops.stamp(images, masks, patterns[:, :2], picks)
    with pytest.raises(RuntimeError, match=r"masks must be \[H, 1, h, w\]"):
        emulated.ops.stamp(images, masks[:2], patterns, picks)
    with pytest.raises(RuntimeError, match="picks must be int64"):
        emulated.ops.stamp(images, masks, patterns, picks.int())
    grad = torch.ones(TRIGGERS, 11, 3, 8, 8)
    with pytest.raises(RuntimeError, match="shape of the stamped images"):
        emulated.ops.stamp_backward(grad[:, :2], images, masks, patterns, picks, True, True)
    with pytest.raises(RuntimeError, match="dtype of the images"):
        emulated.ops.stamp_backward(grad.double(), images, masks, patterns, picks, True, True)
