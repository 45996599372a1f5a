"""The form: the few fields that everybody sets, and all the others, made from `Request` itself.

A field added to `Request` appears in the form without a change here; its description is its help text.
"""

from __future__ import annotations

import json
import types
from abc import ABCMeta
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, Union, get_args, get_origin

import gradio as gr
from gradio.components import Component

from compress.errors import CompressError
from compress.hub import SCHEME as HUB_SCHEME
from compress.methods.quantizers import QUANTIZERS
from compress.request import CHECKPOINT_SOURCES, DATA_SOURCES, Request
from compress.request.rules import FULL_PRECISION, HALF_PRECISION, QUANTIZED_BITS
from compress.ui.texts import text

INTEGERS, HALF, FULL = "integers", "half", "full"
UPLOAD, HUB = "upload", "hub"
CHECKPOINT_TYPES = [".safetensors", ".pth", ".pt"]
SECTIONS = {
    "Images": ("input_size", "mean", "std", "class_map", "test_fraction"),
    "Pruning": (
        "pruner",
        "channel_multiple",
        "exclude",
        "layer_sparsity",
        "ranking",
        "max_layer_sparsity",
        "config_list",
        "reconstruction_images",
        "pruning_epochs",
        "pruning_learning_rate",
        "pruning_steps",
    ),
    "Training": (
        "finetune_epochs",
        "optimizer",
        "learning_rate",
        "train_batch_size",
        "training_processes",
        "distillation_weight",
        "distillation_temperature",
        "label_smoothing",
        "augment",
    ),
    "Quantization": (
        "quantizer",
        "activation_bits",
        "first_last_bits",
        "layer_bits",
        "max_quantization_loss",
        "quantization_config_list",
        "qat_epochs",
        "qat_learning_rate",
        "calibration",
        "calibration_images",
    ),
    "Measuring": ("runtime", "runtime_hint", "engine_targets", "batch_size", "threads", "seed"),
}
"""Fields that are folded away, by heading."""
SET_BY_MAIN_FIELDS = ("model", "checkpoint", "data", "sparsity", "weight_bits")
SAME = "same"
PLACEHOLDERS = {
    "layer_sparsity": "layer1.0.conv1=0.3",
    "engine_targets": "SM86 SM89",
    "quantization_config_list": '[{"op_types": ["Conv2d"], "target_names": ["_input_", "weight"], "quant_dtype": "int8"}]',
    "layer_bits": "layer1=4 conv1=4/8 fc=32",
    "config_list": '[{"op_types": ["Conv2d"], "sparse_ratio": 0.5}]',
}


def _id_of_upload(self: gr.File, payload: Any) -> str | None:
    return payload if isinstance(payload, str) else None


UploadField: type[gr.File] = ABCMeta.__new__(  # a class statement would make Gradio write a .pyi file beside this one
    type(gr.File),
    "UploadField",
    (gr.File,),
    {
        "__doc__": "A field for one file whose handlers get the id of the upload, never a path; see `compress.ui.web.bodies`.",
        "__module__": __name__,
        "is_template": True,  # it looks like gr.File
        "data_model": property(lambda self: None, lambda self, model: None),  # so Gradio hands on the id as it comes
        "preprocess": _id_of_upload,
        "api_info": lambda self: gr.FileData.model_json_schema(),
    },
)
NO_LIMIT = ("max_layer_sparsity", "max_quantization_loss")
"""Fields that, left empty, limit nothing."""


def folded_fields() -> dict[str, tuple[str, ...]]:
    """`SECTIONS`, with every other field of `Request` under its own heading, so that none is missing."""
    known = {*SET_BY_MAIN_FIELDS, *(name for names in SECTIONS.values() for name in names)}
    others = tuple(name for name in Request.model_fields if name not in known)
    return SECTIONS | ({"More": others} if others else {})


def main_fields(models: tuple[str, ...]) -> dict[str, Component]:
    """The fields shown first, by name. Built inside the page's layout."""
    with gr.Column(elem_classes="card"):
        fields = _model_fields(models)
    with gr.Column(elem_classes="card"):
        fields |= _image_fields()
    with gr.Column(elem_classes="card"):
        fields |= _compression_fields()
    return fields


