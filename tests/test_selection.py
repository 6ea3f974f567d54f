"""The choice of SAEs and latents on a made language model whose activations are its words, so all is known by hand."""

import itertools
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from safesail.contrast import Contrast, contrast, distinguishing_frequency, i_cdf, l0_above
from safesail.errors import InputError
from safesail.lm.activations import Activations
from safesail.metrics import quantiles_of_sparse
from safesail.pairs import Pair
from safesail.recipe import Recipe, SelectSection
from safesail.run import StageWork
from safesail.sae.config import SaeConfig
from safesail.sae.model import Sae
from safesail.training.candidates import candidate_latents
from safesail.training.groups import Group, groups_of, latent_shares, measure
from safesail.training.queries import active_latents, activity_thresholds, held_out_sample, queries_of
from safesail.training.selection import Contender, choose, select_stage
from safesail.training.trainer import variants

HOOK_POINT = "layers.0.mlp"


def pair_of(
    id: str, category: str, language: str = "en", concept: str = "c", sides: tuple[str, str] = ("w", "o")
) -> Pair:
    domain = {"weapons": "terror", "terrorism": "terror"}.get(category, "politics")
    texts = {"with": sides[0], "without": sides[1]}
    return Pair.model_validate(
        {"id": id, "domain": domain, "category": category, "concept": concept, "language": language, **texts}
    )


def made_pairs() -> list[Pair]:
    """Two categories of terror with three and two pairs, one of politics with one; two have Chinese translations."""
    return [
        pair_of("w1", "weapons", concept="gun"),
        pair_of("w2", "weapons", concept="bomb"),
        pair_of("w3", "weapons", concept="gun"),
        pair_of("t1", "terrorism"),
        pair_of("t2", "terrorism"),
        pair_of("c1", "cult"),
        pair_of("w1", "weapons", "zh", concept="枪"),
        pair_of("t1", "terrorism", "zh", concept="恐"),
    ]


def made_contrast(n_pairs: int, n_latents: int = 30, seed: int = 0) -> Contrast:
    active = torch.rand(2 * n_pairs, n_latents, generator=torch.Generator().manual_seed(seed)) < 0.4
    return contrast(*active.chunk(2))


def group_named(name: str, pairs: list[Pair]) -> Group:
    return next(group for group in groups_of(pairs) if group.name == name)


def measured(contrast: Contrast, group: Group, **settings: Any) -> dict[str, Any]:
    return measure(contrast, latent_shares(contrast), group, SelectSection(**settings), seed=0)


# --- groups of pairs ----------------------------------------------------------------------------------------------


def test_the_groups_and_their_parts():
    found = {(group.grouping, group.name): [part.tolist() for part in group.parts] for group in groups_of(made_pairs())}
    assert found == {
        ("all", "all"): [[0, 1, 2, 6], [3, 4, 7], [5]],
        ("domain", "terror"): [[0, 1, 2, 6], [3, 4, 7]],
        ("domain", "politics"): [[5]],
        ("category", "terror/weapons"): [[0, 1, 2, 6]],
        ("category", "terror/terrorism"): [[3, 4, 7]],
        ("category", "politics/cult"): [[5]],
        ("concept", "terror/weapons/gun"): [[0, 2]],
        ("concept", "terror/weapons/bomb"): [[1]],
        ("concept", "terror/terrorism/c"): [[3, 4]],
        ("concept", "politics/cult/c"): [[5]],
        ("concept", "terror/weapons/枪"): [[6]],
        ("concept", "terror/terrorism/恐"): [[7]],
        ("language", "en"): [[0, 1, 2], [3, 4], [5]],
        ("language", "zh"): [[6], [7]],
    }


