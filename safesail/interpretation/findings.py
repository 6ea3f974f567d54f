"""What an explainer said of a neuron, checked: a sentence in each language, domains, category, concept, confidence.

Whatever is not an explanation becomes a status with its reason, never a sentence: an empty or overlong text, one that
declines, one that is not written in its language. Sentences keep their words and markup (escaping is the business of
whoever prints them); white space is collapsed, control characters and directional overrides are taken out.
"""

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from safesail.interpretation.answers import is_refusal
from safesail.interpretation.exchange import Reply
from safesail.interpretation.languages import is_written_in, language_name
from safesail.taxonomy import Taxonomy

__all__ = ["LONGEST", "Finding", "Sentence", "answer_schema", "finding_of_json", "finding_of_text", "plain"]

LONGEST = 1000
"""Characters of an explanation; a longer one is unparsed, since its beginning is not what was said."""
_LONGEST_CONCEPT, _LONGEST_DETAIL = 100, 200
# C0 and C1 controls, lone surrogates (no UTF-8 file takes them), directional embeddings, overrides and isolates
_NO_TEXT = re.compile(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff\u202a-\u202e\u2066-\u2069]")


class Sentence(NamedTuple):
    """An explanation in one language."""

    status: str
    """ok, refused, unparsed or failed."""
    text: str | None
    """None unless the status is ok."""
    detail: str
    """Why it is not ok; of an ok one, what of the answer was left out."""


class Finding(NamedTuple):
    """All that was said of one neuron."""

    sentences: dict[str, Sentence]
    """By language, in the order they were asked for."""
    domains: tuple[str, ...] = ()
    """Domains of the taxonomy, in its order."""
    category: str = ""
    """A category of one of the domains."""
    concept: str = ""
    confidence: float | None = None
    """0 … 1, as the explainer gave it."""

    @property
    def is_ok(self) -> bool:
        """Whether there is an explanation in any language."""
        return any(sentence.status == "ok" for sentence in self.sentences.values())


def answer_schema(languages: Sequence[str], taxonomy: Taxonomy) -> dict[str, Any]:
    """The JSON schema of an answer, closed: exactly these languages, only the taxonomy's domains and categories."""
    categories = dict.fromkeys(category.id for domain in taxonomy.domains for category in domain.categories)
    return _closed(
        {
            "explanations": _closed({language: {"type": "string"} for language in languages}),
            "domains": {"type": "array", "items": {"type": "string", "enum": list(taxonomy.domain_ids)}},
            "category": {"type": "string", "enum": [*categories, ""]},
            "concept": {"type": "string"},
            "confidence": {"type": "number"},
        }
    )


def _closed(properties: dict[str, Any]) -> dict[str, Any]:
    required = list(properties)
    return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}


def finding_of_json(reply: Reply, languages: Sequence[str], taxonomy: Taxonomy) -> Finding:
    """What a reply to a request with `answer_schema` says.

    One sentence that declines makes the whole answer a refusal: openings are known in English and Chinese only, and the
    same answer's Hindi must not pass for an explanation.
    """
    if reply.status != "ok":
        return Finding({language: _missing(reply) for language in languages})
    value = reply.value
    sentences = {language: sentence(value["explanations"][language], language) for language in languages}
    declined = next((found for found in sentences.values() if found.status == "refused"), None)
    if declined is not None:
        return Finding(dict.fromkeys(languages, declined))
    domains = tuple(domain for domain in taxonomy.domain_ids if domain in value["domains"])
    category, confidence = value["category"], _confidence(value["confidence"])
    left_out = []
    if category and not _is_inside(category, domains, taxonomy):
        left_out.append(f"category {category} is of none of the named domains")
        category = ""
    if confidence is None:
        left_out.append("the confidence is not between 0 and 1")
    note = "; ".join(left_out)
    noted = {name: found._replace(detail=note) if found.text else found for name, found in sentences.items()}
    concept = plain(value["concept"])
    return Finding(noted, domains, category, concept if len(concept) <= _LONGEST_CONCEPT else "", confidence)


def finding_of_text(reply: Reply, language: str) -> Finding:
    """What a reply without a schema says: one sentence, in one language."""
    return Finding({language: sentence(reply.value, language) if reply.status == "ok" else _missing(reply)})


def sentence(text: str, language: str) -> Sentence:
    """The text as an explanation, or the reason why it is none."""
    text = plain(text)
    if not any(sign.isalnum() for sign in text):
        return Sentence("unparsed", None, "the explanation is empty")
    if is_refusal(text):
        return Sentence("refused", None, text[:_LONGEST_DETAIL])
    if len(text) > LONGEST:
        return Sentence("unparsed", None, f"the explanation has {len(text):,} characters, more than {LONGEST:,}")
    if not is_written_in(text, language):
        return Sentence("unparsed", None, f"the explanation is not written in {language_name(language)}")
    return Sentence("ok", text, "")


def plain(text: str) -> str:
    """The text in one line, without signs that act on a terminal, a page's direction or a file's encoding."""
    return " ".join(_NO_TEXT.sub("", " ".join(text.split())).split())


def _missing(reply: Reply) -> Sentence:
    return Sentence(reply.status, None, plain(reply.detail)[:_LONGEST_DETAIL])


def _confidence(value: float) -> float | None:
    return float(value) if 0 <= value <= 1 else None


def _is_inside(category: str, domains: Sequence[str], taxonomy: Taxonomy) -> bool:
    return any(category == entry.id for domain in domains for entry in taxonomy.domain(domain).categories)
