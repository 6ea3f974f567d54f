"""The pages of the diagnosis: trajectories, interventions, knowledge and the monitor, each drawn when first opened."""

from collections.abc import Callable
from typing import Any

import gradio as gr
import view
from diagnosis import MAX_AMOUNT, MAX_NEW, MAX_PROMPTS, Diagnosis
from gradio.components import Component
from inspector_tab import MODEL
from page import on_gpu
from panel import LIGHT, linked_html, neuron_panel

from safesail.diagnosis.case_study import case_study
from safesail.diagnosis.interventions import CAVEAT
from safesail.diagnosis.knowledge import shipped_entities
from safesail.neurons import NeuronDatabase

__all__ = ["interventions_tab", "knowledge_tab", "monitor_tab", "trajectories_tab"]

NAMES = ("original", "second", "third")
VERSIONS = len(NAMES)
RUN: dict[str, Any] = {
    "api_visibility": "private",
    "show_progress": "minimal",
    "concurrency_limit": 1,
    "concurrency_id": MODEL,
}
"""Options of what runs the language model."""


def trajectories_tab(diagnosis: Diagnosis, language: Component) -> None:
    """One prompt, or versions of it side by side, and what leads to a neuron."""
    gr.Markdown(
        "Which concepts fire where, layer by layer and token by token: of one prompt, or of several versions of it "
        "(languages, paraphrases). What is weaker or missing in a version stands in a table of its own. A version "
        "whose name is a language's code, as zh, is compared as a text in that language."
    )
    cases = case_study()
    case = gr.Dropdown(
        [("Your own", ""), *((view.title(name), name) for name in cases)], value="", label="Built-in example", scale=0
    )
    versions: list[Component] = []
    for i in range(VERSIONS):
        with gr.Row():
            versions.append(gr.Textbox(NAMES[i], label=f"Name of version {i + 1}", scale=0, min_width=160))
            versions.append(gr.Textbox(label=f"Text of version {i + 1}", scale=4, lines=1, max_lines=6, min_width=300))
    with gr.Row():
        by = gr.Radio(["domain", "category", "neuron"], value="domain", label="Concepts by", min_width=300)
        new_tokens = gr.Slider(0, MAX_NEW, 0, step=1, label="Max new tokens (0: the text alone)", min_width=300)
    run = gr.Button("Compare", variant="primary", scale=0, min_width=160, elem_id="compare")
    result = _result(diagnosis, language, "trajectories")
    run.click(on_gpu(diagnosis.trajectories), [by, new_tokens, *versions], result, show_progress_on=result, **RUN)

    def filled(name: str) -> list[Any]:
        if not name:
            return [gr.skip()] * (2 * VERSIONS)
        chosen = list(cases[name].prompts.items())[:VERSIONS]
        return [part for version in chosen for part in version]

    case.input(filled, case, versions, **LIGHT)
    gr.Markdown("**What leads to a neuron.** Gradient × activation, through the model, from the neurons before it.")
    with gr.Row():
        text = gr.Textbox(label="Text", scale=3, lines=1, max_lines=6, min_width=300, elem_id="graph-text")
        neuron = gr.Textbox(label="Neuron", placeholder=_some_neuron(diagnosis), min_width=200, elem_id="graph-neuron")
    draw = gr.Button("Draw", scale=0, min_width=160, elem_id="draw")
    picture = _result(diagnosis, language, "graph")
    draw.click(on_gpu(diagnosis.graph), [text, neuron], picture, show_progress_on=picture, **RUN)


