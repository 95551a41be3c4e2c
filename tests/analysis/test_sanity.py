from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from bdprune.analysis.sanity import Sanity, SanityLimits, check_sanity
from bdprune.data.clean import CleanData, OtherSize
from bdprune.data.load import load_clean
from bdprune.data.order import text_order
from bdprune.errors import DataError
from bdprune.model.handle import NORMALIZATIONS, Model, Normalization, parse_normalization
from bdprune.runtime import Budget

CLASSES = 8
SHAPE = (3, 4, 4)


class NearestColour(nn.Module):
    """Classifies images by the distance of their mean colour to one prototype per class, in normalised units."""

    def __init__(self, prototypes: Tensor) -> None:
        super().__init__()
        self.prototypes = nn.Parameter(prototypes)

    def forward(self, x: Tensor) -> Tensor:
        return -10 * torch.cdist(x.mean((2, 3)), self.prototypes)


def colours() -> Tensor:
    """The corners of a box with sides of different lengths, so that swapped channels cost accuracy."""
    corners = torch.cartesian_prod(*[torch.tensor([0.0, 1.0])] * 3)
    return torch.tensor([0.30, 0.42, 0.50]) + corners * torch.tensor([0.04, 0.10, 0.25])


def data(count: int = 160, seed: int = 0) -> CleanData:
    """Noisy patches of the class colours, ``count`` in all, classes in turn."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % CLASSES
    noise = 0.01 * torch.randn((count, *SHAPE), generator=generator)
    return CleanData((colours()[labels].view(-1, 3, 1, 1) + noise).clamp(0, 1), labels, "patches")


def model_for(normalization: Normalization, reverse: bool = False) -> NearestColour:
    prototypes = colours().flip(1) if reverse else colours()
    if normalization.mean:
        prototypes = (prototypes - torch.tensor(normalization.mean)) / torch.tensor(normalization.std)
    return NearestColour(prototypes)


def fed(network: nn.Module, normalization: Normalization = NORMALIZATIONS["none"]) -> Model:
    return Model(network.eval(), "nearest", CLASSES, SHAPE, normalization)


@pytest.mark.parametrize("name", ["none", "imagenet", "bytes"])
def test_a_model_with_correct_input_is_sane_and_nothing_else_is_tried(name: str) -> None:
    found = check_sanity(fed(model_for(NORMALIZATIONS[name]), NORMALIZATIONS[name]), data())
    assert found == Sanity(1.0, True, "Clean accuracy is 100.0 % on 160 images.")


@pytest.mark.parametrize("name", ["imagenet", "gtsrb", "half", "bytes", "caffe", "cifar10-old"])
@pytest.mark.parametrize("reverse", [False, True])
def test_the_correct_input_format_is_found(name: str, reverse: bool) -> None:
    truth = NORMALIZATIONS[name]
    found = check_sanity(fed(model_for(truth, reverse)), data())
    assert not found.ok and found.accuracy < 0.6
    best = found.tried[0]
    assert best.accuracy > 0.9 and best.images == 160
    repaired = fed(model_for(truth, reverse), found.normalization or Normalization())
    images = data(seed=1).images.flip(1) if "BGR" in found.fits else data(seed=1).images
    assert check_sanity(repaired, replace(data(seed=1), images=images)).ok
    assert ("BGR" in found.fits) == reverse == found.suggestion.startswith("Reverse the channel order")
    assert parse_normalization(found.suggestion.rstrip(".").split("--normalize ")[1]) == found.normalization


def test_a_normalisation_that_should_not_be_there() -> None:
    found = check_sanity(fed(model_for(Normalization()), NORMALIZATIONS["imagenet"]), data())
    assert (found.ok, found.fits, found.normalization) == (False, "none", Normalization())
    assert found.suggestion == "Pass --normalize none."
    assert "but 100.0 % with normalisation none" in found.message


def test_a_correction_that_was_tried_on_fewer_images_says_so() -> None:
    found = check_sanity(fed(model_for(Normalization()), NORMALIZATIONS["imagenet"]), data(count=240))
    assert "but 100.0 % on 200 of them with normalisation none" in found.message


def test_reversed_channels_are_found() -> None:
    found = check_sanity(fed(model_for(Normalization(), reverse=True)), data())
    assert found.fits == "none BGR"
    assert found.suggestion == "Reverse the channel order of the images."


def test_labels_that_start_at_one_are_found() -> None:
    clean = data()
    shifted = replace(clean, labels=(clean.labels + 1) % CLASSES)
    found = check_sanity(fed(model_for(Normalization())), shifted)
    assert (found.ok, found.accuracy, found.fits) == (False, 0.0, "labels -1")
    assert found.suggestion == "Subtract 1 from every label."
    assert found.normalization is None


def test_labels_shifted_down_by_two_are_found() -> None:
    clean = data()
    found = check_sanity(fed(model_for(Normalization())), replace(clean, labels=(clean.labels - 2) % CLASSES))
    assert found.suggestion == "Add 2 to every label."


def test_a_permutation_of_labels_gives_its_inverse() -> None:
    clean, order = data(), torch.tensor([3, 1, 4, 0, 5, 7, 2, 6])
    mixed = replace(clean, labels=order[clean.labels])
    found = check_sanity(fed(model_for(Normalization())), mixed)
    assert found.fits == "labels in another order"
    assert "100.0 % with labels in another order (0→3, " in found.message
    assert "data.sanity.class_map" in found.suggestion and "--class-order FILE.json" in found.suggestion
    assert [found.class_map[int(label)] for label in mixed.labels] == clean.labels.tolist()


def many(count: int = 20) -> tuple[Model, CleanData]:
    """A model of ``count`` classes that reads the label from a pixel, and five images of each class."""

    class ReadsPixel(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.tensor(float(count)))

        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.one_hot((x[:, 0, 0, 0] * self.scale).round().long() % count, count).float() * 10

    labels = torch.arange(5 * count) % count
    images = torch.full((len(labels), *SHAPE), 0.5)
    images[:, 0, 0, 0] = labels / count
    return Model(ReadsPixel().eval(), "reads", count, SHAPE), CleanData(images, labels)


@pytest.mark.parametrize("per_class", [1, 5])
def test_text_order_is_tried_by_name(per_class: int) -> None:
    model, clean = many()
    numbers = torch.tensor(sorted(range(20), key=str))[clean.labels]  # label i of the model is the i-th in text order
    found = check_sanity(model, replace(clean, labels=numbers).subset(torch.arange(20 * per_class)))
    assert (found.ok, found.fits, found.suggestion) == (False, "class order text", "Pass --class-order text.")
    assert "but 100.0 % with the classes in text order (0, 1, 10, 11, ...)" in found.message
    assert found.class_map == {number: place for place, number in enumerate(sorted(range(20), key=str))}


def test_normalisation_and_text_order_at_once() -> None:
    """A model of 16 classes that needs ``imagenet`` and learned its classes from folders in text order."""
    prototypes = torch.rand(16, 3, generator=torch.Generator().manual_seed(3)) * 0.6 + 0.2
    truth = NORMALIZATIONS["imagenet"]
    network = NearestColour((prototypes - torch.tensor(truth.mean)) / torch.tensor(truth.std) * 1.0)
    labels = torch.arange(96) % 16
    images = prototypes[labels].view(-1, 3, 1, 1).expand(-1, *SHAPE)
    numbers = torch.tensor(sorted(range(16), key=str))[labels]
    model = Model(network.eval(), "nearest", 16, SHAPE)
    assert check_sanity(model, CleanData(images, labels)).fits.startswith("imagenet")
    found = check_sanity(model, CleanData(images, numbers))
    assert not found.ok and found.fits == "imagenet, class order text"
    assert found.suggestion == "Pass --normalize imagenet and pass --class-order text."
    assert found.normalization == truth and found.class_map == text_order(16)


def test_an_unneeded_renumbering_is_named() -> None:
    model, clean = many()
    order = text_order(20)
    mixed = replace(clean, labels=torch.tensor([order[int(label)] for label in clean.labels]), class_order=order)
    found = check_sanity(model, mixed)
    assert (found.ok, found.suggestion) == (False, "Omit --class-order.")
    assert found.class_map == {label: label for label in range(20)}


def test_a_map_is_from_the_labels_of_the_source() -> None:
    """The source counts from 100 and a first map is wrong: the new map replaces it instead of composing with it."""
    model, clean = many()
    applied = {100 + label: (7 * label + 3) % 20 for label in range(20)}
    mixed = replace(clean, labels=(7 * clean.labels + 3) % 20, class_order=applied)
    found = check_sanity(model, mixed)
    assert found.fits == "labels in another order"
    assert found.class_map == {100 + label: label for label in range(20)}


def test_one_confused_class_does_not_hide_the_order() -> None:
    """The model takes class 5 for class 9, so two labels share a prediction; the map is still one to one."""
    model, clean = many()
    images = clean.images.clone()
    images[clean.labels == 5, 0, 0, 0] = 9 / 20
    order = torch.randperm(20, generator=torch.Generator().manual_seed(1))
    found = check_sanity(model, CleanData(images, order[clean.labels]))
    assert found.fits == "labels in another order" and found.tried[0].accuracy == pytest.approx(0.95)
    wanted = {int(order[label]): label for label in range(20) if label not in (5, 9)}
    assert wanted.items() <= found.class_map.items()
    assert len(set(found.class_map.values())) == len(found.class_map) == 20


def test_an_order_must_hold_on_images_that_did_not_suggest_it() -> None:
    """Some order matches random predictions on half of the few images that suggested it, and fails on other images."""
    model, clean = many()
    generator = torch.Generator().manual_seed(0)
    images = clean.images.clone()
    images[:, 0, 0, 0] = torch.randint(0, 20, (100,), generator=generator) / 20
    found = check_sanity(model, CleanData(images[:40], clean.labels[:40]), limits=SanityLimits(least=0.3))
    assert not found.ok and found.fits == "" and found.class_map == {}


def test_the_size_of_the_source_is_named_if_it_does_better() -> None:
    clean = replace(data(), labels=data().labels.flip(0), other_size=OtherSize((64, 48), 0.9, 0.2, 0.1, 100))
    found = check_sanity(fed(model_for(Normalization())), clean)
    assert (found.ok, found.fits, found.suggestion) == (False, "size 64x48", "Pass --input-shape 3x64x48.")
    assert "90.0 % with images of 64x48 (instead of 20.0 % on the same 100 images)" in found.message
    worse = replace(clean, other_size=OtherSize((64, 48), 0.3, 0.2, 0.1, 100))
    assert check_sanity(fed(model_for(Normalization())), worse).fits != "size 64x48"


@pytest.mark.parametrize("count", [10, 15])
def test_few_images_suggest_no_order(count: int) -> None:
    clean, order = data(count), torch.tensor([3, 1, 4, 0, 5, 7, 2, 6])
    found = check_sanity(fed(model_for(Normalization())), replace(clean, labels=order[clean.labels]))
    assert not found.ok and found.fits == ""


def test_shuffled_labels_have_no_explanation() -> None:
    clean = data()
    order = torch.randperm(len(clean), generator=torch.Generator().manual_seed(0))
    found = check_sanity(fed(model_for(Normalization())), replace(clean, labels=clean.labels[order]))
    assert not found.ok and found.normalization is None and found.fits == ""
    assert "too low for any verdict" in found.message
    assert "label order" in found.suggestion
    assert len(found.tried) == 17


def test_a_constant_model_is_not_sane_on_unbalanced_data() -> None:
    """85 % of the images are of one class, so chance gives 85 % accuracy."""
    clean = data()
    labels = torch.where(torch.arange(160) < 136, 0, clean.labels)

    class Constant(NearestColour):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * 0 + torch.eye(CLASSES)[0]

    found = check_sanity(fed(Constant(colours())), replace(clean, labels=labels))
    assert found.accuracy >= 0.85 and not found.ok


def hits(share: float, count: int) -> CleanData:
    """Data on which the right model is right for exactly ``share`` of the images, with any input format."""
    clean = data(count)
    wrong = torch.arange(count) >= round(share * count)
    step = torch.randint(1, CLASSES, (count,), generator=torch.Generator().manual_seed(0))
    return replace(clean, labels=torch.where(wrong, (clean.labels + step) % CLASSES, clean.labels))


@pytest.mark.parametrize(("share", "ok"), [(0.85, True), (0.70, True), (0.60, True), (0.50, False), (0.30, False)])
def test_halfway_between_chance_and_perfect_is_the_limit(share: float, ok: bool) -> None:
    found = check_sanity(fed(model_for(Normalization())), hits(share, 400))
    assert found.accuracy == pytest.approx(share)
    assert found.ok == ok
    assert (found.tried == ()) == (share > 0.78)


def test_limits_can_be_moved() -> None:
    model, poor = fed(model_for(Normalization())), hits(0.5, 400)
    assert check_sanity(model, poor, limits=SanityLimits(least=0.3)).ok
    assert check_sanity(model, poor, limits=SanityLimits(least=0.3, good=0.3)).tried == ()


class TwoFormats(nn.Module):
    """Reads one label from each image as given, and another with normalisation ``half``."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(16.0))

    def forward(self, x: Tensor) -> Tensor:
        is_half = x[:, 0, 0, 2].abs() < 1e-3
        code = torch.where(is_half, (x[:, 0, 0, 1] + 1) / 2, x[:, 0, 0, 0])
        return nn.functional.one_hot((code * self.scale).round().long() % CLASSES, CLASSES).float()


