"""Does steering a neuron move its own tokens? Against random directions and random other latents of the same SAE.

    python scripts/measure_steering.py runs/demo --amounts 4 [--everywhere]

The neurons are chosen by a rule on their rows alone: a word of the subject in explanation or concept, a score above
weak; of each subject the five best at each hook point. Each is steered by fixed amounts on all tokens of the prompts
below, and what is measured is the change of log-probability of the next token, mean over the prompts, for two sets of
five tokens:

    fires on   those on which the neuron fires most in the release's examples (sum of its activations per token)
    promotes   those whose logits its decoder row raises on the direct path through the final norm and unembedding

The null: unit directions drawn at random, and decoder rows of other latents that fire, each added with the length of
the neuron's own change and measured at the neuron's own tokens. A neuron counts as beyond a null when
its change is above the null's 97.5 % quantile. All random numbers are seeded; the table is printed whatever it says.

What this does not ask: whether the model then writes about the subject, or how it answers a question.
"""

import argparse
import collections
import itertools
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from safesail import Inspector, NeuronDatabase
from safesail.diagnosis.interventions import Intervention, intervened
from safesail.examples import Example, Examples
from safesail.metrics import Interval, ratio_of_sums, wilson
from safesail.neurons import WEAK_BELOW, neuron_id, parse_neuron_id
from safesail.sae.model import Sae

SUBJECTS = {
    "sex": {"sex", "sexual", "sexuality", "erotic", "porn"},
    "death": {"death", "dead", "die", "kill", "killed", "killing", "murder", "murdered"},
    "president": {"president", "presidents"},
}
N_PER_SUBJECT, N_TOKENS = 5, 5
PROMPTS = (
    "She was thinking about",
    "The article describes the",
    "They spoke for hours about",
    "He wrote a letter to the",
    "The report mentions a",
    "In the morning we saw",
    "My neighbour asked about the",
    "The teacher explained the",
    "I read a story about",
    "People often talk about",
    "The meeting was about",
    "On the table lay a",
    "The second chapter is about",
    "We were surprised by the",
    "The picture shows a",
    "Last year there was a",
    "Nobody wanted to mention the",
    "The film begins with a",
    "This is an example of",
    "Our discussion turned to",
)


class Chosen(NamedTuple):
    """A neuron to be steered."""

    subject: str
    neuron_id: str
    explanation: str
    score: float


class Measured(NamedTuple):
    """What steering one neuron does to one set of tokens. Changes: nats, mean over prompts and tokens."""

    change: Interval
    """With its 95 % interval from resampling prompts."""
    directions: Tensor
    """The changes by random directions: (n_directions,)."""
    latents: Tensor
    """The changes by other latents: (n_latents,)."""

    @property
    def beyond(self) -> tuple[bool, bool]:
        """Whether the change is above 97.5 % of those by directions, and by latents."""
        value = self.change.value
        assert value is not None
        return value > quantile(self.directions, 0.975), value > quantile(self.latents, 0.975)


# --- which neurons and tokens -------------------------------------------------------------------------------------


def chosen(database: NeuronDatabase) -> list[Chosen]:
    """The five best-scored neurons of each subject at each hook point; one of two subjects counts for the first."""
    found: dict[str, Chosen] = {}
    for hook_point, (subject, words) in itertools.product(database.hook_points, SUBJECTS.items()):
        rows = [row for row in database.search(hook_point=hook_point, min_score=WEAK_BELOW) if _is_about(row, words)]
        fresh = [row for row in rows if row["score"] > WEAK_BELOW and row["neuron_id"] not in found][:N_PER_SUBJECT]
        found |= {
            row["neuron_id"]: Chosen(subject, row["neuron_id"], row["explanation"], row["score"]) for row in fresh
        }
    return list(found.values())


def _is_about(row: dict[str, Any], words: set[str]) -> bool:
    text = f"{row['explanation'] or ''} {row['concept'] or ''}".lower()
    return bool(words & set(re.findall(r"\w+", text)))


def tokens_fired_on(examples: Sequence[Example], tokenizer: Any) -> list[int]:
    """The ids of the five one-token units on which the activations of the examples sum up highest."""
    total: collections.defaultdict[str, float] = collections.defaultdict(float)
    for example in examples:
        for text, activation in zip(example.tokens, example.activations, strict=True):
            total[text] += activation
    ids: list[int] = []
    for text, activation in sorted(total.items(), key=lambda pair: -pair[1]):
        encoded = tokenizer(text, add_special_tokens=False)["input_ids"]
        if activation > 0 and len(encoded) == 1 and encoded[0] not in ids:
            ids.append(encoded[0])
    return ids[:N_TOKENS]


