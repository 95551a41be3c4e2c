from __future__ import annotations

import io
import pickle
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from bdprune.data import source
from bdprune.data.load import load_clean
from bdprune.errors import DataError


def archive(path: Path, members: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", compression) as file:
        for name, content in members.items():
            file.writestr(name, content)
    return path


def npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def header(shape: str, dtype: str = "|u1", version: bytes = b"\x01\x00") -> bytes:
    text = f"{{'descr': '{dtype}', 'fortran_order': False, 'shape': {shape}, }}".encode()
    text += b" " * (-(len(text) + 11) % 64) + b"\n"
    return b"\x93NUMPY" + version + len(text).to_bytes(2, "little") + text


@pytest.mark.parametrize(
    "keys", [("images", "labels"), ("x", "y"), ("X", "y"), ("data", "targets"), ("x_test", "y_test")]
)
def test_keys(
    tmp_path: Path, pixels: np.ndarray, labels: np.ndarray, unit: torch.Tensor, keys: tuple[str, str]
) -> None:
    np.savez(tmp_path / "a.npz", **{keys[0]: pixels, keys[1]: labels})
    data = load_clean(tmp_path / "a.npz")
    assert torch.equal(data.images, unit)
    assert data.labels.tolist() == labels.tolist()


@pytest.mark.parametrize("layout", ["NHWC", "NCHW"])
@pytest.mark.parametrize("dtype", ["uint8", "int64", "float16", "float32", "float64"])
def test_layouts_and_types(
    tmp_path: Path, pixels: np.ndarray, labels: np.ndarray, unit: torch.Tensor, layout: str, dtype: str
) -> None:
    values = pixels if "int" in dtype else pixels / 255
    images = values.astype(dtype) if layout == "NHWC" else values.astype(dtype).transpose(0, 3, 1, 2)
    np.savez_compressed(tmp_path / "a.npz", images=images, labels=labels.astype(np.int32)[:, None])
    data = load_clean(tmp_path / "a.npz")
    assert data.images.dtype == torch.float32 and data.labels.dtype == torch.int64
    assert (data.images - unit).abs().max() <= (2**-11 if dtype == "float16" else 1e-7)


def test_grey_without_a_channel_axis(
    tmp_path: Path, pixels: np.ndarray, labels: np.ndarray, unit: torch.Tensor
) -> None:
    np.savez(tmp_path / "a.npz", images=pixels[..., 0], labels=labels)
    assert torch.equal(load_clean(tmp_path / "a.npz", input_shape=(1, 6, 4)).images, unit[:, :1])


@pytest.mark.parametrize(("input_shape", "first_row"), [((3, 5, 3), True), ((3, 3, 5), False), (None, True)])
def test_an_ambiguous_layout_follows_the_input_shape(
    tmp_path: Path, input_shape: tuple[int, int, int] | None, first_row: bool
) -> None:
    images = np.arange(2 * 3 * 5 * 3, dtype=np.uint8).reshape(2, 3, 5, 3)
    np.savez(tmp_path / "a.npz", images=images, labels=np.array([0, 1]))
    expected = images if first_row else images.transpose(0, 3, 1, 2)
    read = load_clean(tmp_path / "a.npz", input_shape=input_shape).images
    assert torch.equal(read, torch.from_numpy(expected.copy()).float() / 255)


def test_more_channels_are_read_if_the_model_takes_them(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", images=np.zeros((2, 8, 8, 5), np.uint8), labels=np.array([0, 1]))
    assert load_clean(tmp_path / "a.npz", input_shape=(5, 8, 8)).images.shape == (2, 5, 8, 8)
    with pytest.raises(DataError, match="no axis of 1 or 3 channels"):
        load_clean(tmp_path / "a.npz")


BAD_IMAGES = {
    "0 to 255": (lambda x: x.astype(np.float32), "look like 0 to 255.*Divide by 255"),
    "normalised": (lambda x: x / 255 - 0.5, "look normalised already.*--normalize"),
    "far": (lambda x: x * 100.0, "range is unknown"),
    "nan": (lambda x: np.where(x == x[0, 0, 0, 0], np.nan, x / 255), "NaN or infinite"),
    "inf": (lambda x: np.where(x == x[0, 0, 0, 0], np.inf, x / 255), "NaN or infinite"),
    "large integers": (lambda x: x.astype(np.int64) + 300, "integer pixels"),
    "negative integers": (lambda x: x.astype(np.int64) - 300, "integer pixels"),
    "text": (lambda x: x.astype("U3"), "pixels of type <U3"),
    "complex": (lambda x: x.astype(np.complex64), "pixels of type complex64"),
    "two axes": (lambda x: x.reshape(8, -1), "have shape"),
    "fewer": (lambda x: x[:5], "5 images but 8 labels"),
    "none": (lambda x: x[:0], "0 images but 8 labels"),
}


@pytest.mark.parametrize("case", BAD_IMAGES)
def test_bad_images(tmp_path: Path, pixels: np.ndarray, labels: np.ndarray, case: str) -> None:
    change, message = BAD_IMAGES[case]
    np.savez(tmp_path / "a.npz", images=change(pixels), labels=labels)
    with pytest.raises(DataError, match=message):
        load_clean(tmp_path / "a.npz")


BAD_LABELS = {
    "floats": (lambda y: y.astype(np.float64), "labels of .* are float64, not integers"),
    "bools": (lambda y: y > 0, "are bool, not integers"),
    "one-hot": (lambda y: np.eye(3, dtype=np.int64)[y], r"shape \(8, 3\).*argmax"),
    "negative": (lambda y: y - 1, "hold -1"),
    "huge": (lambda y: np.where(y == 0, 2**63, y).astype(np.uint64), "hold 9223372036854775808"),
    "scalar": (lambda y: y[0], r"shape \(\)"),
    "names": (lambda y: np.array(["cat"] * 8), "not integers"),
}


@pytest.mark.parametrize("case", BAD_LABELS)
def test_bad_labels(tmp_path: Path, pixels: np.ndarray, labels: np.ndarray, case: str) -> None:
    change, message = BAD_LABELS[case]
    np.savez(tmp_path / "a.npz", images=pixels, labels=change(labels))
    with pytest.raises(DataError, match=message):
        load_clean(tmp_path / "a.npz")


def test_missing_arrays_are_named(tmp_path: Path, pixels: np.ndarray) -> None:
    np.savez(tmp_path / "a.npz", pictures=pixels)
    with pytest.raises(DataError, match=r"no images: it holds pictures.*Name the array one of images, x"):
        load_clean(tmp_path / "a.npz")


class Payload:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return Path.touch, (Path("executed"),)


def test_pickles_are_never_loaded(tmp_path: Path, labels: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    np.savez("objects.npz", images=np.array([Payload()], dtype=object), labels=labels)
    archive(tmp_path / "bare.npz", {"images.npy": pickle.dumps(Payload()), "labels.npy": npy(labels)})
    for name in ("objects.npz", "bare.npz"):
        with pytest.raises(DataError):
            load_clean(tmp_path / name)
    assert not Path("executed").exists()


HOSTILE = {
    "claims 10 GB": {"images.npy": header("(10737418240,)") + b"x"},
    "claims many images": {"images.npy": header("(100000000, 0, 0, 0)")},
    "claims overflow": {"images.npy": header("(4294967296, 4294967296, 4294967296)")},
    "negative shape": {"images.npy": header("(-1, -8)") + b"12345678"},
    "records": {"images.npy": npy(np.zeros(3, dtype=[("a", "i4")]))},
    "newer version": {"images.npy": header("(1,)", version=b"\x03\x00") + b"x"},
    "no header": {"images.npy": b"\x93NUMPY\x01\x00\xff\xff"},
    "no magic": {"images.npy": b"plain text"},
    "code in header": {"images.npy": header("__import__('os')")},
    "empty member": {"images.npy": b""},
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_members(tmp_path: Path, labels: np.ndarray, case: str) -> None:
    path = archive(tmp_path / "a.npz", {**HOSTILE[case], "labels.npy": npy(labels)})
    with pytest.raises(DataError):
        load_clean(path)


def test_a_zip_bomb_is_rejected_by_its_directory(
    tmp_path: Path, labels: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bdprune.data.npz.MAX_BYTES", 1 << 20)
    bomb = npy(np.zeros((1024, 32, 32, 3), np.uint8))
    path = archive(tmp_path / "a.npz", {"images.npy": bomb, "labels.npy": npy(labels)}, zipfile.ZIP_DEFLATED)
    assert path.stat().st_size < 20_000
    with pytest.raises(DataError, match="unpacks to 3145856 bytes"):
        load_clean(path)
    assert source.MAX_BYTES == 4 << 30


def test_a_false_size_in_the_directory_does_not_unpack_more(tmp_path: Path, labels: np.ndarray) -> None:
    """Header and directory agree on 10 bytes; the stream after them holds 3 MB."""
    content = header("(10,)") + bytes(3 << 20)
    path = archive(tmp_path / "a.npz", {"images.npy": content, "labels.npy": npy(labels)}, zipfile.ZIP_DEFLATED)
    true, false = (size.to_bytes(4, "little") for size in (len(content), len(header("(10,)")) + 10))
    raw = path.read_bytes()
    assert raw.count(true) == 2
    path.write_bytes(raw.replace(true, false))
    with pytest.raises(DataError, match=r"CRC|shape"):
        load_clean(path)


@pytest.mark.parametrize("keep", [0.2, 0.6, 0.95])
def test_truncated_archive(tmp_path: Path, pixels: np.ndarray, labels: np.ndarray, keep: float) -> None:
    np.savez(tmp_path / "a.npz", images=pixels, labels=labels)
    content = (tmp_path / "a.npz").read_bytes()
    (tmp_path / "a.npz").write_bytes(content[: int(keep * len(content))])
    with pytest.raises(DataError, match=r"a\.npz cannot be read as a NumPy archive.*numpy\.savez"):
        load_clean(tmp_path / "a.npz")


def test_damage_anywhere_is_an_error_or_harmless(tmp_path: Path, pixels: np.ndarray, labels: np.ndarray) -> None:
    path, random = tmp_path / "a.npz", np.random.default_rng(0)
    np.savez_compressed(path, images=pixels, labels=labels)
    content, failures = path.read_bytes(), 0
    for _ in range(200):
        damaged = bytearray(content)
        damaged[random.integers(4, len(content))] = random.integers(256)
        path.write_bytes(damaged)
        try:
            load_clean(path)
        except DataError:
            failures += 1
    assert failures > 100


def test_a_zip_bomb_is_rejected_without_unpacking(tmp_path: Path) -> None:
    images, labels = np.zeros((30_000, 32, 32, 3), np.uint8), np.arange(30_000) % 10
    np.savez_compressed(tmp_path / "bomb.npz", images=images, labels=labels)
    assert (tmp_path / "bomb.npz").stat().st_size < 1 << 20
    del images
    tracemalloc.start()
    with pytest.raises(DataError, match="zip bomb"):
        load_clean(tmp_path / "bomb.npz")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 16 << 20