@pytest.mark.parametrize(("count", "ok"), [(10, True), (40, True), (160, False)])
def test_another_input_format_replaces_a_good_one_only_for_a_significant_gain(count: int, ok: bool) -> None:
    """70 % as given, 90 % with ``half``: gains of 2, 8 and 32 (of the 200 used) against 3 * sqrt(gain)."""
    labels, position = torch.arange(count) % CLASSES, torch.arange(count) % 10
    images = torch.full((count, *SHAPE), 0.5)
    images[:, 0, 0, 0] = torch.where(position < 7, labels, labels + 1) / 16
    images[:, 0, 0, 1] = torch.where(position < 9, labels, labels + 1) / 16
    found = check_sanity(fed(TwoFormats()), CleanData(images, labels))
    assert found.accuracy == pytest.approx(0.7)
    assert found.tried[0].accuracy == pytest.approx(0.9) and found.tried[0].name == "half"
    assert found.ok == ok
    assert found.fits == ("" if ok else "half")


def test_a_bounded_number_of_images_is_spread_evenly_over_the_classes(monkeypatch: pytest.MonkeyPatch) -> None:
    class Counting(NearestColour):
        seen = 0

        def forward(self, x: Tensor) -> Tensor:
            Counting.seen += len(x)
            return super().forward(x)

    found = check_sanity(fed(Counting(colours())), data(1600), max_images=100)
    assert Counting.seen == 96
    assert "on 96 of the 1600 images" in found.message


