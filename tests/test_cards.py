"""Every published README: it parses, it prints facts only, and foreign text in it stays text."""

import json
import re
import tempfile
from pathlib import Path
from typing import Any

import jinja2
import pytest
from made_release import GOLDEN, GOLDEN_FILES, made_explanations, made_recipe, made_release
from made_release import HOSTILE as HOSTILE_EXPLANATION

from safesail.assets import asset
from safesail.pairs import Pair
from safesail.recipe import ScoreSection
from safesail.release.cards import _latents_by_hand, _sparsity_settings, md_cell, render
from safesail.release.columns import COLUMNS, column_table, meaning
from safesail.release.contrast import activity_test, group_table, pair_table, threshold_table
from safesail.release.facts import flat_fidelity
from safesail.release.front_matter import _size
from safesail.release.licences import licence_of_texts
from safesail.release.methods import confusion_table, cost_table, definition, method_table, total_cost
from safesail.release.redaction import redacted, snippets_of
from safesail.release.summary import (
    aligned,
    candidate_table,
    curve_lines,
    domain_table,
    markdown,
    ordered,
    sae_table,
    score_bands,
    selection_table,
    status_lines,
    status_table,
)
from safesail.taxonomy import Taxonomy
from safesail.training.fidelity import FIDELITY

PARTS = ("saes", "neurons", "examples", "inspector")
TAXONOMY = Taxonomy.load()

HOSTILE = {
    "cell border": "a | b || c",
    "code": "`rm -rf` ``x``",
    "line break": "a\nb\r\nc\u2028d",
    "tabs": "a\t\tb",
    "script": "<script>alert(1)</script>",
    "tag with event": '<img src=x onerror="alert(1)">',
    "comment": "<!-- gone",
    "link": "[x](javascript:alert(1))",
    "image": "![x](https://example.org/pixel.png)",
    "reference": "[x]: https://example.org",
    "angle link": "<https://example.org>",
    "bare link": "see https://example.org/a_b",
    "bold": "**bold** __bold__ *it* _it_",
    "struck": "~~gone~~",
    "heading": "# Heading",
    "setext": "Heading\n---",
    "list": "- item\n+ item\n* item",
    "table row": "|---|---|",
    "formula": "$\\int$ $$x$$",
    "escaped already": "\\| \\* &#124; &lt;script&gt;",
    "braces": "{{ config }} {% raw %}",
    "footnote": "[^1]",
}


# --- one cell -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE.keys())
def test_no_active_character_survives_in_a_cell(text: str):
    cell = md_cell(text)
    rest = re.sub(r"&(#\d+|amp|lt|gt);", "", cell)
    assert not set(rest) & set("|`*_~<>[]{}$\\#@\n\r\t&")
    assert not re.search(r":\S|^[-+=]|^\d+[.)]", cell)


def rendered(cell: str) -> tuple[set[str], str]:
    """The kinds of tokens inside the one body cell of a table, and the text that a reader sees."""
    markdown_it = pytest.importorskip("markdown_it")
    parser = markdown_it.MarkdownIt("commonmark").enable(["table", "strikethrough"])
    tokens = parser.parse(f"| a | b |\n|---|---|\n| {cell} | end |\n\nafter")
    blocks = [token.type for token in tokens if token.level == 0]
    assert blocks == ["table_open", "table_close", "paragraph_open", "paragraph_close"]
    inlines = [token for token in tokens if token.type == "inline"]
    assert [token.content for token in inlines[:2]] == ["a", "b"]
    assert [token.content for token in inlines[3:]] == ["end", "after"]  # still two cells, and the table ended
    children = inlines[2].children
    return {child.type for child in children}, "".join(child.content for child in children)


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE.keys())
def test_a_cell_shows_exactly_its_text_and_no_markup(text: str):
    kinds, shown = rendered(md_cell(text))
    assert kinds <= {"text", "text_special"}
    assert shown == " ".join(text.split())


def test_the_same_text_unescaped_would_have_been_markup():
    """The parser of the test above does see markup where there is some."""
    assert "link_open" in rendered("[x](https://example.org)")[0]
    assert "strong_open" in rendered(HOSTILE["bold"])[0]
    assert "html_inline" in rendered(HOSTILE["script"])[0]
    assert "code_inline" in rendered("`x`")[0]


def test_a_long_text_is_cut_before_it_is_escaped():
    cell = md_cell("|" * 500)
    assert cell == "&#124;" * 159 + "…"
    assert md_cell("x" * 160) == "x" * 160
    assert md_cell("*" * 9, 5) == "&#42;" * 4 + "…"


@pytest.mark.parametrize(
    ("value", "cell"), [(None, ""), ("", ""), (3, "3"), ("सफ़ेद 枪 👍🏽", "सफ़ेद 枪 👍🏽"), ("a  b ", "a b")]
)
def test_plain_values_stay_as_they_are(value: Any, cell: str):
    assert md_cell(value) == cell


def test_a_fact_that_nobody_gave_is_an_error():
    with pytest.raises(jinja2.UndefinedError):
        render("examples.md", front_matter="x")


# --- redaction ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The terrorist had a BOMB.", "The t*** had a B***."),
        ("a car bomb and a Car  Bomb", "a c*** b*** and a C***  B***"),
        ("an Al-Qaeda man", "an A***-Q*** man"),
        ("the river and the garden", "the river and the garden"),
        ("porn, murder; president!", "p***, m***; p***!"),
        ("bombastic gunnels", "bombastic gunnels"),
        ("", ""),
    ],
)
def test_redaction_masks_the_words_of_every_domain_and_nothing_else(text: str, expected: str):
    assert redacted(text, TAXONOMY) == expected


