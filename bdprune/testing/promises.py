"""The conformance checks that detectors and purifiers share, and the small trained networks for them."""

from __future__ import annotations

import copy
import hashlib
import inspect
import re
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from functools import cache, partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from bdprune.analysis import Case, Memo
from bdprune.data import CleanData, RawImages
from bdprune.errors import BdpruneError, DataError
from bdprune.loops import Schedule, fit
from bdprune.methods import Method
from bdprune.model import Model
from bdprune.record import COSTS, GIFTS, Attachment, Record
from bdprune.runtime import seeded

Check = Callable[[], str]
"""Raises AssertionError if a check fails; otherwise returns the reason why it was skipped, or an empty string."""

Norm = Literal["batch", "group", "none"]

_CLASSES = 4
_FEW = 10


@dataclass(frozen=True)
class Trial:
    """A method, how to run it, and how to compare its results.

    Args:
        method: an instance.
        facts: everything that must not change from run to run, as one value that supports ``==``.
    """

    method: Any
    facts: Callable[[Any], object]

    def run(self, case: Case) -> object:
        """The result of the method, as :attr:`facts`."""
        return self.facts(self.method(case))


def instance(method: Any) -> Any:
    """The method itself, or an instance of its class with default settings."""
    if not inspect.isclass(method):
        return method
    try:
        return method()
    except Exception as error:
        raise AssertionError(f"{method.__name__} cannot be created with default settings: {error}.") from error


def reported(checks: Iterator[tuple[str, Check]]) -> dict[str, str]:
    """Runs checks; the reason for each skipped check, and ``passed`` for the others."""
    return {name: f"skipped: {reason}" if (reason := check()) else "passed" for name, check in checks}


def asserted(checks: Iterator[tuple[str, Check]]) -> Iterator[tuple[str, Check]]:
    """The same checks, but any exception becomes an AssertionError."""
    for name, check in checks:
        yield name, partial(_asserted, check)


def _asserted(check: Check) -> str:
    try:
        return check()
    except AssertionError:
        raise
    except Exception as error:
        raise AssertionError(f"The method raised {type(error).__name__}: {error}") from error


def shared_checks(trial: Trial) -> Iterator[tuple[str, Check]]:
    """The checks that every method must pass."""
    yield "describes itself", partial(_describes_itself, type(trial.method))
    yield "does not change model, images and analyses", partial(_leaves_alone, trial)
    yield "gives the same bits for the same seed", partial(_repeats, trial)
    yield "uses only the images that it needs", partial(_does_not_peek, trial)
    yield "takes ten images, or says how many it needs", partial(_takes_few, trial)
    yield "takes data without images of a class", partial(_takes_a_missing_class, trial)
    yield "takes grey images", partial(_takes, trial, channels=1)
    yield "takes a network with group norms", partial(_takes, trial, norm="group")
    yield "takes a network without norms", partial(_takes, trial, norm="none")
    yield "rejects tensors without values", partial(_refuses_meta, trial)


@cache
def small_model(norm: Norm = "batch", channels: int = 3, dropout: float = 0.0) -> Model:
    """Two convs that distinguish four brightness levels, trained in a moment."""
    norms: dict[str, Callable[[], nn.Module]] = {
        "batch": lambda: nn.BatchNorm2d(8),
        "group": lambda: nn.GroupNorm(2, 8),
        "none": nn.Identity,
    }
    layers: list[nn.Module] = []
    with seeded(0):
        for inputs in (channels, 8):
            layers += [nn.Conv2d(inputs, 8, 3, padding=1), norms[norm](), nn.ReLU()]
        network = nn.Sequential(
            *layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(dropout), nn.Linear(8, _CLASSES)
        )
    data = small_data(240, channels)
    schedule = Schedule(epochs=4, batch_size=24, peak_lr=0.05, padding=0, bf16=False)
    fit(network, RawImages((data.images * 255).round().to(torch.uint8), data.labels), schedule, seed=0)
    return Model(network, "small", _CLASSES, (channels, 8, 8))


