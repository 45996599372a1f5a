"""The index of a zip-format checkpoint, interpreted on plain values: nothing is imported, nothing is called.

`torch.save` writes a pickle that says which tensors there are and where their numbers lie. The few instructions that
this needs act here on dictionaries, lists and numbers of our own, and a tensor is its description. So everything about
a file but its numbers is known, and checked, before torch's own loader sees it. Instructions that change an object are
taken only on the kind of object that torch writes them for: its loader once corrupted memory on others
(CVE-2026-24747).
"""

from __future__ import annotations

import itertools
import pickletools
import re
import struct
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

from compress.checkpoints.containers import Refused

MAX_PICKLE_BYTES = 2**20
MAX_OPCODES = 300_000
MAX_NUMBER_KEY = 2**20
"""Numbers as keys count parameters in the state of an optimizer. Python's hash of a number is no secret: tens of thousands
of larger ones, chosen to meet in one place of the table, took a minute."""
MAX_LENGTH = 64
"""Of a shape. One long tuple, named again by each of 50,000 calls, would be walked as often."""

_REBUILD_TENSOR, _REBUILD_PARAMETER = "torch._utils _rebuild_tensor_v2", "torch._utils _rebuild_parameter"
_STORAGES = {
    "torch FloatStorage": "float32",
    "torch DoubleStorage": "float64",
    "torch HalfStorage": "float16",
    "torch BFloat16Storage": "bfloat16",
    "torch LongStorage": "int64",
    "torch IntStorage": "int32",
    "torch ShortStorage": "int16",
    "torch CharStorage": "int8",
    "torch ByteStorage": "uint8",
    "torch BoolStorage": "bool",
}
ALLOWED_GLOBALS = frozenset(
    {"collections OrderedDict", "torch Size", _REBUILD_TENSOR, _REBUILD_PARAMETER, *_STORAGES},
)
"""Narrower than torch's own list: what a saved `state_dict()` needs, and no other callable."""
ALLOWED_OPCODES = frozenset(
    "PROTO STOP MARK GLOBAL REDUCE BUILD BINPERSID NONE NEWTRUE NEWFALSE BININT BININT1 BININT2 LONG1 BINFLOAT "
    "BINUNICODE EMPTY_DICT EMPTY_LIST EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 APPEND APPENDS SETITEM SETITEMS "
    "BINGET LONG_BINGET BINPUT LONG_BINPUT".split()
)
_STORAGE_KEY = re.compile(r"[0-9]{1,10}")


@dataclass(frozen=True)
class ForeignGlobal(Exception):
    """A pickle names something that is not on the allow-list."""

    module: str
    name: str
    others: tuple[str, ...] = ()
    """All that the pickle names, dotted, as far as it can be read."""


class OtherProtocol(Refused):
    """The pickle protocol of the index, where it is not torch's own."""


@dataclass(frozen=True)
class Storage:
    """The numbers behind one or more tensors: an entry `data/<key>` of the archive."""

    key: str
    dtype: str
    """torch's name without the `torch.`"""
    items: int


