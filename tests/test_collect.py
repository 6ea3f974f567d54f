"""The collect stage: exact statistics in bounded memory, examples of every level, near-misses, whole characters.

The SAE of these tests is the identity with a ReLU, so an activation of the harvest is the latent's.
"""

import contextlib
import itertools
import json
import resource
import signal
import tracemalloc
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from made_sweep import files_of
from safetensors.torch import load_file, save_file
from torch import Tensor

from safesail.errors import InputError
from safesail.interpretation import buckets, firings
from safesail.interpretation.buckets import spill
from safesail.interpretation.collect import Firings, collect_stage, load_codes, peaks, sparse_codes
from safesail.interpretation.contexts import Contexts, whole_units
from safesail.interpretation.firings import Block, writing_codes
from safesail.interpretation.near_misses import strongest_tokens
from safesail.lm.activations import Activations
from safesail.lm.tokens import _byte_of_character
from safesail.recipe import Recipe
from safesail.run import StageWork
from safesail.sae.config import SaeConfig
from safesail.sae.model import Sae

HOOK_POINT = "layers.0.mlp"
SPECIAL = 0
LEVELS = {"p50": 0.5, "p90": 0.9, "p99": 0.99, "p999": 0.999, "p9999": 0.9999, "max": 1.0}


class Text(NamedTuple):
    """A piece of the harvest: its token ids and where its latents fire, {(token, latent): activation}."""

    document: str
    half: str
    ids: list[int]
    fires: dict[tuple[int, int], float]
    sinks: tuple[int, ...] = ()
    """Tokens that do not count because of their norm."""


# --- making a harvest ---------------------------------------------------------------------------------------------


def harvest_of(folder: Path, texts: list[Text], n_latents: int = 4) -> Activations:
    rows = [(text, i) for text in texts for i in range(len(text.ids))]
    x = torch.zeros(len(rows), n_latents)
    for row, (text, i) in enumerate(rows):
        for latent in range(n_latents):
            x[row, latent] = text.fires.get((i, latent), 0.0)
    norms = torch.tensor([1000.0 if i in text.sinks else 1.0 for text, i in rows])
    return written(folder, texts, x, norms)


