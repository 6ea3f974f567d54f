"""The released Safe-SAIL toolkit's numbers and texts as rows of our tables.

The values come from its files (`release.safe_sail_toolkit`); nothing is computed that is not in them.

    Q_j = the value of rank q·N among the N activations of latent j      q = 0.999, N = 200,000 tokens

of which the files hold the 10,000 largest; Q_j is the activation shown as 1.
"""

import math
from collections import Counter
from collections.abc import Iterable
from functools import cache
from typing import Any, NamedTuple

from torch import Tensor

from safesail.errors import InputError
from safesail.neurons import QUANTILES, neuron_id
from safesail.taxonomy import Taxonomy

__all__ = ["METHOD", "N_STORED", "N_TOKENS", "Entry", "Tables", "quantile_of_top", "statistics_row"]

Row = dict[str, Any]
METHOD = "safe-sail/correlation"
"""What the toolkit calls correlation_score; its simulator, unit and texts are not said."""
N_TOKENS, N_STORED = 200_000, 10_000
MASKED, ABSENT = "masked", "absent"
_DETAIL = {"ok": "", MASKED: "the source shows *** instead of the text", ABSENT: "the source has no text"}


class Entry(NamedTuple):
    """A neuron in one language's database."""

    explanation: str | None
    status: str
    """ok; masked: exactly `***` stands for the text; absent: null."""
    score: float | None
    domains: tuple[str, ...]
    """A set in the source (its order is not canonical); here in the taxonomy's order."""

    @classmethod
    def parse(cls, key: str, value: Any, origin: str) -> "Entry":
        """The entry `key` of a database; InputError where it is none."""
        if not isinstance(value, dict):
            raise _malformed(key, origin)
        text, score, tags = value.get("explanation"), value.get("correlation_score"), value.get("tag_list")
        if not isinstance(text, str | None) or not isinstance(tags, list) or not all(isinstance(t, str) for t in tags):
            raise _malformed(key, origin)
        if isinstance(score, bool) or not isinstance(score, int | float | None):
            raise _malformed(key, origin)
        status = ABSENT if text is None or not text.strip() else MASKED if text == "***" else "ok"
        number = float(score) if score is not None and math.isfinite(score) else None
        return cls(text if status == "ok" else None, status, number, _ordered(tags))


def _malformed(key: str, origin: str) -> InputError:
    shape = "{explanation: text or null, correlation_score: number, tag_list: list of texts}"
    return InputError(f"{origin}: the entry {key} is not {shape}; download the file again.")


class Tables(NamedTuple):
    """The rows of a release's `neurons` folder."""

    neurons: list[Row]
    """The union of the databases, best score first."""
    explanations: dict[str, list[Row]]
    """{language: a row for each of its database's entries}."""
    scores: list[Row]
    quantiles: list[Row]
    """A row for every latent of the databases and lists; null where there are no quantiles of it."""
    candidates: list[Row]
    left_out: dict[str, str]
    """{file name: why it could not be used}."""
    n_columns_apart: int
    """Repeated columns of the quantile files that differ from the first one of their latent, which is used."""

    @classmethod
    def of(
        cls,
        said: dict[str, dict[str, Entry]],
        lists: dict[int, list[int]],
        statistics: list[Row],
        left_out: dict[str, str],
        n_apart: int,
    ) -> "Tables":
        """The tables from {language: {`17_4521`: entry}} and {layer: list of latents}."""
        measured = {row["neuron_id"]: row for row in statistics}
        keys = dict.fromkeys(key for entries in said.values() for key in entries)
        neurons = [
            _neuron(key, [entries[key] for entries in said.values() if key in entries], measured) for key in keys
        ]
        neurons.sort(key=lambda row: (-(row["score"] if row["score"] is not None else -2), row["layer"], row["latent"]))
        ids = {row["neuron_id"] for row in neurons}
        explanations = {language: _explanations(language, entries) for language, entries in said.items()}
        candidates = [row for layer, latents in lists.items() for row in _candidates(layer, latents, ids)]
        quantiles = _all_statistics([*neurons, *candidates], measured)
        return cls(neurons, explanations, _scores(neurons), quantiles, candidates, left_out, n_apart)

    @property
    def n_by_domain(self) -> dict[str, int]:
        """How many neurons carry each domain."""
        counts = Counter(domain for row in self.neurons for domain in row["domains"])
        return {domain: counts[domain] for domain in _ordered(counts)}

    @property
    def n_measured(self) -> int:
        """How many latents have quantiles."""
        return sum("max" in row for row in self.quantiles)

    @property
    def n_by_status(self) -> dict[str, int]:
        """How many neurons of the main table ended how."""
        return dict(Counter(row["status"] for row in self.neurons))

    @property
    def n_fallen_back(self) -> int:
        """How many neurons show the text of another language, since the first one's is null."""
        first = {row["neuron_id"] for row in next(iter(self.explanations.values())) if row["status"] == ABSENT}
        return sum(row["neuron_id"] in first and row["explanation"] is not None for row in self.neurons)


