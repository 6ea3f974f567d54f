"""Does firing mean knowing: the table by hand, the entity lists, and the rows of a tiny model."""

import json
import math
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import safesail.cli.monitor
from safesail.cli.app import app
from safesail.diagnosis.inspection import Inspection
from safesail.diagnosis.inspector import Inspector
from safesail.diagnosis.knowledge import (
    KNOWLEDGE,
    Entity,
    contingency,
    knowledge,
    load_entities,
    shipped_entities,
)
from safesail.diagnosis.results import read_result, write_result
from safesail.errors import InputError
from safesail.metrics import fisher_exact, odds_ratio, wilson
from safesail.neurons import NeuronDatabase
from safesail.sae.config import SaeConfig
from safesail.sae.model import Sae

HOOK_POINT = "layers.1.mlp"
assert safesail.cli.monitor.knowledge  # importing the module registers the verb


@pytest.fixture(scope="module")
def inspector(model: Any, tokenizer: Any) -> Inspector:
    """The tiny model with an SAE whose latent 0 fires on every counted token, 1 on none, and 2 never did."""
    config = SaeConfig(d_in=32, d_sae=3, hook_point=HOOK_POINT, architecture="relu", coefficient=0.1)
    sae = Sae(config, torch.zeros(32, 3), torch.tensor([2.0, -1.0, -1.0]), torch.zeros(3, 32), torch.zeros(32))
    rows = {
        f"{HOOK_POINT}/{j}": {"neuron_id": f"{HOOK_POINT}/{j}", "hook_point": HOOK_POINT, "normaliser": scale}
        for j, scale in enumerate((4.0, 1.0, 0.0))
    }
    return Inspector(model, tokenizer, {HOOK_POINT: sae}, NeuronDatabase({}, rows, {}, {}), "tests/tiny")


def entities(inspector: Inspector) -> list[Entity]:
    """Three names, the first of which the model continues as accepted."""
    *_, last = inspector.answer("Hello there, Ada", max_new_tokens=6)
    said = last.text.split()[0].strip(".,")
    return [
        Entity(name="Ada", prompt="Hello there, Ada", accepted=("nobody at all", said)),
        Entity(name="Ben Ali", prompt="Hello there, Ada", accepted=("nobody at all",)),
        Entity(name="Chloé", prompt="Hello there, Ada", accepted=("nobody at all",)),
    ]


@pytest.fixture(autouse=True)
def _one_thread(one_thread: None) -> None:
    """Small matrices: on a busy machine more threads only wait for each other."""


# --- arithmetic ---------------------------------------------------------------------------------------------------


def test_odds_ratio_by_hand():
    found = odds_ratio(3, 1, 0, 2)
    # Haldane: 3.5 · 2.5 / (1.5 · 0.5) = 8.75 / 0.75 = 11.6667
    assert found.value == pytest.approx(35 / 3)
    # standard error of its logarithm: √(1/3.5 + 1/1.5 + 1/0.5 + 1/2.5) = √(0.285714 + 0.666667 + 2 + 0.4) = 1.830951
    assert found.low == pytest.approx(math.exp(math.log(35 / 3) - 1.959964 * 1.830951), rel=1e-5)
    assert found.high == pytest.approx(math.exp(math.log(35 / 3) + 1.959964 * 1.830951), rel=1e-5)


def test_the_odds_ratio_of_the_transposed_table_is_the_same_and_of_the_swapped_one_its_inverse():
    assert odds_ratio(7, 2, 3, 9).value == pytest.approx(odds_ratio(7, 3, 2, 9).value)
    assert odds_ratio(7, 2, 3, 9).value == pytest.approx(1 / odds_ratio(2, 7, 9, 3).value)


@pytest.mark.parametrize("table", [(0, 0, 3, 4), (3, 4, 0, 0), (0, 3, 0, 4), (3, 0, 4, 0), (0, 0, 0, 0)])
def test_the_odds_ratio_of_an_empty_row_or_column_is_undefined(table: tuple[int, int, int, int]):
    assert odds_ratio(*table) == (None, None, None)


def test_fishers_test_by_hand():
    # The lady tasting tea, [[3, 1], [1, 3]]: of 70 tables, those with 0, 1, 2, 3, 4 in the corner are 1, 16, 36, 16, 1;
    # no more probable than 16 are 1 + 16 + 16 + 1 = 34.
    assert fisher_exact(3, 1, 1, 3) == pytest.approx(34 / 70)
    assert fisher_exact(4, 0, 0, 4) == pytest.approx(2 / 70)
    assert fisher_exact(0, 0, 5, 3) == 1.0


