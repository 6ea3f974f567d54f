"""Scores: which texts a neuron is tried on, what is true of them, and what a row says of a prediction."""

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from llm_double import COMPLETION_TOKENS, PROMPT_TOKENS, LlmDouble, prompt_of
from safetensors.torch import save_file
from torch import Tensor

from safesail.errors import InputError
from safesail.interpretation.collect import Firings
from safesail.interpretation.excerpts import Excerpt, Level, Pieces, Units, excerpts_of, group_excerpts, units_of
from safesail.interpretation.held import Held, lexical_tokens
from safesail.interpretation.llm import EndpointBackend, Llm
from safesail.interpretation.score import (
    SCORE_SCHEMA,
    method_name,
    score_requests,
    score_stage,
    scored_row,
)
from safesail.lm.activations import Activations
from safesail.lm.tokens import spans
from safesail.recipe import Recipe
from safesail.run import StageWork

HOOK_POINTS = ["layers.0.mlp", "layers.1.mlp"]
PLAIN = "the {} was quiet near the old house and the {} was there on that day too"
Row = dict[str, Any]


def recipe_of(**score: Any) -> Recipe:
    return Recipe.parse(
        {
            "name": "made",
            "model": {"path": "none"},
            "corpus": {"n_tokens": 1200, "n_held_out_tokens": 120, "sources": [{"path": "none.jsonl"}]},
            "harvest": {"hook_points": HOOK_POINTS},
            "train": {"d_sae": 24, "k": [2]},
            "explain": {"encoder": "somewhere/encoder-of-tests"},
            "score": {"n_active_texts": 4, "n_silent_texts": 4} | score,
        }
    )


class World(NamedTuple):
    """A harvest of texts, and where its latents fire."""

    activations: Activations
    codes: Firings
    tokenizer: Any
    folder: Path

    def words_of(self, row: int) -> str:
        """The unit that a row belongs to."""
        piece = int(self.activations.piece_of_row[row])
        at = row - int(self.activations.row_start[piece])
        units = spans(self.tokenizer, self.activations.piece_ids[piece])
        return next(unit.text for unit in units if unit.start <= at < unit.end)


class Text(NamedTuple):
    """One piece."""

    text: str
    half: str = "score"
    document: str = ""
    keep: slice = slice(None)
    """Which of its tokens the piece holds: the harvest cuts texts where it must."""


Fires = Callable[[int, str, str], float]
"""(latent, unit, text) → the activation on each token of the unit."""


def world(folder: Path, tokenizer: Any, texts: list[Text], fires: Fires, n_latents: int = 3) -> World:
    """A harvest and its codes, written to a folder and read as the stage reads them."""
    folder.mkdir(exist_ok=True)
    ids = [tokenizer(each.text, add_special_tokens=False)["input_ids"][each.keep] for each in texts]
    starts = torch.tensor([0, *map(len, ids)]).cumsum(0).tolist()
    pieces = {
        "document": [each.document or f"d{i}" for i, each in enumerate(texts)],
        "source": ["made"] * len(texts),
        "held_out": [False] * len(texts),
        "half": [each.half for each in texts],
        "row_start": starts[:-1],
        "ids": ids,
    }
    pq.write_table(pa.table(pieces), folder / "pieces.parquet")
    (folder / "harvest.json").write_text(json.dumps({"hook_points": HOOK_POINTS, "n_tokens": starts[-1]}))
    entries = []
    for latent in range(n_latents):
        mine = []
        for text, part, start in zip(texts, ids, starts, strict=False):
            for unit in spans(tokenizer, part):
                if value := fires(latent, unit.text.strip(), text.text):
                    mine += [(latent, value, start + i) for i in range(unit.start, unit.end)]
        entries += sorted(mine, key=lambda entry: entry[1:])
    latents, values, rows = ([entry[i] for entry in entries] for i in range(3))
    codes = Firings(
        torch.tensor(latents, dtype=torch.int32), torch.tensor(values), torch.tensor(rows, dtype=torch.int32)
    )
    for name in HOOK_POINTS:
        save_file(codes._asdict(), folder / f"codes-{name}.safetensors")
    return World(Activations(folder), codes, tokenizer, folder)