@pytest.mark.parametrize("domain", TAXONOMY.domain_ids)
def test_every_word_of_a_domain_is_masked(domain: str):
    for word in TAXONOMY.domain(domain).words:
        for text in (word, word.upper(), f"«{word}»"):
            masked = redacted(f"so {text} it", TAXONOMY)
            assert word.lower() not in masked.lower()
            assert "***" in masked


def test_redacting_twice_changes_nothing():
    once = redacted("The terrorist had a car bomb; porn and murder.", TAXONOMY)
    assert redacted(once, TAXONOMY) == once


@pytest.mark.parametrize(
    ("tokens", "peak"),
    [
        (["the", " terr", "orist", " was", " seen"], 1),
        (["the", " terr", "orist", " was", " seen"], 2),
        (["a", " car", " bo", "mb", " went", " off"], 1),
        (["a", " car", " bo", "mb", " went", " off"], 3),
        (["a", " bo", "mb", " went", " off"], 4),
        (["x", " terr", "orist", " a", " b", " c", " d", " e"], 7),  # the stretch begins inside the word
        (["e", " a", " b", " terr", "orist", " x"], 0),  # the stretch ends inside the word
    ],
)
def test_a_word_split_over_tokens_is_masked_whole_in_a_snippet(tokens: list[str], peak: int):
    """Wherever the peak falls, no part of a domain's word but its first letter is left beside the mask."""
    row = {"neuron_id": "n", "half": "explain", "rank": 0, "peak": peak, "tokens": tokens}
    snippet = snippets_of([row], TAXONOMY)["n"]
    assert not re.search(r"terr|orist|\bca|\bbo|omb|mb\b", snippet), snippet
    assert "***" in snippet


def test_a_clause_of_a_script_without_spaces_is_not_shown_whole():
    """The word lists are English, and a Chinese clause is one run of signs: only its first sign is left."""
    clause = "他们在山里藏了很多很多的武器和炸药准备袭击附近的城市"
    tokens = ["开头", f" {clause}", " rifle", " 结尾", " end"]
    row = {"neuron_id": "n", "half": "explain", "rank": 0, "peak": 2, "tokens": tokens}
    assert snippets_of([row], TAXONOMY)["n"] == "… 他*** r*** 结尾 …"


# --- tables -------------------------------------------------------------------------------------------------------

NEURONS = [
    {"domains": ["terror"], "score": 0.7, "lexical_score": 0.5},
    {"domains": ["terror", "violence"], "score": 0.1, "lexical_score": 0.2},
    {"domains": ["terror"], "score": None, "lexical_score": 0.2},
    {"domains": [], "score": 0.3, "lexical_score": None},
    {"domains": [], "score": -0.2, "lexical_score": 0.0},
]


def test_the_domain_table_by_hand():
    _, cells = domain_table(NEURONS, ["terror", "violence", "politics"])
    assert cells == [  # domain, neurons, without a score, median, quartiles, above 0.2, baseline, beats it
        ["terror", "3", "1", "0.40", "0.25 – 0.55", "1", "0.20", "1"],
        ["violence", "1", "0", "0.10", "", "0", "0.20", "0"],
        ["politics", "0", "0", "", "", "0", "", "0"],
        ["none", "2", "0", "0.05", "-0.08 – 0.17", "1", "0.00", "0"],
        ["all", "5", "1", "0.20", "0.03 – 0.40", "2", "0.20", "1"],
    ]


def test_every_score_is_in_one_band():
    bands = dict(score_bands(NEURONS))
    assert sum(bands.values()) == len(NEURONS)
    assert {name: n for name, n in bands.items() if n} == {
        "-1 to 0": 1,
        "0 to 0.2": 1,
        "0.2 to 0.3": 1,
        "0.6 to 1": 1,
        "none": 1,
    }


@pytest.mark.parametrize("score", [-1.0, 0.0, 0.2, 1.0])
def test_a_score_on_an_edge_is_counted_once(score: float):
    assert sum(n for _, n in score_bands([{"score": score}])) == 1


def sae_row(sae_id: str, architecture: str, l0: float, **numbers: Any) -> dict[str, Any]:
    """A row of the `selection` table."""
    row = {"sae_id": sae_id, "architecture": architecture, "selected": True, "k": 32, "l0": l0, "dead": 0.01}
    row |= {"dense": 0.002, "kl": 0.1234, "fvu": 0.2, "as_good_as_best": True}
    row |= {"i_cdf": 0.01, "i_cdf_low": 0.009, "i_cdf_high": 0.0125, "i_cdf_null": 0.004, "i_cdf_p": 0.001}
    row |= {"above_null": 0.006, "above_null_low": 0.005, "above_null_high": 0.0085}
    row |= {"l0_t": {"0": 12.25, "0.1": 3.0}, "l0_t_null": {"0": 9.0, "0.1": 0.04}}
    row |= {"explained_variance": 0.8, "explained_variance_low": 0.79, "explained_variance_high": 0.8125}
    return row | {"ce_recovered": 0.75, "ce_recovered_low": 0.5, "ce_recovered_high": 1.0} | numbers


def test_a_row_of_the_sae_table_by_hand():
    header, (cells,) = sae_table([sae_row("layers.9.mlp/topk-k4-w64", "topk", 4.0)])
    assert dict(zip(header, cells, strict=True)) == {
        "SAE": "layers.9.mlp/topk-k4-w64",
        "EV": "0.800 [0.790, 0.812]",
        "L0": "4.0",
        "dead": "1.0 %",
        "dense": "0.2 %",
        "CE recovered": "75.0 % [50.0, 100.0]",
        "KL": "0.123",
        "selected": "yes",
    }


def test_a_row_of_the_selection_table_by_hand():
    header, (cells,) = selection_table([sae_row("layers.9.mlp/topk-k4-w64", "topk", 4.0)])
    assert dict(zip(header, cells, strict=True)) == {
        "SAE": "layers.9.mlp/topk-k4-w64",
        "L0": "4.0",
        "I_CDF": "0.01000 [0.00900, 0.01250]",
        "null": "0.00400",
        "p": "0.001",
        "above null": "0.00600 [0.00500, 0.00850]",
        "as good as best": "yes",
        "selected": "yes",
    }


