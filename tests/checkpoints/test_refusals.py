"""What is given as a checkpoint and is none: each kind told by name, with a remedy that leads to another file."""

from __future__ import annotations

import collections
import io
import pathlib
import pickle
import zipfile

import numpy as np
import pytest
import torch
from checkpoint_files import small_state
from places import ROOT
from safetensors.torch import save_file
from torture.hostile import NO_LOADER

from compress.checkpoints import inspection, reader, refusals
from compress.errors import CheckpointError


def saved(value: object, **options: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer, **options)
    return buffer.getvalue()


def zipped(*names: str, compression: int = zipfile.ZIP_STORED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as file:
        for name in names:
            file.writestr(name, b"x")
    return buffer.getvalue()


def safetensors(dtype: torch.dtype) -> bytes:
    from safetensors.torch import save

    return save({"w": torch.ones(4).to(dtype)})


def weights(change=lambda tensor: tensor) -> dict[str, torch.Tensor]:
    return small_state() | {"w": change(torch.ones(3, 4))}


class Calls:
    def __init__(self, function: object, *arguments: object) -> None:
        self.call = function, arguments

    def __reduce__(self):
        return self.call


class Own(torch.Tensor):
    pass


GIVEN = {
    "empty": ("a.pth", lambda: b"", "is empty. Download or copy"),
    "old pickle": ("a.pth", lambda: pickle.dumps(1), "is in the old pickle or tar format"),
    "old pickle named safetensors": ("a.safetensors", lambda: pickle.dumps({}), "is in the old pickle or tar format"),
    "RAR": ("a.pth", lambda: b"Rar!\x1a\x07", "is a RAR archive, not weights. Unpack it"),
    "RAR named safetensors": ("a.safetensors", lambda: b"Rar!\x1a\x07" + bytes(600), "is a RAR archive"),
    "gzip": ("a.bin", lambda: b"\x1f\x8b\x08" + bytes(100), "is a gzip archive"),
    "web page": ("a.pth", lambda: b"\n<!DOCTYPE html><html>", "is a web page"),
    "web page named safetensors": ("a.safetensors", lambda: b"<html>404</html>", "is a web page"),
    "Git LFS": ("a.pth", lambda: b"version https://git-lfs.github.com/spec/v1\noid", "is a pointer of Git LFS"),
    "image": ("a.pth", lambda: b"\x89PNG\r\n\x1a\n", "is an image, not weights"),
    "HDF5": ("model.h5", lambda: b"\x89HDF\r\n\x1a\n", "is an HDF5 file, as Keras writes it, not weights of PyTorch"),
    "GGUF": ("a.bin", lambda: b"GGUF\x03", "is a GGUF file"),
    "ONNX": ("a.onnx", lambda: b"\x08\x0a\x12", "is an ONNX file, not weights of PyTorch"),
    "engine": ("a.engine", lambda: b"ftrt", "is an engine, which is a program"),
    "safetensors named pth": ("a.pth", lambda: safetensors(torch.float32), "Rename it to end with .safetensors"),
    "text": ("a.pth", lambda: b"hello", "neither a .safetensors file nor"),
    "empty zip": ("a.pth", zipped, "is a zip without any file in it"),
    "zip around weights": ("a.pth", lambda: zipped("run/best.pth", "run/log.txt"), "is a zip that holds a checkpoint"),
    "zip of images": ("a.pth", lambda: zipped("cat/1.png", "dog/1.jpg"), "is a zip of images, not weights"),
    "npz": ("a.pth", lambda: zipped("w.npy", "b.npy"), "holds NumPy arrays"),
    "other zip": ("a.pth", lambda: zipped("a/notes.txt"), "not one that torch.save writes"),
    "protocol 4": ("a.pth", lambda: saved(weights(), pickle_protocol=4), "pickle protocol 4"),
    "protocol 5": ("a.pth", lambda: saved(weights(), pickle_protocol=5), "Leave `pickle_protocol` out"),
    "set": ("a.pth", lambda: saved({"s": {1}}), "not a tensor (__builtin__.set)"),
    "frozenset": ("a.pth", lambda: saved({"s": frozenset([1])}), "not a tensor (__builtin__.frozenset)"),
    "bytes": ("a.pth", lambda: saved({"s": b"x"}), "not a tensor (_codecs.encode)"),
    "bytearray": ("a.pth", lambda: saved({"s": bytearray(b"x")}), "not a tensor (__builtin__.bytearray)"),
    "range": ("a.pth", lambda: saved({"s": range(3)}), "not a tensor (__builtin__.xrange)"),
    "complex number": ("a.pth", lambda: saved({"s": 1j}), "not a tensor (__builtin__.complex)"),
    "defaultdict": ("a.pth", lambda: saved({"s": collections.defaultdict(list)}), "(collections.defaultdict)"),
    "path": ("a.pth", lambda: saved({"s": pathlib.PurePosixPath("a")}), "not a tensor (pathlib.PurePosixPath)"),
    "NumPy number": ("a.pth", lambda: saved({"s": np.float64(1)}), "not a tensor (numpy._core.multiarray.scalar)"),
    "NumPy array": ("a.pth", lambda: saved({"s": np.ones(2)}), "not a tensor (numpy._core.multiarray._reconstruct)"),
    "device": ("a.pth", lambda: saved({"s": torch.device("cpu")}), "not a tensor (torch.device)"),
    "dtype": ("a.pth", lambda: saved({"s": torch.float32}), "not a tensor (torch.float32)"),
    "storage": ("a.pth", lambda: saved({"s": torch.ones(2).untyped_storage()}), "(torch.storage.UntypedStorage)"),
    "hub": ("a.pth", lambda: saved({"s": Calls(torch.hub.load, "a/b", "c")}), "run a program when it is opened (torch.hub.load)"),
    "torch.load": ("a.pth", lambda: saved({"s": Calls(torch.load, "a")}), "asks to run a program"),
    "print": ("a.pth", lambda: saved({"s": Calls(print, "a")}), "(__builtin__.print). Do not use this file"),
    "program behind a number": (
        "a.pth",
        lambda: saved({"a": np.float64(1), "s": Calls(eval, "1")}),
        "asks to run a program when it is opened (__builtin__.eval)",
    ),
    "another package's function": (
        "a.pth",
        lambda: saved({"s": Calls(pytest.importorskip, "a")}),
        "asks to call _pytest.outcomes.importorskip when it is opened",
    ),
    "module": ("a.pth", lambda: saved(torch.nn.Linear(2, 2)), "holds a whole model object (torch.nn.modules.linear.Linear)"),
    "float8": ("a.pth", lambda: saved(weights(lambda t: t.to(torch.float8_e4m3fn))), "(torch.float8_e4m3fn), which no layer"),
    "float8 in safetensors": ("a.safetensors", lambda: safetensors(torch.float8_e5m2), "(F8_E5M2), which no layer"),
    "uint16": ("a.pth", lambda: saved(weights(lambda t: t.to(torch.uint16))), "unsigned integers (torch.uint16)"),
    "uint32 in safetensors": ("a.safetensors", lambda: safetensors(torch.uint32), "unsigned integers (U32)"),
    "complex": ("a.pth", lambda: saved(weights(lambda t: t.to(torch.complex64))), "complex tensors (torch.ComplexFloatStorage)"),
    "complex in safetensors": ("a.safetensors", lambda: safetensors(torch.complex64), "holds complex tensors (C64)"),
    "quantized": (
        "a.pth",
        lambda: saved(weights(lambda t: torch.quantize_per_tensor(t, 1, 0, torch.qint8))),
        "quantized already (torch._utils._rebuild_qtensor). Give the weights from before quantization",
    ),
    "meta": ("a.pth", lambda: saved(weights(lambda t: t.to("meta"))), "tensors without numbers (on the device `meta`)"),
    "sparse": ("a.pth", lambda: saved(weights(lambda t: t.to_sparse())), "turn them into dense ones with `.to_dense()`"),
    "subclass": ("a.pth", lambda: saved(weights(lambda t: t.as_subclass(Own))), "tensors of a class of their own"),
    "expanded": ("a.pth", lambda: saved(weights(lambda t: t[:1, :1].expand(9, 9))), "w has the shape 9 x 9, and 12 numbers"),
    "shared": (
        "a.pth",
        lambda: saved({f"w{i}": base for base in [torch.zeros(3000)] for i in range(9)}),
        "copied one by one they have 108,000 bytes",
    ),
    "no number": ("a.pth", lambda: saved(weights(lambda t: t[:0])), "w of the shape 0 x 4, and each dimension"),
    "nine dimensions": ("a.pth", lambda: saved(weights(lambda t: t[(None,) * 7])), "w has 9 dimensions, which no layer has. Leave"),
    "odd name": ("a.pth", lambda: saved({"a b\x1b": torch.ones(2)}), "underscores (a b<U+001B>). Rename it"),
    "several": (
        "a.pth",
        lambda: saved({"generator": small_state(), "critic": small_state(), "epoch": 3}),
        "under other names (generator, critic) than are looked for",
    ),
    "several, further in": ("a.pth", lambda: saved({"model": {"encoder": small_state()}}), "under other names (encoder)"),
    "list beside": ("a.pth", lambda: saved(weights() | {"classes": ["a"]}), "holds a list (classes) among its tensors"),
    "dictionary beside": ("a.pth", lambda: saved(weights() | {"opt": {}}), "holds a dictionary (opt) among its tensors"),
    "a list": ("a.pth", lambda: saved([torch.ones(2)]), "holds a list instead of named tensors"),
    "a tensor": ("a.pth", lambda: saved(torch.ones(2)), "holds a bare tensor instead of named tensors"),
    "a number": ("a.pth", lambda: saved(3), "holds a number instead of named tensors"),
    "nothing": ("a.pth", lambda: saved({"epoch": 3}), "holds no tensor where weights are expected"),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", GIVEN)
def test_each_kind_is_told_by_name_with_its_own_remedy(name, tmp_path):
    file, make, words = GIVEN[name]
    path = tmp_path / file
    path.write_bytes(make())
    with pytest.raises(CheckpointError) as refused:
        reader.read(path, loader=NO_LOADER)
    text = str(refused.value)
    assert text.startswith(file) and words in text and len(text) < 420 and text.isprintable()


def test_a_folder_is_no_file(tmp_path):
    with pytest.raises(CheckpointError, match="is a folder. Give the file in it"):
        reader.read(tmp_path)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_the_remedy_for_float8_leads_to_a_file_that_is_read(dtype, tmp_path):
    model = torch.nn.Linear(4, 2)
    model.weight = torch.nn.Parameter(model.weight.detach().to(dtype), requires_grad=False)
    torch.save(model.float().state_dict(), tmp_path / "weights.pth")
    assert inspection.inspect(tmp_path / "weights.pth").tensors["weight"].dtype == "float32"


def test_the_remedies_for_shared_and_mixed_tensors_lead_to_files_that_pass(tmp_path):
    base = torch.zeros(3000)
    torch.save({k: v.clone() for k, v in {f"w{i}": base for i in range(9)}.items()}, tmp_path / "weights.pth")
    assert set(inspection.inspect(tmp_path / "weights.pth").tensors) == {f"w{i}" for i in range(9)}
    mixed = small_state() | {"classes": ["a"]}
    torch.save({k: v for k, v in mixed.items() if torch.is_tensor(v)}, tmp_path / "weights.pth")
    assert set(inspection.inspect(tmp_path / "weights.pth").tensors) == set(small_state())


@pytest.mark.parametrize("length", [0x80, 0x4D42, 0x1F, 0x8B1F])
def test_a_safetensors_file_is_not_taken_for_what_its_first_bytes_look_like(length, tmp_path):
    path = tmp_path / "a.safetensors"
    save_file({"w": torch.zeros(1)}, path)
    raw = path.read_bytes()
    short = int.from_bytes(raw[:8], "little")
    if length < short:
        length += 0x100 * (1 + short // 0x100)
    path.write_bytes(length.to_bytes(8, "little") + raw[8 : 8 + short].ljust(length) + raw[8 + short :])
    assert inspection.inspect(path).tensors["w"].shape == (1,)


def test_the_table_is_documented():
    assert refusals.table() in (ROOT / "docs" / "uploads.md").read_text(encoding="utf-8")


def test_only_what_resaving_mends_is_told_to_be_saved_again():
    for kind in (
        "float8",
        "unsigned",
        "complex",
        "quantized",
        "meta",
        "sparse",
        "subclass",
        "shared",
        "shape",
        "mixed",
    ):
        assert refusals.RESAVE not in refusals.KINDS[kind].remedy
