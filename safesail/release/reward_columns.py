"""What every column of the tables of a reward model's release means. The columns are in `release.reward_tables`."""

__all__ = ["REWARD_COLUMNS", "reward_meaning"]

REWARD_COLUMNS = {
    # what a row is about
    "neuron_id": "hook point and latent, as `layers.11/42`",
    "hook_point": "the module below the base model whose output is read",
    "latent": "index inside the SAE",
    "pair_id, id": "of the pair, the same in all data sets of this release",
    "kind": "what the pair is about: safety or chat",
    "source": "where the pair comes from",
    "held_out": "whether the pair is held out: neither the reward model nor any choice of latents saw its prompt",
    # salience
    "salience": "s of the latent, -1 to 1: positive where it fires more on chosen answers",
    "low, high": "95 % bootstrap interval of s, from resampling pairs; null: not among those that could be rated",
    "rating": "how much the latent has to do with safety, 1 to 5; null: it was not rated, or gave no valid answer",
    "safety": "positive or negative: the latent counts in score_safe with this sign; null: it does not",
    "salience/status, ratings/status": "how the rating ended: ok, refused, unparsed or failed; null: it was not rated",
    "h_chosen, h_rejected": "h of the latent on chosen and on rejected answers; `salience.json` says whether a mean or "
    "a sum",
    "salience/n_chosen, salience/n_rejected": "positions on which the latent fires",
    "n_contexts": "contexts that were collected; null: none were looked for",
    "n_token_classes": "different tokens or words that these contexts end in",
    "rated": "whether the latent went on to be rated",
    "reason": "why it did not",
    "salience/rank": "by the size of s, whatever its sign, from 0",
    # scores
    "score_safe": "how much safer the chosen answer looks than the rejected one: `safe_chosen` less `safe_rejected`",
    "safe_chosen, safe_rejected": "activation of the positive less that of the negative safety latents, as a mean over "
    "segment ends",
    "reward_chosen, reward_rejected": "the reward model's",
    "margin": "`reward_chosen` less `reward_rejected`: of the rewards of the two answers",
    "scores/n_chosen, scores/n_rejected": "segment ends of the answer",
    # edits
    "edit": "name of the edited data set",
    "action": "swap (poison) or drop (denoise); null: the data as they are",
    "method": "by what the pairs were chosen: safer (score_safe), random or reward (the margin)",
    "ratio": "share of the pairs that is edited",
    "seed": "of the random draw; null: nothing is drawn",
    "edits/rank": "in the order in which pairs are edited, from 0",
    # comparison
    "seeds": "reward models that were trained",
    "n_edited": "pairs that are swapped or dropped",
    "comparison/safety": "accuracy on held-out pairs about safety",
    "chat": "accuracy on held-out pairs about chat",
    "safety_change, chat_change": "the same less that of the unedited data, on the same pairs and seeds",
    # texts
    "prompt": "messages before the answer: `role` and `content`",
    "chosen, rejected": "the answer as a list of one message; the sides as they are in this data set",
    "harm_chosen, harm_rejected": "how harmful a person found the answer; null: the source has no such score",
    "contexts/rank": "order of strength, from 0",
    "before": "the text that leads up to the segment end",
    "after": "a few tokens more",
    "token": "the token at the segment end, on which the latent fires",
    "activation": "of the latent there",
    "token_class": "the token, or where it is punctuation the word before it",
    "side": "chosen or rejected",
    "position": "of the token in the text as the reward model reads it",
    # ratings
    "explanation": "why, in the rater's words",
    "detail": "the reason, where it did not end well",
    "rater": "who rated",
    "prompt_hash": "the first 12 digits of the SHA-256 of the prompt's template; null: no prompt was used",
    "prompt_tokens, completion_tokens": "what was asked of the rater for this row",
    "cost_usd": "its price; null: no price was given",
    # edited data
    "edited": "swapped: chosen and rejected stand the wrong way round; empty: the pair is as it was",
    "poisoned/score_safe, poisoned/margin": "of the pair as it stands here: of a swapped one negated",
    "original_score_safe": "`score_safe` of the pair as it was",
}
"""{column: its meaning}. Columns that belong together share a key; `config/column` is for one config alone."""

_MEANINGS = {name: text for names, text in REWARD_COLUMNS.items() for name in names.split(", ")}


def reward_meaning(column: str, config: str) -> str:
    """What a column means; a KeyError is a column without one. The ends of an interval mean what it does.

    config: of an edited data set without its ratio, too.
    """
    config = config.partition("-")[0]
    plain = column.removesuffix("_low").removesuffix("_high")
    names = (f"{config}/{column}", column, f"{config}/{plain}", plain)
    return _MEANINGS[next((name for name in names if name in _MEANINGS), column)]
