"""A case finds stored results by content, and only by content."""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar

import pytest
import torch
from safetensors.torch import load as read_tensors
from torch import nn

from bdprune.analysis import MEMO, Analysis, Case, Memo
from bdprune.data import CleanData
from bdprune.model import Model, Normalization
from bdprune.model import load as load_model
from bdprune.runtime import Budget

CALLS: list[str] = []


@pytest.fixture(autouse=True)
def calls() -> Iterator[None]:
    CALLS.clear()
    yield
    CALLS.clear()


@dataclass(frozen=True)
class Brightness(Analysis[torch.Tensor]):
    """The mean of the images, times a setting."""

    times: float = 1.0

    def compute(self, case: Case) -> torch.Tensor:
        CALLS.append("brightness")
        return case.images.images.mean() * self.times


@dataclass(frozen=True)
class Size(Analysis[int]):
    """The number of weights, independent of the images."""

    uses_data: ClassVar[bool] = False

    def compute(self, case: Case) -> int:
        CALLS.append("size")
        return sum(value.numel() for value in case.model.network.parameters())


@pytest.fixture
def file(tmp_path: Any) -> Any:
    """A narrow ResNet in a file: weights and architecture fully describe such a model."""
    from bdprune.model import build

    with torch.random.fork_rng():
        torch.manual_seed(0)
        torch.save(build("resnet20_cifar", 3).state_dict(), tmp_path / "model.pth")
    return tmp_path / "model.pth"


def images(count: int = 6, seed: int = 0) -> CleanData:
    generator = torch.Generator().manual_seed(seed)
    return CleanData(torch.rand(count, 3, 32, 32, generator=generator), torch.arange(count) % 3)


def changed(model: Model, by: float = 1e-3) -> Model:
    """A copy with one weight changed."""
    network = copy.deepcopy(model.network)
    with torch.no_grad():
        weight = next(network.parameters())
        weight[(0,) * weight.dim()] += by
    return model.with_network(network)


def test_the_same_content_gives_the_same_object(file: Any) -> None:
    first = Case(load_model(file), images()).get(Brightness())
    assert Case(load_model(file), images()).get(Brightness()) is first
    assert CALLS == ["brightness"]
    MEMO.clear()
    again = Case(load_model(file), images()).get(Brightness())
    assert torch.equal(again, first) and CALLS == ["brightness"] * 2


def test_equal_weights_in_another_file_give_the_same_result(file: Any) -> None:
    other = file.with_name("other.pth")
    torch.save({"epoch": 3, "net": torch.load(file, weights_only=True)}, other)
    assert Case(load_model(file)).digest == Case(load_model(other)).digest


def test_other_settings_images_or_weights_give_another_result(file: Any) -> None:
    model = load_model(file)
    Case(model, images()).get(Brightness())
    others = [
        (Case(model, images()), Brightness(2.0)),
        (Case(model, images(seed=1)), Brightness()),
        (Case(model, CleanData(images().images, images().labels.flip(0))), Brightness()),
        (Case(changed(model), images()), Brightness()),
    ]
    for case, analysis in others:
        case.get(analysis)
    assert len(CALLS) == 1 + len(others)


def test_everything_that_affects_the_output_of_a_model_is_in_its_digest(file: Any) -> None:
    model = load_model(file)
    variants = [
        model,
        changed(model, 1e-6),
        load_model(file, normalize=Normalization((0.5,), (0.25,))),
        load_model(file, input_shape=(3, 16, 16)),
    ]
    assert len({Case(one).digest for one in variants}) == len(variants)
    moved = copy.deepcopy(model.network)
    next(buffer for name, buffer in moved.named_buffers() if name.endswith("running_mean")).add_(1)
    assert Case(model.with_network(moved)).digest != Case(model).digest


