"""How far an explanation can be trusted: segment-level simulation (Safe-SAIL).

Reads the harvest, the candidates' activations and their explanations. Writes `scores.parquet` (neuron × simulator).

Texts of the *score* half, disjoint from those that were explained, are cut into segments of a few tokens. The truth of
a segment is 1 if any of its tokens is active, else 0. A simulator that sees only the explanation says how active it
expects each segment to be. The score is the Pearson correlation of the two over all texts of the neuron, joined.

    embedding   cosine of explanation and segment, from a sentence encoder
    lexical     whether the segment holds one of the tokens that carry the latent on the explain half: costs nothing,
                knows no meaning, and is what every other simulator must be seen against
    llm         a language model names the segments in which it expects activity
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from safesail.interpretation.collect import Firings, Peak, load_codes, peaks
from safesail.interpretation.llm import Llm, Message, Reply, Request
from safesail.interpretation.prompts import inert, prompt
from safesail.lm.activations import Activations
from safesail.lm.tokens import token_bytes
from safesail.metrics import auroc, pearson_interval
from safesail.neurons import parse_neuron_id
from safesail.progress import bar
from safesail.recipe import Recipe
from safesail.run import StageWork
from safesail.training.step import generator

__all__ = ["Segments", "lexical_tokens", "score_stage", "segments_of", "simulation_request"]

_SEGMENTS_PER_TEXT = 8
_N_LEXICAL = 30
_SEGMENTS_PER_REQUEST = 60
Row = dict[str, Any]


class Segments(NamedTuple):
    """The segments on which one neuron is scored."""

    texts: list[str]
    ids: list[list[int]]
    truth: Tensor
    """(n_segments,) 1.0 where any token is active."""
    text_of: Tensor
    """(n_segments,) which text each segment comes from."""


def score_stage(
    recipe: Recipe,
    activations: Activations,
    collected: Path,
    statistics: dict[str, Row],
    explanations: list[Row],
    tokenizer: Any,
    embed: Callable[..., Tensor],
    llm: Llm | None,
    work: StageWork,
) -> None:
    """Score every explanation with every simulator of the recipe."""
    codes = {name: load_codes(collected, name) for name in activations.hook_points}
    found, lexicon = {}, {}
    with bar("score: segments", len(explanations), "neuron") as progress:
        for row in explanations:
            hook_point, latent = parse_neuron_id(row["neuron_id"], activations.hook_points)
            q = statistics[row["neuron_id"]]["normaliser"]
            found[row["neuron_id"]] = segments_of(recipe, activations, codes[hook_point], latent, q, tokenizer)
            active_above = recipe.score.active_above * q
            lexicon[row["neuron_id"]] = lexical_tokens(activations, codes[hook_point], latent, active_above, _N_LEXICAL)
            progress.update(1)
    rows: list[Row] = []
    for simulator in recipe.score.simulators:
        if simulator == "embedding":
            rows += _by_embedding(recipe, explanations, found, embed)
        elif simulator == "lexical":
            rows += _by_lexicon(recipe, explanations, found, lexicon)
        else:
            assert llm is not None, "the pipeline makes the llm when the recipe names it"
            rows += _by_llm(recipe, explanations, found, llm)
            work.facts["usage"] = llm.usage.summary()
    pq.write_table(pa.Table.from_pylist(rows, schema=_SCHEMA), work.folder / "scores.parquet")
    work.facts["n_segments"] = sum(len(segments.texts) for segments in found.values())


def segments_of(
    recipe: Recipe, activations: Activations, codes: Firings, latent: int, q: float, tokenizer: Any
) -> Segments:
    """The segments of a neuron's active and silent texts of the score half.

    Segments lie on a grid that starts at each text's beginning, so that neurons share them; of a long text, the
    stretch around the peak (or, in a silent text, the first) is used.
    """
    values, rows = codes.of(latent)
    active = {r for r, v in zip(rows.tolist(), values.tolist(), strict=True) if v > recipe.score.active_above * q}
    firing_pieces = {int(activations.piece_of_row[row]) for row in rows.tolist()}
    seed = (recipe.seed, "score", latent)
    chosen = _active_texts(recipe, activations, peaks(codes, activations, latent, q), seed)
    silent = _silent_texts(recipe, activations, firing_pieces)
    n, texts, ids, truth, text_of = recipe.score.segment_tokens, [], [], [], []
    for number, (piece, peak_row) in enumerate([*chosen, *silent]):
        piece_ids, first = activations.piece_ids[piece], int(activations.row_start[piece])
        for start in _grid(len(piece_ids), n, peak_row - first if peak_row is not None else 0):
            part = piece_ids[start : start + n]
            texts.append(b"".join(token_bytes(tokenizer, part)).decode(errors="replace"))
            ids.append(part)
            truth.append(float(any(first + start + i in active for i in range(len(part)))))
            text_of.append(number)
    return Segments(texts, ids, torch.tensor(truth), torch.tensor(text_of))


def lexical_tokens(activations: Activations, codes: Firings, latent: int, active_above: float, n: int) -> list[int]:
    """The n tokens that carry most of a latent's activation on the explain half, counted where it is active."""
    values, rows = codes.of(latent)
    weights: dict[int, float] = {}
    for value, row in zip(values.tolist(), rows.tolist(), strict=True):
        if value > active_above and activations.half[int(activations.piece_of_row[row])] == "explain":
            token = int(activations.token_ids[row])
            weights[token] = weights.get(token, 0.0) + value
    return sorted(weights, key=lambda token: (-weights[token], token))[:n]