@pytest.fixture
def plain(tmp_path: Path, tokenizer: Any) -> World:
    """Latent 0 fires on `garden`, 1 on `river`, 2 on `music`, the more strongly the later a text stands.

    Texts 0 … 35 in turn: garden, river, music, and none of them; every third document is of the explain half.
    """
    words = ["garden", "river", "music", "kitchen"]
    texts = [
        Text(f"{PLAIN.format(words[i % 4], 'teacher')} {i}", "explain" if i % 3 == 0 else "score") for i in range(36)
    ]

    def fires(latent: int, unit: str, text: str) -> float:
        return (1 + int(text.split()[-1])) / 10 if unit == words[latent] else 0.0

    return world(tmp_path / "harvest", tokenizer, texts, fires)


def excerpts(made: World, latent: int, q: float = 4.0, **score: Any) -> list[Excerpt]:
    return excerpts_of(recipe_of(**score), made.activations, made.codes, latent, q, made.tokenizer)


def numbers(found: list[Excerpt]) -> set[int]:
    """The numbers that the texts of `plain` end with."""
    return {int("".join(excerpt.units).split()[-1]) for excerpt in found}


# --- what is true of tokens, segments and texts -------------------------------------------------------------------


HAND = [
    Excerpt(["a", "公", "b", "c", "d"], [[1], [2, 3, 4], [5], [6], [7]], [0.0, 0.25, 0.0, 0.0, 0.1]),
    Excerpt(["x", "y"], [[8], [9]], [0.0, 0.0]),
]


def test_a_segment_is_the_fewest_whole_units_with_enough_tokens():
    """1 + 3 tokens reach 4, then 1 + 1 + 1 end the text; the second text is one segment of two tokens."""
    found = units_of(HAND, "segment", 4, 0.0)
    assert found.texts == ["a公", "bcd", "xy"]
    assert found.ids == [[1, 2, 3, 4], [5, 6, 7], [8, 9]]
    assert found.truth.tolist() == [1.0, 1.0, 0.0]
    assert found.text_of.tolist() == [0, 0, 1]
    assert units_of(HAND, "segment", 2, 0.0).texts == ["a公", "bc", "d", "xy"]
    assert units_of(HAND, "segment", 1, 0.0).texts == ["a", "公", "b", "c", "d", "x", "y"]


def test_a_segment_or_text_is_active_where_a_token_is_above_the_limit():
    assert units_of(HAND, "segment", 4, 0.1).truth.tolist() == [1.0, 0.0, 0.0], "0.1 is not above 0.1"
    assert units_of(HAND, "text", 4, 0.24).truth.tolist() == [1.0, 0.0]
    assert units_of(HAND, "text", 4, 0.25).truth.tolist() == [0.0, 0.0]
    found = units_of(HAND, "text", 4, 0.0)
    assert (found.texts, found.text_of.tolist()) == (["a公bcd", "xy"], [0, 1])


def test_a_token_has_a_level():
    """10 · 0.25 = 2.5 is 2, halves going to even; 10 · 0.1 is 1."""
    found = units_of(HAND, "token", 4, 0.9)
    assert found.texts == ["a", "公", "b", "c", "d", "x", "y"]
    assert found.ids[1] == [2, 3, 4]
    assert found.truth.tolist() == [0, 2, 0, 0, 1, 0, 0]
    strengths = [0.0, 0.04, 0.06, 0.15, 0.35, 0.94, 0.96, 1.0, 7.0]
    row = Excerpt([str(i) for i in range(9)], [[i] for i in range(9)], strengths)
    assert units_of([row], "token", 5, 0.0).truth.tolist() == [0, 0, 1, 2, 4, 9, 10, 10, 10]


SCRIPTS = ["今天我们在公园里散步", "वह घर में बैठा था और पढ़ रहा है", "we 🐕 saw 🐈‍⬛ and 👩‍🚀 there"]


