"""The Neurons tab: a search over the neuron database, with counts to narrow it by, and each neuron's card."""

from typing import Any, NamedTuple

import gradio as gr
import view
from browse import PAGE
from gradio.components import Component
from page import Page
from panel import LIGHT, Panel, linked_html, neuron_panel, slider

__all__ = ["NeuronsTab", "neurons_tab"]


class NeuronsTab(NamedTuple):
    """What links reach of the tab."""

    panel: Panel


def neurons_tab(page: Page, language: Component) -> NeuronsTab:
    """The components of the tab, and the events between them."""
    text, domains, category, hook_point, above = filters = _filters(page)
    counts = linked_html("facets")
    with gr.Row():
        with gr.Column(scale=3, min_width=500):
            table = linked_html("found")
            more = gr.Button(f"Show {PAGE} more", visible=False, elem_id="more")
        panel = neuron_panel(page, "neurons", language, linked=False)
    n_shown: gr.State = gr.State(PAGE)
    inputs, outputs = [*filters, language], [counts, table, more]

    def find(a: Any, b: Any, c: Any, d: Any, e: Any, f: Any) -> Any:
        return *page.find(a, b, c, d, e, f, PAGE), PAGE

    def find_more(a: Any, b: Any, c: Any, d: Any, e: Any, f: Any, n: int) -> Any:
        return *page.find(a, b, c, d, e, f, n + PAGE), n + PAGE

    def open_neuron(language: str, event: gr.SelectData) -> Any:
        return page.open(str(event.value), language, None, linked=False)

    chosen = [domains.change, category.change, hook_point.change, language.change]  # type: ignore[attr-defined]
    changed = [text.change, above.input, above.release, *chosen]  # type: ignore[attr-defined]
    gr.on(changed, find, inputs, [*outputs, n_shown], **LIGHT)
    more.click(find_more, [*inputs, n_shown], [*outputs, n_shown], **LIGHT)
    table.select(open_neuron, language, panel.outputs, **LIGHT)
    counts.select(_narrowed, None, [category, hook_point], **LIGHT)
    found = page.find("", [*page.database.domains, ""], "", "", 0, "", PAGE)
    counts.value, table.value, more.visible = str(found[0]), str(found[1]), found[2]["visible"]
    return NeuronsTab(panel)


def _narrowed(event: gr.SelectData) -> tuple[Any, Any]:
    """The category or the hook point whose bar was clicked."""
    chosen = gr.Dropdown(value=str(event.value))
    return (chosen, gr.skip()) if event.index == "category" else (gr.skip(), chosen)


def _filters(page: Page) -> list[Component]:
    """The words, domains, category, hook point and least score of the search."""
    database = page.database
    with gr.Row():
        text = gr.Textbox(label="Words in the explanation, concept or id", scale=2, min_width=300, elem_id="search")
        choices = [*((view.title(name), name) for name in database.domains), ("No domain", "")]
        domains = gr.CheckboxGroup(
            choices, value=[*database.domains, ""], label="Domains", scale=2, min_width=330, elem_id="domains"
        )
    categories = sorted({row["category"] for row in database if row["category"]})
    with gr.Row():
        category = gr.Dropdown(
            [("All categories", ""), *((view.title(name), name) for name in categories)],
            value="",
            label="Category",
            min_width=220,
        )
        hook_points = [("All hook points", ""), *((name, name) for name in database.hook_points)]
        hook_point = gr.Dropdown(hook_points, value="", label="Hook point", min_width=220)
        above = slider(0, 1, 0, step=0.05, label="Minimum score (0: all)", min_width=220)
    return [text, domains, category, hook_point, above]
