"""Activations at segment ends: of the right tokens, whatever the batch, and as an SAE is trained on them."""

import hashlib
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from safetensors import safe_open

from safesail.distributed import Ranks
from safesail.errors import InputError
from safesail.lm.hooks import replace, run_to_depth
from safesail.lm.shards import shard_file
from safesail.lm.tokens import special_ids
from safesail.recipe import TokenPolicy
from safesail.reward_recipe import RewardRecipe
from safesail.rewards import ends as module
from safesail.rewards.ends import Ends, check_ends, ends_stage, latents_at
from safesail.rewards.model import RewardModel
from safesail.rewards.preferences import SIDES, Preference
from safesail.rewards.segments import segment_ends
from safesail.rewards.texts import Text, encode_side
from safesail.run import StageWork
from safesail.sae.config import SaeConfig
from safesail.sae.model import Sae
from safesail.training.sources import Shards, scale_and_mean, training_rows
from safesail.training.trainer import train_stage

pytestmark = pytest.mark.usefixtures("one_thread")
HOOK = "layers.0"
ANSWERS = (
    ("No, I will not help with that. Ask a teacher, please.", "Yes."),
    ("The river is near the garden, by the old house.", "The bomb was near the house; take it, then go. Now!"),
    ("Why?", "Because the president said so, and everybody looked at the long letter for an hour."),
    ("It is 3.14 metres, not 1,000.\n\nMeasure it again, my friend.", "It is long"),
    ("她写了一封信。我们看了。", "नदी है। बाग है।"),
)


@pytest.fixture
def preferences() -> list[Preference]:
    asked = ({"role": "user", "content": "What now?"},)
    kinds = ("safety", "chat", "safety", "safety", "chat")
    held_out = (False, False, True, False, True)
    facts = zip(kinds, ANSWERS, held_out, strict=True)
    return [Preference(f"p{i}", kind, "made", asked, *answers, out) for i, (kind, answers, out) in enumerate(facts)]


@pytest.fixture
def recipe(tiny_model: Path) -> RewardRecipe:
    return reward_recipe(tiny_model)


def reward_recipe(tiny_model: Path, **sections: dict[str, Any]) -> RewardRecipe:
    data: dict[str, Any] = {
        "name": "mini",
        "model": {"path": str(tiny_model)},
        "corpus": {"n_tokens": 10, "n_held_out_tokens": 1, "sources": [{"path": "none.jsonl"}]},
        "preferences": {"sources": [{"path": "none.jsonl", "kind": "safety"}]},
        "reward": {"max_length": 64},
        "harvest": {"hook_points": [HOOK], "window": 32, "dtype": "float32"},
        "train": {"d_sae": 24, "k": [4], "batch_size": 8, "epochs": 2, "aux_k": 4},
        "ends": {"min_distance": 3},
        "rate": {"encoder": "none"},
        "runtime": {"windows_per_batch": 8},
    }
    return RewardRecipe.parse(data | {key: data.get(key, {}) | value for key, value in sections.items()})


@pytest.fixture
def reward_model(model: Any, tokenizer: Any) -> RewardModel:
    return RewardModel(model, tokenizer)


