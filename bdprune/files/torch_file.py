"""Checkpoints written by ``torch.save``: the zip archive (since 1.6) and the older stream of pickles.

Both are checked in full before torch loads them. Torch loads exactly the checked bytes, with ``weights_only=True``.
"""

from __future__ import annotations

import io
import struct
import sys
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, BinaryIO, cast

from bdprune.errors import ArtifactError, UnsupportedError
from bdprune.files.kinds import HEAD_BYTES
from bdprune.files.pickle_claims import StorageClaim, Walked
from bdprune.files.pickle_walk import MAX_PICKLE_BYTES, first_global, plain_globals, refuse_global, walk
from bdprune.files.quoting import quoted

LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_LEGACY_PROTOCOL = 1001
_MAX_ENTRIES = 100_000
_END_OF_DIRECTORY = struct.Struct("<4s4H2LH")
_LOCAL_HEADER = struct.Struct("<26s2H")
_FETCH = "The file is damaged; download it again."
_HOSTILE = "The file is damaged or hostile; download it again from a source you trust."
_GIVE = "Give a checkpoint saved with torch.save or as safetensors."
_MAX_ARGUMENTS = 64 << 10
# fmt: off
_ARGUMENT_TYPES = frozenset({
    "_codecs.encode", "argparse.Namespace", "collections.OrderedDict", "datetime.timedelta",
    "numpy._core.multiarray._reconstruct", "numpy._core.multiarray.scalar", "numpy.core.multiarray._reconstruct",
    "numpy.core.multiarray.scalar", "numpy.dtype", "numpy.ndarray", "pathlib.PosixPath", "torch.ByteStorage",
    "torch._utils._rebuild_tensor_v2", "torch.device",
})
# fmt: on
_FLOATS = frozenset({"f2", "f4", "f8"})
"""NumPy's names of float types; the arrays of random states hold integers."""
_ARGUMENT_MODULES = (
    "accelerate.state.",
    "accelerate.utils.dataclasses.",
    "transformers.trainer_pt_utils.",
    "transformers.trainer_utils.",
    "transformers.training_args.",
)
"""Globals of arguments and random states. None of them runs code from its arguments."""
_TORCHSCRIPT = "Save the state dict of the module it was made from: torch.save(model.state_dict(), path)."


def check_zip(data: bytes) -> None:
    """Checks a zip archive of ``torch.save``: directory, names, sizes, checksums, pickle, storages.

    Raises:
        ArtifactError: it is damaged or hostile.
        UnsupportedError: it is a sound zip archive, but not a checkpoint.
    """
    with _archive(io.BytesIO(data), len(data)) as (archive, entries):
        _walked_zip(archive, entries)
        damaged = archive.testzip()
        if damaged is not None:
            raise ArtifactError(f"entry {quoted(damaged)} of the zip archive is damaged (wrong checksum).", _FETCH)


@dataclass(frozen=True)
class Places:
    """The contents of a checkpoint whose storages are still in the file.

    Attributes:
        walked: the object, with descriptions instead of tensors.
        starts: key of a storage -> position of its first byte.
        swapped: whether the storages have the other byte order than this machine.
    """

    walked: Walked
    starts: Mapping[str, int]
    swapped: bool = False


def places_in_zip(file: BinaryIO, size: int) -> Places:
    """The contents of a zip archive of ``torch.save``; it reads no storage.

    All checks are those of :func:`check_zip`, except for the checksums.

    Args:
        file: the archive.
        size: its number of bytes.

    Raises:
        ArtifactError: it is damaged or hostile.
        UnsupportedError: it is a sound zip archive, but not a checkpoint.
    """
    with _archive(file, size) as (archive, entries):
        walked = _walked_zip(archive, entries)
        starts = {key: _start(file, entries[f"data/{key}"], size) for key in walked.storages}
        order = archive.read(entries["byteorder"]).decode() if "byteorder" in entries else "little"
        return Places(walked, starts, order != sys.byteorder)


