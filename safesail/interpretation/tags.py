"""Which domains a neuron belongs to: those it is a candidate for by its contrast pairs *and* that a tagger names.

Two taggers. An explainer behind an endpoint names domains and a category in its answer. Otherwise a sentence encoder
compares the explanation and the strongest words with anchors: descriptions and concepts of every category.
"""

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import pyarrow as pa
from torch import Tensor

from safesail.interpretation.findings import Finding
from safesail.taxonomy import Taxonomy

__all__ = ["TAG_SCHEMA", "candidates_by_neuron", "nearest_domains", "tag_by_embedding", "tag_by_explainer"]

_NEAR_AT_ALL, _NEAR_THE_BEST = 0.3, 0.15
Row = dict[str, Any]
Candidates = dict[str, dict[str, Row]]
"""{neuron id: {domain: the candidate's record}}."""

TAG_SCHEMA = pa.schema(
    [
        ("neuron_id", pa.string()),
        ("domains", pa.list_(pa.string())),
        ("category", pa.string()),
        ("concept", pa.string()),
        ("explainer_concept", pa.string()),
        ("candidate_for", pa.list_(pa.string())),
        ("n_wins", pa.int32()),
        ("n_losses", pa.int32()),
        ("p_value", pa.float64()),
        ("q_value", pa.float64()),
        ("level", pa.string()),
        ("tagger", pa.string()),
        ("similarity", pa.float64()),
    ]
)


def candidates_by_neuron(candidates: dict[str, Any]) -> Candidates:
    """The records of `candidates.json` by neuron id and domain."""
    found: Candidates = defaultdict(dict)
    for hook_point, domains in candidates.items():
        for domain, rows in domains.items():
            for row in rows:
                found[f"{hook_point}/{row['latent']}"][domain] = row
    return found


def tag_by_explainer(
    findings: dict[str, Finding], candidates: Candidates, taxonomy: Taxonomy, explainer: str
) -> list[Row]:
    """One row per finding: the domains it names among the neuron's candidate domains, and its category in them."""
    tags = []
    for name, finding in findings.items():
        records = candidates[name]
        domains = [domain for domain in finding.domains if domain in records] if finding.is_ok else []
        inside = {category.id for domain in domains for category in taxonomy.domain(domain).categories}
        category = finding.category if finding.category in inside else ""
        concept = finding.concept if finding.is_ok else ""
        tags.append(_tag(name, domains, category, records, explainer) | {"explainer_concept": concept})
    return tags


def tag_by_embedding(
    texts: dict[str, str | None],
    words: dict[str, list[str]],
    candidates: Candidates,
    taxonomy: Taxonomy,
    embed: Callable[[list[str]], Tensor],
) -> list[Row]:
    """One row per neuron, from its explanation (None: not explained, so no domain) and its strongest words."""
    if not texts:
        return []
    anchors = _anchors(taxonomy)
    vectors = embed([text for _, _, text in anchors])
    evidence = embed([f"{text or ''}: {', '.join(words[name])}" for name, text in texts.items()])
    tags = []
    for (name, text), cosines in zip(texts.items(), (evidence @ vectors.T).tolist(), strict=True):
        similarity: dict[str, float] = {}
        for (domain, _, _), cosine in zip(anchors, cosines, strict=True):
            similarity[domain] = max(cosine, similarity.get(domain, -1.0))
        domains = nearest_domains(similarity, list(candidates[name])) if text else []
        inside = [(c, anchor[1]) for c, anchor in zip(cosines, anchors, strict=True) if anchor[0] in domains]
        nearest = max(similarity[domain] for domain in taxonomy.domain_ids)
        category = max(inside)[1] if inside else ""
        tags.append(_tag(name, domains, category, candidates[name], "embedding") | {"similarity": nearest})
    return tags


def nearest_domains(similarity: dict[str, float], candidate_for: list[str]) -> list[str]:
    """The candidate domains that the evidence is about: nearer than anything neutral, near at all, and near the best.

    similarity: {domain id: largest cosine over its anchors, "neutral": the same over the neutral anchors}. Cosines
    below 0.3 say nothing with a small sentence encoder; 0.15 below the nearest domain is another subject.
    """
    nearest = max(value for name, value in similarity.items() if name != "neutral")
    limit = max(similarity["neutral"], _NEAR_AT_ALL, nearest - _NEAR_THE_BEST)
    return [domain for domain in candidate_for if similarity[domain] >= limit]


def _anchors(taxonomy: Taxonomy) -> list[tuple[str, str, str]]:
    """(domain, category, text): two texts for each category, and the neutral ones under the domain `neutral`."""
    return [
        *((d.id, c.id, f"{c.name}: {c.description}") for d in taxonomy.domains for c in d.categories),
        *((d.id, c.id, f"{c.name}: {', '.join(c.concepts)}") for d in taxonomy.domains for c in d.categories),
        *(("neutral", "", text) for text in taxonomy.neutral),
    ]


def _tag(name: str, domains: list[str], category: str, records: dict[str, Row], tagger: str) -> Row:
    best = min(records.values(), key=_rank)
    return {
        "neuron_id": name,
        "domains": domains,
        "category": category,
        "concept": _concept(domains, records),
        "explainer_concept": "",
        "candidate_for": list(records),
        "n_wins": max(row["n_wins"] for row in records.values()),
        "n_losses": min(row["n_losses"] for row in records.values()),
        "p_value": min(row["p_value"] for row in records.values()),
        "q_value": best.get("q_value"),
        "level": best.get("level"),
        "tagger": tagger,
        "similarity": None,
    }


def _rank(record: Row) -> tuple[float, bool]:
    """The smallest q-value first, of equal ones that of a whole domain; runs of older versions have neither."""
    return record.get("q_value", 1.0), record.get("level") != "domain"


def _concept(domains: list[str], records: dict[str, Row]) -> str:
    """The concepts of the pairs that the latent won, within its tagged domains."""
    concepts = dict.fromkeys(c for domain in domains for c in records.get(domain, {}).get("concepts", []))
    return ", ".join(list(concepts)[:3])