def small_data(count: int, channels: int = 3) -> CleanData:
    """Noise ``[count, channels, 8, 8]`` at four levels of brightness."""
    labels = torch.arange(count) % _CLASSES
    noise = torch.rand(count, channels, 8, 8, generator=torch.Generator().manual_seed(count)) / 6
    return CleanData(noise + 0.25 * labels.view(-1, 1, 1, 1), labels)


def small_case(
    method: Method, memo: Memo | None = None, norm: Norm = "batch", channels: int = 3, dropout: float = 0.0
) -> Case:
    """A small network, with just enough images for the method."""
    count = max(method.least_images, method.needs.per_class * _CLASSES, 40)
    return Case(small_model(norm, channels, dropout), small_data(count, channels), memo)


class Watching(Memo):
    """A memo that detects changes of its values."""

    def __init__(self) -> None:
        super().__init__()
        self._seen: list[tuple[Hashable, list[Tensor], list[Tensor]]] = []

    def put(self, key: Hashable, value: object) -> None:
        super().put(key, value)
        held = list(tensors_in(value))
        self._seen.append((key, held, [one.clone() for one in held]))

    def changed(self) -> list[str]:
        """The values that were changed after they were stored."""
        return [str(key)[-200:] for key, held, then in self._seen if not all(map(same, held, then))]


def tensors_in(value: object) -> Iterator[Tensor]:
    """Every tensor in an analysis."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, nn.Module):
        yield from value.state_dict().values()
    elif isinstance(value, Mapping):
        yield from (tensor for one in value.values() for tensor in tensors_in(one))
    elif isinstance(value, list | tuple):
        yield from (tensor for one in value for tensor in tensors_in(one))
    elif is_dataclass(value) and not isinstance(value, type):
        yield from (tensor for one in fields(value) for tensor in tensors_in(getattr(value, one.name)))


def same(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors hold the same values; NaN equals NaN."""
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    return bool((one.eq(other) | (one.ne(one) & other.ne(other))).all())


def check_json(record: Record) -> None:
    """Raises an error if a record changes in a round trip through JSON."""
    try:
        back = type(record).from_json(record.to_json())
    except DataError as error:
        raise AssertionError(f"The {type(record).__name__} cannot be read back from JSON. {error.message}") from error
    assert back == record, f"The {type(record).__name__} changes in a round trip through JSON."


def check_attached(attachments: Sequence[Attachment], contents: Mapping[str, bytes]) -> None:
    """Raises an error if the bytes of an attachment are missing, or differ from its record."""
    for one in attachments:
        content = contents.get(one.sha256)
        assert content is not None, f"The attachment {one.name} was not created with case.attach."
        digest = hashlib.sha256(content).hexdigest()
        assert (digest, len(content)) == (one.sha256, one.bytes), f"The record of attachment {one.name} does not match."


def _describes_itself(kind: type[Method]) -> str:
    for name in ("id", "title", "needs", "cost", "gives"):
        assert hasattr(kind, name), f"{kind.__name__} has no class attribute {name!r}."
    assert re.fullmatch(r"[\w-]+(\.[\w-]+)+", kind.id), f"The id {kind.id!r} is not of the form package.name."
    assert kind.title and "\n" not in kind.title, "The title is not one line of text."
    assert kind.cost in COSTS, f"Unknown cost {kind.cost!r}; known are {', '.join(COSTS)}."
    assert kind.gives and set(kind.gives) <= set(GIFTS), f"gives is {kind.gives!r}; known are {', '.join(GIFTS)}."
    needed = [one.name for one in inspect.signature(kind).parameters.values() if one.default is one.empty]
    assert not needed, f"{kind.__name__} has settings without a default: {', '.join(needed)}."
    check_json(kind.info(kind.id.rpartition(".")[2]))
    for name in kind.presets:
        kind.preset(name)
    return ""


