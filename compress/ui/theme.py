"""Colours, fonts and the page's own script. Every pair of text and background has a contrast of at least 4.5 to 1."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from gradio.themes import Base
from gradio.themes.utils import colors, sizes

_HERE = Path(__file__).parent
STYLE = (_HERE / "page.css").read_text(encoding="utf-8")
_SCRIPT = (_HERE / "page.js").read_text(encoding="utf-8")


def head(languages: Iterable[str]) -> str:
    """The HTML of the page's head, for a page in these languages."""
    script = _SCRIPT.replace('["en"]', json.dumps([*languages]))
    return f'<meta name="viewport" content="width=device-width, initial-scale=1"><script>{script}</script>'


_LEAF = colors.Color(
    name="leaf",
    c50="#eef7f1",
    c100="#d8ecdf",
    c200="#b4d9c1",
    c300="#86c09b",
    c400="#56a375",
    c500="#358757",
    c600="#256d45",
    c700="#1d5738",
    c800="#19462f",
    c900="#153a28",
    c950="#0a2116",
)
_PAPER = colors.Color(
    name="paper",
    c50="#faf9f7",
    c100="#f3f2ee",
    c200="#e5e4de",
    c300="#d0cfc7",
    c400="#a2a39b",
    c500="#73766f",
    c600="#565a54",
    c700="#414540",
    c800="#262a27",
    c900="#1a1e1b",
    c950="#111412",
)
_FONT = ("system-ui", "-apple-system", "Segoe UI", "Roboto", "Noto Sans", "sans-serif")
_MONO = ("ui-monospace", "SF Mono", "Menlo", "Consolas", "Liberation Mono", "monospace")


_VALUES = {
    "body_background_fill": "*neutral_50",
    "body_background_fill_dark": "*neutral_950",
    "body_text_color": "*neutral_900",
    "body_text_color_dark": "*neutral_100",
    "body_text_color_subdued": "*neutral_600",
    "body_text_color_subdued_dark": "*neutral_400",
    "background_fill_primary": "white",
    "background_fill_primary_dark": "*neutral_900",
    "background_fill_secondary": "*neutral_50",
    "background_fill_secondary_dark": "*neutral_950",
    "border_color_primary": "*neutral_200",
    "border_color_primary_dark": "*neutral_800",
    "block_background_fill": "transparent",
    "block_background_fill_dark": "transparent",
    "block_border_width": "0px",
    "block_border_width_dark": "0px",
    "block_shadow": "none",
    "block_shadow_dark": "none",
    "block_padding": "0",
    "block_radius": "0",
    "form_gap_width": "0px",
    "block_label_background_fill": "transparent",
    "block_label_background_fill_dark": "transparent",
    "block_label_border_width": "0px",
    "block_label_border_width_dark": "0px",
    "block_label_text_color": "*neutral_700",
    "block_label_text_color_dark": "*neutral_300",
    "block_title_text_color": "*neutral_800",
    "block_title_text_color_dark": "*neutral_200",
    "block_title_text_weight": "600",
    "block_info_text_color": "*neutral_600",
    "block_info_text_color_dark": "*neutral_400",
    "input_background_fill": "white",
    "input_background_fill_dark": "*neutral_950",
    "input_border_width": "1px",
    "input_border_width_dark": "1px",
    "input_border_color": "*neutral_400",
    "input_border_color_dark": "*neutral_600",
    "input_border_color_focus": "*primary_600",
    "input_border_color_focus_dark": "*primary_400",
    "input_placeholder_color": "*neutral_600",
    "input_placeholder_color_dark": "*neutral_400",
    "checkbox_label_background_fill": "transparent",
    "checkbox_label_background_fill_dark": "transparent",
    "checkbox_label_background_fill_selected": "*primary_50",
    "checkbox_label_background_fill_selected_dark": "*primary_950",
    "checkbox_label_border_width": "1px",
    "checkbox_label_border_width_dark": "1px",
    "checkbox_label_border_color": "*neutral_300",
    "checkbox_label_border_color_dark": "*neutral_700",
    "checkbox_label_border_color_selected": "*primary_600",
    "checkbox_label_border_color_selected_dark": "*primary_400",
    "checkbox_label_text_color_selected": "*primary_800",
    "checkbox_label_text_color_selected_dark": "*primary_200",
    "checkbox_background_color_selected": "*primary_600",
    "checkbox_background_color_selected_dark": "*primary_600",
    "checkbox_border_color_selected": "*primary_600",
    "checkbox_border_color_selected_dark": "*primary_400",
    "slider_color": "*primary_600",
    "slider_color_dark": "*primary_400",
    "button_large_radius": "10px",
    "button_medium_radius": "8px",
    "button_small_radius": "8px",
    "button_primary_background_fill": "*primary_600",
    "button_primary_background_fill_dark": "*primary_600",
    "button_primary_background_fill_hover": "*primary_700",
    "button_primary_background_fill_hover_dark": "*primary_700",
    "button_primary_text_color": "white",
    "button_primary_text_color_dark": "white",
    "button_secondary_background_fill": "transparent",
    "button_secondary_background_fill_dark": "transparent",
    "button_secondary_background_fill_hover": "*neutral_100",
    "button_secondary_background_fill_hover_dark": "*neutral_800",
    "button_secondary_border_color": "*neutral_300",
    "button_secondary_border_color_dark": "*neutral_700",
    "button_secondary_text_color": "*neutral_800",
    "button_secondary_text_color_dark": "*neutral_200",
    "button_cancel_background_fill": "transparent",
    "button_cancel_background_fill_dark": "transparent",
    "button_cancel_background_fill_hover": "#fbeaea",
    "button_cancel_background_fill_hover_dark": "#3a1a1a",
    "button_cancel_border_color": "#b3261e",
    "button_cancel_border_color_dark": "#f2a19b",
    "button_cancel_text_color": "#a01f18",
    "button_cancel_text_color_dark": "#f2a19b",
    "button_cancel_text_color_hover": "#a01f18",
    "button_cancel_text_color_hover_dark": "#f2a19b",
    "button_border_width": "1px",
    "button_border_width_dark": "1px",
    "link_text_color": "*primary_700",
    "link_text_color_dark": "*primary_300",
    "link_text_color_hover": "*primary_800",
    "link_text_color_hover_dark": "*primary_200",
    "link_text_color_visited": "*primary_700",
    "link_text_color_visited_dark": "*primary_300",
    "loader_color": "*primary_600",
}
"""Gradio's theme variables; `*name` refers to another variable."""


class EspalierTheme(Base):
    """Paper, ink and leaf green; system fonts, so that nothing is fetched from other servers."""

    def __init__(self) -> None:
        super().__init__(
            primary_hue=_LEAF,
            secondary_hue=_LEAF,
            neutral_hue=_PAPER,
            font=_FONT,
            font_mono=_MONO,
            radius_size=sizes.radius_md,
            spacing_size=sizes.spacing_md,
            text_size=sizes.text_md,
        )
        self.name = "espalier"
        super().set(**_VALUES)
