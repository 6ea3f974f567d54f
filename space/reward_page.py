"""What the reward inspector's page and its API do over one inspector: checked settings in, plain values out.

The page keeps nothing of any visitor.
"""

from collections.abc import Callable
from typing import Any

import gradio as gr
from markup import Markup, tag
from page import as_message, on_gpu, sentence_of, text_of
from results import note
from reward_view import comparison_html, pair_label, pair_note

from safesail.errors import InputError
from safesail.rewards.inspector import RewardInspector
from safesail.rewards.published import PublishedPair
from safesail.rewards.readings import Comparison

__all__ = ["KINDS", "MAX_LISTED", "ORDERS", "SPLITS", "RewardPage"]

MAX_LISTED = 500
"""Pairs in the list; the order and the filters say which."""
KINDS = {"": "all", "safety": "safety", "chat": "chat"}
SPLITS = {"": "all", "held": "held out", "train": "training"}
ORDERS = {"high": "highest score_safe first", "low": "lowest first"}


class RewardPage:
    """What the page and the API do, over one reward inspector."""

    def __init__(self, inspector: RewardInspector) -> None:
        self.inspector = inspector
        self.pairs = inspector.pairs()
        self.max_characters = 20 * inspector.recipe.reward.max_length
        self._compare = on_gpu(inspector.compare)

    # --- the list of pairs ----------------------------------------------------------------------------------------

    def listed(self, kind: str, split: str, order: str) -> list[tuple[str, str]]:
        """The pairs that the filters leave, in the order asked for: what the list says of each, and its id."""
        pairs = self.pairs if order == "high" else self.pairs[::-1]
        held_out = {"held": True, "train": False}.get(split)
        wanted = [p for p in pairs if kind in ("", p.kind) and held_out in (None, p.held_out)]
        return [(pair_label(pair), pair.id) for pair in wanted[:MAX_LISTED]]

    def narrow(self, kind: str, split: str, order: str) -> Any:
        """The list of pairs anew, its first one chosen."""
        choices = self.listed(kind, split, order)
        return gr.update(choices=choices, value=choices[0][1] if choices else None)

    # --- what is shown --------------------------------------------------------------------------------------------

    def show(self, pair_id: str | None) -> tuple[Any, ...]:
        """The comparison of a published pair, and its texts for the fields where a visitor may change them."""
        skipped = gr.skip(), gr.skip(), gr.skip()
        if not pair_id:
            return _refused(InputError("no pair is chosen; the filters leave none.")), *skipped
        try:
            pair = self.inspector.pair(pair_id)
        except InputError as error:
            return _refused(error), *skipped
        if pair.texts is None:
            return _unread(pair), *skipped
        made = self._told(lambda: self._compared(*pair.texts), pair)  # type: ignore[misc]
        prompt = pair.texts.prompt
        single = prompt[0]["content"] if len(prompt) == 1 and prompt[0]["role"] == "user" else ""
        return made, single, pair.texts.chosen, pair.texts.rejected

    def compare_typed(self, prompt: str, chosen: str, rejected: str) -> Markup:
        """The comparison of a typed pair."""
        return self._told(lambda: self._typed(prompt, chosen, rejected))

    def _told(self, made: Callable[[], Comparison], pair: PublishedPair | None = None) -> Markup:
        try:
            return comparison_html(made(), pair)
        except InputError as error:
            return _refused(error)

    # --- the API --------------------------------------------------------------------------------------------------

    def compare_texts(self, prompt: str, chosen: str, rejected: str) -> dict[str, Any]:
        """Two answers to one prompt as the reward model reads them.

        Args:
            prompt: What was asked.
            chosen: The better answer.
            rejected: The other answer.

        Returns:
            `margin` (reward of chosen less that of rejected), `score_safe`, `chosen` and `rejected` with their `reward`
            and `tokens` (per token the reward after it, the activation of S⁺ and S⁻, and whether it is a segment end,
            which counts), `latents` (the safety latents, with what each adds to score_safe) and `others`.
        """
        with as_message(escaped=False):
            given = {"prompt": prompt, "chosen": chosen, "rejected": rejected}
            return self._typed(*(text_of(name, value) for name, value in given.items())).to_json()

    def pair(self, id: str) -> dict[str, Any]:
        """One published pair.

        Args:
            id: A pair's id, as the data set of scores has it.

        Returns:
            Its `kind`, `held_out`, `score_safe`, `margin` and rewards, and its `texts` (`prompt`, `chosen`,
            `rejected`); null where they are gated and this page has no access: `why_no_texts` gives the reason.
        """
        with as_message(escaped=False):
            found = self.inspector.pair(text_of("id", id))
        texts = None if found.texts is None else found.texts._asdict()
        return found._asdict() | {"texts": texts}

    # --- asking the model -----------------------------------------------------------------------------------------

    def _typed(self, prompt: str, chosen: str, rejected: str) -> Comparison:
        return self._compared(prompt or "", chosen or "", rejected or "")

    def _compared(self, prompt: Any, chosen: str, rejected: str) -> Comparison:
        """The comparison; InputError for texts that would take a visitor too long."""
        said = [prompt] if isinstance(prompt, str) else [message["content"] for message in prompt]
        n = sum(map(len, (*said, chosen, rejected)))
        if n > 2 * self.max_characters:
            raise InputError(f"the texts have {n:,} characters; the limit here is {2 * self.max_characters:,}.")
        return self._compare(prompt, chosen, rejected)


def _refused(error: InputError) -> Markup:
    """What was wrong, in its sentence."""
    gr.Warning(sentence_of(error))
    return tag("p", sentence_of(error, escaped=False), class_="note", role="status")


def _unread(pair: PublishedPair) -> Markup:
    """A pair whose texts cannot be read: its published numbers, and why there is no more."""
    reason = f"Its texts cannot be shown here: {pair.why_no_texts}"
    return tag("article", tag("p", pair_note(pair)), note(reason), class_="result")
