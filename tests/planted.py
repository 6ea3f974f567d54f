"""Synthetic latents of known meaning, texts of a seeded grammar, and a simulator that errs as often as it is told.

    texts = planted_texts(30, MEANINGS[:2])              # readable units with their numbers of tokens
    excerpts = excerpts_for(MEANINGS[0], texts)          # what the latent does on them is known of every unit
    LlmDouble(answer=Simulator(errors(0.1)))             # reads the prompt, looks up the truth, errs, answers

A latent is active on the words of its meaning, each with its own strength, and on nothing else. So the truth about any
piece of text follows from the text alone, and a simulator that knows the meaning can be right about all of it.
"""

import json
import random
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from llm_double import prompt_of
from safetensors.torch import save_file
from torch import Tensor

from safesail.assets import asset
from safesail.interpretation.excerpts import Excerpt
from safesail.interpretation.exchange import SLOT
from safesail.recipe import Recipe
from safesail.run import Run

__all__ = [
    "ACTIVE_ABOVE",
    "HOOK_POINT",
    "MEANINGS",
    "TOP",
    "Channel",
    "Meaning",
    "Simulator",
    "Unit",
    "by_chance",
    "channel_correlation",
    "errors",
    "excerpts_for",
    "expected_phi",
    "perfect",
    "planted_run",
    "planted_texts",
]

ACTIVE_ABOVE = 0.2
"""A token is active above this strength; each meaning has one word below it, which only the levels of tokens show."""

TOP = 10
"""The highest level of a token."""

HOOK_POINT = "layers.0.mlp"

_UNITS_PER_TEXT, _RATE, _NORMALISER = 40, 0.12, 2.5
_STRENGTHS = (1.0, 0.7, 0.4, 0.1)


class Meaning(NamedTuple):
    """What a planted latent means: the strength of each word it is active on, and the other words of its script."""

    latent: int
    description: str
    words: dict[str, float]
    """By the word without the space before it; 1 is the latent's normaliser."""
    others: tuple[str, ...]
    n_tokens: int
    """Of each word: a script that a vocabulary knows badly takes several."""
    space: str
    """What stands before a word."""


class Unit(NamedTuple):
    """One readable unit of a text."""

    text: str
    n_tokens: int


_ENGLISH = (
    "the of a to in and was on with for they we saw near old house quiet road morning small letter garden table "
    "walked slowly after before every window green river summer kitchen music teacher"
)
_CHINESE = "我们 今早 在 公园 看到 老师 和 朋友 说话 桌子 上面 有 一本 新书 他 昨夜 回家 很 安静 学校 门口"
_HINDI = "वह घर में बैठा था और किताब पढ़ रहा है कल हम बाज़ार गए फिर पानी लाया नदी के पास पुराना"
_RUSSIAN = "мы видели старый дом около реки утром он читал книгу потом шёл домой тихо и долго в саду на столе"
_ARABIC = "كان في البيت مع صديقه ثم ذهب إلى المدرسة وقرأ كتابا قديما قرب النهر كل صباح جلس هناك طويلا"
_JAPANESE = "わたし は きのう がっこう で ほん を よみました そして いえ に かえる しずか な みち まど から"
_CODE = "for in range print value = + total list append ( ) if else while count name index"
_NUMBERS = "room 12 of 345 on page 60 and 89 in 1924 at 5 to 31 about 208 or 14 than 3 from 99"

