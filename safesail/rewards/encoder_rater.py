"""A rater that needs no language model: a sentence encoder and a logistic regression on labelled texts.

    p(text) = σ(w · e(text) + b),   fitted on the anchors in `hub/rating/`
    rating  = 1 + number of thresholds 0.2, 0.4, 0.6, 0.8 below the mean of p over the latent's contexts

It stands behind the same door as an endpoint and answers `Score: n`, so that whoever asks need not know who answers.
What it can tell is what the anchors show: texts about harm, and how an assistant refuses or warns. How well it tells
them is measured by `calibration`.
"""

import json
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Annotated

import torch
from pydantic import BaseModel, ConfigDict, StringConstraints, ValidationError
from torch import Tensor

from safesail.assets import asset
from safesail.errors import InputError
from safesail.interpretation.llm import LocalBackend
from safesail.logistic import Logistic, best_strength, fit_logistic, folds
from safesail.metrics import Interval, auroc_interval

__all__ = ["THRESHOLDS", "Anchor", "anchors_file", "calibration", "encoder_backend", "rating_from", "read_anchors"]

THRESHOLDS = (0.2, 0.4, 0.6, 0.8)
_LATENTS_AT_ONCE = 16
Encode = Callable[[list[str]], Tensor]
"""Texts → unit vectors (n_texts, d)."""
Filled = Annotated[str, StringConstraints(pattern=r"\S")]


class Anchor(BaseModel):
    """A text that is about safety or is not."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    id: Filled
    text: Filled
    about: bool
    source: str = ""


def anchors_file() -> Path:
    """The shipped anchors, of the project's own writing."""
    return asset("hub/rating/anchors.jsonl")


def read_anchors(path: Path) -> list[Anchor]:
    """The anchors in a JSONL file; InputError at a broken line, an id given twice, or texts of one kind only."""
    anchors = [
        _anchor(path, number, line)
        for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), 1)
        if line.strip()
    ]
    if len({anchor.id for anchor in anchors}) < len(anchors):
        raise InputError(f"{path} gives an id twice; every anchor needs an id of its own.")
    if min(sum(anchor.about == about for anchor in anchors) for about in (True, False)) < 2:
        raise InputError(f"{path} has fewer than two texts of a kind; give some with about true and some with false.")
    return anchors


def _anchor(path: Path, number: int, line: str) -> Anchor:
    try:
        return Anchor.model_validate_json(line)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        field = ".".join(map(str, first["loc"])) or "the line"
        needed = json.dumps({"id": "1", "about": True, "text": "…", "source": "…"}, ensure_ascii=False)
        raise InputError(f"{path}, line {number}: {field}: {first['msg']}; a line looks like {needed}.") from None


def encoder_backend(
    encode: Encode, anchors: Sequence[Anchor], *, name: str, fingerprints: dict[str, str]
) -> LocalBackend:
    """A backend whose requests hold contexts, one a line, and whose answer is `Score: n` with the mean probability.

    name: the encoder's, for the rows. fingerprints: of the anchors' file and the encoder, which the answer depends on.
    The regression is fitted when the first answer is due.
    """

    @cache
    def rater() -> Logistic:
        return _fitted(encode([anchor.text for anchor in anchors]), _labels(anchors))

    def answers(prompts: list[str], max_tokens: int, stop: tuple[str, ...]) -> list[tuple[str, int, int]]:
        del max_tokens, stop  # the answer's form is fixed
        return [(_answer(encode, rater(), prompt.split("\n")), 0, 0) for prompt in prompts]

    identity = {"rater": "encoder", "thresholds": list(THRESHOLDS), **fingerprints}
    return LocalBackend(answers, f"encoder:{name}", identity, batch_size=_LATENTS_AT_ONCE)


def rating_from(probabilities: Tensor) -> int:
    """1 + the number of thresholds that the mean probability is above. probabilities: (n_contexts,)."""
    mean = float(probabilities.double().mean())
    return 1 + sum(mean > threshold for threshold in THRESHOLDS)


def calibration(encode: Encode, anchors: Sequence[Anchor], *, seed: int = 0) -> Interval:
    """The AUROC on anchors that neither the fit nor the choice of its penalty saw, with a 95 % interval over texts."""
    x, y = encode([anchor.text for anchor in anchors]), _labels(anchors)
    fold = folds(y, [anchor.id for anchor in anchors], seed=seed)
    logits = torch.zeros(len(y), dtype=torch.float64)
    for number in fold.unique().tolist():
        held = fold == number
        logits[held] = _fitted(x[~held], y[~held]).logits(x[held])
    return auroc_interval(logits, y, torch.arange(len(y)), seed=seed)


def _fitted(x: Tensor, y: Tensor) -> Logistic:
    """The regression with the penalty of least cross-validated loss. x: (n, d), y: bool (n,)."""
    fold = folds(y, [str(i) for i in range(len(y))])
    strength, _ = best_strength(x, y, fold)
    return fit_logistic(x, y, strength)


def _labels(anchors: Sequence[Anchor]) -> Tensor:
    return torch.tensor([anchor.about for anchor in anchors])


def _answer(encode: Encode, rater: Logistic, contexts: list[str]) -> str:
    probabilities = torch.sigmoid(rater.logits(encode(contexts)))
    return (
        f"Score: {rating_from(probabilities)}\nExplanation: by likeness to labelled texts, about safety with a mean "
        f"probability of {float(probabilities.mean()):.2f} over {len(contexts)} contexts"
    )
