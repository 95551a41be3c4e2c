"""The unlearned model, and the plain form of a network: the same function with fewer layers.

A layer that changes nothing in eval mode can matter in training: a batch norm with neutral statistics normalises by the
batch, and two consecutive linear layers change twice as fast as one.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from bdprune.analysis.case import Analysis, Case
from bdprune.errors import BdpruneError, DataError
from bdprune.loops import Unlearned, UnlearnSettings, UnlearnStep, unlearn, unlearn_stack
from bdprune.model import Model
from bdprune.runtime import DEFAULT, Precision

_PROBE = 8  # images on which the plain form is compared with the model
_STATISTICS = 128  # images of a batch whose statistics are taken
_TOLERANCE = 1e-3  # relative to the largest logit; for a batch norm's factor and offset, relative to 1


@dataclass(frozen=True)
class PlainForm(Analysis[Model]):
    """:func:`plain_form` of the model: the same function with fewer layers."""

    def compute(self, case: Case) -> Model:
        return plain_form(case.model, case.images.images)


@torch.no_grad()
def plain_form(model: Model, images: Tensor) -> Model:
    """``model`` without idle batch norms, and with consecutive linear layers merged into one.

    A batch norm is idle if it returns its input in eval mode. Returns ``model`` itself if nothing can be removed, or if
    the plain network gives other logits (a forward pass may use a layer in two places).

    Args:
        images: ``[N, C, H, W]`` in [0, 1]; a few of them are used for the comparison.
    """
    network = copy.deepcopy(model.network).eval()
    few = images[:_PROBE].to(model.device)
    expected = model.module(few)
    try:
        if not _drop_idle_norms(network) + _join_linear_layers(network, model, few):
            return model
        plain = model.with_network(network)
        found = plain.module(few)
    except Exception:  # any network may be passed, and may access its removed layers
        return model
    scale = expected.abs().max().clamp(min=1e-6)
    return plain if bool((found - expected).abs().max() <= _TOLERANCE * scale) else model


def _drop_idle_norms(network: nn.Module) -> int:
    """Replaces every idle batch norm by an identity; returns the number of replacements."""
    idle = [path for path, child in network.named_modules() if isinstance(child, _BatchNorm) and _is_idle(child)]
    for path in idle:
        network.set_submodule(path, nn.Identity())
    return len(idle)


def _is_idle(norm: _BatchNorm) -> bool:
    if norm.running_mean is None or norm.running_var is None:
        return False
    scale = (norm.running_var + norm.eps).rsqrt() * (1 if norm.weight is None else norm.weight)
    shift = (0 if norm.bias is None else norm.bias) - norm.running_mean * scale
    return bool(((scale - 1).abs() <= _TOLERANCE).all() and (shift.abs() <= _TOLERANCE).all())


def _join_linear_layers(network: nn.Module, model: Model, images: Tensor) -> int:
    """Merges pairs of linear layers in which the second takes the output of the first; returns the number of pairs."""
    joined = 0
    while pair := _linear_pair(network, model, images):
        first, second = (network.get_submodule(path) for path in pair)
        network.set_submodule(pair[0], nn.Identity())
        network.set_submodule(pair[1], _product(first, second))  # type: ignore[arg-type]
        joined += 1
    return joined


def _linear_pair(network: nn.Module, model: Model, images: Tensor) -> tuple[str, str] | None:
    """The paths of two consecutive linear layers, None if there are none left."""
    given: list[tuple[str, Tensor]] = []
    pairs: list[tuple[str, str]] = []

    def watch(path: str) -> torch.utils.hooks.RemovableHandle:
        def see(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            pairs.extend((before, path) for before, value in given if value is inputs[0] and before != path)
            given.append((path, output))

        return network.get_submodule(path).register_forward_hook(see)

    linear = [path for path, child in network.named_modules() if type(child) is nn.Linear and path]
    hooks = [watch(path) for path in linear] if len(linear) > 1 else []
    try:
        if hooks:
            model.with_network(network).module(images)
    finally:
        for hook in hooks:
            hook.remove()
    return pairs[0] if pairs else None


def _product(first: nn.Linear, second: nn.Linear) -> nn.Linear:
    """``second`` after ``first`` as one layer."""
    device = second.weight.device
    one = nn.Linear(first.in_features, second.out_features, device=device)
    shift = torch.zeros(second.out_features, device=device) if second.bias is None else second.bias
    one.weight.copy_(second.weight @ first.weight)
    one.bias.copy_(shift if first.bias is None else second.weight @ first.bias + shift)
    return one


SCAN_UNLEARNING = UnlearnSettings(weight_decay=5e-4, min_steps=8, raises=1)
"""How a scan unlearns. A repair with these settings on the same images reuses the scan's model."""