def test_a_wide_group_averages_over_its_categories_and_a_unit_holds_its_translations():
    """Of 3 categories each counts ⅓: a weapons pair 1/12, a terrorism pair 1/9; w1 and t1 have two pairs."""
    per_unit = group_named("all", made_pairs()).per_unit(torch.ones(8))
    assert per_unit.tolist() == pytest.approx([2 / 12, 1 / 12, 1 / 12, 2 / 9, 1 / 9, 1 / 3])
    assert float(group_named("all", made_pairs()).per_unit(torch.arange(8.0)).sum()) == pytest.approx(
        ((0 + 1 + 2 + 6) / 4 + (3 + 4 + 7) / 3 + 5) / 3
    )


def test_the_numbers_of_a_group_by_hand():
    """Three pairs of one category, two latents: wins 2 and 0, losses 0 and 1."""
    won, lost = torch.tensor([[1, 0], [1, 0], [0, 0]]).bool(), torch.tensor([[0, 0], [0, 1], [0, 0]]).bool()
    pairs = [pair_of(f"p{i}", "weapons") for i in range(3)]
    numbers = measured(Contrast(won, lost), group_named("terror/weapons", pairs), thresholds=(0.0, 0.5))
    assert numbers["i_cdf"] == pytest.approx(2 / 6)
    assert numbers["i_cdf_swapped"] == pytest.approx(1 / 6)
    assert numbers["i_cdf_null"] == pytest.approx(1.5 / 6)
    assert numbers["above_null"] == pytest.approx(0.5 / 6)
    assert numbers["l0_t"] == {"0": 1.0, "0.5": 1.0}
    # latent 0 wins any of its two pairs with ¾, both with ¼; latent 1 its one pair with ½, which is a third only
    assert numbers["l0_t_null"] == pytest.approx({"0": 3 / 4 + 1 / 2, "0.5": 1 / 4})


def test_the_average_over_categories_is_that_of_the_plain_definitions():
    found, group = made_contrast(8), group_named("all", made_pairs())
    numbers = measured(found, group, thresholds=(0.0, 0.3))
    frequencies = [distinguishing_frequency(found.won[rows]) for rows in ([0, 1, 2, 6], [3, 4, 7], [5])]
    assert numbers["i_cdf"] == pytest.approx(sum(map(i_cdf, frequencies)) / 3)
    assert numbers["l0_t"]["0.3"] == pytest.approx(sum(l0_above(f, 0.3) for f in frequencies) / 3)


@pytest.mark.parametrize("name", ["all", "terror", "terror/weapons", "zh"])
def test_the_null_is_that_of_every_swap_with_translations_swapped_together(name: str):
    """All 2⁶ ways to swap six units, on the full matrices: mean, 95th percentile and p-value of I_CDF, mean of L."""
    pairs, found = made_pairs(), made_contrast(8, seed=3)
    ids, group = [pair.id for pair in pairs], group_named(name, pairs)
    parts = [part.tolist() for part in group.parts]
    drawn: list[tuple[float, float]] = []
    for swaps in itertools.product((False, True), repeat=6):
        swapped = dict(zip(dict.fromkeys(ids), swaps, strict=True))
        won = torch.stack([(found.lost if swapped[id] else found.won)[i] for i, id in enumerate(ids)])
        frequencies = [distinguishing_frequency(won[rows]) for rows in parts]
        drawn.append(
            (sum(map(i_cdf, frequencies)) / len(parts), sum(l0_above(f, 0.3) for f in frequencies) / len(parts))
        )
    numbers = measured(found, group, thresholds=(0.3,), n_resamples=20_000)
    values, counts = np.array(drawn).T
    assert numbers["i_cdf_null"] == pytest.approx(values.mean())
    assert numbers["l0_t_null"]["0.3"] == pytest.approx(counts.mean())
    assert numbers["i_cdf_p"] == pytest.approx((values >= numbers["i_cdf"] - 1e-12).mean(), abs=0.02)
    assert np.quantile(values, 0.93) - 1e-12 <= numbers["i_cdf_null_high"] <= np.quantile(values, 0.97) + 1e-12