@pytest.mark.parametrize("text", SCRIPTS)
def test_segments_keep_characters_whole_in_every_script(text: str, tmp_path: Path, tokenizer: Any):
    made = world(tmp_path, tokenizer, [Text(text)], lambda latent, unit, text: float(unit == text[-1]))
    [found] = excerpts(made, 0, 1.0, n_active_texts=1, n_silent_texts=1, segment_tokens=12)
    ids = made.activations.piece_ids[0]
    assert "".join(found.units) == text, "8 segments of 12 tokens hold all of it"
    assert [id for unit in found.ids for id in unit] == ids
    for n in (1, 2, 3, 5):
        segments = units_of([found], "segment", n, 0.0)
        assert "".join(segments.texts) == text
        assert "\ufffd" not in "".join(segments.texts)
        assert all(len(part) >= n for part in segments.ids[:-1])
        assert all(len(part) < n + 4 for part in segments.ids), "no more than the last character asks for"
        assert segments.truth.tolist()[-1] == 1.0
    assert units_of([found], "segment", 1, 0.0).texts == list(text) or "we" in text


def test_what_a_cut_has_left_of_a_character_is_not_shown(tmp_path: Path, tokenizer: Any):
    """The piece begins with the last two bytes of 今 and ends with the first of 散, each byte a token."""
    assert len(tokenizer("今天", add_special_tokens=False)["input_ids"]) == 6
    made = world(tmp_path, tokenizer, [Text("今天在散", keep=slice(1, 10))], lambda latent, unit, text: 1.0)
    [found] = excerpts(made, 0, 1.0, n_active_texts=1, n_silent_texts=1)
    assert found.units == ["天", "在"]
    assert found.ids == [made.activations.piece_ids[0][2:5], made.activations.piece_ids[0][5:8]]
    only_parts = world(tmp_path, tokenizer, [Text("今", keep=slice(0, 2))], lambda latent, unit, text: 1.0)
    assert excerpts(only_parts, 0, 1.0) == []


# --- which texts --------------------------------------------------------------------------------------------------


def test_a_neuron_has_its_strongest_texts_some_others_and_silent_ones_of_the_score_half(plain: World):
    """Garden stands in 0, 4, 8, … 32; of these 0, 12 and 24 are of the explain half. The strongest are 32 and 28."""
    found = excerpts(plain, 0)
    mine, others = {n for n in numbers(found) if n % 4 == 0}, {n for n in numbers(found) if n % 4}
    assert len(found) == 8
    assert {32, 28} <= mine
    assert len(mine) == len(others) == 4
    assert mine <= {4, 8, 16, 20, 28, 32}
    assert all(n % 3 for n in others)
    for excerpt in found:
        n = int("".join(excerpt.units).split()[-1])
        expected = {"garden": pytest.approx((1 + n) / 10 / 4)} if n % 4 == 0 else {}
        assert {u.strip(): s for u, s in zip(excerpt.units, excerpt.strengths, strict=True) if s} == expected


def test_active_and_silent_texts_are_mixed_and_the_choice_is_seeded(plain: World):
    kinds = [any(excerpt.strengths) for excerpt in excerpts(plain, 0)]
    assert kinds != sorted(kinds)
    assert kinds != sorted(kinds, reverse=True)
    assert excerpts(plain, 0) == excerpts(plain, 0)


def test_silent_texts_come_from_one_order_that_neurons_share(plain: World):
    def silent(latent: int) -> set[str]:
        return {"".join(e.units) for e in excerpts(plain, latent, n_silent_texts=8) if not any(e.strengths)}

    pieces = Pieces(recipe_of(), plain.activations, plain.tokenizer)
    texts = {piece: "".join(unit.text for seg in pieces.segments(piece) for unit in seg) for piece in range(36)}
    for latent in range(3):
        expected = [texts[piece] for piece in pieces.shared_order if piece % 4 != latent][:8]
        assert silent(latent) == set(expected)


def test_a_text_that_is_only_weakly_active_is_neither(plain: World):
    """Above 0.6 · 4 = 2.4 lie garden's texts 28 (2.9) and 32 (3.3); 24 (2.5) is of the explain half."""
    found = excerpts(plain, 0, active_above=0.6, n_silent_texts=30)
    assert {n for n in numbers(found) if n % 4 == 0} == {28, 32}


