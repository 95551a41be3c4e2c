"""The pickle machine on crafted opcodes: accepted pickles, refused pickles, and limits of memory and depth."""

from __future__ import annotations

import io
import pickle
import time
import tracemalloc
from collections import OrderedDict

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bdprune.errors import ArtifactError
from bdprune.files.pickle_claims import StorageClaim
from bdprune.files.pickle_walk import MAX_OPCODES, first_global, walk
from bdprune.files.quoting import quoted

STORAGE = b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x00aX\x03\x00\x00\x00cpuK\x06tQ"
EMPTY_ORDERED = b"ccollections\nOrderedDict\n)R"


def read(body: bytes) -> object:
    return walk(io.BytesIO(b"\x80\x02" + body + b"."), "pickle").value


plain = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**31), 2**200) | st.floats(allow_nan=False) | st.text(max_size=20),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.tuples(inner, inner)
        | st.dictionaries(st.text(max_size=5) | st.integers(0, 99), inner, max_size=4)
    ),
    max_leaves=20,
)


@given(plain)
def test_plain_values_are_read_as_by_pickle(value: object) -> None:
    stream = io.BytesIO(pickle.dumps(value, 2) + b"rest")
    assert walk(stream, "pickle").value == value
    assert stream.read() == b"rest"


@given(st.binary(max_size=60))
def test_any_bytes_are_read_or_raise_an_error(body: bytes) -> None:
    try:
        read(body)
    except ArtifactError as error:
        str(error).encode()


def test_tensors_are_described_without_being_created() -> None:
    body = b"ctorch._utils\n_rebuild_tensor\n(" + STORAGE + b"K\x01K\x02K\x02\x86K\x02K\x01\x86tR"
    walked = walk(io.BytesIO(b"\x80\x02" + body + b"."), "pickle")
    storage = StorageClaim("a", "torch.FloatStorage", 4, 6)
    assert walked.storages == {"a": storage}
    (tensor,) = walked.tensors
    assert (tensor.storage, tensor.offset, tensor.size, tensor.stride, tensor.count) == (storage, 1, (2, 2), (2, 1), 4)


def test_ordered_dict_from_pairs_as_python_2_wrote_it() -> None:
    assert read(b"ccollections\nOrderedDict\n(](](X\x01\x00\x00\x00aK\x01eetR") == OrderedDict(a=1)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"cos\nsystem\n", "asks to run 'os.system'"),
        (b"cposix\nsystem\n", "asks to run 'os.system'"),
        (b"cbuiltins\neval\n", "asks to run 'builtins.eval'"),
        (b"cargparse\nNamespace\n)\x81", "asks to run 'argparse.Namespace'"),
        (b"ctorch._utils\n_rebuild_qtensor\n", "quantised"),
        (EMPTY_ORDERED + b"}X\x05\x00\x00\x00itemsK\x01sb", "sets attributes"),
        (b"}}b", "sets attributes"),
        (b"K\x01K\x02", "not empty at its end"),
        (b"", "damaged"),
        (b"(K\x01", "damaged"),
        (b"t", "damaged"),
        (b"\x86", "damaged"),
        (b"h\x05", "damaged"),
        (b"}(K\x01u", "key without a value"),
        (b"}]K\x01s", "a key of type list"),
        (b"})K\x01s", "a key of type tuple"),
        (b"K\x01K\x02a", "not a list"),
        (b"]K\x01K\x02s", "not a dict"),
        (b"K\x01K\x02R", "not a function"),
        (b"ccollections\nOrderedDict\nK\x01R", "not a function"),
        (b"ctorch\nfloat32\n)R", "not a function"),
        (b"ccollections\nOrderedDict\n(K\x01tR", "list was expected"),
        (b"ccollections\nCounter\n(K\x01tR", "Counter"),
        (b"ctorch\nSize\n(X\x01\x00\x00\x00atR", "torch.Size"),
        (b"ctorch\ndevice\n(K\x01tR", "torch.device"),
        (b"c_codecs\nencode\n(X\x01\x00\x00\x00aX\x03\x00\x00\x00hextR", "encoding"),
        (b"X\x01\x00\x00\x00aQ", "not a storage"),
        (b"(X\x06\x00\x00\x00moduleNNNNtQ", "not a storage"),
        (STORAGE.replace(b"K\x06", b"X\x01\x00\x00\x006"), "without a key or length"),
        (STORAGE.replace(b"FloatStorage", b"Size"), "of an unknown type"),
        (STORAGE + STORAGE.replace(b"K\x06", b"K\x07") + b"\x86", "claimed with two lengths"),
        (STORAGE.replace(b"tQ", b"(NNNttQ"), "views of storages"),
        (b"ctorch._utils\n_rebuild_tensor\n(K\x01K\x00))tR", "without a storage"),
        (b"ctorch._utils\n_rebuild_tensor\n(" + STORAGE + b"K\x00K\x01)tR", "without size and stride"),
        (b"ctorch._utils\n_rebuild_tensor\n(" + STORAGE + b"K\x00NNtR", "without size and stride"),
        (b"ctorch._utils\n_rebuild_tensor\n(" + STORAGE + b"NK\x01\x85K\x01\x85tR", "not a whole number"),
        (b"ctorch._utils\n_rebuild_tensor\n(" + STORAGE + b"K\x06K\x01\x85K\x01\x85tR", "storage of 6 elements"),
        (
            b"ctorch._utils\n_rebuild_tensor_v2\n(" + STORAGE + b"K\x00))\x89" + b"}tR",
            "attaches hooks to a tensor",
        ),
        (
            b"ctorch._utils\n_rebuild_tensor_v2\n(" + STORAGE + b"K\x00))\x89" + EMPTY_ORDERED + b"}K\x01K\x01stR",
            "attaches metadata",
        ),
        (b"ctorch._utils\n_rebuild_parameter\n(K\x01\x88" + EMPTY_ORDERED + b"tR", "parameter without a tensor"),
        (b"\x8c\x01a", "opcode SHORT_BINUNICODE"),
        (b"\x82\x01", "opcode EXT1"),
    ],
)
def test_unsafe_pickles_are_rejected(body: bytes, message: str) -> None:
    with pytest.raises(ArtifactError, match=message):
        read(body)