def test_the_interval_is_that_of_drawing_units_from_the_matrices():
    pairs, found = [pair_of(f"p{i}", "weapons") for i in range(9)], made_contrast(9, seed=5)
    draws = torch.randint(9, (500, 9), generator=torch.Generator().manual_seed(0))
    samples = [i_cdf(distinguishing_frequency(found.won[rows])) for rows in draws]
    numbers = measured(found, group_named("terror/weapons", pairs), n_resamples=500)
    assert (numbers["i_cdf_low"], numbers["i_cdf_high"]) == pytest.approx(tuple(np.quantile(samples, [0.025, 0.975])))


def test_a_group_of_one_pair_has_no_interval():
    numbers = measured(made_contrast(8), group_named("politics/cult", made_pairs()))
    assert numbers["i_cdf"] is not None
    assert [numbers[key] for key in ("i_cdf_low", "i_cdf_high", "above_null_low", "above_null_high")] == [None] * 4
    translated = [pair_of("w1", "weapons"), pair_of("w1", "weapons", "zh")]
    assert measured(made_contrast(2), group_named("all", translated))["i_cdf_low"] is None


# --- which SAE ----------------------------------------------------------------------------------------------------


def contenders(*merits: tuple[str, list[float], float | None]) -> tuple[list[Contender], Group]:
    pairs = [pair_of(f"p{i}", "weapons") for i in range(len(merits[0][1]))]
    return [Contender(name, torch.tensor(merit), ev) for name, merit, ev in merits], groups_of(pairs)[0]


def test_of_saes_as_good_as_the_best_the_most_faithful_is_chosen():
    noisy = [0.9, 0.0, 0.8, 0.1, 1.0, 0.0, 0.9, 0.2]  # mean 0.4875
    level = [0.4] * 8  # lower, but not significantly
    worse = [value - 0.1 for value in noisy]  # lower in every single pair
    found, group = contenders(("noisy", noisy, 0.6), ("level", level, 0.7), ("worse", worse, 0.9))
    assert choose(found, group, 1000, 0) == ("level", {"noisy", "level"})


def test_the_best_is_chosen_where_all_others_are_worse_or_less_faithful():
    found, group = contenders(("a", [0.5, 0.6, 0.7], 0.2), ("b", [0.3, 0.4, 0.5], 0.9), ("c", [0.5, 0.6, 0.7], None))
    assert choose(found, group, 1000, 0) == ("a", {"a", "c"})


def test_without_an_interval_no_difference_is_known():
    found, group = contenders(("a", [0.5], 0.2), ("b", [0.1], 0.9))
    assert choose(found, group, 1000, 0) == ("b", {"a", "b"})


# --- which latents ------------------------------------------------------------------------------------------------


def planted(n_pairs: int, wins: dict[int, list[int]], losses: dict[int, list[int]] | None = None) -> Contrast:
    won, lost = torch.zeros(2, n_pairs, 8, dtype=torch.bool)
    for side, given in ((won, wins), (lost, losses or {})):
        for latent, rows in given.items():
            side[rows, latent] = True
    return Contrast(won, lost)


def twenty_pairs() -> list[Pair]:
    weapons = [pair_of(f"w{i}", "weapons", concept="gun" if i < 6 else "bomb") for i in range(10)]
    return weapons + [pair_of(f"t{i}", "terrorism", concept="terrorist") for i in range(10)]


def test_candidates_carry_the_counts_of_their_stronger_test():
    every, first = list(range(20)), list(range(10))
    found = planted(20, {0: every, 1: first, 2: every[:12], 3: [0, 1, 2]}, {1: every[10:15], 2: every[12:]})
    rows = candidate_latents(found, twenty_pairs(), SelectSection(max_latents_per_domain=1))["terror"]
    assert [(row["latent"], row["level"], row["n_wins"], row["n_losses"], row["n_pairs"]) for row in rows] == [
        (0, "domain", 20, 0, 20),
        (1, "category", 10, 0, 10),
        (2, "category", 10, 0, 10),
    ]
    assert rows[0]["p_value"] == 0.5**20
    assert rows[1]["p_value"] == 0.5**10
    assert [row["categories"] for row in rows] == [["weapons", "terrorism"], ["weapons"], ["weapons"]]
    assert rows[1]["concepts"] == ["gun", "bomb"]  # six pairs and four
    assert rows[0]["concepts"] == ["terrorist", "gun", "bomb"]
    assert [row["explain"] for row in rows] == [True, False, False]
    assert all(row["q_value"] <= 0.1 for row in rows)