_SPELT = (  # description, words of strengths 1.0, 0.7, 0.4 and 0.1, other words, tokens of a word, space
    ("words about weapons", "pistol dagger cannon slingshot", _ENGLISH, 1, " "),
    ("words about cooking", "roasted stewed simmering spoon", _ENGLISH, 1, " "),
    ("words about money", "dollars salary banknote coin", _ENGLISH, 1, " "),
    ("the digit seven", "7 17 470 seven", _NUMBERS, 1, " "),
    ("Chinese words for weather", "下雨 台风 暴雪 多云", _CHINESE, 2, ""),
    ("Chinese words for vehicles", "汽车 火车 飞机 轮船", _CHINESE, 2, ""),
    ("Hindi words for relatives", "माता पिता बहन मामा", _HINDI, 3, " "),
    ("Russian names of months", "января февраля апреля августа", _RUSSIAN, 2, " "),
    ("Arabic words for colours", "أحمر أزرق أخضر رمادي", _ARABIC, 3, " "),
    ("Japanese words for food", "すし らーめん てんぷら おちゃ", _JAPANESE, 2, ""),
    ("emoji of animals", "🐕 🐈 🐎 🐌", _ENGLISH, 3, " "),
    ("keywords of Python functions", "lambda return yield def", _CODE, 1, " "),
)
MEANINGS = tuple(
    Meaning(i, description, dict(zip(words.split(), _STRENGTHS, strict=True)), tuple(others.split()), n, space)
    for i, (description, words, others, n, space) in enumerate(_SPELT)
)
_BY_DESCRIPTION = {meaning.description: meaning for meaning in MEANINGS}


def planted_texts(n: int, meanings: Sequence[Meaning], seed: Any = 0) -> list[list[Unit]]:
    """n texts of 40 units, in turn in the script of each meaning and with its words; no other meaning's stand there."""
    return [
        _text(meanings[i % len(meanings)], _seeded("text", seed, i, meanings[i % len(meanings)].latent))
        for i in range(n)
    ]


def _text(meaning: Meaning, chance: random.Random) -> list[Unit]:
    drawn = [chance.random() < _RATE for _ in range(_UNITS_PER_TEXT)]
    words = [chance.choice(tuple(meaning.words) if own else meaning.others) for own in drawn]
    return [Unit(meaning.space + word, meaning.n_tokens) for word in words]


def _seeded(*parts: Any) -> random.Random:
    """Depends on the parts alone; a string's own hash changes from process to process."""
    return random.Random(json.dumps(parts, ensure_ascii=False))


def excerpts_for(meaning: Meaning, texts: list[list[Unit]]) -> list[Excerpt]:
    """The texts as excerpts of a latent, its strength on every unit known."""
    return [
        Excerpt(
            units=[unit.text for unit in units],
            ids=[[1] * unit.n_tokens for unit in units],
            strengths=[meaning.words.get(unit.text.strip(), 0.0) for unit in units],
        )
        for units in texts
    ]


# --- a run of planted latents -------------------------------------------------------------------------------------


def planted_run(folder: Path, methods: Sequence[str], n_texts: int = 288) -> Run:
    """A run whose harvest, collect and explain are finished, its neurons the planted latents, one document a text.

    Only what scoring reads is there: no activations, but the pieces and the codes. A word is a token of the tokenizer.
    """
    texts, ids = planted_texts(n_texts, MEANINGS, "run"), _word_level(folder / "tokenizer")
    settings = {"model.path": f'"{folder / "tokenizer"}"', "score.methods": json.dumps(list(methods))}
    settings |= {"harvest.hook_points": f'["{HOOK_POINT}"]', "score.active_above": str(ACTIVE_ABOVE)}
    recipe = Recipe.load(asset("hub/recipes/demo.toml"), tuple(f"{key}={value}" for key, value in settings.items()))
    run = Run.create(folder / "run", recipe)
    for stage in ("harvest", "collect", "explain"):
        (run.scratch / stage).mkdir()
        (run.scratch / stage / "stage.json").write_text("{}", encoding="utf-8")
    _write_pieces(run.result("harvest"), [[ids[unit.text] for unit in text] for text in texts])
    _write_codes(run.result("collect"), [unit.text.strip() for text in texts for unit in text])
    names = [f"{HOOK_POINT}/{meaning.latent}" for meaning in MEANINGS]
    statistics = [{"neuron_id": name, "normaliser": _NORMALISER} for name in names]
    pq.write_table(pa.Table.from_pylist(statistics), run.result("collect") / "statistics.parquet")
    said = [{"neuron_id": n, "explanation": m.description} for n, m in zip(names, MEANINGS, strict=True)]
    rows = [row | {"language": "en", "status": "ok"} for row in said]
    pq.write_table(pa.Table.from_pylist(rows), run.result("explain") / "explanations.parquet")
    return run


