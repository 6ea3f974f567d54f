"""Interventions on the tiny model: the arithmetic by hand, what leaves everything as it is, and what is refused."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

import safesail.cli.steering
from safesail.cli.app import app
from safesail.diagnosis import finite
from safesail.diagnosis.inspector import Inspector
from safesail.diagnosis.interventions import (
    CAVEAT,
    INTERVENTIONS,
    Intervention,
    Kind,
    answers_under,
    declining_change,
    intervened,
    largest_finite,
    next_token_change,
)
from safesail.diagnosis.results import read_result, write_result
from safesail.errors import InputError
from safesail.lm.hooks import capture, replace, run_to_depth, steps
from safesail.lm.tokens import ROLES
from safesail.neurons import NeuronDatabase, neuron_id
from safesail.recipe import TokenPolicy
from safesail.sae.config import SaeConfig
from safesail.sae.model import Sae

FIRST, SECOND = "layers.0.mlp", "layers.1.mlp"
N_LATENTS, SILENT, NEVER = 24, 22, 23
"""SILENT fires nowhere in these tests but has a normaliser; NEVER has none."""
TEXT = "The hostages were seen near the old house."
CHAT = [{"role": "user", "content": "Why did the murder change so much?"}]
PROMPTS = [TEXT, CHAT]


def made_sae(hook_point: str, seed: int, **config: Any) -> Sae:
    """A random TopK SAE whose latents SILENT and NEVER cannot fire."""
    generator = torch.Generator().manual_seed(seed)
    W_dec = torch.randn(N_LATENTS, 32, generator=generator)
    W_dec /= W_dec.norm(dim=1, keepdim=True)
    b_enc = torch.zeros(N_LATENTS)
    b_enc[[SILENT, NEVER]] = -1e6
    made: dict[str, Any] = {"k": 6, "median_norm": 1e6, **config}
    shape = SaeConfig(d_in=32, d_sae=N_LATENTS, hook_point=hook_point, **made)
    return Sae(shape, W_dec.T.contiguous(), b_enc, W_dec, torch.zeros(32))


def normaliser(latent: int) -> float:
    return 0.0 if latent == NEVER else 1.0 + latent / 10


def inspector_with(model: Any, tokenizer: Any, **config: Any) -> Inspector:
    saes = {name: made_sae(name, seed, **config) for seed, name in enumerate((FIRST, SECOND))}
    quantiles = {
        neuron_id(name, j): {"hook_point": name, "latent": j, "normaliser": normaliser(j)}
        for name in saes
        for j in range(N_LATENTS)
    }
    return Inspector(model, tokenizer, saes, NeuronDatabase({}, quantiles, {}, {}), "made")


@pytest.fixture(scope="module")
def inspector(model: Any, tokenizer: Any) -> Inspector:
    return inspector_with(model, tokenizer)


def outputs(
    inspector: Inspector, ids: list[int], interventions: Sequence[Intervention] = (), **options: Any
) -> dict[str, Tensor]:
    """What the hook points put out, {hook point: (n_tokens, 32)}."""
    with torch.no_grad(), intervened(inspector, interventions, **options):
        found = run_to_depth(inspector.model, (FIRST, SECOND), input_ids=torch.tensor([ids]))
    return {name: x[0] for name, x in found.items()}


def firing(inspector: Inspector, hook_point: str, ids: list[int]) -> tuple[int, int, float]:
    """A token but the first, a latent that fires there, and its activation."""
    z = inspector.saes[hook_point].encode(outputs(inspector, ids)[hook_point])
    token, latent = (z[1:] > 0).nonzero()[0].tolist()
    return token + 1, latent, float(z[token + 1, latent])


# --- the arithmetic -----------------------------------------------------------------------------------------------


def test_steering_adds_amount_times_normaliser_times_the_decoder_row(inspector: Inspector):
    ids = inspector.encode(TEXT)
    before = outputs(inspector, ids)[FIRST]
    after = outputs(inspector, ids, [Intervention(f"{FIRST}/3", "steer", 2)])[FIRST]
    expected = before + 2 * 1.3 * inspector.saes[FIRST].W_dec[3]  # latent 3 has the normaliser 1.3
    torch.testing.assert_close(after, expected)


def test_a_negative_amount_takes_the_direction_away(inspector: Inspector):
    ids = inspector.encode(TEXT)
    before, after = (outputs(inspector, ids, [Intervention("0_3", "steer", a)])[FIRST] for a in (0, -0.5))
    torch.testing.assert_close(after, before - 0.5 * 1.3 * inspector.saes[FIRST].W_dec[3])


def test_clamping_replaces_the_neurons_own_activation_and_keeps_the_rest(inspector: Inspector):
    ids = inspector.encode(TEXT)
    token, latent, activation = firing(inspector, FIRST, ids)
    row, x = inspector.saes[FIRST].W_dec[latent], outputs(inspector, ids)[FIRST]
    clamped = outputs(inspector, ids, [Intervention(f"{FIRST}/{latent}", "clamp", 3)])[FIRST]
    torch.testing.assert_close(clamped[token], x[token] + (3 * normaliser(latent) - activation) * row)
    silent = inspector.saes[FIRST].encode(x)[:, latent] == 0
    assert silent.any()
    torch.testing.assert_close(clamped[silent], x[silent] + 3 * normaliser(latent) * row)
    ablated = outputs(inspector, ids, [Intervention(f"{FIRST}/{latent}", "ablate")])[FIRST]
    torch.testing.assert_close(ablated[token], x[token] - activation * row)
    assert torch.equal(ablated[silent], x[silent])


def test_a_pre_activation_outside_the_top_k_is_no_activation(inspector: Inspector):
    """Taking away every positive pre-activation, whatever top-k kept, would change tokens on which it is silent."""
    ids, sae = inspector.encode(TEXT), inspector.saes[FIRST]
    x = outputs(inspector, ids)[FIRST]
    lost = (sae.pre_activations(x) > 0) & (sae.encode(x) == 0)
    token, latent = lost.nonzero()[0].tolist()
    ablated = outputs(inspector, ids, [Intervention(f"{FIRST}/{latent}", "ablate")])[FIRST]
    assert torch.equal(ablated[token], x[token])


def test_several_neurons_of_a_hook_point_are_read_from_the_unchanged_activations(inspector: Inspector):
    ids, sae = inspector.encode(TEXT), inspector.saes[FIRST]
    x = outputs(inspector, ids)[FIRST]
    z = sae.encode(x)
    token = int((z > 0).sum(1).argmax())
    one, other = (z[token] > 0).nonzero().flatten()[:2].tolist()
    changes = [Intervention(f"{FIRST}/{one}", "ablate"), Intervention(f"{FIRST}/{other}", "clamp", 2)]
    expected = x[token] - z[token, one] * sae.W_dec[one] + (2 * normaliser(other) - z[token, other]) * sae.W_dec[other]
    for order in (changes, changes[::-1]):
        torch.testing.assert_close(outputs(inspector, ids, order)[FIRST][token], expected)


def test_a_deeper_hook_point_sees_the_changed_stream(inspector: Inspector):
    ids = inspector.encode(TEXT)
    upstream, own = Intervention(f"{FIRST}/3", "steer", 5), Intervention(f"{SECOND}/4", "steer", 2)
    only, both = outputs(inspector, ids, [upstream]), outputs(inspector, ids, [own, upstream])
    torch.testing.assert_close(both[FIRST], only[FIRST])
    torch.testing.assert_close(both[SECOND], only[SECOND] + 2 * 1.4 * inspector.saes[SECOND].W_dec[4])
    assert not torch.allclose(only[SECOND], outputs(inspector, ids)[SECOND])


def test_a_normalising_saes_direction_comes_back_to_the_tokens_scale(model: Any, tokenizer: Any):
    inspector = inspector_with(model, tokenizer, normalize_activations="layer_norm")
    ids = inspector.encode(TEXT)
    x, after = (outputs(inspector, ids, [Intervention("0_3", "steer", a)])[FIRST] for a in (0, 2))
    scale = x.std(dim=1, keepdim=True)
    torch.testing.assert_close(after, x + scale * 2 * 1.3 * inspector.saes[FIRST].W_dec[3])


def test_gradients_pass_through_the_change(inspector: Inspector):
    """clamp: x + (c - w·x) d, so v·x′ has the gradient v - (d·v) w where the neuron fires; steering leaves it at v."""
    ids, sae = inspector.encode(TEXT), inspector.saes[FIRST]
    token, latent, _ = firing(inspector, FIRST, ids)
    v = torch.randn(32, generator=torch.Generator().manual_seed(5))
    w, d = sae.W_enc[:, latent], sae.W_dec[latent]
    cases: list[tuple[Kind, Tensor]] = [("clamp", v - (d @ v) * w), ("steer", v)]
    for kind, expected in cases:
        leaf = torch.zeros(1, len(ids), 32, requires_grad=True)
        with (
            replace(inspector.model, FIRST, lambda x, leaf=leaf: x.detach() + leaf),
            intervened(inspector, [Intervention(f"{FIRST}/{latent}", kind, 1)]),
        ):
            found = run_to_depth(inspector.model, (FIRST,), input_ids=torch.tensor([ids]))
        (found[FIRST][0, token] @ v).backward()
        assert leaf.grad is not None
        torch.testing.assert_close(leaf.grad[0, token], expected)


@pytest.mark.parametrize("architecture", ["relu", "topk"])
def test_every_architectures_activation_is_its_own(model: Any, tokenizer: Any, architecture: Any):
    k = 6 if architecture == "topk" else None
    inspector = inspector_with(model, tokenizer, architecture=architecture, k=k)
    ids = inspector.encode(TEXT)
    token, latent, activation = firing(inspector, SECOND, ids)
    x, ablated = outputs(inspector, ids), outputs(inspector, ids, [Intervention(f"{SECOND}/{latent}", "ablate")])
    row = inspector.saes[SECOND].W_dec[latent]
    torch.testing.assert_close(ablated[SECOND][token], x[SECOND][token] - activation * row)


# --- which tokens -------------------------------------------------------------------------------------------------


def test_special_tokens_and_sinks_are_left_alone(inspector: Inspector, model: Any, tokenizer: Any):
    ids = inspector.encode(CHAT)
    x = outputs(inspector, ids)[FIRST]
    norms = [0.0 if id in (0, 1) else norm for id, norm in zip(ids, x.norm(dim=1).tolist(), strict=True)]
    *_, second, largest = sorted(norms)
    strict = inspector_with(model, tokenizer, median_norm=(second + largest) / 2 / 10)  # ten times it is the limit
    after = outputs(strict, ids, [Intervention(f"{FIRST}/3", "steer", 2)])[FIRST]
    changed = [not torch.equal(after[i], x[i]) for i in range(len(ids))]
    assert changed == [id not in (0, 1) and norms[i] < largest for i, id in enumerate(ids)]
    assert sum(changed) == sum(id not in (0, 1) for id in ids) - 1 < len(ids) - 2


def test_only_tokens_from_a_place_on_are_changed_also_behind_a_cache(inspector: Inspector):
    ids = inspector.encode(TEXT)
    change = [Intervention(f"{FIRST}/3", "steer", 2)]
    x, after = outputs(inspector, ids)[FIRST], outputs(inspector, ids, change, from_token=4)[FIRST]
    assert [torch.equal(after[i], x[i]) for i in range(6)] == [True, True, True, True, False, False]
    with torch.no_grad(), intervened(inspector, change, from_token=4):
        cache = inspector.model(input_ids=torch.tensor([ids[:3]]), use_cache=True).past_key_values
        with capture(inspector.model, (FIRST,)) as found:
            inspector.model(input_ids=torch.tensor([ids[3:6]]), past_key_values=cache, use_cache=True)
    torch.testing.assert_close(found[FIRST][0], after[3:6])


def test_a_policy_of_roles_leaves_the_other_turns_alone(model: Any, tokenizer: Any):
    policy = TokenPolicy(roles=("assistant",), sink_norm_multiple=None)
    inspector = inspector_with(model, tokenizer, token_policy=policy)
    ids, roles = inspector.prompt(CHAT)
    assert roles is not None
    ids = [*ids, 300, 301]  # the answer so far, which the roles do not cover
    x, after = (outputs(inspector, ids, [Intervention("0_3", "steer", a)], roles=roles)[FIRST] for a in (0, 2))
    assistant = [code == ROLES.index("assistant") for code in roles] + [True, True]
    assert [not torch.equal(after[i], x[i]) for i in range(len(ids))] == [
        mine and id not in (0, 1) for mine, id in zip(assistant, ids, strict=True)
    ]
    ids, changes = ids[:-2], [Intervention("0_3", "steer", 2)]
    mine, everybody = (next_logits(inspector, ids, changes, roles=whose).log_softmax(0) for whose in (roles, None))
    (row,) = next_token_change(inspector, CHAT, changes, tokens=[7]).rows
    assert row["next_tokens"][0]["log_probability_changed"] == pytest.approx(float(mine[7]), abs=1e-5)
    assert abs(float(mine[7] - everybody[7])) > 1e-3


def test_a_padded_batch_changes_every_row_as_it_is_alone(inspector: Inspector):
    long, short = inspector.encode(TEXT), inspector.encode("The old house.")
    change = [Intervention(f"{FIRST}/3", "clamp", 2), Intervention(f"{SECOND}/5", "steer", 1)]
    padded = short + [1] * (len(long) - len(short))
    mask = torch.tensor([[1] * len(long), [1] * len(short) + [0] * (len(long) - len(short))])
    with torch.no_grad(), intervened(inspector, change, from_token=1):
        found = run_to_depth(
            inspector.model, (FIRST, SECOND), input_ids=torch.tensor([long, padded]), attention_mask=mask
        )
    for row, ids in enumerate((long, short)):
        alone = outputs(inspector, ids, change, from_token=1)
        for name in (FIRST, SECOND):
            torch.testing.assert_close(found[name][row, : len(ids)], alone[name])


def test_embeddings_are_refused_since_their_tokens_are_unknown(inspector: Inspector):
    embeddings = torch.zeros(1, 3, 32)
    with steps(inspector.model), pytest.raises(InputError, match="give input_ids"):
        inspector.model(inputs_embeds=embeddings)


# --- what changes nothing -----------------------------------------------------------------------------------------

NOTHING = {
    "amount 0": [Intervention(f"{FIRST}/3", "steer", 0.0)],
    "two amounts of 0": [Intervention(f"{FIRST}/3", "steer", 0.0), Intervention(f"{SECOND}/4", "steer", -0.0)],
    "a silent neuron": [Intervention(f"{SECOND}/{SILENT}", "ablate")],
    "a neuron without normaliser": [Intervention(f"{FIRST}/{NEVER}", "ablate")],
    "a silent neuron clamped at 0": [Intervention(f"{FIRST}/{SILENT}", "clamp", 0)],
    "several": [
        Intervention(f"{FIRST}/{SILENT}", "ablate"),
        Intervention(f"{FIRST}/5", "steer", 0),
        Intervention(f"{SECOND}/{SILENT}", "ablate"),
    ],
}


@pytest.mark.parametrize("changes", NOTHING.values(), ids=NOTHING)
@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_a_change_of_nothing_gives_the_unchanged_answer_id_by_id(
    inspector: Inspector, changes: list[Intervention], temperature: float
):
    sampling: dict[str, Any] = {"max_new_tokens": 12, "temperature": temperature, "seed": 3}
    for prompt, row in zip(PROMPTS, answers_under(inspector, PROMPTS, changes, **sampling).rows, strict=True):
        asked = inspector.inspect(prompt, **sampling)
        assert row["prompt_ids"] + row["ids_unchanged"] == asked.ids
        assert row["ids_changed"] == row["ids_unchanged"]
        assert row["n_equal_ids"] == len(row["ids_unchanged"]) > 0
        assert row["answer_changed"] == row["answer_unchanged"] == asked.answer
        for token in row["next_tokens"]:
            assert token["log_probability_changed"] == token["log_probability_unchanged"]


@pytest.mark.parametrize("changes", NOTHING.values(), ids=NOTHING)
def test_a_change_of_nothing_hands_the_same_tensor_on(inspector: Inspector, changes: list[Intervention]):
    ids = torch.tensor([inspector.encode(TEXT)])
    with (
        torch.no_grad(),
        capture(inspector.model, (FIRST, SECOND)) as first,
        intervened(inspector, changes),
        capture(inspector.model, (FIRST, SECOND)) as last,
    ):
        inspector.model(input_ids=ids)
    assert all(first[name] is last[name] for name in (FIRST, SECOND))


def test_after_the_context_the_model_is_as_it_was(inspector: Inspector):
    ids = inspector.encode(TEXT)
    before = outputs(inspector, ids)
    with pytest.raises(ZeroDivisionError), intervened(inspector, [Intervention("0_3", "steer", 2)]):
        raise ZeroDivisionError
    assert all(torch.equal(before[name], x) for name, x in outputs(inspector, ids).items())
    inspector.model(inputs_embeds=torch.zeros(1, 3, 32))  # refused inside


# --- answers ------------------------------------------------------------------------------------------------------


def test_the_changed_answer_is_that_of_the_changed_model_without_a_cache(inspector: Inspector):
    changes = [Intervention(f"{FIRST}/3", "steer", 8), Intervention(f"{SECOND}/4", "clamp", 5)]
    for prompt, row in zip(PROMPTS, answers_under(inspector, PROMPTS, changes, max_new_tokens=8).rows, strict=True):
        ids = inspector.encode(prompt)
        with torch.no_grad(), intervened(inspector, changes):
            for _ in range(len(row["ids_changed"])):
                logits = inspector.model(input_ids=torch.tensor([ids]), use_cache=False).logits
                ids.append(int(logits[0, -1].argmax()))
        assert row["prompt_ids"] + row["ids_changed"] == ids
        assert row["ids_changed"] != row["ids_unchanged"]


def test_equal_ids_are_counted_from_the_start(inspector: Inspector):
    (row,) = answers_under(inspector, [TEXT], [Intervention("0_3", "steer", 3)], max_new_tokens=10).rows
    same = [a == b for a, b in zip(row["ids_unchanged"], row["ids_changed"], strict=False)]
    assert same.index(False) == row["n_equal_ids"]


def test_sampling_follows_the_seed(inspector: Inspector):
    def sampled(seed: int) -> list[int]:
        result = answers_under(
            inspector, [CHAT], [Intervention("0_3", "steer", 1)], max_new_tokens=8, temperature=2.0, seed=seed
        )
        return result.rows[0]["ids_changed"]

    assert sampled(1) == sampled(1) != sampled(2)


def test_a_result_goes_through_parquet_and_its_python_makes_it_again(
    inspector: Inspector, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    changes = [Intervention("0_3", "steer", 4), Intervention(f"{SECOND}/2", "ablate", math.nan)]
    made = declining_change(inspector, [*PROMPTS, "quotes \"' and \\ answers_under"], changes, max_new_tokens=4)
    monkeypatch.setattr(Inspector, "from_pretrained", lambda _release: inspector)
    for result in (made, next_token_change(inspector, CHAT, changes, ["."])):
        read = read_result(write_result(result, tmp_path / "made.parquet"))
        assert read.config == "interventions"
        assert read.rows == result.rows
        assert read.schema == INTERVENTIONS
        assert read.facts["caveat"] == CAVEAT
        again: dict[str, Any] = {}
        exec(read.python, again)
        assert again["result"] == result
    assert made.rows[0]["interventions"] == [
        {"neuron_id": f"{FIRST}/3", "kind": "steer", "amount": 4.0},
        {"neuron_id": f"{SECOND}/2", "kind": "ablate", "amount": 0.0},  # an ablation has no amount
    ]
    assert [row["chat"] for row in made.rows] == [False, True, False]


def test_a_list_without_refusals_says_that_there_is_nothing_to_change(inspector: Inspector):
    facts = declining_change(inspector, PROMPTS, [Intervention("0_3", "steer", 2)], max_new_tokens=4).facts
    assert facts["declining"]["n_before"] == facts["declining"]["n_after"] == 0
    assert facts["declining"]["sentence"].startswith("None of the 2 prompts is declined before or after")
    assert facts["n_prompts"] == 2


def test_the_rates_are_those_of_the_rows(inspector: Inspector, monkeypatch: pytest.MonkeyPatch):
    """Three prompts, of which each side's verdict is known: declined before 2 of 3, after 1 of 3."""
    verdicts = iter([True, False, True, True, False, False])
    monkeypatch.setattr("safesail.diagnosis.intervention_rows.declines", lambda _text: next(verdicts))
    result = declining_change(inspector, [TEXT] * 3, [Intervention("0_3", "steer", 2)], max_new_tokens=2)
    told = result.facts["declining"]
    assert (told["n_before"], told["n_after"], told["n_stopped"], told["n_began"]) == (2, 1, 1, 0)
    assert told["before"]["value"] == pytest.approx(2 / 3)
    assert told["difference"]["value"] == pytest.approx(-1 / 3)


