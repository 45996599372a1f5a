"""Every text of the page in every language, none of it outside of the translations, and the page in Chinese."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gradio as gr
import pytest
from playwright.sync_api import Browser, expect
from test_app_browser import server, watched  # noqa: F401 - a fixture
from test_form import no_count, no_images

from compress.jobs import Queue
from compress.request import Request
from compress.ui import texts
from compress.ui.backend import Offer
from compress.ui.handlers import App
from compress.ui.page import build_page
from compress.ui.web.settings import Settings

MARK = re.compile(r"__i18n__(\{[^}]*\})")
OTHERS = sorted(path.stem for path in texts.FOLDER.glob("*.json") if path.stem != texts.ENGLISH)
NO_WORDS = re.compile(r"[\W\d]*|owner/name|0\.5, 0\.5, 0\.5")
"""Texts that are the same in every language."""


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("page")
    app = App(Queue(folder), dict, Settings(data=folder), [Offer("resnet18", 11_689_512)], no_images, no_count)
    return build_page(app).get_config_file()


def static_texts(config: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """(where, text) of everything that the page shows before anything happens."""
    for component in config["components"]:
        props, kind = component["props"], component["type"]
        if kind == "api":  # an endpoint's parameter
            continue
        for name in ("label", "info", "placeholder"):
            if isinstance(props.get(name), str) and props.get("visible") is not False:
                yield f"{kind}.{name}", props[name]
        if kind in ("html", "button") and isinstance(props.get("value"), str):
            yield f"{kind}.value", props["value"]
        if kind == "radio":
            yield from ((f"{kind}.choices", label) for label, _ in props["choices"])


def strings(value: Any) -> Iterator[str]:
    """All strings within a value of JSON's kinds."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list | tuple):
        for item in value.values() if isinstance(value, dict) else value:
            yield from strings(item)


def used(config: dict[str, Any]) -> set[str]:
    """Keys of the translations' files that the page, its markup or its script use."""
    marks = (mark for text in strings(config) for mark in MARK.findall(text))
    marked = {json.loads(mark)["key"].removeprefix(texts.PREFIX) for mark in marks}
    fields = {key for name in marked & set(texts.MARKUP) for key in re.findall(r"\{(\w+)\}", texts.MARKUP[name])}
    return (marked - set(texts.MARKUP)) | fields | said_later()


def said_later() -> set[str]:
    """Keys that page.js and the handlers use when something happens."""
    folder = Path(texts.__file__).parent
    sources = "".join((folder / name).read_text(encoding="utf-8") for name in ("page.js", "handlers.py"))
    return {key for call in re.findall(r"\btext\(([^)]*)\)", sources) for key in re.findall(r'"(\w+)"', call)}


def own(language: str) -> dict[str, str]:
    return json.loads((texts.FOLDER / f"{language}.json").read_text(encoding="utf-8"))


def test_no_text_of_the_page_is_outside_of_the_translations(config: dict[str, Any]) -> None:
    codes = {"layer1.0.conv1=0.3", "SM86 SM89", "layer1=4 conv1=4/8 fc=32"}
    strangers = [
        (where, text)
        for where, text in static_texts(config)
        if "__i18n__" not in text and not NO_WORDS.fullmatch(text) and text not in codes and not text.startswith("[{")
    ]
    assert strangers == []


def test_a_text_holds_one_mark_because_gradio_replaces_one(config: dict[str, Any]) -> None:
    assert [text for _, text in static_texts(config) if text.count("__i18n__") > 1] == []


@pytest.mark.parametrize("language", OTHERS)
def test_every_key_is_in_each_language_and_in_use(config: dict[str, Any], language: str) -> None:
    needed = used(config) | {"section_more"}  # for a new field of Request
    assert set(own(language)) == needed
    assert set(own(texts.ENGLISH)) == needed - set(texts.field_texts())
    assert all(text.strip() for text in own(language).values())


@pytest.mark.parametrize("language", OTHERS)
def test_placeholders_and_tags_agree(language: str) -> None:
    english = own(texts.ENGLISH) | texts.field_texts()
    for key, text in own(language).items():
        for inner in (r"\{\w*\}", r"</?\w+>"):
            assert sorted(re.findall(inner, text)) == sorted(re.findall(inner, english[key])), key


@pytest.mark.parametrize("language", OTHERS)
def test_what_is_typed_is_called_the_same_in_every_language(language: str) -> None:
    for name, field in Request.model_fields.items():
        for code in re.findall(r"`([^`]+)`", field.description or ""):
            assert code in own(language).get(f"help_{name}", code), (name, code)


def test_every_language_is_one_that_gradio_chooses() -> None:
    assets = Path(gr.__file__).parent / "templates" / "frontend" / "assets"
    for language in texts.all_texts():
        assert language == texts.ENGLISH or [*assets.glob(f"{language}-*.js")], f"Gradio has no {language}"


def test_a_missing_text_is_english_in_markup_and_an_unknown_key_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "en.json").write_text((texts.FOLDER / "en.json").read_text(encoding="utf-8"), encoding="utf-8")
    (tmp_path / "fr.json").write_text('{"try_title": "Essayer"}', encoding="utf-8")
    monkeypatch.setattr(texts, "FOLDER", tmp_path)
    french = texts.all_texts.__wrapped__()["fr"]
    assert french["try_head"].startswith('<h2>Essayer</h2><p class="soft">Classify an image')
    assert "hero_title" not in french
    with pytest.raises(KeyError, match="no_such_key"):
        texts.text("no_such_key")


@pytest.mark.browser
def test_the_page_is_chinese_for_a_chinese_visitor(browser: Browser, server) -> None:  # noqa: F811
    with browser.new_context(locale="zh-CN") as context:
        page = watched(context, server.url)
        page.goto(server.url)
        expect(page.get_by_role("heading", level=1)).to_contain_text("让图像分类模型更小、更快", timeout=60_000)
        expect(page.locator("html")).to_have_attribute("lang", "zh-CN")
        expect(page.get_by_role("radio", name="我的检查点")).to_be_visible()
        page.get_by_role("button", name="所有其他设置").click()
        expect(page.get_by_label("微调轮数")).to_have_value("4")
        expect(page.locator("body")).not_to_contain_text("__i18n__")
        expect(page.locator("body")).not_to_contain_text("espalier:")
        page.get_by_role("radio", name="我的检查点").check()
        page.get_by_role("button", name="开始压缩").click()
        expect(page.locator(".side .alert")).to_contain_text(
            "No checkpoint was chosen"
        )  # the server's words are English
        page.get_by_role("radio", name="自动").check()
        page.get_by_role("button", name="开始压缩").click()
        expect(page.get_by_role("heading", name="试一试")).to_be_visible(timeout=60_000)
        page.get_by_role("button", name="重命名、保留或删除").click()
        asked = []
        page.once("dialog", lambda dialog: (asked.append(dialog.message), dialog.dismiss()))
        page.get_by_role("button", name="删除此运行").click()
        expect(page.get_by_role("heading", name="试一试")).to_be_visible()
        assert asked == ["要删除此运行及其文件吗?此操作无法撤销。"]
        assert page.trouble == []


@pytest.mark.browser
def test_a_language_that_the_page_does_not_have_is_told_as_english(browser: Browser, server) -> None:  # noqa: F811
    with browser.new_context(locale="de-DE") as context:
        page = watched(context, server.url)
        page.goto(server.url)
        expect(page.get_by_role("heading", level=1)).to_contain_text("Make an image classifier", timeout=60_000)
        expect(page.locator("html")).to_have_attribute("lang", "en")
        assert page.trouble == []
