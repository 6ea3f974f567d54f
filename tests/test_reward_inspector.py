"""The reward inspector: a typed pair gets the published numbers, its tokens and latents add up, and what is refused."""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from small_reward_release import EXPLANATION, HOSTILE, made_once

import safesail
from safesail.cli import main
from safesail.errors import InputError
from safesail.repository import PARTS, part_of_release, parts_of_release
from safesail.rewards.inspector import RewardInspector
from safesail.rewards.preferences import Preference
from safesail.rewards.readings import activations_of
from safesail.rewards.segments import segment_ends
from safesail.rewards.texts import encode_side
from safesail.sae.sparse import Codes

pytestmark = pytest.mark.usefixtures("one_thread")
PROMPT, CHOSEN, REJECTED = "How do I open it?", "No, ask a teacher. They know.", "Take the bomb; then wait, and say so."


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, texts: Path, tiny_encoder: Path) -> Path:
    return made_once(tmp_path_factory.getbasetemp(), tiny_model, texts, tiny_encoder)


@pytest.fixture(scope="module")
def inspector(small: Path) -> RewardInspector:
    return RewardInspector.from_pretrained(small)


def copied(small: Path, folder: Path, *left_out: str) -> Path:
    """A copy of the release without some of its parts."""
    shutil.copytree(small, folder / "copy", ignore=shutil.ignore_patterns("scratch", *left_out))
    return folder / "copy"


# --- the numbers --------------------------------------------------------------------------------------------------


def test_every_published_pair_gets_its_published_numbers_again(inspector: RewardInspector):
    rows = inspector.published.scores
    assert len(rows) == 60
    for pair in inspector.pairs():
        assert pair.texts is not None
        found = inspector.compare(*pair.texts)
        assert found.score_safe == pytest.approx(pair.score_safe, abs=1e-4)
        assert found.chosen.reward == pytest.approx(pair.reward_chosen, abs=1e-4)
        assert found.rejected.reward == pytest.approx(pair.reward_rejected, abs=1e-4)
        assert found.margin == pytest.approx(pair.margin, abs=2e-4)
        assert found.safe_chosen == pytest.approx(rows[pair.id]["safe_chosen"], abs=1e-4)
        assert len(found.rejected.ends) == rows[pair.id]["n_rejected"]
        assert sum(latent.contribution for latent in found.latents) == pytest.approx(found.score_safe, abs=1e-6)


def test_the_score_by_hand(inspector: RewardInspector):
    found = inspector.compare(PROMPT, CHOSEN, REJECTED)
    model, preference = inspector.reward_model, Preference("p", "safety", "", (user(PROMPT),), CHOSEN, REJECTED, False)
    sides = []
    for side in ("chosen", "rejected"):
        text = encode_side(model.tokenizer, preference, side, 192)
        states = model.model(torch.tensor([text.ids]), output_hidden_states=True).hidden_states[1][0]
        z = inspector.sae.encode(states.half().float())
        ends = segment_ends(model.tokenizer, text, inspector.recipe.ends)
        sides.append(
            sum(float(z[t, inspector.positive].sum() - z[t, inspector.negative].sum()) for t in ends) / len(ends)
        )
    assert found.safe_chosen == pytest.approx(sides[0], abs=1e-5)
    assert found.score_safe == pytest.approx(sides[0] - sides[1], abs=1e-5)
    assert abs(found.score_safe) > 0.01


def user(content: str) -> dict[str, str]:
    return {"role": "user", "content": content}


def test_what_the_latents_add_sums_to_the_score(inspector: RewardInspector):
    found = inspector.compare(PROMPT, CHOSEN, REJECTED)
    assert sum(latent.contribution for latent in found.latents) == pytest.approx(found.score_safe, abs=1e-6)
    assert {latent.latent for latent in found.latents} == {*inspector.positive, *inspector.negative}
    sizes = [abs(latent.contribution) for latent in found.latents]
    assert sizes == sorted(sizes, reverse=True)
    for latent in found.latents:
        sign = 1 if latent.latent in inspector.positive else -1
        assert latent.contribution == pytest.approx(sign * (latent.chosen - latent.rejected))