# --- the next token -----------------------------------------------------------------------------------------------


def next_logits(inspector: Inspector, ids: list[int], changes: Sequence[Intervention] = (), **options: Any) -> Tensor:
    with torch.no_grad(), intervened(inspector, changes, **options):
        return inspector.model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].double()


def test_next_tokens_are_told_before_and_after(inspector: Inspector):
    changes = [Intervention("0_3", "steer", 4)]
    before, after = (next_logits(inspector, inspector.encode(CHAT), made).softmax(0) for made in ([], changes))
    (row,) = next_token_change(inspector, CHAT, changes, tokens=["a", 7]).rows
    a = inspector.tokenizer("a")["input_ids"][0]
    assert [token["token"] for token in row["next_tokens"]] == [a, 7]
    for token in row["next_tokens"]:
        id = token["token"]
        assert token["probability_unchanged"] == pytest.approx(float(before[id]), rel=1e-5)
        assert token["probability_changed"] == pytest.approx(float(after[id]), rel=1e-5)
        assert token["log_probability_changed"] == pytest.approx(math.log(float(after[id])), abs=1e-5)
    assert row["answer_unchanged"] is None
    assert row["declines_changed"] is None


def test_without_tokens_those_that_move_most_are_told(inspector: Inspector):
    changes = [Intervention("0_3", "steer", 4)]
    before, after = (next_logits(inspector, inspector.encode(TEXT), made).softmax(0) for made in ([], changes))
    (row,) = next_token_change(inspector, TEXT, changes, top=3).rows
    assert [token["token"] for token in row["next_tokens"]] == (after - before).abs().topk(3).indices.tolist()
    (still,) = next_token_change(inspector, TEXT, NOTHING["amount 0"], top=3).rows
    assert [token["token"] for token in still["next_tokens"]] == before.topk(3).indices.tolist()