def test_the_same_seed_gives_the_same_finding() -> None:
    model, poor = fed(model_for(NORMALIZATIONS["gtsrb"])), data(1600)
    assert check_sanity(model, poor, seed=3) == check_sanity(model, poor, seed=3)


def test_the_check_does_not_change_the_model() -> None:
    network = nn.Sequential(nn.Conv2d(3, CLASSES, 1), nn.BatchNorm2d(CLASSES), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    before = {name: value.clone() for name, value in network.state_dict().items()}
    model = replace(fed(network), network=network.train())
    check_sanity(model, data())
    assert network.training
    assert all(torch.equal(before[name], value) for name, value in network.state_dict().items())


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_logits_that_are_not_finite(value: float) -> None:
    prototypes = colours()
    prototypes[0, 0] = value
    found = check_sanity(fed(NearestColour(prototypes)), data())
    assert not found.ok and "NaN or infinite" in found.message


def test_grey_models_are_tried_with_formats_of_one_channel() -> None:
    levels = torch.linspace(0.2, 0.9, CLASSES).view(-1, 1)
    labels = torch.arange(160) % CLASSES
    images = levels[labels].view(-1, 1, 1, 1).expand(-1, 1, 4, 4)
    truth = NORMALIZATIONS["mnist"]
    network = NearestColour((levels - truth.mean[0]) / truth.std[0])
    found = check_sanity(Model(network, "nearest", CLASSES, (1, 4, 4)), CleanData(images, labels))
    assert found.fits == "mnist"
    assert {trial.name for trial in found.tried} == {"mnist", "half", "bytes"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.subset(torch.empty(0, dtype=torch.int64)), "patches holds 0 images"),
        (lambda d: replace(d, images=d.images[:, :1]), r"are \(1, 4, 4\), the model takes \(3, 4, 4\)"),
        (lambda d: replace(d, labels=d.labels + 1), "range from 1 to 8, the model has classes 0 to 7"),
        (lambda d: replace(d, labels=d.labels - 1), "range from -1 to 6"),
    ],
)
def test_data_that_does_not_fit_is_an_error(change: object, message: str) -> None:
    with pytest.raises(DataError, match=message):
        check_sanity(fed(model_for(Normalization())), change(data()))  # type: ignore[operator]