def interventions_tab(diagnosis: Diagnosis, language: Component) -> None:
    """Answers without and with neurons steered, clamped or ablated."""
    gr.Markdown(
        "Steer adds a multiple of a neuron's direction at every token, clamp holds the neuron at a value, ablate takes "
        "it out; what the SAE does not reconstruct stays as it is. An amount of 1 is a strong activation of the neuron."
    )
    with gr.Row():
        prompt = gr.Textbox(label="Prompt", scale=3, lines=2, max_lines=8, min_width=300, elem_id="steer-prompt")
        mode = gr.Radio([("Chat", "chat"), ("Raw text", "raw")], value="chat", label="Mode", min_width=200)
    with gr.Row():
        neurons = gr.Textbox(
            label="Neurons", placeholder=_some_neuron(diagnosis), min_width=220, elem_id="steer-neurons"
        )
        kind = gr.Radio(["steer", "clamp", "ablate"], value="steer", label="What to do", min_width=220)
        amount = gr.Slider(-MAX_AMOUNT, MAX_AMOUNT, 4, step=0.5, label="Amount", min_width=220)
    with gr.Row():
        new_tokens = gr.Slider(1, MAX_NEW, 32, step=1, label="Max new tokens", min_width=220)
        temperature = gr.Slider(0, 2, 0, step=0.1, label="Temperature", min_width=220)
        seed = gr.Number(0, label="Seed", precision=0, minimum=0, min_width=120)
    gr.Markdown(f"**Read this first.** {CAVEAT}")
    run = gr.Button("Answer twice", variant="primary", scale=0, min_width=160, elem_id="steer")
    result = _result(diagnosis, language, "interventions")
    inputs = [prompt, mode, neurons, kind, amount, new_tokens, temperature, seed]
    run.click(on_gpu(diagnosis.answers), inputs, result, show_progress_on=result, **RUN)
    with gr.Accordion("Over a list of prompts: how often does it decline?", open=False):
        texts = gr.Textbox(label=f"Prompts, one a line, at most {MAX_PROMPTS}", lines=4, max_lines=16)
        count = gr.Button("Count", scale=0, min_width=160, elem_id="decline")
        rates = _result(diagnosis, language, "rates")
        count.click(
            on_gpu(diagnosis.rates), [texts, neurons, kind, amount, new_tokens], rates, show_progress_on=rates, **RUN
        )


def knowledge_tab(diagnosis: Diagnosis, language: Component) -> None:
    """Whether a neuron that fires on a name means that the model knows it."""
    gr.Markdown(
        "Does the neuron fire on a name in a neutral sentence, and does the model go on with the right answer when it "
        "is asked about that name? A neuron can fire on names of which the model knows nothing."
    )
    with gr.Row():
        neuron = gr.Textbox(label="Neuron", placeholder=_some_neuron(diagnosis), min_width=220, elem_id="known-neuron")
        lists = shipped_entities()
        source = gr.Dropdown(lists, value=lists[0], label="List of names", min_width=220)
    own = gr.Textbox(
        label="Or your own list, one JSON object a line",
        placeholder='{"name": "Ada Lovelace", "prompt": "Ada Lovelace was a", "accepted": ["mathematician"]}',
        lines=2,
        max_lines=12,
    )
    run = gr.Button("Ask", variant="primary", scale=0, min_width=160, elem_id="know")
    result = _result(diagnosis, language, "knowledge")
    run.click(on_gpu(diagnosis.knowledge), [neuron, source, own], result, show_progress_on=result, **RUN)


def monitor_tab(diagnosis: Diagnosis, language: Component) -> None:
    """How likely a text is about each domain, by its neurons alone."""
    gr.Markdown(
        "A logistic score on the strongest activation of each of a domain's neurons, calibrated on the shipped "
        "labelled texts. Every term is shown. It tells what a text is about, not whether it does harm."
    )
    with gr.Row():
        text = gr.Textbox(label="Text", scale=3, lines=2, max_lines=8, min_width=300, elem_id="monitor-text")
        threshold = gr.Slider(0.05, 0.95, 0.5, step=0.05, label="Threshold", min_width=220)
    run = gr.Button("Score", variant="primary", scale=0, min_width=160, elem_id="score")
    result = _result(diagnosis, language, "monitor")
    run.click(on_gpu(diagnosis.risks), [text, threshold], result, show_progress_on=result, **RUN)


def _result(diagnosis: Diagnosis, language: Component, name: str) -> gr.HTML:
    """Where a result goes, and the panel that its neurons open."""
    with gr.Row():
        with gr.Column(scale=3, min_width=330):
            result = linked_html(f"{name}-result")
        panel = neuron_panel(diagnosis.page, name, language)
    opened: Callable[..., Any] = _opener(diagnosis)
    result.select(opened, language, panel.outputs, **LIGHT)
    return result


def _opener(diagnosis: Diagnosis) -> Callable[..., Any]:
    def open_neuron(language: str, event: gr.SelectData) -> Any:
        return diagnosis.page.open(str(event.value), language, None, linked=True)

    return open_neuron


def _some_neuron(diagnosis: Diagnosis) -> str:
    """The best explained neuron's id, to show what ids look like."""
    database: NeuronDatabase = diagnosis.page.database
    return next((row["neuron_id"] for row in database.search()), f"{database.hook_points[0]}/0")