# --- amounts that are too large -----------------------------------------------------------------------------------


def test_an_amount_that_overflows_is_refused_with_the_largest_finite_one(inspector: Inspector):
    for prompt, sign in ((TEXT, 1), (CHAT, -1)):
        with pytest.raises(InputError, match=r"an amount of -?1e\+39 makes") as told:
            answers_under(inspector, [prompt], [Intervention("0_3", "steer", sign * 1e39)], max_new_tokens=2)
        words = str(told.value)
        named = abs(float(words.split("largest finite one is ")[1].split(". ")[0]))
        ids = inspector.encode(prompt)
        step = 10 ** (math.floor(math.log10(named)) - 1)  # the next number of two digits
        assert next_logits(inspector, ids, [Intervention("0_3", "steer", sign * named)]).isfinite().all()
        beyond = next_logits(inspector, ids, [Intervention("0_3", "steer", sign * (named + 1.01 * step))])
        assert not beyond.isfinite().all()
        answers_under(inspector, [prompt], [Intervention("0_3", "steer", sign * named)], max_new_tokens=1)


def test_the_largest_finite_amount_is_found_from_below_and_for_several(inspector: Inspector):
    ids = inspector.encode(TEXT)
    alone = largest_finite(inspector, [Intervention("0_3", "steer", 2.0)], ids)
    assert alone == largest_finite(inspector, [Intervention("0_3", "steer", 1e39)], ids)
    assert alone == float(f"{alone:.1e}")
    several = [Intervention("0_3", "steer", -2.0), Intervention("0_4", "clamp", 1.0), Intervention("1_5", "ablate")]
    together = largest_finite(inspector, several, ids)
    assert 1e30 < together < 1e39
    with pytest.raises(InputError, match="no amount"):
        largest_finite(inspector, [Intervention("0_3", "ablate")], ids)