def test_one_text_per_document_and_never_the_same_text_twice(tmp_path: Path, tokenizer: Any):
    texts = [Text(f"the garden {i}", document="same") for i in range(3)]
    texts += [Text("a garden"), Text("a garden"), Text("by the garden")]
    made = world(tmp_path, tokenizer, texts, lambda latent, unit, text: float(unit == "garden"))
    found = ["".join(excerpt.units) for excerpt in excerpts(made, 0, n_active_texts=6)]
    assert len(found) == 3
    assert sorted(found)[0] == "a garden"
    assert sorted(found)[1] == "by the garden"


def test_of_a_long_text_eight_segments_around_the_peak_are_shown(tmp_path: Path, tokenizer: Any):
    words = ["river"] * 60 + ["garden"] + ["river"] * 60
    made = world(tmp_path, tokenizer, [Text(" ".join(words))], lambda latent, unit, text: float(unit == "garden"))
    [found] = excerpts(made, 0, 1.0)
    segments = units_of([found], "segment", 5, 0.0)
    assert len(segments.texts) == 8
    assert segments.truth.tolist() == [0, 0, 0, 0, 1, 0, 0, 0]
    cuts = Pieces(recipe_of(), made.activations, tokenizer).segments(0)
    assert set(segments.texts) <= {"".join(unit.text for unit in cut) for cut in cuts}, "one grid for all neurons"


# --- texts that several neurons share -----------------------------------------------------------------------------


def group(made: World, latents: list[int], **score: Any) -> dict[int, list[Excerpt]]:
    normalisers = dict.fromkeys(latents, 4.0)
    return group_excerpts(recipe_of(**score), made.activations, made.codes, normalisers, made.tokenizer)


def test_a_group_of_one_has_the_texts_of_the_neuron(plain: World):
    assert group(plain, [1]) == {1: excerpts(plain, 1)}


def test_neurons_of_a_group_have_the_same_texts_and_each_its_own_truth(plain: World):
    found = group(plain, [0, 1, 2])
    texts = {tuple("".join(excerpt.units) for excerpt in mine) for mine in found.values()}
    assert len(texts) == 1
    for latent, mine in found.items():
        active = numbers([excerpt for excerpt in mine if any(excerpt.strengths)])
        assert active == {n for n in numbers(excerpts(plain, latent)) if n % 4 == latent}, "its own active texts"
        assert active == {n for n in numbers(mine) if n % 4 == latent}, "the truth is that of the activations"
    assert len(found[0]) == 3 * 4 + math.ceil(4 / 3)
    assert len([n for n in numbers(found[0]) if n % 4 == 3]) == 2, "none of the three is active on these"


def test_a_stretch_that_two_neurons_are_active_on_is_used_once(tmp_path: Path, tokenizer: Any):
    texts = [Text("the garden by the river")]
    made = world(tmp_path, tokenizer, texts, lambda latent, unit, text: float(unit == ["garden", "river", ""][latent]))
    found = group(made, [0, 1])
    assert [len(mine) for mine in found.values()] == [1, 1]
    assert [any(mine[0].strengths) for mine in found.values()] == [True, True]
    assert found[0][0].strengths != found[1][0].strengths


# --- rows ---------------------------------------------------------------------------------------------------------


def hand_units(truth: list[float], n_texts: int = 4) -> Units:
    n = len(truth)
    return Units(["x"] * n, [[1]] * n, torch.tensor(truth), torch.arange(n) % n_texts)


def test_the_figure_of_the_paper():
    row = scored_row(hand_units([1, 0, 1, 1]), torch.tensor([1.0, 0, 1, 0]), "segment", 0)
    assert row["score"] == pytest.approx(0.57735, abs=1e-5)  # 0.25 / sqrt(0.1875 · 0.25) = 1 / sqrt(3)
    assert (row["status"], row["detail"]) == ("ok", "")
    counts = [row[f"{name}s"] for name in ("true_positive", "false_positive", "false_negative", "true_negative")]
    assert counts == [2, 0, 1, 1]
    assert (row["n_units"], row["n_active"], row["n_texts"]) == (4, 3, 4)
    assert row["auroc"] == pytest.approx((1 + 1 + 0.5) / 3)


