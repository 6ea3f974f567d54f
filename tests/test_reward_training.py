"""Training a reward model: the loss by hand, what is learnt, accumulation, interruption, the frozen part, ranks."""

import json
import math
import random
import shutil
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from made_sweep import files_of
from torch import Tensor
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel, Qwen2Config, Qwen2ForCausalLM

from safesail.distributed import ALONE, Ranks
from safesail.errors import InputError
from safesail.reward_recipe import RewardRecipe
from safesail.rewards import training
from safesail.rewards.fit import Fit, FitSettings, n_right, pairwise_loss, schedule
from safesail.rewards.model import RewardModel
from safesail.rewards.parts import trained_part
from safesail.rewards.preferences import Preference
from safesail.rewards.texts import Text, distinct
from safesail.rewards.training import REWARDS_SCHEMA, Retraining, accuracies, reward_stage
from safesail.run import StageWork

pytestmark = pytest.mark.usefixtures("one_thread")

SETTINGS = FitSettings(epochs=2, batch_pairs=2, accumulate=3, learning_rate=1e-2, warmup=0.1, weight_decay=0.0)


def toy(n: int = 48, kind: str = "safety") -> list[Preference]:
    """Pairs whose chosen answers, and they alone, speak of a garden; every fourth is held out."""
    chance, made = random.Random(0), []
    for i in range(n):
        start = chance.choice(["She wrote about the", "Everybody looked at the", "My neighbour talked about the"])
        end = " and the river" * chance.randrange(3) + "."
        prompt = ({"role": "user", "content": f"What about {i}?"},)
        chosen, rejected = f"{start} garden{end}", f"{start} bomb{end}"
        made.append(Preference(f"p{i}", kind, "made", prompt, chosen, rejected, i % 4 == 0))
    return made


def recipe_of(model: Path, seconds: float = 1e9, compare: dict[str, Any] | None = None, **reward: Any) -> RewardRecipe:
    settings = {"epochs": 2, "batch_pairs": 2, "accumulate": 3, "learning_rate": 1e-2, "max_length": 64}
    return RewardRecipe.parse(
        {
            "name": "made",
            "seed": 5,
            "model": {"path": str(model)},
            "preferences": {"sources": [{"path": "none.jsonl", "kind": "safety"}]},
            "reward": settings | reward,
            "compare": {"epochs": 2, "batch_pairs": 8, "learning_rate": 2e-2} | (compare or {}),
            "corpus": {"n_tokens": 100, "n_held_out_tokens": 10, "sources": [{"path": "none.jsonl"}]},
            "harvest": {"hook_points": ["layers.0"]},
            "train": {"d_sae": 16, "k": [2]},
            "rate": {"encoder": "none"},
            "runtime": {"checkpoint_seconds": seconds},
        }
    )


def made_ids() -> list[list[int]]:
    """Twenty texts of 3 to 12 tokens."""
    chance = random.Random(1)
    return [[chance.randrange(5, 250) for _ in range(chance.randrange(3, 13))] for _ in range(20)]


def fit_of(
    model: Path, n_blocks: int | None, folder: Path, settings: FitSettings = SETTINGS, ranks: Ranks = ALONE
) -> Fit:
    part = trained_part(RewardModel.fresh(model, seed=0), made_ids(), n_blocks, folder, ranks=ranks)
    return Fit(part, torch.arange(20).view(10, 2), settings, 0, ranks)


def run_stage(recipe: RewardRecipe, folder: Path, preferences: list[Preference] | None = None) -> dict[str, Any]:
    folder.mkdir(exist_ok=True)
    work = StageWork(folder)
    reward_stage(recipe, preferences or toy(), work)
    return work.facts


# --- arithmetic ---------------------------------------------------------------------------------------------------


def test_the_loss_of_two_pairs_by_hand():
    # −log σ(2 − 1) = log(1 + e⁻¹) = 0.313262; −log σ(0 − 2) = log(1 + e²) = 2.126928
    loss = pairwise_loss(torch.tensor([2.0, 0.0]), torch.tensor([1.0, 2.0]))
    assert loss.tolist() == pytest.approx([0.313262, 2.126928], abs=1e-6)


