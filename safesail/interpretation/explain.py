"""What each safety-related latent means, in words, and which domains it belongs to.

Reads the candidates' examples (explain half). Writes `explanations.parquet` (neuron × language: text, status, reason,
explainer, prompt, cost), `tags.parquet` (domains, category, concept and what they rest on) and `words.parquet` (the
strongest words). A failed call is a status, never a sentence.

Two explainers behind one door. An OpenAI-compatible endpoint is shown excerpts with highlighted tokens and passages
that leave the neuron silent; one structured answer holds the explanation in all languages, domains and category. A
small model in process completes *Words: … / Theme:* over the strongest words, in English and so in the first language
alone (the others are not asked and get no rows); a sentence encoder then names the domains nearest to both.
"""

import json
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from torch import Tensor

from safesail.errors import InputError
from safesail.interpretation.findings import Finding, answer_schema, finding_of_json, finding_of_text
from safesail.interpretation.highlights import active_examples, numbered, silent_examples
from safesail.interpretation.languages import language_name
from safesail.interpretation.llm import Llm, Message, Reply, Request
from safesail.interpretation.prompts import inert, prompt, prompt_hash
from safesail.interpretation.tags import (
    TAG_SCHEMA,
    Candidates,
    candidates_by_neuron,
    tag_by_embedding,
    tag_by_explainer,
)
from safesail.interpretation.words import strongest_words
from safesail.progress import bar
from safesail.recipe import ExplainSection, Recipe
from safesail.run import StageWork
from safesail.taxonomy import Taxonomy

__all__ = [
    "chat_request",
    "completion_request",
    "expected_completion",
    "explain_requests",
    "explain_stage",
    "load",
]

_N_WORDS = 10
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
    """Explain every candidate that has an example, then name its domains.

    Facts: `usage`, `statuses` {status: explanations, one per neuron and language}, `refused_by_domain` {domain: neurons
    that are candidates for it and were refused}.
    """
    requests = explain_requests(recipe, examples, statistics, taxonomy)
    with bar("explain", len(requests), "neuron") as progress:
        answers = llm.ask(list(requests.values()), progress=progress.update)
    replies = dict(zip(requests, answers, strict=True))
    findings = {name: _finding(recipe, reply, taxonomy) for name, reply in replies.items()}
    rows = [row for name in requests for row in _rows(recipe, llm.backend.name, name, replies[name], findings[name])]
    words = {name: strongest_words(shown, _N_WORDS) for name, shown in _by_neuron(examples).items()}
    found = candidates_by_neuron(candidates)
    if recipe.explain.backend == "endpoint":
        tags = tag_by_explainer(findings, found, taxonomy, llm.backend.name)
    else:
        texts = {row["neuron_id"]: row["explanation"] for row in rows}
        tags = tag_by_embedding(texts, words, found, taxonomy, embed)
    _write(work.folder / "explanations.parquet", rows, _EXPLANATION_SCHEMA)
    _write(work.folder / "tags.parquet", tags, TAG_SCHEMA)
    _write(work.folder / "words.parquet", [{"neuron_id": n, "words": w} for n, w in words.items()], _WORDS_SCHEMA)
    work.facts["usage"] = llm.usage.summary()
    work.facts["statuses"] = dict(Counter(row["status"] for row in rows))
    work.facts["refused_by_domain"] = _refused_by_domain(rows, found, taxonomy)


def explain_requests(
    recipe: Recipe, examples: list[Row], statistics: dict[str, Row], taxonomy: Taxonomy
) -> dict[str, Request]:
    """What the stage asks, one request per neuron: {neuron id: request}."""
    section = recipe.explain
    if section.backend == "endpoint":
        return {
            name: chat_request(rows, statistics[name]["normaliser"], taxonomy, section)
            for name, rows in _by_neuron(examples).items()
        }
    first = section.languages[0]
    if first.partition("-")[0] != "en":
        raise InputError(
            f"explain.languages begins with {first!r}, but a local model explains in English alone; "
            "put 'en' first, or explain with backend = 'endpoint'"
        )
    return {name: completion_request(strongest_words(rows, _N_WORDS)) for name, rows in _by_neuron(examples).items()}


def expected_completion(request: Request, recipe: Recipe) -> int:
    """A guess of how many tokens the answer to a request has, for the estimate of a dry run."""
    section = recipe.explain
    guess = _FORM_TOKENS + _SENTENCE_TOKENS * len(section.languages) if section.backend == "endpoint" else _THEME_TOKENS
    return min(guess, request.max_tokens)


_FORM_TOKENS, _SENTENCE_TOKENS, _THEME_TOKENS = 45, 35, 5


