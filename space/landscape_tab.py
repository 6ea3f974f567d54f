"""The Landscape tab: a map of the neurons' decoder directions, and each neuron's card."""

from typing import Any

import gradio as gr
import view
from gradio.components import Component
from landscape import as_json
from page import Page
from panel import HERE, LIGHT, neuron_panel

__all__ = ["landscape_tab"]

SCRIPTS = ("landscape.js", "landscape_input.js")


def landscape_tab(page: Page, language: Component, opened: Any) -> None:
    """The components of the tab, and the events between them. opened: the event of the tab's first sight."""
    with gr.Row():
        with gr.Column(scale=3, min_width=330):
            plot = gr.HTML(
                as_json(view.waiting("Reading the landscape…")),
                html_template='<div class="landscape"></div>',
                js_on_load="\n".join((HERE / name).read_text(encoding="utf-8") for name in SCRIPTS),
                apply_default_css=False,
                elem_id="landscape",
            )
        panel = neuron_panel(page, "landscape", language)
    drawn: gr.State = gr.State(None)

    def draw(language: str, drawn: str | None) -> Any:
        """The plot in a language, once: it is the largest answer of the page."""
        return (gr.skip(), drawn) if drawn == language else (as_json(page.landscape(language)), language)

    def draw_again(language: str, drawn: str | None) -> Any:
        return (gr.skip(), None) if drawn is None else draw(language, drawn)

    def open_neuron(language: str, event: gr.SelectData) -> Any:
        return page.open(str(event.value), language, None, linked=True)

    opened(draw, [language, drawn], [plot, drawn], **LIGHT)
    language.change(draw_again, [language, drawn], [plot, drawn], **LIGHT)  # type: ignore[attr-defined]
    plot.select(open_neuron, language, panel.outputs, **LIGHT)
