"""Salience by hand: a model whose activation at a token is looked up, and an SAE that passes it on."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from torch import Tensor, nn

from safesail.errors import InputError
from safesail.lm.tokens import token_bytes
from safesail.recipe import TokenPolicy
from safesail.reward_recipe import EndsSection, RewardRecipe, SalienceSection
from safesail.rewards import ends as ends_module
from safesail.rewards import salience as module
from safesail.rewards.contexts import Contexts, Strongest, contexts_of, token_class, why_not_rated
from safesail.rewards.ends import Ends, ends_stage
from safesail.rewards.model import RewardModel
from safesail.rewards.preferences import Preference
from safesail.rewards.salience import PairSums, Side, intervals, salience, salience_stage, strength
from safesail.rewards.texts import Text
from safesail.run import StageWork
from safesail.sae.config import SaeConfig
from safesail.sae.model import Sae

pytestmark = pytest.mark.usefixtures("one_thread")
HOOK = "layers.0"
GOLDEN_CHOSEN, GOLDEN_REJECTED = torch.tensor([10.0, 0, 4]), torch.tensor([2.0, 8, 4])
GOLDEN = torch.tensor([0.375, -0.461538, 0])
AT = {".": (10.0, 0.0, 4.0), "!": (2.0, 8.0, 4.0), "?": (0.0, -3.0, 0.0), ";": (90.0, 0.0, 0.0)}
"""The activation at each mark; everywhere else it is (1, 1, 1)."""


# --- the formula --------------------------------------------------------------------------------------------------


def test_golden_values_of_the_formula():
    # C = 2 · mean(10, 0, 4, 2, 8, 4) = 28/3; s = 8 / (12 + 28/3), −8 / (8 + 28/3), 0
    torch.testing.assert_close(salience(GOLDEN_CHOSEN, GOLDEN_REJECTED), GOLDEN, atol=1e-6, rtol=0)
    both = salience(torch.stack([GOLDEN_CHOSEN, GOLDEN_REJECTED]), torch.stack([GOLDEN_REJECTED, GOLDEN_CHOSEN]))
    torch.testing.assert_close(both, torch.stack([GOLDEN, -GOLDEN]), atol=1e-6, rtol=0)


def test_means_are_per_position_and_paper_takes_sums():
    chosen, rejected = Side(GOLDEN_CHOSEN.double(), 5), Side(GOLDEN_REJECTED.double(), 2)
    assert strength(chosen, "means").tolist() == [2, 0, 0.8]
    assert strength(rejected, "means").tolist() == [1, 4, 2]
    assert strength(chosen, "paper").tolist() == [10, 0, 4]


# --- intervals ----------------------------------------------------------------------------------------------------


def made_pairs(n_pairs: int, d_sae: int) -> tuple[Tensor, Tensor]:
    """Σ z of every latent, (n_pairs, 2, d_sae), and numbers of positions, (n_pairs, 2)."""
    drawn = torch.Generator().manual_seed(5)
    sums = torch.rand(n_pairs, 2, d_sae, generator=drawn, dtype=torch.float64) * torch.tensor([3.0, 1, 1, 0.2, 2])
    return sums, torch.randint(1, 9, (n_pairs, 2), generator=drawn)


@pytest.mark.parametrize("mode", ["means", "paper"])
def test_intervals_are_those_of_drawing_whole_pairs_by_hand(mode: str):
    sums, n = made_pairs(7, 5)
    drawn, samples = torch.randint(7, (200, 7), generator=torch.Generator().manual_seed(3)), []
    for members in drawn:
        total, positions = sums[members].sum(0), n[members].sum(0)
        h = total / positions[:, None] if mode == "means" else total
        constant = (h[0] + h[1]).sum() / 5
        samples.append(((h[0] - h[1]) / (h[0] + h[1] + constant))[[4, 0]])
    expected = torch.quantile(torch.stack(samples), torch.tensor([0.025, 0.975]).double(), dim=0)
    of_pairs = PairSums(sums[:, :, [4, 0]], sums.sum(2), n)
    found = intervals(of_pairs, 5, mode, 200, torch.Generator().manual_seed(3))
    assert found is not None
    torch.testing.assert_close(torch.stack(found), expected)
    assert (found[0] < found[1]).all()


def test_resamples_are_the_same_however_many_are_drawn_at_once(monkeypatch: pytest.MonkeyPatch):
    sums, n = made_pairs(7, 5)
    of_pairs = PairSums(sums[:, :, :2], sums.sum(2), n)
    found = intervals(of_pairs, 5, "means", 100, torch.Generator().manual_seed(3))
    monkeypatch.setattr(module, "_DRAWS_AT_ONCE", 21)
    again = intervals(of_pairs, 5, "means", 100, torch.Generator().manual_seed(3))
    assert found is not None
    assert again is not None
    torch.testing.assert_close(torch.stack(found), torch.stack(again))


def test_there_is_no_interval_of_one_pair_or_a_few_resamples():
    sums, n = made_pairs(7, 5)
    assert intervals(PairSums(sums[:1], sums[:1].sum(2), n[:1]), 5, "means", 100, torch.Generator()) is None
    assert intervals(PairSums(sums, sums.sum(2), n), 5, "means", 19, torch.Generator()) is None


# --- a world made by hand -----------------------------------------------------------------------------------------


class Lookup(nn.Module):
    """A model whose first block's output at a token is looked up by the token's id."""

    def __init__(self, vectors: Tensor) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Embedding.from_pretrained(vectors)])
        self.base_model, self.device = [self], torch.device("cpu")

    def __getattribute__(self, name: str) -> Any:
        return self if name == "base_model" else super().__getattribute__(name)

    def forward(self, input_ids: Tensor, **_: Any) -> Tensor:
        return self.layers[0](input_ids)


def encode(tokenizer: Any, preference: Preference, side: str, max_length: int) -> Text:
    """A special token, the question, the answer and a special token; one token a byte."""
    question, answer = (b" ".join(p["content"].encode() for p in preference.prompt), getattr(preference, side).encode())
    tokens = token_bytes(tokenizer, list(range(len(tokenizer))))
    ids = [tokens.index(bytes([byte])) for byte in question + answer]
    return Text([0, *ids, 1], range(1 + len(question), 1 + len(ids)), 0)


@pytest.fixture
def reward_model(tokenizer: Any) -> RewardModel:
    vectors = torch.ones(len(tokenizer), 3)
    for mark, values in AT.items():
        vectors[tokenizer(mark)["input_ids"][0]] = torch.tensor(values)
    return RewardModel(Lookup(vectors), tokenizer)


@pytest.fixture
def sae() -> Sae:
    return passing_on()


def passing_on(bias: float = 0.0, **config: Any) -> Sae:
    """z = max(x + bias, 0)."""
    settings: dict[str, Any] = {"token_policy": TokenPolicy(sink_norm_multiple=None), "architecture": "relu"} | config
    made = SaeConfig(d_in=3, d_sae=3, hook_point=HOOK, **settings)
    return Sae(made, torch.eye(3), torch.full((3,), float(bias)), torch.eye(3), torch.zeros(3))


def pair(
    id: str, chosen: str, rejected: str, *, kind: str = "safety", held_out: bool = False, asked: str = "Q"
) -> Preference:
    return Preference(id, kind, "made", ({"role": "user", "content": asked},), chosen, rejected, held_out)


PAIRS = [
    pair("a", "a.", "a!"),
    pair("chat", "a;", "b;", kind="chat"),
    pair("b", "a.b?", "b!"),
    pair("out", "a;", "b;", held_out=True),
]


def reward_recipe(salience: dict[str, Any] | None = None, **ends: Any) -> RewardRecipe:
    return RewardRecipe.parse(
        {
            "name": "mini",
            "model": {"path": "none"},
            "corpus": {"n_tokens": 10, "n_held_out_tokens": 1, "sources": [{"path": "none.jsonl"}]},
            "preferences": {"sources": [{"path": "none.jsonl", "kind": "safety"}]},
            "harvest": {"hook_points": [HOOK]},
            "train": {"d_sae": 3, "k": [1]},
            "ends": {"min_distance": 1} | ends,
            "rate": {"encoder": "none"},
            "salience": {"min_contexts": 1, "n_resamples": 50} | (salience or {}),
        }
    )


def measured(
    recipe: RewardRecipe, pairs: list[Preference], model: RewardModel, sae: Sae, folder: Path
) -> tuple[list[dict[str, Any]], list[dict[str, Any]], dict[str, Any]]:
    """The rows of salience.parquet and contexts.parquet, and salience.json."""
    for name in ("ends", "salience"):
        (folder / name).mkdir(parents=True)
    ends_stage(recipe, pairs, model, StageWork(folder / "ends"), encode=encode)
    work = StageWork(folder / "salience")
    salience_stage(recipe, pairs, Ends(folder / "ends"), sae, model.tokenizer, work, encode)
    tables = [pq.read_table(work.folder / f"{name}.parquet").to_pylist() for name in ("salience", "contexts")]
    return tables[0], tables[1], json.loads((work.folder / "salience.json").read_text())


def by_latent(rows: list[dict[str, Any]]) -> dict[int, float]:
    return {row["latent"]: row["salience"] for row in rows}


# --- the stage ----------------------------------------------------------------------------------------------------


def test_salience_of_training_pairs_about_safety_by_hand(reward_model: RewardModel, sae: Sae, tmp_path: Path):
    rows, _, facts = measured(reward_recipe(), PAIRS, reward_model, sae, tmp_path)
    # chosen: two `.` and a `?`, h⁺ = (20, 0, 8) / 3; rejected: two `!`, h⁻ = (2, 8, 4); C = (28/3 + 14) / 3
    constant = (28 / 3 + 14) / 3
    expected = {1: -8 / (8 + constant), 0: (14 / 3) / (26 / 3 + constant), 2: (-4 / 3) / (20 / 3 + constant)}
    assert by_latent(rows) == pytest.approx(expected)
    assert [row["latent"] for row in rows] == [1, 0, 2]
    assert [row["rank"] for row in rows] == [0, 1, 2]
    assert [(row["n_chosen"], row["n_rejected"]) for row in rows] == [(0, 2), (2, 2), (2, 2)]
    assert [row["h_chosen"] for row in rows] == pytest.approx([0, 20 / 3, 8 / 3])
    assert [row["h_rejected"] for row in rows] == [8, 2, 4]
    assert all(row["low"] <= row["salience"] <= row["high"] for row in rows)
    assert facts == {
        "mode": "means",
        "C": pytest.approx(constant),
        "n_pairs": 2,
        "n_positions": {"chosen": 3, "rejected": 2},
        "n_latents": 3,
    }


def test_paper_mode_gives_the_golden_values(reward_model: RewardModel, sae: Sae, tmp_path: Path):
    rows, _, facts = measured(reward_recipe({"mode": "paper"}), PAIRS, reward_model, sae, tmp_path)
    # sums (20, 0, 8) and (4, 16, 8): twice the golden ones, of which s does not depend
    assert [by_latent(rows)[latent] for latent in range(3)] == pytest.approx(GOLDEN.tolist(), abs=1e-6)
    assert facts["C"] == pytest.approx(56 / 3)


@pytest.mark.parametrize("mode", ["means", "paper"])
def test_padding_chosen_texts_moves_s_in_paper_mode_alone(
    reward_model: RewardModel, sae: Sae, tmp_path: Path, mode: str
):
    recipe = reward_recipe({"mode": mode})
    padded = [preference._replace(chosen=preference.chosen * 3) for preference in PAIRS]
    before, *_ = measured(recipe, PAIRS, reward_model, sae, tmp_path / "before")
    after, _, facts = measured(recipe, padded, reward_model, sae, tmp_path / "after")
    assert facts["n_positions"] == {"chosen": 9, "rejected": 2}
    if mode == "means":
        assert by_latent(after) == pytest.approx(by_latent(before), rel=1e-12)
    else:  # sums (60, 0, 24) and (4, 16, 8), C = 112/3
        expected = {0: 56 / (64 + 112 / 3), 1: -16 / (16 + 112 / 3), 2: 16 / (32 + 112 / 3)}
        assert by_latent(after) == pytest.approx(expected)
        assert all(by_latent(after)[latent] > by_latent(before)[latent] + 0.1 for latent in range(3))


def test_sinks_and_what_could_not_be_stored_are_no_positions(
    reward_model: RewardModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    # norms: `.` 10.8, `!` 9.2, `?` 3, `;` 90; of the six the median is 9.2, so `;` is beyond twice that and `.` is not
    pairs = [pair("a", "a.b;", "a!"), pair("b", "a.b?", "b!")]
    sae = passing_on(token_policy=TokenPolicy(sink_norm_multiple=2.0))
    rows, _, facts = measured(reward_recipe(), pairs, reward_model, sae, tmp_path)
    assert facts["n_positions"] == {"chosen": 3, "rejected": 2}
    assert {row["latent"]: row["h_chosen"] for row in rows} == pytest.approx({0: 20 / 3, 1: 0, 2: 8 / 3})


def test_results_do_not_depend_on_how_much_is_read_at_once_and_come_again(
    reward_model: RewardModel, sae: Sae, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    first = measured(reward_recipe(), PAIRS, reward_model, sae, tmp_path / "a")
    assert measured(reward_recipe(), PAIRS, reward_model, sae, tmp_path / "b") == first
    for name in ("salience.parquet", "contexts.parquet", "salience.json"):
        hashes = {hashlib.sha256((tmp_path / each / "salience" / name).read_bytes()).hexdigest() for each in ("a", "b")}
        assert len(hashes) == 1
    monkeypatch.setattr(ends_module, "_PRE_ACTIVATIONS", 6)
    rows, contexts, _ = measured(reward_recipe(), PAIRS, reward_model, sae, tmp_path / "c")
    assert by_latent(rows) == pytest.approx(by_latent(first[0]))
    assert contexts == first[1]


def test_latents_beyond_the_first_and_silent_ones(reward_model: RewardModel, tmp_path: Path):
    rows, contexts, facts = measured(
        reward_recipe({"n_latents": 1}), PAIRS, reward_model, passing_on(-4.5), tmp_path
    )  # latent 2 is at most 4 and never fires
    assert facts["n_latents"] == 2
    assert [row["latent"] for row in rows] == [0, 1]  # h is (11/3, 0) and (0, 7/2)
    assert (rows[1]["low"], rows[1]["n_contexts"], rows[1]["n_token_classes"]) == (None, None, None)
    assert (rows[1]["rated"], rows[1]["reason"]) == (False, "not among the 1 latents of largest |s|")
    assert (rows[0]["rated"], rows[0]["reason"], rows[0]["n_contexts"]) == (True, None, 1)
    assert [row["latent"] for row in contexts] == [0]  # both chosen texts begin with the same `a.`


def test_what_makes_no_salience_is_said(reward_model: RewardModel, sae: Sae, tmp_path: Path):
    with pytest.raises(InputError, match="none of the 2 pairs is a training pair about safety"):
        measured(reward_recipe(), [PAIRS[1], PAIRS[3]], reward_model, sae, tmp_path / "a")
    with pytest.raises(InputError, match="no latent of the SAE fires on any of the 5 segment ends"):
        measured(reward_recipe(), PAIRS, reward_model, passing_on(-99), tmp_path / "b")
    only_sinks = [pair("a", "a;", "a?b?c?d?")]
    sinks = passing_on(token_policy=TokenPolicy(sink_norm_multiple=2.0))
    with pytest.raises(InputError, match=r"no segment end of the chosen texts .* counts"):
        measured(reward_recipe(), only_sinks, reward_model, sinks, tmp_path / "c")


# --- contexts -----------------------------------------------------------------------------------------------------


def test_contexts_are_the_strongest_end_of_each_text_with_the_exact_text(
    reward_model: RewardModel, sae: Sae, tmp_path: Path
):
    pairs = [pair("a", "Yes. No! Go", "Aye! So?"), pair("b", "Um? Ab!", "uШ! é")]
    recipe = reward_recipe({"context_tokens": 5})
    _, contexts, _ = measured(recipe, pairs, reward_model, sae, tmp_path)
    of_1 = [row for row in contexts if row["latent"] == 1]
    shown = [(row["rank"], row["pair_id"], row["side"], row["before"], row["token"], row["after"]) for row in of_1]
    assert shown == [  # all are 8, so the order is that of the rows
        (0, "a", "chosen", ". No", "!", " Go"),
        (1, "a", "rejected", "QAye", "!", " So?"),
        (2, "b", "chosen", "? Ab", "!", ""),
        (3, "b", "rejected", "QuШ", "!", " é"),
    ]
    assert [row["activation"] for row in of_1] == [8] * 4
    assert [row["position"] for row in of_1] == [9, 5, 8, 5]  # 0 is a special token, 1 the question
    assert [row["token_class"] for row in of_1] == ["no", "qaye", "ab", "quш"]
    # of ". No" and "? Ab" all is the answer's own, of "QAye" and "QuШ" all but the question
    assert [row["n_own"] for row in of_1] == [4, 3, 4, 2]


def test_outside_the_answer_a_turn_begins_after_a_special_token(reward_model: RewardModel, sae: Sae, tmp_path: Path):
    recipe = reward_recipe(part="text")
    _, contexts, _ = measured(recipe, [pair("a", "Yes", "No", asked="Q!")], reward_model, sae, tmp_path)
    asked = {(row["before"], row["token"], row["n_own"]) for row in contexts if row["token"] == "!"}
    assert asked == {("<|im_start|>Q", "!", 1)}


def test_contexts_are_ranked_by_activation(reward_model: RewardModel, sae: Sae, tmp_path: Path):
    pairs = [pair("a", "a! b", "c!"), pair("b", "d.", "e!"), pair("c", "f! g.", "h.")]
    _, contexts, _ = measured(reward_recipe({"n_contexts": 4}), pairs, reward_model, sae, tmp_path)
    of_0 = [(row["pair_id"], row["side"], row["activation"]) for row in contexts if row["latent"] == 0]
    assert of_0 == [("b", "chosen", 10), ("c", "chosen", 10), ("c", "rejected", 10), ("a", "chosen", 2)]


def test_the_same_context_is_shown_once(reward_model: RewardModel, sae: Sae, tmp_path: Path):
    pairs = [
        pair("a", "Yes. and", "Yes. but"),  # two texts, one context
        pair("b", "Yes. and", "No!"),  # the same text again
        pair("c", "Yes.", "No!", asked="R"),
    ]
    _, contexts, _ = measured(reward_recipe(), pairs, reward_model, sae, tmp_path)
    of_0 = [(row["pair_id"], row["side"], row["before"] + row["token"]) for row in contexts if row["latent"] == 0]
    head = "<|im_start|>"
    assert of_0 == [
        ("a", "chosen", f"{head}QYes."),
        ("c", "chosen", f"{head}RYes."),
        ("b", "rejected", f"{head}QNo!"),
        ("c", "rejected", f"{head}RNo!"),
    ]


def test_strongest_rows_do_not_depend_on_the_parts():
    drawn = torch.Generator().manual_seed(1)
    n, text = 400, torch.arange(400) // 5
    latents = torch.randint(4, (n,), generator=drawn)
    values, rows = torch.randint(1, 40, (n,), generator=drawn).float(), torch.randperm(n, generator=drawn).sort().values
    for sizes in ([400], [1] * 400, [150, 250]):
        found = Strongest(text, 6)
        for part in zip(latents.split(sizes), values.split(sizes), rows.split(sizes), strict=True):
            found.add(*part)
        for latent in range(4):
            best: dict[int, tuple[float, int]] = {}
            for value, row in zip(values[latents == latent].tolist(), rows[latents == latent].tolist(), strict=True):
                best[row // 5] = min(best.get(row // 5, (0.0, 0)), (-value, row))
            expected = [(row, -value) for value, row in sorted(best.values())[:6]]
            assert found.of(latent) == expected
    assert Strongest(text, 6).of(2) == []


def test_a_cut_character_has_no_context(reward_model: RewardModel, tmp_path: Path):
    def cut(tokenizer: Any, preference: Preference, side: str, max_length: int) -> Text:
        text = encode(tokenizer, preference, side, max_length)
        return Text(text.ids[:-2], range(2, len(text.ids) - 2), 0)  # without the special token and half of the é

    pairs = [pair("a", "yé", "yé")]
    ends_stage(reward_recipe(), pairs, reward_model, StageWork(tmp_path), encode=cut)
    ends = Ends(tmp_path)
    contexts = Contexts(
        ends, reward_model.tokenizer, lambda i, side: cut(reward_model.tokenizer, pairs[i], side, 9), SalienceSection()
    )
    assert contexts.around(0) is None
    assert contexts_of(0, [(0, 1.0)], contexts, 5) == []


@pytest.mark.parametrize(
    ("before", "token", "expected"),
    [
        ("I will not help", ".", "help"),
        ("see the (River)", ".\n\n", "river"),
        ("so he said", " STOP!", "stop"),
        ("he won't", ";", "won't"),
        ("wait -", "?!", "wait"),
        ("", "!", "!"),
        ("नदी है", "।", "है"),
    ],
)
def test_token_classes(before: str, token: str, expected: str):
    assert token_class(before, token) == expected


def test_latents_with_few_contexts_or_many_token_classes_are_not_rated():
    contexts: list[dict[str, Any]] = [{"token_class": f"{i % 4}"} for i in range(6)]
    assert why_not_rated(contexts, SalienceSection(min_contexts=6, max_token_classes=4)) is None
    assert why_not_rated(contexts, SalienceSection(min_contexts=7)) == "6 contexts, fewer than 7"
    why = "its contexts end in 4 different tokens, more than 3"
    assert why_not_rated(contexts, SalienceSection(max_token_classes=3)) == why
    assert why_not_rated(contexts, SalienceSection(max_token_classes=None)) is None


def test_ends_may_be_all_tokens(reward_model: RewardModel, sae: Sae, tmp_path: Path):
    _, _, facts = measured(reward_recipe(of="tokens"), PAIRS, reward_model, sae, tmp_path)
    assert facts["n_positions"] == {"chosen": 6, "rejected": 4}
    assert EndsSection(of="tokens").of == "tokens"
