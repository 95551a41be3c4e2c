"""Chooses the files of a repository that are worth a download, by their names, and says why it leaves others out.

A repository often holds the same weights in several forms. The safetensors form is taken; each other one is named.
"""

from __future__ import annotations

import fnmatch
import posixpath
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from bdprune.files import SUFFIXES, is_shard
from bdprune.hub.names import is_safe

INDEX_SUFFIX = ".index.json"

_OTHER_FORMATS = {
    ".bz2": "an archive",
    ".ckpt.index": "a TensorFlow checkpoint",
    ".ggml": "a language model in GGML",
    ".gguf": "a language model in GGUF",
    ".gz": "an archive",
    ".h5": "an HDF5 file (Keras)",
    ".joblib": "a joblib file",
    ".keras": "a Keras model",
    ".mlmodel": "a Core ML model",
    ".msgpack": "a Flax model",
    ".npy": "a NumPy array",
    ".npz": "NumPy arrays",
    ".onnx": "an ONNX model",
    ".onnx_data": "the weights of an ONNX model",
    ".ot": "a Rust model",
    ".pb": "a TensorFlow model",
    ".pte": "an ExecuTorch model",
    ".rar": "an archive",
    ".tflite": "a TensorFlow Lite model",
    ".xz": "an archive",
    ".zip": "an archive",
    ".7z": "an archive",
}
_HARMLESS = re.compile(
    r"(?:licen[cs]e|notice|readme|makefile|dockerfile|\.git(?:attributes|ignore|modules|keep)|\.ds_store)"
    r"|.*\.(?:md|txt|rst|html?|css|json|jsonl|ya?ml|toml|cfg|ini|csv|tsv|xml|log|py|ipynb|sh|js|ts|c|cpp|h|cu|pdf|bib|tex"
    r"|png|jpe?g|gif|svg|webp|bmp|ico|tiff?|mp[34]|wav|flac|ogg|webm|model|vocab|merges|spm|parquet|arrow"
    r"|gitattributes|gitignore|lock|patch|diff|sha256|md5)|events\.out\.tfevents\..*",
    re.IGNORECASE | re.DOTALL,
)


@dataclass
class Choice:
    """What is taken of a repository.

    Attributes:
        files: the checkpoints and the indices of shards to scan.
        skipped: (reason, whether it may hold weights) -> the files that are left out.
    """

    files: list[str] = field(default_factory=list)
    skipped: dict[tuple[str, bool], list[str]] = field(default_factory=dict)

    def skip(self, path: str, reason: str, may_hold_weights: bool = False) -> None:
        """Records that ``path`` is left out."""
        self.skipped.setdefault((reason, may_hold_weights), []).append(path)


def chosen(paths: Sequence[str], pattern: str) -> Choice:
    """The files to scan, among them the shards of an index.

    Args:
        paths: all files of the repository.
        pattern: the name of a file, which is taken whatever it is; or a glob, which takes all checkpoints that it
            matches; or empty for all checkpoints, but one form of the same model.
    """
    choice = Choice()
    if pattern in paths:
        choice.files = [pattern]
        return choice
    choice.files = [path for path in paths if _matches(path, pattern or "**") and _is_candidate(path, choice)]
    if not pattern:
        _leave_out_other_forms(choice)
    return choice


def is_index(path: str) -> bool:
    """Whether a file has the name of an index of shards in a format that bdprune reads."""
    name = path.lower()
    return name.endswith(INDEX_SUFFIX) and name.removesuffix(INDEX_SUFFIX).endswith(SUFFIXES)


def _is_candidate(path: str, choice: Choice) -> bool:
    if not is_safe(path):
        choice.skip(path, "not downloaded: an unsafe name", True)
        return False
    name = posixpath.basename(path).lower()
    if name.endswith(SUFFIXES) or is_index(name):
        return True
    suffix = next((one for one in _OTHER_FORMATS if name.endswith(one)), "")
    if suffix:
        choice.skip(path, f"not downloaded: {_OTHER_FORMATS[suffix]}, by its name", True)
    elif _HARMLESS.fullmatch(name):
        if not name.endswith(".arch.json"):  # the description of a compact network comes with its checkpoint
            choice.skip(path, "not downloaded: text, pictures or data, by its name")
        else:
            choice.skip(path, "the description of a compact network")
    else:
        choice.skip(path, "not downloaded: a file of an unknown kind; add its name to scan it", True)
    return False


def _leave_out_other_forms(choice: Choice) -> None:
    """Leaves out the pickles next to safetensors files of the same model."""
    best = {_model_of(path): path for path in reversed(choice.files) if _is_safetensors(path)}
    for path in list(choice.files):
        other = best.get(_model_of(path))
        if other is not None and not _is_safetensors(path):
            choice.files.remove(path)
            name = posixpath.basename(other)
            choice.skip(
                path, f"not downloaded: a pickle next to {name}, which is scanned; add its name to scan it", True
            )


def _is_safetensors(path: str) -> bool:
    return path.lower().removesuffix(INDEX_SUFFIX).endswith(".safetensors")


def _model_of(path: str) -> str:
    """The folder and the stem that the forms of one model share: ``pytorch_model.bin`` is ``model.safetensors``."""
    folder, name = posixpath.split(path.removesuffix(INDEX_SUFFIX))
    stem = posixpath.splitext(name)[0]
    stem = re.sub(r"-\d{5}-of-\d{5}$", "", stem) if is_shard(Path(path)) else stem
    return posixpath.join(folder, stem.replace("pytorch_model", "model"))


def _matches(path: str, pattern: str) -> bool:
    """Whether a glob matches: ``*`` within a folder, ``**`` through folders."""
    if pattern == "**":
        return True
    return _parts_match(path.split("/"), pattern.split("/"))


def _parts_match(parts: list[str], patterns: list[str]) -> bool:
    if not patterns:
        return not parts
    if patterns[0] == "**":
        return _parts_match(parts, patterns[1:]) or (bool(parts) and _parts_match(parts[1:], patterns))
    return bool(parts) and fnmatch.fnmatchcase(parts[0], patterns[0]) and _parts_match(parts[1:], patterns[1:])