@pytest.fixture(autouse=True)
def four_texts_a_shard(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_TEXTS_PER_SHARD", 4)


@pytest.fixture
def work(tmp_path: Path) -> StageWork:
    (tmp_path / "ends").mkdir()
    return StageWork(tmp_path / "ends")


def made(recipe: RewardRecipe, preferences: list[Preference], model: RewardModel, folder: Path) -> Ends:
    folder.mkdir(exist_ok=True)
    ends_stage(recipe, preferences, model, StageWork(folder))
    return Ends(folder)


def hashes(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


# --- what is kept -------------------------------------------------------------------------------------------------


def test_rows_are_what_the_model_holds_at_the_ends_of_each_text_alone(
    recipe: RewardRecipe, preferences: list[Preference], reward_model: RewardModel, work: StageWork
):
    ends = made(recipe, preferences, reward_model, work.folder)
    rows, at = ends.rows(HOOK, torch.arange(ends.n_tokens)), 0
    for number, preference in enumerate(preferences):
        for side_number, side in enumerate(SIDES):
            text = encode_side(reward_model.tokenizer, preference, side, 64)
            expected = segment_ends(reward_model.tokenizer, text, recipe.ends)
            n = len(expected)
            assert ends.position[at : at + n].tolist() == expected
            assert ends.pair[at : at + n].tolist() == [number] * n
            assert ends.side[at : at + n].tolist() == [side_number] * n
            assert ends.token_ids[at : at + n].tolist() == [text.ids[position] for position in expected]
            with torch.inference_mode():
                alone = run_to_depth(reward_model.model, (HOOK,), input_ids=torch.tensor([text.ids]))[HOOK][0]
            torch.testing.assert_close(rows[at : at + n], alone[expected], atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(ends.norms(HOOK)[at : at + n], alone[expected].norm(dim=1))
            at += n
    assert at == ends.n_tokens == len(ends.side)
    assert ends.side.dtype == torch.uint8
    assert ends.pair_ids == ["p0", "p1", "p2", "p3", "p4"]
    assert ends.kind == ["safety", "chat", "safety", "safety", "chat"]
    assert len(list(work.folder.glob("shard-*.safetensors"))) == 3


@pytest.mark.parametrize("n_windows", [1, 2, 100])
def test_rows_do_not_depend_on_the_batch(
    tiny_model: Path, preferences: list[Preference], reward_model: RewardModel, tmp_path: Path, n_windows: int
):
    alone = made(reward_recipe(tiny_model), preferences, reward_model, tmp_path / "a")
    recipe = reward_recipe(tiny_model, runtime={"windows_per_batch": n_windows})
    together = made(recipe, preferences, reward_model, tmp_path / "b")
    every = torch.arange(alone.n_tokens)
    torch.testing.assert_close(together.rows(HOOK, every), alone.rows(HOOK, every), atol=1e-5, rtol=1e-5)
    assert together.position.equal(alone.position)


def test_the_facts_are_counted_by_hand(
    tiny_model: Path, preferences: list[Preference], reward_model: RewardModel, work: StageWork
):
    recipe = reward_recipe(tiny_model, reward={"max_length": 50})
    ends = made(recipe, preferences, reward_model, work.folder)
    tokenizer = reward_model.tokenizer
    lengths = [len(encode_side(tokenizer, each, side, 999).ids) for each in preferences for side in SIDES]
    assert ends.facts["n_texts"] == 10
    table = pq.read_table(work.folder / "ends.parquet")
    assert table["n_tokens"].to_pylist() == [min(length, 50) for length in lengths]
    assert table["n_cut"].to_pylist() == [max(length - 50, 0) for length in lengths]
    assert 0 < ends.facts["n_texts_cut"] == sum(length > 50 for length in lengths) < 10
    assert ends.facts["d_in"] == {HOOK: 32}
    assert ends.facts["median_norm"] == {HOOK: float(ends.norms(HOOK).median())}
    assert ends.facts["special_ids"] == special_ids(reward_model.tokenizer)
    assert sum(ends.facts["rows_per_shard"]) == ends.n_tokens
    assert ends.rows_held_out().tolist() == [pair in (2, 4) for pair in ends.pair.tolist()]


def test_half_precision_is_the_default(
    tiny_model: Path, preferences: list[Preference], reward_model: RewardModel, tmp_path: Path
):
    exact = made(reward_recipe(tiny_model), preferences, reward_model, tmp_path / "a")
    half = made(reward_recipe(tiny_model, harvest={"dtype": "float16"}), preferences, reward_model, tmp_path / "b")
    with safe_open(shard_file(tmp_path / "b", 0), framework="pt") as handle:
        assert handle.get_tensor(HOOK).dtype == torch.float16
    every = torch.arange(exact.n_tokens)
    assert half.rows(HOOK, every).equal(exact.rows(HOOK, every).half().float())
    assert torch.cat([block for _, block in half.blocks(HOOK, 3)]).equal(half.rows(HOOK, every))


def test_a_text_that_two_pairs_have_is_stored_once(
    recipe: RewardRecipe, preferences: list[Preference], reward_model: RewardModel, work: StageWork
):
    again = preferences[2]._replace(id="again", chosen=preferences[0].chosen, held_out=False)
    swapped = preferences[0]._replace(id="swapped", chosen=preferences[0].rejected, rejected=preferences[0].chosen)
    ends = made(recipe, [again, *preferences, swapped], reward_model, work.folder)
    sides = [((ends.pair == pair) & (ends.side == side)).nonzero().flatten() for pair in range(7) for side in (0, 1)]
    assert [int(ends.text[rows[0]]) for rows in sides] == [0, 1, 0, 2, 3, 4, 5, 1, 6, 7, 8, 9, 2, 0]
    repeated = [0, 1, 2, 0]  # the texts that are there again
    assert ends.facts["n_texts"] == 10
    lengths = {int(ends.text[rows[0]]): len(rows) for rows in sides}
    assert ends.n_tokens - ends.facts["n_stored"] == sum(lengths[text] for text in repeated)
    for one, other in ((0, 2), (0, 13), (1, 7), (3, 12)):
        for column in (ends.position, ends.token_ids, ends.norms(HOOK)):
            assert column[sides[one]].equal(column[sides[other]])
        assert ends.rows(HOOK, sides[one]).equal(ends.rows(HOOK, sides[other]))
    assert ends.pair[sides[13]].unique().tolist() == [6]
    text = encode_side(reward_model.tokenizer, swapped, "rejected", 64)
    with torch.inference_mode():
        alone = run_to_depth(reward_model.model, (HOOK,), input_ids=torch.tensor([text.ids]))[HOOK][0]
    found = torch.cat([block for _, block in ends.blocks(HOOK, 4)])[sides[13]]
    torch.testing.assert_close(found, alone[ends.position[sides[13]]], atol=1e-5, rtol=1e-5)


# --- interruption and ranks ---------------------------------------------------------------------------------------


def test_whole_shards_of_an_interrupted_attempt_are_kept(
    recipe: RewardRecipe, preferences: list[Preference], reward_model: RewardModel, tmp_path: Path
):
    made(recipe, preferences, reward_model, tmp_path / "whole")
    made(recipe, preferences, reward_model, tmp_path / "b")
    (tmp_path / "b" / "ends.json").unlink()
    (tmp_path / "b" / "ends.parquet").unlink()
    shard_file(tmp_path / "b", 1).write_bytes(b"half")
    read: list[str] = []

    def watched(tokenizer: Any, preference: Preference, side: str, max_length: int) -> Text:
        read.append(preference.id)
        return encode_side(tokenizer, preference, side, max_length)

    ends_stage(recipe, preferences, reward_model, StageWork(tmp_path / "b"), encode=watched)
    assert read[10:] == ["p2", "p2", "p3", "p3"]  # all ten are tokenised, four are read by the model
    assert hashes(tmp_path / "b") == hashes(tmp_path / "whole")


class OneOfTwo(Ranks):
    def wait(self) -> None:
        pass


def test_ranks_share_the_shards(
    recipe: RewardRecipe, preferences: list[Preference], reward_model: RewardModel, tmp_path: Path
):
    made(recipe, preferences, reward_model, tmp_path / "alone")
    work = StageWork(tmp_path / "shared")
    work.folder.mkdir()
    with pytest.raises(InputError, match=r"ends\.json cannot be read"):  # the first rank has not written it yet
        ends_stage(recipe, preferences, reward_model, work, OneOfTwo(1, 2))
    assert [path.name for path in sorted(work.folder.iterdir())] == ["shard-00001.json", "shard-00001.safetensors"]
    ends_stage(recipe, preferences, reward_model, work, OneOfTwo(0, 2))
    assert hashes(work.folder) == hashes(tmp_path / "alone")
    assert work.facts["n_texts"] == 10


# --- bad input ----------------------------------------------------------------------------------------------------


def test_an_answer_without_tokens_is_named(
    recipe: RewardRecipe, preferences: list[Preference], reward_model: RewardModel, work: StageWork
):
    def cut(tokenizer: Any, preference: Preference, side: str, max_length: int) -> Text:
        text = encode_side(tokenizer, preference, side, max_length)
        return text._replace(answer=range(0)) if (preference.id, side) == ("p1", "rejected") else text

    with pytest.raises(InputError, match="the rejected answer of pair p1 has no tokens"):
        ends_stage(recipe, preferences, reward_model, work, encode=cut)


def test_activations_that_cannot_be_stored_stop_or_are_left_out(
    tiny_model: Path, preferences: list[Preference], reward_model: RewardModel, tmp_path: Path
):
    def spoil(output: torch.Tensor) -> torch.Tensor:
        output = output.clone()
        output[:, 3] = float("inf")  # of the prompt, where no end is
        output[:, at : at + 2] = float("inf")
        return output

    fine = made(reward_recipe(tiny_model), preferences, reward_model, tmp_path / "fine")
    at = int(fine.position.min())
    with replace(reward_model.model, HOOK, spoil):
        where = rf"at token ({at}|{at + 1}) of pair p\d \((chosen|rejected)\); harvest.bad_activations"
        with pytest.raises(InputError, match=rf"an activation at layers\.0 is not finite or beyond .* {where}"):
            made(reward_recipe(tiny_model), preferences, reward_model, tmp_path / "a")
        recipe = reward_recipe(tiny_model, harvest={"bad_activations": "skip", "dtype": "float32"})
        ends = made(recipe, preferences, reward_model, tmp_path / "b")
    bad = (ends.position == at) | (ends.position == at + 1)
    assert ends.counted(HOOK, TokenPolicy(sink_norm_multiple=None)).equal(~bad)
    assert ends.facts["skipped"][HOOK]["n_tokens"] == int(bad.sum()) > 0
    assert set(ends.facts["skipped"][HOOK]["pairs"]) == {f"p{pair}" for pair in ends.pair[bad].tolist()}


def test_ends_that_are_not_there_are_asked_for(tmp_path: Path):
    with pytest.raises(InputError, match=r"ends\.json cannot be read .*; remove .* and run the recipe again"):
        Ends(tmp_path)


@pytest.mark.parametrize("name", ["shard-00001.safetensors", "ends.parquet"])
def test_finished_ends_that_were_changed_are_found(
    name: str, recipe: RewardRecipe, preferences: list[Preference], reward_model: RewardModel, tmp_path: Path
):
    made(recipe, preferences, reward_model, tmp_path)
    check_ends(tmp_path, "safesail make")
    content = bytearray((tmp_path / name).read_bytes())
    content[len(content) // 2] ^= 1
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=rf"{name} is damaged or missing; .* anew: `safesail make --force`"):
        check_ends(tmp_path, "safesail make")
    (tmp_path / name).unlink()
    with pytest.raises(InputError, match=rf"{name} is damaged or missing"):
        check_ends(tmp_path, "safesail make")


# --- in the place of a harvest ------------------------------------------------------------------------------------


def test_special_tokens_and_roles_were_decided_before_and_sinks_are_left_out(
    recipe: RewardRecipe, preferences: list[Preference], reward_model: RewardModel, work: StageWork
):
    ends = made(recipe, preferences, reward_model, work.folder)
    norms = ends.norms(HOOK)
    assert ends.counted(HOOK, TokenPolicy(roles=("user",), sink_norm_multiple=None)).all()
    ends.facts["special_ids"] = ends.token_ids.unique().tolist()
    assert ends.counted(HOOK, TokenPolicy(sink_norm_multiple=None)).all()
    multiple = 1.05
    expected = norms <= multiple * ends.facts["median_norm"][HOOK]
    assert 0 < int(expected.sum()) < ends.n_tokens
    assert ends.counted(HOOK, TokenPolicy(sink_norm_multiple=multiple)).equal(expected)


def test_an_sae_is_trained_on_ends_as_on_a_harvest(
    recipe: RewardRecipe, preferences: list[Preference], reward_model: RewardModel, tmp_path: Path
):
    ends = made(recipe, preferences, reward_model, tmp_path / "ends")
    rows = training_rows(recipe, ends, HOOK)  # pyright: ignore[reportArgumentType]
    assert rows.tolist() == (~ends.rows_held_out()).nonzero().flatten().tolist()
    scale, mean = scale_and_mean(ends, HOOK, rows, recipe.seed)
    x = ends.rows(HOOK, rows)
    assert scale == pytest.approx(32**0.5 / float(x.norm(dim=1).mean()))
    torch.testing.assert_close(mean, x.mean(0) * scale)
    source = Shards(recipe, ends)  # pyright: ignore[reportArgumentType]
    assert source.n_steps(HOOK) == len(rows) // 8 * 2 > 0
    (tmp_path / "train").mkdir()
    train_stage(recipe, ends, StageWork(tmp_path / "train"))  # pyright: ignore[reportArgumentType]
    assert (tmp_path / "train" / HOOK / "topk-k4-w24" / "cfg.json").is_file()


def test_latents_at_the_ends_are_those_of_the_sae(
    recipe: RewardRecipe, preferences: list[Preference], reward_model: RewardModel, work: StageWork
):
    ends = made(recipe, preferences, reward_model, work.folder)
    drawn = torch.Generator().manual_seed(0)
    policy = TokenPolicy(sink_norm_multiple=1.05)
    config = SaeConfig(d_in=32, d_sae=24, k=5, hook_point=HOOK, token_policy=policy)
    W = torch.randn(32, 24, generator=drawn)
    sae = Sae(config, W, torch.zeros(24), W.T.contiguous(), torch.zeros(32))
    expected = sae.encode(ends.rows(HOOK, torch.arange(ends.n_tokens)))[:, [7, 3, 20]]
    expected[~ends.counted(HOOK, policy)] = 0
    found = latents_at(ends, sae, torch.tensor([7, 3, 20]))
    assert int((found > 0).sum()) > 5
    torch.testing.assert_close(found, expected)
    assert latents_at(ends, sae, torch.tensor([], dtype=torch.long)).shape == (ends.n_tokens, 0)