def _model_fields(models: tuple[str, ...]) -> dict[str, Component]:
    gr.HTML(text("model_head"))
    label, info = text("architecture_label"), text("architecture_help")
    sources = ("auto", "published", UPLOAD, HUB, "random")
    return {
        "model": gr.Dropdown(list(models), value="resnet18", label=label, info=info, filterable=True),
        "weights": gr.Radio(
            [(text(f"weights_{source}"), source) for source in sources],
            value="auto",
            label=text("weights_label"),
            info=text("weights_help"),
        ),
        "checkpoint_file": UploadField(
            label=text("checkpoint_label"), file_types=CHECKPOINT_TYPES, visible=False, height=136
        ),
        "hub": gr.Textbox(
            label=text("hub_label"), info=text("hub_help"), placeholder="owner/name", max_lines=1, visible=False
        ),
    }


def _image_fields() -> dict[str, Component]:
    gr.HTML(text("images_head"))
    return {
        "images": gr.Radio(
            [(text("images_bundled"), "fashion-mnist"), (text("images_upload"), UPLOAD), (text("images_none"), "none")],
            value="fashion-mnist",
            label=text("images_label"),
        ),
        "data_file": UploadField(label=text("data_label"), file_types=[".zip"], visible=False, height=136),
        "hint": gr.HTML("", elem_classes="hint"),
    }


def _compression_fields() -> dict[str, Component]:
    gr.HTML(text("small_head"))
    label, info = text("sparsity_label"), text("sparsity_help")
    return {
        "sparsity": gr.Slider(1, 99, value=50, step=1, label=label, info=info, buttons=[]),
        "arithmetic": gr.Radio(
            [(text(f"numbers_{kind}"), kind) for kind in (INTEGERS, HALF, FULL)],
            value=INTEGERS,
            label=text("numbers_label"),
        ),
        "bits": gr.Slider(
            1, max(QUANTIZED_BITS), value=8, step=1, label=text("bits_label"), info=text("bits_help"), buttons=[]
        ),
    }


def more_fields() -> dict[str, Component]:
    """All other fields of `Request`, by name, each made from its type, default and description."""
    fields: dict[str, Component] = {}
    for heading, names in folded_fields().items():
        gr.HTML(text(f"section_{heading.lower()}_head"))
        with gr.Row(elem_classes="fields"):
            for name in names:
                fields[name] = _component(name)
    return fields


def to_request(
    values: Mapping[str, Any], kept: Mapping[str, Path] = MappingProxyType({})
) -> tuple[Request, dict[str, Path]]:
    """The request and the files (field -> path) that the form's values mean.

    Args:
        kept: files of the run whose settings the form was filled with; they stand in where no other was uploaded.

    Raises:
        CompressError: a value or a combination that cannot work, or a file that is missing.
    """
    settings: dict[str, Any] = {"model": values["model"] or "", "sparsity": round(float(values["sparsity"]) / 100, 6)}
    files = {}
    for field, choice, upload, what in (
        ("checkpoint", "weights", "checkpoint_file", "checkpoint"),
        ("data", "images", "data_file", ".zip of images"),
    ):
        settings[field] = values[choice]
        if values[choice] == UPLOAD:
            if not values[upload] and field not in kept:
                raise CompressError(
                    f"No {what} was chosen: upload one, or choose another source above the upload field."
                )
            files[field] = Path(values[upload] or kept[field])
            settings[field] = files[field].name
    if values["weights"] == HUB:
        settings["checkpoint"] = _on_the_hub(values["hub"] or "")
    settings |= _bits(values)
    for names in folded_fields().values():
        for name in names:
            if name not in settings and values[name] not in (None, ""):
                settings[name] = _value(name, values[name])
    if values["class_map"] or "class_map" in kept:
        files["class_map"] = Path(values["class_map"] or kept["class_map"])
    return Request(**settings), files


def _on_the_hub(text: str) -> str:
    """What was typed or pasted, as `Request.checkpoint` names it."""
    name = text.strip().removeprefix("https://huggingface.co/").removeprefix(HUB_SCHEME).strip("/")
    if not name:
        raise CompressError("No repository was named: write owner/name, or choose another source of weights.")
    return HUB_SCHEME + name


