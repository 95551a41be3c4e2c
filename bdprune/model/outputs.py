"""Makes networks that return something other than one tensor of logits return just the logits."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd
from torch.nn.modules.instancenorm import _InstanceNorm

from bdprune.errors import ArchitectureError, first_line

_KEYS = ("logits", "out")
_DEPTH = 3  # of tuples in tuples
_OURS = "bdprune.model.architectures."
_PROBE = 2  # images: for a single image, squeezed logits look like one logit


def give_logits(network: nn.Module, shape: tuple[int, int, int], num_classes: int | None = None) -> int:
    """Makes ``network`` return logits ``[N, K]`` in training and in eval mode, and returns K.

    Accepted as logits: a tensor ``[N, K]`` or ``[N, K, 1, 1]``; ``.logits`` or ``["logits"]`` of an output object;
    in a tuple, the first matrix with ``num_classes`` columns, or the first matrix. A network with one logit z gets two,
    [0, z], so that its softmax equals the sigmoid that it was trained with. Names and parameters do not change.

    Args:
        network: in eval mode; its class is replaced in place if its output must change.
        shape: (C, H, W) of one image.
        num_classes: expected number of logits, to distinguish them from other matrices in a tuple.

    Raises:
        ArchitectureError: the forward pass fails, computes no gradients, or returns no logits.
    """
    images = torch.rand(_PROBE, *shape, generator=torch.Generator().manual_seed(0))
    images = images.to(next(network.parameters()).device)
    try:
        output = network(images)
    except Exception as error:
        raise ArchitectureError(
            f"The network cannot take images of shape {shape}: {first_line(error).rstrip('.')}.",
            "Give --input-shape with the channels, height and width of the images it was trained on.",
        ) from error
    columns = _columns(output, num_classes)
    with torch.no_grad():
        network(images)  # weights that hooks compute (weight_norm) lose their graph, so it can be copied
    if columns is None:
        found = f"shape {tuple(output.shape)}" if isinstance(output, Tensor) else f"a {type(output).__name__}"
        raise ArchitectureError(
            f"The network returns {found} instead of logits of shape ({_PROBE}, classes) for {_PROBE} images.",
            "Let --arch name a callable whose network returns logits: a tensor, or an object with .logits.",
        )
    logits = _columns_of(output, columns)[0]
    if not logits.requires_grad and any(parameter.requires_grad for parameter in network.parameters()):
        hint = "Remove torch.no_grad and detach from the network that --arch builds."
        raise ArchitectureError("The forward pass computes no gradients, which scans and repairs need.", hint)
    place = _place_in_training(network, images, logits.detach(), columns)
    if columns == 1 or place is not None or not _is_logits(output, columns):
        network._logit_columns, network._logit_place = columns, place or 0  # type: ignore[assignment]
        network.__class__ = _with_logits(type(network))
    return max(columns, 2)


@torch.fx.wrap
def logits_of(output: Any, columns: int, place: int = 0) -> Tensor:
    """The logits ``[N, K]`` in the output of a network; one column z becomes [0, z].

    Args:
        output: output of the network.
        columns: K.
        place: index among the matrices with K columns, if there are several.

    Raises:
        ArchitectureError: the output has no such logits.
    """
    matrices = _columns_of(output, columns)
    if not matrices:
        raise ArchitectureError(f"The network returns a {type(output).__name__} without {columns} logits.")
    found = matrices[min(place, len(matrices) - 1)]
    return torch.cat([torch.zeros_like(found), found], 1) if columns == 1 else found


class _Logits:
    """Base class placed before the class of a network: its forward pass returns only the logits."""

    _logit_columns: int
    _logit_place: int
    training: bool

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        output = super().forward(*args, **kwargs)  # type: ignore[misc]
        return logits_of(output, self._logit_columns, self._logit_place if self.training else 0)

    def __reduce__(self) -> tuple[Any, ...]:
        return _restored, (type(self).__mro__[2], self.__dict__)


def _restored(kind: type[nn.Module], state: dict[str, Any]) -> nn.Module:
    """A network of class ``kind`` with that state, which returns only its logits; for copying and pickling."""
    network = kind.__new__(kind)
    network.__dict__.update(state)
    network.__class__ = _with_logits(kind)
    return network


_made: dict[type, type[nn.Module]] = {}


def _with_logits(kind: type[nn.Module]) -> type[nn.Module]:
    """The class of networks of class ``kind`` that return only logits; cached, so that they can be stacked."""
    if kind not in _made:
        _made[kind] = type(kind.__name__, (_Logits, kind), {"__module__": __name__})
    return _made[kind]


def _place_in_training(network: nn.Module, images: Tensor, logits: Tensor, columns: int) -> int | None:
    """Index of the logits among the matrices that the network returns in training mode; None if it returns just them.

    Training mode may add outputs before or after the main one, as in GoogLeNet. This tries a copy whose norms and
    dropout stay in eval mode, so that its main output equals that of eval mode.
    """
    if type(network).__module__.startswith(_OURS):
        return None
    trial = copy.deepcopy(network).train()
    for module in trial.modules():
        if isinstance(module, _BatchNorm | _InstanceNorm | _DropoutNd):
            module.eval()
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            output = trial(images)
    except Exception:  # training will meet the same error and report it
        return 0
    if _is_logits(output, columns):
        return None
    found = [(matrix - logits).abs().max().item() for matrix in _columns_of(output, columns)]
    return min(range(len(found)), key=found.__getitem__, default=0)


def _columns_of(output: Any, columns: int) -> list[Tensor]:
    return [matrix for matrix in _matrices(output) if matrix.shape[1] == columns]


def _is_logits(output: Any, columns: int | None = None) -> bool:
    is_matrix = isinstance(output, Tensor) and output.ndim == 2
    return is_matrix and output.shape[1] == (columns or output.shape[1])


def _columns(output: Any, num_classes: int | None) -> int | None:
    matrices = _matrices(output)
    counts = [matrix.shape[1] for matrix in [one for one in matrices if one.requires_grad] or matrices]
    return num_classes if num_classes in counts else next(iter(counts), None)


def _matrices(output: Any, depth: int = _DEPTH) -> list[Tensor]:
    """All tensors in ``output`` that may be logits, the likeliest first, each ``[N, K]``."""
    if isinstance(output, Tensor):
        return _as_matrix(output)
    return [matrix for part in _parts(output) for matrix in _matrices(part, depth - 1)] if depth else []


def _parts(output: Any) -> list[Any]:
    """The values of an output object: only its logits if it has some by that name."""
    if isinstance(output, Mapping):
        return [output[key] for key in _KEYS if key in output] or list(output.values())
    if isinstance(getattr(output, "logits", None), Tensor):
        return [output.logits]
    if isinstance(output, tuple | list):
        return list(output)
    return list(vars(output).values()) if dataclasses.is_dataclass(output) else []


def _as_matrix(value: Tensor) -> list[Tensor]:
    if value.ndim == 4 and value.shape[2:] == (1, 1):
        value = value.flatten(1)
    if value.ndim == 1:
        value = value[:, None]  # one logit for each image
    return [value] if value.ndim == 2 and value.shape[1] > 0 else []