# --- steering along any directions --------------------------------------------------------------------------------


def with_directions(inspector: Inspector, hook_point: str, rows: Tensor, size: float) -> Inspector:
    """An inspector whose only neurons are the given directions, each with the normaliser `size`. rows: (n, d_in).

    So what is no neuron is added by the same code, under the same token policy.
    """
    sae = inspector.saes[hook_point]
    n, d_in = rows.shape
    config = sae.config.model_copy(update={"d_sae": n, "k": 1 if sae.config.k else None})
    threshold = None if sae.threshold is None else torch.zeros(n)
    planted = Sae(config, torch.zeros(d_in, n), torch.zeros(n), rows, torch.zeros(d_in), threshold)
    quantiles = {neuron_id(hook_point, j): {"hook_point": hook_point, "normaliser": size} for j in range(n)}
    database = NeuronDatabase({}, quantiles, {}, {})
    return Inspector(inspector.model, inspector.tokenizer, {hook_point: planted}, database, inspector.release)


def null_rows(inspector: Inspector, hook_point: str, n: int, without: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Random unit directions, and decoder rows of other latents that fire: (n, d_in) each."""
    generator = torch.Generator().manual_seed(seed)
    W_dec = inspector.saes[hook_point].W_dec.detach().cpu()
    directions = torch.nn.functional.normalize(torch.randn(n, W_dec.shape[1], generator=generator), dim=1)
    order = torch.randperm(len(W_dec), generator=generator).tolist()
    others = [j for j in order if j != without and inspector.database.normaliser(hook_point, j)][:n]
    return directions, torch.nn.functional.normalize(W_dec[others], dim=1)


@torch.inference_mode()
def log_probabilities(
    inspector: Inspector, prompts: Sequence[str], interventions: list[Intervention], *, everywhere: bool = False
) -> Tensor:
    """The log-probabilities of the token after each prompt: (n_prompts, vocabulary), in nats.

    everywhere: instead, the mean of those after each of its tokens. Prompts are padded on the right, where causal
    attention does not look.
    """
    encoded = [inspector.encode(prompt) for prompt in prompts]
    width, pad = max(map(len, encoded)), inspector.tokenizer.pad_token_id or 0
    ids = torch.tensor([row + [pad] * (width - len(row)) for row in encoded])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in encoded])
    with intervened(inspector, interventions):
        hidden = inspector.model.base_model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
    unembed = inspector.model.get_output_embeddings()
    if everywhere:
        parts = [unembed(hidden[i, : len(row)]).double().log_softmax(-1).mean(0) for i, row in enumerate(encoded)]
        return torch.stack(parts)
    last = hidden[torch.arange(len(encoded)), [len(row) - 1 for row in encoded]]
    return unembed(last).double().log_softmax(-1)


def mean_changes(before: Tensor, after: Tensor, ids: Sequence[int]) -> Tensor:
    """The change of log-probability of each prompt, mean over the tokens: (n_prompts,).

    before, after: (n_prompts, vocabulary), in nats.
    """
    return (after - before)[:, list(ids)].mean(1)


def measure(
    inspector: Inspector,
    neuron: str,
    amount: float,
    token_sets: Sequence[Sequence[int]],
    before: Tensor,
    n_null: int,
    *,
    everywhere: bool = False,
) -> list[Measured]:
    """What steering the neuron, random directions and other latents does to each set of tokens."""
    hook_point, latent = parse_neuron_id(neuron, inspector.saes)
    size = inspector.database.normaliser(hook_point, latent)
    assert size, f"{neuron} was chosen although it never fired"
    own = inspector.saes[hook_point].W_dec[latent].detach().cpu()
    rows = torch.cat([own[None], *(own.norm() * part for part in null_rows(inspector, hook_point, n_null, latent))])
    planted = with_directions(inspector, hook_point, rows, size)
    changes = []  # of each direction, of each set of tokens: (n_prompts,)
    for j in range(len(rows)):
        steered = [Intervention(neuron_id(hook_point, j), "steer", amount)]
        after = log_probabilities(planted, PROMPTS, steered, everywhere=everywhere)
        changes.append([mean_changes(before, after, ids) for ids in token_sets])
    return [measured([change[i] for change in changes], n_null) for i in range(len(token_sets))]


def measured(changes: Sequence[Tensor], n_directions: int) -> Measured:
    """The neuron's change and the null's, from the per-prompt changes of the neuron, the directions, the latents."""
    own = ratio_of_sums(changes[0], torch.ones_like(changes[0]))
    null = torch.stack(list(changes[1:])).mean(1)
    return Measured(own, null[:n_directions], null[n_directions:])


def quantile(values: Tensor, level: float) -> float:
    """The interpolated quantile. values: (n,)."""
    return float(torch.quantile(values.double(), level))


# --- the table ----------------------------------------------------------------------------------------------------

HEADER = (
    "| subject | neuron | explanation | score | α | tokens | change of log-probability (nats) | random directions | "
    "other latents | beyond |\n|---|---|---|---|---|---|---|---|---|---|"
)


def table_row(neuron: Chosen, amount: float, kind: str, tokens: Sequence[str], result: Measured) -> str:
    """One line of the Markdown table; the nulls are shown as their 95 % ranges."""
    value, low, high = (x or 0.0 for x in result.change)
    shown = ", ".join(f"`{text.strip()}`" for text in tokens)
    nulls = (result.directions, result.latents)
    ranges = [f"{quantile(null, 0.025):+.2f} – {quantile(null, 0.975):+.2f}" for null in nulls]
    words = " ".join(neuron.explanation.split()).replace("|", "\\|")
    beyond = " / ".join("yes" if over else "no" for over in result.beyond)
    return (
        f"| {neuron.subject} | {neuron.neuron_id} | {words} | {neuron.score:.2f} | {amount:g} | {kind}: {shown} | "
        f"{value:+.2f} [{low:+.2f}, {high:+.2f}] | {ranges[0]} | {ranges[1]} | {beyond} |"
    )


def summary(hook_point: str, kind: str, amount: float, results: Sequence[Measured]) -> str:
    """How many neurons of a hook point move their tokens up, and beyond each null."""
    n, up = len(results), sum((result.change.value or 0.0) > 0 for result in results)
    by_null = [sum(result.beyond[i] for result in results) for i in (0, 1)]
    both = sum(all(result.beyond) for result in results)
    return (
        f"{hook_point}, α = {amount:g}, tokens it {kind}: {up} of {n} neurons move them up; beyond the 95 % range of "
        f"random directions {_share(by_null[0], n)}, of other latents {_share(by_null[1], n)}, "
        f"of both {_share(both, n)}."
    )


def _share(count: int, n: int) -> str:
    _, low, high = wilson(count, n)
    return f"{count} of {n} [{low or 0:.0%}, {high or 0:.0%}]"


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("release")
    parser.add_argument("--amounts", type=float, nargs="+", default=[4.0])
    parser.add_argument("--null", type=int, default=24, help="random directions, and as many other latents")
    parser.add_argument("--everywhere", action="store_true", help="after every token of a prompt, not the last alone")
    parser.add_argument("--json", type=Path, help="also write the numbers here")
    options = parser.parse_args(arguments)
    inspector, examples = Inspector.from_pretrained(options.release), Examples(options.release)
    where = options.everywhere
    before = log_probabilities(inspector, PROMPTS, [], everywhere=where)
    neurons = chosen(inspector.database)
    kept: dict[tuple[str, str, float], list[Measured]] = {}
    rows: list[dict[str, Any]] = []
    print(HEADER, flush=True)
    for amount in options.amounts:
        for neuron in neurons:
            hook_point, _ = parse_neuron_id(neuron.neuron_id, inspector.saes)
            sets = {
                "fires on": tokens_fired_on(examples.of(neuron.neuron_id), inspector.tokenizer),
                "promotes": [token.token for token in inspector.promoted_tokens(neuron.neuron_id, N_TOKENS)],
            }
            ids_of = list(sets.values())
            results = measure(inspector, neuron.neuron_id, amount, ids_of, before, options.null, everywhere=where)
            for (kind, ids), result in zip(sets.items(), results, strict=True):
                texts = [inspector.tokenizer.decode([id]) for id in ids]
                print(table_row(neuron, amount, kind, texts, result), flush=True)
                kept.setdefault((hook_point, kind, amount), []).append(result)
                rows.append(_record(neuron, amount, kind, texts, result))
    print()
    for (hook_point, kind, amount), results in sorted(kept.items(), key=lambda item: item[0]):
        print(summary(hook_point, kind, amount, results))
    if options.json:
        options.json.write_text(json.dumps(rows, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


def _record(neuron: Chosen, amount: float, kind: str, texts: list[str], result: Measured) -> dict[str, Any]:
    nulls = {"directions": result.directions.tolist(), "latents": result.latents.tolist()}
    return {**neuron._asdict(), "amount": amount, "set": kind, "tokens": texts, "change": list(result.change), **nulls}


if __name__ == "__main__":
    sys.exit(main())