def _word_level(folder: Path) -> dict[str, int]:
    """Save a tokenizer that knows every word of every script, with and without the space before it; the words' ids."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = dict.fromkeys(meaning.space + word for meaning in MEANINGS for word in (*meaning.words, *meaning.others))
    ids = {word: i for i, word in enumerate(words, 1)}
    tokenizer = Tokenizer(models.WordLevel({"<unk>": 0} | {w.replace(" ", "▁"): i for w, i in ids.items()}, "<unk>"))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>").save_pretrained(folder)
    return ids


def _write_pieces(folder: Path, pieces: list[list[int]]) -> None:
    columns = {
        "document": [f"planted/{i}" for i in range(len(pieces))],
        "source": ["planted"] * len(pieces),
        "held_out": [False] * len(pieces),
        # one text of each script after the other: a round for one half, a round for the other
        "half": [("explain", "score")[i // len(MEANINGS) % 2] for i in range(len(pieces))],
        "row_start": [i * _UNITS_PER_TEXT for i in range(len(pieces))],
        "ids": pieces,
    }
    pq.write_table(pa.table(columns), folder / "pieces.parquet")
    facts = {"hook_points": [HOOK_POINT], "n_tokens": len(pieces) * _UNITS_PER_TEXT}
    (folder / "harvest.json").write_text(json.dumps(facts), encoding="utf-8")


def _write_codes(folder: Path, words: list[str]) -> None:
    """The latents' activations by row, in ascending order within a latent."""
    entries = [
        (meaning.latent, meaning.words[word] * _NORMALISER, row)
        for meaning in MEANINGS
        for row, word in enumerate(words)
        if word in meaning.words
    ]
    latents, values, rows = zip(*sorted(entries), strict=True)
    codes = {"latents": torch.tensor(latents).int(), "values": torch.tensor(values), "rows": torch.tensor(rows).int()}
    save_file(codes, folder / f"codes-{HOOK_POINT}.safetensors")


# --- the simulator ------------------------------------------------------------------------------------------------

Channel = Callable[[int, int, random.Random], int]
"""What is said of a unit: (its level, the highest level, chance) → level. Of segments and texts the highest is 1."""


def perfect(level: int, top: int, chance: random.Random) -> int:
    """Always right."""
    return level


def by_chance(rate: float) -> Channel:
    """Never looks: the highest level with probability `rate`, else 0."""
    return lambda level, top, chance: top if chance.random() < rate else 0


def errors(false_positives: float, false_negatives: float | None = None) -> Channel:
    """Says top - level instead of the level, with one probability on silent units and one on active ones.

    Given one number, errors are symmetric.
    """
    missed = false_positives if false_negatives is None else false_negatives
    return lambda level, top, chance: top - level if chance.random() < (missed if level else false_positives) else level


