"""Values of a request that are fine one by one and contradict each other; nothing is ever repaired."""

from __future__ import annotations

from typing import TYPE_CHECKING

from compress.errors import RequestError
from compress.methods.quantizers import NO_TENSORRT_FILE, QUANTIZERS
from compress.methods.runtimes import RUNTIMES

if TYPE_CHECKING:
    from compress.request import Request

QUANTIZED_BITS = range(2, 9)
HALF_PRECISION, FULL_PRECISION = 16, 32
_PLAN_FIELDS = ("sparsity", "exclude", "layer_sparsity", "ranking", "max_layer_sparsity", "config_list")
_BIT_FIELDS = ("weight_bits", "activation_bits", "first_last_bits", "layer_bits")


def allowed(kind: type[Request], name: str) -> str:
    """What a field takes, as the end of the sentence that refuses a wrong value."""
    extra = kind.model_fields[name].json_schema_extra
    assert isinstance(extra, dict), f"field {name} has no text for refusals"
    return str(extra["allowed"])


def refuse_contradictions(request: Request) -> None:
    """Raises `RequestError` on the first contradiction."""
    _refuse_impossible_bits(request)
    _refuse_contradictory_bits(request)
    if request.std is not None and min(request.std) <= 0:
        raise RequestError("std", request.std, allowed(type(request), "std"))
    if (request.mean is None) != (request.std is None):
        given, missing = ("mean", "std") if request.std is None else ("std", "mean")
        raise RequestError(
            missing, None, f"three numbers, because {given} was given and both belong to one normalisation"
        )
    _refuse_contradictory_plan(request)
    _refuse_unshareable_training(request)
    if request.runtime != "auto" and request.runtime_hint not in RUNTIMES[request.runtime].hints:
        raise RequestError(
            "runtime_hint", request.runtime_hint, f"latency, because {request.runtime} has no such choice"
        )
    if request.pruner == "none" and not request.quantizes and request.weight_bits == FULL_PRECISION:
        raise RequestError("quantizer", request.quantizer, "something to do: choose a pruner, a quantizer, or 16 bits")


def _refuse_impossible_bits(request: Request) -> None:
    for name in ("weight_bits", "activation_bits"):
        taken, words = tuple(QUANTIZED_BITS), "a whole number from 2 to 8"
        if request.quantizer != "none":
            taken = getattr(QUANTIZERS[request.quantizer], name)
            numbers = f"a whole number from {taken[0]} to {taken[-1]}" if len(taken) > 1 else str(taken[0])
            words = f"{numbers} with {request.quantizer}"
        if getattr(request, name) not in (*taken, HALF_PRECISION, FULL_PRECISION):
            raise RequestError(name, getattr(request, name), f"{words}, or 16, or 32")
    wide = {HALF_PRECISION, FULL_PRECISION} & {request.weight_bits, request.activation_bits}
    if wide and request.weight_bits != request.activation_bits:
        raise RequestError(
            "activation_bits",
            request.activation_bits,
            f"{max(wide)} as well, because weight_bits and activation_bits of 16 or 32 go together",
        )


def _refuse_contradictory_bits(request: Request) -> None:
    if request.first_last_bits not in (*QUANTIZED_BITS, FULL_PRECISION):
        raise RequestError("first_last_bits", request.first_last_bits, allowed(type(request), "first_last_bits"))
    for name in ("layer_bits", "quantization_config_list", "max_quantization_loss"):
        if getattr(request, name) not in (None, {}) and not request.quantizes:
            raise RequestError(name, getattr(request, name), "nothing, because nothing is quantized")
    changed = [n for n in _BIT_FIELDS if getattr(request, n) != type(request).model_fields[n].default]
    if request.quantization_config_list is not None and changed:
        raise RequestError(
            changed[0], getattr(request, changed[0]), "nothing, because quantization_config_list is given and says it"
        )
    flavour = RUNTIMES[request.runtime].flavour if request.runtime != "auto" else None
    if request.quantizer == "lsq-plus" and request.activation_bits == 8 and flavour == "tensorrt":
        raise RequestError("runtime", request.runtime, f"another one: {NO_TENSORRT_FILE.removesuffix('.')}")
    binary = next((name for name, bits in request.layer_bits.items() if bits.startswith("1")), None)
    if binary and request.quantizer != "bnn":
        raise RequestError("layer_bits", {binary: request.layer_bits[binary]}, "2 to 8 bits: 1 is for quantizer bnn")


def _refuse_unshareable_training(request: Request) -> None:
    processes = request.training_processes
    if 2 * processes > request.train_batch_size:  # a BatchNorm needs two images
        raise RequestError("training_processes", processes, allowed(type(request), "training_processes"))
    if processes > 1 and request.model == "custom":
        raise RequestError(
            "training_processes", processes, "1, because other processes cannot build a module of your own"
        )


def _refuse_contradictory_plan(request: Request) -> None:
    changed = {name for name in _PLAN_FIELDS if getattr(request, name) != type(request).model_fields[name].default}
    if request.config_list is not None and changed - {"config_list"}:
        name = next(name for name in _PLAN_FIELDS if name in changed)
        raise RequestError(
            name, getattr(request, name), "nothing, because config_list is given and says what is removed where"
        )
    if request.pruner == "none" and changed - {"sparsity"}:
        name = next(name for name in _PLAN_FIELDS[1:] if name in changed)
        raise RequestError(name, getattr(request, name), "nothing, because the pruner is none: choose a pruner")
    if request.prunes and not request.shrinks and changed - {"sparsity", "exclude"}:
        name = next(name for name in _PLAN_FIELDS[2:] if name in changed)
        raise RequestError(
            name,
            getattr(request, name),
            f"nothing, because {request.pruner} treats the layers alike: choose another pruner",
        )
    if request.max_layer_sparsity is not None and request.ranking != "global":
        raise RequestError(
            "max_layer_sparsity", request.max_layer_sparsity, "nothing, because it limits global ranking: ask for that"
        )
    if request.max_layer_sparsity is not None and request.max_layer_sparsity < request.sparsity:
        raise RequestError(
            "max_layer_sparsity", request.max_layer_sparsity, f"at least the sparsity, which is {request.sparsity:g}"
        )
