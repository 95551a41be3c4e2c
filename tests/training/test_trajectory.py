import pytest

from bdprune.training.trajectory import UnlearnStep, flip_shares, last_epoch, sink_label


def step(votes: tuple[int, ...], wrong: tuple[int, ...], counts: tuple[int, ...]) -> UnlearnStep:
    return UnlearnStep(1.0, 0.5, votes, wrong, counts)


def test_flip_share_leaves_the_labels_own_images_out() -> None:
    # 10 images of each of 3 classes; 12 of the 20 others go to class 2, 5 of the 20 to class 0.
    steps = [step((9, 3, 8), (3, 0, 6), (5, 5, 5)), step((6, 0, 9), (2, 0, 6), (5, 5, 5))]
    assert flip_shares(steps) == pytest.approx([5 / 20, 0.0, 12 / 20])


def test_label_with_every_image_has_no_share() -> None:
    assert flip_shares([step((4, 0), (0, 0), (4, 0))]) == [0.0, 0.0]


def test_sink_label_reads_the_last_pass_only() -> None:
    early = step((8, 0), (4, 0), (4, 4))
    late = step((0, 8), (0, 4), (4, 4))
    assert list(last_epoch([early, early, late], 1)) == [late]
    assert sink_label([early, early, early, late], 1) == 1
    assert sink_label([early, early, early, late], 4) == 0