def test_the_figure_of_the_paper_by_tokens():
    """0, 8, 3, 0, …, 7, 1, 5, 4 against 0, 10, 3, 0, …, 10, 0, 0, 0: sums of products by hand.

    n = 9, Σa = 28, Σb = 23, Σab = 80 + 9 + 70 = 159, Σa² = 64 + 9 + 49 + 1 + 25 + 16 = 164, Σb² = 209.
    """
    truth, said = [0, 8, 3, 0, 0, 7, 1, 5, 4], [0, 10, 3, 0, 0, 10, 0, 0, 0]
    row = scored_row(hand_units([float(x) for x in truth], 9), torch.tensor(said).float(), "token", 0)
    cov, var_a, var_b = 9 * 159 - 28 * 23, 9 * 164 - 28**2, 9 * 209 - 23**2
    assert row["score"] == pytest.approx(cov / math.sqrt(var_a * var_b))
    assert row["score"] == pytest.approx(0.81, abs=0.005)
    assert [row["true_positives"], row["false_positives"], row["false_negatives"], row["true_negatives"]] == [
        3,
        0,
        3,
        3,
    ]


def test_yes_is_more_than_half_of_a_probability_and_level_one_of_a_token():
    truth = hand_units([1, 1, 0, 0])
    row = scored_row(truth, torch.tensor([0.51, 0.5, 0.9, 0.1]), "segment", 0)
    assert (row["true_positives"], row["false_negatives"], row["false_positives"]) == (1, 1, 1)
    row = scored_row(truth, torch.tensor([1.0, 0.99, 4.0, 0.51]), "token", 0)
    assert (row["true_positives"], row["false_negatives"], row["false_positives"]) == (1, 1, 1)
    row = scored_row(truth, torch.tensor([0.9, 0.8, 0.1, 0.2]), "segment", 0, is_of_activity=False)
    assert {row[name] for name in row if name.endswith(("positives", "negatives"))} == {None}
    assert row["score"] is not None


@pytest.mark.parametrize(
    ("truth", "said", "level", "detail"),
    [
        ([0, 0, 0, 0], [1, 0, 0, 0], "segment", "no segment is active"),
        ([0, 0, 0, 0], [0, 0, 0, 0], "text", "no text is active"),
        ([1, 1, 1, 1], [1, 0, 0, 0], "text", "every text is active"),
        ([0, 8, 0, 0], [0, 0, 0, 0], "token", "the simulator said the same of all"),
        ([1, 0, 0, 0], [1, 1, 1, 1], "segment", "the simulator said the same of all"),
        ([1], [1], "text", "there are fewer than two texts"),
        ([], [], "segment", "there are fewer than two segments"),
    ],
)
def test_a_constant_side_is_undefined_and_never_nought(truth: list[int], said: list[int], level: Level, detail: str):
    units = Units(["x"] * len(truth), [[1]] * len(truth), torch.tensor(truth).float(), torch.arange(len(truth)))
    row = scored_row(units, torch.tensor(said).float(), level, 0)
    assert (row["status"], row["detail"]) == ("undefined", detail)
    assert [row[name] for name in ("score", "low", "high", "auroc")] == [None] * 4
    assert row["true_positives"] + row["true_negatives"] == sum(a == (b > 0) for a, b in zip(said, truth, strict=True))


def test_methods_have_names():
    names = {
        "segment-embedding": "segment-5/embedding",
        "segment-lexical": "segment-5/lexical",
        "segment-llm": "segment-5/llm",
        "token-lexical": "token/lexical",
        "token-llm": "token/llm",
        "text-embedding": "similarity/embedding",
        "text-lexical": "text/lexical",
        "text-llm": "detection/llm",
    }
    assert {method: method_name(method, 5) for method in names} == names
    assert method_name("segment-llm", 8) == "segment-8/llm"


