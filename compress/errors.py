"""What a user is told when something cannot be done.

Every message is one sentence or two: what was given, what is allowed, what to do next. The web app, the shell and
Python show it as it stands, so it never carries a traceback or another library's own words without explanation.
"""

import difflib
from collections.abc import Iterable

MOST_SHOWN = 300
"""Characters of a value in the sentence that refuses it."""


class CompressError(Exception):
    """Anything Espalier refuses or fails to do; its text is written for the user."""

    layer: str | None = None
    """The layer of the model that it is about, where there is one."""


class RequestError(CompressError):
    """A field of the request is outside what is accepted, or contradicts another field."""

    def __init__(self, field: str, got: object, allowed: str) -> None:
        shown = repr(got) if len(repr(got)) <= MOST_SHOWN else f"{repr(got)[:MOST_SHOWN]}..."
        super().__init__(f"{field}: got {shown}, expected {allowed}.")
        self.field, self.got, self.allowed = field, got, allowed


class CheckpointError(CompressError):
    """An uploaded checkpoint is unsafe, damaged, or belongs to another architecture."""


class DataError(CompressError):
    """Images or labels cannot be used as given."""


class BaselineError(CompressError):
    """The model does not work well on its own data before anything is changed."""


class ModelError(CompressError):
    """The model's own code stops while it is called, or answers with something that is no logits."""


class PruningError(CompressError):
    """The model cannot be traced, planned or shrunk."""


class QuantizationError(CompressError):
    """A layer cannot be quantized as asked."""


class TrainingError(CompressError):
    """Training diverged or cannot start."""


class HandoffError(CompressError):
    """A model changed its answers on the way from one form to the next; carries both numbers."""


OTHER_RUNTIME = "Choose another runtime."
MORE_MEMORY = "End other programs on this machine, or choose another runtime."


class EngineError(HandoffError):
    """A runtime refused a file, failed on it, or its process ended: its name, what happened, and what to do next.

    `detail` is what the runtime said itself: for a log, not for the user.
    """

    def __init__(self, runtime: str, what: str, advice: str = OTHER_RUNTIME, detail: str = "") -> None:
        super().__init__(f"{what} {advice}".strip())
        self.runtime, self.what, self.advice, self.detail = runtime, what, advice, detail


class RuntimeUnavailableError(CompressError):
    """The runtime asked for is not installed or has no device here."""


class StorageError(CompressError):
    """A run's folder cannot be written, or does not verify."""


class PublishingError(CompressError):
    """A run cannot be put on the Hub."""


class RunError(CompressError):
    """A run cannot be found, started, cancelled or resumed."""


def such_as(names: Iterable[str], wanted: str) -> str:
    """Names of layers or modules close to `wanted`, as the end of a sentence; a layer stands for its modules, too."""
    names = list(names)
    parts = {".".join(name.split(".")[:depth]) for name in names for depth in range(1, name.count(".") + 2)}
    close = difflib.get_close_matches(wanted, sorted(parts), n=3, cutoff=0.5) or names[:3]
    return f", such as {', '.join(close)}"
