"""Reads answers that people scored, and situations with right and wrong endings. Writes pairs as dictionaries.

    safety   two answers to one objective whose mean human scores of harm (0 to 1) differ by at least 0.25: the less
             harmful one is chosen. Scores are compared within one file, that is one panel and one scale. Pairs of
             larger difference come first, and no answer is in more than three.
    chat     a situation, its right ending chosen and one of its three wrong endings rejected

Every pair has an id made of what it holds, so that the same items always give the same pairs.
"""

import csv
import hashlib
import io
import re
import statistics
from collections import Counter, defaultdict
from collections.abc import Iterator
from itertools import product
from typing import NamedTuple

__all__ = ["chat_pairs", "safety_pairs", "scored_answers"]

Pair = dict[str, str | float]
_LEAST_DIFFERENCE = 0.25
_MOST_USES = 3


class Answer(NamedTuple):
    """An answer to an objective, with the mean of its human scores."""

    objective: str
    text: str
    harm: float


def scored_answers(content: bytes) -> list[Answer]:
    """The scored answers of a CSV file whose first line is a comment; a row without answer or score is left out."""
    rows = csv.DictReader(io.StringIO(content.decode("utf-8-sig").partition("\n")[2]))
    found = []
    for row in rows:
        scores = [float(value) for name, value in row.items() if (name or "").startswith("human_score") and value]
        objective, text = (row["objective"] or "").strip(), (row["assistant_response"] or "").strip()
        if objective and text and scores:
            found.append(Answer(objective, text, statistics.mean(scores)))
    return found


def safety_pairs(name: str, answers: list[Answer]) -> Iterator[Pair]:
    """The pairs of one file's answers. name: what the ids begin with."""
    by_objective: dict[str, dict[str, Answer]] = defaultdict(dict)
    for answer in answers:
        by_objective[answer.objective].setdefault(answer.text, answer)
    for objective, different in by_objective.items():
        for chosen, rejected in _compared(list(different.values())):
            yield {
                "id": f"{name}/{_digest(objective, chosen.text, rejected.text)}",
                "prompt": objective,
                "chosen": chosen.text,
                "rejected": rejected.text,
                "harm_chosen": round(chosen.harm, 4),
                "harm_rejected": round(rejected.harm, 4),
            }


def _compared(answers: list[Answer]) -> Iterator[tuple[Answer, Answer]]:
    """(the less harmful, the more harmful), the clearest first."""
    apart = [(a, b) for a, b in product(answers, repeat=2) if b.harm - a.harm >= _LEAST_DIFFERENCE]
    uses: Counter[str] = Counter()
    for chosen, rejected in sorted(apart, key=lambda pair: (pair[0].harm - pair[1].harm, pair[0].text, pair[1].text)):
        if uses[chosen.text] < _MOST_USES and uses[rejected.text] < _MOST_USES:
            uses.update((chosen.text, rejected.text))
            yield chosen, rejected


def chat_pairs(name: str, items: list[dict[str, str]]) -> Iterator[Pair]:
    """One pair of each HellaSwag item; which wrong ending is rejected, a hash of the context says."""
    seen: set[str] = set()
    for item in items:
        context, _, options = item["input"].partition("\nA. ")
        endings = re.split(r"\n[BCD]\. ", options.rstrip("\n"))
        right = item["target"][3:].strip()
        wrong = [ending.strip() for ending in endings if ending.strip() != right]
        texts = [_said(ending) for ending in (right, *wrong)]
        if context in seen or len(wrong) != len(endings) - 1 or not all(texts) or "[" in item["input"]:
            continue
        seen.add(context)
        prompt = f"What happens next? {context.strip()} ..."
        rejected = wrong[int(_digest(context), 16) % len(wrong)]
        yield {
            "id": f"{name}/{_digest(context)}",
            "prompt": prompt,
            "chosen": _said(right),
            "rejected": _said(rejected),
        }


def _said(ending: str) -> str:
    """An ending as a sentence of its own: without the comma it begins with, with a capital."""
    text = ending.lstrip(",.;:?!' ")
    return text[:1].upper() + text[1:]


def _digest(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:12]
