"""The types of a request's fields: names that are offered, and text from a shell or a form as values."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field

from compress.methods.pruners import PRUNERS
from compress.methods.quantizers import FORMER_NAMES, QUANTIZERS
from compress.methods.runtimes import RUNTIMES, Hint

RankingName = Literal["per-group", "global"]
OptimizerName = Literal["adamw", "sgd"]
EstimatorName = Literal["average", "minmax", "percentile", "mse", "entropy"]
RuntimeHint = Hint
if TYPE_CHECKING:  # a type checker knows literals only as they are written
    PrunerName = str
    RuntimeName = str
    QuantizerNames = str
else:
    PrunerName = Literal[*PRUNERS, "none"]
    RuntimeName = Literal["auto", *RUNTIMES]
    QuantizerNames = Literal[*QUANTIZERS, "none"]
QuantizerName = Annotated[
    QuantizerNames, BeforeValidator(lambda value: FORMER_NAMES.get(value, value) if isinstance(value, str) else value)
]
_BITS = re.compile(r"32|[1-8](/[2-8])?")


def pairs_from_text(value: Any) -> Any:
    """`layer1=0.3 layer2.0.conv1=0.5` (shell and form; or a list of such words) and JSON text become a dictionary."""
    if isinstance(value, list | tuple):
        value = " ".join(map(str, value))
    if not isinstance(value, str):
        return value
    if value.lstrip().startswith("{"):
        return json.loads(value)
    pairs = [word.partition("=") for word in value.replace(",", " ").split()]
    names = [name for name, _, _ in pairs]
    if len(set(names)) != len(names):
        raise ValueError("a name is given twice")
    return {name: given for name, _, given in pairs}


def entries_from_text(value: Any) -> Any:
    return json.loads(value) if isinstance(value, str) else value


def _bits(value: str) -> str:
    if not _BITS.fullmatch(value):
        raise ValueError("no bits")
    return value


Architecture = Annotated[str, Field(pattern=r"^SM\d{2,3}$")]
Ratio = Annotated[float, Field(ge=0, lt=1)]
LayerRatios = Annotated[dict[str, Ratio], BeforeValidator(pairs_from_text)]
Bits = Annotated[str, BeforeValidator(lambda v: str(v) if type(v) is int else v), AfterValidator(_bits)]
LayerBits = Annotated[dict[str, Bits], BeforeValidator(pairs_from_text)]
ConfigList = Annotated[tuple[dict[str, Any], ...], BeforeValidator(entries_from_text)]
