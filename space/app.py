"""The token inspector of a release, as a web page and an API: a view over `safesail.Inspector`.

    SAFESAIL_RELEASE   a run folder (`runs/demo`) or the Hub name its repositories start with (`org/demo`); on the Hub,
                       a Space called `org/demo-inspector` needs no setting
    SAFESAIL_MODEL     load the language model from here instead
    SAFESAIL_HOST, SAFESAIL_PORT   127.0.0.1 and 7860; on the Hub the page is open to all hosts

API, for `gradio_client`: `/inspect`, `/neuron` and `/search`, documented at the functions of `page.Page`.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

import gradio as gr
import torch
import view
from gradio.components import Component
from gradio.events import api
from gradio.themes import Base, Default
from page import MAX_NEW_TOKENS, Page

from safesail.diagnosis.inspector import Inspector
from safesail.errors import InputError
from safesail.neurons import WEAK_BELOW

HERE = Path(__file__).resolve().parent
MODEL = "model"
"""The concurrency group of all that runs the language model: one at a time."""
LIGHT: dict[str, Any] = {
    "api_visibility": "private",
    "queue": False,
    "show_progress": "hidden",
    "trigger_mode": "always_last",
}
"""Options of the page's own small events: they answer while the model is busy, and no click is lost."""

READING = """**How to read this.** The colour of a token and the number under it are its *strength*: the activation of
the strongest neuron of the chosen domains whose score is above the chosen one. An activation of 1 is a strong one for
that neuron: its 99.9 % quantile over the corpus, or for a rare neuron the median where it fires. The *score* is the
correlation of where the explanation says the neuron fires with where it does, 1 at best: a score of 0.2 or less is
*weak*, the explanation hardly predicts where the neuron fires."""
SAFETY = """**What this is.** Explanations were written by a language model from the texts on which a neuron fires, and
may be wrong: they describe, they do not prove what the model thinks. A neuron with a score below 0.2 is not to be
relied upon. Some explanations, prompts and answers are about violence, terror, pornography or politics and may offend;
the answers are the model's own."""


def build(inspector: Inspector) -> gr.Blocks:
    """The page over an inspector; nothing is started."""
    page = Page(inspector)
    with gr.Blocks(title="safesail token inspector", analytics_enabled=False) as blocks:
        gr.Markdown(f"# safesail token inspector\n\n{_about(inspector)}")
        with gr.Tab("Inspector"):
            _inspector_tab(page)
        with gr.Tab("Neurons"):
            _neurons_tab(page)
        gr.Markdown(SAFETY)
        api(page.inspect, api_name="inspect", concurrency_limit=1, concurrency_id=MODEL)
        api(page.neuron, api_name="neuron")
        api(page.search, api_name="search")
    return blocks.queue(max_size=32)


def _inspector_tab(page: Page) -> None:
    """Prompt, settings, answer, tokens and neurons, and the events between them."""
    domains = page.database.domains
    limit = page.inspector.max_tokens
    with gr.Row():
        prompt = gr.Textbox(
            label="Prompt",
            lines=3,
            max_lines=12,
            scale=4,
            elem_id="prompt",
            placeholder="Type a question or any text",
            info=f"Up to {limit:,} tokens, answer included. Ctrl-Enter or Shift-Enter runs it.",
        )
        mode = gr.Radio(
            [("Chat", "chat"), ("Raw text", "raw")],
            value="chat",
            label="Mode",
            info="Chat answers the prompt; raw text goes on from it.",
            min_width=220,
        )
    gr.Examples(json.loads((HERE / "examples.json").read_text()), prompt, label="Examples", api_visibility="private")
    settings = _settings()
    with gr.Row():
        run = gr.Button("Run", variant="primary", elem_id="run", scale=0, min_width=160)
        stop = gr.Button("Stop", scale=0, min_width=160)
    answer = gr.Textbox(label="Answer", lines=2, max_lines=12, interactive=False, elem_id="answer")
    strip = gr.HTML(
        view.waiting("Run a prompt to see its tokens; then choose a token to see the neurons that fire on it."),
        html_template='<div class="strip" role="toolbar" aria-label="Tokens; the arrow keys move between them"></div>',
        js_on_load=(HERE / "strip.js").read_text(),
        apply_default_css=False,
        elem_id="strip",
    )
    with gr.Column(visible=False) as details:
        with gr.Row(equal_height=True):
            choices = [(view.title(domain), domain) for domain in domains]
            chosen = gr.CheckboxGroup(
                choices, value=domains, label="Colour the tokens by neurons of", scale=2, min_width=330
            )
            above = gr.Slider(
                0, 1, WEAK_BELOW, step=0.05, label="… whose score is above (0: all)", elem_id="above", min_width=330
            )
        headline = gr.HTML("", js_on_load=None, elem_id="headline")
        explained = gr.Checkbox(True, label="List only neurons with an explanation", container=False)
        table = _table(view.NEURONS, [105, 230, 120, 150, 155, 120, 155, 165], "neurons", "Neurons of the token")
        gr.Markdown(READING)
    seen = gr.State(None, time_to_live=3600)

    asked = [prompt, mode, *settings, chosen, above, explained]
    shown = [strip, headline, table, seen]
    running = gr.on(
        [run.click, prompt.submit],
        page.run,
        asked,
        [answer, *shown, details],
        api_visibility="private",
        show_progress="minimal",
        show_progress_on=answer,
        concurrency_limit=1,
        concurrency_id=MODEL,
    )
    stop.click(page.stop, seen, [strip, details], cancels=[running], **LIGHT)
    strip.select(page.select, [seen, chosen, above, explained], shown[1:], **LIGHT)
    gr.on([chosen.input, above.release, explained.input], page.show, [seen, chosen, above, explained], shown, **LIGHT)