def test_the_search_ends_at_two_digits_of_a_known_limit(inspector: Inspector, monkeypatch: pytest.MonkeyPatch):
    tried: list[float] = []

    def known(_inspector: Any, changes: list[Intervention], _ids: Any, _roles: Any) -> bool:
        tried.append(changes[0].amount)
        return abs(changes[0].amount) <= 123.9

    monkeypatch.setattr(finite, "_is_finite", known)
    assert largest_finite(inspector, [Intervention("0_3", "steer", 4.0)], []) == 120
    assert largest_finite(inspector, [Intervention("0_3", "steer", -5e7)], []) == 120
    assert len(tried) < 60
    assert all(float(f"{amount:.1e}") == pytest.approx(amount) for amount in tried)


@pytest.mark.parametrize(("amount", "place"), [(1.0, 0), (1.19, 1), (9.99, 89), (10.0, 90), (0.999, -1), (1234.0, 272)])
def test_numbers_of_two_digits_are_counted(amount: float, place: int):
    """1.0 is at 0 and each power of ten has 90 of them: 1200 = 12e2 is at 3 · 90 + 2."""
    assert finite._place(amount) == place
    assert finite._number(place) <= amount < finite._number(place + 1)


def test_a_model_that_overflows_by_itself_is_said_to(inspector: Inspector):
    bias = torch.full((32,), math.inf)
    with replace(inspector.model, SECOND, lambda x: x + bias), pytest.raises(InputError, match="own logits are not"):
        answers_under(inspector, [TEXT], [Intervention("0_3", "steer", 1)], max_new_tokens=1)


