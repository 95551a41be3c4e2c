"""Checkpoints in several files: the index maps each tensor to a shard."""

from __future__ import annotations

import json
import re
from pathlib import Path

from bdprune.errors import ArtifactError
from bdprune.files.quoting import quoted

MAX_INDEX_BYTES = 64 << 20
GIVE_INDEX = "Give a folder that holds the index and all of its shards."
_MAX_SHARDS = 1000
_NAME = re.compile(r".+-\d{5}-of-\d{5}\.[a-z]+")


def is_shard(path: Path) -> bool:
    """Whether a file has the name of a shard, such as ``model-00001-of-00002.safetensors``."""
    return _NAME.fullmatch(path.name) is not None


def shard_names(data: bytes) -> dict[str, str]:
    """The map of an index of shards: names of tensors -> files next to the index.

    Raises:
        ArtifactError: it is not a map of names to plain file names.
    """
    try:
        names = json.loads(data)["weight_map"]
    except (ValueError, KeyError, TypeError, RecursionError):
        names = None
    if not isinstance(names, dict) or not names or not all(isinstance(name, str) for name in names.values()):
        raise ArtifactError("the index has no map of tensors to files (weight_map).", GIVE_INDEX)
    for name in set(names.values()):
        if Path(name).name != name or "\\" in name or "\0" in name or name == "..":
            raise ArtifactError(f"the index names {quoted(name)}, which is not a file next to it.", GIVE_INDEX)
    if len(set(names.values())) > _MAX_SHARDS:
        raise ArtifactError(f"the index names {len(set(names.values()))} files.", GIVE_INDEX)
    return dict(names)