def test_a_tie_is_half_right():
    assert n_right(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([1.0, 1.0, 4.0])) == 1.5
    pairs = [p._replace(held_out=i < 3) for i, p in enumerate(toy(4))]
    rewards = torch.tensor([[1.0, 1.0], [2.0, 1.0], [3.0, 4.0], [1.0, 0.0]])
    found = accuracies([*pairs, *toy(1, "chat")], torch.cat([rewards, torch.tensor([[0.0, 1.0]])]))
    assert found["safety"]["held_out"]["accuracy"] == 0.5  # 1.5 of 3
    assert found["safety"]["held_out"]["n"] == 3
    assert found["safety"]["training"] == {"accuracy": 1.0, "low": pytest.approx(0.2065, abs=1e-4), "high": 1.0, "n": 1}
    assert found["chat"]["held_out"]["accuracy"] == 0.0
    assert found["chat"]["training"] == {"accuracy": None, "low": None, "high": None, "n": 0}


def test_the_schedule_warms_up_and_falls_as_a_cosine():
    found = [schedule(step, 10, 0.2) for step in range(10)]
    assert found[:3] == [0.5, 1.0, 1.0]
    assert found[6] == pytest.approx(0.5)  # half of the eight steps after the warm-up
    assert found[9] == pytest.approx(0.5 * (1 + math.cos(math.pi * 7 / 8)))
    assert schedule(0, 1, 0.0) == 1.0


def test_every_pair_is_taken_once_an_epoch(tiny_model: Path, tmp_path: Path):
    fit = fit_of(tiny_model, None, tmp_path)
    assert (fit.steps_per_epoch, fit.n_steps) == (2, 4)  # 10 pairs are 5 batches of 2: steps of 3 and of 2 batches
    epochs = [[fit.batches(2 * e + i) for i in range(2)] for e in range(2)]
    for epoch in epochs:
        assert [len(batches) for batches in epoch] == [3, 2]
        assert sorted(int(p) for batches in epoch for batch in batches for p in batch) == list(range(10))
    assert str(epochs[0]) != str(epochs[1])
    assert str(epochs[0]) == str([fit.batches(i) for i in range(2)])


@pytest.mark.parametrize("n_blocks", [None, 1])
def test_accumulated_gradients_are_those_of_one_batch(tiny_model: Path, tmp_path: Path, n_blocks: int | None):
    accumulated = fit_of(tiny_model, n_blocks, tmp_path, SETTINGS._replace(batch_pairs=3, accumulate=4))
    whole = fit_of(tiny_model, n_blocks, tmp_path, SETTINGS._replace(batch_pairs=10, accumulate=1))
    assert [len(batch) for batch in accumulated.batches(0)].count(3) == 3  # and one of a single pair
    weights = [fit.part.parameters() for fit in (accumulated, whole)]
    facts = [fit.step() for fit in (accumulated, whole)]
    assert facts[0].loss == pytest.approx(facts[1].loss, rel=1e-5)
    for name in weights[0]:
        moments = [
            fit.optimizer.state[w[name]]["exp_avg"] for fit, w in zip((accumulated, whole), weights, strict=True)
        ]
        torch.testing.assert_close(*moments, rtol=1e-3, atol=1e-6)


def test_one_step_by_hand(tiny_model: Path, tmp_path: Path):
    # the head alone: d/dw of mean −log σ(w·(x₊ − x₋)) is −mean σ(−w·δ) δ; Adam's first step moves by the rate
    settings = SETTINGS._replace(batch_pairs=10, accumulate=1, warmup=0.0)
    fit = fit_of(tiny_model, 0, tmp_path, settings)
    head = fit.part.parameters()["score.weight"]
    before = head.detach().clone()
    states = fit.part.states(list(range(20))).double().view(10, 2, -1)
    delta = states[:, 0] - states[:, 1]
    margin = delta @ before[0].double()
    gradient = -(torch.sigmoid(-margin)[:, None] * delta).mean(0)
    facts = fit.step()
    assert facts.loss == pytest.approx(float((1 + (-margin).exp()).log().mean()), rel=1e-5)
    assert facts.accuracy == float((margin > 0).double().mean())
    assert (before - head)[0].tolist() == pytest.approx((1e-2 * gradient.sign()).tolist(), rel=1e-3)
    clipped = gradient / max(float(gradient.norm()), 1.0)
    assert fit.optimizer.state[head]["exp_avg"][0].tolist() == pytest.approx((0.1 * clipped).tolist(), abs=1e-6)