def test_the_lexicon_is_what_carries_a_latent_on_the_explain_half(tmp_path: Path, tokenizer: Any):
    """Explain half: garden 2 · 0.3, river 1 · 0.5, music 1 · 0.05; the score half's kitchen does not count."""
    value = {"garden": 0.3, "river": 0.5, "music": 0.05, "kitchen": 9.0}
    texts = [Text("the garden and the garden by the river music", "explain"), Text("the kitchen")]
    made = world(tmp_path, tokenizer, texts, lambda latent, unit, text: value.get(unit, 0.0))

    def ids(word: str) -> list[int]:
        return tokenizer(f" {word}", add_special_tokens=False)["input_ids"]

    assert [len(ids(word)) for word in value] == [1, 1, 1, 1]
    order = [ids(word)[0] for word in ("garden", "river", "music")]
    assert lexical_tokens(made.activations, made.codes, 0, 0.0, 30) == order
    assert lexical_tokens(made.activations, made.codes, 0, 0.1, 30) == order[:2]
    assert lexical_tokens(made.activations, made.codes, 0, 0.0, 1) == order[:1]


# --- the stage ----------------------------------------------------------------------------------------------------

WORDS = ["garden", "river", "music"]
METHODS = [
    "segment-llm", "token-llm", "text-llm", "segment-embedding", "text-embedding",
    "segment-lexical", "token-lexical", "text-lexical",
]  # fmt: skip


def explained(names: list[tuple[str, str]], **statuses: str) -> list[Row]:
    """An explanation per (neuron, language), `the word …` with the neuron's word."""
    rows = []
    for name, language in names:
        status = statuses.get(f"n{name[-1]}", "ok")
        text = f"the word {WORDS[int(name[-1])]}" + (" in Chinese" if language == "zh" else "")
        rows.append(
            {
                "neuron_id": name,
                "language": language,
                "status": status,
                "explanation": text if status == "ok" else None,
            }
        )
    return rows


def embed(texts: list[str], progress: Any = None) -> Tensor:
    """One direction a word: the product with an explanation is 1 where its word stands, else 0."""
    return torch.tensor([[float(word in text) for word in WORDS] for text in texts])


def answer(body: dict[str, Any]) -> str:
    """A perfect simulator of `the word …`, with level 10 for tokens."""
    prompt, keys = prompt_of(body), list(body["response_format"]["json_schema"]["schema"]["properties"])
    words = re.findall(r"<description[^>]*>\s*the word (\w+)", prompt)
    block = re.search(r"<(?:pieces|tokens)>\n(.*)\n</", prompt, re.DOTALL)
    assert block
    lines = block[1].split("\n")
    said = {key: [word in line for line in lines] for key, word in zip(keys, words, strict=True)}
    if keys == ["activations"]:
        return json.dumps({"activations": [10 * is_in for is_in in said["activations"]]})
    return json.dumps({key: [i for i, is_in in enumerate(each, 1) if is_in] for key, each in said.items()})


def run(
    made: World, explanations: list[Row], tmp_path: Path, behave: Any = None, **score: Any
) -> tuple[list[Row], list[str], dict[str, Any]]:
    """The rows of the stage over HTTP, the prompts that were sent, and the facts of its record."""
    recipe = recipe_of(**({"methods": METHODS, "backend": "endpoint", "model": "double"} | score))
    statistics = {row["neuron_id"]: {"normaliser": 4.0} for row in explanations}
    held = Held(recipe, made.activations, made.folder, statistics, explanations, made.tokenizer)
    out = tmp_path / "score"
    out.mkdir(exist_ok=True)
    work = StageWork(out)
    with LlmDouble(answer, **({"behave": behave} if behave else {})) as double:
        backend = EndpointBackend(
            "double", double.base_url, usd_per_million_prompt_tokens=1.0, usd_per_million_completion_tokens=2.0
        )
        score_stage(held, embed, Llm(backend, None), work)
        told = {request.messages[0].content for request in score_requests(held)}
        assert told == {prompt_of(body) for body in double.bodies}
        return pq.read_table(out / "scores.parquet").to_pylist(), [prompt_of(b) for b in double.bodies], work.facts


NAMES = [(f"{HOOK_POINTS[0]}/{latent}", language) for latent in (1, 0, 2) for language in ("en", "zh")]


