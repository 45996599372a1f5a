"""Opening a module of the user's own: from any nn.Module to a plain float32 module that maps images to logits.

A copy of the module is unwrapped (DataParallel, torch.compile), converted to float32 on the CPU, freed of hooks,
reparametrizations and SyncBatchNorm, and gets a forward that takes images alone and returns the logits alone. Each step is
reported in a note, and its outputs are checked to stay the same; a module that cannot be opened is refused with the reason.

`compress.load` opens the fresh instance that the user passes to it in the same way.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from compress import memory
from compress.errors import CompressError, HandoffError, RequestError, RunError
from compress.models import calls
from compress.own_modules import answers, calling, copying, inputs, permanent, repeatable, tensors, wrappers

__all__ = ["OwnModule", "open_module", "unwrapped"]


@dataclass(frozen=True)
class OwnModule:
    """The result of opening a module."""

    model: nn.Module
    """In eval mode, float32, on the CPU: images [N, 3, size, size] -> logits [N, num_classes]."""
    num_classes: int
    notes: tuple[str, ...]
    """What was done to the module, a sentence each."""


def open_module(model: object, input_size: int) -> OwnModule:
    """Open a module of the user's own; `model` and torch's random generator are left as they are.

    Args:
        input_size: height and width in pixels of the images that it has to take.

    Raises:
        RequestError: it is no module, cannot be copied, has tensors that are not real floating-point numbers, does not take
            such images, or does not return the same class scores each time; the sentence says what to pass instead.
        HandoffError: a step of opening it changed its outputs.
    """
    bare, notes = unwrapped(model)
    tensors.require_plain(bare)
    own, more = _plain_copy(bare, hooks=False)
    notes += more
    images = inputs.example(input_size)
    before = _first_answer(own, bare, images)
    repeatable.require_repeatable(own, images)
    if replaced := permanent.make_permanent(own) + permanent.plain_batch_norms(own, images):
        notes += replaced
        if not answers.are_equal(before, calling.run(own, images)):
            raise HandoffError(
                f"The answers of {type(own).__name__} changed while its reparametrizations were made permanent: remove them "
                "yourself (torch.nn.utils.parametrize.remove_parametrizations and the like), and give the plain module."
            )
    notes += _check_hooks(bare, before, images)
    chosen = answers.choose(before, own, images)
    notes += chosen.notes
    return OwnModule(answers.returning(own, chosen), chosen.num_classes, tuple(notes))


def unwrapped(model: object) -> tuple[nn.Module, list[str]]:
    """The module inside DataParallel, torch.compile and the like, itself and not a copy, and a note for each wrapper.

    Raises:
        RequestError: it is no module, or one whose code is fixed (TorchScript, torch.export).
    """
    return wrappers.unwrap(wrappers.require_module(model))


def _plain_copy(bare: nn.Module, *, hooks: bool) -> tuple[nn.Module, list[str]]:
    """A copy in eval mode that is called with images alone, and what was done to it."""
    own = copying.copied(bare, hooks=hooks)
    notes = wrappers.unwrap_children(own) + tensors.to_float32(own)
    own, defaults = calling.taking_images(calling.returning_itself(own))
    return own, notes + defaults


def _first_answer(own: nn.Module, bare: nn.Module, images: Tensor) -> object:
    try:
        answer = calling.run(own, images)
    except CompressError:
        raise
    except Exception as error:  # what a user's own module raises is its author's choice
        if memory.ran_out(error):
            raise RunError(
                f"Memory ran out while {type(bare).__name__} was tried on two images of {images.shape[2]} pixels. End other "
                "programs on this machine, or give a smaller input_size."
            ) from error
        if copying.hooked_modules(bare):
            with_hooks, _ = _plain_copy(bare, hooks=True)
            if inputs.takes(with_hooks, images):
                raise _needs_hooks(bare, copying.hooked_modules(with_hooks)[0]) from error
        where = calls.own_line(error)
        raise inputs.refusal(own, images, f"{where or 'it'} raises {calls.raised(error)}") from error
    if not answers.has_rows(answer, len(images)):
        raise inputs.refusal(own, images, f"it answered {len(images)} of them with {answers.listed(answer)}")
    return answer


def _check_hooks(bare: nn.Module, before: object, images: Tensor) -> list[str]:
    """A note that hooks without an effect on the outputs were left out; raises `RequestError` for one that changes them."""
    if not copying.hooked_modules(bare):
        return []
    own, _ = _plain_copy(bare, hooks=True)
    hooked, answer = copying.hooked_modules(own), calling.run(own, images)
    if not answers.are_equal(before, answer):
        for name in hooked:
            copying.drop_hooks(own.get_submodule(name))
            if not answers.are_equal(answer, calling.run(own, images)):
                raise _needs_hooks(bare, name)
        raise _needs_hooks(bare, hooked[0])
    count = len(hooked)
    of = f"`{hooked[0]}`" if hooked[0] else "the module"
    return [f"The hooks of {of if count == 1 else f'{count} layers'} were left out; the answers are the same without."]


def _needs_hooks(bare: nn.Module, name: str) -> RequestError:
    return RequestError(
        "model",
        type(bare).__name__,
        f"a module whose forward computes the answers, and a hook of {f'`{name}`' if name else 'the module'} changes them: "
        "write what the hook does into forward, and take the hook off",
    )
