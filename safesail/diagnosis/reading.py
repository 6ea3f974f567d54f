"""Whether the model can read a version of a prompt at all: what it costs in bits and in tokens."""

import math
from collections.abc import Mapping
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F

from safesail.diagnosis.inspector import Inspector
from safesail.interpretation.languages import language_name

__all__ = ["Reading", "readings"]

Prompt = str | list[dict[str, str]]

HARD_ABOVE, UNKNOWN_ABOVE, PIECES_FROM = 1.5, 2.0, 1.0
"""The limits of `Reading`: two of times_reference, one of tokens_per_character."""
Verdict = Literal["known", "hard", "unknown", "alone"]


class Reading(NamedTuple):
    """How well the model reads a version, measured on the prompt alone, outside the chat template.

    Versions of one content cost a model that reads them about equally many bits in all, -Σ log2 p(token | earlier
    tokens) over all tokens but the first; bits per byte do not compare across scripts, whose characters take one byte
    or three. The verdict:

        unknown     tokens_per_character ≥ 1 (and not plain ASCII): the vocabulary has only pieces of the characters;
                    or more than 2 times the reference's bits in what is stated to be another language
        hard        else more than 1.5 times the reference's bits: unusual spelling or wording, or a language half known
        known       else
        alone       there is nothing to compare with, or a text has one token only

    The limits are ours, from parallel sentences of `hub/pairs`. Under SmolLM2-135M, trained on English, 95 % of 80
    other English sentences took 1.15 times the bits or less; English with letters swapped took 1.8 times at the median
    and 0.38 tokens per character at most; Chinese took 2.2 times at the median and at least 1.39 tokens per character,
    Hindi 3.1 times and at least 0.96. Under Qwen2.5-Coder-1.5B, which knows Chinese, 16 sentences took 1.2 times the
    bits in Chinese (quartiles 0.94 and 1.32, at most 0.75 tokens per character) and 2.2 times in Hindi.
    """

    label: str
    bits: float | None
    bits_per_byte: float | None
    tokens_per_character: float
    times_reference: float | None
    """bits / the reference's bits; None for the reference itself, or where either has none."""
    verdict: Verdict
    sentence: str


def readings(
    inspector: Inspector, prompts: Mapping[str, Prompt], languages: Mapping[str, str | None]
) -> dict[str, Reading]:
    """The reading of every version; the English one is the reference, without one the first.

    prompts: {label: prompt}; languages: {label: code, or None where it is not stated}.
    """
    reference = next((label for label in prompts if _base(languages[label]) == "en"), next(iter(prompts)))
    texts = {label: _text_of(prompt) for label, prompt in prompts.items()}
    bits = {label: _bits(inspector, text) for label, text in texts.items()}
    found = {}
    for label, text in texts.items():
        mine, theirs = bits[label], bits[reference]
        times = mine / theirs if label != reference and mine is not None and theirs else None
        per_byte = None if mine is None else mine / len(text.encode(errors="replace"))
        per_character = len(inspector.encode(text)) / len(text)
        foreign = languages[label] is not None and _base(languages[label]) != _base(languages[reference])
        verdict = _verdict(text, per_character, times, foreign)
        told = _figures(per_byte, per_character, times, reference)
        compared = label == reference and len(texts) > 1
        sentence = _sentence(_name(label, languages[label]), verdict, told, reference, compared)
        found[label] = Reading(label, mine, per_byte, per_character, times, verdict, sentence)
    return found


def _verdict(text: str, per_character: float, times: float | None, foreign: bool) -> Verdict:
    pieces = per_character >= PIECES_FROM and not text.isascii()  # every vocabulary has the ASCII characters whole
    if pieces or (times is not None and foreign and times > UNKNOWN_ABOVE):
        return "unknown"
    if times is None:
        return "alone"
    return "hard" if times > HARD_ABOVE else "known"


def _figures(per_byte: float | None, per_character: float, times: float | None, reference: str) -> str:
    split = f"{per_character:.2f} tokens per character"
    if times is not None:
        return f"{times:.1f} times the bits of {reference}, {split}"
    return split if per_byte is None else f"{per_byte:.1f} bits per byte, {split}"


def _sentence(name: str, verdict: Verdict, figures: str, reference: str, compared: bool) -> str:
    if verdict == "unknown":
        return (
            f"The model reads {name} as text in a language that it does not know ({figures}): "
            "a neuron that is silent there says nothing about the concept, and one that fires may mean something else."
        )
    if verdict == "hard":
        return (
            f"The model reads {name} as unusual text ({figures}): "
            "what is missing there may be owed to spelling, wording or language alone."
        )
    if verdict == "known":
        return f"The model reads {name} about as easily as {reference} ({figures})."
    rest = "the other versions are compared with it" if compared else "there is no other version to compare it with"
    return f"The model reads {name} at {figures}; {rest}."


def _name(label: str, language: str | None) -> str:
    if language is None:
        return f"version {label}"
    return language_name(language) if language == label else f"version {label} ({language_name(language)})"


def _bits(inspector: Inspector, text: str) -> float | None:
    """-Σ log2 p(token | earlier tokens) over all tokens but the first, or None for a text of one token."""
    ids = torch.tensor(inspector.encode(text), device=inspector.model.device)
    if len(ids) < 2:
        return None
    with torch.inference_mode():
        logits = inspector.model(input_ids=ids[None], use_cache=False).logits[0, :-1].float()
        return F.cross_entropy(logits, ids[1:], reduction="sum").item() / math.log(2)


def _text_of(prompt: Prompt) -> str:
    return prompt if isinstance(prompt, str) else prompt[-1]["content"]


def _base(language: str | None) -> str | None:
    return language.partition("-")[0] if language else None
