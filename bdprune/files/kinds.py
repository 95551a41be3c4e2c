"""Recognises the kind of a file by its first bytes, never by its name alone.

A checkpoint may have any suffix, and a file of another format may hold weights that were never scanned. So every kind
says whether it can hold weights.
"""

from __future__ import annotations

import io
import os
import pickletools
import re
import stat
import zipfile
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Literal, TypeVar

AnyPath = TypeVar("AnyPath", bound=PurePath)

HEAD_BYTES = 4096
"""Number of bytes of a file that are read to recognise its kind."""

SUFFIXES = (".pt", ".pth", ".th", ".tar", ".ckpt", ".bin", ".pkl", ".safetensors")
"""Suffixes of checkpoints. A file with one of them is always loaded, so that a damaged one causes an error."""

Weights = Literal["checkpoint", "possible", "none"]


@dataclass(frozen=True)
class FileKind:
    """A kind of file.

    Attributes:
        name: with its article, such as ``an ONNX model``.
        weights: ``checkpoint`` for files that bdprune reads, ``possible`` for other files that may hold weights,
            ``none`` for files without weights.
    """

    name: str
    weights: Weights


TORCH_ZIP = FileKind("a checkpoint of torch.save", "checkpoint")
PICKLE = FileKind("a pickle", "checkpoint")
SAFETENSORS = FileKind("a safetensors file", "checkpoint")
INDEX = FileKind("an index of shards", "checkpoint")
EMPTY = FileKind("an empty file", "none")
TEXT = FileKind("text", "none")
UNKNOWN = FileKind("a file of unknown content", "possible")
LABELLED_IMAGES = FileKind("labelled images", "none")
UNREADABLE = FileKind("a file that cannot be read", "possible")
APPLE_DOUBLE = FileKind("an AppleDouble file of macOS", "none")
SPECIAL = FileKind("a pipe, socket or device", "none")

_MAGIC: tuple[tuple[bytes, FileKind], ...] = (
    (b"\x89HDF\r\n\x1a\n", FileKind("an HDF5 file (Keras)", "possible")),
    (b"GGUF", FileKind("a GGUF file (a language model)", "possible")),
    (b"\x93NUMPY", FileKind("a NumPy array", "possible")),
    (b"\x1f\x8b", FileKind("a gzip archive", "possible")),
    (b"BZh", FileKind("a bzip2 archive", "possible")),
    (b"\xfd7zXZ\x00", FileKind("an xz archive", "possible")),
    (b"7z\xbc\xaf", FileKind("a 7z archive", "possible")),
    (b"\x28\xb5\x2f\xfd", FileKind("a zstd archive", "possible")),
    (b"Rar!", FileKind("a RAR archive", "possible")),
    (b"version https://git-lfs", FileKind("a Git LFS pointer, not the file itself", "possible")),
    (b"\x89PNG", FileKind("a PNG image", "none")),
    (b"\xff\xd8\xff", FileKind("a JPEG image", "none")),
    (b"GIF8", FileKind("a GIF image", "none")),
    (b"II*\x00", FileKind("a TIFF image", "none")),
    (b"MM\x00*", FileKind("a TIFF image", "none")),
    (b"PAR1", FileKind("a parquet file", "none")),
    (b"%PDF", FileKind("a PDF", "none")),
    (b"\x7fELF", FileKind("a program", "none")),
    (b"<!DOCTYPE", FileKind("an HTML page (a failed download?)", "none")),
    (b"<html", FileKind("an HTML page (a failed download?)", "none")),
    (b"SQLite format 3\x00", FileKind("an SQLite database", "none")),
    (b"\x37\x7f\x06\x82", FileKind("the log of an SQLite database", "none")),
    (b"\x37\x7f\x06\x83", FileKind("the log of an SQLite database", "none")),
    (b"\x18\xe2\x2d\x00", FileKind("the shared memory of an SQLite database", "none")),
    (b"\x00\x00\x00\x01Bud1", FileKind("a .DS_Store of macOS", "none")),
    (b"\x00\x05\x16\x07", APPLE_DOUBLE),
)
_ONNX = FileKind("an ONNX model, or another one in protobuf", "possible")
_TFLITE = FileKind("a TensorFlow Lite model", "possible")
TAR = FileKind("a tar archive", "possible")
_ZIP = FileKind("a zip archive", "possible")
_EVENTS = FileKind("a TensorBoard log", "none")
_WEBP = FileKind("a WebP image", "none")
_BMP = FileKind("a BMP image", "none")
_PROTOBUF_FIELDS = (0x12, 0x1A, 0x22, 0x28, 0x32, 0x3A, 0x42)
_TEXT_PICKLE = re.compile(rb"[(\]}]|c[A-Za-z_][\w.]*\n[A-Za-z_]\w*\n")
_PICKLE_STARTS = tuple(b"\x80" + bytes([protocol]) for protocol in range(1, 6))
_IMAGE_ARRAYS = {"images", "x", "X", "data", "x_test"}
_LABEL_ARRAYS = {"labels", "y", "Y", "targets", "label", "y_test"}