@pytest.fixture(scope="module")
def resnet20(data_root: Path) -> Model:
    load = pytest.importorskip("bdprune.model.loading", exc_type=ImportError).load
    model: Model = load(data_root / "checkpoints" / "akamaster-resnet20-clean.th")
    return model


@pytest.fixture(scope="module")
def cifar(data_root: Path) -> CleanData:
    return load_clean(data_root / "cifar10" / "test.parquet", per_class=25, input_shape=(3, 32, 32), num_classes=10)


def test_published_model_without_its_normalisation(resnet20: Model, cifar: CleanData) -> None:
    found = check_sanity(resnet20, cifar)
    assert not found.ok and found.accuracy < 0.5
    assert found.fits == "imagenet"
    assert found.suggestion == "Pass --normalize imagenet."
    assert found.tried[0].accuracy > 0.85


def test_published_model_with_its_normalisation(resnet20: Model, cifar: CleanData) -> None:
    found = check_sanity(replace(resnet20, normalization=NORMALIZATIONS["imagenet"]), cifar)
    assert found.ok and found.accuracy > 0.85 and found.tried == ()


def test_published_model_with_reversed_labels_order(resnet20: Model, cifar: CleanData) -> None:
    model = replace(resnet20, normalization=NORMALIZATIONS["imagenet"])
    found = check_sanity(model, replace(cifar, labels=9 - cifar.labels))
    assert found.fits == "labels in another order"
    assert "0→9, 1→8" in found.message and found.class_map == {label: 9 - label for label in range(10)}


class Slow(NearestColour):
    """A network that takes 40 ms for each batch."""

    def forward(self, x: Tensor) -> Tensor:
        time.sleep(0.04)
        return super().forward(x)


def test_a_time_limit_lets_it_use_fewer_images() -> None:
    model = fed(Slow(colours()))
    found = check_sanity(model, data(480), budget=Budget(seconds=0.72).started())
    assert found.ok and found.accuracy == 1.0
    assert int(found.message.split(" on ")[1].split()[0]) < 480 and "of the 480 images" in found.message
    assert "on 480 images" in check_sanity(model, data(480), budget=Budget(seconds=600).started()).message


@pytest.mark.parametrize(("shift", "ok"), [(0.02, True), (0.5, False)])
def test_input_formats_that_had_no_time_are_named(shift: float, ok: bool) -> None:
    model = fed(Slow(colours() + shift * torch.tensor([1.0, 0.0, 1.0])))
    start = time.perf_counter()
    found = check_sanity(model, data(64), limits=SanityLimits(good=1.1), budget=Budget(seconds=1.2).started())
    assert time.perf_counter() - start < 1.2
    assert found.ok == ok and "the time of the budget did not suffice to try other input formats" in found.message
    assert ok or "--budget" in found.suggestion
