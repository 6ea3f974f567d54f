"""The page of a reward model's release: a chosen and a rejected answer side by side.

API, for `gradio_client`: `/compare` and `/pair`, documented at the functions of `reward_page.RewardPage`.
"""

from pathlib import Path
from typing import Any

import gradio as gr
from gradio.events import api
from inspector_tab import MODEL
from markup import tag
from panel import LIGHT, linked_html
from reward_page import KINDS, MAX_LISTED, ORDERS, SPLITS, RewardPage
from reward_view import edits_table

from safesail.rewards.inspector import RewardInspector

__all__ = ["build"]

RUN: dict[str, Any] = {
    "api_visibility": "private",
    "show_progress": "minimal",
    "concurrency_limit": 1,
    "concurrency_id": MODEL,
}
"""Options of what runs the reward model."""
POISONED = (
    "This release holds poisoned preference data: pairs whose answers were swapped on purpose, to test defences. "
    "Do not train on them."
)
ABOUT = """**What the numbers mean.** The *reward* is what the reward model gives an answer at its last token; the
*margin* is the reward of the chosen answer less that of the rejected one. *S⁺* are the safety latents of the SAE that
fire more on chosen answers of the preference data, *S⁻* those that fire more on rejected ones. *score_safe* is their
mean activation at segment ends, S⁺ less S⁻, of the chosen answer less that of the rejected one."""
CAVEATS = """**What this is not.** A latent was rated as being about safety by a model that saw the places where it
fires: the rating may be wrong, and a latent that goes with safe answers need not cause them. A small model's rewards
and latents may follow surface features, such as length or phrases of refusal. Neither number says whether an answer
does harm. Published pairs are shown as people wrote them."""


def build(inspector: RewardInspector) -> gr.Blocks:
    """The page over a reward inspector; nothing is started. The caller puts it into a queue."""
    page = RewardPage(inspector)
    with gr.Blocks(title="safesail reward inspector", analytics_enabled=False) as blocks:
        gr.Markdown(f"# safesail reward inspector\n\n{_about(inspector)}")
        if "poisoned" in inspector.parts:
            gr.HTML(tag("p", POISONED, class_="danger", role="alert"), elem_id="poisoned", apply_default_css=False)
        chosen_pair, show = _published(page)
        prompt, chosen, rejected, compare = _typed(page)
        result = linked_html("reward-result", _hint(), scripts=("walk.js", "reward.js"))
        gr.Markdown(ABOUT)
        with gr.Accordion("What editing the preference data does to the reward model", open=False):
            linked_html("edits-result", edits_table(inspector.published.comparison))
        gr.Markdown(CAVEATS)
        texts = [prompt, chosen, rejected]
        show.click(page.show, chosen_pair, [result, *texts], show_progress_on=result, **RUN)
        compare.click(page.compare_typed, texts, result, show_progress_on=result, **RUN)
        api(page.compare_texts, api_name="compare", concurrency_limit=1, concurrency_id=MODEL)
        api(page.pair, api_name="pair")
    return blocks


def _about(inspector: RewardInspector) -> str:
    """One sentence naming the release, the SAE and how many safety latents and pairs there are."""
    folder, config = Path(inspector.release), inspector.sae.config
    name = folder.name if folder.is_dir() else inspector.release
    return (
        f"Release `{name}`: a reward model, the sparse autoencoder that reads `{config.hook_point}` of it "
        f"({len(inspector.positive)} latents in S⁺, {len(inspector.negative)} in S⁻), and "
        f"{len(inspector.published.scores):,} pairs of preference data."
    )


def _hint() -> Any:
    return tag("p", "Choose a published pair, or type a prompt with two answers.", class_="quiet")


def _published(page: RewardPage) -> tuple[gr.Dropdown, gr.Button]:
    """The list of published pairs with its filters, and the button that shows the chosen one."""
    with gr.Row():
        kind = gr.Radio(_choices(KINDS), value="", label="Pairs about", min_width=220, elem_id="kind")
        split = gr.Radio(_choices(SPLITS), value="", label="Split", min_width=220, elem_id="split")
        order = gr.Radio(_choices(ORDERS), value="high", label="Order", min_width=220, elem_id="order")
    choices = page.listed("", "", "high")
    pair = gr.Dropdown(
        choices,
        value=choices[0][1] if choices else None,
        label="Published pair",
        info=f"At most {MAX_LISTED} are listed." if len(page.pairs) > MAX_LISTED else None,
        elem_id="pair",
    )
    show = gr.Button("Show this pair: it may contain offensive text", elem_id="show")
    filters = [kind, split, order]
    gr.on([each.input for each in filters], page.narrow, filters, pair, **LIGHT)
    return pair, show


def _typed(page: RewardPage) -> tuple[gr.Textbox, gr.Textbox, gr.Textbox, gr.Button]:
    """The fields of a pair of one's own."""
    limit = page.inspector.recipe.reward.max_length
    prompt = gr.Textbox(
        label="Prompt",
        lines=2,
        max_lines=8,
        elem_id="reward-prompt",
        placeholder="What was asked",
        info=f"The model reads the last {limit:,} tokens of prompt and answer.",
    )
    with gr.Row():
        chosen, rejected = (
            gr.Textbox(label=f"{name} answer", lines=3, max_lines=12, min_width=300, elem_id=f"reward-{name.lower()}")
            for name in ("Chosen", "Rejected")
        )
    compare = gr.Button("Compare", variant="primary", scale=0, min_width=160, elem_id="compare-pair")
    return prompt, chosen, rejected, compare


def _choices(named: dict[str, str]) -> list[tuple[str, str]]:
    return [(text[:1].upper() + text[1:], value) for value, text in named.items()]
