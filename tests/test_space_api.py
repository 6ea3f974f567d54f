"""The Space's API through gradio_client: what `/inspect`, `/neuron` and `/search` answer."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from told_release import explanation

from safesail.diagnosis.inspector import Inspector

gradio_client = pytest.importorskip("gradio_client")
pytest.importorskip("gradio")

REPOSITORY = Path(__file__).resolve().parent.parent
FIRST, SECOND = "layers.0.mlp", "layers.1.mlp"


@pytest.fixture(scope="module")
def inspector(told: Path) -> Inspector:
    return Inspector.from_pretrained(told)


@pytest.fixture(scope="module")
def client(told_space: str) -> Iterator[Any]:
    client = gradio_client.Client(told_space, verbose=False)
    yield client
    client.close()


def test_only_the_three_endpoints_are_public(client: Any):
    named = client.view_api(return_format="dict")["named_endpoints"]
    assert sorted(named) == ["/inspect", "/neuron", "/search"]
    assert "Which neurons fire on each token" in named["/inspect"]["description"]
    assert [p["parameter_name"] for p in named["/search"]["parameters"]] == [
        *("text", "domain", "hook_point", "min_score", "language"),
    ]


def test_the_readme_snippet_runs_as_printed(told_space: str, inspector: Inspector):
    """With a release of invented neurons in the demo's place."""
    blocks = re.findall(r"```python\n(.*?)```", (REPOSITORY / "README.md").read_text(encoding="utf-8"), flags=re.S)
    (block,) = [block for block in blocks if "gradio_client" in block]
    here = block.replace("http://127.0.0.1:7860", told_space).replace("layers.9.mlp/4291", f"{FIRST}/1")
    names: dict[str, Any] = {}
    exec(here, names)
    names["client"].close()
    assert (
        names["inspection"]["answer"]
        == inspector.inspect([{"role": "user", "content": "Who was the president in 2012?"}], max_new_tokens=20).answer
    )
    assert names["neuron"]["neuron_id"] == f"{FIRST}/1"
    found = inspector.database.search("weapons", domain="terror", min_score=0.3)
    assert [row["neuron_id"] for row in names["found"]] == [row["neuron_id"] for row in found]


# --- /inspect -----------------------------------------------------------------------------------------------------


def test_inspect_is_the_inspection_and_the_answer(client: Any, inspector: Inspector):
    result = client.predict(prompt="a bomb 你好", max_new_tokens=4, api_name="/inspect")
    expected = inspector.inspect([{"role": "user", "content": "a bomb 你好"}], max_new_tokens=4)
    assert result["ids"] == expected.ids
    assert result["n_prompt"] == expected.n_prompt
    assert result["answer"] == expected.answer
    assert "".join(token["text"] for token in result["tokens"]) == expected.text
    for token, known in zip(result["tokens"], expected.to_json()["tokens"], strict=True):
        said = [inspector.database.said(neuron["neuron_id"]) for neuron in known["neurons"]]
        assert token["neurons"] == [
            {**neuron, "explanation": text, "language": language}
            for neuron, (text, language, _) in zip(known["neurons"], said, strict=True)
        ]


def test_inspect_takes_raw_text_and_a_system_prompt(client: Any, inspector: Inspector):
    raw = client.predict(prompt="the bomb", mode="raw", max_new_tokens=0, api_name="/inspect")
    assert raw["ids"] == inspector.encode("the bomb")
    assert raw["answer"] == ""
    chat = client.predict(prompt="a", max_new_tokens=0, system="Be kind.", api_name="/inspect")
    assert "Be kind." in "".join(token["text"] for token in chat["tokens"])


def test_inspect_explains_in_a_language_and_says_which_one_it_turned_out_to_be(client: Any):
    result = client.predict(prompt="The president saw a bomb.", max_new_tokens=4, language="zh", api_name="/inspect")
    fired = [neuron for token in result["tokens"] for neuron in token["neurons"]]
    assert {neuron["language"] for neuron in fired} == {"zh", "en"}
    for neuron in fired:
        place = (neuron["hook_point"], neuron["latent"])
        chinese = explanation(*place, "zh")
        assert neuron["explanation"] == (chinese or explanation(*place)), neuron["neuron_id"]
        assert neuron["language"] == ("zh" if chinese or neuron["explanation"] is None else "en")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"prompt": "  "}, "the prompt is empty"),
        ({"prompt": "word " * 600}, "prompt and answer take .* tokens, but the limit here is 512; shorten them"),
        ({"prompt": "x" * 20_000}, "20,000 characters; the limit is 10,240"),
        ({"prompt": "a", "mode": "poem"}, "use chat or raw"),
        ({"prompt": "a", "max_new_tokens": 1000}, "give a number from 0 to 256"),
        ({"prompt": "a", "temperature": "hot"}, "give a number from 0 to 2"),
        ({"prompt": "a", "temperature": True}, "give a number from 0 to 2"),
        ({"prompt": "a", "seed": -1}, "seed is -1"),
        ({"prompt": ["a"]}, "must be texts"),
        ({"prompt": "a", "language": ["en"]}, r"language is \['en'\]; give a text"),
    ],
)
def test_a_mistake_is_answered_with_its_sentence(client: Any, arguments: dict[str, Any], sentence: str):
    with pytest.raises(gradio_client.exceptions.AppError, match=sentence):
        client.predict(**arguments, api_name="/inspect")


# --- /neuron ------------------------------------------------------------------------------------------------------