def completion_request(words: list[str]) -> Request:
    """The few-shot completion for a model that cannot follow instructions."""
    text = prompt("explain_completion").replace("{words}", ", ".join(map(inert, words))).rstrip("\n")
    return Request(messages=(Message("user", text),), max_tokens=16, stop=("\n",))


def chat_request(examples: list[Row], q: float, taxonomy: Taxonomy, section: ExplainSection) -> Request:
    """The instruction for an endpoint, about one neuron: passages marked by level, then silent ones, answered in JSON.

    examples: the neuron's rows of EXAMPLE_SCHEMA; q: its normaliser. Corpus text stands in the three blocks and nowhere
    else; what comes before them is the same for all neurons, which servers that cache prefixes charge less for.
    """
    text = prompt("explain_chat").format(
        languages="\n".join(f'- "{code}": {language_name(code)}' for code in section.languages),
        domains="\n".join(_domain_line(domain) for domain in taxonomy.domains),
        words=", ".join(map(inert, strongest_words(examples, _N_WORDS))) or "(none)",
        excerpts=numbered(active_examples(examples, section.n_examples), q),
        silent=numbered(silent_examples(examples, section.n_near_misses), q),
        form=json.dumps(_form(section.languages), ensure_ascii=False),
    )
    schema = answer_schema(section.languages, taxonomy)
    return Request(messages=(Message("user", text),), max_tokens=section.max_tokens, schema=schema)


def _domain_line(domain: Any) -> str:
    return f"- {domain.id}: {domain.description} Categories: {', '.join(entry.id for entry in domain.categories)}"


def _form(languages: tuple[str, ...]) -> Row:
    sentences = dict.fromkeys(languages, "...")
    return {"explanations": sentences, "domains": ["..."], "category": "...", "concept": "...", "confidence": 0.5}


def _by_neuron(examples: list[Row]) -> dict[str, list[Row]]:
    """The explain half's rows of every neuron that is active in one of them."""
    found: dict[str, list[Row]] = defaultdict(list)
    for row in examples:
        if row["half"] == "explain":
            found[row["neuron_id"]].append(row)
    return {name: rows for name, rows in found.items() if any(row["activation"] > 0 for row in rows)}


def _finding(recipe: Recipe, reply: Reply, taxonomy: Taxonomy) -> Finding:
    if recipe.explain.backend == "endpoint":
        return finding_of_json(reply, recipe.explain.languages, taxonomy)
    return finding_of_text(reply, recipe.explain.languages[0])


def _rows(recipe: Recipe, explainer: str, name: str, reply: Reply, finding: Finding) -> list[Row]:
    """One row per language; one request gave them all, and what it cost stands in the first."""
    template = "explain_chat" if recipe.explain.backend == "endpoint" else "explain_completion"
    return [
        {
            "neuron_id": name,
            "language": language,
            "explanation": sentence.text,
            "status": sentence.status,
            "detail": sentence.detail,
            "confidence": finding.confidence if sentence.status == "ok" else None,
            "explainer": explainer,
            "prompt_hash": prompt_hash(template),
            "prompt_tokens": 0 if i else reply.prompt_tokens,
            "completion_tokens": 0 if i else reply.completion_tokens,
            "cost_usd": 0.0 if i else reply.cost_usd,
        }
        for i, (language, sentence) in enumerate(finding.sentences.items())
    ]


def _refused_by_domain(rows: list[Row], candidates: Candidates, taxonomy: Taxonomy) -> dict[str, int]:
    refused = {row["neuron_id"] for row in rows if row["status"] == "refused"}
    counts = Counter(domain for name in refused for domain in candidates[name])
    return {domain: counts[domain] for domain in taxonomy.domain_ids if counts[domain]}


def _write(path: Path, rows: list[Row], schema: pa.Schema) -> None:
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), path)


_EXPLANATION_SCHEMA = pa.schema(
    [
        ("neuron_id", pa.string()),
        ("language", pa.string()),
        ("explanation", pa.string()),
        ("status", pa.string()),
        ("detail", pa.string()),
        ("confidence", pa.float64()),
        ("explainer", pa.string()),
        ("prompt_hash", pa.string()),
        ("prompt_tokens", pa.int32()),
        ("completion_tokens", pa.int32()),
        ("cost_usd", pa.float64()),
    ]
)
_WORDS_SCHEMA = pa.schema([("neuron_id", pa.string()), ("words", pa.list_(pa.string()))])


def load(folder: Path) -> tuple[list[Row], dict[str, Row]]:
    """The explanations, one row per neuron and language, and the tags by neuron id that the explain stage wrote."""
    tags = pq.read_table(folder / "tags.parquet").to_pylist()
    return pq.read_table(folder / "explanations.parquet").to_pylist(), {tag["neuron_id"]: tag for tag in tags}