def _leaves_alone(trial: Trial) -> str:
    memo = Watching()
    case = small_case(trial.method, memo)
    network, data = case.model.network, case.images
    before, images, labels = copy.deepcopy(network.state_dict()), data.images.clone(), data.labels.clone()
    trial.run(case)
    trial.run(case)
    for name, value in network.state_dict().items():
        assert same(value, before[name]), f"The method changed {name} of the input model."
    assert not network.training, "The method left the input model in train mode."
    assert all(one.grad is None for one in network.parameters()), "The method left gradients on the model."
    assert all(one.requires_grad for one in network.parameters()), "The method switched off gradients of the model."
    assert same(data.images, images) and same(data.labels, labels), "The method changed the clean images."
    assert not memo.changed(), f"The method changed shared analyses: {memo.changed()[0]}"
    return ""


def _repeats(trial: Trial) -> str:
    found = []
    for seed in (1, 2):  # of global randomness, which must not matter
        with seeded(seed):
            found.append(trial.run(small_case(trial.method, Memo(), dropout=0.2)))
    assert found[0] == found[1], "Two runs with the same settings on the same case give different results."
    return ""


def _does_not_peek(trial: Trial) -> str:
    """A method gets only clean images, and only the properties that it declares as needed may influence the result."""
    taken = [one for one in inspect.signature(trial.method.__call__).parameters.values() if one.default is one.empty]
    assert len(taken) == 1, f"The method must take one argument, a case, not {len(taken)}."
    case, needs = small_case(trial.method, Memo()), trial.method.needs.images
    if needs == "labelled":
        return ""
    less = Case(case.model, None, Memo())
    if needs == "unlabelled":
        less = Case(case.model, replace(case.images, labels=(case.images.labels + 1) % _CLASSES), Memo())
    if trial.method.uses_more:
        trial.run(less)
        return "It uses clean images that it does not need, if there are any."
    assert trial.run(case) == trial.run(less), f"The method declares images: {needs!r}, but its result depends on more."
    return ""


def _takes_few(trial: Trial) -> str:
    method, case = trial.method, Case(small_model(), small_data(_FEW), Memo())
    wanted = (method.least_images if method.least_images > _FEW else 0, method.needs.per_class)
    if method.needs.images == "none" or (not wanted[0] and wanted[1] * _CLASSES <= _FEW):
        trial.run(case)
        return ""
    try:
        trial.run(case)
    except DataError as error:
        text = str(error)
        assert any(str(one) in text for one in wanted if one), f"The error does not name the number: {text}"
        return ""
    raise AssertionError(f"The method declares that it needs {wanted[0] or wanted[1]} images, but takes {_FEW}.")


def _takes_a_missing_class(trial: Trial) -> str:
    case = small_case(trial.method, Memo())
    count = len(case.images) * 2
    data = small_data(count)
    lacking = case.with_data(data.subset((data.labels != 1).nonzero().flatten()))
    return _runs(trial, lacking, refusal=DataError if trial.method.needs.per_class else ())


def _takes(trial: Trial, norm: Norm = "batch", channels: int = 3) -> str:
    return _runs(trial, small_case(trial.method, Memo(), norm, channels))


def _refuses_meta(trial: Trial) -> str:
    """Meta tensors stand for a missing device: their values cannot be read."""
    good = small_case(trial.method, Memo())
    absent = good.model.with_network(copy.deepcopy(good.model.network).to("meta"))
    data = replace(good.images, images=good.images.images.to("meta"))
    for model, images in ((absent, good.images), (good.model, data)):
        _runs(trial, lambda model=model, images=images: Case(model, images, Memo()), BdpruneError)  # type: ignore[misc]
    return ""


def _runs(trial: Trial, case: Case | Callable[[], Case], refusal: Any = ()) -> str:
    try:
        trial.run(case if isinstance(case, Case) else case())
    except refusal:
        pass
    except Exception as error:
        raise AssertionError(f"The method raised {type(error).__name__}: {error}") from error
    return ""
