"""One rule for every name from outside (classes, files in a zip or a folder, class maps): what cannot be shown is refused.

Such a name ends up in reports, pages, logs and terminals. A control character can clear a terminal, a bidirectional one
makes `gpj.exe` read as `exe.jpg`, and half a character (a lone surrogate) cannot be written as UTF-8 at all.
"""

from __future__ import annotations

import unicodedata

MAX_SHOWN = 60
_JOINERS = "\u200c\u200d"
"""Of Persian and Indic scripts, and of emoji made of several."""
_KINDS = {
    "Cc": "a control character",
    "Cf": "an invisible character or one that turns the direction of text",
    "Cs": "half of a character",
    "Zl": "a line separator",
    "Zp": "a paragraph separator",
}


def flaw(name: str) -> str | None:
    """Why `name` cannot be shown as it stands, to be read after "holds"; None when it can."""
    for character in name:
        kind = unicodedata.category(character)
        if kind in _KINDS and character not in _JOINERS:
            return f"{_KINDS[kind]} (U+{ord(character):04X})"
        if ord(character) & 0xFFFE == 0xFFFE or 0xFDD0 <= ord(character) <= 0xFDEF:
            return f"a code that is no character (U+{ord(character):04X})"
    return None if name.strip() else "nothing that can be seen"


def shown(name: str) -> str:
    """`name` for a sentence: cut to 60 characters, with codes in place of what cannot be shown."""
    cut = name if len(name) <= MAX_SHOWN else f"{name[: MAX_SHOWN - 3]}..."
    return "".join(character if flaw(f"x{character}") is None else f"<U+{ord(character):04X}>" for character in cut)