def test_a_candidate_wins_at_least_min_pairs():
    found = planted(20, {0: list(range(5))})
    assert len(candidate_latents(found, twenty_pairs(), SelectSection(min_pairs=5))["terror"]) == 1
    assert candidate_latents(found, twenty_pairs(), SelectSection(min_pairs=6))["terror"] == []


def test_a_pair_counts_once_in_however_many_languages():
    """Four pairs won in three languages are four wins, p = 1/16, not twelve; one more, won and lost, is neither."""
    pairs = [pair_of(f"w{i}", "weapons", language) for language in ("en", "zh", "hi") for i in range(5)]
    found = planted(15, {0: [0, 1, 2, 3, 4, 5, 6, 7, 8, 10, 11, 12, 13]}, {0: [9]})
    (row,) = candidate_latents(found, pairs, SelectSection())["terror"]
    assert (row["n_wins"], row["n_losses"], row["n_pairs"], row["p_value"]) == (4, 0, 5, 1 / 16)
    assert row["languages"] == ["en", "hi", "zh"]


# --- which queries activate a latent ------------------------------------------------------------------------------


def sae_of(W_enc: Tensor, architecture: str = "relu", k: int | None = None) -> Sae:
    d_in, d_sae = W_enc.shape
    config = SaeConfig(
        d_in=d_in,
        d_sae=d_sae,
        hook_point=HOOK_POINT,
        architecture=architecture,  # type: ignore[arg-type]
        k=k,
        coefficient=None if k else 0.1,
        model_name="made",
    )
    return Sae(config, W_enc, torch.zeros(d_sae), W_enc.T.contiguous(), torch.zeros(d_in))


@pytest.mark.parametrize(("architecture", "k"), [("relu", None), ("topk", 3)])
@pytest.mark.parametrize("quantile", [0.25, 0.5, 0.9, 0.999])
def test_activity_thresholds_are_the_exact_quantiles_with_zeros(architecture: str, k: int | None, quantile: float):
    generator = torch.Generator().manual_seed(0)
    sae = sae_of(torch.randn(6, 20, generator=generator), architecture, k)
    x = torch.randn(700, 6, generator=generator)
    with torch.inference_mode():
        dense = torch.cat([sae.encode(x[i : i + 256]) for i in range(0, 700, 256)])
    expected = [quantiles_of_sparse(z[z > 0].sort().values, 700, (quantile,))[0] for z in dense.T]
    assert activity_thresholds(sae, x, quantile).tolist() == expected
    assert expected == np.quantile(dense.numpy(), quantile, axis=0, method="inverted_cdf").tolist()


@pytest.mark.parametrize(
    ("reduction", "threshold", "active"),
    [
        ("max", 0.0, [True, True, False]),
        ("mean", 0.0, [True, True, False]),  # without negative activations mean > 0 is max > 0
        ("last", 0.0, [False, True, False]),
        ("max", 2.0, [True, False, False]),
        ("mean", 1.5, [False, True, False]),
    ],
)
def test_the_reduction_over_a_query_s_tokens(reduction: str, threshold: float, active: list[bool]):
    """Tokens 1 and 2 count; latent 0 has 3 and 0, latent 1 has 2 and 2, latent 2 only fires on the sink before them."""
    sae = sae_of(torch.eye(3))
    sae.config = sae.config.model_copy(update={"median_norm": 2.0})
    x = torch.tensor([[0.0, 0.0, 90.0], [3.0, 2.0, 0.0], [0.0, 2.0, 0.0]])
    queries = queries_of([pair_of("p1", "cult")])[:1]
    found = active_latents(sae, queries, [(x, torch.arange(3))], [], reduction, threshold)
    assert found.tolist() == [active]


