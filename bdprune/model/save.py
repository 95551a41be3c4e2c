"""Writes a model back as a drop-in checkpoint: same format, wrapper, names, order, types and extra entries."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bdprune.errors import OutputError
from bdprune.model import torch_file
from bdprune.model.artifact import Artifact
from bdprune.model.handle import Model
from bdprune.model.safetensors_file import dump_safetensors


def save(model: Model, path: str | Path) -> None:
    """Writes ``model`` to ``path``, in the format of the file it came from (safetensors if it came from none).

    The file appears whole or not at all. Tensors that were not changed come back bit by bit.

    Raises:
        OutputError: the path cannot be written, or is the file the model came from.
    """
    path = Path(path)
    if model.artifact is not None and _same(path, model.artifact.path):
        raise OutputError(f"{path} is the checkpoint that was read.", "Give another output path; it is never replaced.")
    write_atomically(path, to_bytes(model))


def to_bytes(model: Model) -> bytes:
    """The checkpoint file as bytes."""
    tensors = {name: tensor.detach().cpu() for name, tensor in model.network.state_dict().items()}
    artifact = model.artifact
    if artifact is None:
        return dump_safetensors(tensors, {})
    state = _original_form(tensors, artifact)
    if artifact.format == "safetensors":
        return dump_safetensors(state, artifact.metadata or {})
    checkpoint = _filled(artifact.checkpoint, artifact.state_keys, state, artifact.metadata)
    return torch_file.dump(checkpoint, artifact.format == "torch-legacy")


def write_atomically(path: Path, data: bytes) -> None:
    """Writes ``data`` beside ``path`` and moves it there.

    Raises:
        OutputError: that fails; nothing is left behind.
    """
    temporary = None
    try:
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=".bdprune-", delete=False) as file:
            temporary = file.name
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    except OSError as error:
        raise OutputError(f"Cannot write {path}: {error.strerror or error}.", "Choose a path you can write.") from None
    finally:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current


def _same(path: Path, source: Path) -> bool:
    try:
        return os.path.samefile(path, source)
    except OSError:
        return False


def _original_form(tensors: Mapping[str, Tensor], artifact: Artifact) -> dict[str, Any]:
    """The state dict with the names, order, types and bystanders of the file."""
    state: dict[str, Any] = {}
    for key, dtype in artifact.dtypes.items():
        name = key.removeprefix(artifact.prefix)
        if name not in tensors:
            state[key] = artifact.kept[key]
        elif dtype == torch.float64:
            state[key] = _in_double(tensors[name], artifact.kept[key])
        else:
            state[key] = tensors[name].to(dtype)
    return state


def _in_double(tensor: Tensor, original: Tensor) -> Tensor:
    """The float64 original wherever its float32 copy was left alone."""
    return torch.where(tensor == original.to(torch.float32), original, tensor.to(torch.float64))


def _filled(
    checkpoint: Any, keys: tuple[str, ...], state: Mapping[str, Any], metadata: Mapping[str, Any] | None
) -> Any:
    """``checkpoint`` with ``state`` in the empty dict at ``keys``; the dicts on the way there are copied."""
    filled = type(checkpoint)()
    if keys:
        filled.update(checkpoint)
        filled[keys[0]] = _filled(checkpoint[keys[0]], keys[1:], state, metadata)
        return filled
    filled.update(state)
    if metadata is not None:
        filled._metadata = metadata  # where nn.Module.state_dict puts it
    return filled
