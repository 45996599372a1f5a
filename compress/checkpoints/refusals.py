"""What people give as a checkpoint that is none, what it is, and what to do: one table, told by the gate and by the docs.

A remedy has to lead to another file: to save the same model in the same way again helps nobody whose weights are float8.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

RESAVE = (
    "Where you made it, run `torch.save(model.state_dict(), 'weights.pth')`, "
    "or `safetensors.torch.save_file(model.state_dict(), 'weights.safetensors')`, and give that file."
)
_UNPACK = "Unpack it, and give the .safetensors, .pth or .pt file that is inside."
_AGAIN = "Download or copy it again."


@dataclass(frozen=True)
class Kind:
    given: str
    """For the documentation."""
    text: str
    """What it is, after the name of the file; `{what}` stands for the detail."""
    remedy: str


KINDS: dict[str, Kind] = {
    # ---- by the first bytes or the name ----
    "empty": Kind("an empty file", "is empty", _AGAIN),
    "folder": Kind("a folder", "is a folder", "Give the file in it that holds the weights."),
    "pickle": Kind(
        "a plain pickle, or a file of torch before 1.6",
        "is in the old pickle or tar format, which cannot be checked safely",
        RESAVE,
    ),
    "archive": Kind("an archive (RAR, 7z, tar, gzip, bzip2, xz, Zstandard)", "is {what}, not weights", _UNPACK),
    "page": Kind(
        "a web page or other markup",
        "is a web page, as a download that was redirected leaves it",
        "Open the link, log in if it asks for it, and download the file itself.",
    ),
    "pointer": Kind(
        "a pointer of Git LFS", "is a pointer of Git LFS and not the file", "Run `git lfs pull` where it lies."
    ),
    "image": Kind(
        "an image", "is an image, not weights", "Give images as the data, in a zip or a folder, and weights here."
    ),
    "other format": Kind(
        "a model of another framework or format (HDF5, GGUF, NumPy, ONNX, TFLite)",
        "is {what}, not weights of PyTorch",
        f"Give the checkpoint of the PyTorch model that it was made from. {RESAVE}",
    ),
    "engine": Kind(
        "an engine (.engine, .plan, .trt)",
        "is an engine, which is a program and never loaded from an upload",
        f"Give the weights that it was built from. {RESAVE}",
    ),
    "misnamed safetensors": Kind(
        "a safetensors file under another name",
        "is a safetensors file under another name",
        "Rename it to end with .safetensors.",
    ),
    "unknown": Kind("anything else", "is neither a .safetensors file nor a PyTorch .pth/.pt state dict", RESAVE),
    # ---- zips ----
    "TorchScript": Kind("`torch.jit.save`", "is a TorchScript program, not weights", RESAVE),
    "export": Kind("`torch.export.save` (.pt2)", "is a torch.export (.pt2) program, not weights", RESAVE),
    "zip of weights": Kind(
        "a zip with a checkpoint inside", "is a zip that holds {what}", "Unpack it and give that file alone."
    ),
    "zip of images": Kind(
        "a zip of images", "is a zip of images, not weights", "Give it as the data, and the weights here."
    ),
    "zip of arrays": Kind("`numpy.savez` (.npz)", "holds NumPy arrays, not a state dict of PyTorch", RESAVE),
    "empty zip": Kind("a zip without files", "is a zip without any file in it", _AGAIN),
    "compressed": Kind(
        "a checkpoint that was zipped again, compressed",
        "was compressed after torch.save wrote it",
        f"Zip it without compression (`zip -0`), or save it anew. {RESAVE}",
    ),
    "protocol": Kind(
        "`torch.save(..., pickle_protocol=4)`",
        "was written with pickle protocol {what}, which cannot be checked safely",
        f"Leave `pickle_protocol` out. {RESAVE}",
    ),
    # ---- what a pickle names ----
    "program": Kind(
        "a pickle that calls a command, `eval`, `torch.hub.load`, ...",
        "asks to run a program when it is opened ({what})",
        "Do not use this file, and ask its author for a safetensors file.",
    ),
    "model": Kind("`torch.save(model)`", "holds a whole model object ({what}) instead of its weights", RESAVE),
    "call": Kind(
        "a pickle that calls a function of another package",
        "asks to call {what} when it is opened, and weights call nothing",
        f"Do not use it unless it is your own. {RESAVE}",
    ),
    "object": Kind(
        "numbers of NumPy, sets, bytes, paths, `argparse.Namespace`, ... beside the tensors",
        "holds a Python object that is not a tensor ({what})",
        RESAVE,
    ),
    # ---- tensors that are none of ours ----
    "float8": Kind(
        "tensors in float8 or float4",
        "holds weights in a format of 8 bits or fewer ({what}), which no layer computes with here",
        "Where you made it, run `torch.save(model.float().state_dict(), 'weights.pth')` and give that file; a scale that "
        "is kept beside such weights has to be multiplied in first.",
    ),
    "unsigned": Kind(
        "tensors in uint16, uint32 or uint64",
        "holds tensors of unsigned integers ({what})",
        "Where you made it, turn them into int64 with `.long()` and save the state dict anew.",
    ),
    "complex": Kind(
        "complex tensors",
        "holds complex tensors ({what}), which no layer computes with here",
        "Only models with real weights can be compressed: save real and imaginary parts as tensors of their own "
        "(`torch.view_as_real`) and change the model accordingly.",
    ),
    "quantized": Kind(
        "quantized tensors",
        "holds tensors that are quantized already ({what})",
        "Give the weights from before quantization: quantizing is done here.",
    ),
    "meta": Kind(
        "tensors without numbers (device `meta`)",
        "holds tensors without numbers (on the device `meta`)",
        "Where you made it, load the weights into the model (`model.load_state_dict(weights, assign=True)`) before "
        "saving its state dict.",
    ),
    "sparse": Kind(
        "sparse tensors",
        "holds sparse tensors ({what})",
        "Where you made it, turn them into dense ones with `.to_dense()` and save the state dict anew.",
    ),
    "subclass": Kind(
        "tensors of a class of their own (torchao, DTensor, nested)",
        "holds tensors of a class of their own ({what})",
        "Where you made it, turn them into plain tensors (`.dequantize()`, `.full_tensor()`, or "
        "`.as_subclass(torch.Tensor).clone()`) and save the state dict anew.",
    ),
    "shared": Kind(
        "many tensors on one storage, or expanded ones",
        "holds tensors that share their numbers: {what}",
        "Where you made it, run `torch.save({k: v.clone() for k, v in model.state_dict().items()}, 'weights.pth')` and "
        "give that file.",
    ),
    "shape": Kind(
        "a tensor with no number or over 16,777,216 in one dimension",
        "holds {what}, and each dimension of a weight has 1 to 16,777,216",
        "Leave that tensor out of the state dict, and save it anew.",
    ),
    # ---- where the tensors are ----
    "several": Kind(
        "several state dicts under names of their own",
        "keeps its weights under other names ({what}) than are looked for (state_dict, model, ...)",
        "Where you made it, run `torch.save(checkpoint['NAME'], 'weights.pth')` with the one to compress, and give that "
        "file.",
    ),
    "mixed": Kind(
        "tensors with lists or dictionaries among them",
        "holds {what} among its tensors",
        "Where you made it, save the tensors alone: `torch.save({k: v for k, v in checkpoint.items() if "
        "torch.is_tensor(v)}, 'weights.pth')`.",
    ),
    "no names": Kind("a list or a bare tensor", "holds {what} instead of named tensors", RESAVE),
    "nothing": Kind("a dictionary without tensors", "holds no tensor where weights are expected", RESAVE),
}


def sentence(file: str, kind: str, what: str = "") -> str:
    """About the file of this name; `what` is the detail, where the kind has one."""
    found = KINDS[kind]
    return f"{file} {found.text.replace('{what}', what)}. {found.remedy}"


def table() -> str:
    """For docs/uploads.md."""
    rows = (
        f"| {kind.given} | {kind.text.replace('{what}', '...')} | {kind.remedy.replace(RESAVE, 'Save the state dict.')} |\n"
        for kind in KINDS.values()
    )
    return f"| given | what it is | what to do |\n|---|---|---|\n{''.join(rows)}"


# ---- told by the first bytes ------------------------------------------------------------------------------------------

_ARCHIVES = {
    b"Rar!": "a RAR archive",
    b"7z\xbc\xaf\x27\x1c": "a 7z archive",
    b"\x1f\x8b": "a gzip archive",
    b"BZh": "a bzip2 archive",
    b"\xfd7zXZ\x00": "an xz archive",
    b"\x28\xb5\x2f\xfd": "a Zstandard archive",
}
_IMAGES = (b"\x89PNG\r\n", b"\xff\xd8\xff", b"GIF8", b"BM", b"II*\x00", b"MM\x00*")
_FORMATS = {
    b"\x89HDF\r\n": "an HDF5 file, as Keras writes it",
    b"GGUF": "a GGUF file",
    b"\x93NUMPY": "a NumPy array",
}
_ENGINES = (".engine", ".plan", ".trt")
_BY_NAME = {".onnx": "an ONNX file", ".tflite": "a TFLite file", ".h5": "an HDF5 file", ".keras": "a Keras file"}


def archive(start: bytes) -> str | None:
    """Which archive other than a zip begins with these bytes."""
    if start[257:262] == b"ustar":
        return "a tar archive"
    return next((name for mark, name in _ARCHIVES.items() if start.startswith(mark)), None)


def told_by(start: bytes, suffix: str) -> tuple[str, str]:
    """Kind and detail of a file that is neither a zip nor safetensors, by its first bytes and the end of its name."""
    text = start.lstrip(b"\xef\xbb\xbf \t\r\n")
    plain = suffix in (".pth", ".pt", ".bin", ".ckpt", ".pkl")
    if int.from_bytes(start[:8], "little") < 2**32 and start[8:10] in (b'{"', b"{}", b"{ "):
        return "misnamed safetensors", ""
    if start[257:262] == b"ustar" and plain or start.startswith(b"\x80"):
        return "pickle", ""
    if found := archive(start):
        return "archive", found
    if start.startswith(b"version https://git-lfs"):
        return "pointer", ""
    if text.startswith(b"<"):
        return "page", ""
    if start.startswith(_IMAGES) or start[:4] + start[8:12] == b"RIFFWEBP":
        return "image", ""
    if suffix in _ENGINES:
        return "engine", ""
    other = next((name for mark, name in _FORMATS.items() if start.startswith(mark)), None) or _BY_NAME.get(suffix)
    if other or start[4:8] == b"TFL3":
        return "other format", other or "a TFLite file"
    return "unknown", ""


def in_zip(names: Collection[str]) -> tuple[str, str] | None:
    """Kind and detail of a zip that torch.save did not write, by the names inside (below its one folder, if it has one)."""
    lower = [name.lower() for name in names if not name.endswith("/")]
    if not lower:
        return "empty zip", ""
    if "constants.pkl" in names or any(name.startswith("code/") for name in names):
        return "TorchScript", ""
    if "archive_format" in names or any(name.startswith("models/") and name.endswith(".json") for name in lower):
        return "export", ""
    if any(name.endswith((".pth", ".pt", ".safetensors", ".ckpt")) for name in lower):
        return "zip of weights", "a checkpoint"
    if all(name.endswith(".npy") for name in lower):
        return "zip of arrays", ""
    if any(name.endswith((".png", ".jpg", ".jpeg", ".webp", ".bmp")) for name in lower):
        return "zip of images", ""
    return None


# ---- told by what a pickle names --------------------------------------------------------------------------------------

_MODELS = ("torch.nn.", "torchvision.", "timm.", "torch.ao.nn.", "transformers.", "torch.fx.")
_PROGRAMS = frozenset(
    "posix nt os subprocess builtins __builtin__ sys commands importlib runpy pty socket shutil code ctypes pickle "
    "_pickle cPickle timeit pdb bdb cProfile profile trace webbrowser pydoc asyncio multiprocessing functools operator "
    "threading _thread types io _io _pyio codecs urllib imp distutils tarfile zipfile gzip bz2 lzma wave logging "
    "tempfile contextvars concurrent signal".split()
)
"""Modules whose functions run, load or write something; what is data in them stands in `_DATA`."""
_DATA = frozenset(
    f"{module}.{name}"
    for module in ("builtins", "__builtin__")
    for name in (
        "set frozenset bytearray bytes complex range xrange slice object list dict tuple str unicode int long float bool "
        "Ellipsis NotImplemented type"
    ).split()
) | frozenset(
    "_codecs.encode copyreg._reconstructor copy_reg._reconstructor types.SimpleNamespace types.MappingProxyType "
    "collections.deque collections.defaultdict collections.Counter logging.Logger numpy.dtype numpy.ndarray "
    "datetime.datetime datetime.date datetime.time datetime.timedelta datetime.timezone array._array_reconstructor "
    "re._compile".split()
)
_DATA_FUNCTIONS = ("numpy._core.multiarray.", "numpy.core.multiarray.", "numpy._core.numeric.", "numpy.random._pickle.")
_TENSORS = {
    "torch._utils._rebuild_qtensor": "quantized",
    "torch._utils._rebuild_meta_tensor_no_storage": "meta",
    "torch._utils._rebuild_sparse_tensor": "sparse",
    "torch._utils._rebuild_sparse_csr_tensor": "sparse",
    "torch._utils._rebuild_nested_tensor": "subclass",
    "torch._utils._rebuild_wrapper_subclass": "subclass",
    "torch._tensor._rebuild_from_type_v2": "subclass",
    "torch._utils._rebuild_parameter_with_state": "subclass",
    "torch._utils._rebuild_device_tensor_from_numpy": "subclass",
    "torch._utils._rebuild_device_tensor_from_cpu_tensor": "subclass",
    "torch._utils._rebuild_tensor_v3": "other",
    "torch.ComplexFloatStorage": "complex",
    "torch.ComplexDoubleStorage": "complex",
    "torch.QInt8Storage": "quantized",
    "torch.QUInt8Storage": "quantized",
    "torch.QInt32Storage": "quantized",
    "torch.storage.UntypedStorage": "object",
    "torch.device": "object",
}
_NUMBERS = {"torch.float8": "float8", "torch.float4": "float8", "torch.uint": "unsigned", "torch.complex": "complex"}
_FORMATS_OF_SAFETENSORS = {"F8": "float8", "F4": "float8", "F6": "float8", "U": "unsigned", "C": "complex"}


def named(first: str, others: Collection[str]) -> tuple[str, str]:
    """Kind and detail of a pickle whose first name off the allow-list is `first`, `others` being all that it names."""
    if _is_model(first):
        return "model", first
    program = next((name for name in (first, *others) if _is_program(name)), None)
    if program is not None:
        return "program", program
    if kind := _TENSORS.get(first):
        number = next((name for name in others if name.startswith(tuple(_NUMBERS))), None)
        if kind == "other":
            start = next((start for start in _NUMBERS if number and number.startswith(start)), None)
            return (_NUMBERS[start], str(number)) if start else ("subclass", first)
        return kind, first
    top, last = first.partition(".")[0], first.rpartition(".")[2]
    is_data = first in _DATA or first.startswith(_DATA_FUNCTIONS) or top == "torch"
    return ("object", first) if is_data or last[:1].isupper() else ("call", first)


def number_format(name: str) -> str | None:
    """The kind of a number format of safetensors that is not supported, where something can be done about it."""
    return next((kind for start, kind in _FORMATS_OF_SAFETENSORS.items() if name.startswith(start)), None)


def _is_model(name: str) -> bool:
    return name.startswith((*_MODELS, "__main__."))


def _is_program(name: str) -> bool:
    top, last = name.partition(".")[0], name.rpartition(".")[2]
    if name in _DATA or name.startswith(_DATA_FUNCTIONS) or name in _TENSORS:
        return False
    if top in _PROGRAMS:
        return True
    if top in ("torch", "numpy") and not _is_model(name):
        is_constant = name.count(".") == 1 and last.startswith(
            ("float", "uint", "int", "bfloat", "complex", "bool", "per_")
        )
        return not (is_constant or last[:1].isupper() or last.startswith("_rebuild") or last == "_get_layout")
    return False