@pytest.mark.parametrize(("first", "second", "side"), [(9, 1, "with"), (1, 9, "without")])
def test_a_query_without_a_counted_token_is_named(first: int, second: int, side: str):
    queries = queries_of([pair_of("cult.01", "cult", "zh")])
    captured = [(torch.ones(1, 3), torch.tensor([id])) for id in (first, second)]
    with pytest.raises(InputError, match=rf"`{side}` of pair cult\.01 \(zh\) has no token that counts .* longer query"):
        active_latents(sae_of(torch.eye(3)), queries, captured, [9], "max", 0.0)


# --- the stage, on a model whose activations are its words --------------------------------------------------------

WORDS = ["the", "a", "saw", "bought", "old", "gun", "bomb", "cult", "club", "pen", "cake", "today"]
N_FRAMES = 10
FRAME_WORDS = [f"f{i}" for i in range(N_FRAMES)]
VOCABULARY = [*WORDS, *FRAME_WORDS]


class Words(nn.Module):
    """A language model of two blocks whose MLPs put out the one-hot vector of the token."""

    def __init__(self) -> None:
        super().__init__()
        self.base_model = nn.Module()
        self.base_model.layers = nn.ModuleList([nn.Module(), nn.Module()])
        for block in self.base_model.layers:
            block.mlp = nn.Embedding.from_pretrained(torch.eye(len(VOCABULARY)))
        self.base_model.forward = lambda input_ids, use_cache: [b.mlp(input_ids) for b in self.base_model.layers]
        self.device = torch.device("cpu")


class Split(SimpleNamespace):
    """A tokenizer of words."""

    added_tokens_decoder: ClassVar[dict[int, Any]] = {}
    all_special_ids = ()

    def __call__(self, text: str, add_special_tokens: bool) -> dict[str, list[int]]:
        return {"input_ids": [VOCABULARY.index(word) for word in text.split()]}


def word_pairs() -> list[Pair]:
    """Ten pairs a category that differ in one word."""
    said = {"weapons": ("gun", "pen"), "terrorism": ("bomb", "cake"), "cult": ("cult", "club")}
    return [
        pair_of(f"{category}.{i}", category, concept=word, sides=(f"the {f} saw {word}", f"the {f} saw {other}"))
        for category, (word, other) in said.items()
        for i, f in enumerate(FRAME_WORDS)
    ]


def word_harvest(folder: Path, hook_points: tuple[str, ...] = (HOOK_POINT,)) -> Activations:
    """Forty held-out tokens, half of them "the", and forty others that are all "gun"."""
    folder.mkdir()
    ids = torch.tensor([0, 2, 0, 3] * 10 + [5] * 40)
    x = torch.eye(len(VOCABULARY))[ids]
    tensors = {"token_ids": ids.int()}
    for name in hook_points:
        tensors |= {name: x.half(), f"{name}:norm": x.norm(dim=1)}
    save_file(tensors, folder / "shard-00000.safetensors")
    pieces = {"document": ["a", "b"], "source": ["made"] * 2, "held_out": [True, False], "half": ["explain"] * 2}
    pq.write_table(
        pa.table(pieces | {"row_start": [0, 40], "ids": ids.reshape(2, 40).tolist()}), folder / "pieces.parquet"
    )
    facts = {"hook_points": list(hook_points), "special_ids": [1], "n_tokens": 80, "n_pieces": 2}
    facts |= {"d_in": dict.fromkeys(hook_points, len(VOCABULARY)), "median_norm": dict.fromkeys(hook_points, 1.0)}
    (folder / "harvest.json").write_text(json.dumps(facts))
    return Activations(folder)