def test_fishers_test_is_the_sum_over_tables_that_are_no_more_probable():
    for a, b, c, d in product(range(4), repeat=4):
        n, first = a + b + c + d, a + c
        chance = {}
        for k in range(max(0, a + b + first - n), min(a + b, first) + 1):
            chance[k] = math.comb(a + b, k) * math.comb(c + d, first - k) / math.comb(n, first)
        expected = sum(p for p in chance.values() if p <= chance[a] * (1 + 1e-9))
        assert fisher_exact(a, b, c, d) == pytest.approx(expected)


def test_wilsons_interval_by_hand():
    # 3 of 10: z² = 3.841459; centre (0.3 + 3.841459 / 20) / 1.3841459 = 0.355506;
    # half = 1.959964 · √(0.021 + 3.841459 / 400) / 1.3841459 = 1.959964 · 0.1749534 / 1.3841459 = 0.247735
    found = wilson(3, 10)
    assert found.value == 0.3
    assert found.low == pytest.approx(0.355506 - 0.247715, abs=3e-5)
    assert found.high == pytest.approx(0.355506 + 0.247715, abs=3e-5)


def test_wilsons_interval_of_extremes():
    assert wilson(0, 5).low == 0.0 < wilson(0, 5).high < 0.5
    assert 0.5 < wilson(5, 5).low < wilson(5, 5).high == 1.0
    assert wilson(0, 0) == (None, None, None)


def test_the_table_counts_each_pair_of_answers_in_its_cell():
    table = contingency([True, True, True, False, False], [True, False, False, True, True])
    assert table[:4] == (1, 2, 2, 0)
    assert table.odds_ratio.value == pytest.approx(1.5 * 0.5 / (2.5 * 2.5))
    assert table.known_where_fires.value == pytest.approx(1 / 3)
    assert table.known_where_silent.value == 1.0


# --- rows ---------------------------------------------------------------------------------------------------------


def test_a_row_says_whether_the_neuron_fires_on_the_name_and_whether_the_model_knows_it(inspector: Inspector):
    result = knowledge(inspector, f"{HOOK_POINT}/0", entities(inspector), max_new_tokens=6)
    assert [row["known"] for row in result.rows] == [True, False, False]
    assert all(row["fires"] for row in result.rows)
    # every counted token has activation 2, and the normaliser is 4
    assert {(row["activation"], row["normalised"]) for row in result.rows} == {(2.0, 0.5)}
    assert all(row["token"].strip() in row["name"] for row in result.rows)
    assert result.config == "knowledge"
    assert result.facts["table"]["fires_known"] == 1
    assert result.facts["table"]["fires_unknown"] == 2


def test_a_silent_neuron_fires_on_no_name_and_a_higher_bar_silences(inspector: Inspector):
    listed = entities(inspector)
    silent = knowledge(inspector, f"{HOOK_POINT}/1", listed, max_new_tokens=6)
    assert [row["fires"] for row in silent.rows] == [False] * 3
    assert silent.facts["table"]["silent_known"] == 1
    assert [row["token"] for row in silent.rows] == [""] * 3
    barred = knowledge(inspector, f"{HOOK_POINT}/0", listed, max_new_tokens=6, above=0.5)
    assert [row["fires"] for row in barred.rows] == [False] * 3


def test_only_the_names_own_tokens_count(inspector: Inspector, monkeypatch: pytest.MonkeyPatch):
    inspect, n_elsewhere = inspector.inspect, []

    class Elsewhere(Inspection):
        """The neuron fires on every unit before the Z and after the ë only."""

        def firings(self, id: str) -> list[Any]:
            texts = [unit.text for unit in self.units]
            outside = [i for i in range(len(texts)) if "Z" not in "".join(texts[: i + 1]) or "ë" in "".join(texts[:i])]
            n_elsewhere.append(len(outside))
            return [firing for firing in super().firings(id) if firing.index in outside]

    monkeypatch.setattr(inspector, "inspect", lambda text: Elsewhere(**vars(inspect(text))))
    result = knowledge(inspector, f"{HOOK_POINT}/0", [Entity(name="Zoë", prompt="x", accepted=("y",))])
    assert n_elsewhere[0] > 10
    assert [row["fires"] for row in result.rows] == [False]


@pytest.mark.parametrize(
    ("continuation", "answer", "known"),
    [
        (" the United States, from", "united states", True),
        (" Russiandoll", "Russia", False),
        (" the U.S. of", "U.S.", True),
        (" RUSSIA", "Russia", True),
        (" trust us", "US", True),
        (" bus", "US", False),
        (" the United\n States", "United States", True),
    ],
)
def test_an_answer_counts_as_whole_words(continuation: str, answer: str, known: bool):
    from safesail.diagnosis.knowledge import _holds

    assert _holds(continuation, [answer]) == known