def test_a_contrast_without_null_or_interval_leaves_its_cells_empty():
    gone = dict.fromkeys(("i_cdf_low", "i_cdf_high", "i_cdf_null", "i_cdf_p", "above_null"))
    gone |= {"above_null_low": None, "above_null_high": None, "selected": False, "as_good_as_best": False}
    _, (cells,) = selection_table([sae_row("a/b", "topk", 4.0, **gone)])
    assert cells == ["a/b", "4.0", "0.01000", "", "", "", "", ""]


def test_an_undefined_ce_is_an_empty_cell_and_a_number_without_interval_stands_alone():
    undefined = {"ce_recovered": None, "ce_recovered_low": None, "ce_recovered_high": None}
    alone = {"explained_variance_low": None, "explained_variance_high": None}
    header, (cells,) = sae_table([sae_row("a/b", "topk", 4.0, **undefined, **alone)])
    found = dict(zip(header, cells, strict=True))
    assert (found["EV"], found["CE recovered"]) == ("0.800", "")


def test_the_table_of_the_longest_names_fits_a_terminal():
    long = {f"ce_recovered{end}": -12.3456 for end in ("", "_low", "_high")}
    long |= {f"explained_variance{end}": -12.3456 for end in ("", "_low", "_high")}
    rows = [sae_row(f"layers.35.self_attn/{name}", "x", 12345.6, **long) for name in ("matryoshka-k200-w65536",)]
    assert max(map(len, aligned(*sae_table(rows)).splitlines())) < 160
    assert max(map(len, aligned(*selection_table(rows)).splitlines())) < 160
    assert max(map(len, curve_lines(rows))) < 160


def contrast(value: float | None, half: float | None = None) -> dict[str, float | None]:
    ends = (None, None) if half is None or value is None else (value - half, value + half)
    return {"above_null": value, "above_null_low": ends[0], "above_null_high": ends[1]}


SWEEP = [
    sae_row("layers.9.mlp/topk-k32-w64", "topk", 31.5, fvu=0.2, **contrast(0.02, 0.005)),
    sae_row("layers.9.mlp/relu-c0.1-w64", "relu", 8.25, fvu=0.4, selected=False, **contrast(0.005)),
    sae_row("layers.9.mlp/topk-k8-w64", "topk", 8.0, fvu=0.25, selected=False, **contrast(-0.001, 0.002)),
    sae_row("layers.15.mlp/topk-k8-w64", "topk", 8.0, fvu=None, **contrast(None)),
]


def test_rows_are_ordered_by_hook_point_architecture_and_l0():
    shown = ["topk-k8-w64", "topk-k32-w64", "relu-c0.1-w64", "topk-k8-w64"]
    assert [row["sae_id"].partition("/")[2] for row in ordered(SWEEP)] == shown
    for table in (sae_table, selection_table):
        assert [cells[0].partition("/")[2] for cells in table(SWEEP)[1]] == shown
    assert [row["sae_id"].partition("/")[0] for row in ordered(SWEEP)] == ["layers.9.mlp"] * 3 + ["layers.15.mlp"]


def test_the_curve_by_hand():
    """Bars are scaled to the largest FVU, 0.4, and the largest contrast, 0.02, of all rows: 20 characters."""
    assert curve_lines(SWEEP) == [
        "layers.9.mlp          L0  FVU                         I_CDF above its null",
        "  topk-k8-w64        8.0  0.250 ████████████▌         -0.00100 [-0.00300, 0.00100]",
        f"  topk-k32-w64      31.5  0.200 {'█' * 10}            0.02000 [0.01500, 0.02500]    {'█' * 20} selected",
        "  relu-c0.1-w64      8.2  0.400 ████████████████████  0.00500                       █████",
        "layers.15.mlp         L0  FVU                         I_CDF above its null",
        "  topk-k8-w64        8.0" + " " * (2 + 26 + 2 + 29 + 1 + 20 + 1) + "selected",
    ]


def test_a_curve_of_nothing_or_of_zeros_has_no_bars():
    assert curve_lines([]) == []
    _, line = curve_lines([sae_row("a/relu-w64", "relu", 0.0, fvu=0.0, selected=False, **contrast(0.0))])
    assert line.split() == ["relu-w64", "0.0", "0.000", "0.00000"]


def candidate(q_value: float, level: str, explain: bool) -> dict[str, Any]:
    return {"latent": 1, "q_value": q_value, "level": level, "explain": explain}


def test_the_candidate_table_by_hand():
    terror = [candidate(0.01, "domain", True), candidate(0.0825, "category", False), candidate(0.02, "domain", True)]
    header, cells = candidate_table({"layers.9.mlp": {"terror": terror, "violence": []}}, 0.1)
    assert header[-1] == "FDR (at most 0.1)"
    assert cells == [
        ["layers.9.mlp", "terror", "3", "1", "2", "0.083"],  # candidates, of a category alone, to be explained
        ["layers.9.mlp", "violence", "0", "0", "0", ""],
    ]


# --- contrast in groups of pairs ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reduction", "quantile", "said"),
    [
        ("max", 0.0, "the largest of its activations on the query's counted tokens is above zero"),
        ("last", 0.9, "its activation on the query's last counted token is above its own 0.9 quantile over held-out"),
        ("mean", 0.0, "the mean of its activations on the query's counted tokens is above zero"),
    ],
)
def test_the_activity_test_in_words(reduction: str, quantile: float, said: str):
    assert activity_test({"reduction": reduction, "activity_quantile": quantile}).startswith(said)


