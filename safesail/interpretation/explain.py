"""What each safety-related latent means, in words, and which domains it belongs to.

Reads the candidates' examples (explain half). Writes `explanations.parquet` (neuron × language: text, explainer,
prompt, status, cost) and `tags.parquet` (domains, category, concept and what they rest on). A failed call is a status,
never a sentence.

Two explainers behind one door: an OpenAI-compatible endpoint is shown highlighted excerpts and answers in JSON, with
domains; a small model in process completes *Words: … / Theme:* over the strongest words, and a sentence encoder then
names the domains nearest to them.
"""

import re
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from torch import Tensor

from safesail.interpretation.llm import Llm, Message, Reply, Request
from safesail.interpretation.prompts import inert, prompt, prompt_hash
from safesail.progress import bar
from safesail.recipe import Recipe
from safesail.run import StageWork
from safesail.taxonomy import Taxonomy

__all__ = ["chat_request", "completion_request", "explain_stage", "nearest_domains", "strongest_words"]

_N_WORDS = 10
_NEAR_AT_ALL, _NEAR_THE_BEST = 0.3, 0.15
_LONGEST = 300
Row = dict[str, Any]


def explain_stage(
    recipe: Recipe,
    examples: list[Row],
    statistics: dict[str, Row],
    candidates: dict[str, Any],
    taxonomy: Taxonomy,
    llm: Llm,
    embed: Callable[[list[str]], Tensor],
    work: StageWork,
) -> None:
    """Explain every candidate that has an example, then name its domains."""
    by_neuron: dict[str, list[Row]] = defaultdict(list)
    for row in examples:
        if row["half"] == "explain":
            by_neuron[row["neuron_id"]].append(row)
    words = {name: strongest_words(rows, _N_WORDS) for name, rows in by_neuron.items()}
    build = _builder(recipe, statistics, taxonomy, words)
    with bar("explain", len(by_neuron), "neuron") as progress:
        replies = llm.ask([build(name, rows) for name, rows in by_neuron.items()], progress=progress.update)
    rows = [_row(recipe, llm, name, reply) for name, reply in zip(by_neuron, replies, strict=True)]
    candidate_for = _domains_of_candidates(candidates)
    if recipe.explain.backend == "endpoint":
        tags = [
            _tag_by_llm(name, reply, taxonomy, candidate_for[name], llm)
            for name, reply in zip(by_neuron, replies, strict=True)
        ]
    else:
        tags = _tag_by_embedding(rows, words, taxonomy, candidate_for, embed)
    for tag in tags:
        tag["concept"] = _concept(tag, candidate_for[tag["neuron_id"]])
    pq.write_table(pa.Table.from_pylist(rows, schema=_EXPLANATION_SCHEMA), work.folder / "explanations.parquet")
    pq.write_table(pa.Table.from_pylist(tags, schema=_TAG_SCHEMA), work.folder / "tags.parquet")
    pq.write_table(
        pa.Table.from_pylist([{"neuron_id": n, "words": w} for n, w in words.items()]), work.folder / "words.parquet"
    )
    work.facts["usage"] = llm.usage.summary()


def strongest_words(examples: list[Row], n: int) -> list[str]:
    """The distinct whole words at the strongest peaks, by summed activation."""
    weights: dict[str, float] = defaultdict(float)
    for row in examples:
        if row["stratum"] != "top":
            continue
        word = _word_at(row["tokens"], row["peak"])
        if word:
            weights[word.lower() if not word.isupper() else word] += row["activation"]
    return sorted(weights, key=lambda word: (-weights[word], word))[:n]


def completion_request(words: list[str]) -> Request:
    """The few-shot completion for a model that cannot follow instructions."""
    text = prompt("explain_completion").replace("{words}", ", ".join(words)).rstrip("\n")
    return Request(messages=(Message("user", text),), max_tokens=16, stop=("\n",))


