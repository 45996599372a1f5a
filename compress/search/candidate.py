"""One point of a search: what it asks for beyond the base request. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from compress.request import Request


def by_quantizer(name: str) -> dict[str, Any]:
    """Fields of a request that choosing a quantizer changes: without one, no layer has bits of its own."""
    if name != "none":
        return {"quantizer": name}
    return {"quantizer": name, "layer_bits": {}, "max_quantization_loss": None, "quantization_config_list": None}


@dataclass(frozen=True)
class Candidate:
    """One compressed model that could be made, as differences from a base request."""

    ratios: tuple[tuple[str, float], ...]
    """Layer -> share of its channels removed, 0 <= r < 1, sorted. Of a group every layer is named: around a grouped
    convolution, which layers go together depends on what is asked of each, and one without a name gets the base's share."""
    layer_bits: tuple[tuple[str, str], ...] = ()
    """Layer -> its bits as in `Request.layer_bits`, where they differ from the base request's. Sorted."""
    pruner: str | None = None
    """None: the base request's."""
    quantizer: str | None = None

    def __post_init__(self) -> None:
        for field in ("ratios", "layer_bits"):
            object.__setattr__(self, field, tuple(sorted((str(name), value) for name, value in getattr(self, field))))

    def request(self, base: Request) -> Request:
        """The request of the run that makes it; one that removes nothing asks for no pruner.

        Raises:
            RequestError: the differences contradict the base request.
        """
        ratios, prunes = dict(self.ratios), any(ratio > 0 for _, ratio in self.ratios)
        changes: dict[str, Any] = {"ranking": "per-group", "max_layer_sparsity": None}
        changes |= {"layer_bits": base.layer_bits | dict(self.layer_bits)}
        changes |= by_quantizer(self.quantizer or base.quantizer)
        if prunes:
            changes |= {"pruner": self.pruner or base.pruner, "layer_sparsity": base.layer_sparsity | ratios}
        else:
            changes |= {"pruner": "none", "layer_sparsity": {}, "exclude": ()}
        return Request(**(base.model_dump() | changes))

    def as_dict(self) -> dict[str, Any]:
        """JSON-safe; `from_dict` takes it back."""
        return {
            "ratios": dict(self.ratios),
            "layer_bits": dict(self.layer_bits),
            "pruner": self.pruner,
            "quantizer": self.quantizer,
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Candidate:
        return cls(
            tuple(values["ratios"].items()), tuple(values["layer_bits"].items()), values["pruner"], values["quantizer"]
        )
