"""The index of a zip-format checkpoint: what is no instruction of torch.save's ends it, each with its own test."""

from __future__ import annotations

import pickletools
import struct

import pytest

from compress.checkpoints import pickles
from compress.checkpoints.containers import Refused
from compress.checkpoints.pickles import ForeignGlobal, StoredTensor, interpret


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def pickled(code: bytes) -> bytes:
    return b"\x80\x02" + code + b"."


def storage(key: str = "0", items: int = 6, kind: str = "Float", location: bytes | None = None) -> bytes:
    place = text("cpu") if location is None else location
    return (
        b"(" + text("storage") + f"ctorch\n{kind}Storage\n".encode() + text(key) + place + b"K" + bytes([items]) + b"tQ"
    )


def numbers(*values: int) -> bytes:
    return b"(" + b"".join(b"J" + struct.pack("<i", value) for value in values) + b"t"


HOOKS = b"ccollections\nOrderedDict\n)R"


def tensor(
    offset: int = 0, shape: tuple[int, ...] = (2, 3), strides: tuple[int, ...] = (3, 1), *,
    of: bytes | None = None, grad: bytes = b"\x89", hooks: bytes = HOOKS,
) -> bytes:  # fmt: skip
    inside = (storage() if of is None else of) + b"J" + struct.pack("<i", offset) + numbers(*shape) + numbers(*strides)
    return b"ctorch._utils\n_rebuild_tensor_v2\n(" + inside + grad + hooks + b"tR"


def named(code: bytes) -> bytes:
    return pickled(b"}" + text("w") + code + b"s")


def test_an_honest_tensor_is_described():
    found = interpret(named(tensor())).value["w"]
    assert isinstance(found, StoredTensor) and found.shape == (2, 3) and found.storage.items == 6


@pytest.mark.parametrize(
    "shape, offset, strides",
    [
        ((2, 3), 1, (3, 1)),
        ((2, 3), 0, (4, 1)),
        ((7,), 0, (1,)),
        ((1,), 6, (1,)),
        ((2,), 0, (6,)),
        ((2, 3), 0, (3, 2**31 - 1)),
    ],
)
def test_a_tensor_that_reaches_outside_its_storage_is_damage(shape, offset, strides):
    with pytest.raises(Refused, match="damaged"):
        interpret(named(tensor(offset, shape, strides)))


@pytest.mark.parametrize(
    "code",
    [
        tensor(-1),
        tensor(0, (-2, -3)),
        tensor(0, (1, 1), (-1, 1)),
        tensor(0, (2, 3), (1,)),
        tensor(hooks=b"N"),
        tensor(hooks=b"}"),
        tensor(hooks=HOOKS + b"(" + text("x") + b"Nu"),
        tensor(grad=b"K\x00"),
        tensor(of=b"N"),
        b"ctorch._utils\n_rebuild_parameter\n(N\x89" + HOOKS + b"tR",
        b"ctorch._utils\n_rebuild_parameter\n(" + tensor() + b"\x89NtR",
        b"ctorch\nSize\n(K\x01N\x86tR",
        b"ccollections\nOrderedDict\n(K\x01tR",
        b"K\x01)R",
        b"ctorch\nFloatStorage\n)R",
    ],
)
def test_calls_take_only_what_torch_save_gives_them(code):
    with pytest.raises(Refused, match="damaged"):
        interpret(named(code))


@pytest.mark.parametrize(
    "code",
    [
        storage(key="a"),
        storage(key="../x"),
        storage(key="1" * 11),
        storage(location=b"N"),
        storage().replace(text("storage"), text("strange")),
        storage().replace(b"ctorch\nFloatStorage\n", b"ctorch\nSize\n"),
        storage().replace(b"ctorch\nFloatStorage\n", text("torch FloatStorage")),
        storage().replace(b"K\x06tQ", b"\x88tQ"),
        storage() + storage(items=7) + b"\x86",
        storage() + storage(kind="Double") + b"\x86",
        b"NQ",
    ],
)
def test_a_storage_is_what_torch_save_writes_and_one_thing_only(code):
    with pytest.raises(Refused, match="damaged"):
        interpret(named(code))