@dataclass(frozen=True)
class StoredTensor:
    """A tensor as the index describes it; offset and strides count numbers, not bytes."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    @property
    def dtype(self) -> str:
        return self.storage.dtype


@dataclass(frozen=True)
class Index:
    """What a pickle describes."""

    value: Any
    """Dictionaries, lists, tuples, numbers, strings, None, `StoredTensor` and leftovers; a dictionary may hold itself."""
    storages: tuple[Storage, ...]
    """All that the loader will read, also those that no tensor in `value` uses."""


@dataclass(frozen=True)
class Global:
    """A class or function of `ALLOWED_GLOBALS`, which is never looked up."""

    name: str


def interpret(data: bytes) -> Index:
    """What a pickle describes, by walking through its instructions.

    Raises:
        ForeignGlobal: it names a class or function that is not on the allow-list.
        Refused: too long, damaged, or an instruction that saved tensors never need.
    """
    if len(data) > MAX_PICKLE_BYTES:
        raise Refused("its index of tensors is larger than 1 MiB")
    machine, end = _Machine(), 0
    try:
        for count, (opcode, argument, position) in enumerate(pickletools.genops(data)):
            end = (position or 0) + 1
            if count >= MAX_OPCODES:
                raise Refused("its index of tensors has too many instructions")
            if opcode.name in ("GLOBAL", "INST") and argument not in ALLOWED_GLOBALS:
                module, _, name = str(argument).partition(" ")
                raise ForeignGlobal(module, name, _named(data))
            if opcode.name not in ALLOWED_OPCODES:
                raise Refused(f"its index uses the pickle instruction {opcode.name}, which saved weights never need")
            machine.step(opcode.name, argument)
        result = machine.result()
    except (ValueError, IndexError, KeyError, TypeError, struct.error, OverflowError) as error:
        raise Refused("its index of tensors is damaged") from error
    if end != len(data):
        raise Refused("its index of tensors is followed by other bytes")
    return Index(result, tuple(machine.storages.values()))


def _named(data: bytes) -> tuple[str, ...]:
    """What a pickle looks up by name, until its end or its damage."""
    found = []
    try:
        for opcode, argument, _ in itertools.islice(pickletools.genops(data), MAX_OPCODES):
            if opcode.name in ("GLOBAL", "INST"):
                found.append(str(argument).replace(" ", "."))
    except (ValueError, IndexError, struct.error, OverflowError):
        pass
    return tuple(dict.fromkeys(found))


def _require(condition: bool) -> None:
    """Damage by construction; `interpret` says so in its one sentence."""
    if not condition:
        raise ValueError("not what torch.save writes")


class _Machine:
    """The stack machine of pickle protocol 2, reduced to `ALLOWED_OPCODES`. Raises ValueError, IndexError, KeyError."""

    def __init__(self) -> None:
        self._stack: list[Any] = []
        self._outer: list[list[Any]] = []
        self._memo: dict[int, Any] = {}
        self.storages: dict[str, Storage] = {}

    def step(self, opcode: str, argument: Any) -> None:
        if opcode in _PUSHED:
            self._stack.append(_PUSHED[opcode](argument))
        else:
            _ACTIONS[opcode](self, argument)

    def result(self) -> Any:
        _require(len(self._stack) == 1 and not self._outer)
        return self._stack[0]

    def _stop(self, _: Any) -> None:
        self.result()

    def _proto(self, version: Any) -> None:
        if version not in (2, 3):
            raise OtherProtocol(str(version))

    def _mark(self, _: Any) -> None:
        self._outer.append(self._stack)
        self._stack = []

    def _since_mark(self) -> list[Any]:
        items, self._stack = self._stack, self._outer.pop()
        return items

    def _get(self, index: Any) -> None:
        self._stack.append(self._memo[index])

    def _put(self, index: Any) -> None:
        _require(index < MAX_OPCODES)  # they are numbered in order; see MAX_NUMBER_KEY
        self._memo[index] = self._stack[-1]

    def _tuple(self, _: Any) -> None:
        items = self._since_mark()
        self._stack.append(tuple(items))

    def _tuple_of(self, length: int) -> None:
        _require(len(self._stack) >= length)
        items = tuple(self._stack[-length:])
        del self._stack[-length:]
        self._stack.append(items)

    def _append(self, _: Any) -> None:
        self._extend([self._stack.pop()])

    def _appends(self, _: Any) -> None:
        self._extend(self._since_mark())

    def _extend(self, items: list[Any]) -> None:
        _require(type(self._stack[-1]) is list)
        self._stack[-1].extend(items)

    def _setitem(self, _: Any) -> None:
        value, key = self._stack.pop(), self._stack.pop()
        self._update([key, value])

    def _setitems(self, _: Any) -> None:
        self._update(self._since_mark())

    def _update(self, items: list[Any]) -> None:
        target = self._stack[-1]
        _require(type(target) in (dict, OrderedDict) and len(items) % 2 == 0)
        for key in items[::2]:
            _refuse_key(key)
        target.update(zip(items[::2], items[1::2], strict=True))

    def _build(self, _: Any) -> None:
        """The attributes of an object. A state dict has `_metadata`; another name could hide a method."""
        state = self._stack.pop()
        _require(type(self._stack[-1]) is OrderedDict and type(state) is dict and state.keys() <= {"_metadata"})

    def _persistent(self, _: Any) -> None:
        """("storage", its class, the entry's name, the device it was on, how many numbers)"""
        word, kind, key, location, items = self._stack.pop()
        _require(type(word) is str and word == "storage" and type(kind) is Global and kind.name in _STORAGES)
        _require(type(key) is str and bool(_STORAGE_KEY.fullmatch(key)) and type(location) is str)
        _require(type(items) is int and items >= 0)
        storage = Storage(key, _STORAGES[kind.name], items)
        _require(self.storages.setdefault(key, storage) == storage)
        self._stack.append(storage)

    def _reduce(self, _: Any) -> None:
        arguments, function = self._stack.pop(), self._stack.pop()
        _require(type(function) is Global and type(arguments) is tuple)
        self._stack.append(_CALLS[function.name](*arguments))


def _refuse_key(key: Any) -> None:
    """Before it is hashed: Python hashes text with a secret, small numbers in order, and a tuple of tuples of tuples ... until
    the C stack is exhausted."""
    if type(key) is str or (type(key) is int and 0 <= key < MAX_NUMBER_KEY):
        return
    what = f"a number outside 0 to {MAX_NUMBER_KEY - 1:,}" if type(key) is int else "neither a text nor a whole number"
    raise Refused(f"its index of tensors names an entry by {what}")


def _ordered_dict() -> OrderedDict[Any, Any]:
    return OrderedDict()


def _integers(values: Any) -> tuple[int, ...]:
    _require(type(values) is tuple and len(values) <= MAX_LENGTH)
    _require(all(type(value) is int and value >= 0 for value in values))
    return tuple(values)


def _tensor(storage: Any, offset: Any, shape: Any, strides: Any, requires_grad: Any, hooks: Any) -> StoredTensor:
    """Raises ValueError where it would reach outside its storage."""
    _require(type(storage) is Storage and type(requires_grad) is bool and type(hooks) is OrderedDict and not hooks)
    _integers((offset,))
    _require(len(_integers(shape)) == len(_integers(strides)))
    tensor = StoredTensor(storage, offset, shape, strides)
    if 0 not in shape:
        last = offset + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
        _require(last < storage.items)
    return tensor


def _parameter(tensor: Any, requires_grad: Any, hooks: Any) -> StoredTensor:
    _require(type(tensor) is StoredTensor and type(requires_grad) is bool)
    _require(type(hooks) is OrderedDict and not hooks)
    return cast(StoredTensor, tensor)


_CALLS: dict[str, Callable[..., Any]] = {
    "collections OrderedDict": _ordered_dict,
    "torch Size": _integers,
    _REBUILD_TENSOR: _tensor,
    _REBUILD_PARAMETER: _parameter,
}
_PUSHED: dict[str, Callable[[Any], Any]] = {
    "NONE": lambda _: None,
    "NEWTRUE": lambda _: True,
    "NEWFALSE": lambda _: False,
    "EMPTY_DICT": lambda _: {},
    "EMPTY_LIST": lambda _: [],
    "EMPTY_TUPLE": lambda _: (),
    "GLOBAL": Global,
} | {name: lambda value: value for name in ("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE")}
_ACTIONS: dict[str, Callable[[_Machine, Any], None]] = {
    "PROTO": _Machine._proto,
    "STOP": _Machine._stop,
    "MARK": _Machine._mark,
    "BINGET": _Machine._get,
    "LONG_BINGET": _Machine._get,
    "BINPUT": _Machine._put,
    "LONG_BINPUT": _Machine._put,
    "TUPLE": _Machine._tuple,
    "TUPLE1": lambda machine, _: machine._tuple_of(1),
    "TUPLE2": lambda machine, _: machine._tuple_of(2),
    "TUPLE3": lambda machine, _: machine._tuple_of(3),
    "APPEND": _Machine._append,
    "APPENDS": _Machine._appends,
    "SETITEM": _Machine._setitem,
    "SETITEMS": _Machine._setitems,
    "BUILD": _Machine._build,
    "BINPERSID": _Machine._persistent,
    "REDUCE": _Machine._reduce,
}
