import pytest

from bdprune.loops.unlearning import (
    UnlearnStep,
    flip_shares,
    halves,
    last_epoch,
    leaders,
    mean_shares,
    middle_half,
    sink_label,
)


def step(votes: tuple[int, ...], wrong: tuple[int, ...], counts: tuple[int, ...]) -> UnlearnStep:
    return UnlearnStep(1.0, 0.5, votes, wrong, counts)


def test_the_flip_share_excludes_images_of_the_label() -> None:
    # 10 images of each of 3 classes; 12 of the 20 others go to class 2, 5 of the 20 to class 0.
    steps = [step((9, 3, 8), (3, 0, 6), (5, 5, 5)), step((6, 0, 9), (2, 0, 6), (5, 5, 5))]
    assert flip_shares(steps) == pytest.approx([5 / 20, 0.0, 12 / 20])


def test_label_with_every_image_has_no_share() -> None:
    assert flip_shares([step((4, 0), (0, 0), (4, 0))]) == [0.0, 0.0]


def test_the_sink_label_depends_only_on_the_last_pass() -> None:
    early = step((8, 0), (4, 0), (4, 4))
    late = step((0, 8), (0, 4), (4, 4))
    assert list(last_epoch([early, early, late], 1)) == [late]
    assert sink_label([early, early, early, late], 1) == 1
    assert sink_label([early, early, early, late], 4) == 0


def test_the_middle_half_omits_a_quarter_at_each_end() -> None:
    steps = [step((k, 0), (k, 0), (9, 9)) for k in range(11)]
    assert [len(middle_half(steps[:count])) for count in (1, 3, 4, 8, 11)] == [1, 3, 2, 4, 7]
    assert middle_half(steps[:8]) == steps[2:6]
    assert middle_half(steps) == steps[2:9]


def test_halves_are_never_empty() -> None:
    steps = [step((k, 0), (k, 0), (9, 9)) for k in range(5)]
    assert halves(steps) == (steps[:2], steps[2:])
    assert halves(steps[:1]) == (steps[:1], steps[:1])


def test_labels_are_ranked_by_the_mean_over_runs() -> None:
    shares = mean_shares([[0.1, 0.5, 0.3], [0.3, 0.1, 0.9]])
    assert shares == pytest.approx([0.2, 0.3, 0.6])
    assert leaders(shares) == (2, 1)
    assert leaders([0.2, 0.4, 0.4]) == (1, 2)