def chat_request(examples: list[Row], q: float, taxonomy: Taxonomy, max_tokens: int) -> Request:
    """The instruction for an endpoint: excerpts with active tokens marked by level, answered in JSON."""
    excerpts = "\n".join(f"{i}. {_highlighted(row, q)}" for i, row in enumerate(examples, 1))
    domains = "\n".join(f"- {domain.id}: {domain.description}" for domain in taxonomy.domains)
    schema = {
        "type": "object",
        "properties": {
            "explanation": {"type": "string"},
            "domains": {"type": "array", "items": {"type": "string", "enum": list(taxonomy.domain_ids)}},
            "confidence": {"type": "number"},
        },
        "required": ["explanation", "domains", "confidence"],
        "additionalProperties": False,
    }
    text = prompt("explain_chat").format(domains=domains, excerpts=excerpts)
    return Request(messages=(Message("user", text),), max_tokens=max_tokens, schema=schema)


def nearest_domains(similarity: dict[str, float], candidate_for: list[str]) -> list[str]:
    """The candidate domains that the evidence is about: nearer than anything neutral, near at all, and near the best.

    similarity: {domain id: largest cosine over its anchors, "neutral": the same over the neutral anchors}. Cosines
    below 0.3 say nothing with a small sentence encoder; 0.15 below the nearest domain is another subject.
    """
    nearest = max(value for name, value in similarity.items() if name != "neutral")
    limit = max(similarity["neutral"], _NEAR_AT_ALL, nearest - _NEAR_THE_BEST)
    return [domain for domain in candidate_for if similarity[domain] >= limit]


def _builder(
    recipe: Recipe, statistics: dict[str, Row], taxonomy: Taxonomy, words: dict[str, list[str]]
) -> Callable[[str, list[Row]], Request]:
    if recipe.explain.backend == "local":
        return lambda name, rows: completion_request(words[name])
    return lambda name, rows: chat_request(
        rows[: recipe.explain.n_examples], statistics[name]["normaliser"], taxonomy, recipe.explain.max_tokens
    )


def _highlighted(row: Row, q: float) -> str:
    """The text with its active tokens as ⟦token⟧level."""
    parts = []
    for token, value in zip(row["tokens"], row["activations"], strict=True):
        shown = inert(token)
        level = min(round(10 * value / q), 10)
        parts.append(f"⟦{shown}⟧{level}" if level >= 1 else shown)
    return "".join(parts)


def _word_at(tokens: list[str], peak: int) -> str:
    """The whole word that the token at `peak` is part of: tokens up to the next one that begins with a non-letter."""
    first = peak
    while first > 0 and re.match(r"\w", tokens[first]) and re.search(r"\w$", tokens[first - 1]):
        first -= 1
    last = peak
    while last + 1 < len(tokens) and re.match(r"\w", tokens[last + 1]) and re.search(r"\w$", tokens[last]):
        last += 1
    return "".join(tokens[first : last + 1]).strip()


def _row(recipe: Recipe, llm: Llm, name: str, reply: Reply) -> Row:
    text = reply.value["explanation"] if isinstance(reply.value, dict) else reply.value
    text = " ".join(str(text or "").split())
    status = reply.status
    if status == "ok" and not text:
        status = "unparsed"
    if len(text) > _LONGEST:
        text = text[: _LONGEST - 1].rstrip() + "…"
    return {
        "neuron_id": name,
        "language": "en",
        "explanation": text if status == "ok" else None,
        "status": status,
        "explainer": llm.backend.name,
        "prompt_hash": prompt_hash("explain_completion" if recipe.explain.backend == "local" else "explain_chat"),
        "prompt_tokens": reply.prompt_tokens,
        "completion_tokens": reply.completion_tokens,
        "cost_usd": reply.cost_usd,
    }


def _domains_of_candidates(candidates: dict[str, Any]) -> dict[str, dict[str, Row]]:
    """{neuron id: {domain: the candidate's record}}."""
    found: dict[str, dict[str, Row]] = defaultdict(dict)
    for hook_point, domains in candidates.items():
        for domain, rows in domains.items():
            for row in rows:
                found[f"{hook_point}/{row['latent']}"][domain] = row
    return found


def _tag_by_llm(name: str, reply: Reply, taxonomy: Taxonomy, candidate_for: dict[str, Row], llm: Llm) -> Row:
    named = reply.value["domains"] if reply.status == "ok" else []
    domains = [domain for domain in taxonomy.domain_ids if domain in named]
    return _tag(name, domains, "", candidate_for, llm.backend.name, None)