def test_deep_nesting_neither_recurses_nor_crashes() -> None:
    read(b")" + b"\x85" * 300_000)
    with pytest.raises(ArtifactError, match="a key of type tuple"):
        read(b"}" + b")" + b"\x85" * 100_000 + b"K\x01s")


def test_nested_doubling_is_cheap() -> None:
    """Each step refers twice to the previous one: a naive walk visits 2^5000 leaves."""
    doubling = b"".join(b"q%ch%c\x86" % (index % 256, index % 256) for index in range(5000))
    started = time.perf_counter()
    read(b")" + doubling)
    assert time.perf_counter() - started < 5


def test_too_many_opcodes_are_an_error() -> None:
    with pytest.raises(ArtifactError, match="far larger"):
        read(b"]" + b"q\x00" * (MAX_OPCODES + 1))


@pytest.mark.parametrize(
    ("content", "name"),
    [
        (b"cos\nsystem\n(iposix\npopen\n", "os.system"),
        (b"(iposix\npopen\ncos\nsystem\n", "os.popen"),
        (b"\x8c\x01a\x8c\x01b\x93", "a.b"),
        (b"K\x01.", None),
        (b"\xff\xff", None),
    ],
)
def test_the_first_global_of_another_pickle_is_named_without_running_it(content: bytes, name: str | None) -> None:
    assert first_global(io.BytesIO(content)) == name


def test_repeated_long_names_take_no_memory() -> None:
    long = b"X\x00\x00\x10\x00" + b"a" * (1 << 20)
    tracemalloc.start()
    first_global(io.BytesIO(b"\x80\x04" + long + long + b"\x93" * 1000))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 64 << 20


TWENTY = b"".join(b"K%c" % number for number in range(20))


@pytest.mark.parametrize(
    ("function", "argument"),
    [
        (b"ccollections\nOrderedDict\n", b"](" + b"".join(b"K%cN\x86" % number for number in range(20)) + b"e"),
        (b"ccollections\nCounter\n", b"}(" + b"".join(b"K%cN" % number for number in range(20)) + b"u"),
        (b"cbuiltins\nset\n", b"](" + TWENTY + b"e"),
        (b"c_codecs\nencode\n", b"X\x14\x00\x00\x00" + b"a" * 20),
    ],
)
def test_a_value_that_is_copied_many_times_is_an_error(
    function: bytes, argument: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bdprune.files.pickle_walk.MAX_COPIED", 100)
    first = function + b"q\x00" + argument + b"q\x01\x85R"
    again = b"h\x00h\x01\x85R"
    read(b"(" + first + 4 * again + b"t")
    with pytest.raises(ArtifactError, match="unpacks to far more"):
        read(b"(" + first + 5 * again + b"t")


def test_shown_values_are_short_and_printable() -> None:
    assert quoted("a\x1b[0m\ud800") == r"'a\x1b[0m\ud800'"
    assert len(quoted("x" * 1000)) == 80