def kind_of_file(path: Path) -> FileKind:
    """The kind of the file at ``path``; it reads at most ``HEAD_BYTES``, and the directory of a zip archive."""
    try:
        mode = path.stat().st_mode
        if not stat.S_ISREG(mode):
            return SPECIAL if not stat.S_ISDIR(mode) else FileKind("a folder", "none")
        with path.open("rb") as file:
            head = file.read(HEAD_BYTES)
    except (OSError, ValueError):
        return UNREADABLE
    kind = kind_of_bytes(head)
    return _kind_of_zip(path) if kind == TORCH_ZIP else kind


def kind_of_bytes(head: bytes) -> FileKind:
    """The kind of a file that begins with ``head``. Every zip archive counts as a checkpoint here."""
    if not head:
        return EMPTY
    for magic, kind in _MAGIC:
        if head.startswith(magic):
            return kind
    if head[:4] == b"PK\x03\x04":
        return TORCH_ZIP
    # The length of a header may begin like a pickle: 1152 bytes are 80 04. No checkpoint of torch continues like it.
    if looks_like_safetensors(head):
        return SAFETENSORS
    if head.startswith(_PICKLE_STARTS):
        return PICKLE
    return _kind_by_layout(head)


def looks_like_safetensors(head: bytes) -> bool:
    """Whether the bytes begin with a header length and a JSON object."""
    return len(head) > 8 and head[8:9] == b"{" and not head.startswith(b"{") and head[7] == 0


def _kind_by_layout(head: bytes) -> FileKind:
    if head[257:262] == b"ustar":
        return TAR
    if head[4:8] == b"TFL3":
        return _TFLITE
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return _WEBP
    if b"brain.Event:" in head[:64]:
        return _EVENTS
    if head[:1] == b"\x08" and len(head) > 2 and head[1] < 0x20 and head[2] in _PROTOBUF_FIELDS:
        return _ONNX
    if head[:2] == b"BM" and len(head) > 14 and head[6:10] == b"\x00" * 4:
        return _BMP
    if _is_text(head):
        return PICKLE if _is_text_pickle(head) else INDEX if _is_index(head) else TEXT
    return UNKNOWN


def _is_text(head: bytes) -> bool:
    if b"\x00" in head:
        return False
    try:
        # The last character may be incomplete.
        head.decode() if len(head) < HEAD_BYTES else head[:-3].decode(errors="strict")
    except UnicodeDecodeError as error:
        return len(head) >= HEAD_BYTES and error.start > len(head) - 8
    return True


def _is_text_pickle(head: bytes) -> bool:
    """Whether a text is a pickle of protocol 0: its opcodes are letters, and prose soon contains an invalid one."""
    if not _TEXT_PICKLE.match(head):
        return False
    count = 0
    try:
        for opcode, _, _ in pickletools.genops(io.BytesIO(head)):
            count += 1
            if opcode.name == "STOP" or count >= 50:
                return count > 2
    except Exception:  # genops fails in many ways on text
        return count > 20
    return False


def _is_index(head: bytes) -> bool:
    return head.lstrip()[:1] == b"{" and b'"weight_map"' in head


def _kind_of_zip(path: Path) -> FileKind:
    """A checkpoint, labelled images, or another archive, by the names in its directory."""
    try:
        if os.path.getsize(path) > 8 << 30:
            return TORCH_ZIP
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except Exception:  # a damaged archive may be a truncated checkpoint: loading it raises the error
        return TORCH_ZIP
    if any(name.rpartition("/")[2] == "data.pkl" for name in names):
        return TORCH_ZIP
    arrays = {name.removesuffix(".npy") for name in names if name.endswith(".npy")}
    only_images = len(arrays) == len(names) and arrays <= _IMAGE_ARRAYS | _LABEL_ARRAYS
    if only_images and arrays & _IMAGE_ARRAYS and arrays & _LABEL_ARRAYS:
        return LABELLED_IMAGES
    return _ZIP


def description_path(path: AnyPath) -> AnyPath:
    """Where the description of a compact network lies, if the checkpoint at ``path`` has one."""
    return path.with_name(f"{path.name}.arch.json")