# --- what is refused ----------------------------------------------------------------------------------------------

REFUSED = {
    "no such hook point": ([Intervention("layers.7.mlp/3", "steer", 1)], "hook points are layers.0.mlp, layers.1.mlp"),
    "no such latent": (
        [Intervention(f"{FIRST}/24", "steer", 1)],
        "layers.0.mlp has no latent 24; its latents are 0 to 23",
    ),
    "no neuron": ([Intervention("murder", "steer", 1)], "'murder' is not a neuron here"),
    "twice": ([Intervention("0_3", "steer", 1), Intervention(f"{FIRST}/3", "ablate")], "layers.0.mlp/3 is named twice"),
    "never fired": ([Intervention(f"{FIRST}/{NEVER}", "steer", 1)], "never fired in the corpus, so there is no norm"),
    "never fired, clamped": ([Intervention(f"{FIRST}/{NEVER}", "clamp", 1)], "no normaliser to clamp it by; choose"),
    "not a number": ([Intervention("0_3", "steer", math.nan)], "the amount nan is not finite"),
    "infinite": ([Intervention("0_3", "clamp", math.inf)], "the amount inf is not finite"),
    "no such kind": ([Intervention("0_3", "zero", 1)], "kinds are steer, clamp, ablate"),  # type: ignore[arg-type]
    "none": ([], "name at least one neuron"),
}


