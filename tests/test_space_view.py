"""What the Space writes of an inspection, a neuron and a search: pure functions, checked by the text they show."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from html.parser import HTMLParser
from types import ModuleType
from typing import Any

import pytest
from hand_inspection import FIRST, SECOND, hand_database, hand_inspection

from safesail.diagnosis.inspection import Hit
from safesail.diagnosis.inspector import Promoted
from safesail.examples import Example
from safesail.neurons import NeuronDatabase

HOSTILE = "<script>window.pwned=1</script> &lt; \" ' {{7*7}} ${window.pwned=2}"


@pytest.fixture(scope="module")
def markup(space: Callable[[str], ModuleType]) -> ModuleType:
    return space("markup")


@pytest.fixture(scope="module")
def charts(space: Callable[[str], ModuleType]) -> ModuleType:
    return space("charts")


@pytest.fixture(scope="module")
def view(space: Callable[[str], ModuleType]) -> ModuleType:
    return space("view")


@pytest.fixture(scope="module")
def card(space: Callable[[str], ModuleType]) -> ModuleType:
    return space("card")


@pytest.fixture(scope="module")
def browse(space: Callable[[str], ModuleType]) -> ModuleType:
    return space("browse")


# --- HTML, read back ----------------------------------------------------------------------------------------------


@dataclass
class Element:
    """An element as a browser would see it."""

    name: str
    attributes: dict[str, str | None]
    children: list["Element | str"] = field(default_factory=list)

    @property
    def text(self) -> str:
        return "".join(child if isinstance(child, str) else child.text for child in self.children)

    def all(self, name: str) -> "list[Element]":
        """The elements of a name below this one."""
        return [element for element in self._below() if element.name == name]

    def _below(self) -> "Iterator[Element]":
        for child in self.children:
            if isinstance(child, Element):
                yield child
                yield from child._below()


class Reader(HTMLParser):
    """Builds the tree of elements; every element that is opened has to be closed."""

    def __init__(self) -> None:
        super().__init__()
        self.open = [Element("", {})]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        element = Element(tag, dict(attrs))
        self.open[-1].children.append(element)
        self.open.append(element)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop().name == tag

    def handle_data(self, data: str) -> None:
        self.open[-1].children.append(data)


def read(html: str) -> Element:
    reader = Reader()
    reader.feed(str(html))
    reader.close()
    [root] = reader.open
    return root


def table_rows(html: str) -> list[list[str]]:
    """The body rows of a table, as the texts of their cells."""
    return [[cell.text for cell in row.all("td")] for body in read(html).all("tbody") for row in body.all("tr")]


# --- markup -------------------------------------------------------------------------------------------------------


def test_whatever_is_no_markup_is_text(markup: ModuleType):
    html = markup.tag("p", HOSTILE, [HOSTILE, [HOSTILE, markup.tag("b", HOSTILE)]], None, [], "", 3, title=HOSTILE)
    paragraph = read(html).children[0]
    assert isinstance(paragraph, Element)
    assert paragraph.text == HOSTILE * 4 + "3"
    assert paragraph.attributes == {"title": HOSTILE}
    assert [element.name for element in paragraph._below()] == ["b"]
    assert "<script" not in html


def test_attributes_by_their_names_and_values(markup: ModuleType):
    html = markup.tag("td", class_="a b", data_label="x", tabindex=0, data_focus=True, lang=None, hidden=False)
    assert html == '<td class="a b" data-label="x" tabindex="0" data-focus></td>'


def test_pieces_are_joined_without_being_escaped_twice(markup: ModuleType):
    once = markup.joined("a & b", markup.Markup("&amp;"))
    assert once == "a &amp; b&amp;"
    assert markup.joined(once, [once]) == once + once
    assert isinstance(markup.joined(), markup.Markup)


# --- charts -------------------------------------------------------------------------------------------------------


def test_bars_are_shares_of_the_longest_and_buttons_where_they_narrow(charts: ModuleType):
    rows = [charts.Bar("Weapons", 1200, "weapons"), charts.Bar("Insult", 300, "insult"), charts.Bar("Without", 600)]
    items = read(charts.bars("Categories", "category", rows)).all("li")
    assert [item.text for item in items] == ["Weapons1,200", "Insult300", "Without600"]
    assert [item.attributes["style"] for item in items] == ["--share:1.0000", "--share:0.2500", "--share:0.5000"]
    buttons = [button.attributes for item in items for button in item.all("button")]
    assert [(button["data-kind"], button["data-value"]) for button in buttons] == [
        ("category", "weapons"),
        ("category", "insult"),
    ]


def test_columns_have_their_number_above_and_their_range_below(charts: ModuleType):
    section = read(charts.columns("Scores", [("< .1", 2), (".1", 0), (".2", 8)], "One without <a> score."))
    assert [item.text for item in section.all("li")] == ["2< .1", "0.1", "8.2"]
    shares = [span.attributes.get("style") for span in section.all("span") if span.attributes["class"] == "column"]
    assert shares == ["--share:0.2500", "--share:0.0000", "--share:1.0000"]
    assert section.all("p")[0].text == "One without <a> score."
    assert not read(charts.columns("Scores", [("a", 0)])).all("p")


def test_charts_of_nothing_are_empty(charts: ModuleType):
    assert read(charts.bars("Categories", "category", [])).all("li") == []
    assert read(charts.columns("Scores", [])).all("li") == []


@pytest.mark.parametrize(("value", "shown"), [(None, "–"), (0.834, "0.83"), (-0.05, "−0.05"), (12, "12.00")])
def test_numbers_have_a_true_minus_sign(charts: ModuleType, value: float | None, shown: str):
    assert charts.number(value) == shown


def test_shares_are_in_per_cent(charts: ModuleType):
    assert (charts.percent(0.0213), charts.percent(None)) == ("2.13%", "–")


# --- tokens -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (" bomb", "bomb"),
        ("bomb", "bomb"),
        ("\n\n", "⏎⏎"),
        ("  ", "␣␣"),
        ("\t", "⇥"),
        (".\n", ".⏎"),
        ("   x", "␣␣␣x"),
        ("a b", "a b"),
        ("\x08", "U+0008"),
        ("\ufe0f", "U+FE0F"),
        ("<|im_start|>", "<|im_start|>"),
        ("你好", "你好"),
    ],
)
def test_tokens_are_shown_as_themselves(view: ModuleType, text: str, shown: str):
    assert view.visible(text) == shown


@pytest.mark.parametrize(
    ("text", "spoken"),
    [(" bomb", "' bomb'"), ("\n", "line break"), (" \t", "space, tab"), ("\u00a0", "no-break space")],
)
def test_blank_tokens_are_named(view: ModuleType, text: str, spoken: str):
    assert view._spoken(text) == spoken


def test_the_strip_tells_prompt_and_answer_apart(view: ModuleType):
    inspection = hand_inspection()
    strip = view.strip(inspection, [0, 0.7, 1.5, 0.456, 0, 0, 1.1, 0.5], 2)
    prompt, answer = strip["sections"]
    assert (prompt["name"], prompt["first"], len(prompt["tokens"])) == ("Prompt", 0, 6)
    assert (answer["name"], answer["first"], len(answer["tokens"])) == ("Answer", 6, 2)
    assert strip["selected"] == 2
    tokens = prompt["tokens"] + answer["tokens"]
    assert [token["text"] for token in tokens] == ["<|s|>", "a", "bomb", "é", "⏎", "<|e|>", "river", "Bomb"]
    assert [token["strength"] for token in tokens] == [0, 0.7, 1, 0.456, 0, 0, 1, 0.5]
    assert [token["value"] for token in tokens] == ["", "0.70", "1.50", "", "", "", "1.10", "0.50"]
    assert [token["gap"] for token in tokens] == [False, True, True, False, False, False, True, False]
    labels = [tokens[i]["label"] for i in (0, 1, 4)]
    assert labels == ["token 1 '<|s|>' special token", "token 2 ' a' strength 0.70", "token 5 line break strength 0.00"]
    assert (tokens[4]["ends_line"], tokens[4]["blank"], tokens[5]["special"]) == (True, True, True)


def test_a_prompt_without_an_answer_is_one_section(view: ModuleType):
    inspection = hand_inspection()
    object.__setattr__(inspection, "n_prompt", 9)
    assert [section["name"] for section in view.strip(inspection, [0] * 8, 0)["sections"]] == ["Prompt"]


def test_the_strongest_token_is_selected_first(view: ModuleType):
    inspection = hand_inspection()
    assert view.strongest(inspection, [0, 0.1, 0, 0.3, 0, 0, 0.3, 0]) == 3
    assert view.strongest(inspection, [0] * 8) == 1  # the first that the token policy counts


# --- the selected token -------------------------------------------------------------------------------------------


def test_the_headline_says_what_the_saes_miss(view: ModuleType):
    """Of the unit of tokens 3 and 4 the mean of 0.3 and 0.4."""
    html = read(view.headline(hand_inspection(), 3, 2.0, "#/inspect?a=1&b=2"))
    assert html.text == (
        "Token 4 é of the prompt. Strength 2.00. Share of the activation that the SAE misses: "
        "layers.0.mlp 35%, layers.1.mlp 50%. Link to this token"
    )
    assert html.all("a")[0].attributes["href"] == "#/inspect?a=1&b=2"
    assert "of the answer" in view.headline(hand_inspection(), 7, 1.0, "")


def test_the_headline_of_a_token_that_is_left_out_says_why(view: ModuleType):
    html = read(view.headline(hand_inspection(), 5, 0.0, ""))
    assert html.text == (
        "Token 6 <|e|> of the prompt. A special token: the token policy leaves it out. It has no neurons. "
        "Link to this token"
    )


def test_the_neurons_of_a_token_are_rows(view: ModuleType):
    inspection = hand_inspection()
    html = view.hit_table(inspection, 2, inspection.hits(2), "", "")
    assert read(html).all("caption")[0].text == "Neurons that fire on token 3"
    assert table_rows(html) == [
        ["2.00", "not explained; fires here on “bomb”, “a”layers.0.mlp/5", "–", "unexplained"],
        ["1.50", "Bombslayers.0.mlp/1", "Terror", "0.50, good 0.40 to 0.60"],
        ["0.50", "not explained (refused); fires here on “river”, “bomb”layers.1.mlp/3", "Violence", "undefined"],
        ["0.20", "Weak wordslayers.1.mlp/4", "TerrorViolence", "0.10, weak 0.00 to 0.20"],
    ]
    buttons = read(html).all("button")
    assert [(b.attributes["data-kind"], b.attributes["data-value"]) for b in buttons] == [
        ("neuron", f"{FIRST}/5"),
        ("neuron", f"{FIRST}/1"),
        ("neuron", f"{SECOND}/3"),
        ("neuron", f"{SECOND}/4"),
    ]


def test_an_explanation_in_another_language_is_marked(view: ModuleType):
    inspection = hand_inspection()
    said = [row[1] for row in table_rows(view.hit_table(inspection, 2, inspection.hits(2), "zh", ""))]
    assert said[1] == "炸弹layers.0.mlp/1"
    assert said[3] == "Weak words (en)layers.1.mlp/4"


def test_a_latent_that_never_fired_in_the_corpus_has_no_strength(view: ModuleType):
    inspection = hand_inspection()
    html = view.hit_table(inspection, 4, inspection.hits(4), "", "")
    assert table_rows(html)[0][0] == "–"
    assert 'style="--strength:0.000"' in html


def test_more_than_a_hundred_neurons_are_counted_and_the_strongest_shown(view: ModuleType):
    inspection = hand_inspection()
    scored = (0.5, 0.4, 0.6, "good", "", "", "ok")
    hits = [Hit(f"{FIRST}/{i}", FIRST, i, 2.0, 1.0, "Bombs", ["terror"], *scored) for i in range(1234)]
    html = view.hit_table(inspection, 2, hits, "", "")
    assert read(html).all("caption")[0].text == "Neurons that fire on token 3, the strongest 100 of 1,234"
    assert len(table_rows(html)) == 100
    exactly = view.hit_table(inspection, 2, hits[:100], "", "")
    assert read(exactly).all("caption")[0].text == "Neurons that fire on token 3"


def test_a_token_without_neurons_says_why(view: ModuleType):
    assert view.hit_table(hand_inspection(), 2, [], "", "None <b> here.") == "<p>None &lt;b&gt; here.</p>"


def test_hostile_explanations_and_ids_stay_text(view: ModuleType):
    database = hand_database()
    database.neurons[f"{FIRST}/1"]["explanation"] = HOSTILE
    inspection = hand_inspection(database)
    html = view.hit_table(inspection, 3, inspection.hits(3), "", "")
    assert table_rows(html)[0][1] == f"{HOSTILE}layers.0.mlp/1"
    assert "<script" not in html


# --- where a neuron fires -----------------------------------------------------------------------------------------


def test_the_places_where_a_neuron_fires_in_their_contexts(view: ModuleType):
    inspection = hand_inspection()
    html = read(view.firings(inspection, f"{FIRST}/1", inspection.firings(f"{FIRST}/1")))
    assert html.all("h2")[0].text == "In this conversation it fires on 3 tokens"
    assert [item.text for item in html.all("li")] == [
        "2.00 Token 4 <|s|> a bombé⏎<|e|> river",
        "1.50 Token 3 <|s|> a bombé⏎<|e|>",
        "1.00 Token 8 é⏎<|e|> riverBomb",
    ]
    assert [mark.text for mark in html.all("mark")] == ["é", "bomb", "Bomb"]
    assert [button.attributes["data-value"] for button in html.all("button")] == ["3", "2", "7"]


def test_a_neuron_may_fire_once_often_or_never(view: ModuleType):
    inspection = hand_inspection()
    once = read(view.firings(inspection, f"{SECOND}/6", inspection.firings(f"{SECOND}/6")))
    assert once.all("h2")[0].text == "In this conversation it fires once"
    often = read(view.firings(inspection, f"{FIRST}/1", inspection.firings(f"{FIRST}/1") * 10))
    assert often.all("h2")[0].text == "In this conversation it fires on 30 tokens, the strongest 24 shown"
    assert len(often.all("li")) == 24
    assert view.firings(inspection, f"{FIRST}/3", []) == "<p>It fires nowhere in this conversation.</p>"


# --- links and words ----------------------------------------------------------------------------------------------


def test_links_are_encoded(view: ModuleType):
    assert view.neuron_link("layers.9.mlp/12") == "#/neuron/layers.9.mlp/12"
    link = view.inspection_link({"prompt": "a&b #1 你\n", "mode": "chat", "temperature": 0.5}, 4)
    assert link == "#/inspect?prompt=a%26b%20%231%20%E4%BD%A0%0A&mode=chat&temperature=0.5&token=5"


def test_a_score_with_its_interval_and_a_plain_word(view: ModuleType):
    assert view.score_words(-0.05, -0.2, 0.1, "weak") == "−0.05 (−0.20 to 0.10), weak"
    assert view.score_words(0.5, None, None, "good") == "0.50, good"
    assert view.score_words(None, None, None, "undefined") == "undefined"
    assert read(view.score_cell(-0.05, -0.2, 0.1, "weak")).text == "−0.05, weak −0.20 to 0.10"
    assert read(view.score_cell(None, None, None, "undefined")).text == "undefined"
    assert view.title("sexual-health") == "Sexual health"


# --- a neuron's card ----------------------------------------------------------------------------------------------


def database_with_facts() -> NeuronDatabase:
    """The hand database with all that a card tells of the first neuron, in two languages and by two methods."""
    database, id = hand_database(), f"{FIRST}/1"
    database.neurons[id] |= {
        "lexical_score": 0.18,
        "concept": "car bomb",
        "snippet": "… a c*** was …",
        "candidate_for": ["terror", "sexual-health"],
        "n_wins": 5,
        "q_value": 0.0625,
        "tagger": "a tagger",
    }
    database.quantiles[id] |= {
        "firing_rate": 0.02,
        "max": 6.5,
        "n_tokens": 1200,
        "p50": 0.0,
        "p90": None,
        "p999": 2.0,
        "histogram": [0, 3, 0, 0, 18, 0, 0, 0, 0, 2],
    }
    llm = {"method": "segment-5/llm", "simulator": "m", "language": "en", "score": 0.5, "low": 0.4, "high": 0.6}
    lexical = {"method": "segment-5/lexical", "simulator": "", "language": "", "score": None, "low": None, "high": None}
    database.scores[id] = [
        {**llm, "auroc": 0.75, "n_units": 1040, "status": "ok"},
        {**lexical, "auroc": None, "n_units": None, "status": "refused"},
    ]
    return database


def facts_of(html: Element) -> dict[str, str]:
    terms = zip(html.all("dt"), html.all("dd"), strict=True)
    return {term.text: said.text for term, said in terms}


def test_the_card_of_an_explained_neuron(card: ModuleType):
    promoted = [Promoted(5, " bomb", 3.0), Promoted(6, "\n", 2.0)]
    html = read(card.card(database_with_facts(), f"{FIRST}/1", "", promoted, linked=True))
    assert html.all("article")[0].attributes["aria-label"] == "Neuron layers.0.mlp/1"
    heading = html.all("h2")[0]
    assert heading.text == "Bombs"
    assert {"data-focus", "tabindex"} <= heading.attributes.keys()
    assert html.all("p")[0].text == "layers.0.mlp/1 Terror Open in Neurons"
    assert html.all("a")[0].attributes["href"] == "#/neuron/layers.0.mlp/1"
    assert facts_of(html) == {
        "Score": "0.50 (0.40 to 0.60), good",
        "Lexical baseline": "0.18",
        "Category and concept": "Weapons · car bomb",
        "Fires on": "2.00% of the corpus's tokens",
        "Shown as 1": "an activation of 2.00",
        "Highest activation": "6.50",
        "Redacted example": "… a c*** was …",
    }
    explanations, histogram = html.all("section")
    assert [item.text for item in explanations.all("li")] == ["en Bombs", "zh 炸弹"]
    columns = [item.text for item in histogram.all("li")]
    assert columns == ["00.0", "30.1", "00.2", "00.3", "180.4", "00.5", "00.6", "00.7", "00.8", "20.9+"]
    assert histogram.all("p")[0].text == "Of 1,200 tokens. Quantiles of the activation: 50 %: 0.00, 99.9 %: 2.00."
    scores, lens = html.all("details")
    assert scores.all("summary")[0].text == "Scores by every method (2)"
    assert [[cell.text for cell in row.all("td")] for row in scores.all("tbody")[0].all("tr")] == [
        ["segment-5/llm (m)", "en", "0.50 (0.40 to 0.60), good", "0.75", "1,040"],
        ["segment-5/lexical", "any", "refused", "–", "–"],
    ]
    assert [code.text for code in lens.all("code")] == ["bomb", "⏎"]
    assert html.all("p")[2].text == (
        "Chosen by concept pairs about Terror, Sexual health (fires on the query with the concept only in 5 pairs; "
        "q = 0.0625). Explained by a model. Tagged by a tagger. Scored by a simulator."
    )


def test_the_card_where_it_stands_alone_links_to_itself(card: ModuleType):
    html = read(card.card(database_with_facts(), f"{FIRST}/1", "", [], linked=False))
    assert html.all("p")[0].text == "layers.0.mlp/1 Terror Link to this neuron"
    assert len(html.all("details")) == 1


def test_the_card_of_a_neuron_whose_explanation_failed(card: ModuleType):
    html = read(card.card(database_with_facts(), f"{SECOND}/3", "", [], linked=True))
    assert html.all("h2")[0].text == "Not explained"
    assert html.all("p")[1].text == "There is no explanation of it in any language (status: refused)."
    assert facts_of(html)["Score"] == "undefined"


def test_the_card_of_a_neuron_without_a_row(card: ModuleType):
    database = database_with_facts()
    database.quantiles[f"{FIRST}/5"] |= {"firing_rate": 0.5, "max": 9.0, "histogram": [1] * 10}
    html = read(card.card(database, f"{FIRST}/5", "zh", [Promoted(5, " bomb", 3.0)], linked=True))
    assert html.all("h2")[0].text == "A neuron without an explanation"
    assert html.all("p")[0].text.split() == ["layers.0.mlp/5", "Open", "in", "Neurons"]
    assert html.all("p")[1].text.startswith("It was not among the latents that were explained")
    assert facts_of(html) == {
        "Score": "unexplained",
        "Fires on": "50.00% of the corpus's tokens",
        "Shown as 1": "an activation of 1.00",
        "Highest activation": "9.00",
    }
    assert len(html.all("li")) == 10
    assert [code.text for code in html.all("code")] == ["layers.0.mlp/5", "bomb"]


def test_a_card_leaves_out_what_is_not_known(card: ModuleType):
    """Of a converted release statistics may be null; a latent that never fired has the normaliser 0."""
    database = hand_database()
    for unknown in ({"firing_rate": None, "normaliser": None, "max": None}, {"normaliser": 0.0}, {}):
        database.quantiles[f"{SECOND}/4"] = unknown
        html = read(card.card(database, f"{SECOND}/4", "", [], linked=True))
        assert facts_of(html) == {"Score": "0.10 (0.00 to 0.20), weak", "Category and concept": "Weapons"}


def test_a_latent_that_never_fires_has_no_histogram(card: ModuleType):
    database = hand_database()
    database.quantiles[f"{SECOND}/6"] |= {"histogram": [0] * 10, "n_tokens": 1200}
    assert read(card.card(database, f"{SECOND}/6", "", [], linked=True)).all("section") == []


def test_the_card_says_when_the_explanation_is_in_another_language(card: ModuleType):
    html = read(card.card(database_with_facts(), f"{SECOND}/4", "zh", [], linked=True))
    assert html.all("h2")[0].text == "Weak words"
    assert html.all("p")[1].text == "There is no explanation in zh (refused); this one is in en."
    assert [item.text for item in html.all("li")] == ["en Weak words", "zh none (refused)"]
    absent = read(card.card(database_with_facts(), f"{FIRST}/2", "zh", [], linked=True))
    assert absent.all("p")[1].text == "There is no explanation in zh (absent); this one is in en."
    right = read(card.card(database_with_facts(), f"{FIRST}/1", "zh", [], linked=True))
    assert right.all("h2")[0].text == "炸弹"
    assert [p for p in right.all("p") if p.attributes.get("class") == "note"] == []


# --- examples -----------------------------------------------------------------------------------------------------


def test_a_neuron_without_examples_says_why(card: ModuleType):
    assert read(card.examples_list([], 1.0)).text.startswith("No examples were collected for this neuron")


def test_examples_are_marked_by_how_strongly_the_neuron_fires(card: ModuleType):
    """The normaliser is 4: activations of 1, 6 and 0 are 0.25, 1.50 and nothing."""
    html = read(card.examples_list([Example("top", [" a", " bomb", "\n"], [1.0, 6.0, 0.0], "made texts")], 4.0))
    assert html.all("h4")[0].text == "Where it fires most"
    assert [(mark.text, mark.attributes["style"], mark.attributes["title"]) for mark in html.all("mark")] == [
        ("a", "--strength:0.250", "0.25"),
        ("bomb", "--strength:1.000", "1.50"),
    ]
    assert [sub.text for sub in html.all("sub")] == ["1.50"]
    assert [p.text for p in html.all("li")[0].all("p")] == [" a bomb1.50\n", "made texts"]


def test_examples_stand_in_groups_from_strong_to_weak(card: ModuleType):
    strata = ["top"] * 13 + ["level-3"] * 3 + ["level-10", "level-9"] + ["near-miss"] * 6
    shown = read(card.examples_list([Example(s, [s], [0.0], "") for s in strata], 1.0)).all("section")
    assert [section.all("h4")[0].text for section in shown] == [
        "Where it fires most",
        "Over its levels, from strong to weak",
        "Near-misses: they hold a word it fires on elsewhere, and it is silent",
    ]
    levels = [item.text for item in shown[1].all("li")]
    assert [len(section.all("li")) for section in shown] == [12, 4, 5]
    assert levels == ["level-10", "level-9", "level-3", "level-3"]


def test_hostile_examples_stay_text(card: ModuleType):
    hostile = Example("top", [HOSTILE, f" {HOSTILE}"], [0.0, 1.0], HOSTILE)
    html = card.examples_list([hostile], 1.0)
    assert read(html).all("li")[0].all("p")[0].text == f"{HOSTILE} {HOSTILE}1.00"
    assert "<script" not in html


# --- a search -----------------------------------------------------------------------------------------------------


def found(category: str | None, hook_point: str, score: float | None) -> dict[str, Any]:
    return {"category": category, "hook_point": hook_point, "score": score}


def test_the_neurons_found_are_counted(browse: ModuleType):
    rows = [
        found("weapons", FIRST, -0.5),
        found("weapons", SECOND, 0.05),
        found("weapons", SECOND, 0.3),
        found("sexual-health", SECOND, 0.39),
        found("", SECOND, 1.0),
        found(None, SECOND, None),
    ]
    categories, hook_points, scores = read(browse.facets(rows)).all("section")
    assert [item.text for item in categories.all("li")] == ["Weapons3", "Sexual health1", "Without a category2"]
    assert [b.attributes["data-value"] for b in categories.all("button")] == ["weapons", "sexual-health"]
    assert [item.text for item in hook_points.all("li")] == ["layers.1.mlp5", "layers.0.mlp1"]
    assert {b.attributes["data-kind"] for b in hook_points.all("button")} == {"hook_point"}
    assert [item.text for item in scores.all("li")] == [
        *("2< .1", "0.1", "0.2", "2.3", "0.4", "0.5", "0.6", "0.7", "0.8", "1.9"),
    ]
    assert scores.all("p")[0].text == "1 without a score."


def test_the_found_neurons_are_rows_with_a_button_each(browse: ModuleType):
    database = database_with_facts()
    database.neurons[f"{FIRST}/9"] = {**database.neurons[f"{FIRST}/2"], "neuron_id": f"{FIRST}/9", "status": "ok"}
    database.neurons[f"{FIRST}/9"] |= {"explanation": None, "score": None, "category": None}
    rows = [database.neurons[f"{name}/{j}"] for name, j in ((FIRST, 1), (SECOND, 3), (SECOND, 4), (FIRST, 9))]
    assert table_rows(browse.found_table(database, rows, "zh", 50)) == [
        ["0.50, good 0.40 to 0.60", "炸弹layers.0.mlp/1", "Terror", "Weapons · car bomb"],
        ["undefined", "none (refused)layers.1.mlp/3", "Violence", "–"],
        ["0.10, weak 0.00 to 0.20", "Weak words (en)layers.1.mlp/4", "TerrorViolence", "Weapons"],
        ["undefined", "not explainedlayers.0.mlp/9", "–", "–"],
    ]
    assert len(table_rows(browse.found_table(database, rows, "", 2))) == 2
    assert browse.found_table(database, [], "", 50) == ""


@pytest.mark.parametrize(
    ("n", "n_shown", "sentence"),
    [
        (0, 50, "No neuron matches; try fewer words, another domain or a lower score."),
        (1, 50, "1 neuron, best score first."),
        (50, 50, "50 neurons, best score first."),
        (1234, 50, "1,234 neurons, the best 50 shown, best score first."),
    ],
)
def test_how_many_were_found(browse: ModuleType, n: int, n_shown: int, sentence: str):
    assert browse.count_line(n, n_shown) == sentence
