"""The texts of the page, in each language: `translations/<language>.json`, flat keys, one sentence or label each.

`word(key)` is a mark that the page replaces in the visitor's language (`gr.I18n`); where a language lacks a text, English
stands in. What a run or the server says comes from the server while it happens, and is English.

Three traps of `gr.I18n` in Gradio 6.31, all met here: it replaces one mark in a text, so markup with several texts (`MARKUP`) is
put together here for each language; it replaces a text that equals a key even without a mark, hence `PREFIX`; and it chooses
only among the languages that Gradio itself has.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from types import MappingProxyType

import gradio as gr

from compress.request import Request

FOLDER = Path(__file__).parent / "translations"
ENGLISH = "en"
PREFIX = "espalier:"
MARKUP = MappingProxyType(
    {
        "hero": '<header class="hero"><h1>{hero_title}</h1><p>{hero_text}</p></header>',
        "model_head": '<h2><span class="number">1</span>{model_title}</h2>',
        "images_head": '<h2><span class="number">2</span>{images_title}</h2>',
        "small_head": '<h2><span class="number">3</span>{small_title}</h2>',
        "meaning_head": "<h2>{meaning_title}</h2>",
        "runs_head": '<h2>{runs_title}</h2><p><a href="?compare=">{runs_compare}</a></p>',
        "summary_head": '<h2>{summary_title}</h2><p class="soft">{summary_text}</p>',
        "try_head": '<h2>{try_title}</h2><p class="soft">{try_text}</p>',
        "files_head": '<h2>{files_title}</h2><p class="soft">{files_text}</p>',
        "share_head": '<h2>{share_title}</h2><p class="soft">{share_text}</p>',
        "compare_head": '<div class="run-head"><h1>{compare_title}</h1><p class="soft">{compare_text} <a href="./">{new_run}</a></p></div>',
        "pareto_head": '<h2>{pareto_title}</h2><p class="soft">{pareto_text}</p>',
        "finished_head": "<h2>{finished_title}</h2>",
        **{
            f"chart_{key}_head": f'<h2>{{chart_{key}_title}}</h2><p class="soft">{{chart_{key}_text}}</p>'
            for key in ("size", "latency", "accuracy", "sqnr", "mixed", "channels", "training")
        },
        **{
            f"section_{key}_head": f"<h3>{{section_{key}}}</h3>"
            for key in ("images", "pruning", "training", "quantization", "measuring", "more")
        },
    }
)
"""Fixed markup by key, with the keys of its texts."""


def text(key: str) -> str:
    """What stands for the text or markup `key`. Raises `KeyError` when English has none."""
    if key not in all_texts()[ENGLISH]:
        raise KeyError(key)
    return str(gr.I18n()(PREFIX + key))


def translations() -> gr.I18n:
    return gr.I18n(
        **{language: {PREFIX + key: text for key, text in known.items()} for language, known in all_texts().items()}
    )


@cache
def all_texts() -> dict[str, dict[str, str]]:
    """Language -> key -> text, markup included."""
    own = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(FOLDER.glob("*.json"))}
    own[ENGLISH] |= field_texts()
    filled = {language: own[ENGLISH] | known for language, known in own.items()}
    return {
        language: known | {key: markup.format_map(filled[language]) for key, markup in MARKUP.items()}
        for language, known in own.items()
    }


def field_texts() -> dict[str, str]:
    """The English label and help of each field of `Request`, made from the field itself."""
    labels = {f"label_{name}": _label(name) for name in Request.model_fields}
    helps = {f"help_{name}": (field.description or "").replace("`", "") for name, field in Request.model_fields.items()}
    return labels | helps


def _label(name: str) -> str:
    words = {"qat": "QAT", "std": "Standard deviation"}
    return " ".join(words.get(text, text) for text in name.split("_")).capitalize().replace("Qat", "QAT")
