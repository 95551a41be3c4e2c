from __future__ import annotations

import hashlib

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bdprune.data.clean import CleanData, sample_per_class

LABELS = st.lists(st.integers(0, 6), min_size=1, max_size=60).map(torch.tensor)


def numbered(labels: torch.Tensor) -> CleanData:
    """Data whose image i is filled with i, so that each image is recognised after any shuffle."""
    images = torch.arange(len(labels), dtype=torch.float32).view(-1, 1, 1, 1).expand(-1, 1, 2, 2)
    return CleanData(images, labels)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def positions(data: CleanData) -> list[int]:
    return [int(value) for value in data.images[:, 0, 0, 0].tolist()]


@given(LABELS, st.integers(1, 8), st.integers(0, 2**32))
def test_a_sample_has_the_given_number_of_each_class(labels: torch.Tensor, per_class: int, seed: int) -> None:
    data = numbered(labels)
    sample = data.sample(per_class, seeded(seed))
    expected = {label: min(per_class, count) for label, count in data.class_counts.items()}
    assert sample.class_counts == expected
    assert sample.labels.tolist() == sorted(sample.labels.tolist())


@given(LABELS, st.integers(1, 8), st.integers(0, 2**32))
def test_a_sample_repeats_no_image_and_keeps_labels_with_images(
    labels: torch.Tensor, per_class: int, seed: int
) -> None:
    sample = numbered(labels).sample(per_class, seeded(seed))
    taken = positions(sample)
    assert len(set(taken)) == len(taken)
    assert labels[taken].tolist() == sample.labels.tolist()


@given(LABELS, st.integers(1, 8), st.integers(0, 2**32))
def test_a_sample_depends_only_on_the_seed(labels: torch.Tensor, per_class: int, seed: int) -> None:
    first, again = (sample_per_class(labels, per_class, seeded(seed)).tolist() for _ in range(2))
    assert first == again


def test_samples_differ_between_seeds() -> None:
    labels = torch.zeros(50, dtype=torch.int64)
    samples = {tuple(sample_per_class(labels, 5, seeded(seed)).tolist()) for seed in range(10)}
    assert len(samples) == 10


def test_a_sample_of_no_images_is_empty() -> None:
    assert len(numbered(torch.empty(0, dtype=torch.int64)).sample(3, seeded(0))) == 0


@given(LABELS, st.floats(0.05, 0.95), st.integers(0, 2**32))
def test_a_split_keeps_every_class_on_both_sides(labels: torch.Tensor, fraction: float, seed: int) -> None:
    data = numbered(labels)
    rest, held = data.split(fraction, seeded(seed))
    assert sorted(positions(rest) + positions(held)) == list(range(len(labels)))
    for label, count in data.class_counts.items():
        share = held.class_counts.get(label, 0)
        assert share == (0 if count == 1 else min(max(round(fraction * count), 1), count - 1))
        assert rest.class_counts[label] == count - share


@given(LABELS, st.integers(0, 2**32))
def test_a_split_depends_only_on_the_seed(labels: torch.Tensor, seed: int) -> None:
    first, again = (numbered(labels).split(0.3, seeded(seed)) for _ in range(2))
    assert [positions(side) for side in first] == [positions(side) for side in again]


def test_spread_takes_images_at_equal_distances() -> None:
    data = numbered(torch.arange(10))
    assert data.spread(4).labels.tolist() == [0, 2, 5, 7]
    assert data.spread(10) is data and data.spread(11) is data


def test_class_counts_list_only_labels_that_occur() -> None:
    assert numbered(torch.tensor([7, 2, 7, 7])).class_counts == {2: 1, 7: 3}


def test_digest_is_the_hash_of_shape_images_and_labels() -> None:
    data = CleanData(torch.tensor([[[[0.0, 1.0]]]]), torch.tensor([5]))
    content = b"(1, 1, 1, 2)" + b"\x00\x00\x00\x00" + b"\x00\x00\x80\x3f" + b"\x05" + b"\x00" * 7
    assert data.digest == f"sha256:{hashlib.sha256(content).hexdigest()}"


@pytest.mark.parametrize("change", ["image", "label", "order", "shape"])
def test_every_change_changes_the_digest(change: str) -> None:
    data = CleanData(torch.rand(4, 3, 2, 6, generator=seeded(0)), torch.tensor([0, 1, 2, 3]))
    images, labels = data.images.clone(), data.labels.clone()
    if change == "image":
        images[3, 2, 1, 5] += 1e-6
    if change == "label":
        labels[0] = 1
    if change == "order":
        images, labels = images.flip(0), labels.flip(0)
    if change == "shape":
        images = images.reshape(4, 3, 6, 2)
    assert CleanData(images, labels).digest != data.digest


def test_digest_does_not_depend_on_memory_layout_or_source() -> None:
    images = torch.rand(4, 3, 2, 6, generator=seeded(0))
    plain = CleanData(images, torch.tensor([0, 1, 2, 3]), "here")
    other = CleanData(images.contiguous(memory_format=torch.channels_last), torch.tensor([0, 1, 2, 3]), "there")
    assert plain.digest == other.digest


def test_copies_are_left_out_and_counted() -> None:
    images = torch.tensor([0.1, 0.2, 0.1, 0.1, 0.2, 0.3]).view(-1, 1, 1, 1)
    labels = torch.tensor([0, 1, 0, 1, 1, 0])  # the fourth image equals the first, with another label
    data = CleanData(images, labels, notes=("A note.",))
    distinct = data.without_copies
    assert distinct.labels.tolist() == [0, 1, 1, 0] and torch.equal(distinct.images, images[[0, 1, 3, 5]])
    assert distinct.notes == ("A note.", "2 of 6 images are copies of others and were left out.")
    assert distinct.without_copies is distinct is data.without_copies


def test_no_image_is_on_both_sides_of_a_split_without_copies() -> None:
    twice = CleanData(torch.rand(6, 1, 2, 2, generator=seeded(0)).repeat(5, 1, 1, 1), torch.arange(6).repeat(5) % 2)
    rest, held = twice.without_copies.split(0.3, seeded(0))
    assert not {one.numpy().tobytes() for one in rest.images} & {one.numpy().tobytes() for one in held.images}
    assert len(rest) + len(held) == 6
