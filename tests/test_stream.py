"""Activations on the fly: the same rounds after an interruption, the mix of the sources, and what is left out."""

import json
import os
import subprocess
import sys
from collections import Counter
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from safesail.distributed import ALONE, Ranks
from safesail.errors import InputError
from safesail.lm.activations import Activations, harvest
from safesail.lm.corpus import Piece, gather, is_held_out, texts_fingerprint
from safesail.lm.hooks import replace
from safesail.lm.load import files_fingerprint
from safesail.lm.stream import Stream
from safesail.recipe import Recipe
from safesail.taxonomy import Taxonomy

pytestmark = pytest.mark.usefixtures("one_thread")

BOTH = ("layers.0.mlp", "layers.1.mlp")
TAXONOMY = Taxonomy.load()


def recipe_of(sources: list[dict[str, Any]], **changes: dict[str, Any]) -> Recipe:
    settings: dict[str, Any] = {
        "name": "made",
        "model": {"path": "none"},
        "tokens": {"sink_norm_multiple": 1.5},
        "corpus": {"n_tokens": 4000, "n_held_out_tokens": 1000, "context": 24, "sources": sources},
        "harvest": {"hook_points": list(BOTH), "window": 64},
        "train": {"d_sae": 64, "k": [4], "stream_tokens": 10_000, "buffer_tokens": 1500, "batch_size": 100},
        "explain": {"encoder": "none"},
        "runtime": {"windows_per_batch": 4},
    }
    for section, values in changes.items():
        settings[section] = settings.get(section, {}) | values
    return Recipe.parse(settings)