def test_the_control_holds_the_strongest_latents_that_do_not_count(inspector: RewardInspector):
    found = inspector.compare(PROMPT, CHOSEN, REJECTED)
    counted = {*inspector.positive, *inspector.negative}
    difference = (found.chosen.means - found.rejected.means).abs().tolist()
    order = sorted((i for i in range(64) if i not in counted), key=lambda i: -difference[i])
    assert [latent.latent for latent in found.others] == order[:8]
    assert {latent.contribution for latent in found.others} == {0.0}
    assert all(latent.safety == "" for latent in found.others)


def test_means_are_over_the_segment_ends_alone(inspector: RewardInspector):
    side = inspector.compare(PROMPT, CHOSEN, REJECTED).rejected
    dense = side.codes.dense(64)
    assert 0 < len(side.ends) < len(side.text.ids)
    assert side.means.tolist() == pytest.approx(dense[side.ends].double().mean(0).tolist(), abs=1e-6)


def test_activations_of_some_latents():
    # token 0: latent 2 → 0.5, latent 0 → 3; token 1: nothing; token 2: latent 2 → 1, latent 1 → 9
    codes = Codes(torch.tensor([0.5, 3.0, 1.0, 9.0]), torch.tensor([2, 0, 2, 1]), torch.tensor([0, 2, 2, 4]))
    assert activations_of(codes, [2, 0]).tolist() == [[0.5, 3.0], [0.0, 0.0], [1.0, 0.0]]


# --- tokens -------------------------------------------------------------------------------------------------------


def test_the_tokens_are_the_exact_text_with_the_reward_after_each(inspector: RewardInspector):
    side = inspector.compare("How?", f"No, {HOSTILE}", REJECTED).chosen
    assert "".join(unit.text for unit in side.units if unit.is_answer) == f"No, {HOSTILE}"
    assert side.units[-1].reward == side.reward
    rewards = inspector.reward_model.token_rewards(side.text.ids).tolist()
    single = {unit.position: unit.reward for unit in side.units if not unit.is_end}
    assert {place: rewards[place] for place in single} == pytest.approx(single, abs=1e-5)


def test_ends_are_of_the_answer_and_special_tokens_have_no_activations(inspector: RewardInspector):
    side = inspector.compare("Why. not. this?", CHOSEN, REJECTED).chosen
    ends = [unit for unit in side.units if unit.is_end]
    assert [unit.position for unit in ends] == side.ends
    assert all(unit.is_answer for unit in ends)
    assert [unit.text for unit in ends][-1].endswith(".")
    specials = [unit for unit in side.units if unit.special]
    assert len(specials) == 4  # <|im_start|> and <|im_end|> of two turns
    assert all(unit.positive is None and unit.safe is None for unit in specials)


def test_firings_are_the_tokens_that_show_a_latent(inspector: RewardInspector):
    found = inspector.compare(PROMPT, CHOSEN, REJECTED)
    dense, units = found.rejected.codes.dense(64), found.rejected.units
    assert any((dense[unit.position] > 0).any() for unit in units if unit.special)  # these are not to be read
    for latent in range(64):
        values = {i: float(dense[unit.position, latent]) for i, unit in enumerate(units) if not unit.special}
        expected = {i: value for i, value in values.items() if value > 0}
        assert found.rejected.firings(latent) == pytest.approx(expected)


def test_a_long_conversation_loses_its_beginning_and_says_so(inspector: RewardInspector):
    found = inspector.compare("The garden was near. " * 60, CHOSEN, REJECTED)
    assert len(found.chosen.text.ids) == len(found.rejected.text.ids) == 192
    assert found.chosen.text.n_cut > 100
    assert "".join(unit.text for unit in found.chosen.units if unit.is_answer) == CHOSEN


def test_attention_sinks_count_nowhere(inspector: RewardInspector, small: Path):
    other = RewardInspector.from_pretrained(small)
    before = other.compare(PROMPT, CHOSEN, REJECTED)
    norms = hidden_norms(other, before.chosen.text.ids)
    largest = max(before.chosen.ends, key=lambda end: norms[end])
    limit = (norms[largest] + sorted(norms[end] for end in before.chosen.ends)[-2]) / 2
    policy = other.sae.config.token_policy.model_copy(update={"sink_norm_multiple": 1.0})
    other.sae.config = other.sae.config.model_copy(update={"token_policy": policy, "median_norm": limit})
    after = other.compare(PROMPT, CHOSEN, REJECTED)
    assert after.chosen.ends == [end for end in before.chosen.ends if end != largest]
    (unit,) = [unit for unit in after.chosen.units if unit.position == largest]
    assert (unit.is_end, unit.positive) == (False, None)