def places_in_legacy(file: BinaryIO, size: int) -> Places:
    """The contents of a legacy checkpoint, with the checks of :func:`check_legacy`; it reads no storage.

    Raises:
        ArtifactError: it is damaged or hostile.
        UnsupportedError: it is a pickle of something else.
    """
    head = file.read(HEAD_BYTES)
    if not is_legacy(head):
        _refuse_plain_pickle(head + file.read(MAX_PICKLE_BYTES))
    file.seek(0)
    return _legacy(cast(BinaryIO, _Frugal(file)), size)


@contextmanager
def _archive(file: BinaryIO, size: int) -> Iterator[tuple[zipfile.ZipFile, dict[str, zipfile.ZipInfo]]]:
    """The archive and its entries by name, after the checks of its directory. It turns all errors into ours."""
    try:
        with zipfile.ZipFile(file) as archive:
            _check_directory(file, archive)
            if not any(name.partition("/")[2] == "data.pkl" for name in archive.namelist()):
                raise UnsupportedError(
                    "it is a zip archive without data.pkl, so not a checkpoint of torch.save.", _GIVE
                )
            entries = _entries(archive)
            if "constants.pkl" in entries:
                raise UnsupportedError("it is a TorchScript archive, not a state dict.", _TORCHSCRIPT)
            _check_sizes(archive, size)
            yield archive, entries
    except (zipfile.BadZipFile, zipfile.LargeZipFile, NotImplementedError, EOFError, ValueError, OSError) as error:
        raise ArtifactError(f"the zip archive is truncated or damaged: {quoted(error)}.", _FETCH) from None
    except (struct.error, RuntimeError, MemoryError, OverflowError) as error:
        raise ArtifactError(f"the zip archive cannot be read: {quoted(error)}.", _FETCH) from None


def check_legacy(data: bytes) -> None:
    """Checks a stream of pickles followed by raw storages, as ``torch.save`` wrote it before 1.6.

    Raises:
        ArtifactError: it is damaged or hostile.
        UnsupportedError: it is a pickle of something else.
    """
    if not is_legacy(data):
        _refuse_plain_pickle(data)
    _legacy(io.BytesIO(data), len(data))


def _legacy(stream: BinaryIO, size: int) -> Places:
    walk(stream, "header")
    if walk(stream, "header").value != _LEGACY_PROTOCOL:
        raise UnsupportedError("it is a checkpoint of an unknown version of the legacy format.", _FETCH)
    walk(stream, "header")
    walked = walk(stream, "checkpoint")
    keys = walk(stream, "list of storages").value
    if type(keys) is not list or not all(type(key) is str for key in keys) or sorted(keys) != sorted(walked.storages):
        raise ArtifactError("the list of storages does not match the storages of the tensors.", _FETCH)
    starts = {key: _check_legacy_storage(size, stream, walked.storages[key]) for key in keys}
    if stream.tell() != size:
        raise ArtifactError(f"{size - stream.tell()} bytes follow the last tensor.", _HOSTILE)
    return Places(walked, starts, sys.byteorder != "little")


def is_legacy(data: bytes) -> bool:
    """Whether the bytes begin like a legacy checkpoint."""
    return data.startswith(b"\x80\x02\x8a\n" + LEGACY_MAGIC.to_bytes(10, "little") + b".")


def arguments_in(data: bytes) -> str:
    """The kinds of harmless objects in a file that cannot be loaded but holds no tensors; empty for other files.

    Trainers write their arguments and random states in this form. It compares every global of the pickle with a list,
    and runs nothing.
    """
    try:
        pickle = _only_pickle(data) if data.startswith(b"PK") else data
    except (zipfile.BadZipFile, zipfile.LargeZipFile, NotImplementedError, EOFError, ValueError, OSError, RuntimeError):
        return ""
    if pickle is None or len(pickle) > _MAX_ARGUMENTS:
        return ""
    names, strings = plain_globals(io.BytesIO(pickle))
    holds_arrays = any(name.endswith("._reconstruct") for name in names) and not _FLOATS.isdisjoint(strings)
    if (
        not names
        or holds_arrays
        or not all(name in _ARGUMENT_TYPES or name.startswith(_ARGUMENT_MODULES) for name in names)
    ):
        return ""
    return f"Python objects, such as {quoted(names[0])}"


