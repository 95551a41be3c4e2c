"""Networks that return something else than one tensor of logits, made to return just that."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from bdprune.errors import ArchitectureError, first_line

_KEYS = ("logits", "out")
_OURS = "bdprune.model.architectures."


def give_logits(network: nn.Module, shape: tuple[int, int, int], num_classes: int | None = None) -> int:
    """Makes ``network`` return logits ``[N, K]`` in training and in eval mode, and gives their number K.

    Taken as logits are: a tensor ``[N, K]`` or ``[N, K, 1, 1]``; ``.logits`` or ``["logits"]`` of an output object; of
    a tuple the first matrix of ``num_classes`` columns, else the first matrix. A network with one logit z gets two,
    [0, z], so that its softmax is the sigmoid that it was trained with. Names and parameters of the network stay.

    Args:
        network: in eval mode; its class is replaced in place where its output has to be.
        shape: (C, H, W) of one image.
        num_classes: expected number of logits, which tells them from other matrices in a tuple.

    Raises:
        ArchitectureError: the forward pass fails, or there are no logits in what it returns.
    """
    try:
        with torch.no_grad():
            output = network(torch.zeros(1, *shape, device=next(network.parameters()).device))
    except Exception as error:
        raise ArchitectureError(
            f"The network cannot take images of shape {shape}: {first_line(error)}.",
            "Give the channels, height and width of the images it was trained on, as in --input-shape 3x32x32.",
        ) from error
    columns = _columns(output, num_classes)
    if columns is None:
        found = f"shape {tuple(output.shape)}" if isinstance(output, Tensor) else f"a {type(output).__name__}"
        raise ArchitectureError(
            f"The network gives {found} instead of logits of shape (1, classes).",
            "Let --arch name a callable whose network returns logits: a tensor, or an object with .logits.",
        )
    if columns == 1 or not _is_plain(network, output, shape):
        network._logit_columns = columns  # type: ignore[assignment]
        network.__class__ = _with_logits(type(network))
    return max(columns, 2)


@torch.fx.wrap
def logits_of(output: Any, columns: int) -> Tensor:
    """The logits ``[N, K]`` in what a network returned; one column z becomes [0, z].

    Raises:
        ArchitectureError: there are none.
    """
    matrices = [matrix for matrix in _matrices(output) if matrix.shape[1] == columns]
    if not matrices:
        raise ArchitectureError(f"The network returns a {type(output).__name__} without {columns} logits.")
    found = matrices[0]
    return torch.cat([torch.zeros_like(found), found], 1) if columns == 1 else found


class _Logits:
    """Placed before the class of a network: its forward pass returns the logits alone."""

    _logit_columns: int

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return logits_of(super().forward(*args, **kwargs), self._logit_columns)  # type: ignore[misc]

    def __reduce__(self) -> tuple[Any, ...]:
        return _restored, (type(self).__mro__[2], self.__dict__)


def _restored(kind: type[nn.Module], state: dict[str, Any]) -> nn.Module:
    """A network of class ``kind`` with that state, which returns its logits alone; for copying and pickling."""
    network = kind.__new__(kind)
    network.__dict__.update(state)
    network.__class__ = _with_logits(kind)
    return network


_made: dict[type, type[nn.Module]] = {}


def _with_logits(kind: type[nn.Module]) -> type[nn.Module]:
    """The class of networks of class ``kind`` that return logits alone; one for all of them, so they can be stacked."""
    if kind not in _made:
        _made[kind] = type(kind.__name__, (_Logits, kind), {"__module__": __name__})
    return _made[kind]


def _is_plain(network: nn.Module, output: Any, shape: tuple[int, int, int]) -> bool:
    """Whether the network returns its logits and nothing else, in training mode as well as in eval mode."""
    if not _is_logits(output):
        return False
    if type(network).__module__.startswith(_OURS):
        return True
    # Training mode may add outputs, as in GoogLeNet, and changes statistics, so a copy is tried.
    trial = copy.deepcopy(network).train()
    device = next(network.parameters()).device
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            return _is_logits(trial(torch.zeros(2, *shape, device=device)), output.shape[1])
    except Exception:  # whatever it is, training will meet it again and say so
        return False


def _is_logits(output: Any, columns: int | None = None) -> bool:
    is_matrix = isinstance(output, Tensor) and output.ndim == 2
    return is_matrix and output.shape[1] == (columns or output.shape[1])


def _columns(output: Any, num_classes: int | None) -> int | None:
    counts = [matrix.shape[1] for matrix in _matrices(output)]
    return num_classes if num_classes in counts else next(iter(counts), None)


def _matrices(output: Any) -> list[Tensor]:
    """Everything in ``output`` that may be logits, the likeliest first, each ``[N, K]``."""
    if isinstance(output, Tensor):
        return _as_matrix(output)
    if isinstance(output, Mapping):
        chosen = [output[key] for key in _KEYS if key in output] or list(output.values())
    elif isinstance(getattr(output, "logits", None), Tensor):
        chosen = [output.logits]
    elif isinstance(output, tuple | list):
        chosen = list(output)
    else:
        chosen = []
    return [matrix for value in chosen if isinstance(value, Tensor) for matrix in _as_matrix(value)]


def _as_matrix(value: Tensor) -> list[Tensor]:
    if value.ndim == 4 and value.shape[2:] == (1, 1):
        value = value.flatten(1)
    if value.ndim == 1:
        value = value[:, None]  # one logit for each image
    return [value] if value.ndim == 2 and value.shape[1] > 0 else []