def test_rows_stand_by_method_neuron_and_language(plain: World, tmp_path: Path):
    rows, _, facts = run(plain, explained(NAMES), tmp_path)
    expected = []
    for method in METHODS:
        once = [(name, "") for name, language in NAMES if language == "en"]
        expected += [(method_name(method, 5), *pair) for pair in (once if method.endswith("lexical") else NAMES)]
    assert [(row["method"], row["neuron_id"], row["language"]) for row in rows] == expected
    assert list(rows[0]) == SCORE_SCHEMA.names
    simulators = {row["method"].split("/")[1]: row["simulator"] for row in rows}
    assert simulators == {"llm": "openai:double", "embedding": "encoder-of-tests", "lexical": "30 strongest tokens"}
    assert facts["statuses"] == {"ok": len(expected)}


def test_who_knows_the_word_scores_one_at_every_level(plain: World, tmp_path: Path):
    rows, _, _ = run(plain, explained(NAMES), tmp_path)
    for row in rows:
        if row["method"].startswith("token"):  # the same is said of levels from 1 to 8
            assert 0.8 < row["score"] < 1
        else:
            assert row["score"] == pytest.approx(1)
        if not row["method"].endswith("embedding"):
            assert (row["true_positives"], row["false_positives"], row["false_negatives"]) == (4, 0, 0)
            assert row["true_negatives"] == row["n_units"] - 4
        assert (row["n_active"], row["n_texts"], row["auroc"]) == (4, 8, 1)


def test_tokens_and_cost_of_all_requests_are_in_the_rows(plain: World, tmp_path: Path):
    rows, prompts, facts = run(plain, explained(NAMES), tmp_path, segments_per_request=10)
    assert sum(row["prompt_tokens"] for row in rows) == PROMPT_TOKENS * len(prompts)
    assert sum(row["completion_tokens"] for row in rows) == COMPLETION_TOKENS * len(prompts)
    assert facts["usage"]["prompt_tokens"] == PROMPT_TOKENS * len(prompts)
    spent = sum(row["cost_usd"] for row in rows)
    assert spent == pytest.approx(facts["usage"]["cost_usd"])
    assert spent == pytest.approx(len(prompts) * (PROMPT_TOKENS + 2 * COMPLETION_TOKENS) / 1e6)
    assert all(row["cost_usd"] == 0 for row in rows if not row["method"].endswith("llm"))
    token = next(row for row in rows if row["method"] == "token/llm")
    assert token["prompt_tokens"] == 8 * PROMPT_TOKENS, "eight excerpts"


def test_shared_requests_cost_less_and_judge_the_same_texts_by_every_method(plain: World, tmp_path: Path):
    english = [pair for pair in NAMES if pair[1] == "en"]
    methods = ["segment-llm", "segment-lexical"]
    alone, prompts, _ = run(plain, explained(english), tmp_path, methods=methods)
    shared, fewer, _ = run(plain, explained(english), tmp_path, methods=methods, neurons_per_request=3)
    assert [row["score"] for row in shared] == pytest.approx([1.0] * 6)
    assert len({(row["n_units"], row["n_texts"]) for row in shared}) == 1
    assert [row["n_texts"] for row in shared] == [3 * 4 + 2] * 6
    assert [row["n_active"] for row in shared] == [row["n_active"] for row in alone]
    assert len(fewer) < len(prompts)
    pieces = [len(re.findall(r"^\d+: ", "\n".join(asked), re.MULTILINE)) for asked in (prompts, fewer)]
    assert pieces[1] < pieces[0]


def test_whose_texts_are_shared_does_not_depend_on_what_became_of_explanations(plain: World, tmp_path: Path):
    english = [pair for pair in NAMES if pair[1] == "en"]
    settings: Row = {"methods": ["segment-llm"], "neurons_per_request": 3}
    all_ok, _, _ = run(plain, explained(english), tmp_path, **settings)
    one_less, prompts, _ = run(plain, explained(english, n0="refused"), tmp_path, **settings)
    assert [row["status"] for row in one_less] == ["ok", "refused", "ok"]
    for before, after in zip(all_ok, one_less, strict=True):
        if after["status"] == "ok":
            assert [before[k] for k in ("score", "low", "high", "n_units")] == [
                after[k] for k in ("score", "low", "high", "n_units")
            ]
    assert all('id="3"' not in prompt for prompt in prompts)


