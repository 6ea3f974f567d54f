"""The Inspector tab: a prompt, the answer, the tokens, the neurons of a token, and where a neuron fires."""

import json
from typing import Any, NamedTuple

import gradio as gr
import view
from gradio.components import Component
from page import LISTINGS, MAX_NEW_TOKENS, Page, Seen
from panel import HERE, LIGHT, Panel, joined_scripts, linked_html, neuron_panel, slider

from safesail.neurons import WEAK_BELOW

__all__ = ["MODEL", "InspectorTab", "inspector_tab"]

MODEL = "model"
"""The concurrency group of all that runs the language model: one at a time."""

READING = """**How to read this.** The colour of a token and the number under it are its *strength*: the activation of
the strongest neuron of the chosen domains whose score is above the chosen one. An activation of 1 is a strong one for
that neuron: its 99.9 % quantile over the corpus, or for a rare neuron the median where it fires. The *score* is the
correlation of where the explanation says the neuron fires with where it does, 1 at best: a score of 0.2 or less is
*weak*, the explanation hardly predicts where the neuron fires."""


class InspectorTab(NamedTuple):
    """What links and the language choice reach of the tab."""

    asked: list[Component]
    """The fields of `page.Asked`."""
    filters: list[Component]
    """The fields of `page.Filter`, the language left out."""
    wanted: gr.State
    shown: list[Any]
    """What `Page.run` gives."""
    seen: gr.State
    panel: Panel


def inspector_tab(page: Page, language: Component) -> InspectorTab:
    """The components of the tab, and the events between them."""
    asked, run, stop = _question(page)
    answer = gr.Textbox(label="Answer", lines=2, max_lines=12, interactive=False, elem_id="answer")
    strip = gr.HTML(
        view.waiting("Run a prompt to see its tokens; then choose a token to see the neurons that fire on it."),
        html_template='<div class="strip" role="toolbar" aria-label="Tokens; the arrow keys move between them"></div>',
        js_on_load=joined_scripts("walk.js", "strip.js"),
        apply_default_css=False,
        elem_id="strip",
    )
    with gr.Column(visible=False) as details:
        filters = _filters(page)
        headline = gr.HTML("", js_on_load=None, elem_id="headline")
        with gr.Row():
            with gr.Column(scale=3, min_width=500):
                table = linked_html("neurons")
            panel = neuron_panel(page, "inspector", language)
        gr.Markdown(READING)
    seen: gr.State = gr.State(None, time_to_live=3600)
    wanted: gr.State = gr.State(None)
    shown = [answer, strip, headline, table, seen, details, panel.column, wanted]
    tab = InspectorTab(asked, filters, wanted, shown, seen, panel)
    controls = [*filters, language]
    running = gr.on(
        [run.click, asked[0].submit],  # type: ignore[attr-defined]  # the prompt is a Textbox
        page.run,
        [wanted, *asked, *controls],
        shown,
        api_visibility="private",
        show_progress="minimal",
        show_progress_on=answer,
        concurrency_limit=1,
        concurrency_id=MODEL,
    )
    stop.click(page.stop, seen, [strip, details], cancels=[running], **LIGHT)
    _looking(page, tab, [strip, headline, table], controls)
    return tab


def _looking(page: Page, tab: InspectorTab, outputs: list[Any], controls: list[Any]) -> None:
    """The events after a run: a token, a neuron, a filter, and a place where a neuron fires."""
    strip, headline, table = outputs
    seen, panel, language = tab.seen, tab.panel, controls[-1]
    places = [seen, *controls]

    def choose(seen: Seen | None, a: Any, b: Any, c: Any, d: Any, e: Any, f: Any, event: gr.SelectData) -> Any:
        return page.select(seen, int(event.value), a, b, c, d, e, f)

    def go(seen: Seen | None, a: Any, b: Any, c: Any, d: Any, e: Any, f: Any, event: gr.SelectData) -> Any:
        chosen = seen._replace(index=int(event.value)) if seen else None
        return page.show(chosen, a, b, c, d, e, f)

    def open_neuron(seen: Seen | None, language: str, event: gr.SelectData) -> Any:
        return page.open(str(event.value), language, seen, linked=True)

    strip.select(choose, places, [headline, table, seen], **LIGHT)
    panel.where.select(go, places, [strip, headline, table, seen], **LIGHT)
    table.select(open_neuron, [seen, language], panel.outputs, **LIGHT)
    domains, hook_point, above, words, listing = tab.filters
    chosen = [domains.input, hook_point.input, listing.input, language.change]  # type: ignore[attr-defined]
    changed = [*chosen, above.input, above.release, words.change]  # type: ignore[attr-defined]
    gr.on(changed, page.recolour, places, strip, **LIGHT)


def _question(page: Page) -> tuple[list[Component], gr.Button, gr.Button]:
    """The prompt, its settings and the buttons; the components in the order of `page.Asked`."""
    with gr.Row():
        prompt = gr.Textbox(
            label="Prompt",
            lines=3,
            max_lines=12,
            scale=4,
            elem_id="prompt",
            placeholder="Type a question or any text",
            info=f"Up to {page.max_tokens:,} tokens, answer included. Ctrl-Enter or Shift-Enter runs it.",
        )
        mode = gr.Radio(
            [("Chat", "chat"), ("Raw text", "raw")],
            value="chat",
            label="Mode",
            info="Chat answers the prompt; raw text goes on from it.",
            min_width=220,
        )
    examples = json.loads((HERE / "examples.json").read_text(encoding="utf-8"))
    gr.Examples(examples, prompt, label="Examples", api_visibility="private")
    with gr.Accordion("System prompt and settings", open=False):
        system = gr.Textbox(label="System prompt", placeholder="Empty: the chat template's own", lines=1, max_lines=6)
        with gr.Row():
            n = gr.Slider(0, MAX_NEW_TOKENS, 48, step=1, label="Max new tokens", info="0 inspects the prompt only.")
            temperature = gr.Slider(0, 2, 0, step=0.1, label="Temperature", info="0 takes the likeliest token.")
            seed = gr.Number(0, label="Seed", precision=0, minimum=0, info="For a temperature above 0.")
    with gr.Row():
        run = gr.Button("Run", variant="primary", elem_id="run", scale=0, min_width=160)
        stop = gr.Button("Stop", scale=0, min_width=160)
    return [prompt, mode, system, n, temperature, seed], run, stop


def _filters(page: Page) -> list[Component]:
    """The controls of which neurons are seen, in the order of `page.Filter`."""
    database = page.database
    with gr.Row(equal_height=True):
        choices = [(view.title(domain), domain) for domain in database.domains]
        domains = gr.CheckboxGroup(
            choices, value=database.domains, label="Colour the tokens by neurons of", scale=2, min_width=330
        )
        above = slider(
            0, 1, WEAK_BELOW, step=0.05, label="… whose score is above (0: all)", elem_id="above", min_width=330
        )
    with gr.Row():
        hook_points = [("All hook points", ""), *((name, name) for name in page.inspector.saes)]
        hook_point = gr.Dropdown(hook_points, value="", label="Hook point", min_width=220)
        words = gr.Textbox(label="Words in the explanation or id", min_width=220, elem_id="words")
        listing = gr.Radio(
            [(text, name) for name, text in LISTINGS.items()],
            value="explained",
            label="List of the token's neurons",
            scale=2,
            min_width=330,
            elem_id="listing",
        )
    return [domains, hook_point, above, words, listing]
