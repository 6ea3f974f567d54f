"""What every column of the published tables means. The columns themselves are in the schemas of `release.tables`."""

import itertools
import re
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from safesail.release.summary import Table

__all__ = ["COLUMNS", "DIAGNOSIS_COLUMNS", "column_table", "meaning"]

COLUMNS = {
    # what a row is about
    "neuron_id": "hook point and latent, as `layers.9.mlp/42`",
    "hook_point": "the module below the base model whose output is read",
    "layer": "the number in the hook point",
    "latent": "index inside the SAE",
    "x, y": "its place on the landscape of decoder directions, -1 to 1; `landscape.json` names the method",
    "sae_id": "hook point and variant: the folder in the SAEs' repository",
    "language": "of the explanation; empty: the method reads none",
    "pairs/language": "of the two queries",
    # explanations
    "explanation": "what the neuron responds to, in a language model's words; null: none was given",
    "confidence": "how sure of it the explainer was, 0 to 1",
    "explainer": "the model that wrote it",
    "prompt_hash": "the first 12 digits of the SHA-256 of the prompt's template",
    "status": "how it ended: ok, refused, unparsed or failed; of a score also undefined",
    "detail": "the reason, where it did not end well",
    "snippet": "a few redacted words around the strongest activation",
    # domains
    "domains": "domains that both the pairs and the explanation name",
    "category": "within the domain",
    "concept": "within the category; of a pair, the word or words that carry it",
    "candidate_for": "domains whose pairs the latent tells apart",
    "n_wins": "pairs that it distinguishes",
    "p_value": "of the one-sided sign test",
    "q_value": "the smallest false-discovery rate at which it would still be chosen",
    "tagger": "who named the domains",
    # scores
    "score": "correlation of the activity predicted from the explanation and the true one; null: undefined",
    "lexical_score": "the baseline that reads no explanation",
    "simulator": "method and model that predicted",
    "method": "what is predicted, and by whom",
    "low, high": "95 % interval of the score",
    "auroc": "area under the ROC curve of the prediction",
    "n_units": "units (segments, tokens or texts) compared",
    "n_active": "of them active",
    "n_texts": "texts they come from",
    "true_positives, false_positives, false_negatives, true_negatives": "units, where the method says yes or no",
    # statistics
    "n_tokens": "tokens of the corpus that count",
    "firing_rate": "share of the counted tokens on which the latent is above zero",
    "q999": "0.999 quantile of the activation",
    "max_activation": "largest activation",
    "p50, p90, p99, p999, p9999": "quantiles of the activation over all tokens",
    "max": "largest activation",
    "median_active": "median of the activations above zero",
    "normaliser": "the activation shown as 1: the larger of `p999` and `median_active`",
    "histogram": "active tokens by tenths of the normaliser; the last counts all above nine tenths",
    # cost
    "prompt_tokens, completion_tokens": "what was asked of language models for this row",
    "cost_usd": "its price; null: no price was given",
    # the sweep
    "selected": "the SAE of its hook point",
    "as_good_as_best": "not distinguishable from the best of its hook point",
    "architecture": "relu, topk, batchtopk, jumprelu or matryoshka",
    "k": "latents active per token, as configured",
    "coefficient": "of the sparsity penalty, as configured",
    "explained_variance": "1 − FVU, on held-out documents",
    "fvu": "fraction of variance unexplained",
    "mse": "mean squared error",
    "cosine": "mean cosine of activation and reconstruction",
    "l0": "mean number of active latents per token",
    "dead": "share of latents that never fire",
    "dense": "share of latents that fire on more than 10 % of tokens",
    "ce_recovered": "share of the cross entropy that the reconstruction keeps",
    "kl": "divergence of the next-token distribution, in nats",
    "i_cdf": "mean share of the pairs that a latent distinguishes",
    "i_cdf_swapped": "`i_cdf` with the two sides of every pair swapped",
    "i_cdf_null": "mean of `i_cdf` with the sides swapped at random",
    "i_cdf_null_high": "0.95 quantile of that null",
    "i_cdf_p": "share of the random swaps that reach `i_cdf`",
    "above_null": "`i_cdf` less its null",
    "l0_t": "`l0_t_T`: latents that distinguish more than the share T of the pairs; `…_null`: with sides swapped",
    # contrast
    "grouping": "all, domain, category, concept or language",
    "group": "which of them",
    "n_pairs": "pairs in the group",
    "reduction": "how a query's activations become one number",
    "activity_quantile": "above which of its quantiles a latent counts as active",
    # pairs
    "id": "the same in every language",
    "domain": "domain of the concept",
    "with": "the query that holds the concept",
    "without": "the same query without it",
    # examples
    "half": "explain: shown to the explainer; score: held out for scoring. No document is in both",
    "rank": "order of strength",
    "stratum": "top; level-3: drawn from the third tenth of the normaliser; near-miss: holds a strong token, is silent",
    "level": "the peak in tenths of the normaliser, 0 to 10",
    "activation": "of the peak",
    "text": "the excerpt",
    "tokens": "its readable tokens",
    "activations": "the neuron's activation on each",
    "source": "where the text comes from",
}
"""{column: its meaning}. Columns that belong together share a key; `config/column` is for one config alone."""