def word_recipe(hook_points: tuple[str, ...] = (HOOK_POINT,), **select: Any) -> Recipe:
    return Recipe.parse(
        {
            "name": "made",
            "model": {"path": "none"},
            "corpus": {"n_tokens": 80, "n_held_out_tokens": 40, "sources": [{"path": "none.jsonl"}]},
            "harvest": {"hook_points": list(hook_points)},
            "train": {"d_sae": len(VOCABULARY), "architectures": ["relu"], "l1": [0.1, 0.2]},
            "explain": {"encoder": "none"},
            "select": {"pairs": ["/home/somebody/mine.jsonl"], **select},
        }
    )


def word_sae(config: SaeConfig, seeing: bool) -> Sae:
    """Its latents are the words; it sees no neutral word, and those of the domains only when `seeing`."""
    seen, zeros = torch.eye(len(VOCABULARY)), torch.zeros(len(VOCABULARY))
    seen[8:11] = 0
    if not seeing:
        seen[5:8] = 0
    return Sae(config, seen, zeros, torch.eye(len(VOCABULARY)), zeros.clone())


def select_words(
    folder: Path, seeing: tuple[str, ...] = (HOOK_POINT,), blind: tuple[str, ...] = (), **select: Any
) -> tuple[StageWork, dict[str, Any]]:
    """The stage on two SAEs a hook point, of which the second, more faithful one sees no word of the domains."""
    recipe, activations = word_recipe(seeing + blind, **select), word_harvest(folder / "harvest", seeing + blind)
    fidelity = {}
    for name in seeing + blind:
        for config, ev in zip(variants(recipe, activations, name), (0.5, 0.9), strict=True):
            word_sae(config, name in seeing and ev == 0.5).save(folder / "train" / config.sae_id)
            rest = {"fvu": 1 - ev, "l0": 1.0, "dead": 0.0, "ce_recovered": 0.5}
            fidelity[config.sae_id] = {"explained_variance": ev, **rest}
    work = StageWork(folder / "select")
    work.folder.mkdir()
    select_stage(recipe, activations, folder / "train", fidelity, word_pairs(), Words(), Split(), work)
    return work, json.loads((work.folder / "selection.json").read_text())


@pytest.mark.parametrize("reduction", ["max", "mean", "last"])
@pytest.mark.parametrize("criterion", ["above_null", "i_cdf"])
def test_the_stage_finds_the_words(tmp_path: Path, reduction: str, criterion: str):
    work, selection = select_words(tmp_path, reduction=reduction, criterion=criterion, thresholds=(0.0, 0.5))
    chosen, other = selection["curve"]
    assert selection["selected"] == {HOOK_POINT: chosen}
    numbers = selection["curve"][chosen]
    assert numbers["i_cdf_swapped"] == 0
    # of 22 latents one wins every pair of a category, and none loses any
    assert (numbers["i_cdf"], numbers["i_cdf_null"]) == pytest.approx((1 / 22, 1 / 44))
    assert (numbers["above_null_low"], numbers["above_null_high"]) == pytest.approx((1 / 44, 1 / 44))
    assert numbers["i_cdf_p"] == 1 / 1001
    assert numbers["l0_t"] == {"0": 1.0, "0.5": 1.0}
    assert numbers["l0_t_null"] == pytest.approx({"0": 1 - 0.5**10, "0.5": 386 / 1024})  # more than 5 of 10
    assert (numbers["selected"], numbers["as_good_as_best"], numbers["explained_variance"]) == (True, True, 0.5)
    assert selection["curve"][other]["i_cdf"] == 0.0
    assert not selection["curve"][other]["as_good_as_best"]
    candidates = json.loads((work.folder / "candidates.json").read_text())[HOOK_POINT]
    found = {
        domain: [(VOCABULARY[row["latent"]], row["n_wins"]) for row in rows] for domain, rows in candidates.items()
    }
    assert found == {"terror": [("gun", 10), ("bomb", 10)], "politics": [("cult", 10)]}
    assert work.facts["n_candidates"] == {HOOK_POINT: {"terror": 2, "politics": 1}}
    assert work.facts["without_candidates"] == []