def from_request(request: Request) -> dict[str, Any]:
    """The form's values, by field, that mean `request`, without its files; the other way of `to_request`."""
    values: dict[str, Any] = {
        "model": request.model,
        "weights": _weights_of(request.checkpoint),
        "checkpoint_file": None,
        "hub": request.checkpoint.removeprefix(HUB_SCHEME) if request.checkpoint.startswith(HUB_SCHEME) else "",
        "images": request.data if request.data in DATA_SOURCES else UPLOAD,
        "data_file": None,
        "sparsity": round(100 * request.sparsity, 4),
        "arithmetic": INTEGERS if request.quantizes else HALF if request.half_precision else FULL,
        "bits": request.weight_bits if request.quantizes else 8,
    }
    for name in (name for names in folded_fields().values() for name in names):
        values[name] = _shown(name, getattr(request, name))
    same = not request.quantizes or request.activation_bits == request.weight_bits
    values |= {"class_map": None, "activation_bits": SAME if same else str(request.activation_bits)}
    return values if request.quantizes else values | {"quantizer": Request.model_fields["quantizer"].default}


def _weights_of(checkpoint: str) -> str:
    if checkpoint.startswith(HUB_SCHEME):
        return HUB
    return checkpoint if checkpoint in CHECKPOINT_SOURCES else UPLOAD


def _shown(name: str, value: Any) -> Any:
    """A field's value as its control shows it."""
    if name.endswith("config_list"):
        return "" if value is None else json.dumps(value)
    if isinstance(value, dict):
        return " ".join(f"{key}={item}" for key, item in value.items())
    if isinstance(value, tuple):
        return " ".join(map(str, value))
    _, optional = _unwrapped(Request.model_fields[name].annotation)
    return ("" if value is None else str(value)) if optional else value


def _bits(values: Mapping[str, Any]) -> dict[str, Any]:
    if values["arithmetic"] == INTEGERS:
        bits = int(values["bits"])
        activation = bits if values["activation_bits"] in (None, SAME) else int(values["activation_bits"])
        return {"quantizer": values["quantizer"], "weight_bits": bits, "activation_bits": activation}
    width = HALF_PRECISION if values["arithmetic"] == HALF else FULL_PRECISION
    return {"quantizer": "none", "weight_bits": width, "activation_bits": width}


def _component(name: str) -> Component:
    field = Request.model_fields[name]
    kind, optional = _unwrapped(field.annotation)
    label, info = text(f"label_{name}"), text(f"help_{name}")
    if name == "class_map":
        return UploadField(label=text("class_map_label"), file_types=[".json"], height=130)
    if name == "quantizer":
        choices = [(quantizer.title, quantizer.name) for quantizer in QUANTIZERS.values()]
        return gr.Dropdown(choices, value=field.default, label=label, info=info)
    if name == "activation_bits":
        return gr.Dropdown(
            [(text("same_as_weights"), SAME), *((str(bits), str(bits)) for bits in QUANTIZED_BITS)],
            value=SAME,
            label=label,
            info=text("activation_bits_help"),
        )
    if get_origin(kind) is Literal:
        return gr.Dropdown(list(get_args(kind)), value=field.default, label=label, info=info)
    if kind is bool:
        return gr.Checkbox(value=field.default, label=label, info=info)
    if kind in (int, float) and not optional:
        return gr.Number(value=field.default, label=label, info=info, precision=0 if kind is int else None)
    return gr.Textbox(value="", label=label, info=info, placeholder=PLACEHOLDERS.get(name) or _placeholder(name, kind))


def _value(name: str, value: Any) -> Any:
    """A form's value as `Request` takes it; text that is no number is left for `Request` to refuse."""
    kind, _ = _unwrapped(Request.model_fields[name].annotation)
    if get_origin(kind) is tuple and isinstance(value, str):
        return tuple(part for part in value.replace(",", " ").split() if part)
    if kind is int and isinstance(value, str):
        return value.strip()
    return value


def _unwrapped(annotation: Any) -> tuple[Any, bool]:
    """(the type without None, whether None was allowed)."""
    if get_origin(annotation) in (Union, types.UnionType):
        (kind,) = (part for part in get_args(annotation) if part is not type(None))
        return kind, True
    return annotation, False


def _placeholder(name: str, kind: Any) -> str:
    if get_origin(kind) is tuple:
        return text("placeholder_layers") if get_args(kind)[0] is str else "0.5, 0.5, 0.5"
    return text("placeholder_no_limit" if name in NO_LIMIT else "placeholder_found")