def _settings() -> list[Component]:
    """System prompt, answer length, temperature and seed, in a closed accordion."""
    with gr.Accordion("System prompt and settings", open=False):
        system = gr.Textbox(label="System prompt", placeholder="Empty: the chat template's own", lines=1, max_lines=6)
        with gr.Row():
            n = gr.Slider(0, MAX_NEW_TOKENS, 48, step=1, label="Max new tokens", info="0 inspects the prompt only.")
            temperature = gr.Slider(0, 2, 0, step=0.1, label="Temperature", info="0 takes the likeliest token.")
            seed = gr.Number(0, label="Seed", precision=0, minimum=0, info="For a temperature above 0.")
    return [system, n, temperature, seed]


def _neurons_tab(page: Page) -> None:
    """A search over the neuron database."""
    with gr.Row():
        text = gr.Textbox(label="Words in the explanation, concept or id", scale=2, min_width=300, elem_id="search")
        domains = [(view.title(name), name) for name in page.database.domains]
        domain = gr.Dropdown([("All domains", ""), *domains], value="", label="Domain", min_width=220)
        hook_points = [("All hook points", ""), *((name, name) for name in page.database.hook_points)]
        hook_point = gr.Dropdown(hook_points, value="", label="Hook point", min_width=220)
        min_score = gr.Slider(0, 1, 0, step=0.05, label="Minimum score (0: all)", min_width=220)
    line, rows = page.find("", "", "", 0)
    count = gr.Markdown(line)
    widths: list[str | int] = [165, 300, 115, 130, 130, 95, 155, 115]
    table = _table(view.FOUND, widths, "found", "Neurons found", rows)
    inputs = [text, domain, hook_point, min_score]
    gr.on(
        [text.change, domain.input, hook_point.input, min_score.release],
        page.find,
        inputs,
        [count, table],
        **LIGHT,
    )


def _table(
    headers: list[str], widths: list[str | int], name: str, label: str, rows: list[view.Row] | None = None
) -> gr.Dataframe:
    """A table whose cells are plain text, never HTML or Markdown."""
    return gr.Dataframe(
        rows or [],
        headers=headers,
        datatype="str",
        type="array",
        column_widths=widths,
        wrap=True,
        interactive=False,
        max_height=520,
        label=label,
        show_label=False,
        buttons=["fullscreen", "copy"],
        elem_id=name,
    )


def _about(inspector: Inspector) -> str:
    """One sentence naming the release, the base model, the hook points and the number of neurons."""
    sae = next(iter(inspector.saes.values()))
    hook_points = ", ".join(f"`{name}`" for name in inspector.saes)
    folder = Path(inspector.release)
    name = folder.name if folder.is_dir() else inspector.release
    return (
        f"Release `{name}`: {len(inspector.database):,} explained neurons of sparse "
        f"autoencoders that read {hook_points} of `{sae.config.model_name}`."
    )


def theme() -> Base:
    """Gradio's default theme with the fonts of the visitor's system, so that the page asks no other host.

    The greys and the blue are dark enough for text: at least 4.5 to 1 against their background.
    """
    fonts: dict[str, Any] = {"font": ["system-ui", "sans-serif"], "font_mono": ["ui-monospace", "monospace"]}
    return Default(primary_hue="blue", **fonts).set(
        input_placeholder_color="*neutral_500",
        input_placeholder_color_dark="*neutral_400",
        body_text_color_subdued="*neutral_600",
        body_text_color_subdued_dark="*neutral_300",
        block_label_text_color="*body_text_color",
        block_title_text_color="*body_text_color",
        block_info_text_color="*body_text_color_subdued",
        color_accent="*primary_600",
        button_primary_background_fill="*primary_600",
        button_primary_background_fill_hover="*primary_700",
    )


def launch(blocks: gr.Blocks, **options: Any) -> Any:
    """Serve the page: no analytics, no share link, no record of runs in the visitor's browser."""
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
    os.environ.setdefault("GRADIO_RUN_HISTORY", "False")
    style = {"theme": theme(), "css_paths": HERE / "style.css", "footer_links": ["api", "settings"]}
    settings: dict[str, Any] = {"share": False, "ssr_mode": False, "quiet": True, **style, **options}
    return blocks.launch(**settings)


def main() -> None:
    """Load the release that the environment names, and serve it."""
    space = os.environ.get("SPACE_ID", "")
    release = os.environ.get("SAFESAIL_RELEASE") or space.removesuffix("-inspector")
    if not release:
        raise InputError(
            "SAFESAIL_RELEASE is not set; set it to a run folder like runs/demo or a Hub name like org/demo."
        )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    inspector = Inspector.from_pretrained(release, model=os.environ.get("SAFESAIL_MODEL") or None, device=device)
    host = os.environ.get("SAFESAIL_HOST", "0.0.0.0" if space else "127.0.0.1")
    port = os.environ.get("SAFESAIL_PORT", "7860")
    if not port.isdecimal():
        raise InputError(f"SAFESAIL_PORT is {port!r}; set it to a number, as 7860.")
    blocks = build(inspector)
    try:
        launch(blocks, server_name=host, server_port=int(port), prevent_thread_lock=True)
    except OSError as error:
        raise InputError(f"cannot serve at {host}:{port}; is the port taken? Set SAFESAIL_PORT to another.") from error
    print(f"safesail: the inspector of {release} is at http://{host}:{port} (Ctrl-C stops it)", flush=True)
    blocks.block_thread()


if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        sys.exit(f"safesail: {error}")
