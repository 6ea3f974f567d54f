"""A conversation of nine tokens whose neurons fire as written here: what is said of it can be worked out by hand.

unit         0 special  1 " a"   2 " bomb"   3 "é" (two tokens)  4 "\\n"    5 special  6 " river"  7 "Bomb"
layers.0.mlp (1: 3.0)   5: 0.5   1: 3.0      1: 1.0, then 4.0               (none)     2: 0.6      1: 2.0
                                 5: 2.0
layers.1.mlp            4: 0.7   3: 2.0                          6: 9.0     (4: 5.0)   3: 4.4
                                 4: 0.2
normalisers  0/1: 2, 0/2: 1, 0/5: 1, 1/3: 4, 1/4: 1; 1/6 never fired in the corpus

In brackets: on special tokens, which are not counted. Units 6 and 7 are the answer.
"""

import torch

from safesail.diagnosis.inspection import Inspection
from safesail.lm.tokens import Span
from safesail.neurons import NeuronDatabase
from safesail.sae.sparse import Codes

__all__ = ["FIRST", "SECOND", "hand_database", "hand_inspection"]

FIRST, SECOND = "layers.0.mlp", "layers.1.mlp"
UNITS = [("<|s|>", 1), (" a", 1), (" bomb", 1), ("é", 2), ("\n", 1), ("<|e|>", 1), (" river", 1), ("Bomb", 1)]
FIRED = {
    FIRST: [{1: 3.0}, {5: 0.5}, {1: 3.0, 5: 2.0}, {1: 1.0}, {1: 4.0, 5: 0.0}, {}, {}, {2: 0.6}, {1: 2.0}],
    SECOND: [{}, {4: 0.7}, {3: 2.0, 4: 0.2}, {}, {}, {6: 9.0}, {4: 5.0}, {3: 4.4}, {}],
}
"""Per hook point the activation of every active latent on every token; one entry is kept and zero."""


def hand_inspection(database: NeuronDatabase | None = None) -> Inspection:
    """The conversation, over the database of `hand_database` or another."""
    counted = torch.tensor([True] * 9)
    counted[[0, 6]] = False
    units, start = [], 0
    for text, n in UNITS:
        units.append(Span(text, start, start + n, text.startswith("<|")))
        start += n
    return Inspection(
        ids=list(range(10, 19)),
        n_prompt=7,
        units=units,
        codes={name: _codes(fired) for name, fired in FIRED.items()},
        counted={FIRST: counted, SECOND: counted.clone()},
        error={FIRST: torch.arange(9) / 10, SECOND: torch.full((9,), 0.5)},
        database=database or hand_database(),
        left_out_roles=[""] * 9,
    )


def _codes(fired: list[dict[int, float]]) -> Codes:
    offsets = torch.tensor([0, *(len(found) for found in fired)]).cumsum(0)
    values = torch.tensor([value for found in fired for value in found.values()])
    return Codes(values, torch.tensor([latent for found in fired for latent in found]), offsets)


def hand_database() -> NeuronDatabase:
    """Four neurons with rows: two explained, one refused, one weak; the first also in Chinese."""
    rows = [
        _row(FIRST, 1, "Bombs", ["terror"], 0.5),
        _row(FIRST, 2, "Rivers", [], 0.9),
        _row(SECOND, 3, None, ["violence"], None),
        _row(SECOND, 4, "Weak words", ["terror", "violence"], 0.1),
    ]
    scales = {(FIRST, 1): 2.0, (FIRST, 2): 1.0, (FIRST, 5): 1.0, (SECOND, 3): 4.0, (SECOND, 4): 1.0, (SECOND, 6): 0.0}
    quantiles = [
        {"neuron_id": f"{hook_point}/{latent}", "hook_point": hook_point, "latent": latent, "normaliser": scale}
        for (hook_point, latent), scale in scales.items()
    ]
    said = {row["neuron_id"]: {"en": {"explanation": row["explanation"], "status": row["status"]}} for row in rows}
    said[f"{FIRST}/1"]["zh"] = {"explanation": "炸弹", "status": "ok"}
    said[f"{SECOND}/4"]["zh"] = {"explanation": None, "status": "refused"}
    neurons, scales_by_id = {row["neuron_id"]: row for row in rows}, {row["neuron_id"]: row for row in quantiles}
    return NeuronDatabase(neurons, scales_by_id, {}, said, languages=["en", "zh"])


def _row(hook_point: str, latent: int, explanation: str | None, domains: list[str], score: float | None) -> dict:
    return {
        "neuron_id": f"{hook_point}/{latent}",
        "hook_point": hook_point,
        "latent": latent,
        "explanation": explanation,
        "domains": domains,
        "category": "weapons" if "terror" in domains else "",
        "concept": "",
        "status": "ok" if explanation else "refused",
        "score": score,
        "score_low": None if score is None else score - 0.1,
        "score_high": None if score is None else score + 0.1,
        "explainer": "a model",
        "simulator": "a simulator",
    }
