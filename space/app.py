"""The Space of a release, as a web page and an API: token inspector, neuron database and landscape; or, of a reward
model, two answers side by side.

    SAFESAIL_RELEASE   a run folder (`runs/demo`) or the Hub name its repositories start with (`org/demo`); on the Hub,
                       a Space called `org/demo-inspector` needs no setting
    SAFESAIL_MODEL     load the language model from here instead
    SAFESAIL_HOST, SAFESAIL_PORT   127.0.0.1 and 7860; on the Hub the page is open to all hosts

API, for `gradio_client`: `/inspect`, `/neuron` and `/search`, documented at the functions of `page.Page`; of a reward
model `/compare` and `/pair`, at those of `reward_page.RewardPage`.
"""

import ctypes
import os
import sys
from pathlib import Path
from typing import Any

import gradio as gr
import reward_app
import torch
from diagnosis import Diagnosis
from diagnosis_tabs import interventions_tab, knowledge_tab, monitor_tab, trajectories_tab
from gradio.components import Component
from gradio.events import api
from gradio.themes import Base, Default
from inspector_tab import MODEL, InspectorTab, inspector_tab
from landscape_tab import landscape_tab
from neurons_tab import NeuronsTab, neurons_tab
from page import SESSIONS, Page
from panel import HERE, LIGHT

from safesail.diagnosis.inspector import Inspector
from safesail.errors import InputError
from safesail.repository import parts_of_release
from safesail.rewards.inspector import RewardInspector

MAX_WAITING = 64
"""Visitors whose question waits; the next is told to come back."""
SAFETY = """**What this is.** Explanations were written by a language model from the texts on which a neuron fires, and
may be wrong: they describe, they do not prove what the model thinks. A neuron with a score below 0.2 is not to be
relied upon. Some explanations, prompts and answers are about violence, terror, pornography or politics and may offend;
the answers are the model's own."""


def build(inspector: Inspector) -> gr.Blocks:
    """The page over an inspector; nothing is started."""
    page = Page(inspector)
    diagnosis = Diagnosis(page)
    with gr.Blocks(title="safesail token inspector", analytics_enabled=False) as blocks:
        gr.Markdown(f"# safesail token inspector\n\n{_about(inspector)}")
        language = _language(inspector.database.languages)
        with gr.Tabs() as tabs:
            with gr.Tab("Inspector", id="inspector"):
                inspecting = inspector_tab(page, language)
            with gr.Tab("Neurons", id="neurons"):
                neurons = neurons_tab(page, language)
            with gr.Tab("Landscape", id="landscape") as landscape:
                landscape_tab(page, language, landscape.select)
            with gr.Tab("Trajectories", id="trajectories"):
                trajectories_tab(diagnosis, language)
            with gr.Tab("Interventions", id="interventions"):
                interventions_tab(diagnosis, language)
            with gr.Tab("Knowledge", id="knowledge"):
                knowledge_tab(diagnosis, language)
            with gr.Tab("Monitor", id="monitor"):
                monitor_tab(diagnosis, language)
        gr.Markdown(SAFETY)
        _links(page, tabs, inspecting, neurons, language)
        api(page.inspect, api_name="inspect", concurrency_limit=1, concurrency_id=MODEL)
        api(page.neuron, api_name="neuron")
        api(page.search, api_name="search")
    return blocks.queue(max_size=MAX_WAITING)


def _language(languages: list[str]) -> Component:
    """The choice of the explanations' language, there only where there is one."""
    return gr.Dropdown(
        languages or [""],
        value=languages[0] if languages else "",
        label="Explanations in",
        visible=len(languages) > 1,
        scale=0,
        min_width=180,
        elem_id="language",
    )


def _links(page: Page, tabs: gr.Tabs, inspecting: InspectorTab, neurons: NeuronsTab, language: Component) -> None:
    """What an address after # opens: a neuron's card, or a prompt that is run again."""
    script = (HERE / "route.js").read_text(encoding="utf-8")
    route = gr.HTML("", js_on_load=script, apply_default_css=False, elem_id="route", container=False)

    def open_neuron(language: str, event: gr.SelectData) -> Any:
        id = page.linked_neuron(str(event.value))
        return gr.Tabs(selected="neurons"), *page.open(id, language, None, linked=False)

    def ask(event: gr.EventData) -> Any:
        return gr.Tabs(selected="inspector"), *page.linked_prompt(str(event.value))

    queued = {**LIGHT, "queue": True, "concurrency_limit": None}  # errors of events outside the queue are not shown
    route.select(open_neuron, language, [tabs, *neurons.panel.outputs], **queued)
    asked = route.submit(ask, None, [tabs, *inspecting.asked, inspecting.wanted], **queued)
    asked.success(
        page.run,
        [inspecting.wanted, *inspecting.asked, *inspecting.filters, language],
        inspecting.shown,
        api_visibility="private",
        show_progress="minimal",
        show_progress_on=inspecting.shown[0],
        concurrency_limit=1,
        concurrency_id=MODEL,
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
    sheets = [HERE / name for name in ("style.css", "landscape.css", "reward.css")]
    style = {"theme": theme(), "css_paths": sheets, "footer_links": ["api", "settings"]}
    kept = {"state_session_capacity": SESSIONS}
    settings: dict[str, Any] = {"share": False, "ssr_mode": False, "quiet": True, **kept, **style, **options}
    return blocks.launch(**settings)


def few_arenas() -> None:
    """Keep what the C library holds back small: gradio's many threads would each get an arena of freed activations.

    M_ARENA_MAX of glibc; another C library, which has no mallopt, is left as it is.
    """
    if mallopt := getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None:
        mallopt(-8, 2)


def page_of(release: str, model: str | None) -> gr.Blocks:
    """The page of a release of either kind. model: in place of the language model that the release names."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if "reward" not in parts_of_release(release):
        return build(Inspector.from_pretrained(release, model=model, device=device))
    if model:
        raise InputError(f"{release} has its own reward model and takes no other; leave SAFESAIL_MODEL (--model) out.")
    return reward_app.build(RewardInspector.from_pretrained(release, device=device)).queue(max_size=MAX_WAITING)


def main() -> None:
    """Load the release that the environment names, and serve it."""
    few_arenas()
    space = os.environ.get("SPACE_ID", "")
    release = os.environ.get("SAFESAIL_RELEASE") or space.removesuffix("-inspector")
    if not release:
        raise InputError(
            "SAFESAIL_RELEASE is not set; set it to a run folder like runs/demo or a Hub name like org/demo."
        )
    host = os.environ.get("SAFESAIL_HOST", "0.0.0.0" if space else "127.0.0.1")
    port = os.environ.get("SAFESAIL_PORT", "7860")
    if not (port.isdecimal() and int(port) < 2**16):
        raise InputError(f"SAFESAIL_PORT is {port!r}; set it to a number, as 7860.")
    blocks = page_of(release, os.environ.get("SAFESAIL_MODEL") or None)
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
        print(f"safesail: {error}", file=sys.stderr)
        sys.exit(2)