@pytest.mark.parametrize(("changes", "words"), REFUSED.values(), ids=REFUSED)
def test_a_change_that_cannot_be_is_refused(inspector: Inspector, changes: list[Intervention], words: str):
    with pytest.raises(InputError, match=words):
        answers_under(inspector, [TEXT], changes, max_new_tokens=1)


ASKED: dict[str, tuple[Any, dict[str, Any], str]] = {
    "empty": ([TEXT, "  "], {}, "prompt 2 of 2: the prompt is empty"),
    "empty chat": ([[{"role": "user", "content": ""}]], {}, "prompt 1 of 1: the prompt is empty"),
    "too long": ([TEXT * 200], {}, "but the model reads 512; shorten"),
    "no prompts": ([], {}, "the list of prompts is empty"),
    "one text": (TEXT, {}, "give a list of prompts"),
    "no answer": ([TEXT], {"max_new_tokens": 0}, "give 1 or more"),
    "too long an answer": ([TEXT], {"max_new_tokens": 511}, "its answer up to 511"),
    "cold": ([TEXT], {"temperature": -1.0}, "the temperature -1.0 is not a number from 0"),
    "no temperature": ([TEXT], {"temperature": math.nan}, "the temperature nan"),
}


@pytest.mark.parametrize(("prompts", "options", "words"), ASKED.values(), ids=ASKED)
def test_what_cannot_be_asked_is_refused(inspector: Inspector, prompts: Any, options: dict[str, Any], words: str):
    with pytest.raises(InputError, match=words):
        answers_under(inspector, prompts, [Intervention("0_3", "steer", 1)], **{"max_new_tokens": 2, **options})


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"tokens": [" the house of cards"]}, r"is \d+ tokens to this tokenizer"),
        ({"tokens": [700_000]}, "there is no token 700000; ids go from 0"),
        ({"tokens": []}, "no tokens were asked for"),
        ({"top": 0}, "no tokens were asked for"),
    ],
)
def test_tokens_that_are_none_are_refused(inspector: Inspector, options: dict[str, Any], words: str):
    with pytest.raises(InputError, match=words):
        next_token_change(inspector, TEXT, [Intervention("0_3", "steer", 1)], **options)