class Simulator:
    """Answers simulation prompts from the known truth through a channel.

    Chance depends on the seed, the description and the piece, or on the excerpt and the place of a token in it: not on
    how pieces are spread over requests. `said` counts (is active, is said to be active) by description.
    """

    def __init__(self, channel: Channel = perfect, seed: Any = 0) -> None:
        self.channel, self.seed = channel, seed
        self.said: dict[str, Counter[tuple[bool, bool]]] = defaultdict(Counter)

    def __call__(self, body: dict[str, Any]) -> str:
        """The answer to a request of an endpoint: under each key of its schema, the numbers for one description."""
        lists: dict[str, Any] = body["response_format"]["json_schema"]["schema"]["properties"]
        descriptions, block = _descriptions(prompt_of(body)), _block(prompt_of(body))
        assert len(lists) == len(descriptions)
        said = {key: self.levels(descriptions.get(key) or descriptions[""], *block) for key in lists}
        for key, schema in lists.items():
            if "minItems" not in schema:  # the numbers of the active pieces are wanted, not a number for each
                said[key] = [i for i, level in enumerate(said[key], 1) if level]
        return json.dumps(said)

    def judge(self, prompts: list[str], choices: tuple[str, ...]) -> list[tuple[list[list[float]], int]]:
        """A local model's judgement, certain of what it says; of levels, the highest choice stands for the top."""
        judged = []
        for prompt in prompts:
            (description,) = _descriptions(prompt).values()
            said = [min(level, len(choices) - 1) for level in self.levels(description, *_block(prompt))]
            judged.append(([[float(level == i) for i in range(len(choices))] for level in said], len(prompt)))
        return judged

    def levels(self, description: str, kind: str, lines: list[str]) -> list[int]:
        """What is said of each piece, or of each token of an excerpt."""
        meaning = _BY_DESCRIPTION[description]
        if kind == "pieces":
            return [self.say(meaning, int(_holds(meaning, line)), 1, line) for line in lines]
        return [self.say(meaning, _level(meaning, line), TOP, [place, *lines]) for place, line in enumerate(lines)]

    def say(self, meaning: Meaning, level: int, top: int, where: Any) -> int:
        """What comes out of the channel."""
        said = self.channel(level, top, _seeded(self.seed, meaning.description, where))
        self.said[meaning.description][level > 0, said > 0] += 1
        return said


_DESCRIPTION = re.compile(r'<description(?: id="(\d+)")?>\s*(.*?)\s*</description>')
_BLOCK = re.compile(r"<(pieces|tokens)>\n(.*?)\n</\1>", re.DOTALL)
_LINE = re.compile(r"(\d+): (.*)")


def _descriptions(prompt: str) -> dict[str, str]:
    """The descriptions by their ids; a single one has the id ""."""
    return dict(_DESCRIPTION.findall(prompt))


def _block(prompt: str) -> tuple[str, list[str]]:
    """Whether the prompt holds pieces or tokens, and their lines without the numbers."""
    ((kind, inside),) = _BLOCK.findall(prompt)
    lines = [_LINE.fullmatch(line.removesuffix(SLOT).removesuffix(" ->")) for line in inside.split("\n")]
    assert all(line is not None and int(line[1]) == i for i, line in enumerate(lines, 1)), f"not numbered: {inside}"
    return kind, [line[2] for line in lines if line is not None]


def _holds(meaning: Meaning, piece: str) -> bool:
    """Whether any active word of the meaning stands in the piece."""
    return any(word in piece for word, strength in meaning.words.items() if strength > ACTIVE_ABOVE)


def _level(meaning: Meaning, token: str) -> int:
    return round(TOP * meaning.words.get(token.strip(), 0.0))


# --- theory -------------------------------------------------------------------------------------------------------


def expected_phi(p: float, false_positives: float, false_negatives: float) -> float:
    """The correlation of a truth of base rate p with what a channel makes of it.

    cov = P(both) - p·r = p(1-p)(1 - fp - fn), where r = p(1-fn) + (1-p)fp is how often the channel says active. With
    fp = fn = ε that is p(1-p)(1-2ε) / sqrt(p(1-p)·r(1-r)).
    """
    r = p * (1 - false_negatives) + (1 - p) * false_positives
    return p * (1 - p) * (1 - false_positives - false_negatives) / (p * (1 - p) * r * (1 - r)) ** 0.5


def channel_correlation(truth: Tensor, error: float, top: int) -> float:
    """The same for levels 0 … top and symmetric errors, which say top - level. truth: (n,).

    Y = (1-F)X + F(top-X), so cov(X, Y) = (1-2ε) var X, E Y = (1-ε) E X + ε E(top-X), E Y² = (1-ε) E X² + ε E(top-X)².
    """
    x = truth.double()
    mean = (1 - error) * x.mean() + error * (top - x).mean()
    square = (1 - error) * x.square().mean() + error * (top - x).square().mean()
    var = x.square().mean() - x.mean() ** 2
    return float((1 - 2 * error) * var / (var * (square - mean**2)).sqrt())
