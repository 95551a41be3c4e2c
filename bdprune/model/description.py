"""The description of a compact network: a small JSON file next to its weights.

``model.pth.arch.json`` lies next to ``model.pth``. It names the original architecture and, for each changed layer, the
channels that were kept. It holds names and numbers only; reading it runs nothing.
"""

from __future__ import annotations

import stat
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import msgspec

from bdprune.errors import ArtifactError
from bdprune.files import description_path
from bdprune.model.channels import Channels, Compact, LayerChannels

MAX_BYTES = 16 << 20
MAX_CHANNELS = 1 << 20
_MAX_LAYERS = 10_000
_MAX_PATH = 500  # characters; all prefixes of a name are kept
_HINT = "Write it again with bdprune, or delete it if it does not belong to this checkpoint."


class _Side(msgspec.Struct, forbid_unknown_fields=True):
    of: Annotated[int, msgspec.Meta(ge=1, le=MAX_CHANNELS)]
    kept: Annotated[list[Annotated[int, msgspec.Meta(ge=0, lt=MAX_CHANNELS)]], msgspec.Meta(min_length=1)]


class _Layer(msgspec.Struct, forbid_unknown_fields=True, omit_defaults=True):
    outputs: _Side | None = None
    inputs: _Side | None = None


class _Network(msgspec.Struct, forbid_unknown_fields=True):
    arch: str
    layers: dict[str, _Layer]


class _Document(msgspec.Struct, forbid_unknown_fields=True):
    bdprune_compact: Literal[1]
    networks: Annotated[list[_Network], msgspec.Meta(min_length=1, max_length=100)]


def encode_description(networks: Sequence[Compact]) -> bytes:
    """The description of the compact networks of one checkpoint, as JSON."""
    found = [
        _Network(one.arch, {path: _Layer(*map(_side, layer.sides)) for path, layer in one.layers.items()})
        for one in networks
    ]
    return msgspec.json.encode(_Document(1, found)) + b"\n"


def read_description(path: Path) -> tuple[Compact, ...]:
    """The compact networks of the checkpoint at ``path``; empty if no description lies next to it.

    Raises:
        ArtifactError: the description cannot be read, or its content is invalid: other fields, indices that are out of
            range or not increasing, impossible sizes.
    """
    place = description_path(path)
    try:
        status = place.stat()
        if not stat.S_ISREG(status.st_mode) or status.st_size > MAX_BYTES:
            raise ArtifactError(f"{place} is no regular file of at most {MAX_BYTES} bytes.", _HINT)
        with place.open("rb") as file:
            content = file.read(MAX_BYTES)
    except FileNotFoundError:
        return ()
    except (OSError, ValueError) as error:
        reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
        raise ArtifactError(f"The description {place} cannot be read: {reason}.", _HINT) from None
    try:
        document = msgspec.json.decode(content, type=_Document)
        return tuple(_compact(one) for one in document.networks)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise ArtifactError(f"{place} does not describe a compact network: {error}.", _HINT) from None


def _side(side: Channels | None) -> _Side | None:
    return None if side is None else _Side(side.of, list(side.kept))


def _compact(network: _Network) -> Compact:
    if len(network.layers) > _MAX_LAYERS:
        raise ValueError(f"it has {len(network.layers)} layers, more than {_MAX_LAYERS}")
    for path in network.layers:
        if len(path) > _MAX_PATH:
            raise ValueError(f"the name {path[:80]!r}... has {len(path)} characters, more than {_MAX_PATH}")
    layers = {
        path: LayerChannels(*(_channels(path, side) for side in (layer.outputs, layer.inputs)))
        for path, layer in network.layers.items()
    }
    return Compact(network.arch, layers)


def _channels(path: str, side: _Side | None) -> Channels | None:
    if side is None:
        return None
    if any(one >= two for one, two in zip(side.kept, side.kept[1:], strict=False)):
        raise ValueError(f"the kept channels of {path[:80]!r} do not increase")
    if side.kept[-1] >= side.of:
        raise ValueError(f"{path[:80]!r} keeps channel {side.kept[-1]} of {side.of} channels")
    return Channels(side.of, tuple(side.kept))
