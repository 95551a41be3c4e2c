"""Interprets a checkpoint's pickle without running any of it.

``walk`` steps through the opcodes (``pickletools.genops``) with a stack of plain descriptions: a global stays a name,
a tensor stays (storage, offset, size, stride). It accepts exactly the opcodes and globals that a state dict with the
usual extras needs, a strict subset of those in ``torch.load(weights_only=True)``. It refuses all others, with a reason,
before torch allocates memory.
"""

from __future__ import annotations

import itertools
import pickletools
import warnings
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO, NoReturn

from bdprune.errors import ArtifactError
from bdprune.files import pickle_claims as claims
from bdprune.files.quoting import quoted

MAX_PICKLE_BYTES = 16 << 20
MAX_OPCODES = 1_000_000
MAX_COPIED = 2 << 20
"""Total entries and bytes that calls may copy: five bytes of pickle can copy a long list from the memo."""

_RESAVE = "Save it again with torch.save(model.state_dict(), path)."
_TRUST = "Nothing was run. If you trust where it comes from, save only its tensors there: torch.save(state_dict, path)."
_QUANTISED = "Give the float32 checkpoint from before quantisation."

# fmt: off
_DTYPES = frozenset("torch." + name for name in (
    "float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool", "complex64",
    "complex128", "float", "double", "half", "long", "int", "short",
))
# fmt: on


_DAMAGED = (ValueError, IndexError, KeyError, TypeError, OverflowError, MemoryError)
"""Errors of the opcode reader for bytes that are not a pickle, and of the machine for invalid opcodes."""