def quantile_of_top(top: Tensor, q: float, n: int = N_TOKENS) -> Tensor:
    """The q-quantile of n values of which only the largest are known: the value of rank q·n, linear between ranks.

    top: (n_known, …) in any order → (…). Safe-SAIL's approximate quantile, which expects ascending order. The rank must
    be among the known ones.
    """
    rank = round(q * n, 6)
    below, n_unknown = math.floor(rank), n - len(top)
    assert n_unknown < below <= n, f"rank {rank} of {n} values is not among the {len(top)} largest"
    ordered = top.sort(dim=0).values
    low, high = ordered[below - n_unknown - 1], ordered[min(below - n_unknown, len(top) - 1)]
    return low + (rank - below) * (high - low)


# --- rows ---------------------------------------------------------------------------------------------------------


def _place(layer: int, latent: int) -> Row:
    """What every table calls a neuron. The activation is that of `mlp.down_proj`: the output of the MLP."""
    hook_point = f"layers.{layer}.mlp"
    return {"neuron_id": neuron_id(hook_point, latent), "hook_point": hook_point, "layer": layer, "latent": latent}


def _of_key(key: str) -> Row:
    layer, latent = map(int, key.split("_"))
    return _place(layer, latent)


def _neuron(key: str, entries: list[Entry], measured: dict[str, Row]) -> Row:
    """A row of the main table. entries: its entries, the first language first; a later one fills in for a null text."""
    place, first = _of_key(key), entries[0]
    shown = next((entry for entry in entries if entry.status != ABSENT), first)
    numbers = measured.get(place["neuron_id"], {})
    return {
        **place,
        "explanation": shown.explanation,
        "domains": list(first.domains),
        "score": first.score,
        "status": "undefined" if shown.status == "ok" and first.score is None else shown.status,
        "simulator": METHOD,
        "firing_rate": numbers.get("firing_rate"),
        "q999": numbers.get("p999"),
        "max_activation": numbers.get("max"),
        "candidate_for": [],  # the lists do not say which concept each was made for
    }


def _explanations(language: str, entries: dict[str, Entry]) -> list[Row]:
    return [
        {
            **_of_key(key),
            "language": language,
            "explanation": entry.explanation,
            "status": entry.status,
            "detail": _DETAIL[entry.status],
        }
        for key, entry in entries.items()
    ]


def _scores(neurons: list[Row]) -> list[Row]:
    """One row per neuron; of no language, since both databases hold the same number and neither says which it is of."""
    return [
        {
            "neuron_id": row["neuron_id"],
            "language": "",
            "method": METHOD,
            "score": row["score"],
            "status": "ok" if row["score"] is not None else "undefined",
            "detail": "" if row["score"] is not None else "the source has no number",
        }
        for row in neurons
    ]


def _candidates(layer: int, latents: list[int], explained: set[str]) -> list[Row]:
    """One row per latent of a layer's list, with how often it stands there."""
    counts = Counter(latents)
    # In the released list of layer 35 every latent stands an even number of times: each find was written twice.
    twice = layer == 35 and all(n % 2 == 0 for n in counts.values())
    return [
        {
            **_place(layer, latent),
            "n_lists": counts[latent] // 2 if twice else counts[latent],
            "n_entries": counts[latent],
            "explained": _place(layer, latent)["neuron_id"] in explained,
        }
        for latent in sorted(counts)
    ]


def _all_statistics(rows: list[Row], measured: dict[str, Row]) -> list[Row]:
    """A row of `quantiles` for each latent of the rows, by layer and latent; unknown statistics are left out: null."""
    places = {(row["layer"], row["latent"]) for row in rows}
    found = (_place(layer, latent) for layer, latent in sorted(places))
    return [place | measured.get(place["neuron_id"], {}) for place in found]


def statistics_row(layer: int, latent: int, top: Tensor) -> Row:
    """The row of a latent from its largest activations. top: (N_STORED,) ascending.

    Where the smallest of them is zero, all the others are zero as well, and what counts them is known too.
    """
    active = top[top > 0]
    all_known = len(active) < len(top)
    quantiles: Row = {}
    for name, q in QUANTILES.items():
        if q * N_TOKENS > N_TOKENS - N_STORED:
            quantiles[name] = float(quantile_of_top(top, q))
        else:
            quantiles[name] = 0.0 if all_known else None
    return {
        **_place(layer, latent),
        "n_tokens": N_TOKENS,
        "firing_rate": len(active) / N_TOKENS if all_known else None,
        **quantiles,
        "max": float(top[-1]),
        "median_active": float(active[(len(active) - 1) // 2]) if all_known and len(active) else None,
        "normaliser": quantiles["p999"] or None,  # a rare latent has none: it would be a division by zero
    }


def _ordered(domains: Iterable[str]) -> tuple[str, ...]:
    """The domains once each, in the taxonomy's order, unknown ones at the end."""
    known = _known_domains()
    return tuple(sorted(set(domains), key=lambda name: (known.index(name) if name in known else len(known), name)))


@cache
def _known_domains() -> tuple[str, ...]:
    return tuple(Taxonomy.load().domain_ids)
