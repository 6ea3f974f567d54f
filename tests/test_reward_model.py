"""A side of a pair in tokens, and the model that reads it: the answer's place, the cut, padding, what is refused."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from safesail.errors import InputError
from safesail.rewards.model import RewardModel, by_length, padded
from safesail.rewards.preferences import Preference
from safesail.rewards.texts import encode_side

pytestmark = pytest.mark.usefixtures("one_thread")


def preference(chosen: str = "The garden.", rejected: str = "No.", prompt: str = "What about the river?") -> Preference:
    return Preference("p0", "safety", "made", ({"role": "user", "content": prompt},), chosen, rejected, False)


@pytest.fixture(scope="module")
def reward_model(tiny_model: Path) -> RewardModel:
    return RewardModel.fresh(tiny_model, seed=1)


@pytest.fixture(scope="module")
def ids(reward_model: RewardModel) -> list[list[int]]:
    """Five texts of unlike lengths."""
    answers = ["Yes.", "The garden was seen near the old house on Monday morning. " * 4, "a", "The kitchen", "In 2019"]
    return [encode_side(reward_model.tokenizer, preference(each), "chosen", 512).ids for each in answers]


# --- texts --------------------------------------------------------------------------------------------------------


def test_the_answer_is_found_between_the_templates_tokens(tokenizer: Any):
    # words that the turns hold too: "user", "assistant", "im_end"
    for answer in ("The garden.", "assistant", "user", "im_end|", "\nTwo\n\nlines ", "河边的花园 🌷"):
        text = encode_side(tokenizer, preference(answer), "chosen", 512)
        whole = tokenizer.decode(text.ids)
        before = "<|im_start|>user\nWhat about the river?<|im_end|>\n<|im_start|>assistant\n"
        assert whole == f"{before}{answer}<|im_end|>\n"
        assert tokenizer.decode(text.ids[: text.answer.start]) == before
        assert tokenizer.decode([text.ids[i] for i in text.answer]) == answer
        assert text.n_cut == 0
        assert text.ids.count(0) == 2  # the template's two beginnings, and no BOS (id 0) of the tokenizer's own


def test_a_tokenizer_that_begins_texts_by_itself_does_not_begin_them_twice(tiny_model: Path):
    tokenizer: Any = AutoTokenizer.from_pretrained(tiny_model)
    expected = encode_side(tokenizer, preference(), "chosen", 512)
    begin = ("<|im_start|>", 0)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[begin]
    )
    assert tokenizer("a")["input_ids"][0] == 0
    assert encode_side(tokenizer, preference(), "chosen", 512) == expected


def test_a_side_is_that_side(tokenizer: Any):
    text = encode_side(tokenizer, preference("Yes.", "Never."), "rejected", 512)
    assert tokenizer.decode([text.ids[i] for i in text.answer]) == "Never."


def test_a_template_that_trims_and_writes_before_the_answer(tiny_model: Path):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.chat_template = (
        "{% for m in messages %}[{{ m['role'] }}]{% if m['role'] == 'assistant' %}(thought){% endif %} "
        "{{ m['content'] | trim }}\n{% endfor %}"
    )
    text = encode_side(tokenizer, preference("  thought  "), "chosen", 512)
    assert tokenizer.decode(text.ids) == "[user] What about the river?\n[assistant](thought) thought\n"
    answer = tokenizer.decode([text.ids[i] for i in text.answer])
    assert answer.strip() == "thought"
    assert text.answer.start > len(text.ids) // 2


def test_without_a_template_turns_are_lines(tiny_model: Path):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.chat_template = None
    text = encode_side(tokenizer, preference(), "chosen", 512)
    assert tokenizer.decode(text.ids) == "User: What about the river?\nAssistant: The garden."
    assert tokenizer.decode([text.ids[i] for i in text.answer]).strip() == "The garden."


def test_a_long_text_loses_its_beginning(tokenizer: Any):
    whole = encode_side(tokenizer, preference(), "chosen", 512)
    n, answer = len(whole.ids), whole.answer
    cut = encode_side(tokenizer, preference(), "chosen", n - 5)
    assert cut.ids == whole.ids[5:]
    assert (cut.n_cut, cut.answer) == (5, range(answer.start - 5, answer.stop - 5))
    within = encode_side(tokenizer, preference(), "chosen", n - answer.start - 1)  # the answer's first token is lost
    assert within.ids == whole.ids[answer.start + 1 :]
    assert within.answer == range(len(answer) - 1)


def test_a_template_that_refuses_names_the_pair(tiny_model: Path):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(InputError, match="pair p0: roles must alternate"):
        encode_side(tokenizer, preference(), "chosen", 512)
    tokenizer.chat_template = "nothing of it"
    with pytest.raises(InputError, match="does not show the answer of pair p0"):
        encode_side(tokenizer, preference(), "chosen", 512)


# --- rewards ------------------------------------------------------------------------------------------------------


def test_the_reward_is_the_head_at_the_last_token(reward_model: RewardModel, ids: list[list[int]]):
    rewards = reward_model.rewards(ids)
    for text, reward in zip(ids, rewards, strict=True):
        hidden = reward_model.model.base_model(input_ids=torch.tensor([text])).last_hidden_state[0]
        by_hand = hidden @ reward_model.model.score.weight[0]
        assert reward_model.token_rewards(text) == pytest.approx(by_hand, abs=1e-5)
        assert float(reward) == pytest.approx(float(by_hand[-1]), abs=1e-5)
    assert rewards.dtype == torch.float32


def test_rewards_do_not_depend_on_the_batch_or_the_order(reward_model: RewardModel, ids: list[list[int]]):
    together = reward_model.rewards(ids)
    apart = reward_model.rewards(ids, tokens_per_batch=1)
    backwards = reward_model.rewards(ids[::-1]).flip(0)
    assert together == pytest.approx(apart, abs=1e-5)
    assert together == pytest.approx(backwards, abs=1e-5)
    assert together.std() > 0.01


def test_padding_is_never_read(reward_model: RewardModel, ids: list[list[int]]):
    tokens, mask = padded([ids[2], ids[1]])
    assert mask.tolist() == [[1] * len(ids[2]) + [0] * (len(ids[1]) - len(ids[2])), [1] * len(ids[1])]
    other = torch.where(mask.bool(), tokens, 17)
    outputs = [
        reward_model.model.base_model(input_ids=each, attention_mask=mask).last_hidden_state[mask.bool()]
        for each in (tokens, other)
    ]
    assert torch.equal(*outputs)


def test_batches_of_similar_length():
    # longest first: 9 alone fills 9 of 12; 5 + 5 fill 10; 2 and 1 fill 4
    assert by_length([5, 9, 1, 5, 2], 12) == [[1], [0, 3], [4, 2]]
    assert by_length([30, 20], 12) == [[0], [1]]


# --- saved and read again -----------------------------------------------------------------------------------------


def test_transformers_reads_the_same_rewards_in_padded_batches(
    tmp_path: Path, reward_model: RewardModel, ids: list[list[int]]
):
    expected = reward_model.rewards(ids)
    reward_model.save(tmp_path)
    theirs: Any = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    batch = tokenizer.pad({"input_ids": ids}, return_tensors="pt")
    assert (batch["input_ids"] == tokenizer.pad_token_id).any()
    logits = theirs(**batch).logits
    assert logits.shape == (5, 1)
    assert logits[:, 0].detach() == pytest.approx(expected, abs=1e-5)
    again = RewardModel.load(tmp_path).rewards(ids)
    assert torch.equal(again, expected)


def test_a_padding_token_that_texts_hold_is_replaced(tiny_model: Path, reward_model: RewardModel):
    before = AutoTokenizer.from_pretrained(tiny_model)
    assert before.pad_token == before.eos_token == "<|im_end|>"
    assert reward_model.tokenizer.pad_token == "[PAD]"
    assert reward_model.tokenizer.pad_token_id == len(before)
    table = reward_model.model.get_input_embeddings().weight
    assert len(table) == len(before) + 1
    assert not table[-1].any()
    assert reward_model.model.config.pad_token_id == len(before)


def test_a_model_loaded_with_shared_padding_is_saved_with_its_own(
    tmp_path: Path, tiny_model: Path, ids: list[list[int]]
):
    LlamaForSequenceClassification.from_pretrained(tiny_model, num_labels=1).save_pretrained(tmp_path / "theirs")
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(tmp_path / "theirs")
    theirs = RewardModel.load(tmp_path / "theirs")
    ids = [each[:-1] for each in ids]  # their last token is the shared one now
    assert {each[-1] for each in ids} == {theirs.tokenizer.pad_token_id}
    expected = theirs.rewards(ids)
    theirs.save(tmp_path / "ours")
    plain: Any = AutoModelForSequenceClassification.from_pretrained(tmp_path / "ours")
    batch = AutoTokenizer.from_pretrained(tmp_path / "ours").pad({"input_ids": ids}, return_tensors="pt")
    assert plain(**batch).logits[:, 0].detach() == pytest.approx(expected, abs=1e-5)


def test_the_first_blocks_of_the_base_under_a_head_of_the_seed(tmp_path: Path, tiny_model: Path, model: Any):
    one = RewardModel.fresh(tiny_model, n_blocks=1, seed=3)
    assert len(one.model.base_model.layers) == one.model.config.num_hidden_layers == 1
    mine, base = one.model.base_model.state_dict(), model.base_model.state_dict()
    assert all(torch.equal(value, base[name]) for name, value in mine.items() if "embed" not in name)
    assert torch.equal(mine["embed_tokens.weight"][:-1], base["embed_tokens.weight"])
    head = one.model.score.weight
    assert torch.equal(head, RewardModel.fresh(tiny_model, seed=3).model.score.weight)
    assert not torch.equal(head, RewardModel.fresh(tiny_model, seed=4).model.score.weight)
    assert 0.5 < float(head.std()) * 32**0.5 < 1.5
    one.save(tmp_path)
    assert RewardModel.load(tmp_path).model.config.num_hidden_layers == 1


def test_lists_with_an_entry_a_block_are_cut(tmp_path: Path, tiny_model: Path):
    config = Qwen2Config(
        vocab_size=800, hidden_size=16, intermediate_size=16, num_hidden_layers=4, num_attention_heads=2,
        num_key_value_heads=1, max_window_layers=2, use_sliding_window=True, sliding_window=8,
    )  # fmt: skip
    assert config.layer_types == ["full_attention"] * 2 + ["sliding_attention"] * 2
    Qwen2ForCausalLM(config).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(tmp_path)
    made = RewardModel.fresh(tmp_path, n_blocks=3, seed=0)
    assert made.model.config.layer_types == ["full_attention", "full_attention", "sliding_attention"]
    assert made.rewards([[5, 6, 7], [8] * 20]).isfinite().all()


def test_drawing_a_head_leaves_torchs_own_generator_alone(tiny_model: Path):
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    RewardModel.fresh(tiny_model, seed=0)
    assert torch.equal(torch.random.get_rng_state(), before)


# --- refused ------------------------------------------------------------------------------------------------------


def test_a_language_model_is_no_reward_model(tiny_model: Path):
    with pytest.raises(InputError, match="is LlamaForCausalLM, which has no reward head; give a model"):
        RewardModel.load(tiny_model)


def test_a_head_of_three_outputs(tmp_path: Path, tiny_model: Path):
    LlamaForSequenceClassification.from_pretrained(tiny_model, num_labels=3).save_pretrained(tmp_path)
    with pytest.raises(InputError, match="has 3 outputs, and a reward model's has 1"):
        RewardModel.load(tmp_path)


def test_a_head_of_another_name(tmp_path: Path):
    config = BertConfig(vocab_size=8, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)
    config.num_labels = 1
    BertForSequenceClassification(config).save_pretrained(tmp_path)
    tokenizer = Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(tmp_path)
    with pytest.raises(InputError, match="BertForSequenceClassification, whose head is not a linear layer"):
        RewardModel.load(tmp_path)


def test_missing_folders_weights_and_blocks(tmp_path: Path, tiny_model: Path, reward_model: RewardModel):
    with pytest.raises(InputError, match="does not exist"):
        RewardModel.load(tmp_path / "none")
    with pytest.raises(InputError, match=r"has no config\.json"):
        RewardModel.fresh(tmp_path, seed=0)
    with pytest.raises(InputError, match=r"n_blocks = 3, but .* has 2 blocks"):
        RewardModel.fresh(tiny_model, n_blocks=3, seed=0)
    folder = tmp_path / "headless"
    whole: Any = LlamaForSequenceClassification.from_pretrained(tiny_model, num_labels=1)
    whole.base_model.save_pretrained(folder)
    shutil.copy(tiny_model / "tokenizer.json", folder)
    whole.config.architectures = ["LlamaForSequenceClassification"]
    whole.config.save_pretrained(folder)
    with pytest.raises(InputError, match=r"lack score\.weight"):
        RewardModel.load(folder)