def test_a_digest_is_the_same_in_another_process(file: Any) -> None:
    code = (
        "import sys; from bdprune.analysis import Case; from bdprune.model import load; "
        "print(Case(load(sys.argv[1])).digest)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(file)], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == Case(load_model(file)).digest


def test_data_free_results_are_reused_with_any_images(file: Any) -> None:
    model = load_model(file)
    for case in (Case(model), Case(model, images()), Case(model, images(seed=1))):
        case.get(Size())
    assert CALLS == ["size"]


def test_a_module_of_the_user_shares_no_results_with_another_case(bright: Any) -> None:
    """No digest covers the code of a module: the same weights may compute something else."""
    first, second = Case(bright.model, bright.data), Case(bright.model, bright.data)
    assert first.memo is not second.memo and first.memo is not MEMO
    first.get(Brightness()), first.get(Brightness()), second.get(Brightness())
    assert CALLS == ["brightness"] * 2


def test_an_architecture_of_the_user_shares_no_results_either(tiny: Any) -> None:
    model = load_model(tiny.path, arch=tiny.arch, input_shape=tiny.input_shape)
    assert model.artifact is not None and Case(model).memo is not MEMO and Case(model).memo is not Case(model).memo


class Louder(nn.Module):
    """Another module around the weights of a file."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return 2 * self.network(images)  # type: ignore[no-any-return]


def test_a_network_that_replaced_the_network_of_a_file_shares_no_results(file: Any) -> None:
    model = load_model(file)
    assert Case(model).memo is MEMO
    assert Case(model.with_network(Louder(model.network))).memo is not MEMO
    part = copy.deepcopy(model.network)
    part.add_module("layer1", Louder(part.get_submodule("layer1")))
    assert Case(model.with_network(part)).memo is not MEMO
    hooked = copy.deepcopy(model.network)
    hooked.register_forward_hook(lambda module, inputs, output: 2 * output)
    assert Case(model.with_network(hooked)).memo is not MEMO


def test_layers_without_weights_are_in_the_digest(file: Any) -> None:
    model = load_model(file)
    other = copy.deepcopy(model.network)
    name = next(
        name for name, child in other.named_modules() if isinstance(child, nn.Conv2d) and child.padding == (1, 1)
    )
    other.get_submodule(name).padding_mode = "circular"
    assert Case(model.with_network(other)).digest != Case(model).digest


def test_a_given_memo_is_used(file: Any) -> None:
    memo = Memo()
    case = Case(load_model(file), images(), memo)
    case.get(Brightness())
    assert case.key(Brightness()) in memo and case.key(Brightness()) not in MEMO


def test_a_case_with_other_images_or_another_model_shares_the_memo(bright: Any) -> None:
    case = Case(bright.model, bright.data)
    part = case.with_data(bright.data.subset(torch.arange(30)))
    form = case.with_model(changed(bright.model))
    assert part.memo is case.memo is form.memo and part.attachments is case.attachments is form.attachments
    assert part.digest == case.digest != form.digest
    case.get(Size()), part.get(Size())
    assert CALLS == ["size"]
    assert part.get(Brightness()) is not case.get(Brightness())


def test_model_and_images_are_unchanged(bright: Any) -> None:
    before = {name: value.clone() for name, value in bright.model.network.state_dict().items()}
    pixels, labels = bright.data.images.clone(), bright.data.labels.clone()
    case = Case(bright.model, bright.data)
    case.in_order().sample(30, 1).get(Brightness())
    case.with_model(bright.model.clone()).get(Size())
    assert case.model is bright.model and case.data is bright.data
    assert all(torch.equal(value, before[name]) for name, value in bright.model.network.state_dict().items())
    assert torch.equal(bright.data.images, pixels) and torch.equal(bright.data.labels, labels)
    with pytest.raises(AttributeError):
        case.model = bright.model  # type: ignore[misc]


def test_in_order_sorts_by_content_and_is_computed_once(bright: Any) -> None:
    mixed = bright.data.subset(torch.randperm(len(bright.data), generator=torch.Generator().manual_seed(1)))
    one, two = Case(bright.model, bright.data).in_order(), Case(bright.model, mixed).in_order()
    assert torch.equal(one.images.images, two.images.images) and torch.equal(one.images.labels, two.images.labels)
    assert one.key(Brightness()) == two.key(Brightness())
    assert one.in_order() is one, "sorted already"
    without = Case(bright.model)
    assert without.in_order() is without


def test_a_sample_has_the_same_number_of_every_class(bright: Any) -> None:
    case = Case(bright.model, bright.data)
    assert case.sample(30, 1).images.class_counts == {0: 10, 1: 10, 2: 10}
    assert case.sample(1, 1).images.class_counts == {0: 1, 1: 1, 2: 1}, "at least one"
    assert case.sample(30, 1).images.digest == case.sample(30, 1).images.digest != case.sample(30, 2).images.digest


def tensor(count: int) -> torch.Tensor:
    return torch.zeros(count, dtype=torch.uint8)


def test_the_least_recently_used_entry_is_dropped_first() -> None:
    memo = Memo(100)
    for key in "abc":
        memo.get(key, lambda: tensor(30))
    memo.get("a", lambda: pytest.fail("it is known"))
    memo.put("d", tensor(30))
    assert [key for key in "abcd" if key in memo] == ["a", "c", "d"]
    memo.put("e", tensor(90))
    assert [key for key in "abcde" if key in memo] == ["e"]


def test_a_value_that_is_too_large_is_not_kept_and_evicts_nothing() -> None:
    memo = Memo(100)
    memo.put("a", tensor(60))
    assert len(memo.get("b", lambda: tensor(101))) == 101
    assert "b" not in memo and "a" in memo
    memo.put("a", tensor(101))
    assert "a" not in memo, "the old value is not kept under the key of a new one"
    memo.put("c", tensor(100))
    assert "c" in memo


def test_a_replaced_value_is_not_counted_twice() -> None:
    memo = Memo(100)
    for _ in range(5):
        memo.put("a", tensor(60))
    memo.put("b", tensor(40))
    assert "a" in memo and "b" in memo
    memo.clear()
    memo.put("c", tensor(100))
    assert "a" not in memo and "c" in memo


@dataclass(frozen=True)
class Held:
    """Tensors at any depth."""

    model: Model
    parts: dict[str, list[torch.Tensor]] = field(default_factory=dict)


def test_tensors_count_at_any_depth(bright: Any) -> None:
    weights = sum(value.nbytes for value in bright.model.network.state_dict().values())
    held = Held(bright.model, {"a": [tensor(10), tensor(20)]})
    for most, kept in ((weights + 30, True), (weights + 29, False)):
        memo = Memo(most)
        memo.put("held", held)
        assert ("held" in memo) == kept
    Memo(0).put("number", 3.5)


def test_an_error_is_not_kept() -> None:
    memo = Memo()
    with pytest.raises(ZeroDivisionError):
        memo.get("a", lambda: 1 // 0)
    assert "a" not in memo and memo.get("a", lambda: 2) == 2


def test_attachments_are_kept_by_their_digest(bright: Any) -> None:
    case = Case(bright.model)
    one = case.attach("masks", {"a": torch.ones(3)[::2], "b": torch.zeros(2, 2)})
    again = case.attach("again", {"a": torch.ones(2), "b": torch.zeros(2, 2)})
    assert (one.name, one.media_type) == ("masks", "application/safetensors") and one.sha256 == again.sha256
    assert list(case.attachments) == [one.sha256] and len(case.attachments[one.sha256]) == one.bytes
    assert read_tensors(case.attachments[one.sha256])["a"].tolist() == [1.0, 1.0]
    picture = case.attach_bytes("trigger", b"\x89PNG", "image/png")
    assert (picture.bytes, case.attachments[picture.sha256]) == (4, b"\x89PNG")


@pytest.mark.parametrize("name", ["", "../up", "a/b", "a\\b", "a.b", "A", "a b", "a\n", "x" * 65, "ä", "a\0"])
def test_names_that_could_leave_the_folder_are_errors(bright: Any, name: str) -> None:
    case = Case(bright.model)
    with pytest.raises(ValueError, match="invalid name"):
        case.attach_bytes(name, b"", "image/png")
    assert not case.attachments


@dataclass(frozen=True)
class Search(Analysis[float]):
    """A result that depends on the time."""

    uses_budget: ClassVar[bool] = True

    def compute(self, case: Case) -> float:
        CALLS.append("search")
        return case.budget.remaining


def test_the_result_of_a_shorter_search_is_not_taken_for_a_full_one(file: Any) -> None:
    case = Case(load_model(file), images())
    short = case.with_budget(Budget(seconds=5).started())
    assert short.get(Search()) < 5 < case.get(Search())
    assert short.with_budget(short.budget.less(3)).get(Search()) == short.get(Search()), "a later part of the same scan"
    assert CALLS == ["search"] * 2
    assert short.get(Brightness()) == case.get(Brightness()) and CALLS.count("brightness") == 1
    assert short.digest == case.digest and short.with_data(images()).budget == short.with_model(case.model).budget


def test_a_memo_keeps_few_models() -> None:
    memo = Memo(most_models=2)
    for digest in "abc":
        for part in (1, 2):
            memo.put((digest, part), part)
        memo.get(("a", 1), lambda: 1)
    assert ("a", 1) in memo and ("c", 2) in memo and ("b", 1) not in memo and ("b", 2) not in memo
    memo.put("no model", 1)
    assert "no model" in memo and ("c", 1) in memo
