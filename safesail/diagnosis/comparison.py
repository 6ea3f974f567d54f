"""How well a monitor tells texts of a domain from others, beside two baselines, on texts that chose nothing.

The baselines are a linear probe on the same activations (the hook points' outputs, averaged or maximised over the
tokens: cross-validation on the calibration half chooses) and a word list (how many of the taxonomy's words of the
domain stand in the text). All three are compared on the same held-out texts, resampled together.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from safesail.diagnosis.inspection import Inspection
from safesail.diagnosis.inspector import Inspector
from safesail.diagnosis.labelled import LabelledText, seen_before
from safesail.diagnosis.monitor import Monitor, known_labels
from safesail.errors import InputError
from safesail.lm.hooks import capture
from safesail.logistic import best_strength, fit_logistic, folds
from safesail.metrics import Interval, auroc_difference, auroc_interval
from safesail.taxonomy import Taxonomy

__all__ = [
    "Comparison",
    "Probe",
    "Read",
    "Scores",
    "compared",
    "evaluate_monitor",
    "fit_probe",
    "n_words",
    "pooled",
    "read_once",
]

POOLINGS = ("mean", "max")


class Scores(NamedTuple):
    """What each method says of each text, higher for more risk. All: (n_texts,)."""

    monitor: Tensor
    probe: Tensor
    words: Tensor


class Comparison(NamedTuple):
    """AUROC of a monitor and its baselines on the same texts, and the monitor's less each baseline's."""

    domain: str
    n_about: int
    n_other: int
    monitor: Interval
    probe: Interval
    words: Interval
    over_probe: Interval
    over_words: Interval


class Read(NamedTuple):
    """What both methods read of a text."""

    inspection: Inspection
    pooled: dict[str, Tensor]
    """{pooling: (all hook points' d_in together,)}."""


class Probe(NamedTuple):
    """A linear probe on pooled activations."""

    pooling: str
    """mean or max, chosen by cross-validation."""
    strength: float
    logits: Callable[[Tensor], Tensor]
    """x: (n_texts, d) → (n_texts,)."""


def evaluate_monitor(
    inspector: Inspector,
    domain: str,
    calibration: Sequence[LabelledText],
    held_out: Sequence[LabelledText],
    *,
    seen: Iterable[str],
    seed: int = 0,
    reads: dict[str, Read] | None = None,
) -> tuple[Comparison, Monitor]:
    """Fit a monitor and the probe on one half, compare them with the word list on the other.

    seen: every text that chose something (the SAEs' corpus, the concept pairs). InputError when a held-out text, or
    most of it, stands among them or in the calibration half, or when a group of texts is in both halves. reads: what
    has been read of texts already, so that several evaluations read each once; it is added to.
    """
    _refuse_seen(calibration, held_out, seen)
    y = known_labels([text.about for text in calibration], [text.whole for text in calibration])
    known_labels([text.about for text in held_out], [text.whole for text in held_out])
    reads = {} if reads is None else reads
    read = [read_once(inspector, text.text, reads) for text in calibration]
    groups, given = [text.whole for text in calibration], [one.inspection for one in read]
    monitor = Monitor.fit(inspector, given, y.tolist(), domain, groups=groups, seed=seed)
    x = {how: torch.stack([one.pooled[how] for one in read]) for how in POOLINGS}
    probe = fit_probe(x, y, groups, seed=seed)
    held = [read_once(inspector, text.text, reads) for text in held_out]
    scores = Scores(
        torch.tensor([monitor.score(one.inspection).log_odds for one in held], dtype=torch.float64),
        probe.logits(torch.stack([one.pooled[probe.pooling] for one in held])),
        torch.tensor([n_words(domain, text.text) for text in held_out], dtype=torch.float64),
    )
    return compared(domain, held_out, scores, seed=seed), monitor


def compared(domain: str, texts: Sequence[LabelledText], scores: Scores, *, seed: int = 0) -> Comparison:
    """The AUROCs with their intervals and paired differences; groups of texts are resampled whole."""
    truth = torch.tensor([text.about for text in texts])
    names = {name: number for number, name in enumerate(sorted({text.whole for text in texts}))}
    groups = torch.tensor([names[text.whole] for text in texts])
    alone = [auroc_interval(values, truth, groups, seed=seed) for values in scores]
    over = [auroc_difference(scores.monitor, values, truth, groups, seed=seed) for values in scores[1:]]
    return Comparison(domain, int(truth.sum()), int((~truth).sum()), *alone, *over)


def fit_probe(x: dict[str, Tensor], y: Tensor, groups: Sequence[str], *, seed: int = 0) -> Probe:
    """The logistic probe whose pooling and penalty have the least cross-validated log loss.

    x: {pooling: (n_texts, d)}, in units of the standard deviations of the texts given; y: bool (n_texts,).
    """
    fold = folds(y, groups, seed=seed)
    fits = {}
    for how, rows in x.items():
        mean, scale = rows.mean(0), rows.std(0).clamp(min=1e-6)
        strength, loss = best_strength((rows - mean) / scale, y, fold)
        fits[how] = (loss, strength, mean, scale)
    pooling = min(fits, key=lambda how: fits[how][0])
    _, strength, mean, scale = fits[pooling]
    fitted = fit_logistic((x[pooling] - mean) / scale, y, strength)
    return Probe(pooling, strength, lambda rows: fitted.logits((rows - mean) / scale))


def read_once(inspector: Inspector, text: str, reads: dict[str, Read]) -> Read:
    """A text's inspection and pooled activations from one forward pass; kept in `reads`."""
    if text not in reads:
        with capture(inspector.model, tuple(inspector.saes)) as outputs:
            inspection = inspector.inspect(text)
        reads[text] = Read(inspection, pooled(outputs, inspection))
    return reads[text]


@torch.inference_mode()
def pooled(outputs: dict[str, Tensor], inspection: Inspection) -> dict[str, Tensor]:
    """{pooling: the activations of the counted tokens, averaged or maximised}: (all hook points' d_in together,), fp64.

    outputs: {hook point: (1, n_ids, d_in)}. Zero at a hook point that counts no token of the text.
    """
    rows = {name: outputs[name][0].double().cpu()[counts] for name, counts in inspection.counted.items()}
    rows = {name: x if len(x) else x.new_zeros(1, x.shape[1]) for name, x in rows.items()}
    return {
        "mean": torch.cat([x.mean(0) for x in rows.values()]),
        "max": torch.cat([x.amax(0) for x in rows.values()]),
    }


def n_words(domain: str, text: str, taxonomy: Taxonomy | None = None) -> int:
    """How many of the taxonomy's words of a domain stand in a text."""
    return len((taxonomy or Taxonomy.load()).about(domain).findall(text))


def _refuse_seen(calibration: Sequence[LabelledText], held_out: Sequence[LabelledText], seen: Iterable[str]) -> None:
    if shared := {text.whole for text in calibration} & {text.whole for text in held_out}:
        raise InputError(f"the group {min(shared)!r} is in both halves; part the texts with `halves`.")
    texts, calibrated = [text.text for text in held_out], [text.text for text in calibration]
    for others, where in ((calibrated, "the calibration half"), (seen, "what was seen before")):
        if known := [text.id for text, was in zip(held_out, seen_before(texts, others), strict=True) if was]:
            raise InputError(f"{len(known)} held-out texts, {known[0]!r} first, stand in {where}; leave them out.")
