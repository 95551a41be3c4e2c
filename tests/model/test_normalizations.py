from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from bdprune.errors import OptionError
from bdprune.model.handle import NORMALIZATIONS, Model, Normalization, normalization_name, parse_normalization

NUMBERS = st.floats(-10, 10).map(lambda value: float(f"{value:g}"))
DEVIATIONS = st.floats(1e-3, 10).map(lambda value: float(f"{value:g}"))


@pytest.mark.parametrize("text", ["imagenet", " ImageNet ", "0.485,0.456,0.406,0.229,0.224,0.225"])
def test_names_and_numbers(text: str) -> None:
    assert parse_normalization(text) == Normalization((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def test_none_is_empty() -> None:
    assert parse_normalization("none") == Normalization((), ())


@given(st.integers(1, 6).flatmap(lambda n: st.tuples(st.tuples(*[NUMBERS] * n), st.tuples(*[DEVIATIONS] * n))))
def test_written_text_is_parsed_to_the_same_values(pair: tuple[tuple[float, ...], tuple[float, ...]]) -> None:
    normalization = Normalization(*pair)
    assert parse_normalization(normalization_name(normalization)) == normalization


@pytest.mark.parametrize("name", NORMALIZATIONS)
def test_every_name_survives_a_round_trip(name: str) -> None:
    normalization = parse_normalization(name)
    assert normalization_name(normalization) == name
    assert len(normalization.mean) == len(normalization.std)
    assert all(std > 0 for std in normalization.std)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("imagenette", "Unknown normalisation 'imagenette'.*one of none, imagenet, cifar10"),
        ("", "Unknown normalisation ''"),
        ("0.5,,0.5", "Unknown normalisation"),
        ("0.5", "^'0.5' has 1 number, an odd count"),
        ("0.5,0.5,0.5,0.2,0.2", "has 5 numbers, an odd count"),
        ("0.5,0", "standard deviation of 0 or less"),
        ("0.5,-0.2", "standard deviation of 0 or less"),
        ("nan,0.2", "not finite"),
        ("0.5,inf", "not finite"),
        ("0.5,nan", "not finite"),
    ],
)
def test_bad_text_is_an_error(text: str, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        parse_normalization(text)


@pytest.mark.parametrize(("text", "channels"), [("cifar10", 1), ("0.5,0.5,0.2,0.2", 3)])
def test_a_wrong_number_of_channels_is_an_error(text: str, channels: int) -> None:
    with pytest.raises(OptionError, match=f"the model takes {channels}"):
        Model(nn.Identity(), "own", 2, (channels, 8, 8), parse_normalization(text))


@pytest.mark.parametrize("channels", [1, 3, 6])
def test_one_pair_fits_any_number_of_channels(channels: int) -> None:
    model = Model(nn.Identity(), "own", 2, (channels, 8, 8), parse_normalization("half"))
    assert model.normalization == Normalization((0.5,), (0.5,))
