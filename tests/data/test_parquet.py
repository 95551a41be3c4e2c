from __future__ import annotations

import builtins
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from bdprune.data import parquet
from bdprune.data.load import load_clean
from bdprune.data.parquet import ParquetSource, read_parquet
from bdprune.errors import DataError

Encode = Callable[..., bytes]


@pytest.fixture
def cells(encode: Encode, pixels: np.ndarray) -> list[bytes]:
    return [encode(image) for image in pixels]


def write(path: Path, columns: dict[str, Any], metadata: dict[str, str] | None = None, **options: Any) -> Path:
    pq.write_table(pa.table(columns).replace_schema_metadata(metadata), path, **options)
    return path


def test_all_rows_are_read_in_file_order(
    tmp_path: Path, cells: list[bytes], labels: np.ndarray, pixels: np.ndarray
) -> None:
    path = write(tmp_path / "a.parquet", {"image": cells, "label": labels}, {"classes": '["cat", "dog", "eel"]'})
    raw = read_parquet(path)
    assert raw.images.dtype == torch.uint8 and raw.labels.dtype == torch.int64
    assert np.array_equal(raw.images.permute(0, 2, 3, 1).numpy(), pixels)
    assert raw.labels.tolist() == labels.tolist()
    assert raw.class_names == ("cat", "dog", "eel")


@pytest.mark.parametrize("kind", [pa.binary(), pa.large_binary(), pa.binary_view()])
def test_struct_cells_and_short_column_names(
    tmp_path: Path, cells: list[bytes], labels: np.ndarray, unit: torch.Tensor, kind: pa.DataType
) -> None:
    image = pa.array(
        [{"bytes": cell, "path": "/etc/passwd"} for cell in cells],
        pa.struct([("bytes", kind), ("path", pa.string())]),
    )
    path = write(tmp_path / "a.parquet", {"extra": labels, "img": image, "label": pa.array(labels, pa.int8())})
    assert torch.equal(load_clean(path).images, unit)