def test_pairs_are_counted_by_language_and_domain():
    texts = {"category": "c", "concept": "x", "with": "x", "without": "y"}
    places = [("en", "terror"), ("zh", "terror"), ("en", "politics"), ("en", "terror")]
    pairs = [
        Pair.model_validate({"id": str(i), "language": l, "domain": d, **texts}) for i, (l, d) in enumerate(places)
    ]
    header, cells = pair_table(pairs, ["politics", "violence", "terror"])
    assert header == ["language", "politics", "violence", "terror", "all"]
    assert cells == [["en", "1", "0", "2", "3"], ["zh", "0", "0", "1", "1"]]


def test_l0_t_stands_beside_its_null():
    header, (cells,) = threshold_table([sae_row("a/b", "topk", 4.0)])
    assert dict(zip(header, cells, strict=True)) == {"SAE": "a/b", "t = 0": "12.2 (9.0)", "t = 0.1": "3.0 (0.0)"}


def test_the_contrast_of_groups_has_the_selected_saes_alone():
    def row(sae: str, group: str, value: float | None, p: float | None, **more: Any) -> dict[str, Any]:
        settings = {"sae_id": sae, "selected": True, "grouping": "domain", "group": group, "n_pairs": 12}
        return settings | {"above_null": value, "i_cdf_p": p} | more

    rows = [
        row("a/x", "terror", 0.0012, 0.004),
        row("a/y", "terror", 0.9, 0.001, selected=False),
        row("a/x", "cult", 0.9, 0.001, grouping="category"),
        row("a/x", "politics", -0.0003, None),
        row("b/x", "terror", None, None),
    ]
    header, cells = group_table(rows, "domain")
    assert header == ["domain", "pairs", "a/x", "b/x"]
    assert cells == [["terror", "12", "0.00120 (p 0.004)", ""], ["politics", "12", "-0.00030", ""]]


# --- what came of the questions -----------------------------------------------------------------------------------


def asked(status: str, language: str = "en", method: str = "segment-5/llm", **more: Any) -> dict[str, Any]:
    row = {"status": status, "language": language, "method": method, "score": None, "auroc": None, "n_units": 40}
    row |= dict.fromkeys(("true_positives", "false_positives", "false_negatives", "true_negatives"))
    return row | {"prompt_tokens": 0, "completion_tokens": 0, "cost_usd": 0.0} | more


EXPLANATIONS = [asked("ok"), asked("refused"), asked("refused"), asked("failed", "zh"), asked("unparsed", "zh")]
SCORED = [
    asked("ok", score=0.5, auroc=0.75, prompt_tokens=100, completion_tokens=10, cost_usd=0.25),
    asked("ok", score=0.1, auroc=0.5, prompt_tokens=20, completion_tokens=5, cost_usd=0.5),
    asked("undefined", prompt_tokens=1, cost_usd=0.25),
    asked("refused", "zh", cost_usd=None, prompt_tokens=3),
    asked("ok", "", "segment-5/lexical", score=0.2, auroc=0.5),
]


def test_every_status_is_counted_by_language_and_method():
    assert status_table(EXPLANATIONS, SCORED) == (
        ["", "ok", "refused", "unparsed", "failed", "undefined"],
        [
            ["explanations, en", "1", "2", "0", "0", "0"],
            ["explanations, zh", "0", "0", "1", "1", "0"],
            ["segment-5/llm, en", "2", "0", "0", "0", "1"],
            ["segment-5/llm, zh", "0", "1", "0", "0", "0"],
            ["segment-5/lexical", "1", "0", "0", "0", "0"],
        ],
    )


def test_the_lines_after_explain_name_the_domains_of_the_refusals():
    lines = status_lines(EXPLANATIONS, [], {"terror": 2, "politics": 0, "violence": 1})
    assert lines == [
        "                  ok  refused  unparsed  failed  undefined",
        "explanations, en   1        2         0       0          0",
        "explanations, zh   0        0         1       1          0",
        "refused explanations by domain: terror 2 · violence 1",
    ]
    assert len(status_lines(EXPLANATIONS, [], {"terror": 0})) == 3
    assert status_lines([], []) == []


def test_the_scores_of_each_method_and_language_by_hand():
    header, cells = method_table(SCORED)
    assert header[2:] == ["scored", "median score", "quartiles", "score > 0.2", "median AUROC", "units"]
    assert cells == [  # the quartiles of 0.1 and 0.5 are 0.2 and 0.4; the mean of 0.75 and 0.5 is 0.625
        ["`segment-5/llm`", "en", "2 of 3", "0.30", "0.20 – 0.40", "1", "0.62", "120"],
        ["`segment-5/llm`", "zh", "0 of 1", "", "", "0", "", "40"],
        ["`segment-5/lexical`", "", "1 of 1", "0.20", "", "0", "0.50", "40"],
    ]


def test_confusion_counts_are_summed_over_the_rows_that_have_them():
    def counts(hits: int, alarms: int, misses: int, rests: int) -> dict[str, int]:
        names = ("true_positives", "false_positives", "false_negatives", "true_negatives")
        return dict(zip(names, (hits, alarms, misses, rests), strict=True))

    rows = [asked("ok", **counts(3, 1, 2, 1000)), asked("ok", **counts(3, 1, 0, 4)), asked("refused")]
    rows += [asked("ok", "zh", **counts(0, 0, 2, 4)), asked("ok", method="similarity/embedding")]
    header, cells = confusion_table(rows)
    assert header[2:] == ["true +", "false +", "false −", "true −", "precision", "recall"]
    assert cells == [
        ["`segment-5/llm`", "en", "6", "2", "2", "1,004", "0.75", "0.75"],
        ["`segment-5/llm`", "zh", "0", "0", "2", "4", "", "0.00"],  # nothing was called active
    ]