def written(folder: Path, texts: list[Text], x: Tensor, norms: Tensor) -> Activations:
    """Two shards of fp16 activations and what belongs to them."""
    folder.mkdir()
    ids = torch.tensor([id for text in texts for id in text.ids]).int()
    tensors = {"token_ids": ids, HOOK_POINT: x.half(), f"{HOOK_POINT}:norm": norms}
    for number, part in enumerate((slice(0, len(x) * 2 // 3), slice(len(x) * 2 // 3, len(x)))):
        shard = {name: tensor[part].contiguous() for name, tensor in tensors.items()}
        save_file(shard, folder / f"shard-{number:05d}.safetensors")
    lengths = [len(text.ids) for text in texts]
    pieces = {
        "document": [text.document for text in texts],
        "source": ["made"] * len(texts),
        "held_out": [False] * len(texts),
        "half": [text.half for text in texts],
        "row_start": [0, *itertools.accumulate(lengths)][: len(texts)],
        "ids": [text.ids for text in texts],
    }
    pq.write_table(pa.table(pieces), folder / "pieces.parquet")
    facts = {
        "hook_points": [HOOK_POINT],
        "d_in": {HOOK_POINT: x.shape[1]},
        "median_norm": {HOOK_POINT: 1.0},
        "special_ids": [SPECIAL],
        "n_tokens": len(x),
    }
    (folder / "harvest.json").write_text(json.dumps(facts))
    return Activations(folder)


def identity(n_latents: int) -> Sae:
    config = SaeConfig(
        d_in=n_latents, d_sae=n_latents, k=None, architecture="relu", hook_point=HOOK_POINT, coefficient=0.1
    )
    eye, zero = torch.eye(n_latents), torch.zeros(n_latents)
    return Sae(config, eye, zero, eye.clone(), zero.clone())


def recipe_of(seed: int = 0, megabytes: int = 64, **collect: Any) -> Recipe:
    return Recipe.parse(
        {
            "name": "made",
            "seed": seed,
            "model": {"path": "none"},
            "corpus": {"n_tokens": 1200, "n_held_out_tokens": 120, "sources": [{"path": "none.jsonl"}]},
            "harvest": {"hook_points": [HOOK_POINT]},
            "train": {"d_sae": 4, "k": [2]},
            "collect": {"before": 2, "after": 1, "n_top": 2, "n_per_level": 1, "n_near_misses": 2} | collect,
            "explain": {"encoder": "none"},
            "runtime": {"collect_megabytes": megabytes},
        }
    )


def collected(
    folder: Path, recipe: Recipe, activations: Activations, tokenizer: Any, explained: list[int] | None = None
) -> Path:
    """Run the stage on some latents, all of them unless they are named."""
    n_latents = activations.facts["d_in"][HOOK_POINT]
    trained = activations.folder.parent / "trained"
    if not trained.exists():
        identity(n_latents).save(trained / "identity")
    chosen = list(range(n_latents)) if explained is None else explained
    rows = [{"latent": latent, "explain": latent in chosen} for latent in reversed(range(n_latents))]
    folder.mkdir(exist_ok=True)
    selection, candidates = {"selected": {HOOK_POINT: "identity"}}, {HOOK_POINT: {"violence": rows, "terror": rows}}
    collect_stage(recipe, activations, trained, selection, candidates, tokenizer, StageWork(folder))
    return folder


def table(folder: Path, name: str) -> list[dict[str, Any]]:
    return pq.read_table(folder / f"{name}.parquet").to_pylist()


def letters(tokenizer: Any, text: str) -> list[int]:
    """One token for each ASCII letter."""
    return tokenizer.convert_tokens_to_ids(list(text))


@pytest.fixture
def crowd(tmp_path: Path) -> Activations:
    """3,000 tokens in 300 documents; 40 latents fire at small whole numbers on a half of them, so with many ties."""
    chance = torch.Generator().manual_seed(0)
    x = torch.randint(-4, 5, (3000, 40), generator=chance).clamp(min=0).float()
    x[:, 7] = 0  # dead
    x[:, 8] = torch.arange(3000) == 1234  # fires once, at 1
    x[:, :3] += 1  # fire everywhere: buckets that hold more than was expected
    ids = torch.randint(66, 90, (300, 10), generator=chance).tolist()
    texts = [Text(f"d{i}", "explain" if i % 2 else "score", ids[i], {}) for i in range(300)]
    return written(tmp_path / "harvest", texts, x, torch.ones(3000))


# --- statistics ---------------------------------------------------------------------------------------------------


def test_statistics_written_out(tmp_path: Path, tokenizer: Any):
    """Eight counted tokens; latent 0 fires at 2, 4, 6, 1 once, 2 never and 3 on none that count."""
    ids = [SPECIAL, *letters(tokenizer, "abcdefghi")]
    fires = {(1, 0): 4.0, (2, 0): 2.0, (5, 0): 6.0, (6, 1): 0.5, (0, 3): 9.0, (9, 3): 9.0}
    activations = harvest_of(tmp_path / "harvest", [Text("d", "explain", ids, fires, sinks=(9,))])
    rows = table(collected(tmp_path / "out", recipe_of(), activations, tokenizer), "statistics")
    assert [row["neuron_id"] for row in rows] == [f"{HOOK_POINT}/{i}" for i in range(4)]
    assert rows[0] == {
        "neuron_id": f"{HOOK_POINT}/0",
        "hook_point": HOOK_POINT,
        "latent": 0,
        "n_tokens": 8,
        "firing_rate": 3 / 8,
        "p50": 0.0,  # the 4th of 0 0 0 0 0 2 4 6
        "p90": 6.0,  # the 8th
        "p99": 6.0,
        "p999": 6.0,
        "p9999": 6.0,
        "max": 6.0,
        "median_active": 4.0,
        "normaliser": 6.0,
        "histogram": [0, 0, 0, 1, 0, 0, 1, 0, 0, 1],  # 2, 4 and 6 are 3.3, 6.7 and 10 tenths
    }
    assert (rows[1]["firing_rate"], rows[1]["p50"], rows[1]["max"], rows[1]["normaliser"]) == (1 / 8, 0.0, 0.5, 0.5)
    for dead in rows[2:]:
        assert not any(dead[name] for name in ("firing_rate", *LEVELS, "median_active", "normaliser"))


def test_statistics_are_those_of_the_dense_matrix(crowd: Activations, tmp_path: Path, tokenizer: Any):
    rows = table(collected(tmp_path / "out", recipe_of(megabytes=1), crowd, tokenizer, []), "statistics")
    x = crowd.rows(HOOK_POINT, torch.arange(3000)).numpy()
    for latent, row in enumerate(rows):
        column = x[:, latent]
        assert row["firing_rate"] == (column > 0).mean()
        for name, level in LEVELS.items():
            assert row[name] == np.quantile(column, level, method="inverted_cdf"), (latent, name)
        active = column[column > 0]
        median = float(np.quantile(active, 0.5, method="inverted_cdf")) if len(active) else 0.0
        assert row["median_active"] == median
        assert row["normaliser"] == max(row["p999"], median)
        edges = [*(np.arange(10) / 10 * row["normaliser"]), np.inf]  # a value on an edge belongs below it
        below = [int(((active > low) & (active <= high)).sum()) for low, high in itertools.pairwise(edges)]
        assert sum(row["histogram"]) == len(active)
        assert sum(abs(a - b) for a, b in zip(row["histogram"], below, strict=True)) <= 2  # fp32 at an edge
    assert (rows[7]["normaliser"], rows[8]["p999"], rows[8]["normaliser"]) == (0.0, 0.0, 1.0)  # dead; once in 3,000


def test_no_token_that_counts_is_a_persons_mistake(tmp_path: Path, tokenizer: Any):
    activations = harvest_of(tmp_path / "harvest", [Text("d", "explain", [SPECIAL] * 3, {})])
    with pytest.raises(InputError, match=r"no token counts at layers\.0\.mlp .* loosen \[tokens\]"):
        collected(tmp_path / "out", recipe_of(), activations, tokenizer)


# --- codes --------------------------------------------------------------------------------------------------------


def test_codes_are_sorted_by_latent_value_and_row(crowd: Activations, tmp_path: Path, tokenizer: Any):
    codes = load_codes(collected(tmp_path / "out", recipe_of(), crowd, tokenizer, [2, 8, 30]), HOOK_POINT)
    x = crowd.rows(HOOK_POINT, torch.arange(3000))
    expected = [(latent, float(x[row, latent]), row) for latent in (2, 8, 30) for row in range(3000) if x[row, latent]]
    found = list(zip(codes.latents.tolist(), codes.values.tolist(), codes.rows.tolist(), strict=True))
    assert found == sorted(expected)
    assert len({value for _, value, _ in found}) < 10  # rows decide between many equal values
    everything = sparse_codes(identity(40), crowd, recipe_of().tokens)
    for latent in (2, 7, 8, 30):
        assert torch.equal(everything.of(latent)[0], codes.of(latent)[0]) or latent == 7
        assert torch.equal(everything.of(latent)[1], codes.of(latent)[1]) or latent == 7
    assert len(everything.of(7)[0]) == 0


def test_without_candidates_the_codes_are_empty(crowd: Activations, tmp_path: Path, tokenizer: Any):
    out = collected(tmp_path / "out", recipe_of(), crowd, tokenizer, [])
    assert {name: len(tensor) for name, tensor in load_file(out / f"codes-{HOOK_POINT}.safetensors").items()} == {
        "latents": 0,
        "values": 0,
        "rows": 0,
    }
    assert table(out, "examples") == []


def test_fewer_codes_than_announced_leave_no_file(tmp_path: Path):
    one = Firings(torch.tensor([3]), torch.tensor([0.5]), torch.tensor([7]))
    with pytest.raises(AssertionError, match="1 entries were written where 2 were announced"):  # noqa: SIM117
        with writing_codes(tmp_path, HOOK_POINT, 2) as append:
            append(one)
    assert files_of(tmp_path) == {}


# --- memory -------------------------------------------------------------------------------------------------------


def test_results_depend_neither_on_memory_nor_on_blocks_nor_on_buckets(
    crowd: Activations, tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
):
    some = [1, 5, 8, 30]
    plenty = files_of(collected(tmp_path / "plenty", recipe_of(megabytes=1024), crowd, tokenizer, some))
    assert sorted(plenty) == [f"codes-{HOOK_POINT}.safetensors", "examples.parquet", "statistics.parquet"]
    assert files_of(collected(tmp_path / "little", recipe_of(megabytes=1), crowd, tokenizer, some)) == plenty
    for entry_bytes, n_rows, at_once, most_files in ((1 << 11, 70, 1000, 256), (1 << 9, 333, 999, 3)):
        monkeypatch.setattr("safesail.interpretation.collect.BYTES_PER_ENTRY", entry_bytes)
        monkeypatch.setattr(firings, "_PRE_ACTIVATIONS", 40 * n_rows)
        monkeypatch.setattr(buckets, "_AT_ONCE", at_once)
        monkeypatch.setattr(buckets, "_MOST_FILES", most_files)
        assert files_of(collected(tmp_path / f"r{n_rows}", recipe_of(megabytes=1), crowd, tokenizer, some)) == plenty


def blocks_of(n_blocks: int, n: int, d_sae: int) -> Any:
    """Blocks of n rows with an entry each, most of them of the first latents."""
    for number in range(n_blocks):
        chance = torch.Generator().manual_seed(number)
        latents = (torch.rand(n, generator=chance) ** 1.5 * d_sae).int()
        yield Block(n, latents, torch.rand(n, generator=chance) + 0.1, torch.arange(number * n, (number + 1) * n).int())


@pytest.mark.parametrize(("most_files", "limit"), [(256, 500), (4, 500), (1, 3000), (256, 10**9)])
def test_parts_cover_all_latents_and_stay_below_the_limit(
    most_files: int, limit: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(buckets, "_MOST_FILES", most_files)
    spilled = spill(blocks_of(20, 1000, 300), 300, 20_000, tmp_path, limit)
    parts = list(spilled.parts())
    assert [latent for latents, _ in parts for latent in latents] == list(range(300))
    assert sum(len(part.rows) for _, part in parts) == 20_000
    assert all(len(part.rows) <= limit or len(latents) == 1 for latents, part in parts)
    assert len(parts) == 1 if limit == 10**9 else len(parts) >= 20_000 // limit
    assert len(list(tmp_path.iterdir())) == min(-(-20_000 // limit), most_files)


def test_memory_does_not_grow_with_the_texts(tmp_path: Path):
    """Twice the peak of the limit's 20,000 entries would be 1.3 MB; the entries of all blocks are 12 and 48 MB."""

    def peak(n_blocks: int) -> int:
        folder = tmp_path / str(n_blocks)
        folder.mkdir()
        tracemalloc.start()
        spilled = spill(blocks_of(n_blocks, 5000, 1000), 1000, 5000 * n_blocks, folder, 20_000)
        for _ in spilled.parts():
            pass
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return found

    old, buckets._AT_ONCE = buckets._AT_ONCE, 1 << 13
    try:
        few, many = peak(50), peak(200)
    finally:
        buckets._AT_ONCE = old
    assert few < 4e6
    assert many < 1.3 * few + 2e5


def test_what_a_killed_attempt_left_is_not_taken(crowd: Activations, tmp_path: Path, tokenizer: Any):
    whole = files_of(collected(tmp_path / "whole", recipe_of(), crowd, tokenizer))
    left = tmp_path / "again/buckets"
    left.mkdir(parents=True)
    (left / "bucket-000").write_bytes(bytes(12 * 500))
    (left / ".bucket-001.new").write_bytes(bytes(5))
    (tmp_path / f"again/codes-{HOOK_POINT}.safetensors").write_bytes(b"half")
    assert files_of(collected(tmp_path / "again", recipe_of(), crowd, tokenizer)) == whole


@contextlib.contextmanager
def small_files() -> Iterator[None]:
    """No file can grow beyond 5 kB, as on a disk that is full; pytest's own output neither, so it is for calls only."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)


def test_a_full_disk_is_said_in_a_sentence_and_leaves_nothing(tmp_path: Path):
    with small_files(), pytest.raises(InputError, match="free some space and run the same command"):
        spill(blocks_of(20, 1000, 300), 300, 20_000, tmp_path, 1000)
    assert list(tmp_path.iterdir()) == []


# --- examples -----------------------------------------------------------------------------------------------------


def test_examples_of_every_level(tmp_path: Path, tokenizer: Any):
    """Q is 10: p999 is the largest. Two top examples, then one of each level that has one left."""
    word = itertools.product("abcdefghij", repeat=5)
    values = [10.0, 9.5, 9.25, 8.5, 7.0, 6.99, 0.5, 0.25]
    texts = [
        Text(f"d{i}", half, letters(tokenizer, "".join(next(word))), {(3, 0): value})
        for half in ("explain", "score")
        for i, value in enumerate(values, 100 * (half == "score"))
    ]
    activations = harvest_of(tmp_path / "harvest", texts)
    out = collected(tmp_path / "out", recipe_of(n_near_misses=0), activations, tokenizer, [0])
    rows = table(out, "examples")
    found = [(row["rank"], row["stratum"], row["level"], row["activation"]) for row in rows if row["half"] == "explain"]
    assert found[:6] == [
        (0, "top", 10, 10.0),
        (1, "top", 10, 9.5),
        (2, "level-10", 10, 9.25),
        (3, "level-9", 9, 8.5),
        (4, "level-8", 8, 7.0),
        (5, "level-7", 7, pytest.approx(6.99, abs=0.01)),
    ]
    assert [row[:3] for row in found[6:]] == [(6, "level-1", 1)]
    assert found[6][3] in (0.5, 0.25)
    assert [row["stratum"] for row in rows if row["half"] == "score"] == [row[1] for row in found]
    shown = rows[0]
    assert shown["text"] == "".join(shown["tokens"]) == "aaaa"
    assert (shown["activations"], shown["peak"]) == ([0.0, 0.0, 10.0, 0.0], 2)  # two before it and one after
    assert (shown["document"], shown["piece"], shown["source"]) == ("d0", 0, "made")


def test_no_document_and_no_text_is_shown_twice(tmp_path: Path, tokenizer: Any):
    ids = {"one": letters(tokenizer, "abcde"), "other": letters(tokenizer, "fghij")}
    texts = [
        Text("d0", "explain", ids["one"], {(2, 0): 10.0}),
        Text("d0", "explain", ids["other"], {(2, 0): 9.0}),  # the same document
        Text("d1", "explain", ids["one"], {(2, 0): 8.0}),  # the same piece
        Text("d2", "explain", letters(tokenizer, "zzABcDzz"), {(4, 0): 7.0}),  # its context is AbcD once more
        Text("d3", "score", letters(tokenizer, "qabcd"), {(3, 0): 6.0}),  # the same context in the other half
        Text("d4", "score", ids["other"], {(2, 0): 5.0}),
    ]
    activations = harvest_of(tmp_path / "harvest", texts)
    out = collected(tmp_path / "out", recipe_of(n_top=9, n_per_level=9), activations, tokenizer, [0])
    rows = table(out, "examples")
    assert [(row["document"], row["half"], row["text"]) for row in rows] == [
        ("d0", "explain", "abcd"),
        ("d4", "score", "fghi"),
    ]


def test_near_misses_hold_a_strong_token_and_are_silent(tmp_path: Path, tokenizer: Any):
    def text(document: str, half: str, word: str, fires: dict[int, float], **more: Any) -> Text:
        return Text(document, half, letters(tokenizer, word), {(i, 0): value for i, value in fires.items()}, **more)

    texts = [
        text("fires", "explain", "abkcd", {2: 8.0}),  # the token k carries 8 of 9
        text("both", "explain", "efmghik", {2: 1.0}),  # its k is silent, but the document is an example already
        text("near", "explain", "lmknop", {}),
        text("near", "explain", "pqkrs", {}),  # the same document once more
        text("copy", "explain", "LMKNop".lower(), {}),  # the same text once more
        text("beside", "explain", "rstukv", {5: 0.01}),  # fires within the context, though hardly; v is not strong
        text("beyond", "explain", "wkxyz", {}),  # is silent in all of it
        text("sink", "explain", "bbkbb", {}, sinks=(2,)),  # the token does not count, so it cannot be active
        text("weak", "explain", "ccmcc", {}),  # m carries little
        text("held", "score", "ddkdd", {}),
        text("held2", "score", "ggwgg", {2: 9.0}),  # fires in the score half only: w is none of the strongest
        text("held3", "score", "hhwhh", {}),
    ]
    activations = harvest_of(tmp_path / "harvest", texts)
    recipe = recipe_of(n_near_misses=9, n_top=9)
    rows = table(collected(tmp_path / "out", recipe, activations, tokenizer, [0]), "examples")
    near = [row for row in rows if row["stratum"] == "near-miss"]
    assert {row["document"] for row in near if row["half"] == "score"} == {"held"}
    documents = sorted(row["document"] for row in near if row["half"] == "explain")
    assert documents in (["beyond", "copy", "near"], ["beyond", "near"])  # with copy, near shows its other text
    for row in near:
        assert (row["level"], row["activation"], set(row["activations"])) == (0, 0.0, {0.0})
        assert row["tokens"][row["peak"]] == "k"
    ranks = [(row["half"], row["rank"]) for row in rows]
    assert ranks == [(half, i) for half in ("explain", "score") for i in range(sum(h == half for h, _ in ranks))]
    assert all(row["stratum"] == "near-miss" for row in rows if not row["level"])
    few = collected(tmp_path / "few", recipe_of(n_near_misses=1, n_top=9), activations, tokenizer, [0])
    assert Counter((row["half"], row["level"]) for row in table(few, "examples") if not row["level"]) == {
        ("explain", 0): 1,
        ("score", 0): 1,
    }
    none = table(collected(tmp_path / "none", recipe_of(n_near_misses=0), activations, tokenizer, [0]), "examples")
    assert none
    assert all(row["level"] for row in none)


def test_the_strongest_tokens_carry_half_of_the_activation():
    ids = torch.tensor([5, 6, 7, 6, 8])
    assert strongest_tokens(ids, torch.tensor([3.0, 1.0, 1.0, 4.0, 1.0])) == [6]  # 5 of 10
    assert strongest_tokens(ids, torch.tensor([3.0, 1.0, 2.0, 3.0, 1.0])) == [6, 5]  # 4 of 10, then 7
    assert strongest_tokens(ids, torch.tensor([2.0, 1.0, 2.0, 1.0, 2.0])) == [5, 6]  # equally strong: by id
    assert len(strongest_tokens(torch.arange(100), torch.ones(100))) == 10
    assert strongest_tokens(ids[:0], torch.ones(0)) == []


def test_a_frequent_token_does_not_crowd_out_the_others(tmp_path: Path, tokenizer: Any):
    a, b = letters(tokenizer, "ab")
    fill = letters(tokenizer, "cdefghijklmnopqrstuvwxyz")
    texts = [
        Text("fires", "explain", [fill[0], a, fill[1], b, fill[2]], {(1, 0): 5.0, (3, 0): 4.0, (4, 0): 2.0}),
        Text("more", "explain", [fill[0], b, fill[1]], {(1, 0): 0.5}),
        Text("rare", "explain", [fill[3], b, fill[4], fill[5]], {}),
        *(Text(f"often{i}", "explain", [fill[i], fill[i + 1], a, fill[i + 2]], {}) for i in range(20)),
    ]
    activations = harvest_of(tmp_path / "harvest", texts)
    rows = table(collected(tmp_path / "out", recipe_of(), activations, tokenizer, [0]), "examples")
    near = [row["tokens"][row["peak"]] for row in rows if not row["level"]]
    assert near == ["a", "b"]  # they carry 5 and 4.5 of 11.5: each has its turn


def test_halves_share_no_document(crowd: Activations, tmp_path: Path, tokenizer: Any):
    rows = table(collected(tmp_path / "out", recipe_of(n_top=12), crowd, tokenizer), "examples")
    half = {text: "explain" if int(text[1:]) % 2 else "score" for text in crowd.documents}
    assert all(half[row["document"]] == row["half"] for row in rows)
    for _, mine in itertools.groupby(rows, key=lambda row: row["neuron_id"]):
        documents = [row["document"] for row in mine]
        assert len(set(documents)) == len(documents)
    assert {row["half"] for row in rows} == {"explain", "score"}


def test_an_empty_half_has_no_examples(tmp_path: Path, tokenizer: Any):
    texts = [
        Text("d0", "score", letters(tokenizer, "abcde"), {(2, 0): 3.0}),
        Text("d1", "score", letters(tokenizer, "fgchi"), {}),
    ]
    activations = harvest_of(tmp_path / "harvest", texts)
    rows = table(collected(tmp_path / "out", recipe_of(), activations, tokenizer), "examples")
    assert [(row["neuron_id"], row["half"], row["stratum"]) for row in rows] == [(f"{HOOK_POINT}/0", "score", "top")]


def test_the_seed_decides_and_nothing_else(crowd: Activations, tmp_path: Path, tokenizer: Any):
    runs = [collected(tmp_path / f"{i}", recipe_of(seed=i // 2), crowd, tokenizer) for i in range(3)]
    assert files_of(runs[0]) == files_of(runs[1])
    assert table(runs[0], "examples") != table(runs[2], "examples")
    alone = table(collected(tmp_path / "alone", recipe_of(), crowd, tokenizer, [5]), "examples")
    assert alone == [row for row in table(runs[0], "examples") if row["neuron_id"] == f"{HOOK_POINT}/5"]


def test_peaks_are_the_last_of_the_strongest_in_each_piece(tmp_path: Path, tokenizer: Any):
    ids = letters(tokenizer, "abc")
    texts = [
        Text("d0", "explain", ids, {(0, 1): 2.0, (1, 1): 2.0, (2, 1): 1.0}),
        Text("d1", "explain", ids, {(0, 0): 5.0}),
        Text("d2", "explain", ids, {(0, 1): 4.0}),
        Text("d3", "explain", ids, {(2, 1): 2.0}),
    ]
    activations = harvest_of(tmp_path / "harvest", texts)
    codes = sparse_codes(identity(4), activations, recipe_of().tokens)
    found = peaks(codes, activations, 1, 4.0)
    assert [tuple(peak) for peak in found] == [(2, 6, 4.0, 10, "top"), (0, 1, 2.0, 6, "top"), (3, 11, 2.0, 6, "top")]


# --- whole characters ---------------------------------------------------------------------------------------------

SCRIPTS = "ab中文字。😀👩‍🚀 राष्ट्रपति ok"


def test_every_context_is_whole_characters(tmp_path: Path, tokenizer: Any):
    """Every token in turn is the peak; the context ends inside characters of three and four tokens."""
    ids = tokenizer(SCRIPTS, add_special_tokens=False)["input_ids"]
    activations = harvest_of(tmp_path / "harvest", [Text("d", "explain", ids, {})])
    assert len(ids) > 2 * len(SCRIPTS)  # most characters are several tokens
    for before, after in ((1, 1), (2, 3), (4, 1), (16, 8)):
        contexts = Contexts(activations, tokenizer, before, after)
        for row in range(len(ids)):
            context = contexts.around(row)
            assert context is not None
            unit = context.units[context.at]
            assert unit.start <= row < unit.end
            assert context.text in SCRIPTS
            assert "\ufffd" not in context.text
            first, last = context.units[0], context.units[-1]
            assert first.start <= max(row - before, 0) < first.end
            assert last.start <= min(row + after, len(ids) - 1) < last.end
            skipped = len("".join(unit.text for unit in whole_units(tokenizer, ids[: first.start])))
            assert SCRIPTS[skipped:].startswith(context.text)


def test_what_the_piece_cuts_is_dropped(tmp_path: Path, tokenizer: Any):
    """中 is three tokens: the piece begins with its last one and ends with two of the three of 字."""
    ids = tokenizer("中a\ufffdb文字", add_special_tokens=False)["input_ids"][2:-1]
    assert "".join(unit.text for unit in whole_units(tokenizer, ids)) == "a\ufffdb文"  # the corpus's own sign stays
    fires = {(0, 0): 9.0, (1, 1): 9.0, (len(ids) - 1, 2): 9.0, (len(ids) - 3, 3): 9.0}
    activations = harvest_of(tmp_path / "harvest", [Text("d", "explain", ids, fires)])
    rows = table(collected(tmp_path / "out", recipe_of(before=9, after=9), activations, tokenizer), "examples")
    assert [(row["neuron_id"][-1], row["tokens"], row["peak"]) for row in rows] == [
        ("1", ["a", "\ufffd", "b", "文"], 0),
        ("3", ["a", "\ufffd", "b", "文"], 3),
    ]


def test_tokens_across_characters_are_one_unit():
    """Eleven tokens of two, three, three, … bytes, each ending inside a character of three: one unit of ten."""
    text = "中" * 10
    data, shown = text.encode(), {byte: char for char, byte in _byte_of_character().items()}
    cuts = [0, *range(2, 30, 3), 30]
    tokens = ["".join(shown[byte] for byte in data[low:high]) for low, high in itertools.pairwise(cuts)]
    tokenizer = SimpleNamespace(
        added_tokens_decoder={},
        all_special_ids=[],
        backend_tokenizer=SimpleNamespace(decoder="ByteLevel", pre_tokenizer=""),
        convert_ids_to_tokens=lambda ids: [tokens[id] for id in ids],
    )
    assert [tuple(unit) for unit in whole_units(tokenizer, list(range(11)))] == [(text, 0, 11, False)]
    assert [unit.text for unit in whole_units(tokenizer, list(range(10)))] == []  # no shorter run is whole