def test_only_chosen_rows_are_decoded(
    tmp_path: Path, cells: list[bytes], pixels: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    labels = np.arange(400) % 4
    path = write(
        tmp_path / "a.parquet", {"image": [cells[row % 8] for row in range(400)], "label": labels}, row_group_size=90
    )
    decoded: list[str] = []
    real = parquet.decode_image

    def noted(cell: bytes, where: str, *more: object) -> torch.Tensor:
        decoded.append(where)
        return real(cell, where)

    monkeypatch.setattr(parquet, "decode_image", noted)
    monkeypatch.setattr(parquet, "_BATCH_ROWS", 32)
    data = load_clean(path, per_class=3, seed=5)
    assert len(decoded) == 12
    rows = [int(where.split()[1]) for where in decoded]
    assert rows == sorted(rows)
    assert data.class_counts == {0: 3, 1: 3, 2: 3, 3: 3}
    found = {image.mul(255).round().byte().numpy().tobytes() for image in data.images}
    assert found == {pixels[row % 8].transpose(2, 0, 1).tobytes() for row in rows}


def test_rows_are_returned_in_the_requested_order(tmp_path: Path, cells: list[bytes], labels: np.ndarray) -> None:
    source = ParquetSource(write(tmp_path / "a.parquet", {"image": cells, "label": labels}, row_group_size=3))
    everything = dict(source.read(range(8)))
    wanted = [7, 2, 2, 5, 0]
    picked = dict(source.read(wanted))
    assert sorted(picked) == [0, 1, 2, 3, 4]
    assert all(torch.equal(picked[slot], everything[row]) for slot, row in enumerate(wanted))


HUGGINGFACE = {"info": {"features": {"label": {"names": ["a", "b", "c"], "_type": "ClassLabel"}}}}


@pytest.mark.parametrize(
    ("metadata", "names"),
    [
        ({"classes": '["x\\u001b[0m", "y", "z"]'}, ("x[0m", "y", "z")),
        ({"huggingface": json.dumps(HUGGINGFACE)}, ("a", "b", "c")),
        ({"classes": "not json"}, ()),
        ({"classes": '"abc"'}, ()),
        ({"classes": "[" * 100_000}, ()),
        ({"huggingface": "[]"}, ()),
        (None, ()),
    ],
)
def test_class_names(
    tmp_path: Path, cells: list[bytes], labels: np.ndarray, metadata: dict[str, str] | None, names: tuple[str, ...]
) -> None:
    path = write(tmp_path / "a.parquet", {"image": cells, "label": labels}, metadata)
    assert read_parquet(path).class_names == names


BAD = {
    "no image": (lambda i, y: {"picture": i, "label": y}, "no single column image; its columns: picture, label"),
    "no label": (lambda i, y: {"image": i, "class": y}, "no single column label; its columns: image, class"),
    "image text": (lambda i, y: {"image": ["a"] * 8, "label": y}, "column image .* type string.*as bytes"),
    "image struct": (lambda i, y: {"image": [{"path": "a"}] * 8, "label": y}, "column image .* type struct"),
    "image null": (lambda i, y: {"image": [None, *i[1:]], "label": y}, r"row 0 of .* has no image bytes"),
    "struct null": (
        lambda i, y: {"image": [None, *({"bytes": cell} for cell in i[1:])], "label": y},
        r"row 0 of .* has no image bytes",
    ),
    "bytes null": (
        lambda i, y: {
            "image": [{"bytes": None, "path": "a.png"}, *({"bytes": cell, "path": ""} for cell in i[1:])],
            "label": y,
        },
        "no image bytes.*not a path",
    ),
    "truncated": (lambda i, y: {"image": [*i[:7], i[7][:50]], "label": y}, r"row 7 of .*a\.parquet cannot be decoded"),
    "label null": (lambda i, y: {"image": i, "label": [None, None, *y[2:]]}, "2 rows without a label"),
    "label negative": (lambda i, y: {"image": i, "label": y - 1}, "hold -1"),
    "label float": (lambda i, y: {"image": i, "label": y / 1}, "of type double, not integers"),
    "label text": (lambda i, y: {"image": i, "label": ["a"] * 8}, "of type string, not integers"),
    "label huge": (lambda i, y: {"image": i, "label": y + 2**62}, "hold 46116"),
    "no rows": (lambda i, y: {"image": pa.array([], pa.binary()), "label": pa.array([], pa.int32())}, "0 images"),
}


@pytest.mark.parametrize("case", BAD)
@pytest.mark.parametrize("read", [read_parquet, load_clean])
def test_bad_tables(
    tmp_path: Path, cells: list[bytes], labels: np.ndarray, case: str, read: Callable[[Path], object]
) -> None:
    columns, message = BAD[case]
    with pytest.raises(DataError, match=message):
        read(write(tmp_path / "a.parquet", columns(cells, labels)))


def test_a_repeated_column_name_is_an_error(tmp_path: Path, cells: list[bytes], labels: np.ndarray) -> None:
    table = pa.table([pa.array(cells), pa.array(labels), pa.array(labels)], names=["image", "label", "label"])
    pq.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(DataError, match="no single column label"):
        load_clean(tmp_path / "a.parquet")


def test_images_of_different_sizes(tmp_path: Path, encode: Encode, pixels: np.ndarray) -> None:
    columns = {"image": [encode(pixels[0]), encode(pixels[1, :5])], "label": [0, 1]}
    path = write(tmp_path / "a.parquet", columns)
    with pytest.raises(DataError, match=r"row 1 of .* has shape \(3, 5, 4\), row 0 of .* has \(3, 6, 4\)"):
        read_parquet(path)


def test_too_many_rows_are_an_error_before_reading(
    tmp_path: Path, cells: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "a.parquet", {"image": cells[:1] * 5000, "label": np.zeros(5000, np.int32)})
    monkeypatch.setattr(parquet, "MAX_IMAGES", 4999)
    monkeypatch.setattr(ParquetSource, "_read_labels", lambda self: pytest.fail("labels were read"))
    with pytest.raises(DataError, match="claims 5000 rows"):
        load_clean(path)


@pytest.mark.parametrize("keep", [5, 0.3, 0.9, 0.999])
def test_truncated_file(tmp_path: Path, cells: list[bytes], labels: np.ndarray, keep: float) -> None:
    path = write(tmp_path / "a.parquet", {"image": cells, "label": labels})
    content = path.read_bytes()
    path.write_bytes(content[: keep if isinstance(keep, int) else int(keep * len(content))])
    with pytest.raises(DataError, match=r"a\.parquet cannot be read as parquet.*write it again"):
        load_clean(path)


def test_damage_anywhere_is_an_error_or_harmless(tmp_path: Path, cells: list[bytes], labels: np.ndarray) -> None:
    path = write(tmp_path / "a.parquet", {"image": cells, "label": labels}, compression="zstd", write_statistics=False)
    content, random = path.read_bytes(), np.random.default_rng(0)
    failures = 0
    for _ in range(150):
        damaged = bytearray(content)
        damaged[random.integers(4, len(content) - 4)] = random.integers(256)
        path.write_bytes(damaged)
        try:
            read_parquet(path)
        except DataError:
            failures += 1
    assert failures > 20


@pytest.mark.parametrize(
    ("package", "tool", "command"),
    [("pyarrow", "pyarrow", "pip install pyarrow pillow"), ("PIL", "Pillow", "pip install pillow")],
)
def test_missing_packages(
    tmp_path: Path,
    cells: list[bytes],
    labels: np.ndarray,
    monkeypatch: pytest.MonkeyPatch,
    package: str,
    tool: str,
    command: str,
) -> None:
    path = write(tmp_path / "a.parquet", {"image": cells, "label": labels})
    real = builtins.__import__

    def without(name: str, *rest: Any, **named: Any) -> Any:
        if name.split(".")[0] == package:
            raise ImportError(name=name)
        return real(name, *rest, **named)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(DataError, match=rf"needs {tool}.*{command}"):
        load_clean(path)