def test_costs_are_summed_and_a_missing_price_is_said():
    asked_twice = [asked("ok", prompt_tokens=900, completion_tokens=150, cost_usd=0.0)] * 2
    header, cells = cost_table(asked_twice, SCORED)
    assert header == ["", "prompt tokens", "completion tokens", "USD"]
    assert cells == [  # the lexical baseline asked nobody and has no line
        ["explanations", "1,800", "300", "0"],
        ["scores, segment-5/llm", "124", "15", "no price was given"],
        ["all", "1,924", "315", "no price was given"],
    ]
    assert cost_table([], SCORED[:3])[1] == [["scores, segment-5/llm", "121", "15", "1.0000"]]
    assert total_cost(SCORED[:3]) == 1.0
    assert total_cost(SCORED) is None
    assert cost_table([], []) == (header, [])


@pytest.mark.parametrize(
    ("method", "said"),
    [
        ("segment-7/llm", ["at least 7 tokens", "any token of the segment is active (above 0.25 of", "language model"]),
        ("segment-7/embedding", ["at least 7 tokens", "cosine of the segment and the explanation"]),
        ("token/llm", ["in tenths of the normaliser, 0 to 10", "how active it expects the tokens to be"]),
        ("token/lexical", ["0 to 10", "holds a token that carried the neuron before: no explanation is read"]),
        ("detection/llm", ["whole texts", "any token of the text is active (above 0.25 of", "the texts to be"]),
        ("similarity/embedding", ["whole texts", "cosine of the text and the explanation"]),
        ("text/lexical", ["any token of the text is active", "no explanation is read"]),
    ],
)
def test_every_method_is_defined(method: str, said: list[str]):
    text = definition(method, ScoreSection(segment_tokens=7, active_above=0.25))
    assert all(words in text for words in said), text
    assert "{" not in text


def test_intervals_stand_beside_their_numbers():
    numbers = {"fvu": 0.2, "l0": 8.0, "ce_clean": 3.0, "intervals": {"fvu": [0.1, 0.3], "l0": [None, None]}}
    assert list(flat_fidelity({**numbers, "definitions": {"fvu": "fvu/v1"}}).items()) == [
        ("fvu", 0.2),
        ("fvu_low", 0.1),
        ("fvu_high", 0.3),
        ("l0", 8.0),
        ("l0_low", None),
        ("l0_high", None),
        ("ce_clean", 3.0),
    ]


@pytest.mark.parametrize("architecture", ["relu", "topk", "batchtopk", "jumprelu", "matryoshka"])
def test_the_line_that_makes_latents_by_hand_makes_the_saes_latents(architecture: str, tmp_path: Path):
    """The card's code on the tensors of a saved SAE of every architecture, against the SAE itself."""
    import torch
    from safetensors.torch import load_file

    from safesail import Sae
    from safesail.sae.config import SaeConfig

    k = 3 if architecture in ("topk", "batchtopk", "matryoshka") else None
    config = SaeConfig(d_in=4, d_sae=8, k=k, coefficient=None if k else 0.1, architecture=architecture, hook_point="h")
    weights = [torch.randn(shape, generator=torch.Generator().manual_seed(1)) for shape in ((4, 8), 8, (8, 4), 4)]
    threshold = torch.linspace(0, 0.7, 8) if config.has_threshold else None
    sae = Sae(config, *weights, threshold=threshold)
    sae.save(tmp_path)
    x = torch.randn(20, 4, generator=torch.Generator().manual_seed(2))
    names: dict[str, Any] = {"w": load_file(tmp_path / "sae_weights.safetensors")}
    w = names["w"]
    names["a"] = (x - w["b_dec"]) @ w["W_enc"] + w["b_enc"]
    exec(_latents_by_hand({"architecture": architecture, "k": k}), names)
    if architecture == "topk":
        names["latents"] = torch.zeros(20, 8).scatter_(1, names["indices"], names["values"])
    torch.testing.assert_close(names["latents"], sae.encode(x))


def test_what_a_variant_s_name_says_is_true_of_its_architecture():
    sweep = [sae_row("a/b", name, 1.0) for name in ("topk", "batchtopk", "matryoshka")]
    assert _sparsity_settings(sweep) == [
        "topk `k32`: at most 32 active latents per token",
        "batchtopk and matryoshka `k32`: 32 active latents per token on average in training "
        "(L0 in the table: as measured)",
    ]
    assert _sparsity_settings([sae_row("a/b", "relu", 1.0)]) == ["relu `c0.1`: the coefficient of the L1 penalty"]


def test_both_kinds_of_table_by_hand():
    assert markdown(["a", "b"], [["1", "2"]]) == "| a | b |\n|---|---|\n| 1 | 2 |"
    assert aligned(["a", "bb"], [["long", "2"]]) == "a     bb\nlong   2"


# --- the cards of a run -------------------------------------------------------------------------------------------


@pytest.fixture(params=PARTS)
def card(request: pytest.FixtureRequest, release: Path) -> str:
    return (release / request.param / "README.md").read_text(encoding="utf-8")


def without_version(text: str) -> str:
    return re.sub(r"(safesail |safesail==|version = \{)\d+\.\d+\.\d+", r"\1X", text)


@pytest.mark.parametrize("name", GOLDEN_FILES)
def test_the_cards_of_the_invented_release_are_the_golden_ones(made: Path, name: str):
    """`python tests/made_release.py` writes them anew."""
    golden = (GOLDEN / name).read_text(encoding="utf-8")
    assert without_version((made / name).read_text(encoding="utf-8")) == without_version(golden)


