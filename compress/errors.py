"""The errors that a user sees.

A message is one or two sentences: what was given, what is allowed, what to do next. The web app, the command line and Python
show it verbatim, so it never contains a traceback or an unexplained message of another library. A message is for people only:
code reads the fields of an error (`layer`, `field`, ...), which `as_dict` gives as JSON values.
"""

import difflib
import math
from collections.abc import Iterable
from typing import Any, ClassVar

MOST_SHOWN = 300
"""Characters of a value in the message that refuses it."""


class CompressError(Exception):
    """Anything that Espalier refuses or fails to do."""

    layer: str | None = None
    """The layer of the model that the error is about, if any."""
    FIELDS: ClassVar[tuple[str, ...]] = ("layer",)
    """The attributes that `as_dict` includes unless they are None."""

    def as_dict(self) -> dict[str, Any]:
        """The error as JSON values: `type` (the class), `message`, and its fields."""
        fields = {name: _json_value(getattr(self, name)) for name in self.FIELDS if getattr(self, name) is not None}
        return {"type": type(self).__name__, "message": str(self), **fields}


class RequestError(CompressError):
    """A field of the request has an invalid value or contradicts another field."""

    FIELDS = (*CompressError.FIELDS, "field", "got", "allowed")

    def __init__(self, field: str, got: object, allowed: str) -> None:
        shown = repr(got) if len(repr(got)) <= MOST_SHOWN else f"{repr(got)[:MOST_SHOWN]}..."
        super().__init__(f"{field}: got {shown}, expected {allowed}.")
        self.field, self.got, self.allowed = field, got, allowed


class CheckpointError(CompressError):
    """A checkpoint is unsafe, damaged, or belongs to another architecture."""


class DataError(CompressError):
    """Images or labels cannot be used as given."""


class BaselineError(CompressError):
    """The original model performs badly on its own data."""


class ModelError(CompressError):
    """The model's own code fails in the forward pass, or its output is not a tensor of logits."""


class PruningError(CompressError):
    """The model cannot be traced, planned or shrunk."""


class QuantizationError(CompressError):
    """A layer cannot be quantized as requested."""


class TrainingError(CompressError):
    """Training diverged or cannot start."""


class HandoffError(CompressError):
    """A conversion changed the model's outputs by more than the tolerance; the message gives both numbers."""


OTHER_RUNTIME = "Choose another runtime."
MORE_MEMORY = "End other programs on this machine, or choose another runtime."


class EngineError(HandoffError):
    """A runtime refused a file, failed on it, or its process ended.

    `what` says what happened, `advice` what to do next. `detail` is the runtime's own message, for the log only.
    """

    FIELDS = (*HandoffError.FIELDS, "runtime", "advice")

    def __init__(self, runtime: str, what: str, advice: str = OTHER_RUNTIME, detail: str = "") -> None:
        super().__init__(f"{what} {advice}".strip())
        self.runtime, self.what, self.advice, self.detail = runtime, what, advice, detail


class RuntimeUnavailableError(CompressError):
    """The requested runtime is not installed or has no device on this machine."""


class StorageError(CompressError):
    """A file or folder cannot be read or written, or does not verify."""


class PublishingError(CompressError):
    """A run cannot be published on the Hub."""


class RunError(CompressError):
    """A run cannot be found, started, cancelled or resumed."""


def such_as(names: Iterable[str], name: str) -> str:
    """The existing layer or module names closest to `name`, as the end of a sentence."""
    layers = list(names)
    modules = {".".join(layer.split(".")[:depth]) for layer in layers for depth in range(1, layer.count(".") + 2)}
    close = difflib.get_close_matches(name, sorted(modules), n=3, cutoff=0.5) or layers[:3]
    return f", such as {', '.join(close)}"


def _json_value(value: object) -> Any:
    """The value as JSON holds it; its representation, cut as in a message, if JSON cannot hold it or it is long."""
    if isinstance(value, bool | int) or (isinstance(value, float) and math.isfinite(value)):
        return value
    if isinstance(value, str):
        return value[:MOST_SHOWN]
    return repr(value)[:MOST_SHOWN]