@pytest.fixture(scope="module")
def facts(model: Any, texts: Path, tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    recipe = recipe_of([{"path": str(texts)}])
    pieces = gather(recipe.corpus, TAXONOMY, tokenizer, 0)
    folder = tmp_path_factory.mktemp("harvest")
    return harvest(model, pieces, BOTH, folder, specials=[0, 1], window=64, windows_per_batch=4)


@pytest.fixture
def stream(model: Any, tokenizer: Any, facts: dict[str, Any]) -> Any:
    """Makes a stream of a recipe."""

    def make(recipe: Recipe, hook_points: tuple[str, ...] = BOTH, ranks: Ranks = ALONE) -> Stream:
        return Stream(recipe, model, tokenizer, TAXONOMY, facts, hook_points, ranks)

    return make


def pieces_of(stream: Stream, n_rounds: int) -> list[list[Piece]]:
    """The pieces of the first rounds, as the model would read them."""
    return list(islice(stream._rounds_of_pieces(), n_rounds))


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_rounds_from_any_round_on_are_the_same_bits(stream: Any, texts: Path):
    recipe = recipe_of([{"path": str(texts), "weight": 3.0}, {"path": str(texts), "about": "terror"}])
    whole = list(islice(stream(recipe).rounds(), 5))
    assert all(len(x) > 800 for x in whole[0].values())
    assert not equal(whole[0], whole[1])
    for first in (1, 3):
        again = list(islice(stream(recipe).rounds(first), 5 - first))
        assert all(equal(one, other) for one, other in zip(again, whole[first:], strict=True))


def test_rounds_that_are_skipped_cost_no_forward_pass(stream: Any, texts: Path, model: Any):
    forwards: list[int] = []
    handle = model.base_model.register_forward_pre_hook(lambda *_: forwards.append(1))
    try:
        rounds = stream(recipe_of([{"path": str(texts)}])).rounds(4)
        next(rounds)
        one_round = len(forwards)
        next(rounds)
    finally:
        handle.remove()
    assert one_round == pytest.approx(len(forwards) / 2, abs=2)


def test_a_hook_points_rows_are_the_same_alone_and_with_others(stream: Any, texts: Path):
    recipe = recipe_of([{"path": str(texts)}])
    both = next(stream(recipe).rounds())
    for name in BOTH:
        assert equal(next(stream(recipe, (name,)).rounds()), {name: both[name]})


def test_a_round_holds_the_counted_rows_a_harvest_of_its_pieces_has(
    stream: Any, texts: Path, model: Any, facts: dict[str, Any], tmp_path: Path
):
    recipe = recipe_of([{"path": str(texts)}])
    (pieces,) = pieces_of(stream(recipe), 1)
    assert 1500 <= sum(len(piece.ids) for piece in pieces) < 1500 + 24
    harvest(model, pieces, BOTH, tmp_path, specials=[0, 1], window=64, windows_per_batch=4)
    activations = Activations(tmp_path)
    activations.facts["median_norm"] = facts["median_norm"]  # the stream's sinks are those of the recipe's harvest
    found = next(stream(recipe).rounds())
    for name in BOTH:
        keep = activations.counted(name, recipe.tokens)
        assert 0 < int(keep.sum()) < len(keep)
        assert found[name].dtype == torch.float16
        assert torch.equal(found[name].float(), activations.rows(name, keep.nonzero().flatten()))


def test_rows_have_the_dtype_of_the_harvest(stream: Any, texts: Path):
    for dtype in ("bfloat16", "float32"):
        rows = next(stream(recipe_of([{"path": str(texts)}], harvest={"dtype": dtype})).rounds())
        assert {x.dtype for x in rows.values()} == {getattr(torch, dtype)}


def test_held_out_documents_never_come_in_any_pass(stream: Any, texts: Path):
    recipe = recipe_of([{"path": str(texts)}])
    rounds = pieces_of(stream(recipe), 40)  # 60,000 tokens: the file is read about three times
    times = Counter(piece.document for pieces in rounds for piece in pieces)
    written = [json.loads(line)["id"] for line in texts.read_text().splitlines()]
    training = [name for name in written if not is_held_out(recipe.corpus, name)]
    assert 0 < len(training) < len(written)
    assert set(times) == set(training)
    assert not any(piece.held_out for pieces in rounds for piece in pieces)


def test_a_source_starts_again_in_another_order(stream: Any, tmp_path: Path):
    path = tmp_path / "few.jsonl"
    rows = [{"id": str(i), "text": f"The teacher saw garden {i} near the river."} for i in range(12)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    changes = {"corpus": {"n_tokens": 100_000, "n_held_out_tokens": 1, "sources": [{"path": str(path)}]}}
    (pieces,) = pieces_of(stream(recipe_of([], **changes)), 1)
    order = [piece.document for piece in pieces]
    passes = [order[i : i + 12] for i in range(0, 36, 12)]
    assert all(sorted(each, key=int) == [str(i) for i in range(12)] for each in passes)
    assert passes[0] != passes[1] != passes[2] != passes[0]


def test_sources_are_mixed_by_weight_from_the_first_document_on(stream: Any, texts: Path):
    sources = [
        {"path": str(texts), "weight": 3.0, "origin": "large"},
        {"path": str(texts), "weight": 1.0, "origin": "small"},
    ]
    n_tokens: Counter[str] = Counter()
    for number, pieces in enumerate(pieces_of(stream(recipe_of(sources)), 6), start=1):
        for piece in pieces:
            n_tokens[piece.source] += len(piece.ids)
        assert n_tokens["large"] / 3 == pytest.approx(n_tokens["small"], abs=60)  # a document is at most 60 tokens
        assert n_tokens.total() == pytest.approx(1500 * number, abs=24 * number)


def test_ranks_share_the_pieces_of_a_round(stream: Any, texts: Path, monkeypatch: pytest.MonkeyPatch):
    recipe = recipe_of([{"path": str(texts)}])
    whole = pieces_of(stream(recipe), 2)
    monkeypatch.setattr(Stream, "_read", lambda self, pieces: pieces)
    shares = [list(islice(stream(recipe, ranks=Ranks(rank, 2)).rounds(), 2)) for rank in range(2)]
    for number in range(2):
        assert shares[0][number] == whole[number][0::2]
        assert shares[1][number] == whole[number][1::2]


def test_a_source_with_nothing_to_train_on_is_named(stream: Any, tmp_path: Path):
    path = tmp_path / "dull.jsonl"
    path.write_text(json.dumps({"text": "The teacher saw a garden."}) + "\n")
    with pytest.raises(InputError, match=r"dull\.jsonl has no text to train on about terror"):
        next(stream(recipe_of([{"path": str(path), "about": "terror"}])).rounds())


def poisoned(x: Tensor) -> Tensor:
    x = x.clone()
    x[0, 3] = float("nan")
    return x


def test_bad_activations_stop_the_stream_or_are_left_out(stream: Any, texts: Path, model: Any):
    sources = [{"path": str(texts)}]
    clean = next(stream(recipe_of(sources)).rounds())
    with replace(model, BOTH[1], poisoned):
        with pytest.raises(InputError, match=r"an activation at layers\.1\.mlp is nan, at token 3 of a piece of"):
            next(stream(recipe_of(sources)).rounds())
        rows = next(stream(recipe_of(sources, harvest={"bad_activations": "skip"})).rounds())
    assert torch.equal(rows[BOTH[0]], clean[BOTH[0]])
    assert all(x.isfinite().all() for x in rows.values())
    assert len(clean[BOTH[1]]) - 7 <= len(rows[BOTH[1]]) < len(clean[BOTH[1]])  # at most one in each of 7 batches
    known = {tuple(row) for row in clean[BOTH[1]].tolist()}
    assert all(tuple(row) in known for row in rows[BOTH[1]].tolist())


# --- other sources ------------------------------------------------------------------------------------------------


def test_a_local_folder_is_a_source(tmp_path: Path, stream: Any, tokenizer: Any):
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder = tmp_path / "set"
    folder.mkdir()
    for part in range(2):
        lines = [f"The teacher saw garden {part}{i} near the river." for i in range(40)]
        pq.write_table(pa.table({"text": lines}), folder / f"train-{part:05d}-of-00002.parquet")
    recipe = recipe_of([{"path": str(folder)}], corpus={"n_tokens": 800, "n_held_out_tokens": 100})
    pieces = gather(recipe.corpus, TAXONOMY, tokenizer, 0)
    assert {piece.source for piece in pieces} == {"set"}
    assert len({piece.document for piece in pieces}) > 45  # more than one of the two files has
    (training,) = pieces_of(stream(recipe), 1)
    assert {piece.document for piece in training} >= {piece.document for piece in pieces if not piece.held_out}
    before = texts_fingerprint(recipe.corpus, files_fingerprint)
    pq.write_table(pa.table({"text": ["other"]}), folder / "train-00001-of-00002.parquet")
    assert texts_fingerprint(recipe.corpus, files_fingerprint) != before


def test_a_dataset_that_the_hub_does_not_give_is_an_input_error():
    code = (
        "from safesail.lm.corpus import documents\n"
        "from safesail.recipe import Source\n"
        "from safesail.taxonomy import Taxonomy\n"
        "from safesail.errors import InputError\n"
        "try:\n"
        "    next(documents(Source(path='nobody/nothing'), Taxonomy.load(), 0))\n"
        "except InputError as error:\n"
        "    print(error)\n"
    )
    offline = os.environ | {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=offline, timeout=120)
    assert done.stdout.startswith("the dataset nobody/nothing cannot be read from the Hub: "), done.stderr
    assert "Check its id, `name` and `split`, or give a local file." in done.stdout