def test_an_absent_fact_removes_its_line(made: Path, tmp_path: Path):
    """Of a local explainer without refusals and without methods that ask or say yes and no."""
    settings = {"explain": {"backend": "local", "model": "", "languages": ["en"]}}
    settings |= {"score": {"methods": ["text-embedding"], "backend": "local", "model": ""}}
    said = [row | {"cost_usd": 0.0} for row in made_explanations() if row["language"] == "en"]
    scores = [
        asked(row["status"], method="similarity/embedding", neuron_id=row["neuron_id"], n_active=5, n_texts=4)
        | {"simulator": "e", "low": None, "high": None, "detail": ""}
        for row in said
    ]
    recipe = made_recipe(tmp_path, **settings)
    folder = made_release(tmp_path, recipe, explanations=said, scores=scores, explained={})
    text, full = ((run / "neurons/README.md").read_text(encoding="utf-8") for run in (folder, made))
    for line in ("Refused explanations by", "Confusion counts", "| no price was given |", "The main table shows"):
        assert line in full
        assert line not in text
    for line in ("Explained by m, the model under study itself, in en (", "The explainer is the model under study"):
        assert line in text
        assert line not in full
    assert "| explanations | 600 | 120 | 0 |" in text


def test_a_hostile_explanation_is_text_in_the_card(made: Path):
    text = (made / "neurons/README.md").read_text(encoding="utf-8")
    assert HOSTILE_EXPLANATION not in text
    assert "<script>" not in text
    assert md_cell(HOSTILE_EXPLANATION) in text


def test_pair_sets_of_ones_own_are_named_without_their_place(made: Path):
    assert "own-pairs.jsonl" in (made / "saes/README.md").read_text(encoding="utf-8")
    assert json.loads((made / "saes/config.json").read_text())["selected_by"]["pairs"] == ["own-pairs.jsonl"]


def test_the_card_shows_the_curve_that_lies_beside_it(release: Path):
    (shown,) = re.findall(r"!\[[^\]]+\]\(([^)]+)\)", (release / "saes/README.md").read_text(encoding="utf-8"))
    assert shown == "curve.svg"
    assert (release / "saes" / shown).read_text(encoding="utf-8").startswith("<svg ")


@pytest.mark.parametrize(
    ("licences", "said"),
    [(["mit", "mit"], "mit"), (["mit", "apache-2.0"], "other"), (["mixed"], "other"), ([""], "other")],
)
def test_excerpts_have_the_licence_of_their_sources_or_other(licences: list[str], said: str):
    assert licence_of_texts(licences)["license"] == said


def test_the_front_matter_parses_as_what_it_is(demo_run: Path):
    from huggingface_hub import DatasetCard, ModelCard, SpaceCard

    model = ModelCard.load(demo_run / "saes/README.md").data
    assert (model.library_name, model.license, model.base_model) == (
        "safesail",
        "apache-2.0",
        "safesail-tests/tiny-llama",
    )
    assert model.language == ["en"]
    assert {"sparse-autoencoder", "safety"} <= set(model.tags)
    for part, licence in (("neurons", "apache-2.0"), ("examples", "cc0-1.0")):  # excerpts have their sources' licence
        data = DatasetCard.load(demo_run / part / "README.md").data
        assert data.license == licence
        assert [config["config_name"] for config in data.configs if config.get("default")] == [part]
    examples = DatasetCard.load(demo_run / "examples/README.md").data.to_dict()
    assert examples["extra_gated_heading"]
    assert examples["extra_gated_prompt"]
    space = SpaceCard.load(demo_run / "inspector/README.md").data
    assert (space.sdk, space.app_file) == ("gradio", "app.py")
    assert space.datasets[0].endswith("-neurons")
    assert space.models[0].endswith("-saes")


def test_the_results_in_the_front_matter_are_those_of_the_selected_saes(release: Path):
    """Values and intervals, by definition id; the model-index holds an interval in the arguments of its metric."""
    from huggingface_hub import ModelCard

    manifest = json.loads((release / "saes/config.json").read_text())
    measured = {sae["id"]: sae for sae in manifest["saes"] if sae["selected"]}
    results = ModelCard.load(release / "saes/README.md").data.eval_results
    found = set()
    for result in results:
        key, sae_id = result.metric_type.partition("/")[0], result.metric_args["sae"]
        sae = measured[sae_id]
        assert result.metric_value == pytest.approx(sae[key], rel=1e-5)
        ends = None if sae[f"{key}_low"] is None else pytest.approx([sae[f"{key}_low"], sae[f"{key}_high"]], rel=1e-5)
        assert result.metric_args.get("interval") == ends
        assert result.dataset_config == ("pairs" if key in ("i_cdf", "above_null") else None)
        found.add((sae_id, result.metric_type))
    keys = (*FIDELITY, "i_cdf", "above_null")
    assert found == {(i, f"{key}/v1") for i, sae in measured.items() for key in keys if sae[key] is not None}


@pytest.mark.parametrize("part", PARTS)
def test_a_card_s_data_survive_the_hub_s_own_classes(release: Path, part: str):
    """Read by RepoCard and by the class of its kind, and by metadata_load: nothing is lost or refused."""
    import yaml
    from huggingface_hub import DatasetCard, ModelCard, RepoCard, SpaceCard, metadata_load

    path = release / part / "README.md"
    text = path.read_text(encoding="utf-8")
    front = yaml.safe_load(text.split("---\n")[1])
    assert metadata_load(path) == front
    kind = {"saes": ModelCard, "inspector": SpaceCard}.get(part, DatasetCard)
    for card in (RepoCard(text), kind(text), kind(str(kind(text)))):
        assert card.data.to_dict() == front
        assert yaml.safe_load(card.data.to_yaml()) == front