def _opcodes(stream: BinaryIO) -> Iterator[tuple[str, Any, int | None]]:
    """Name, argument and position of each opcode."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # genops warns about backslashes in names
        for opcode, argument, position in pickletools.genops(stream):
            yield opcode.name, argument, position


def walk(stream: BinaryIO, what: str) -> claims.Walked:
    """Reads one pickle from ``stream``, and leaves the stream at the pickle's end.

    Args:
        stream: bytes of the file, positioned at the first opcode.
        what: name of this pickle in messages.

    Raises:
        ArtifactError: it has a global or opcode that a state dict does not need, or a tensor that does not fit its
            storage, or it is not a pickle.
    """
    start = stream.tell()
    machine = _Machine(what)
    try:
        for count, (opcode, argument, position) in enumerate(_opcodes(stream)):
            if count > MAX_OPCODES or (position or start) - start > MAX_PICKLE_BYTES:
                raise ArtifactError(f"the {what} is far larger than any state dict needs.", _RESAVE)
            machine.step(opcode, argument)
    except _DAMAGED as error:
        raise ArtifactError(f"the {what} is damaged: {quoted(error)}.", "Download the file again.") from None
    return machine.finish()


def first_global(stream: BinaryIO) -> str | None:
    """Name of the first global in a pickle of any protocol, as far as it can be read; None if it has none."""
    strings: list[str] = []
    try:
        for opcode, argument, _ in itertools.islice(_opcodes(stream), MAX_OPCODES):
            if opcode in ("GLOBAL", "INST"):
                return _dotted(str(argument))
            if opcode == "STACK_GLOBAL":
                return _dotted(" ".join(strings[-2:]))
            if isinstance(argument, str):
                strings = [*strings[-1:], argument]
    except _DAMAGED:
        pass
    return None


def plain_globals(stream: BinaryIO) -> tuple[list[str], set[str]]:
    """Names of all globals in a pickle, and its strings; both empty if the names cannot be read without running it.

    It accepts only the opcode of protocol 2 with a literal name, not names that are built on the stack.
    """
    names: list[str] = []
    strings: set[str] = set()
    try:
        for opcode, argument, _ in itertools.islice(_opcodes(stream), MAX_OPCODES):
            if opcode == "GLOBAL":
                names.append(_dotted(str(argument)))
            elif opcode in ("STACK_GLOBAL", "INST", "OBJ", "EXT1", "EXT2", "EXT4", "PERSID"):
                return [], set()
            elif isinstance(argument, str):
                strings.add(argument)
    except _DAMAGED:
        return [], set()
    return names, strings


def refuse_global(name: str, what: str) -> NoReturn:
    """Raises the ArtifactError for a pickle with the global ``name``."""
    if "qtensor" in name or name.startswith("torch.Q"):
        raise ArtifactError(f"the {what} holds quantised tensors ({quoted(name)}).", _QUANTISED)
    raise ArtifactError(f"the {what} asks to run {quoted(name)}, which no state dict needs.", _TRUST)


class _Machine:
    """The pickle machine on descriptions instead of objects."""

    def __init__(self, what: str) -> None:
        self.what = what
        self.stack: list[Any] = []
        self.marks: list[list[Any]] = []
        self.memo: dict[int, Any] = {}
        self.copied = 0
        self.result = claims.Walked(None)

    def step(self, opcode: str, argument: Any) -> None:
        if opcode in _PUSH_ARGUMENT:
            self.stack.append(argument)
        elif opcode in _PUSH_FRESH:
            self.stack.append(_PUSH_FRESH[opcode]())
        elif opcode in _STEPS:
            _STEPS[opcode](self, argument)
        elif opcode == "STACK_GLOBAL":
            refuse_global(_dotted(f"{self.stack[-2]} {self.stack[-1]}"), self.what)
        elif opcode == "INST":
            refuse_global(_dotted(argument), self.what)
        else:
            raise ArtifactError(f"the {self.what} uses the pickle opcode {opcode}, which no state dict needs.", _RESAVE)

    def finish(self) -> claims.Walked:
        self.result.value = self.stack[0]
        return self.result

    def stop(self, _: object) -> None:
        if len(self.stack) != 1 or self.marks:
            raise ValueError("the stack is not empty at its end")

    def mark(self, _: object) -> None:
        self.marks.append(self.stack)
        self.stack = []

    def pop_mark(self) -> list[Any]:
        items, self.stack = self.stack, self.marks.pop()
        return items

    def put(self, index: int) -> None:
        self.memo[index] = self.stack[-1]

    def get(self, index: int) -> None:
        self.stack.append(self.memo[index])

    def tuple_(self, _: object) -> None:
        items = self.pop_mark()
        self.stack.append(tuple(items))

    def tuple_of(self, count: int) -> None:
        if len(self.stack) < count:
            raise IndexError("too few values for a tuple")
        self.stack[-count:] = [tuple(self.stack[-count:])]

    def append(self, _: object) -> None:
        item = self.stack.pop()
        self._list().append(item)

    def appends(self, _: object) -> None:
        items = self.pop_mark()
        self._list().extend(items)

    def set_item(self, _: object) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self._set(key, value)

    def set_items(self, _: object) -> None:
        items = self.pop_mark()
        if len(items) % 2:
            raise ValueError("a key without a value")
        for key, value in zip(items[::2], items[1::2], strict=True):
            self._set(key, value)

    def global_(self, argument: str) -> None:
        name = _dotted(argument)
        if name not in _CALLS and name not in _DTYPES and name not in _STORAGES:
            refuse_global(name, self.what)
        self.stack.append(claims.GlobalName(name))

    def reduce(self, _: object) -> None:
        arguments, function = self.stack.pop(), self.stack.pop()
        if type(function) is not claims.GlobalName or function.name not in _CALLS or type(arguments) is not tuple:
            raise ValueError("a call of something that is not a function")
        self.stack.append(_CALLS[function.name](self, *arguments))

    def build(self, _: object) -> None:
        state = self.stack.pop()
        # Any other attribute could shadow a method (items, values) of the dict, which is used later.
        if type(self.stack[-1]) is not claims.OrderedClaim or type(state) is not dict or set(state) - {"_metadata"}:
            raise ArtifactError(f"the {self.what} sets attributes that no state dict has.", _TRUST)

    def persistent(self, _: object) -> None:
        claim = self.stack.pop()
        if type(claim) is not tuple or len(claim) not in (5, 6) or claim[0] != "storage":
            raise ValueError("a reference to something that is not a storage")
        kind, key, location, count = claim[1:5]
        if len(claim) == 6 and claim[5] is not None:
            raise ArtifactError(f"the {self.what} holds views of storages in a form older than 2017.", _RESAVE)
        if type(kind) is not claims.GlobalName or kind.name not in _STORAGES or not isinstance(location, str):
            raise ValueError("a storage of an unknown type")
        if type(key) is not str or not claims.is_count(count):
            raise ValueError("a storage without a key or length")
        storage = claims.StorageClaim(key, kind.name, _STORAGES[kind.name], count)
        if self.result.storages.setdefault(key, storage) != storage:
            raise ValueError(f"storage {key} is claimed with two lengths or types")
        self.stack.append(storage)

    def _list(self) -> list[Any]:
        if type(self.stack[-1]) is not list:
            raise ValueError("an append to something that is not a list")
        return self.stack[-1]

    def _set(self, key: Any, value: Any) -> None:
        target = self.stack[-1]
        if type(target) not in (dict, claims.OrderedClaim):
            raise ValueError("an item set on something that is not a dict")
        target[_checked_key(key)] = value

    def copy(self, length: int) -> None:
        """Counts the entries that a call copies."""
        self.copied += length
        if self.copied > MAX_COPIED:
            raise ArtifactError(f"the {self.what} unpacks to far more than any state dict needs.", _RESAVE)

    def ordered_dict(self, pairs: object = ()) -> claims.OrderedClaim:
        return claims.OrderedClaim((_checked_key(key), value) for key, value in self._sequence(pairs))

    def counter(self, counts: object = None) -> dict[Any, Any]:
        if counts is not None and type(counts) is not dict:
            raise ValueError("a Counter of something that is not a dict")
        self.copy(len(counts or ()))
        return dict(counts or {})

    def set_(self, items: object = ()) -> frozenset[Any]:
        return frozenset(_checked_key(item) for item in self._sequence(items))

    def tensor(self, storage: Any, offset: Any, size: Any, stride: Any, *rest: Any) -> claims.TensorClaim:
        if len(rest) >= 2 and rest[1] is not None and (type(rest[1]) is not claims.OrderedClaim or rest[1]):
            raise ArtifactError(f"the {self.what} attaches hooks to a tensor.", _TRUST)
        if len(rest) > 2 and rest[2]:
            raise ArtifactError(f"the {self.what} attaches metadata to a tensor.", _RESAVE)
        if type(storage) is not claims.StorageClaim:
            raise ValueError("a tensor without a storage")
        claim = claims.TensorClaim(storage, offset, size, stride)
        claims.check_view(claim, self.what)
        self.result.tensors.append(claim)
        return claim

    def parameter(self, data: Any, requires_grad: Any, hooks: Any) -> claims.TensorClaim:
        if type(data) is not claims.TensorClaim or type(requires_grad) is not bool:
            raise ValueError("a parameter without a tensor")
        if type(hooks) is not claims.OrderedClaim or hooks:
            raise ArtifactError(f"the {self.what} attaches hooks to a parameter.", _TRUST)
        return data

    def size(self, sizes: object = ()) -> tuple[int, ...]:
        if type(sizes) is not tuple or not all(claims.is_count(size) for size in sizes):
            raise ValueError("a torch.Size of values that are not whole numbers")
        return sizes

    def device(self, kind: object, index: object = 0) -> str:
        if not isinstance(kind, str) or type(index) is not int:
            raise ValueError("a torch.device of an unknown kind")
        return kind

    def encode(self, text: object, encoding: object = "latin1") -> bytes:
        if not isinstance(text, str) or encoding not in ("latin1", "ascii", "utf-8"):
            raise ValueError("an unknown encoding")
        self.copy(len(text))
        return text.encode(encoding)

    def _sequence(self, items: object) -> tuple[Any, ...] | list[Any]:
        if type(items) is not tuple and type(items) is not list:
            raise ValueError("a list was expected")
        self.copy(len(items))
        return items


_PUSH_ARGUMENT = frozenset({"BININT", "BININT1", "BININT2", "BINFLOAT", "BINUNICODE", "SHORT_BINSTRING", "LONG1"})
_PUSH_FRESH: dict[str, Callable[[], Any]] = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_TUPLE": tuple,
    "EMPTY_LIST": list,
    "EMPTY_DICT": dict,
    "EMPTY_SET": frozenset,
}
_STEPS: dict[str, Callable[[_Machine, Any], None]] = {
    "PROTO": lambda machine, version: None,
    "STOP": _Machine.stop,
    "MARK": _Machine.mark,
    "BINPUT": _Machine.put,
    "LONG_BINPUT": _Machine.put,
    "BINGET": _Machine.get,
    "LONG_BINGET": _Machine.get,
    "TUPLE": _Machine.tuple_,
    "TUPLE1": lambda machine, _: machine.tuple_of(1),
    "TUPLE2": lambda machine, _: machine.tuple_of(2),
    "TUPLE3": lambda machine, _: machine.tuple_of(3),
    "APPEND": _Machine.append,
    "APPENDS": _Machine.appends,
    "SETITEM": _Machine.set_item,
    "SETITEMS": _Machine.set_items,
    "GLOBAL": _Machine.global_,
    "REDUCE": _Machine.reduce,
    "BUILD": _Machine.build,
    "BINPERSID": _Machine.persistent,
}
_CALLS: dict[str, Callable[..., Any]] = {
    "collections.OrderedDict": _Machine.ordered_dict,
    "collections.Counter": _Machine.counter,
    "builtins.set": _Machine.set_,
    "__builtin__.set": _Machine.set_,
    "torch._utils._rebuild_tensor": _Machine.tensor,
    "torch._utils._rebuild_tensor_v2": _Machine.tensor,
    "torch._utils._rebuild_parameter": _Machine.parameter,
    "torch.Size": _Machine.size,
    "torch.device": _Machine.device,
    "_codecs.encode": _Machine.encode,
}
_STORAGES = {f"torch.{name}": size for name, size in claims.ITEM_BYTES.items()} | {"torch.storage.UntypedStorage": 1}


def _dotted(module_and_name: str) -> str:
    """``posix system`` -> ``os.system``, the usual name."""
    module, _, name = module_and_name.partition(" ")
    return f"{'os' if module in ('posix', 'nt') else module}.{name}"


def _checked_key(key: object) -> object:
    """Keys are plain: hashing a deeply nested tuple would exhaust the C stack."""
    if key is not None and type(key) not in (str, int, float, bool, bytes):
        raise ValueError(f"a key of type {type(key).__name__}")
    return key