def simulation_request(explanation: str, texts: list[str]) -> Request:
    """Ask which of the numbered segments are active; the texts are delimited data."""
    numbered = "\n".join(f"{i}: {inert(text)}" for i, text in enumerate(texts, 1))
    schema = {
        "type": "object",
        "properties": {"active": {"type": "array", "items": {"type": "integer"}}},
        "required": ["active"],
        "additionalProperties": False,
    }
    text = prompt("simulate_segments").format(explanation=inert(explanation), segments=numbered)
    return Request(messages=(Message("user", text),), max_tokens=8 * len(texts) + 32, schema=schema)


def _active_texts(
    recipe: Recipe, activations: Activations, found: list[Peak], seed: tuple[Any, ...]
) -> list[tuple[int, int | None]]:
    """Half of them the strongest, half drawn from all levels; one text per document."""
    ours, seen = [], set()
    for peak in found:
        if activations.half[peak.piece] == "score" and activations.documents[peak.piece] not in seen:
            seen.add(activations.documents[peak.piece])
            ours.append(peak)
    n_top = (recipe.score.n_active_texts + 1) // 2
    rest = ours[n_top:]
    order = torch.randperm(len(rest), generator=generator(*seed)).tolist()
    drawn = [rest[i] for i in order[: recipe.score.n_active_texts - n_top]]
    return [(peak.piece, peak.row) for peak in [*ours[:n_top], *drawn]]


def _silent_texts(recipe: Recipe, activations: Activations, firing: set[int]) -> list[tuple[int, int | None]]:
    """The first texts, in an order shared by all neurons, in which the latent never fires."""
    order = torch.randperm(len(activations.piece_ids), generator=generator(recipe.seed, "silent")).tolist()
    chosen: list[tuple[int, int | None]] = []
    for piece in order:
        if len(chosen) == recipe.score.n_silent_texts:
            break
        long_enough = len(activations.piece_ids[piece]) >= 2 * recipe.score.segment_tokens
        if activations.half[piece] == "score" and piece not in firing and long_enough:
            chosen.append((piece, None))
    return chosen