def test_the_relation_to_base_model_and_data_sets_is_said_of_hub_ids_alone(made: Path, tmp_path: Path):
    from huggingface_hub import ModelCard, SpaceCard

    data = ModelCard.load(made / "saes/README.md").data.to_dict()
    assert (data["base_model"], data["base_model_relation"]) == ("tests/tiny", "adapter")
    assert data["datasets"] == ["made/talk"]  # not the local file of the other source
    local = made_recipe(tmp_path, model={"base_model": "", "path": "/models/own"}, corpus={"sources": [LOCAL_SOURCE]})
    folder = made_release(tmp_path, local)
    data = ModelCard.load(folder / "saes/README.md").data.to_dict()
    assert not {"base_model", "base_model_relation", "datasets"} & set(data)
    assert SpaceCard.load(folder / "inspector/README.md").data.models == ["your-organization/made-saes"]
    assert "huggingface.co/own" not in (folder / "saes/README.md").read_text(encoding="utf-8")


LOCAL_SOURCE = {"path": "none.jsonl", "origin": "made texts", "licence": "mit"}


def test_codes_with_a_script_stand_beside_the_hub_s_codes(made: Path):
    from huggingface_hub import DatasetCard

    data = DatasetCard.load(made / "neurons/README.md").data.to_dict()
    assert (data["language"], data["language_bcp47"]) == (["en", "zh"], ["en", "zh-Hant"])
    assert "language_bcp47" not in DatasetCard.load(made / "examples/README.md").data.to_dict()


@pytest.mark.parametrize(
    ("n_rows", "said"), [(0, "n<1K"), (999, "n<1K"), (1000, "1K<n<10K"), (99_999, "10K<n<100K"), (10**9, "10M<n<100M")]
)
def test_the_size_of_a_data_set_is_the_hub_s_category(n_rows: int, said: str):
    assert _size(n_rows) == said


@pytest.mark.parametrize(("gate", "said"), [("manual", "the owner decides"), ("auto", "agree to the terms on")])
def test_the_examples_say_how_access_is_given(tmp_path: Path, gate: str, said: str):
    from huggingface_hub import DatasetCard

    folder = made_release(tmp_path, made_recipe(tmp_path, publish={"gate": gate}))
    card = DatasetCard.load(folder / "examples/README.md")
    data = card.data.to_dict()
    assert said in card.text
    assert ("A person decides" in data["extra_gated_description"]) == (gate == "manual")
    kinds = [field if isinstance(field, str) else field["type"] for field in data["extra_gated_fields"].values()]
    assert kinds == ["text", "select", "checkbox", "checkbox"]
    assert data["extra_gated_button_content"]
    assert "not-for-all-audiences" in data["tags"]


def test_the_space_names_versions_that_the_package_allows(made: Path):
    from importlib.metadata import metadata, requires

    from huggingface_hub import SpaceCard
    from packaging.requirements import Requirement
    from packaging.specifiers import SpecifierSet

    data = SpaceCard.load(made / "inspector/README.md").data.to_dict()
    extras = [Requirement(line) for line in requires("safesail") or [] if 'extra == "space"' in line.replace("'", '"')]
    (gradio,) = [requirement for requirement in extras if requirement.name == "gradio"]
    assert gradio.specifier.contains(data["sdk_version"])
    assert SpecifierSet(metadata("safesail")["Requires-Python"]).contains(data["python_version"])
    assert len(data["short_description"]) <= 60
    assert "hf_oauth" not in data  # the app asks nobody to log in
    assert data["suggested_hardware"] == "cpu-basic"


def test_every_column_of_every_table_is_explained_and_no_other(release: Path):
    import pyarrow.parquet as pq

    used = set()
    for path in (release / "neurons").rglob("*.parquet"):
        names = pq.read_schema(path).names
        text = markdown(*column_table(path))
        assert all(f"`{name}`" in text for name in names), path
        used |= {name for column in names for name in (column, f"{path.parent.name}/{column}")}
    used |= set(pq.read_schema(release / "examples/examples/train.parquet").names)
    used |= {"l0_t"} if any(name.startswith("l0_t_") for name in used) else set()
    explained = {name for names in COLUMNS for name in names.split(", ")}
    assert explained <= used


def test_a_column_that_nobody_explained_is_an_error():
    with pytest.raises(KeyError):
        meaning("made_up")
    assert meaning("fvu_low") == meaning("fvu")
    assert meaning("l0_t_0.25_null") == meaning("l0_t_0")
    assert meaning("language", "pairs") != meaning("language", "scores")


def test_the_row_that_a_card_shows_is_one_of_its_table(release: Path):
    import pyarrow.parquet as pq

    text = (release / "neurons/README.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```json\n(.*?)\n```\n", text, flags=re.S)
    shown = json.loads(block)
    table = pq.read_table(release / "neurons/neurons/train.parquet")
    (row,) = [row for row in table.to_pylist() if row["neuron_id"] == shown["neuron_id"]]
    assert list(shown) == table.schema.names
    assert shown == {
        name: pytest.approx(value, rel=1e-5) if isinstance(value, float) else value for name, value in row.items()
    }


def test_the_papers_are_cited_as_in_the_citation_file(made: Path):
    import yaml

    card = (made / "saes/README.md").read_text(encoding="utf-8")
    (cited,) = yaml.safe_load((asset("cards").parent / "CITATION.cff").read_text(encoding="utf-8"))["references"]
    authors = " and ".join(f"{name['family-names']}, {name['given-names']}" for name in cited["authors"])
    assert f"author = {{{authors}}}" in card
    assert f"title = {{{cited['title']}}}" in card
    assert f"url = {{{cited['url']}}}" in card
    assert f"note = {{{cited['identifiers'][0]['value']}}}" in card


# --- the code in the cards ----------------------------------------------------------------------------------------


def snippets(release: Path, part: str) -> list[str]:
    """The Python of a card, reading the folders in place of the Hub's repositories."""
    text = (release / part / "README.md").read_text(encoding="utf-8")
    (name,) = set(re.findall(r"huggingface\.co/(?:datasets/)?(your-organization/[^-`)]+)-", text))
    for other in PARTS:
        text = text.replace(f'"{name}-{other}"', json.dumps(str(release / other)))
    text = re.sub(r'hf_hub_download\("([^"]+)", "([^"]+)"\)', r'"\1/\2"', text)
    return re.findall(r"```python\n(.*?)```", text, flags=re.S)


