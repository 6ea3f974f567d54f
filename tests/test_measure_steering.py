"""The arithmetic of the steering measurement: which neurons and tokens, the null, and what is counted."""

import importlib
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from test_interventions import FIRST, TEXT, inspector_with, normaliser

from safesail.diagnosis.interventions import Intervention, next_token_change
from safesail.examples import Example
from safesail.metrics import Interval
from safesail.neurons import NeuronDatabase

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "scripts"))  # the scripts are no package
script = importlib.import_module("measure_steering")


def row(
    latent: int, score: float | None, explanation: str | None, concept: str | None = None, hook_point: str = FIRST
) -> dict[str, Any]:
    return {
        "neuron_id": f"{hook_point}/{latent}",
        "score": score,
        "explanation": explanation,
        "concept": concept,
        "category": None,
        "hook_point": hook_point,
        "domains": [],
    }


def database(*rows: dict[str, Any]) -> NeuronDatabase:
    by_id = {row["neuron_id"]: row for row in rows}
    return NeuronDatabase(by_id, by_id, {}, {})


def test_neurons_are_chosen_by_whole_words_and_score():
    made = database(
        row(1, 0.5, "murder"),
        row(2, 0.2, "murder"),  # weak: not above 0.2
        row(3, None, "murder"),
        row(4, 0.9, "murderous"),  # another word
        row(5, 0.6, None, "kill, killed"),  # by its concept alone
        row(6, 0.8, "sex and death"),  # of two subjects: the first
        row(7, 0.3, "The President"),
        *(row(i, 0.9 - i / 100, "sexual") for i in range(10, 17)),
        row(9, 0.4, "murder", hook_point="layers.1"),  # of each hook point its own best
    )
    found = [(neuron.subject, int(neuron.neuron_id.split("/")[1])) for neuron in script.chosen(made)]
    assert found.pop() == ("death", 9)
    sex = [10, 6, 11, 12, 13]  # the five best: scores of 0.80 (as 6, whose id is later), 0.80, 0.79, 0.78, 0.77
    assert found == [*(("sex", i) for i in sex), ("death", 5), ("death", 1), ("president", 7)]


def test_tokens_are_ranked_by_their_summed_activation(tokenizer: Any):
    many = " murder house"  # two tokens: left out
    examples = [
        Example("top", [" murder", " house", many], [3.0, 0.5, 99.0], "made"),
        Example("top", [" river", " murder", " old"], [4.0, 2.0, 0.0], "made"),
    ]
    ids = script.tokens_fired_on(examples, tokenizer)
    # murder 3 + 2, river 4, house 0.5; old never fires
    assert [tokenizer.decode([id]) for id in ids] == [" murder", " river", " house"]


def test_the_change_is_a_mean_over_tokens_then_prompts():
    before, after = torch.zeros(2, 4), torch.tensor([[1.0, 2.0, 9.0, 4.0], [3.0, 4.0, 9.0, 9.0]])
    assert script.mean_changes(before, after, [0, 1]).tolist() == [1.5, 3.5]
    rows = [torch.tensor([1.5, 3.5]), torch.tensor([1.0, 2.0]), torch.tensor([0.0, -1.0]), torch.tensor([5.0, 5.0])]
    found = script.measured(rows, 2)
    assert found.change.value == 2.5
    assert (found.change.low, found.change.high) == (1.5, 3.5)
    assert found.directions.tolist() == [1.5, -0.5]
    assert found.latents.tolist() == [5.0]
    assert found.beyond == (True, False)


def test_beyond_is_above_the_upper_quantile_of_the_null():
    """Of 0, 1, …, 40 the 0.975 quantile is 39."""
    null = torch.arange(41.0)
    assert script.quantile(null, 0.975) == 39
    for value, expected in ((39.0, False), (39.1, True), (-5.0, False)):
        assert script.Measured(Interval(value, None, None), null, null).beyond == (expected, expected)


def test_the_null_has_the_length_of_the_neurons_own_change(model: Any, tokenizer: Any):
    inspector = inspector_with(model, tokenizer)
    directions, latents = script.null_rows(inspector, FIRST, 20, without=3)
    torch.testing.assert_close(directions.norm(dim=1), torch.ones(20))
    W_dec = inspector.saes[FIRST].W_dec
    drawn = [int((W_dec @ latent).argmax()) for latent in latents]
    assert len(set(drawn)) == 20
    assert not {3, 23} & set(drawn)  # neither the neuron itself nor the latent that never fired
    torch.testing.assert_close(latents, W_dec[drawn])
    again = script.null_rows(inspector, FIRST, 20, without=3)
    assert torch.equal(again[0], directions)


def test_a_planted_direction_is_steered_as_the_neuron_itself(
    model: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
):
    inspector = inspector_with(model, tokenizer)
    prompts = (TEXT, "The old house.", "The old")
    monkeypatch.setattr(script, "PROMPTS", prompts)
    before = script.log_probabilities(inspector, prompts, [])
    own, other = script.measure(inspector, f"{FIRST}/3", 4.0, [[7, 300], [9]], before, 3)
    changes = []
    for prompt in prompts:
        (said,) = next_token_change(inspector, prompt, [Intervention("0_3", "steer", 4)], tokens=[7, 300]).rows
        told = [t["log_probability_changed"] - t["log_probability_unchanged"] for t in said["next_tokens"]]
        changes.append(sum(told) / 2)
    assert own.change.value == pytest.approx(sum(changes) / 3, abs=1e-4)
    assert own.directions.shape == own.latents.shape == other.directions.shape == (3,)
    assert len({round(x, 5) for x in [own.change.value, *own.directions.tolist(), *own.latents.tolist()]}) == 7
    planted = script.with_directions(inspector, FIRST, inspector.saes[FIRST].W_dec[3:4].detach(), normaliser(3))
    same = script.log_probabilities(planted, prompts, [Intervention("0_0", "steer", 4)])
    torch.testing.assert_close(same, script.log_probabilities(inspector, prompts, [Intervention("0_3", "steer", 4)]))


def test_the_table_and_its_summary_say_what_was_found():
    null = torch.arange(41.0) / 10  # its 0.975 quantile is 3.9, its 0.025 quantile 0.1
    up = script.Measured(Interval(5.0, 4.0, 6.0), null, null + 10)
    down = script.Measured(Interval(-1.0, -2.0, 0.5), null, null)
    neuron = script.Chosen("death", f"{FIRST}/1", "a | b\nc", 0.5)
    assert script.table_row(neuron, 4, "fires on", [" kill"], up) == (
        "| death | layers.0.mlp/1 | a \\| b c | 0.50 | 4 | fires on: `kill` | +5.00 [+4.00, +6.00] | +0.10 – +3.90 | "
        "+10.10 – +13.90 | yes / no |"
    )
    assert script.HEADER.count("|") == 2 * 11
    # Wilson's interval of 1 of 2 is 9 to 91 %, of 0 of 2 it is 0 to 66 %.
    assert script.summary(FIRST, "fires on", 4, [up, down]) == (
        "layers.0.mlp, α = 4, tokens it fires on: 1 of 2 neurons move them up; beyond the 95 % range of "
        "random directions 1 of 2 [9%, 91%], of other latents 0 of 2 [0%, 66%], of both 0 of 2 [0%, 66%]."
    )