def test_an_explanation_that_is_not_ok_has_rows_with_its_status(plain: World, tmp_path: Path):
    rows, prompts, _ = run(plain, explained(NAMES, n0="refused", n2="failed"), tmp_path)
    for row in rows:
        expected = {"0": "refused", "2": "failed"}.get(row["neuron_id"][-1], "ok") if row["language"] else "ok"
        assert row["status"] == expected
        assert (row["score"] is None) == (expected != "ok")
        if expected != "ok":
            assert (row["detail"], row["prompt_tokens"], row["cost_usd"]) == (
                "there is no explanation to be scored", 0, 0.0
            )  # fmt: skip
            assert (row["true_positives"], row["n_texts"]) == (None, 8)
    assert all("river" in re.findall(r"the word (\w+)", prompt) for prompt in prompts)


def test_a_call_that_fails_leaves_a_status_and_no_number(plain: World, tmp_path: Path):
    def behave(prompt: str, attempt: int) -> str:
        return "refusal" if "the word river" in prompt else "prose" if "the word music" in prompt else "json"

    rows, _, facts = run(plain, explained(NAMES), tmp_path, behave)
    for row in rows:
        is_llm = row["method"].endswith("/llm")
        status = {"1": "refused", "2": "unparsed"}.get(row["neuron_id"][-1], "ok") if is_llm else "ok"
        assert row["status"] == status
        assert (row["score"] is None) == ((row["true_positives"] is None and not is_llm and False) or status != "ok")
        assert (row["detail"] == "") == (status == "ok")
        assert not is_llm or row["prompt_tokens"] > 0
    assert facts["statuses"]["refused"] == 6
    assert facts["statuses"]["unparsed"] == 6


def test_latents_of_several_hook_points_are_kept_apart(plain: World, tmp_path: Path):
    """At the second hook point latent 0 is the river and latent 1 the garden: explanations of the first score low."""
    n_garden, n_river = (int((plain.codes.latents == latent).sum()) for latent in (0, 1))
    order = torch.cat([torch.arange(n_garden, n_garden + n_river), torch.arange(n_garden)])
    latents = torch.tensor([0] * n_river + [1] * n_garden, dtype=torch.int32)
    swapped = Firings(latents, plain.codes.values[order], plain.codes.rows[order])
    save_file(swapped._asdict(), plain.folder / f"codes-{HOOK_POINTS[1]}.safetensors")
    names = [(f"{hook_point}/{latent}", "en") for latent in (0, 1) for hook_point in HOOK_POINTS]
    for together in (1, 2):
        rows, _, _ = run(
            plain, explained(names), tmp_path, methods=["segment-llm"], neurons_per_request=together, n_silent_texts=2
        )
        assert [row["neuron_id"] for row in rows] == [name for name, _ in names]
        assert [row["score"] == pytest.approx(1) for row in rows] == [True, False, True, False]


def test_only_the_languages_of_the_recipe_are_scored(plain: World, tmp_path: Path):
    rows, prompts, _ = run(plain, explained(NAMES), tmp_path, languages=["zh"], methods=["text-llm", "text-lexical"])
    assert [row["language"] for row in rows] == ["zh"] * 3 + [""] * 3
    assert all("in Chinese" in prompt for prompt in prompts)
    with pytest.raises(
        InputError, match=r"names hi, but there are explanations in en, zh only; leave score\.languages"
    ):
        run(plain, explained(NAMES), tmp_path, languages=["hi"])


def test_a_neuron_without_active_texts_is_undefined(plain: World, tmp_path: Path):
    rows, _, _ = run(
        plain, explained(NAMES[:1]), tmp_path, active_above=1.0, methods=["segment-llm", "segment-lexical"]
    )
    assert [(row["status"], row["score"], row["n_active"]) for row in rows] == [("undefined", None, 0)] * 2
    assert {row["detail"] for row in rows} == {"no segment is active"}


def test_without_a_language_model_there_is_nothing_to_ask(plain: World):
    recipe = recipe_of(methods=["segment-lexical"])
    statistics = {neuron: {"normaliser": 4.0} for neuron, _ in NAMES}
    held = Held(recipe, plain.activations, plain.folder, statistics, explained(NAMES), plain.tokenizer)
    assert score_requests(held) == []