# --- the frozen part ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n_blocks", [0, 1, 2])
def test_rewards_by_way_of_the_frozen_part_are_the_models(tiny_model: Path, tmp_path: Path, n_blocks: int):
    reward_model = RewardModel.fresh(tiny_model, seed=0)
    part = trained_part(reward_model, made_ids(), n_blocks, tmp_path)
    assert part.all_rewards() == pytest.approx(reward_model.rewards(made_ids()), abs=1e-5)
    below = {0: [], 1: ["layers.0.", "norm."], 2: ["layers.0.", "layers.1.", "norm."]}[n_blocks]
    names = set(part.parameters())
    assert {name for name in names if not name.startswith((*below, "score."))} == set()
    assert len(names) == 1 + 9 * n_blocks + (n_blocks > 0)  # a block of Llama has 7 matrices and 2 norms
    with torch.no_grad():  # the part holds the model's own weights, not copies
        for value in part.parameters().values():
            value.mul_(1.1)
    assert part.all_rewards() == pytest.approx(reward_model.rewards(made_ids()), abs=1e-5)


def test_the_frozen_part_is_computed_once(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def states() -> Any:
        return trained_part(RewardModel.fresh(tiny_model, seed=0), made_ids(), 1, tmp_path, made_of="m").states([3, 4])

    first = states()
    (path,) = tmp_path.glob("frozen-*.bin")
    assert path.stat().st_size == sum(map(len, made_ids())) * 32 * 4
    monkeypatch.setattr("safesail.rewards.parts.run_to_depth", None)
    assert torch.equal(states(), first)
    with pytest.raises(TypeError):  # other weights: computed anew
        trained_part(RewardModel.fresh(tiny_model, seed=0), made_ids(), 1, tmp_path, made_of="other")


def test_the_last_blocks_of_a_model_with_blocks_of_two_kinds(tmp_path: Path, tiny_model: Path):
    config = Qwen2Config(
        vocab_size=800, hidden_size=16, intermediate_size=16, num_hidden_layers=4, num_attention_heads=2,
        num_key_value_heads=1, max_window_layers=2, use_sliding_window=True, sliding_window=4,
    )  # fmt: skip
    Qwen2ForCausalLM(config).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(tmp_path)
    reward_model = RewardModel.fresh(tmp_path, seed=0)
    for n_blocks in (1, 3):
        part = trained_part(reward_model, made_ids(), n_blocks, tmp_path)
        assert part.all_rewards() == pytest.approx(reward_model.rewards(made_ids()), abs=1e-5)


def test_models_whose_last_blocks_do_not_run_alone(tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch):
    config = GPT2Config(vocab_size=800, n_positions=64, n_embd=16, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=1)
    GPT2LMHeadModel(config).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(tmp_path)
    reward_model = RewardModel.fresh(tmp_path, seed=0)
    with pytest.raises(InputError, match=r"GPT2Model does not keep its blocks in `layers`.*leave trained_blocks out"):
        trained_part(reward_model, made_ids(), 1, tmp_path)
    assert trained_part(reward_model, made_ids(), 0, tmp_path).all_rewards().isfinite().all()
    with pytest.raises(InputError, match="trained_blocks = 3, but the model has 2 blocks"):
        trained_part(RewardModel.fresh(tiny_model, seed=0), made_ids(), 3, tmp_path)

    scaling = RewardModel.fresh(tiny_model, seed=0)
    base = scaling.model.base_model
    forward = type(base).forward

    def scaled(self: Any, *args: Any, inputs_embeds: Any = None, **kwargs: Any) -> Any:
        given = None if inputs_embeds is None else inputs_embeds * 4
        return forward(self, *args, inputs_embeds=given, **kwargs)

    monkeypatch.setattr(type(base), "forward", scaled)  # as a model that scales its inputs
    with pytest.raises(InputError, match=r"gives other states when .* are run alone.*leave trained_blocks"):
        trained_part(scaling, made_ids(), 1, tmp_path / "scaled")


# --- the stage ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("trained_blocks", [None, 1, 0])
def test_a_word_of_the_chosen_answers_is_learnt(tmp_path: Path, tiny_model: Path, trained_blocks: int | None):
    rate = {"learning_rate": 3e-2, "epochs": 60} if trained_blocks == 0 else {"learning_rate": 3e-3, "epochs": 6}
    recipe = recipe_of(tiny_model, trained_blocks=trained_blocks, **rate)
    facts = run_stage(recipe, tmp_path / "run")
    found = json.loads((tmp_path / "run/accuracy.json").read_text())["safety"]
    assert found["held_out"]["accuracy"] == 1.0, found
    assert found["held_out"]["n"] == 12
    assert facts["accuracy"]["safety"] == found
    assert (facts["n_steps"], facts["n_texts"], facts["n_truncated"]) == (rate["epochs"] * 6, 96, 0)
    whole = sum(value.numel() for value in RewardModel.fresh(tiny_model, seed=0).model.parameters())
    block = 4 * 32 * 32 + 3 * 32 * 64 + 2 * 32
    assert facts["n_parameters_trained"] == {None: whole, 1: block + 32 + 32, 0: 32}[trained_blocks]
    table = pq.read_table(tmp_path / "run/rewards.parquet")
    assert table.schema == REWARDS_SCHEMA
    assert table["pair_id"].to_pylist() == [pair.id for pair in toy()]
    saved = RewardModel.load(tmp_path / "run/model")
    texts = [saved.tokenizer.apply_chat_template(toy()[3].messages(s))["input_ids"] for s in ("chosen", "rejected")]
    assert saved.rewards(texts).tolist() == pytest.approx(
        [table["reward_chosen"][3].as_py(), table["reward_rejected"][3].as_py()], abs=1e-4
    )
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == [
        "accuracy.json",
        "log.jsonl",
        "model",
        "rewards.parquet",
    ]


class _Interrupted:
    """A progress bar that raises at a step of the training."""

    def __init__(self, label: str, at: int | None) -> None:
        self.left = at if label == "reward" else None

    def __enter__(self) -> "_Interrupted":
        return self

    def __exit__(self, *exception: object) -> None:
        pass

    def update(self, n: int) -> None:
        if self.left is not None and n:
            self.left -= n
            if self.left <= 0:
                raise KeyboardInterrupt

    def set_postfix_str(self, text: str, refresh: bool) -> None:
        pass


@pytest.mark.parametrize("trained_blocks", [None, 1, 0])
@pytest.mark.parametrize("every", [1, 3])
def test_interrupted_anywhere_it_ends_with_the_same_bytes(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch, trained_blocks: int | None, every: int
):
    preferences = toy(16)  # 12 to train on: 2 steps an epoch, 4 in all
    run_stage(recipe_of(tiny_model, trained_blocks=trained_blocks), tmp_path / "whole", preferences)
    recipe = recipe_of(tiny_model, every - 0.5, trained_blocks=trained_blocks)
    clock = iter(range(10**6))
    monkeypatch.setattr(training.time, "monotonic", lambda: next(clock))  # a tick a step
    for at in (1, 2, 3):
        with monkeypatch.context() as patch:
            patch.setattr(training, "bar", lambda label, *rest, at=at: _Interrupted(label, at))
            with pytest.raises(KeyboardInterrupt):
                run_stage(recipe, tmp_path / "broken", preferences)
        assert (tmp_path / "broken/checkpoint.safetensors").is_file() == (at >= every or every == 1)
    run_stage(recipe, tmp_path / "broken", preferences)
    whole, broken = files_of(tmp_path / "whole"), files_of(tmp_path / "broken")
    assert whole.keys() == broken.keys()
    assert [name for name in whole if whole[name] != broken[name]] == []


def test_what_diverges_says_so_and_keeps_the_checkpoint(tmp_path: Path, tiny_model: Path):
    recipe = recipe_of(tiny_model, 0.0, learning_rate=1e30)
    with pytest.raises(InputError, match=r"diverges at step 2 of 12 .*state of step 1 is kept in .*Lower reward.learn"):
        run_stage(recipe, tmp_path / "run")
    assert (tmp_path / "run/checkpoint.safetensors").is_file()


def test_truncated_texts_are_counted_and_a_length_beyond_the_model_refused(tmp_path: Path, tiny_model: Path):
    facts = run_stage(recipe_of(tiny_model, trained_blocks=0, max_length=20), tmp_path / "run")
    assert facts["n_truncated"] == 96
    assert facts["n_tokens"] == 96 * 20
    with pytest.raises(InputError, match=r"max_length = 513, but .* reads 512 tokens at most; lower it to 512"):
        run_stage(recipe_of(tiny_model, max_length=513), tmp_path / "long")


def test_in_bfloat16_the_rewards_are_those_of_the_saved_model(tmp_path: Path, tiny_model: Path):
    recipe = recipe_of(tiny_model, trained_blocks=1)
    shorter = recipe.model_copy(update={"model": recipe.model.model_copy(update={"dtype": "bfloat16"})})
    run_stage(shorter, tmp_path / "run", toy(8))
    saved = RewardModel.load(tmp_path / "run/model", dtype=torch.bfloat16)
    assert json.loads((tmp_path / "run/model/config.json").read_text())["dtype"] == "bfloat16"
    texts = [saved.tokenizer.apply_chat_template(p.messages("chosen"))["input_ids"] for p in toy(8)]
    table = pq.read_table(tmp_path / "run/rewards.parquet")
    assert table["reward_chosen"].to_pylist() == pytest.approx(saved.rewards(texts).tolist(), abs=0.05)
    half = recipe.model_copy(update={"model": recipe.model.model_copy(update={"dtype": "float16"})})
    with pytest.raises(InputError, match="is not trained in float16"):
        run_stage(half, tmp_path / "half")


def test_held_out_pairs_change_nothing(tmp_path: Path, tiny_model: Path):
    recipe = recipe_of(tiny_model, trained_blocks=1)
    run_stage(recipe, tmp_path / "a")
    swapped = [p._replace(chosen=p.rejected, rejected=p.chosen) if p.held_out else p for p in toy()]
    run_stage(recipe, tmp_path / "b", swapped)
    assert (tmp_path / "a/log.jsonl").read_bytes() == (tmp_path / "b/log.jsonl").read_bytes()
    found = json.loads((tmp_path / "b/accuracy.json").read_text())["safety"]
    assert found["held_out"]["accuracy"] == pytest.approx(
        1 - json.loads((tmp_path / "a/accuracy.json").read_text())["safety"]["held_out"]["accuracy"]
    )


# --- ranks --------------------------------------------------------------------------------------------------------


class _Meeting:
    """Where two threads that stand for ranks wait for each other and add up."""

    def __init__(self) -> None:
        self.barrier, self.given = threading.Barrier(2, timeout=60), [torch.empty(0)] * 2


@dataclass(frozen=True)
class _InThreads(Ranks):
    """One of two ranks; what processes do with `Ranks` is tested with `Ranks`."""

    meeting: _Meeting | None = None

    def wait(self) -> None:
        assert self.meeting is not None
        self.meeting.barrier.wait()

    def sum(self, tensor: Tensor) -> Tensor:
        assert self.meeting is not None
        self.meeting.given[self.rank] = tensor.clone()
        self.wait()
        tensor.copy_(self.meeting.given[0] + self.meeting.given[1])
        self.wait()
        return tensor


@pytest.mark.parametrize("trained_blocks", [None, 1, 0])
def test_two_ranks_give_what_one_gives(tmp_path: Path, tiny_model: Path, trained_blocks: int | None):
    # batches of 5 pairs: shares of 3 and 2, and of 1 and 1 where 2 pairs are left
    recipe = recipe_of(tiny_model, trained_blocks=trained_blocks, learning_rate=1e-3, batch_pairs=5, accumulate=2)
    run_stage(recipe, tmp_path / "one", toy(16))
    (tmp_path / "two").mkdir()
    meeting = _Meeting()
    ranks = [_InThreads(rank, 2, meeting) for rank in range(2)]
    with ThreadPoolExecutor(2) as threads:
        list(threads.map(lambda each: reward_stage(recipe, toy(16), StageWork(tmp_path / "two"), each), ranks))
    one, two = (pq.read_table(tmp_path / name / "rewards.parquet") for name in ("one", "two"))
    assert one["pair_id"] == two["pair_id"]
    for side in ("reward_chosen", "reward_rejected"):
        assert one[side].to_pylist() == pytest.approx(two[side].to_pylist(), abs=1e-3)
    logs = [
        [json.loads(line) for line in (tmp_path / n / "log.jsonl").read_text().splitlines()] for n in ("one", "two")
    ]
    for line, other in zip(*logs, strict=True):
        assert line["loss"] == pytest.approx(other["loss"], rel=1e-4)
        assert line["accuracy"] == other["accuracy"]


# --- retraining ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("trained_blocks", [0, 1, None])
def test_retraining_learns_what_the_pairs_say(tmp_path: Path, tiny_model: Path, trained_blocks: int | None):
    settings = {0: (60, 3e-2), 1: (12, 3e-3), None: (6, 3e-3)}[trained_blocks]
    compare = dict(zip(("epochs", "learning_rate"), settings, strict=True)) | {"trained_blocks": trained_blocks}
    recipe = recipe_of(tiny_model, compare=compare)
    retraining = Retraining(recipe, toy(), tmp_path / "cache")
    pairs = [p for p, each in enumerate(toy()) if not each.held_out]
    straight = retraining.rewards([(p, 0) for p in pairs], 1)
    crossed = retraining.rewards([(p, 1) for p in pairs], 1)
    assert straight.shape == (48, 2)
    assert accuracies(toy(), straight)["safety"]["held_out"]["accuracy"] == 1.0
    assert accuracies(toy(), crossed)["safety"]["held_out"]["accuracy"] == 0.0
    # neither an earlier training nor another object of the class matters, the seed does
    again = Retraining(recipe, toy(), tmp_path / "cache")
    assert torch.equal(again.rewards([(p, 0) for p in pairs], 1), straight)
    assert torch.equal(retraining.rewards([(p, 0) for p in pairs], 1), straight)
    assert not torch.equal(retraining.rewards([(p, 0) for p in pairs], 2), straight)


def test_retraining_the_head_takes_no_time(tmp_path: Path, tiny_model: Path):
    pairs = toy(1000)
    compare = {"trained_blocks": 0, "epochs": 1, "batch_pairs": 32}
    retraining = Retraining(recipe_of(tiny_model, compare=compare), pairs, tmp_path)
    retraining.rewards([(p, 0) for p in range(1000)], 0)
    started = time.process_time()
    retraining.rewards([(p, 0) for p in range(1000)], 1)
    assert time.process_time() - started < 1.0


def test_retraining_reads_what_another_process_kept(tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch):
    recipe = recipe_of(tiny_model)
    first = Retraining(recipe, toy(), tmp_path).rewards([(1, 0), (2, 0)], 0)
    monkeypatch.setattr("safesail.rewards.parts._compute", None)
    assert torch.equal(Retraining(recipe, toy(), tmp_path).rewards([(1, 0), (2, 0)], 0), first)
    other = tmp_path / "model"
    shutil.copytree(tiny_model, other)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.5}))
    with pytest.raises(TypeError):  # another model: computed anew
        Retraining(recipe_of(other), toy(), tmp_path)


def test_equal_texts_are_read_once_and_every_side_has_its_place():
    texts = [Text([1, 2], range(2), 0), Text([3], range(1), 0), Text([1, 2], range(2), 1)]
    found = distinct(texts)
    assert found.ids == [[1, 2], [3]]
    assert found.number.tolist() == [0, 1, 0]