DIAGNOSIS_COLUMNS = {
    # trajectories
    "trajectories/label": "the version of the prompt",
    "trajectories/language": "of the version; null: none was stated",
    "trajectories/token_index": "the place of the token among the readable ones, from 0",
    "trajectories/token": "the token that the neuron fires on",
    "trajectories/is_answer": "whether the model generated the token",
    "trajectories/activation": "the neuron's activation on the token",
    "trajectories/normalised, knowledge/normalised": "`activation` over the neuron's normaliser; null: it has none",
    # interventions
    "interventions/prompt": "what the model was asked",
    "interventions/answer_unchanged, interventions/answer_changed": "its answers without and with the interventions; "
    "null: only the next token was asked for",
    "interventions/declines_unchanged, interventions/declines_changed": "whether the answer declines",
    "interventions/n_equal_ids": "with how many equal token ids the two answers begin",
    "interventions/interventions": "`neuron_id`, `kind` (steer, clamp or ablate) and `amount` in multiples of the "
    "normaliser",
    "interventions/next_tokens": "tokens right after the prompt (`token` id, `text`) with their probabilities without "
    "and with the interventions, and the natural logarithms of these",
    "interventions/chat": "whether the prompt was put as a chat",
    "interventions/prompt_ids, interventions/ids_unchanged, interventions/ids_changed": "token ids",
    # knowledge
    "knowledge/name": "who is asked about",
    "knowledge/fires": "whether the neuron fires on a token of the name, in a neutral sentence",
    "knowledge/known": "whether the continuation holds an accepted answer",
    "knowledge/activation": "the neuron's largest activation on the name; 0: it is silent",
    "knowledge/token": "the token of that activation; empty: it is silent",
    "knowledge/continuation": "the model's, of the prompt",
    "knowledge/prompt": "whose continuation shows whether the model knows it",
    "knowledge/accepted": "answers that show it",
    # monitor
    "monitor/text": "the text that was read",
    "monitor/domain": "whose risk it is",
    "monitor/probability": "of the domain, by the monitor",
    "monitor/above": "whether it reaches the threshold",
    "monitor/neuron_id": "which fired; null: no neuron of the monitor did",
    "monitor/token": "the token that it fired on most",
    "monitor/index": "the place of that token among the readable ones, from 0",
    "monitor/activation": "the largest activation over the neuron's normaliser",
    "monitor/coefficient": "of the neuron in the monitor",
    "monitor/contribution": "coefficient · activation: what the neuron adds to the log odds",
    "monitor/number": "of the text in its result, from 0",
    "monitor/intercept": "the log odds where no neuron fires",
}
"""{config/column: its meaning} of the results of the diagnosis, which a release may have or not."""

_MEANINGS = {
    name: text for table in (COLUMNS, DIAGNOSIS_COLUMNS) for names, text in table.items() for name in names.split(", ")
}
_TYPES = {"string": "text", "double": "number", "float": "number", "bool": "yes or no"}


def meaning(column: str, config: str = "") -> str:
    """What a column means; a KeyError is a column without a meaning.

    The ends of an interval and the thresholds of L_{0,t} mean what the column says that they belong to.
    """
    own = f"{config}/{column}"
    if own in _MEANINGS or column in _MEANINGS:
        return _MEANINGS.get(own) or _MEANINGS[column]
    return _MEANINGS["l0_t" if column.startswith("l0_t_") else re.sub("_(low|high)$", "", column)]


def column_table(path: Path, meaning: Callable[[str, str], str] = meaning) -> Table:
    """The columns of a published parquet file: names, type and meaning. Neighbours of one meaning share a row.

    meaning: what says what a column of a config means.
    """
    fields = [(_type(field.type), meaning(field.name, path.parent.name), field.name) for field in pq.read_schema(path)]
    cells = []
    for (kind, text), group in itertools.groupby(fields, key=lambda field: field[:2]):
        names = [name for *_, name in group]
        has_interval = any(name.endswith("_low") for name in names)
        cells.append(
            [", ".join(f"`{name}`" for name in names), kind, f"{text}; 95 % interval" if has_interval else text]
        )
    return ["column", "type", "meaning"], cells


def _type(kind: pa.DataType) -> str:
    if pa.types.is_list(kind):
        return f"list of {_type(kind.value_type)}s"
    if pa.types.is_struct(kind):
        return "record"
    return _TYPES.get(str(kind)) or {True: "whole number"}[pa.types.is_integer(kind)]
