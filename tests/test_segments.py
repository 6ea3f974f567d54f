"""Segment ends, with the expected positions written out."""

import itertools
from pathlib import Path
from typing import Any

import pytest

from safesail.lm.load import load_tokenizer
from safesail.lm.tokens import special_ids, token_bytes
from safesail.reward_recipe import EndsSection
from safesail.rewards.preferences import Preference
from safesail.rewards.segments import segment_ends
from safesail.rewards.texts import Text, encode_side

EVERY = EndsSection(min_distance=1)


def whole(ids: list[int]) -> Text:
    return Text(ids, range(len(ids)), 0)


def segments(tokenizer: Any, text: str) -> list[str]:
    """What stands between the ends of a text that is all answer."""
    ids = tokenizer(text)["input_ids"]
    ends, cuts = segment_ends(tokenizer, whole(ids), EVERY), [0]
    cuts += [end + 1 for end in ends]
    return [b"".join(token_bytes(tokenizer, ids[a:b])).decode() for a, b in itertools.pairwise(cuts)]


def by_bytes(tokenizer: Any, text: str) -> list[int]:
    """A token per byte, so that positions can be counted by hand."""
    return [id for byte in text.encode("latin-1") for id in tokenizer(chr(byte))["input_ids"]]


def test_a_run_of_punctuation_and_line_breaks_is_one_end(tokenizer: Any):
    assert segments(tokenizer, "Stop! Who?! I paid for it; fine, then.\n\nBye") == [
        "Stop!",
        " Who?!",
        " I paid for it;",
        " fine,",
        " then.\n\n",
        "Bye",
    ]


def test_points_and_commas_within_numbers_end_nothing(tokenizer: Any):
    assert segments(tokenizer, "1,000 of 3.14 in 2019. 5,six 7.\n8") == [
        "1,000 of 3.14 in 2019.",
        " 5,",
        "six 7.\n",
        "8",
    ]
    assert segments(tokenizer, "1;2!3") == ["1;", "2!", "3"]


def test_colons_quotes_and_dashes_end_nothing(tokenizer: Any):
    assert segments(tokenizer, 'note: a "river" - here') == ['note: a "river" - here']


def test_chinese_and_hindi_marks_end_segments_and_characters_stay_whole(tokenizer: Any):
    assert segments(tokenizer, "你好，世界。真的？！是；对") == ["你好，", "世界。", "真的？！", "是；", "对"]
    assert segments(tokenizer, "नदी है। बाग") == ["नदी है।", " बाग"]


def test_a_token_that_holds_a_whole_run_is_one_end(tiny_model: Path):
    tokenizer = load_tokenizer(str(tiny_model))
    tokenizer.add_tokens([".\n\n", "?!", '."', "3.1"])
    ids = tokenizer('ab.\n\ncd?!ef."gh 3.14')["input_ids"]
    assert [tokenizer.decode([ids[end]]) for end in segment_ends(tokenizer, whole(ids), EVERY)[:-1]] == [
        ".\n\n",
        "?!",
        '."',
    ]
    assert segment_ends(tokenizer, whole(ids), EVERY)[-1] == len(ids) - 1


def test_a_text_without_marks_has_one_end(tokenizer: Any):
    ids = by_bytes(tokenizer, "a river")
    assert segment_ends(tokenizer, whole(ids), EndsSection()) == [6]
    assert segment_ends(tokenizer, whole(ids[:1]), EndsSection()) == [0]


def test_ends_that_are_too_close_give_way_by_hand(tokenizer: Any):
    #                          0 2   6       14 16
    ids = by_bytes(tokenizer, "ab, cd. efghij! k")
    assert segment_ends(tokenizer, whole(ids), EVERY) == [2, 6, 14, 16]
    assert segment_ends(tokenizer, whole(ids), EndsSection(min_distance=4)) == [2, 6, 16]  # 14 gives way to the last
    assert segment_ends(tokenizer, whole(ids), EndsSection(min_distance=5)) == [2, 16]  # 6 is 4 after 2
    assert segment_ends(tokenizer, whole(ids), EndsSection(min_distance=2)) == [2, 6, 14, 16]
    assert segment_ends(tokenizer, whole(ids), EndsSection(min_distance=99)) == [16]
    assert segment_ends(tokenizer, whole(ids[:7]), EndsSection(min_distance=4)) == [2, 6]


def test_only_the_answer_has_ends(tokenizer: Any):
    #                          0  3   7  10
    ids = by_bytes(tokenizer, "ab. cd. ef. gh.")
    assert segment_ends(tokenizer, Text(ids, range(4, 11), 0), EVERY) == [6, 10]
    assert segment_ends(tokenizer, Text(ids, range(4, 9), 0), EVERY) == [6, 8]
    assert segment_ends(tokenizer, Text(ids, range(4, 9), 0), EndsSection(of="tokens")) == [4, 5, 6, 7, 8]


def test_ends_of_a_conversation(tokenizer: Any):
    asked = ({"role": "user", "content": "Where, please?"},)
    text = encode_side(
        tokenizer, Preference("a", "safety", "s", asked, "Here. By the river", "No", False), "chosen", 512
    )

    def up_to(section: EndsSection) -> list[str]:
        ends = segment_ends(tokenizer, text, section)
        assert not set(special_ids(tokenizer)) & {text.ids[end] for end in ends}
        return [b"".join(token_bytes(tokenizer, text.ids[: end + 1])).decode() for end in ends]

    head = "<|im_start|>user\nWhere, please?<|im_end|>\n<|im_start|>assistant\n"
    assert up_to(EVERY) == [head + "Here.", head + "Here. By the river"]
    everywhere = up_to(EndsSection(min_distance=1, part="text"))
    assert everywhere == [
        "<|im_start|>user\n",
        "<|im_start|>user\nWhere,",
        "<|im_start|>user\nWhere, please?",
        "<|im_start|>user\nWhere, please?<|im_end|>\n",  # no run goes across the special token
        head,
        head + "Here.",
        head + "Here. By the river<|im_end|>\n",
    ]
    tokens = segment_ends(tokenizer, text, EndsSection(part="text", of="tokens"))
    assert tokens == [i for i, id in enumerate(text.ids) if id not in special_ids(tokenizer)]


@pytest.mark.parametrize("part", ["answer", "text"])
def test_the_text_is_left_as_it_is(tokenizer: Any, part: str):
    ids = by_bytes(tokenizer, "ab, cd.")
    text = whole(list(ids))
    segment_ends(tokenizer, text, EndsSection(min_distance=1, part=part))  # pyright: ignore[reportArgumentType]
    assert text == whole(ids)