@pytest.mark.parametrize(
    "code",
    [
        HOOKS + b"}" + text("x") + b"Nsb",
        HOOKS + b"}" + text("__setstate__") + b"Nsb",
        b"}}" + text("_metadata") + b"}sb",
        b"]}b",
        tensor() + b"}b",
        HOOKS + b"Nb",
    ],
)
def test_a_state_dict_gets_metadata_and_nothing_else(code):
    assert interpret(named(HOOKS + b"}" + text("_metadata") + b"}sb")).value["w"] == {}
    with pytest.raises(Refused, match="damaged"):
        interpret(named(code))


@pytest.mark.parametrize("code", [b")Na", b"}Na", b"N)a", b"}(Ne", b"](NNu", b"]NNs", b")(NNu", b"}(Nu"])
def test_objects_are_changed_only_where_torch_changes_them(code):
    """torch's loader once corrupted memory by these on other kinds of object (CVE-2026-24747)."""
    with pytest.raises(Refused, match="damaged"):
        interpret(pickled(code))


OTHERS = sorted({opcode.name for opcode in pickletools.opcodes} - pickles.ALLOWED_OPCODES - {"GLOBAL", "INST"})
WRITTEN = {
    "INT": b"I1\n", "LONG": b"L1L\n", "FLOAT": b"F1\n", "STRING": b"S'a'\n", "UNICODE": b"Va\n", "PERSID": b"Pa\n",
    "GET": b"N\x30g0\n", "PUT": b"Np0\n", "LONG4": b"\x8b\x01\0\0\0\x01", "BINSTRING": b"T\x01\0\0\0a",
    "SHORT_BINSTRING": b"U\x01a", "BINBYTES": b"B\x01\0\0\0a", "SHORT_BINBYTES": b"C\x01a",
    "BINBYTES8": b"\x8e\x01" + bytes(7) + b"a", "BYTEARRAY8": b"\x96\x01" + bytes(7) + b"a",
    "SHORT_BINUNICODE": b"\x8c\x01a", "BINUNICODE8": b"\x8d\x01" + bytes(7) + b"a", "FRAME": b"\x95" + bytes(8),
    "EXT1": b"\x82\x01", "EXT2": b"\x83\x01\x00", "EXT4": b"\x84\x01\0\0\0",
}  # fmt: skip
CODES = {opcode.name: opcode.code.encode("latin1") for opcode in pickletools.opcodes}


@pytest.mark.parametrize("name", OTHERS)
def test_every_other_instruction_is_refused_by_name(name):
    used = "POP" if name == "GET" else name
    with pytest.raises(Refused, match=f"uses the pickle instruction {used}, which saved weights never need"):
        interpret(pickled(WRITTEN.get(name, CODES[name])))


@pytest.mark.parametrize(
    "code", [b"cposix\nsystem\n", b"ctorch\nTensor\n", b"ccollections\ndeque\n", b"(iposix\nsystem\n"]
)
def test_every_other_name_is_refused_before_it_is_used(code):
    with pytest.raises(ForeignGlobal) as found:
        interpret(pickled(code))
    assert found.value.others == (f"{found.value.module}.{found.value.name}",)


@pytest.mark.parametrize(
    "data", [pickled(b"N") + b"x", pickled(b"NN"), pickled(b"(N"), pickled(b""), b"", b"\x80\x02N"]
)
def test_an_index_is_one_value_and_nothing_behind_it(data):
    with pytest.raises(Refused, match="damaged|followed by other bytes"):
        interpret(data)


def test_an_index_has_its_limits(monkeypatch):
    monkeypatch.setattr(pickles, "MAX_PICKLE_BYTES", 3)
    with pytest.raises(Refused, match="larger than 1 MiB"):
        interpret(pickled(b"N"))
    monkeypatch.setattr(pickles, "MAX_PICKLE_BYTES", 100)
    monkeypatch.setattr(pickles, "MAX_OPCODES", 2)
    with pytest.raises(Refused, match="too many instructions"):
        interpret(pickled(b"N"))