def test_the_python_makes_the_same_rows(inspector: Inspector, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    result = knowledge(inspector, f"{HOOK_POINT}/0", entities(inspector), max_new_tokens=3)
    monkeypatch.setattr(Inspector, "from_pretrained", lambda release: inspector)
    space: dict[str, Any] = {}
    exec(result.python, space)
    assert space["result"].rows == result.rows
    stored = read_result(write_result(result, tmp_path / "k.parquet"))
    assert stored.schema == KNOWLEDGE
    assert stored.rows == result.rows
    assert stored.facts == json.loads(json.dumps(result.facts))


# --- lists and mistakes -------------------------------------------------------------------------------------------


def test_the_shipped_list_has_prompts_that_do_not_give_the_answer_away():
    assert shipped_entities() == ["presidents"]
    listed = load_entities("presidents")
    assert len(listed) >= 40
    for entity in listed:
        assert entity.name in entity.prompt
        assert not any(answer in entity.prompt for answer in entity.accepted)


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        ("", "0 entities were given"),
        ('{"name": " ", "prompt": "p", "accepted": ["a"]}', "line 1: name"),
        ('{"name": "A", "prompt": "", "accepted": ["a"]}', "line 1: prompt"),
        ('{"name": "A", "prompt": "p", "accepted": []}', "line 1: accepted"),
        ('{"name": "A", "prompt": "p", "accepted": [""]}', "line 1: accepted"),
        ('{"name": "A", "prompt": "p"}', "line 1: accepted"),
        ("\nnonsense", "line 2: the line"),
        ('{"name": "A", "prompt": "p", "accepted": ["a"], "x": 1}', "line 1: x"),
        (
            '{"name": "A  b", "prompt": "p", "accepted": ["a"]}\n{"name": "a B", "prompt": "q", "accepted": ["a"]}',
            "'a b' is given twice",
        ),
    ],
)
def test_a_broken_list_is_refused(tmp_path: Path, lines: str, said: str):
    file = tmp_path / "list.jsonl"
    file.write_text(lines, encoding="utf-8")
    with pytest.raises(InputError, match=said):
        load_entities(file)


def test_an_unknown_list_names_the_shipped_ones():
    with pytest.raises(InputError, match="presidents"):
        load_entities("emperors")


def test_mistakes_are_told(inspector: Inspector):
    listed = entities(inspector)
    for neuron, said in (
        (f"{HOOK_POINT}/3", "latents are 0 to 2"),
        ("nowhere/1", "is not a neuron here"),
        (f"{HOOK_POINT}/2", "never fired"),
    ):
        with pytest.raises(InputError, match=said):
            knowledge(inspector, neuron, listed)
    with pytest.raises(InputError, match="0 entities"):
        knowledge(inspector, f"{HOOK_POINT}/0", [])
    with pytest.raises(InputError, match="given twice"):
        knowledge(inspector, f"{HOOK_POINT}/0", [listed[0], listed[0]])
    for above in (float("nan"), -1.0, float("inf")):
        with pytest.raises(InputError, match="normalised activation of 0 or more"):
            knowledge(inspector, f"{HOOK_POINT}/0", listed, above=above)
    with pytest.raises(InputError, match="at least 1"):
        knowledge(inspector, f"{HOOK_POINT}/0", listed, max_new_tokens=0)
    with pytest.raises(InputError, match="too long"):
        knowledge(inspector, f"{HOOK_POINT}/0", [Entity(name="A", prompt="word " * 600, accepted=("a",))])


def test_the_verb_prints_the_table_and_stores_the_rows(
    inspector: Inspector, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    monkeypatch.setattr(Inspector, "from_pretrained", lambda release: inspector)
    file, out = tmp_path / "list.jsonl", tmp_path / "out.parquet"
    file.write_text("".join(entity.model_dump_json() + "\n" for entity in entities(inspector)), encoding="utf-8")
    options = ["--neuron", f"{HOOK_POINT}/0", "--entities", str(file), "--tokens", "6", "--out", str(out)]
    done = CliRunner().invoke(app, ["knowledge", "tests/tiny", *options], catch_exceptions=False)
    assert done.exit_code == 0
    assert "fires         1        2" in done.stdout
    assert "odds ratio undefined" in done.stdout  # no name on which it is silent
    assert "Fisher's exact p = 1" in done.stdout
    assert len(read_result(out).rows) == 3
    said = CliRunner().invoke(app, ["knowledge", "tests/tiny", *options, "--json"], catch_exceptions=False)
    assert json.loads(said.stdout)["facts"]["table"]["silent_unknown"] == 0