def _tag_by_embedding(
    rows: list[Row],
    words: dict[str, list[str]],
    taxonomy: Taxonomy,
    candidate_for: dict[str, dict[str, Row]],
    embed: Callable[[list[str]], Tensor],
) -> list[Row]:
    """Compare each explanation with its strongest words to anchors: every category's description and concepts."""
    anchors = _anchors(taxonomy)
    vectors = embed([text for _, _, text in anchors])
    evidence = embed([f"{row['explanation'] or ''}: {', '.join(words[row['neuron_id']])}" for row in rows])
    tags = []
    for row, cosines in zip(rows, (evidence @ vectors.T).tolist(), strict=True):
        similarity: dict[str, float] = {}
        for (domain, _, _), cosine in zip(anchors, cosines, strict=True):
            similarity[domain] = max(cosine, similarity.get(domain, -1.0))
        candidates = candidate_for[row["neuron_id"]]
        domains = nearest_domains(similarity, list(candidates)) if row["status"] == "ok" else []
        inside = [(c, anchor[1]) for c, anchor in zip(cosines, anchors, strict=True) if anchor[0] in domains]
        category = max(inside)[1] if inside else ""
        nearest = max(similarity[domain] for domain in taxonomy.domain_ids)
        tags.append(_tag(row["neuron_id"], domains, category, candidates, "embedding", nearest))
    return tags


def _anchors(taxonomy: Taxonomy) -> list[tuple[str, str, str]]:
    """(domain, category, text): two texts for each category, and the neutral ones under the domain `neutral`."""
    return [
        *((d.id, c.id, f"{c.name}: {c.description}") for d in taxonomy.domains for c in d.categories),
        *((d.id, c.id, f"{c.name}: {', '.join(c.concepts)}") for d in taxonomy.domains for c in d.categories),
        *(("neutral", "", text) for text in taxonomy.neutral),
    ]


def _tag(
    name: str, domains: list[str], category: str, candidate_for: dict[str, Row], tagger: str, similarity: float | None
) -> Row:
    return {
        "neuron_id": name,
        "domains": domains,
        "category": category,
        "candidate_for": list(candidate_for),
        "n_wins": max(row["n_wins"] for row in candidate_for.values()),
        "n_losses": min(row["n_losses"] for row in candidate_for.values()),
        "p_value": min(row["p_value"] for row in candidate_for.values()),
        "tagger": tagger,
        "similarity": similarity,
    }


def _concept(tag: Row, candidate_for: dict[str, Row]) -> str:
    """The concepts of the pairs that the latent won, within its tagged domains."""
    concepts = dict.fromkeys(c for domain in tag["domains"] for c in candidate_for.get(domain, {}).get("concepts", []))
    return ", ".join(list(concepts)[:3])


_EXPLANATION_SCHEMA = pa.schema(
    [
        ("neuron_id", pa.string()),
        ("language", pa.string()),
        ("explanation", pa.string()),
        ("status", pa.string()),
        ("explainer", pa.string()),
        ("prompt_hash", pa.string()),
        ("prompt_tokens", pa.int32()),
        ("completion_tokens", pa.int32()),
        ("cost_usd", pa.float64()),
    ]
)
_TAG_SCHEMA = pa.schema(
    [
        ("neuron_id", pa.string()),
        ("domains", pa.list_(pa.string())),
        ("category", pa.string()),
        ("concept", pa.string()),
        ("candidate_for", pa.list_(pa.string())),
        ("n_wins", pa.int32()),
        ("n_losses", pa.int32()),
        ("p_value", pa.float64()),
        ("tagger", pa.string()),
        ("similarity", pa.float64()),
    ]
)


def load(folder: Path) -> tuple[list[Row], dict[str, Row]]:
    """The explanations and the tags by neuron id that the explain stage wrote."""
    tags = pq.read_table(folder / "tags.parquet").to_pylist()
    return pq.read_table(folder / "explanations.parquet").to_pylist(), {tag["neuron_id"]: tag for tag in tags}
