"""Triggers in files: a safetensors file with mask and pattern, and PNG pictures for people."""

from __future__ import annotations

import os
from pathlib import Path

from torch import Tensor

from bdprune.analysis import draw_trigger, dump_trigger, parse_trigger, trigger_names
from bdprune.errors import ArtifactError, OutputError
from bdprune.files import is_special, write_atomically
from bdprune.loops import Trigger
from bdprune.pipeline.attachments import output_folder

_MOST_BYTES = 1 << 28  # a pattern of 3x4096x4096 pixels, with its mask
_GIVE = "Give a file that `bdprune invert` wrote."


def save_trigger(
    trigger: Trigger, folder: str | os.PathLike[str], images: Tensor | None = None, name: str = ""
) -> Path:
    """Writes a trigger to files in ``folder``, which is created if it does not exist.

    Args:
        trigger: what to write.
        folder: where to write it.
        images: ``[N, C, h, w]`` in [0, 1], clean images to be shown with the trigger; None shows none.
        name: start of the names of the files; by default made from the labels, such as ``trigger-8``.

    Returns:
        The path of the safetensors file, which :func:`load_trigger` reads. Next to it are the pictures:
        ``trigger-8-pattern.png``, ``trigger-8-mask.png`` (only of a patch), and with images ``trigger-8-stamped.png``
        (the images with the trigger) and ``trigger-8-difference.png`` (the changes to them, ten times as strong).

    Raises:
        OutputError: a file cannot be written.
    """
    name = name or trigger_names(trigger)[0]
    if Path(name).name != name:
        raise OutputError(f"{name!r} cannot start the names of files.", "Give a name without a folder.")
    where = output_folder(folder, "triggers")
    for picture, content in draw_trigger(trigger, images).items():
        write_atomically(where / f"{name}-{picture}.png", content)
    write_atomically(where / f"{name}.safetensors", dump_trigger(trigger))
    return where / f"{name}.safetensors"


def load_trigger(path: str | os.PathLike[str]) -> Trigger:
    """Reads a trigger from the safetensors file of :func:`save_trigger` or ``bdprune invert``, or from an attachment.

    The file is checked: it may come from anybody. Reading it runs no code.

    Raises:
        ArtifactError: the file is missing, very large or damaged, or holds no trigger.

    Example:
        >>> import torch
        >>> from bdprune import Trigger
        >>> mask, pattern = torch.zeros(1, 32, 32), torch.ones(3, 32, 32)
        >>> mask[:, 28:31, 28:31] = 1
        >>> path = save_trigger(Trigger(mask, pattern, target=1), "triggers/")
        >>> path.name, load_trigger(path).box
        ('trigger-1.safetensors', Box(x=28, y=28, width=3, height=3))
    """
    try:
        return parse_trigger(_content(Path(path)))
    except ArtifactError as error:
        raise type(error)(f"Cannot load {path} as a trigger: {error.message}", error.hint) from None


def _content(path: Path) -> bytes:
    try:
        if is_special(path):
            raise ArtifactError("it is not a file.", _GIVE)
        size = path.stat().st_size
        if size > _MOST_BYTES:
            raise ArtifactError(f"it has {size} bytes, more than {_MOST_BYTES}.", _GIVE)
        return path.read_bytes()
    except OSError as error:
        raise ArtifactError(f"{error.strerror}.", _GIVE) from None