def hidden_norms(inspector: RewardInspector, ids: list[int]) -> list[float]:
    states = inspector.reward_model.model(torch.tensor([ids]), output_hidden_states=True).hidden_states[1][0]
    return states.norm(dim=-1).tolist()


def test_a_prompt_of_several_messages(inspector: RewardInspector):
    turns = [user("Who?"), {"role": "assistant", "content": "A teacher."}, user("Where?")]
    found = inspector.compare(turns, CHOSEN, REJECTED)
    text = "".join(unit.text for unit in found.chosen.units)
    assert text.index("Who?") < text.index("A teacher.") < text.index("Where?") < text.index(CHOSEN)


def test_plain_values(inspector: RewardInspector):
    found = inspector.compare(PROMPT, CHOSEN, REJECTED)
    data = json.loads(json.dumps(found.to_json()))
    assert data["margin"] == pytest.approx(data["chosen"]["reward"] - data["rejected"]["reward"])
    assert data["score_safe"] == pytest.approx(sum(latent["contribution"] for latent in data["latents"]), abs=1e-6)
    assert [token["text"] for token in data["chosen"]["tokens"]] == [unit.text for unit in found.chosen.units]
    assert data["prompt"] == [user(PROMPT)]


# --- what is published --------------------------------------------------------------------------------------------


def test_pairs_are_sorted_and_filtered(inspector: RewardInspector):
    pairs = inspector.pairs()
    assert [pair.score_safe for pair in pairs] == sorted((pair.score_safe for pair in pairs), reverse=True)
    assert len(inspector.pairs("safety")) == 40
    held_out, training = inspector.pairs("chat", True), inspector.pairs("chat", False)
    assert len(held_out) + len(training) == 20
    assert all(pair.held_out and pair.kind == "chat" for pair in held_out)
    with pytest.raises(InputError, match="the kind is 'harm'; use safety or chat"):
        inspector.pairs("harm")


def test_a_pair_by_its_id(inspector: RewardInspector):
    pair = inspector.pair("s0")
    assert pair.texts is not None
    assert pair.texts.prompt == (user(HOSTILE),)
    assert HOSTILE in pair.texts.chosen
    assert pair.margin == pytest.approx(pair.reward_chosen - pair.reward_rejected, abs=1e-6)
    with pytest.raises(InputError, match="has no pair 'nobody'; its ids are like"):
        inspector.pair("nobody")


def test_latents_have_their_explanations_and_strongest_tokens(inspector: RewardInspector):
    found = inspector.compare(PROMPT, CHOSEN, REJECTED)
    rows = inspector.published.latents
    for latent in found.latents:
        assert latent.explanation == EXPLANATION
        assert latent.tokens
        assert (latent.salience, latent.rating) == (rows[latent.latent]["salience"], 5)
        assert latent.low is not None


def test_without_the_gated_part_numbers_remain_and_the_reason_is_said(small: Path, tmp_path: Path):
    other = RewardInspector.from_pretrained(copied(small, tmp_path, "preferences"))
    pair = other.pair("s3")
    assert (pair.texts, pair.why_no_texts) == (None, "this release comes without its preferences.")
    assert pair.score_safe == other.published.scores["s3"]["score_safe"]
    found = other.compare(PROMPT, CHOSEN, REJECTED)
    assert {latent.explanation for latent in found.latents} == {None}
    assert {latent.tokens for latent in found.latents} == {()}
    shutil.copytree(small / "preferences", Path(other.release) / "preferences")
    assert other.pair("s3").texts is not None  # access was given meanwhile


def test_the_public_name():
    assert safesail.RewardInspector is RewardInspector


# --- what is refused ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pair", "message"),
    [
        ((" ", CHOSEN, REJECTED), "the prompt is empty; type what was asked"),
        ((PROMPT, "", REJECTED), "the chosen answer is empty; type a text"),
        ((PROMPT, CHOSEN, "\n "), "the rejected answer is empty; type a text"),
        ((PROMPT, CHOSEN, CHOSEN), "both answers are the same, so that nothing tells them apart"),
    ],
)
def test_what_is_no_pair_is_refused(inspector: RewardInspector, pair: tuple[str, str, str], message: str):
    with pytest.raises(InputError, match=message):
        inspector.compare(*pair)