def _grid(length: int, n: int, around: int) -> range:
    """The starts of at most eight whole or final segments, the one holding `around` near their middle."""
    n_segments = -(-length // n)
    first = min(max(around // n - _SEGMENTS_PER_TEXT // 2, 0), max(n_segments - _SEGMENTS_PER_TEXT, 0))
    return range(first * n, min(first + _SEGMENTS_PER_TEXT, n_segments) * n, n)


def _by_embedding(recipe: Recipe, explanations: list[Row], found: dict[str, Segments], embed: Any) -> list[Row]:
    """Cosines of explanation and segment; every distinct text is encoded once."""
    explained = [row for row in explanations if row["status"] == "ok"]
    texts = sorted({text for row in explained for text in found[row["neuron_id"]].texts})
    texts += sorted({row["explanation"] for row in explained} - set(texts))
    with bar("score: embed", len(texts), "segment") as progress:
        vectors = embed(texts, progress=progress.update)
    number = {text: i for i, text in enumerate(texts)}
    rows = []
    for row in explanations:
        segments = found[row["neuron_id"]]
        predicted = None
        if row["status"] == "ok":
            predicted = vectors[[number[text] for text in segments.texts]] @ vectors[number[row["explanation"]]]
        rows.append(
            _row(recipe, row["neuron_id"], "embedding", _encoder_name(recipe), segments, predicted, row["status"])
        )
    return rows


def _by_lexicon(
    recipe: Recipe, explanations: list[Row], found: dict[str, Segments], lexicon: dict[str, list[int]]
) -> list[Row]:
    rows = []
    for row in explanations:
        segments, words = found[row["neuron_id"]], set(lexicon[row["neuron_id"]])
        predicted = torch.tensor([float(any(id in words for id in ids)) for ids in segments.ids])
        rows.append(
            _row(recipe, row["neuron_id"], "lexical", f"{_N_LEXICAL} strongest tokens", segments, predicted, "ok")
        )
    return rows


def _by_llm(recipe: Recipe, explanations: list[Row], found: dict[str, Segments], llm: Llm) -> list[Row]:
    requests, owners = [], []
    for row in explanations:
        if row["status"] == "ok":
            texts = found[row["neuron_id"]].texts
            for start in range(0, len(texts), _SEGMENTS_PER_REQUEST):
                requests.append(simulation_request(row["explanation"], texts[start : start + _SEGMENTS_PER_REQUEST]))
                owners.append((row["neuron_id"], start))
    with bar("score: simulate", len(requests), "call") as progress:
        replies = dict(zip(owners, llm.ask(requests, progress=progress.update), strict=True))
    rows = []
    for row in explanations:
        segments = found[row["neuron_id"]]
        mine = {start: reply for (name, start), reply in replies.items() if name == row["neuron_id"]}
        status, predicted = _predicted(mine, len(segments.texts)) if mine else (row["status"], None)
        scored = _row(recipe, row["neuron_id"], "llm", llm.backend.name, segments, predicted, status)
        scored["prompt_tokens"] = sum(reply.prompt_tokens for reply in mine.values())
        scored["completion_tokens"] = sum(reply.completion_tokens for reply in mine.values())
        costs = [reply.cost_usd for reply in mine.values()]
        scored["cost_usd"] = None if any(cost is None for cost in costs) else sum(cost or 0.0 for cost in costs)
        rows.append(scored)
    return rows


def _predicted(replies: dict[int, Reply], n: int) -> tuple[str, Tensor | None]:
    """The simulated vector, or the status of the first reply that is not ok."""
    predicted = torch.zeros(n)
    for start, reply in replies.items():
        if reply.status != "ok":
            return reply.status, None
        numbers = reply.value["active"]
        if any(not 1 <= number <= min(_SEGMENTS_PER_REQUEST, n - start) for number in numbers):
            return "unparsed", None
        predicted[[start + number - 1 for number in numbers]] = 1.0
    return "ok", predicted


def _row(
    recipe: Recipe, name: str, method: str, simulator: str, segments: Segments, predicted: Tensor | None, status: str
) -> Row:
    row: Row = {
        "neuron_id": name,
        "method": f"segment-{recipe.score.segment_tokens}/{method}",
        "simulator": simulator,
        "score": None,
        "low": None,
        "high": None,
        "auroc": None,
        "n_segments": len(segments.texts),
        "n_active": int(segments.truth.sum()),
        "status": status,
        "prompt_tokens": 0,
        "completion_tokens": 0,
        "cost_usd": 0.0,
    }
    if predicted is not None:
        interval = pearson_interval(predicted, segments.truth, segments.text_of, seed=recipe.seed)
        row |= {"score": interval.value, "low": interval.low, "high": interval.high}
        row["auroc"] = auroc(predicted, segments.truth)
        row["status"] = "ok" if interval.value is not None else "undefined"
    return row


def _encoder_name(recipe: Recipe) -> str:
    return Path(recipe.explain.encoder).name


_SCHEMA = pa.schema(
    [
        ("neuron_id", pa.string()),
        ("method", pa.string()),
        ("simulator", pa.string()),
        ("score", pa.float64()),
        ("low", pa.float64()),
        ("high", pa.float64()),
        ("auroc", pa.float64()),
        ("n_segments", pa.int32()),
        ("n_active", pa.int32()),
        ("status", pa.string()),
        ("prompt_tokens", pa.int32()),
        ("completion_tokens", pa.int32()),
        ("cost_usd", pa.float64()),
    ]
)