def test_both_ways_to_load_an_sae_give_the_same_latents(release: Path):
    import torch

    results = []
    for code in snippets(release, "saes"):
        if "sae_lens" not in code:
            torch.manual_seed(0)
            names: dict[str, Any] = {}
            exec(code, names)
            results.append(names)
    ours, plain = results
    torch.testing.assert_close(ours["x"], plain["x"])
    by_hand = torch.zeros_like(ours["latents"]).scatter_(1, plain["indices"], plain["values"])
    torch.testing.assert_close(by_hand, ours["latents"])
    assert ours["x_hat"].shape == ours["x"].shape


def test_saelens_loads_what_the_card_names(made: Path):
    sae_lens = pytest.importorskip("sae_lens")
    (code,) = [code for code in snippets(made, "saes") if "sae_lens" in code]
    folder, sae_id = re.findall(r'from_pretrained\("([^"]+)", "([^"]+)"\)', code)[0]
    assert sae_lens.SAE.load_from_disk(f"{folder}/{sae_id}").cfg.d_sae == 16


def test_the_data_sets_load_as_their_cards_say(release: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    names: dict[str, Any] = {}
    for code in (*snippets(release, "neurons"), *snippets(release, "examples")):
        exec(code, names)
    assert len(names["neurons"]) == len(names["database"])
    assert names["neurons"].column_names[0] == "explanation"
    assert len(names["examples"]) > 0


# --- the text of a card -------------------------------------------------------------------------------------------


def test_a_card_has_one_title_and_no_unfilled_place(card: str):
    body = card.split("---\n", 2)[2]
    assert len(re.findall(r"^# ", re.sub(r"```.*?```", "", body, flags=re.S), flags=re.M)) == 1
    assert not re.search(r"\bNone\b|\{\{|\}\}|\{%|%\}|\bnan\b|\(\)", re.sub(r"`[^`]*`", "", body)), body
    assert not re.search(r"\bNone\b|\{\{", card.replace("{{The safesail authors}}", ""))


def test_every_row_of_a_table_has_as_many_cells_as_its_header(card: str):
    text = re.sub(r"```.*?```", "", card, flags=re.S)
    tables = re.findall(r"(?:^\|.*\n?)+", text, flags=re.M)
    n_rows = 0
    for table in tables:
        lines = table.rstrip("\n").split("\n")
        assert re.fullmatch(r"\|(-+\|)+", lines[1]), table
        widths = {len(re.split(r"(?<!\\)\|", re.sub(r"`[^`]*`", "", line))) for line in lines}
        assert len(widths) == 1, table
        assert all(line.endswith("|") for line in lines)
        n_rows += len(lines) - 2
    assert n_rows > 0 or "token inspector" in card


def test_a_card_renders_every_table_it_holds(card: str):
    """No blank line or stray word cuts a table in two: a Markdown parser sees as many rows as there are lines."""
    markdown_it = pytest.importorskip("markdown_it")
    body = re.sub(r"```.*?```", "", card.split("---\n", 2)[2], flags=re.S)
    tokens = markdown_it.MarkdownIt("commonmark").enable("table").parse(body)
    n_lines = sum(line.startswith("|") for line in body.splitlines())
    n_tables = sum(token.type == "table_open" for token in tokens)
    assert sum(token.type == "tr_open" for token in tokens) == n_lines - n_tables
    inline = [child.type for token in tokens for child in token.children or []]
    assert "html_inline" not in inline
    assert "html_block" not in [token.type for token in tokens]


def test_nothing_published_names_a_local_path(release: Path):
    local = {
        str(release),
        str(release.parent),
        tempfile.gettempdir() + "/",
        str(asset("cards").parent),
        str(Path.home()),
    }
    n_files = 0
    for part in PARTS:
        for path in (release / part).rglob("*"):
            if path.suffix in {".md", ".json"}:
                n_files += 1
                text = path.read_text(encoding="utf-8")
                assert not [place for place in local if place in text], path
    assert n_files > 10


def test_no_column_of_a_published_table_names_a_local_path(release: Path):
    import pyarrow.parquet as pq

    for part in ("neurons", "examples"):
        for path in (release / part).rglob("*.parquet"):
            text = json.dumps(pq.read_table(path).to_pylist())
            assert tempfile.gettempdir() + "/" not in text, path


def test_the_code_of_a_card_names_what_exists(release: Path):
    text = (release / "saes/README.md").read_text(encoding="utf-8")
    (hook_point,) = re.findall(r'Sae\.from_pretrained\("[^"]+-saes", "([^"]+)"\)', text)
    (sae_id,) = re.findall(r'SAE\.from_pretrained\("[^"]+-saes", "([^"]+)"\)', text)
    manifest = json.loads((release / "saes/config.json").read_text())
    assert manifest["selected"][hook_point] == sae_id
    assert (release / "saes" / sae_id / "sae_weights.safetensors").is_file()
    for block in re.findall(r"```python\n(.*?)```", text, flags=re.S):
        compile(block, "card", "exec")


def test_the_numbers_of_the_neurons_card_are_those_of_its_table(release: Path):
    import pyarrow.parquet as pq

    rows = pq.read_table(release / "neurons/neurons/train.parquet").to_pylist()
    text = (release / "neurons/README.md").read_text(encoding="utf-8")
    n_weak = sum(row["score"] is not None and row["score"] <= 0.2 for row in rows)
    assert f"activation statistics of {len(rows)} safety-related latents" in text
    n_scored = sum(row["score"] is not None for row in rows)
    assert f"{n_weak} of {n_scored} score 0.2 or less" in text
    assert f"| all | {len(rows)} |" in text