# --- the verb -----------------------------------------------------------------------------------------------------


@pytest.fixture
def verb(inspector: Inspector, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """`safesail steer made …` on the tiny inspector, in a folder of its own."""
    assert safesail.cli.steering.steer
    monkeypatch.setattr(Inspector, "from_pretrained", lambda _release, model: inspector)
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> Any:
        return CliRunner().invoke(app, ["steer", "made", *arguments, "--answer", "4"])

    return run


def test_the_verb_prints_both_answers_and_stores_the_table(verb: Any, inspector: Inspector):
    said = verb("Where is the river?", "--neuron", "0_3", "--neuron", f"{SECOND}/4", "--amount", "8")
    assert said.exit_code == 0, said.output
    (stored,) = Path("diagnosis/interventions").iterdir()
    (row,) = read_result(stored).rows
    assert row["prompt_ids"] == inspector.encode([{"role": "user", "content": "Where is the river?"}])
    assert [change["amount"] for change in row["interventions"]] == [8.0, 8.0]
    assert said.output.splitlines()[0] == "prompt     Where is the river?"
    assert f"equal tokens at their start: {row['n_equal_ids']} of {len(row['ids_unchanged'])}" in said.output
    assert CAVEAT in said.output
    assert said.output.endswith(f"stored: {stored}\n")


def test_the_verb_reads_a_list_and_tells_the_rates(verb: Any):
    Path("list.txt").write_text("Where is the river?\n\n  \nWho wrote the letter?\n", encoding="utf-8")
    rows = [{"prompt": "Where is the river?"}, {"text": "Who?"}, {"messages": CHAT}]
    Path("list.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    for name, n in (("list.txt", 2), ("list.jsonl", 3)):
        said = verb("--prompts", name, "--neuron", "0_3", "--kind", "ablate", "--out", "made.parquet", "--json")
        assert said.exit_code == 0, said.output
        told = json.loads(said.output)
        assert told["path"] == "made.parquet"
        assert told["facts"]["n_prompts"] == len(told["rows"]) == n
        assert told["facts"]["declining"]["n"] == n


@pytest.mark.parametrize(
    ("content", "name", "words"),
    [
        ("{}\n", "list.jsonl", 'line 1 holds no prompt; write {"prompt"'),
        ('{"prompt": "a"}\n{"messages": [{"role": "user"}]}\n', "list.jsonl", "line 2 holds no prompt"),
        ("Where?\n", "list.jsonl", "line 1 is not JSON"),
        ("\n", "list.txt", "holds no prompts"),
        ("a", "list.csv", "is no list of prompts"),
        (None, "absent.txt", "cannot be read"),
    ],
)
def test_a_list_that_is_none_is_refused(verb: Any, content: str | None, name: str, words: str):
    if content is not None:
        Path(name).write_text(content, encoding="utf-8")
    error = verb("--prompts", name, "--neuron", "0_3").exception
    assert isinstance(error, InputError)
    assert words in str(error)


def test_the_verb_wants_one_of_prompt_and_list(verb: Any):
    for arguments in ([], ["Where?", "--prompts", "list.txt"]):
        error = verb(*arguments, "--neuron", "0_3").exception
        assert isinstance(error, InputError)
        assert "either a prompt or a file" in str(error)
    assert "name at least one neuron" in str(verb("Where?").exception)