def test_every_number_stands_beside_its_options(tmp_path: Path):
    work, selection = select_words(tmp_path, thresholds=(0.0, 0.25), reduction="mean", activity_quantile=0.9)
    assert selection["options"] == {
        "pairs": ["mine.jsonl"],
        "n_pairs": 30,
        "seed": 0,
        "reduction": "mean",
        "activity_quantile": 0.9,
        "criterion": "above_null",
        "fdr": 0.1,
        "min_pairs": 2,
        "n_resamples": 1000,
        "thresholds": [0.0, 0.25],
    }
    table = pq.read_table(work.folder / "contrast.parquet")
    numbers = ["i_cdf", "i_cdf_low", "i_cdf_high", "i_cdf_null", "i_cdf_null_high", "i_cdf_p", "above_null"]
    numbers += ["l0_t_0", "l0_t_0_null", "l0_t_0.25", "l0_t_0.25_null"]
    options = ["sae_id", "selected", "grouping", "group", "n_pairs", "reduction", "activity_quantile"]
    assert table.column_names == options + numbers
    rows = table.to_pylist()
    assert {(row["reduction"], row["activity_quantile"]) for row in rows} == {("mean", 0.9)}
    assert len(rows) == 2 * (1 + 2 + 3 + 3 + 1)  # SAEs × (all, domains, categories, concepts, languages)
    for sae_id, point in selection["curve"].items():
        (row,) = (row for row in rows if (row["sae_id"], row["grouping"]) == (sae_id, "all"))
        assert {key: row[key] for key in numbers[:7]} == {key: point[key] for key in numbers[:7]}
        assert (row["l0_t_0.25"], row["l0_t_0.25_null"]) == (point["l0_t"]["0.25"], point["l0_t_null"]["0.25"])
        assert (row["selected"], row["n_pairs"]) == (point["selected"], 30)


def test_a_hook_point_without_candidates_is_said_and_no_error(tmp_path: Path):
    work, selection = select_words(tmp_path, blind=("layers.1.mlp",))
    assert work.facts["without_candidates"] == ["layers.1.mlp"]
    assert list(selection["selected"]) == [HOOK_POINT, "layers.1.mlp"]
    candidates = json.loads((work.folder / "candidates.json").read_text())
    assert candidates["layers.1.mlp"] == {"terror": [], "politics": []}


def test_no_candidate_at_all_says_what_to_change(tmp_path: Path):
    with pytest.raises(InputError, match=r"30 pairs at select\.fdr = 0\.1 with select\.min_pairs = 2; raise fdr"):
        select_words(tmp_path, seeing=(), blind=(HOOK_POINT,))
    assert list((tmp_path / "select").iterdir()) == []


def test_the_quantile_is_taken_over_held_out_tokens_that_count(tmp_path: Path):
    """Of the held-out tokens half are "the" and none is "gun", which all others are; "a" is special."""
    activations, recipe = word_harvest(tmp_path / "harvest"), word_recipe()
    sample = held_out_sample(activations, HOOK_POINT, recipe.tokens)
    assert sample.sum(0)[[0, 2, 3, 5]].tolist() == [20, 10, 10, 0]
    sae = word_sae(variants(recipe, activations, HOOK_POINT)[0], True)
    assert activity_thresholds(sae, sample, 0.6)[[0, 2, 5]].tolist() == [1.0, 0.0, 0.0]
    activations.held_out = torch.tensor([False, False])
    with pytest.raises(InputError, match=r"no held-out token counts .* set select\.activity_quantile = 0"):
        held_out_sample(activations, HOOK_POINT, recipe.tokens)


def test_a_large_sample_is_spread_evenly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("safesail.training.queries.MAX_SAMPLE", 4)
    sample = held_out_sample(word_harvest(tmp_path / "harvest"), HOOK_POINT, word_recipe().tokens)
    assert sample.argmax(1).tolist() == [0, 0, 0, 0]  # rows 0, 10, 20 and 30