def test_lone_surrogates_are_replaced(inspector: RewardInspector):
    found = inspector.compare(PROMPT, "a\ud800b.", REJECTED)
    assert "".join(unit.text for unit in found.chosen.units if unit.is_answer) == "a?b."


def test_a_release_without_a_reward_model_is_told_apart(tmp_path: Path):
    saes = tmp_path / "other/saes"
    saes.mkdir(parents=True)
    (saes / "config.json").write_text("{}")
    assert parts_of_release(tmp_path / "other") == PARTS
    (saes / "safesail.json").write_text(json.dumps({"schema": 1, "parts": ["saes", "neurons"]}))
    assert parts_of_release(tmp_path / "other") == ("saes", "neurons")
    with pytest.raises(InputError, match=r"has no reward model; look at it with safesail\.Inspector"):
        RewardInspector.from_pretrained(tmp_path / "other")


def test_the_parts_of_a_release_on_the_hub_are_named_after_it():
    assert part_of_release("org/x", "reward") == "org/x-reward"
    assert part_of_release("org/x-salience", "preferences") == "org/x-preferences"
    assert part_of_release("org/x-poisoned", "saes") == "org/x-saes"


def test_without_safety_latents_there_is_no_score(small: Path, tmp_path: Path):
    folder = copied(small, tmp_path)
    path = folder / "salience/salience/train.parquet"
    table = pq.read_table(path)
    at = table.schema.get_field_index("safety")
    pq.write_table(table.set_column(at, table.schema.field(at), pa.nulls(table.num_rows, pa.string())), path)
    with pytest.raises(InputError, match=r"no latent of .* is marked as a safety latent"):
        RewardInspector.from_pretrained(folder)


def test_a_tokenizer_of_another_release_is_refused(small: Path, tmp_path: Path):
    folder = copied(small, tmp_path)
    manifest = json.loads((folder / "saes/config.json").read_text())
    (folder / "saes/config.json").write_text(json.dumps(manifest | {"tokenizer_hash": "0" * 64}))
    with pytest.raises(InputError, match=r"is not the one that the SAE of .* was trained with"):
        RewardInspector.from_pretrained(folder)


# --- the command line ---------------------------------------------------------------------------------------------


def typed(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["safesail", *arguments])
    try:
        main()
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def test_inspect_compares_two_answers(
    small: Path, inspector: RewardInspector, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    answers = ["inspect", str(small), PROMPT, "--chosen", CHOSEN, "--rejected", REJECTED]
    assert typed(monkeypatch, *answers, "--top", "1") == 0
    out = capsys.readouterr().out
    found = inspector.compare(PROMPT, CHOSEN, REJECTED)
    assert f"score_safe  {found.score_safe:+.4f}" in out
    assert f"margin      {found.margin:+.4f}" in out
    assert " ask a teacher." in out
    assert sum(line.startswith("layers.0/") for line in out.splitlines()) == len(found.latents) + 1
    assert typed(monkeypatch, *answers, "--json") == 0
    assert json.loads(capsys.readouterr().out)["score_safe"] == pytest.approx(found.score_safe, abs=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((), '--chosen "one answer" --rejected "the other"'),
        (("--chosen", "a"), '--chosen "one answer" --rejected "the other"'),
        (("--chosen", "a", "--rejected", "b", "--model", "x"), "leave --model and --answer out"),
    ],
)
def test_inspect_says_what_it_needs(
    small: Path, options: tuple[str, ...], message: str, monkeypatch: pytest.MonkeyPatch, capsys: Any
):
    assert typed(monkeypatch, "inspect", str(small), PROMPT, *options) == 2
    assert message in " ".join(capsys.readouterr().err.split())


def test_answers_are_for_a_reward_model_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    (tmp_path / "saes").mkdir()
    (tmp_path / "saes/config.json").write_text("{}")
    assert typed(monkeypatch, "inspect", str(tmp_path), PROMPT, "--chosen", "a", "--rejected", "b") == 2
    assert "has no reward model to compare answers with" in " ".join(capsys.readouterr().err.split())