def load_checked(data: bytes) -> Any:
    """The object in ``data``, which passed one of the checks above; tensors on the CPU.

    Raises:
        ArtifactError: torch still refuses it.
    """
    import torch

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:
        first_line = (str(error).splitlines() or [type(error).__name__])[0]
        raise ArtifactError(f"torch.load(weights_only=True) refuses it: {quoted(first_line, 160)}.", _FETCH) from None


def dump_torch(checkpoint: object, legacy: bool) -> bytes:
    """``checkpoint`` as the bytes of a zip archive, or of the legacy format."""
    import torch

    buffer = io.BytesIO()
    torch.save(checkpoint, buffer, _use_new_zipfile_serialization=not legacy)
    return buffer.getvalue()


def _only_pickle(data: bytes) -> bytes | None:
    """``data.pkl`` of a zip archive of torch.save; None if it is missing or large."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        names = archive.namelist()
        inner = [name.partition("/")[2] for name in names]
        if inner.count("data.pkl") != 1:
            return None
        info = archive.getinfo(names[inner.index("data.pkl")])
        return archive.read(info) if info.file_size <= _MAX_ARGUMENTS else None


def _check_directory(file: BinaryIO, archive: zipfile.ZipFile) -> None:
    """Checks that the only directory is at the end and the first entry at byte 0, so that all readers see the same."""
    file.seek(-_END_OF_DIRECTORY.size, io.SEEK_END)
    if not file.read().startswith(b"PK\x05\x06") or archive.comment:
        raise ArtifactError("bytes follow the directory of the zip archive.", _HOSTILE)
    if len(archive.infolist()) > _MAX_ENTRIES:
        raise ArtifactError(f"the zip archive has {len(archive.infolist())} entries.", _HOSTILE)
    if min((info.header_offset for info in archive.infolist()), default=0) != 0:
        raise ArtifactError("bytes precede the first entry of the zip archive.", _HOSTILE)


def _entries(archive: zipfile.ZipFile) -> dict[str, zipfile.ZipInfo]:
    """Entries by name, without the common top folder."""
    infos = archive.infolist()
    root = infos[0].filename.partition("/")[0] + "/" if infos else ""
    entries: dict[str, zipfile.ZipInfo] = {}
    for info in infos:
        name = info.filename.removeprefix(root)
        if info.orig_filename != info.filename or not info.filename.startswith(root) or not _is_plain(name):
            raise ArtifactError(f"a zip entry has the invalid name {quoted(info.orig_filename)}.", _HOSTILE)
        if name in entries:
            raise ArtifactError(f"the zip archive has two entries named {quoted(name)}.", _HOSTILE)
        entries[name] = info
    return entries


def _is_plain(name: str) -> bool:
    return bool(name) and name.isprintable() and name.isascii() and "\\" not in name and ".." not in name.split("/")


def _check_sizes(archive: zipfile.ZipFile, file_bytes: int) -> None:
    """Checks that no entry is compressed, as in every file of ``torch.save``, and that their sizes fit the file."""
    for info in sorted(archive.infolist(), key=lambda info: info.compress_size - info.file_size):
        if info.compress_type != zipfile.ZIP_STORED or info.compress_size != info.file_size:
            raise ArtifactError(
                f"entry {quoted(info.filename)} of the zip archive is compressed, from {info.file_size} bytes to "
                f"{info.compress_size}, which torch.save never does.",
                "It may be a zip bomb. If you trust it, unpack it and save the state dict with torch.save.",
            )
        if info.flag_bits & 1:
            raise ArtifactError(f"entry {quoted(info.filename)} of the zip archive is encrypted.", _HOSTILE)
    total = sum(info.file_size for info in archive.infolist())
    if total > file_bytes:
        raise ArtifactError(f"the zip archive claims {total} bytes in a file of {file_bytes}.", _HOSTILE)


def _walked_zip(archive: zipfile.ZipFile, entries: Mapping[str, zipfile.ZipInfo]) -> Walked:
    """The object in the archive, whose tensors fit its storages."""
    size = entries["data.pkl"].file_size
    if size > MAX_PICKLE_BYTES:
        raise ArtifactError(f"its data.pkl has {size} bytes, more than any state dict needs.", _HOSTILE)
    stream = io.BytesIO(archive.read(entries["data.pkl"]))
    walked = walk(stream, "checkpoint")
    if stream.read(1):
        raise ArtifactError("bytes follow the end of data.pkl.", _HOSTILE)
    _check_zip_storages(walked, entries)
    if "byteorder" in entries and archive.read(entries["byteorder"]) not in (b"little", b"big"):
        raise ArtifactError("the byte order of the zip archive is missing or unknown.", _FETCH)
    return walked


def _start(file: BinaryIO, info: zipfile.ZipInfo, size: int) -> int:
    """Position of the first byte of an entry; its own header must have the name that the directory gives it."""
    file.seek(info.header_offset)
    header = file.read(_LOCAL_HEADER.size)
    if len(header) == _LOCAL_HEADER.size and header.startswith(b"PK\x03\x04"):
        name, extra = _LOCAL_HEADER.unpack(header)[1:]
        start: int = info.header_offset + len(header) + name + extra
        if file.read(name) == info.orig_filename.encode() and start + info.file_size <= size:
            return start
    raise ArtifactError(f"entry {quoted(info.filename)} of the zip archive is not where its directory says.", _FETCH)


def _check_zip_storages(walked: Walked, entries: Mapping[str, zipfile.ZipInfo]) -> None:
    for storage in walked.storages.values():
        info = entries.get(f"data/{storage.key}")
        if info is None:
            raise ArtifactError(f"the storage {quoted(storage.key)} is missing from the zip archive.", _FETCH)
        _check_claim(storage, info.file_size)


class _Frugal:
    """A file for the reader of pickles, which gets at most as many bytes at once as a pickle may have."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.seek, self.tell = file.seek, file.tell

    def read(self, count: int) -> bytes:
        """The next bytes.

        Raises:
            ValueError: they are more than a pickle may have.
        """
        if count > MAX_PICKLE_BYTES:
            raise ValueError(f"a value of {count} bytes")
        return self._file.read(count)

    def readline(self) -> bytes:
        """The next line."""
        return self._file.readline(MAX_PICKLE_BYTES)


def _check_legacy_storage(size: int, stream: BinaryIO, storage: StorageClaim) -> int:
    """Checks the length of a storage, steps over it, and returns the position of its first byte."""
    header = stream.read(8)
    count = struct.unpack("<q", header)[0] if len(header) == 8 else -1
    if count != storage.count:
        raise ArtifactError(f"a storage should have {storage.count} elements, but its header says {count}.", _FETCH)
    start = stream.tell()
    _check_claim(storage, min(storage.count * storage.item_bytes, size - start))
    stream.seek(storage.count * storage.item_bytes, io.SEEK_CUR)
    return start


def _check_claim(storage: StorageClaim, found: int) -> None:
    claimed = storage.count * storage.item_bytes
    if claimed != found:
        raise ArtifactError(f"a tensor storage claims {claimed} bytes, but the file holds {found}.", _HOSTILE)


def _refuse_plain_pickle(data: bytes) -> None:
    """Raises the error for a pickle that torch.save did not write; it names the pickle's first global."""
    name = first_global(io.BytesIO(data[:MAX_PICKLE_BYTES]))
    if name:
        refuse_global(name, "pickle")
    raise UnsupportedError("it is not a checkpoint of torch.save or safetensors.", _GIVE)