def test_neuron_is_all_that_is_known_of_it(client: Any, inspector: Inspector):
    row = client.predict(id=f"{FIRST}/4", api_name="/neuron")
    assert (row["explanation"], row["language"]) == ("Words about presidents, kind 4", "en")
    assert (row["domains"], row["score"], row["status"]) == (["politics"], None, "undefined")
    assert {name: said["explanation"] for name, said in row["explanations"].items()} == {
        "en": "Words about presidents, kind 4",
        "zh": "关于总统的词，第4种",
    }
    assert [(score["method"], score["score"]) for score in row["scores"]] == [
        ("segment-5/llm", None),
        ("segment-5/lexical", 0.2),
    ]
    assert row["quantiles"]["normaliser"] == inspector.database.normaliser(FIRST, 4)
    fired = row["quantiles"]["firing_rate"] * row["quantiles"]["n_tokens"]
    assert (len(row["quantiles"]["histogram"]), sum(row["quantiles"]["histogram"])) == (10, pytest.approx(fired))
    assert row["promoted"] == [token._asdict() for token in inspector.promoted_tokens(f"{FIRST}/4")]
    assert client.predict(id=" 0_4 ", api_name="/neuron") == row


@pytest.mark.parametrize(
    ("id", "language", "said", "language_said"),
    [
        (f"{FIRST}/5", "zh", "关于侮辱的词，第5种", "zh"),
        (f"{FIRST}/31", "zh", "Words about gardens, kind 31", "en"),  # refused in Chinese
        (f"{FIRST}/50", "zh", "Words about bombs, kind 50", "en"),  # no row in Chinese
        (f"{FIRST}/5", "hi", "Words about insults, kind 5", "en"),  # the release has no Hindi
        (f"{SECOND}/10", "en", "关于炸弹的词，第10种", "zh"),  # refused in English
        (f"{FIRST}/10", "zh", None, "zh"),  # refused in both
    ],
)
def test_neuron_falls_back_to_a_language_that_has_an_explanation(
    client: Any, id: str, language: str, said: str | None, language_said: str
):
    row = client.predict(id=id, language=language, api_name="/neuron")
    assert (row["explanation"], row["language"]) == (said, language_said)


def test_a_neuron_without_a_row_has_its_statistics_and_what_it_promotes(client: Any, inspector: Inspector):
    row = client.predict(id=f"{SECOND}/100", api_name="/neuron")
    assert (row["neuron_id"], row["hook_point"], row["latent"]) == (f"{SECOND}/100", SECOND, 100)
    assert (row["explanation"], row["domains"], row["explanations"], row["scores"]) == (None, [], {}, [])
    assert row["quantiles"] == inspector.database.quantiles[f"{SECOND}/100"]
    assert len(row["promoted"]) == 10


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"id": "nonsense"}, "'nonsense' is not a neuron here; ids look like layers.0.mlp/1234"),
        ({"id": f"{FIRST}/128"}, "layers.0.mlp has no latent 128; its latents are 0 to 127"),
        ({"id": None}, "'' is not a neuron here"),
        ({"id": 4}, "id is 4; give a text"),
        ({"id": f"{FIRST}/4", "language": ["en"]}, r"language is \['en'\]; give a text"),
    ],
)
def test_what_is_no_neuron_is_answered_with_a_sentence(client: Any, arguments: dict[str, Any], sentence: str):
    with pytest.raises(gradio_client.exceptions.AppError, match=sentence):
        client.predict(**arguments, api_name="/neuron")


# --- /search ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "n"),
    [
        ({}, 120),
        ({"domain": "politics"}, 30),
        ({"domain": "terror"}, 31),  # and layers.0.mlp/0, which carries two
        ({"hook_point": SECOND}, 60),
        ({"text": "insults"}, 30),
        ({"text": "kind 11"}, 2),
        ({"text": "第11种"}, 2),
        ({"min_score": 0.45}, 40),
        ({"min_score": 0}, 80),
        (
            {"text": "bombs", "domain": "terror", "hook_point": FIRST, "min_score": 0.65},
            0,
        ),  # bombs have even latents, this score odd ones
        ({"text": "bombs", "domain": "terror", "hook_point": FIRST, "min_score": 0.45}, 5),  # 2, 14, 26, 38 and 50
        ({"text": "no such words at all"}, 0),
        ({"text": None, "domain": None, "hook_point": None}, 120),
    ],
)
def test_search_finds_by_words_domain_hook_point_and_score(client: Any, arguments: dict[str, Any], n: int):
    assert len(client.predict(**arguments, api_name="/search")) == n


def test_search_is_sorted_and_explained_in_the_language_asked_for(client: Any):
    """Latents 2, 14, …: score 0.45 each, then by id; from 30 on there is no Chinese."""
    found = client.predict(text="bombs", hook_point=FIRST, min_score=0.45, language="zh", api_name="/search")
    assert [(row["latent"], row["explanation"], row["language"]) for row in found] == [
        (14, "关于炸弹的词，第14种", "zh"),
        (2, "关于炸弹的词，第2种", "zh"),
        (26, "关于炸弹的词，第26种", "zh"),
        (38, "Words about bombs, kind 38", "en"),
        (50, "Words about bombs, kind 50", "en"),
    ]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"min_score": 2}, "min_score is 2; give a number from -1 to 1"),
        ({"min_score": "high"}, "min_score is 'high'"),
        ({"domain": ["terror"]}, r"domain is \['terror'\]; give a text"),
        ({"language": {}}, r"language is {}; give a text"),
    ],
)
def test_a_wrong_search_is_answered_with_a_sentence(client: Any, arguments: dict[str, Any], sentence: str):
    with pytest.raises(gradio_client.exceptions.AppError, match=sentence):
        client.predict(**arguments, api_name="/search")
