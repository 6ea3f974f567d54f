"""What every tab has: the panel of a neuron (where it fires, its card, its examples behind a warning), and sliders."""

from pathlib import Path
from typing import Any, NamedTuple

import gradio as gr
from gradio.components import Component
from page import Page

__all__ = ["LIGHT", "Panel", "joined_scripts", "linked_html", "neuron_panel", "slider"]

HERE = Path(__file__).resolve().parent
LIGHT: dict[str, Any] = {
    "api_visibility": "private",
    "queue": False,
    "show_progress": "hidden",
    "trigger_mode": "always_last",
}
"""Options of the page's own small events: they answer while the model is busy, and no click is lost."""


class Panel(NamedTuple):
    """The panel's parts."""

    neuron: gr.State
    """The id of the neuron that is shown, or None."""
    column: gr.Column
    where: gr.HTML
    card: gr.HTML
    ask: gr.Button
    examples: gr.HTML

    @property
    def outputs(self) -> list[Any]:
        """What `Page.open` gives."""
        return list(self)


def linked_html(elem_id: str, value: Any = "", *, scripts: tuple[str, ...] = ("links.js",), **options: Any) -> gr.HTML:
    """HTML whose buttons (`data-kind`, `data-value`) reach Python as a select event: index is the kind."""
    return gr.HTML(value, js_on_load=joined_scripts(*scripts), apply_default_css=False, elem_id=elem_id, **options)


def joined_scripts(*names: str) -> str:
    """The scripts of these files as one, which an element runs when it is loaded."""
    return "\n".join((HERE / name).read_text(encoding="utf-8") for name in names)


def slider(minimum: float, maximum: float, value: float, **options: Any) -> gr.Slider:
    """A slider that takes what its number box holds while it is typed in: nothing is the least, too much the most.

    Gradio answers both with an error. A class of our own would be no way out: gradio writes a file beside each.
    """
    made = gr.Slider(minimum, maximum, value, **options)
    within = made.preprocess

    def preprocess(payload: float | None) -> float:
        return within(min(max(minimum if payload is None else payload, minimum), maximum))

    made.preprocess = preprocess
    return made


def neuron_panel(page: Page, name: str, language: Component, *, linked: bool = True) -> Panel:
    """The panel, closed. name: tells its elements from those of the other tabs; linked: whether its card leads away."""

    def translate(id: str | None, language: str) -> Any:
        return page.card(id, language, linked=linked) if id else gr.skip()

    neuron = gr.State(None)
    with gr.Column(visible=False, elem_id=f"{name}-panel", scale=2, min_width=330) as column:
        close = gr.Button("Close", size="sm", scale=0, min_width=80, elem_classes="close")
        where = linked_html(f"{name}-where")
        card = linked_html(f"{name}-card", scripts=("links.js", "panel.js"))
        ask = gr.Button("Show examples: they may contain offensive text", elem_id=f"{name}-ask")
        examples = linked_html(f"{name}-examples")
    panel = Panel(neuron, column, where, card, ask, examples)
    close.click(lambda: (None, gr.update(visible=False)), None, [neuron, column], **LIGHT)
    language.change(translate, [neuron, language], card, **LIGHT)  # type: ignore[attr-defined]  # a Dropdown
    ask.click(page.show_examples, neuron, [examples, ask], **{**LIGHT, "show_progress": "minimal"})
    return panel