@dataclass(frozen=True)
class Unlearning(Analysis[Unlearned]):
    """:func:`bdprune.loops.unlearn` of the model.

    Args:
        plain: unlearn the plain form of the model. If that is the model itself, both settings share one result.
    """

    settings: UnlearnSettings = field(default_factory=UnlearnSettings)
    seed: int = 0
    precision: Precision = DEFAULT
    plain: bool = False

    @property
    def batch_size(self) -> int:  # type: ignore[override]
        """Images of each model in one step."""
        return self.settings.batch_size

    def compute(self, case: Case) -> Unlearned:
        if self.plain:
            return case.with_model(case.get(PlainForm())).get(replace(self, plain=False))
        return unlearn(case.model, case.images, self.settings, self.seed, self.precision, case.budget)

    def compute_stack(self, cases: Sequence[Case]) -> Sequence[Unlearned | BdpruneError]:
        """All models in the same steps."""
        models = [case.get(PlainForm()) if self.plain else case.model for case in cases]
        first = cases[0]
        outcomes = unlearn_stack(models, first.images, self.settings, self.seed, self.precision, first.budget)
        for case, model, outcome in zip(cases, models, outcomes, strict=True):
            if self.plain and model is case.model and not isinstance(outcome, BdpruneError):
                case.memo.put(case.key(replace(self, plain=False)), outcome)
        return outcomes


@torch.no_grad()
def with_own_statistics(model: Model, images: Tensor) -> Model:
    """A copy of ``model`` whose batch norms have the statistics of ``images`` as their running statistics.

    During unlearning the running statistics lag behind the weights. In eval mode, the unlearned network then predicts
    other labels than it does in train mode.

    Args:
        images: ``[N, C, H, W]`` in [0, 1]; statistics are means over batches of about 128.
    """
    found = model.clone()
    module = found.module.eval()
    norms = [one for one in module.modules() if isinstance(one, _BatchNorm) and one.track_running_stats]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a plain mean
        norm.train()
    for part in images.chunk(max(1, len(images) // _STATISTICS)):
        module(part.to(found.device))
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
        norm.eval()
    return found


def tensors_of(unlearned: Unlearned) -> dict[str, Tensor]:
    """An unlearned model and its trajectory as tensors, for :meth:`bdprune.analysis.Case.attach`."""
    steps = unlearned.trajectory
    forms = {"network": unlearned.model, "half_way": unlearned.half_way}
    networks = {
        f"{form}.{name}": value
        for form, model in forms.items()
        if model is not None
        for name, value in model.network.state_dict().items()
    }
    return {
        **networks,
        "measures": torch.tensor([(step.loss, step.accuracy) for step in steps], dtype=torch.float64),
        "counts": torch.tensor([(step.votes, step.wrong_votes, step.label_counts) for step in steps]),
        "run": torch.tensor([unlearned.steps_per_epoch, unlearned.lr, unlearned.stopped], dtype=torch.float64),
    }


def from_tensors(tensors: Mapping[str, Tensor], model: Model) -> Unlearned:
    """Rebuilds the result that :func:`tensors_of` wrote, with the network of ``model``.

    Raises:
        DataError: the tensors are not an unlearned form of this model.
    """
    run, measures, counts = (tensors.get(name, torch.empty(0)) for name in ("run", "measures", "counts"))
    if run.shape != (3,) or counts.shape != (len(measures), 3, model.num_classes) or not len(measures):
        raise _other_model()
    steps = zip(measures.tolist(), counts.tolist(), strict=True)
    trajectory = (UnlearnStep(loss, accuracy, *map(tuple, votes)) for (loss, accuracy), votes in steps)
    per_epoch, lr, stopped = run.tolist()
    half_way = _network_of(tensors, "half_way.", model) if any(one.startswith("half_way.") for one in tensors) else None
    end = _network_of(tensors, "network.", model)
    return Unlearned(end, tuple(trajectory), int(per_epoch), lr, bool(stopped), half_way=half_way)


def _network_of(tensors: Mapping[str, Tensor], prefix: str, model: Model) -> Model:
    copy = model.clone()
    found = {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
    wanted = copy.network.state_dict()
    if found.keys() != wanted.keys() or any(found[name].shape != value.shape for name, value in wanted.items()):
        raise _other_model()
    copy.network.load_state_dict(found)
    return copy


def _other_model() -> DataError:
    return DataError("The unlearned model kept by the scan is not a form of this model.", "Scan it again.")
