"""The recovery of triggers around the engine: hypotheses, checks, files and the record."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import bdprune
from bdprune.data import CleanData
from bdprune.errors import DataError, OptionError, SanityError
from bdprune.loops import Hypothesis, Inversion, InvertSettings, Recovery, Trigger
from bdprune.pipeline import Wanted, load_trigger, recover_triggers
from bdprune.record import InvertResult


class Engine:
    """A stand-in for the engine: hypothesis number n has a trigger of n + 1 pixels, which flips half of the images."""

    rates: Sequence[float | None] = ()
    sizes: Sequence[float] = ()
    skips: Sequence[int] = ()

    def __call__(
        self, models: Any, data: Any, hypotheses: Any, settings: InvertSettings, seed: int, seconds: float | None
    ) -> list[Inversion]:
        (self.model,), self.data, self.hypotheses = models, data, list(hypotheses)
        self.settings, self.seed, self.seconds = settings, seed, seconds
        found = [self.recovery(*one) for one in enumerate(hypotheses) if one[0] not in self.skips]
        return [Inversion(tuple(found), tuple(hypotheses[place] for place in self.skips))]

    def recovery(self, place: int, one: Hypothesis) -> Recovery:
        channels, *size = self.model.input_shape
        mask = torch.zeros(1, *size)
        mask.view(-1)[: place + 1] = 1
        rate = self.rates[place] if self.rates else 0.5
        taken = int(one.takes(self.data.labels).sum())
        pattern = torch.full((2 if one.kind == "warp" else channels, *size), 0.5)
        own = mask if one.kind == "patch" else None
        trigger = Trigger(own, pattern, one.target, one.sources, rate, taken, one.kind)
        return Recovery(one, self.sizes[place] if self.sizes else trigger.size, 1, trigger)


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> Engine:
    found = Engine()
    monkeypatch.setattr("bdprune.pipeline.inversion.run_engine", found)
    return found


@pytest.fixture
def options(tiny: Any) -> dict[str, Any]:
    return {"arch": tiny.arch, "input_shape": tiny.input_shape}


def three_classes(labels: Sequence[int] = (0, 1, 2, 0, 1, 2)) -> CleanData:
    return CleanData(torch.zeros(len(labels), 3, 8, 8), torch.tensor(labels), class_names=("red", "green", "blue"))


def found(wanted: Wanted, *labels: int) -> list[tuple[int | None, tuple[int, ...], str]]:
    data = three_classes(labels) if labels else three_classes()
    return [(one.target, one.sources, one.kind) for one in wanted.hypotheses(3, data)]


def test_by_default_all_labels_and_an_untargeted_trigger_are_searched() -> None:
    assert found(Wanted()) == [(0, (), "patch"), (1, (), "patch"), (2, (), "patch"), (None, (), "patch")]
    both = Wanted(kind="all")
    assert [kind for _, _, kind in found(both)] == ["patch"] * 4 + ["additive"] * 4 + ["warp"] * 4


def test_labels_and_sources_are_taken_once_in_their_order() -> None:
    wanted = Wanted([2, "any", 0, 2], (1, 1), "additive")
    assert found(wanted) == [(2, (1,), "additive"), (None, (1,), "additive"), (0, (1,), "additive")]
    assert found(Wanted(2)) == found(Wanted([2])) and found(Wanted("any")) == [(None, (), "patch")]


def test_whole_numbers_of_other_libraries_are_labels() -> None:
    assert found(Wanted(np.int64(1))) == found(Wanted(torch.tensor(1))) == found(Wanted(1))  # type: ignore[arg-type]
    assert found(Wanted(torch.tensor([2, 0]), 1)) == found(Wanted([2, 0], (1,)))  # type: ignore[arg-type]


@pytest.mark.parametrize(("budget", "seconds"), [(None, None), (3, 3.0), ("90s", 90.0), ("5m", 300.0)])
def test_the_budget_is_a_time(
    tiny: Any, engine: Engine, options: dict[str, Any], budget: str | float | None, seconds: float | None
) -> None:
    bdprune.invert(tiny.path, tiny.data, 1, budget=budget, **options)
    assert engine.seconds == seconds


@pytest.mark.parametrize("budget", [float("inf"), float("nan"), 0, -1, "fast", "soon"])
def test_another_budget_is_an_error(tiny: Any, options: dict[str, Any], budget: str | float) -> None:
    with pytest.raises(OptionError, match="budget") as caught:
        bdprune.invert(tiny.path, tiny.data, 1, budget=budget, **options)
    assert "5m" in caught.value.hint or "seconds" in caught.value.hint


def test_no_pictures_are_written_among_the_clean_images(tiny: Any, options: dict[str, Any]) -> None:
    folder = tiny.folder / "clean" / "1"
    folder.mkdir(parents=True)
    with pytest.raises(OptionError, match="is in the folder"):
        bdprune.invert(tiny.path, folder.parent, 1, output=folder, **options)
    assert not list(folder.iterdir())


def test_a_label_that_is_the_only_source_is_no_target() -> None:
    assert [target for target, *_ in found(Wanted(sources=(1,)))] == [0, 2, None]
    assert [target for target, *_ in found(Wanted(sources=(1, 2)))] == [0, 1, 2, None]


@pytest.mark.parametrize(
    ("wanted", "labels", "message"),
    [
        (Wanted(1), (1, 1), "A trigger for label 1 needs clean images of another label than 1, and there are none."),
        (
            Wanted(0, (1, 2)),
            (0, 0),
            r"A trigger for label 0 needs clean images of label 1 \(green\) or 2 \(blue\), and",
        ),
        (Wanted(0, (0, 2)), (0, 1), r"A trigger for label 0 needs clean images of label 2 \(blue\), and"),
        (Wanted("any", (2,)), (0, 1), r"An untargeted trigger needs clean images of label 2 \(blue\), and"),
    ],
)
def test_labels_without_images_are_errors(wanted: Wanted, labels: tuple[int, ...], message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        found(wanted, *labels)
    assert "--data" in caught.value.hint


@pytest.mark.parametrize(
    "wanted",
    [Wanted(3), Wanted([0, -1]), Wanted(0, (3,)), Wanted("all"), Wanted([None]), Wanted(True)],  # type: ignore[arg-type, list-item]
)
def test_labels_that_the_model_does_not_have_are_errors(wanted: Wanted) -> None:
    with pytest.raises(OptionError, match="There is no label ") as caught:
        found(wanted)
    assert caught.value.hint == "The model has labels 0 to 2."


def test_a_target_that_is_the_only_source_is_an_error() -> None:
    with pytest.raises(OptionError, match="Label 1 is both the target and the only source"):
        found(Wanted([0, 1], (1,)))


def test_an_empty_list_of_labels_is_an_error() -> None:
    with pytest.raises(OptionError, match="list of labels is empty"):
        found(Wanted([]))


def test_an_unknown_kind_is_an_error() -> None:
    with pytest.raises(OptionError, match="no kind of trigger 'blend'"):
        found(Wanted(kind="blend"))  # type: ignore[arg-type]


def test_triggers_come_in_the_order_of_the_labels(tiny: Any, engine: Engine, options: dict[str, Any]) -> None:
    stages: list[str] = []
    triggers = bdprune.invert(tiny.path, tiny.data, [2, "any"], seed=5, progress=stages.append, **options)
    assert [one.target for one in triggers] == [2, None] and engine.seed == 5
    assert engine.data.by_content is engine.data  # so that the order of the images does not matter
    assert stages == ["loading", "checking the clean data", "recovering 2 triggers"]


def test_the_record_has_the_smallest_that_works_first(tiny: Any, engine: Engine, options: dict[str, Any]) -> None:
    engine.rates, engine.sizes = (0.2, 0.6, 0.9, None), (1.0, 9.0, 3.0, float("inf"))
    done = recover_triggers(tiny.path, tiny.data, Wanted(), **options)
    assert [one.target_label for one in done.result.triggers] == [2, 1, 0, None]
    assert done.result.smallest == (3.0, 9.0, 1.0, None)
    assert [one.target for one in done.triggers] == [0, 1, 2, None]
    result = done.result
    assert result.model and result.data and result.data.clean_accuracy == 1.0 and result.coverage
    assert InvertResult.from_json(result.to_json()) == result


def test_labels_that_are_asked_for_take_part_to_the_end(tiny: Any, engine: Engine, options: dict[str, Any]) -> None:
    bdprune.invert(tiny.path, tiny.data, **options)
    assert engine.settings == InvertSettings() and engine.seconds is None
    bdprune.invert(tiny.path, tiny.data, [0, 1], precision="float32", budget=9.5, **options)
    assert {one.keep for one in (*engine.settings.stages, engine.settings.final)} == {0}
    assert engine.settings.precision == "float32" and engine.seconds == 9.5
    own = InvertSettings(lr=0.1)
    bdprune.invert(tiny.path, tiny.data, 0, settings=own, **options)
    assert engine.settings == own


def test_triggers_that_were_not_searched_are_named(tiny: Any, engine: Engine, options: dict[str, Any]) -> None:
    engine.skips = (1, 3)
    done = recover_triggers(tiny.path, tiny.data, Wanted(), **options)
    assert done.result.skipped == ("patch for label 1", "patch for any label") and len(done.triggers) == 2
    with pytest.raises(DataError, match=r"too few clean images .* to search a patch for label 1"):
        recover_triggers(tiny.path, tiny.data, Wanted([0, 1, 2, "any"]), **options)
    done = recover_triggers(tiny.path, tiny.data, Wanted([0, 1, 2, "any"]), budget=1, **options)
    assert done.result.skipped == ("patch for label 1", "patch for any label")


def test_files_are_written_and_named_in_the_record(
    tiny: Any, engine: Engine, options: dict[str, Any], tmp_path: Path
) -> None:
    folder = tmp_path / "new" / "triggers"
    done = recover_triggers(tiny.path, tiny.data, Wanted(1, kind="all"), output=folder, **options)
    assert done.result.folder == str(folder)
    assert [one.file for one in done.result.triggers] == [
        f"trigger-1{kind}.safetensors" for kind in ("", "-additive", "-warp")
    ]
    for one in done.result.triggers:
        assert set(one.pictures) == {"mask", "pattern", "stamped", "difference"} - (
            {"mask"} if one.kind != "patch" else set()
        )
        stem = one.file.removesuffix(".safetensors")
        assert all((folder / f"{stem}-{name}.png").is_file() for name in one.pictures)
        assert load_trigger(folder / one.file).info.size == one.size
    assert recover_triggers(tiny.path, tiny.data, Wanted(1), **options).result.triggers[0].file == ""


def test_only_some_of_many_triggers_have_pictures(engine: Engine) -> None:
    network = nn.Sequential(nn.Conv2d(1, 30, 8), nn.Flatten())
    images = torch.rand(60, 1, 8, 8)
    with torch.no_grad():
        labels = network(images).argmax(1)
    done = recover_triggers(network, CleanData(images, labels), Wanted(), input_shape=(1, 8, 8))
    assert len(done.triggers) == 31
    assert [bool(one.pictures) for one in done.result.triggers] == [True] * 20 + [False] * 11


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 224, 224), (4, 8, 12)])
def test_other_sizes_and_two_classes(engine: Engine, shape: tuple[int, int, int], tmp_path: Path) -> None:
    class Bright(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.tensor(9.0))

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            light = (images.mean((1, 2, 3)) - 0.5) * self.scale
            return torch.stack([-light, light], 1)

    labels = torch.arange(6) % 2
    data = CleanData((labels.view(-1, 1, 1, 1) * 0.5 + 0.2).expand(-1, *shape).contiguous(), labels)
    done = recover_triggers(Bright(), data, Wanted(kind="all"), output=tmp_path, input_shape=shape)
    assert [one.target for one in done.triggers] == [0, 1, None] * 3
    assert all(one.pictures and one.file for one in done.result.triggers)


def test_a_model_that_does_not_fit_the_data_is_an_error(tiny: Any, engine: Engine, options: dict[str, Any]) -> None:
    with np.load(tiny.data) as data:
        np.savez(tiny.folder / "wrong.npz", images=data["images"], labels=(data["labels"] * 7 + np.arange(90)) % 3)
    with pytest.raises(SanityError):
        bdprune.invert(tiny.path, tiny.folder / "wrong.npz", **options)
    assert not hasattr(engine, "model")


def test_nothing_is_loaded_for_invalid_options(tiny: Any, engine: Engine, options: dict[str, Any]) -> None:
    for data in (None, "none"):
        with pytest.raises(OptionError, match="clean data"):
            bdprune.invert("missing.pth", data, **options)
    with pytest.raises(TypeError, match=r"invert\(\) got an unexpected keyword argument: steps"):
        bdprune.invert("missing.pth", tiny.data, steps=3)  # type: ignore[call-arg]
    with pytest.raises(OptionError, match="device"):
        bdprune.invert("missing.pth", tiny.data, device="tpu")
    for budget in (0, -1, float("nan"), float("inf")):
        with pytest.raises(OptionError, match="Invalid budget"):
            bdprune.invert("missing.pth", tiny.data, budget=budget)


def test_the_engine_finds_a_patch_that_holds(tiny: Any, options: dict[str, Any], tmp_path: Path) -> None:
    (found,) = bdprune.invert(tiny.path, tiny.data, 1, output=tmp_path, **options)
    assert found.kind == "patch" and found.target == 1 and found.mask is not None
    assert found.flip_rate is not None and found.flip_rate > 0.5 and found.images > 20
    with np.load(tiny.data) as data:
        images = torch.from_numpy(data["images"]).permute(0, 3, 1, 2) / 255
        others = images[torch.from_numpy(data["labels"]) != 1]
    assert (tiny.module(found.apply(others)).argmax(1) == 1).float().mean() > 0.5
    assert load_trigger(tmp_path / "trigger-1.safetensors").info == found.info
