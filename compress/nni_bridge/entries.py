"""Which modules an entry of an NNI config list selects: the rule that pruning and quantization share.

Names and patterns (matched from the start of a name), of these the given types, less what the entry excludes.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from compress.errors import RequestError, such_as

SHARED_KEYS = {"op_names", "op_types"}
NEW_KEYS = {"op_names_re", "exclude_op_names", "exclude_op_types", "exclude_op_names_re"}
OLD_KEYS = {"op_partial_names", "exclude"}

Entry = Mapping[str, Any]


@dataclass(frozen=True)
class Selector:
    """Reads the entries of one field of the request."""

    field: str
    types: Mapping[str, str]
    """Module name -> name of its class, for those that can be selected."""
    kind: str
    """What they are, in words: `a Conv2d or Linear layer`."""
    known_types: tuple[str, ...]
    why: str
    """Why only these types."""

    def refuse(self, got: Any, expected: str) -> RequestError:
        return RequestError(self.field, got, expected)

    def refuse_keys(self, entries: Sequence[Entry], new: set[str], old: set[str], refused: Mapping[str, str]) -> None:
        """Raises `RequestError` for a key that is unknown, refused, or of the other version of NNI.

        Args:
            new, old: the keys of NNI 3.0 and of 2.x beside those that select.
            refused: key -> what is expected instead.
        """
        new, old, keys = new | NEW_KEYS, old | OLD_KEYS, {key for entry in entries for key in entry}
        for key in sorted(keys):
            if key in refused:
                raise self.refuse(key, refused[key])
            if key not in SHARED_KEYS | new | old:
                raise self.refuse(key, f"one of NNI's keys {', '.join(sorted(SHARED_KEYS | new | old))}")
        newer, older = sorted(keys & (new - old)), sorted(keys & (old - new))
        if newer and older:
            raise self.refuse(
                f"{newer[0]} and {older[0]}",
                "the keys of one version of NNI: the first is of 3.0, the other of 2.x",
            )

    def select(self, number: int, entry: Entry) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """The modules that an entry selects, and those that it would without its own exclusions."""
        names = set(self._known(entry, number, "op_names")) | self._matching(number, entry, "op_names_re")
        partial = self.strings(number, entry, "op_partial_names")
        names |= {name for name in self.types if any(part in name for part in partial)}
        by_name = any(key in entry for key in ("op_names", "op_names_re", "op_partial_names"))
        by_type = set(self._known_types(number, entry, "op_types"))
        if not by_name and not by_type:
            raise self.refuse(f"entry {number} without a selection", "op_names, op_names_re or op_types")
        wanted = {name for name in self.types if not by_name or name in names}
        wanted = {name for name in wanted if not by_type or self.types[name] in by_type}
        out = set(self._known(entry, number, "exclude_op_names")) | self._matching(number, entry, "exclude_op_names_re")
        out |= {
            name for name, kind in self.types.items() if kind in self._known_types(number, entry, "exclude_op_types")
        }
        if not wanted - out:
            raise self.refuse(f"entry {number}, which selects no layer", "an entry that selects at least one")
        return tuple(sorted(wanted - out)), tuple(sorted(wanted & out))

    def strings(self, number: int, entry: Entry, key: str) -> list[str]:
        value = entry.get(key, [])
        if not isinstance(value, list | tuple) or not all(isinstance(item, str) for item in value):
            raise self.refuse(f"{key} in entry {number}", "a list of strings")
        return list(value)

    def _known(self, entry: Entry, number: int, key: str) -> list[str]:
        names = self.strings(number, entry, key)
        for name in names:
            if name not in self.types:
                raise self.refuse(f"{name} in {key}", f"the name of {self.kind}{such_as(self.types, name)}")
        return names

    def _known_types(self, number: int, entry: Entry, key: str) -> list[str]:
        types = self.strings(number, entry, key)
        for kind in types:
            if kind not in (*self.known_types, "default"):
                raise self.refuse(f"{kind} in {key}", f"{' or '.join(self.known_types)}: {self.why}")
        return list(self.known_types) if "default" in types else types

    def _matching(self, number: int, entry: Entry, key: str) -> set[str]:
        try:
            patterns = [re.compile(pattern) for pattern in self.strings(number, entry, key)]
        except re.error as error:
            raise self.refuse(f"{key} in entry {number}", f"regular expressions ({error})") from None
        return {name for name in self.types if any(pattern.match(name) for pattern in patterns)}
