"""The language model room on a tiny random model: hook points, packing, readable tokens, generation, texts, harvest."""

import json
import shutil
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from safesail.errors import InputError
from safesail.lm.activations import Activations, harvest, packed_inputs
from safesail.lm.corpus import Piece, gather, pack, texts_fingerprint
from safesail.lm.embed import SentenceEncoder
from safesail.lm.generate import chat_prompt, complete, end_ids, stream
from safesail.lm.hooks import capture, check_hook_points, replace, run_to_depth
from safesail.lm.load import causal_lm, files_fingerprint, load_tokenizer, model_fingerprint, tokenizer_hash
from safesail.lm.size import lm_size
from safesail.lm.tokens import counted, spans, special_ids, token_bytes
from safesail.recipe import CorpusSection, TokenPolicy
from safesail.taxonomy import Taxonomy

pytestmark = pytest.mark.usefixtures("one_thread")

BOTH = ("layers.0.mlp", "layers.1.mlp")
TAXONOMY = Taxonomy.load()


@pytest.fixture(scope="module")
def exact_model(tiny_model: Path) -> Any:
    """The same model in double precision, in which the order of a sum does not show."""
    return causal_lm(str(tiny_model), dtype=torch.float64)


def random_ids(*lengths: int, seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(2, 480, (n,), generator=generator).tolist() for n in lengths]


# --- hook points --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("hook_point", ["layers.2.mlp", "layer.0.mlp", "model.layers.0.mlp", "layers.0.mpl", "lm_head"])
def test_an_unknown_hook_point_is_named_with_those_that_exist(model: Any, hook_point: str):
    with pytest.raises(InputError, match=r"LlamaModel has no hook point") as caught:
        check_hook_points(model, ("layers.0.mlp", hook_point))
    assert repr(hook_point) in str(caught.value)
    assert "layers.0-1.mlp" in str(caught.value)
    assert "layers.0-1.self_attn" in str(caught.value)


def test_hook_points_that_exist_are_accepted(model: Any):
    check_hook_points(model, ("layers.0.mlp", "layers.1", "layers.1.self_attn", "embed_tokens"))


@pytest.mark.parametrize("names", [BOTH, ("layers.0", "layers.0.self_attn"), ("layers.1.mlp", "layers.0.mlp")])
@torch.inference_mode()
def test_run_to_depth_equals_the_hooked_full_forward(model: Any, names: tuple[str, ...]):
    ids = torch.tensor(random_ids(9, 9))
    with capture(model, names) as outputs:
        model(input_ids=ids)
    shallow = run_to_depth(model, names, input_ids=ids)
    assert set(shallow) == set(names)
    assert all(shallow[name].shape == (2, 9, 32) for name in names)
    assert all(torch.equal(shallow[name], outputs[name]) for name in names)


@torch.inference_mode()
def test_the_mlp_hook_point_is_the_output_before_the_residual_addition(model: Any):
    ids = torch.tensor(random_ids(7))
    found = run_to_depth(model, ("layers.0.mlp", "layers.0"), input_ids=ids)
    block = model.model.layers[0]
    residual = found["layers.0"] - found["layers.0.mlp"]  # the stream after attention
    expected = block.mlp(block.post_attention_layernorm(residual))
    torch.testing.assert_close(found["layers.0.mlp"], expected, rtol=0, atol=1e-5)


@torch.inference_mode()
def test_run_to_depth_runs_no_later_layer_and_no_lm_head(model: Any):
    ran: Counter[str] = Counter()
    watched = {"block 0": model.model.layers[0], "attention 0": model.model.layers[0].self_attn}
    watched |= {"block 1": model.model.layers[1], "norm": model.model.norm, "head": model.lm_head}
    handles = [
        module.register_forward_hook(lambda *_, name=name: ran.update([name])) for name, module in watched.items()
    ]
    run_to_depth(model, ("layers.0.mlp",), input_ids=torch.tensor(random_ids(5)))
    assert ran == {"attention 0": 1}  # block 0 itself never finishes
    model(input_ids=torch.tensor(random_ids(5)))
    assert ran == {"attention 0": 2, "block 0": 1, "block 1": 1, "norm": 1, "head": 1}
    for handle in handles:
        handle.remove()


def test_no_hook_is_left_behind(model: Any):
    run_to_depth(model, BOTH, input_ids=torch.tensor(random_ids(5)))
    with pytest.raises(ZeroDivisionError), capture(model, BOTH):
        raise ZeroDivisionError
    with pytest.raises(ZeroDivisionError), replace(model, BOTH[0], lambda x: x):
        raise ZeroDivisionError
    assert not any(module._forward_hooks for module in model.modules())


@torch.inference_mode()
def test_replace_changes_the_output_inside_the_context_only(model: Any):
    ids = torch.tensor(random_ids(6))
    clean = model(input_ids=ids).logits
    with replace(model, "layers.1.mlp", torch.zeros_like):
        zeroed = model(input_ids=ids).logits
    with replace(model, "layers.1.mlp", lambda x: x):
        same = model(input_ids=ids).logits
    assert not torch.allclose(zeroed, clean, atol=1e-2)
    assert torch.equal(same, clean)
    assert torch.equal(model(input_ids=ids).logits, clean)


# --- packing ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(6))
def test_pack_uses_every_piece_once_and_never_exceeds_the_window(seed: int):
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(
        1, 65, (int(torch.randint(1, 3000, (1,), generator=generator)),), generator=generator
    ).tolist()
    windows = pack(lengths, 64)
    assert sorted(i for members in windows for i in members) == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in members) <= 64 for members in windows)
    assert len(windows) <= sum(lengths) / 64 * 1.15 + len(lengths) // 1024 + 2  # and wastes little


def test_pack_by_hand():
    assert pack([3, 10, 7, 4, 6], 10) == [[1], [2, 0], [4, 3]]


@torch.inference_mode()
def activations_of(model: Any, pieces: list[list[int]], windows: list[list[int]]) -> list[dict[str, Tensor]]:
    """Per piece, what the model gives at both hook points when the pieces are packed so."""
    inputs = packed_inputs(pieces, windows)
    owner = inputs.pop("owner")
    outputs = run_to_depth(model, BOTH, **inputs)
    return [{name: output[owner == i] for name, output in outputs.items()} for i in range(len(pieces))]


@torch.inference_mode()
def alone(model: Any, piece: list[int]) -> dict[str, Tensor]:
    return {name: x[0] for name, x in run_to_depth(model, BOTH, input_ids=torch.tensor([piece])).items()}


@pytest.mark.parametrize(
    ("lengths", "windows"),
    [
        ((5, 9, 3), [[0, 1, 2]]),
        ((5, 9, 3), [[2, 0], [1]]),
        ((2, 120), [[1, 0]]),
        ((2, 120), [[0], [1]]),  # alone beside 118 tokens of padding
        ((30, 30, 30, 30), [[3, 1], [0, 2]]),
    ],
)
def test_a_packed_piece_has_the_activations_it_has_alone(
    exact_model: Any, lengths: tuple[int, ...], windows: list[list[int]]
):
    pieces = random_ids(*lengths)
    for piece, packed in zip(pieces, activations_of(exact_model, pieces, windows), strict=True):
        for name, expected in alone(exact_model, piece).items():
            assert expected.abs().max() > 0.1
            torch.testing.assert_close(packed[name], expected, rtol=0, atol=1e-9)


def test_the_neighbour_in_a_window_does_not_matter(exact_model: Any):
    piece, first, second = *random_ids(6), *random_ids(60, seed=1), *random_ids(3, seed=2)
    beside_first = activations_of(exact_model, [first, piece], [[0, 1]])[1]
    beside_second = activations_of(exact_model, [second, piece], [[0, 1]])[1]
    for name in BOTH:
        torch.testing.assert_close(beside_first[name], beside_second[name], rtol=0, atol=1e-9)


def test_packed_inputs_by_hand():
    inputs = packed_inputs([[7, 8], [9], [4, 5, 6]], [[0, 1], [2]])
    assert inputs["input_ids"].tolist() == [[7, 8, 9], [4, 5, 6]]
    assert inputs["position_ids"].tolist() == [[0, 1, 0], [0, 1, 2]]
    assert inputs["owner"].tolist() == [[0, 0, 1], [2, 2, 2]]
    assert inputs["attention_mask"][:, 0].int().tolist() == [
        [[1, 0, 0], [1, 1, 0], [0, 0, 1]],
        [[1, 0, 0], [1, 1, 0], [1, 1, 1]],
    ]


# --- tokens -------------------------------------------------------------------------------------------------------

WRITTEN = {
    "English": "The president's house, in 2019.",
    "Chinese": "他在街上卖枪支和毒品。",
    "Devanagari": "नमस्ते, यह एक परीक्षण है।",
    "Arabic": "السلام عليكم، هذا اختبار.",
    "emoji with skin tone": "well done 👍🏽👩🏿‍🚀!",
    "mixed": "a枪b\n\tनc  👍🏽 é\u0301 ﷽ \u00a0end",
    "replacement sign": "really \ufffd typed",
    "spaces": "   leading and trailing   ",
}


@pytest.mark.parametrize("text", WRITTEN.values(), ids=WRITTEN.keys())
def test_spans_join_to_the_exact_text(tokenizer: Any, text: str):
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    units = spans(tokenizer, ids)
    assert "".join(unit.text for unit in units) == text
    assert all("\ufffd" not in unit.text for unit in units) or "\ufffd" in text
    assert not any(unit.special for unit in units)
    assert [unit.start for unit in units] == [0, *(unit.end for unit in units[:-1])]
    assert units[-1].end == len(ids)


def test_a_character_split_over_tokens_is_one_unit(tokenizer: Any):
    ids = tokenizer("枪👍", add_special_tokens=False)["input_ids"]
    assert len(ids) == 7  # this vocabulary knows neither: three bytes and four
    assert [(unit.text, unit.start, unit.end) for unit in spans(tokenizer, ids)] == [("枪", 0, 3), ("👍", 3, 7)]


def test_token_bytes_are_the_bytes_of_the_text(tokenizer: Any):
    for text in WRITTEN.values():
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert b"".join(token_bytes(tokenizer, ids)) == text.encode()


def test_lone_bytes_show_as_the_replacement_sign_and_swallow_nothing(tokenizer: Any):
    whole = tokenizer("枪", add_special_tokens=False)["input_ids"]
    a = tokenizer("a", add_special_tokens=False)["input_ids"]
    units = spans(tokenizer, [*whole[:2], *a, *whole, whole[2]])
    assert [unit.text for unit in units] == ["\ufffd", "\ufffd", "a", "枪", "\ufffd"]
    assert [(unit.start, unit.end) for unit in units] == [(0, 1), (1, 2), (2, 3), (3, 6), (6, 7)]


def test_special_tokens_are_flagged_and_shown_as_they_are_written(tokenizer: Any):
    ids = tokenizer("<|im_start|>hi<|im_end|>", add_special_tokens=False)["input_ids"]
    units = spans(tokenizer, ids)
    assert [unit.text for unit in units if unit.special] == ["<|im_start|>", "<|im_end|>"]
    assert "".join(unit.text for unit in units if not unit.special) == "hi"
    assert special_ids(tokenizer) == [0, 1]


def test_a_special_token_does_not_join_a_broken_character(tokenizer: Any):
    start, *broken = tokenizer("<|im_start|>枪", add_special_tokens=False)["input_ids"]
    units = spans(tokenizer, [*broken[:2], start, broken[2]])
    assert [unit.text for unit in units if unit.special] == ["<|im_start|>"]


def test_no_tokens_give_no_spans(tokenizer: Any):
    assert spans(tokenizer, []) == []


def sentencepiece_like() -> Any:
    """A byte-fallback vocabulary: ▁ for space, <0x..> for bytes without a piece."""
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    pieces = ["<unk>", "<s>", "▁", "a", "▁a", *(f"<0x{b:02X}>" for b in range(256))]
    backend = Tokenizer(
        models.BPE({piece: i for i, piece in enumerate(pieces)}, [("▁", "a")], unk_token="<unk>", byte_fallback=True)
    )
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", unk_token="<unk>")


def test_a_byte_fallback_vocabulary_is_undone_as_well():
    tokenizer = sentencepiece_like()
    ids = tokenizer("a▁a枪", add_special_tokens=False)["input_ids"]
    assert [unit.text for unit in spans(tokenizer, ids)] == ["a", " a", "枪"]
    assert b"".join(token_bytes(tokenizer, ids)) == "a a枪".encode()


# --- the token policy ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("exclude_special", "multiple", "median", "expected"),
    [
        (True, 10.0, 2.0, [False, True, True, False, False]),
        (True, None, 2.0, [False, True, True, True, False]),
        (False, 10.0, 2.0, [True, True, True, False, False]),
        (False, None, 2.0, [True, True, True, True, True]),
        (True, 10.0, None, [False, True, True, True, False]),
        (False, 2.0, 2.0, [True, True, False, False, False]),
    ],
)
def test_which_tokens_count_by_hand(
    exclude_special: bool, multiple: float | None, median: float | None, expected: list
):
    policy = TokenPolicy(exclude_special=exclude_special, sink_norm_multiple=multiple)
    ids, norms = torch.tensor([0, 5, 6, 7, 1]), torch.tensor([1.0, 2.0, 20.0, 20.1, 99.0])
    assert counted(policy, ids, norms, [0, 1], median).tolist() == expected


def test_counting_keeps_the_shape_and_copes_without_specials():
    ids, norms = torch.zeros(2, 3, dtype=torch.long), torch.ones(2, 3)
    assert counted(TokenPolicy(), ids, norms, [], 1.0).tolist() == [[True] * 3] * 2
    assert counted(TokenPolicy(), ids, norms, [0], 1.0).tolist() == [[False] * 3] * 2


# --- generation ---------------------------------------------------------------------------------------------------

PROMPTS = ["The president", "a", "Why did the nude change so much after the long", "In 2019 the bomb came back and"]


def greedy_by_hand(model: Any, ids: list[int], n: int, ends: set[int]) -> list[int]:
    """The most likely token again and again, each from a fresh full forward pass."""
    answer: list[int] = []
    with torch.inference_mode():
        while len(answer) < n:
            token = int(model(input_ids=torch.tensor([ids + answer])).logits[0, -1].argmax())
            answer.append(token)
            if token in ends:
                break
    return answer


def test_batched_completions_equal_those_one_by_one_and_those_by_hand(model: Any, tokenizer: Any):
    batched = complete(model, tokenizer, PROMPTS, 12)
    assert batched == [complete(model, tokenizer, [prompt], 12)[0] for prompt in PROMPTS]
    ends = end_ids(model, tokenizer)
    for prompt, (text, n_prompt, n_completion) in zip(PROMPTS, batched, strict=True):
        ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
        kept = [token for token in greedy_by_hand(model, ids, 12, ends) if token not in ends]
        assert (text, n_prompt, n_completion) == (tokenizer.decode(kept), len(ids), len(kept))


def test_batching_does_not_move_the_positions_of_a_model_that_learns_them(tokenizer: Any):
    """A GPT-2 adds a vector per position, so padding on the left would be seen if it shifted them."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=len(tokenizer), n_positions=64, n_embd=32, n_layer=1, n_head=2, initializer_range=0.5, eos_token_id=1
    )
    model = GPT2LMHeadModel(config).eval()
    batched = complete(model, tokenizer, PROMPTS, 8)
    assert batched == [complete(model, tokenizer, [prompt], 8)[0] for prompt in PROMPTS]
    ids = tokenizer(PROMPTS[1], add_special_tokens=False)["input_ids"]
    assert batched[1][0] == tokenizer.decode(greedy_by_hand(model, ids, 8, {1}))


def test_a_completion_ends_before_the_first_stop_string(model: Any, tokenizer: Any):
    (text, _, n), *_ = complete(model, tokenizer, PROMPTS[:1], 12)
    stop = text[len(text) // 2 : len(text) // 2 + 2]
    (stopped, _, n_stopped), *_ = complete(model, tokenizer, PROMPTS[:1], 12, (stop, "never there"))
    assert stopped == text[: text.index(stop)]
    assert n_stopped < n


def test_one_stopped_completion_does_not_stop_the_others(model: Any, tokenizer: Any):
    free = complete(model, tokenizer, PROMPTS, 10)
    stop = free[0][0][3:5]
    stopped = complete(model, tokenizer, PROMPTS, 10, (stop,))
    assert [text for text, _, _ in stopped] == [text.split(stop)[0] for text, _, _ in free]


def test_a_greedy_stream_is_deterministic_and_right(model: Any, tokenizer: Any):
    ids, _ = chat_prompt(tokenizer, [{"role": "user", "content": "hello"}])
    answer = list(stream(model, ids, 15, set()))
    assert answer == list(stream(model, ids, 15, set(), seed=5)) == greedy_by_hand(model, ids, 15, set())


def test_a_sampled_stream_depends_on_its_seed_alone(model: Any):
    ids = random_ids(5)[0]
    first = list(stream(model, ids, 15, set(), temperature=1.0, seed=3))
    torch.rand(7)
    assert list(stream(model, ids, 15, set(), temperature=1.0, seed=3)) == first
    assert list(stream(model, ids, 15, set(), temperature=1.0, seed=4)) != first


def test_a_stream_ends_with_the_end_token(model: Any):
    ids = random_ids(5)[0]
    answer = list(stream(model, ids, 15, set()))
    end = answer[6]
    assert list(stream(model, ids, 15, {end})) == answer[: answer.index(end) + 1]
    assert list(stream(model, ids, 0, set())) == []


def test_the_chat_template_is_used_and_opens_the_answer(tokenizer: Any):
    ids, _ = chat_prompt(tokenizer, [{"role": "user", "content": "hello"}])
    text = "".join(unit.text for unit in spans(tokenizer, ids))
    assert text == "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"


def test_a_tokenizer_without_a_template_gets_the_plain_text(tiny_model: Path):
    tokenizer = load_tokenizer(str(tiny_model))
    tokenizer.chat_template = None
    ids, _ = chat_prompt(tokenizer, [{"role": "system", "content": "be kind"}, {"role": "user", "content": "hello"}])
    assert "".join(unit.text for unit in spans(tokenizer, ids)) == "be kind\nhello"


# --- sentences ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def encoder(tiny_encoder: Path) -> SentenceEncoder:
    return SentenceEncoder(str(tiny_encoder))


SENTENCES = ["the garden", "a long letter about the river and the music of the summer", "bomb", "the garden", "river"]


def test_embeddings_are_unit_vectors_in_the_order_asked_for(encoder: SentenceEncoder):
    vectors = encoder.encode(SENTENCES)
    torch.testing.assert_close(vectors.norm(dim=1), torch.ones(5))
    assert torch.equal(vectors[0], vectors[3])
    for text, vector in zip(SENTENCES, vectors, strict=True):
        torch.testing.assert_close(encoder.encode([text])[0], vector, rtol=0, atol=1e-5)
    cosines = vectors @ vectors.T
    assert cosines[0, 2] < 0.999
    assert cosines[1, 4] < 0.999


def test_embeddings_do_not_depend_on_the_batch_size(encoder: SentenceEncoder):
    torch.testing.assert_close(encoder.encode(SENTENCES, batch_size=1), encoder.encode(SENTENCES), rtol=0, atol=1e-5)


def test_an_embedding_is_the_mean_over_the_tokens(encoder: SentenceEncoder, tiny_encoder: Path):
    from transformers import AutoModel

    inputs = load_tokenizer(str(tiny_encoder))("the river", return_tensors="pt")
    with torch.inference_mode():
        mean = AutoModel.from_pretrained(tiny_encoder)(**inputs).last_hidden_state[0].mean(0)
    torch.testing.assert_close(encoder.encode(["the river"])[0], mean / mean.norm(), rtol=0, atol=1e-5)


def test_equal_texts_are_encoded_once_and_no_texts_are_no_error(encoder: SentenceEncoder):
    counts: list[int] = []
    encoder.encode(["a", "b", "a", "a"], progress=counts.append)
    assert sum(counts) == 2
    assert len(encoder.encode([])) == 0


# --- texts --------------------------------------------------------------------------------------------------------


def corpus(sources: list[dict[str, Any]], n_tokens: int = 4000, **changes: Any) -> CorpusSection:
    settings = {"n_tokens": n_tokens, "n_held_out_tokens": n_tokens // 4, "context": 24, "sources": sources}
    return CorpusSection.model_validate(settings | changes)


def pieces_of(section: CorpusSection, tokenizer: Any, seed: int = 0) -> list[Piece]:
    return gather(section, TAXONOMY, tokenizer, seed)


def test_held_out_and_halves_are_by_document(texts: Path, tokenizer: Any):
    pieces = pieces_of(corpus([{"path": str(texts)}], n_tokens=20_000), tokenizer)
    by_document: dict[str, set[tuple[bool, str]]] = {}
    for piece in pieces:
        by_document.setdefault(piece.document, set()).add((piece.held_out, piece.half))
    assert all(len(sides) == 1 for sides in by_document.values())
    assert Counter(piece.document for piece in pieces).most_common(1)[0][1] > 1  # documents of several pieces
    sides = [next(iter(side)) for side in by_document.values()]
    assert len(sides) > 200
    assert sum(held_out for held_out, _ in sides) / len(sides) == pytest.approx(0.25, abs=0.08)
    assert sum(half == "score" for _, half in sides) / len(sides) == pytest.approx(0.5, abs=0.1)
    assert len({*sides}) == 4  # held out and half are independent


def test_a_document_is_on_the_same_side_whatever_else_is_asked_for(texts: Path, tokenizer: Any):
    small = pieces_of(corpus([{"path": str(texts)}]), tokenizer, seed=1)
    large = pieces_of(corpus([{"path": str(texts)}], n_tokens=20_000), tokenizer, seed=2)
    side = {piece.document: (piece.held_out, piece.half) for piece in large}
    shared = [piece for piece in small if piece.document in side]
    assert len(shared) > 20
    assert all(side[piece.document] == (piece.held_out, piece.half) for piece in shared)


def test_pieces_are_cut_at_the_context_and_join_to_the_document(texts: Path, tokenizer: Any):
    pieces = pieces_of(corpus([{"path": str(texts)}]), tokenizer)
    assert max(len(piece.ids) for piece in pieces) == 24
    assert min(len(piece.ids) for piece in pieces) >= 2
    written = {row["id"]: row["text"] for row in map(json.loads, texts.read_text().splitlines())}
    ids = tokenizer(written[pieces[0].document], add_special_tokens=False)["input_ids"]
    cuts = [ids[i : i + 24] for i in range(0, len(ids), 24)]
    mine = [piece.ids for piece in pieces if piece.document == pieces[0].document]
    assert sorted(mine) == sorted(cut for cut in cuts if len(cut) >= 2)


def test_every_source_fills_its_share(texts: Path, tokenizer: Any):
    copies = [str(texts.with_name(f"share{i}.jsonl")) for i in range(2)]
    for i, copy in enumerate(copies):
        rows = [json.loads(line) for line in texts.read_text().splitlines()]
        Path(copy).write_text("".join(json.dumps(row | {"id": f"{i}/{row['id']}"}) + "\n" for row in rows))
    sources = [
        {"path": copies[0], "weight": 3.0, "origin": "large"},
        {"path": copies[1], "weight": 1.0, "origin": "small"},
    ]
    pieces = pieces_of(corpus(sources, n_tokens=8000), tokenizer)
    n_tokens: Counter[str] = Counter()
    for piece in pieces:
        n_tokens[piece.source] += len(piece.ids)
    assert n_tokens["large"] == pytest.approx(6000, abs=100)  # a document more at most
    assert n_tokens["small"] == pytest.approx(2000, abs=100)
    assert all(n >= quota for n, quota in ((n_tokens["large"], 6000), (n_tokens["small"], 2000)))
    assert len({piece.source for piece in pieces[:20]}) == 2  # shuffled together


def test_a_text_is_taken_once_though_several_sources_hold_it(tmp_path: Path, tokenizer: Any):
    """The domain's source comes first and takes its texts; the other gets the rest, repeats left out."""
    texts = [f"The terrorist wrote letter number {i} near the river." for i in range(40)]
    texts += [f"The teacher wrote letter number {i} near the river." for i in range(60)]
    path = tmp_path / "all.jsonl"
    rows = [{"id": str(i), "text": text} for i, text in enumerate([*texts, *texts])]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    sources = [{"path": str(path), "about": "terror", "origin": "a"}, {"path": str(path), "origin": "b"}]
    pieces = pieces_of(corpus(sources, n_tokens=600, context=64), tokenizer)
    taken = [tuple(piece.ids) for piece in pieces]
    assert len(set(taken)) == len(taken)
    assert {piece.source for piece in pieces} == {"a", "b"}


def test_a_source_without_an_origin_is_not_named_by_its_folder(texts: Path, tokenizer: Any):
    """What a piece says of its source is published: the cards and the examples name it."""
    pieces = pieces_of(corpus([{"path": str(texts)}]), tokenizer)
    assert not any(str(texts.parent) in piece.source for piece in pieces)
    assert all("mini" in piece.source for piece in pieces)


def test_the_same_seed_gives_the_same_pieces(texts: Path, tokenizer: Any):
    section = corpus([{"path": str(texts)}])
    assert pieces_of(section, tokenizer) == pieces_of(section, tokenizer)
    assert pieces_of(section, tokenizer, seed=1) != pieces_of(section, tokenizer)


def test_about_keeps_only_texts_with_a_word_of_the_domain(texts: Path, tokenizer: Any):
    pieces = pieces_of(corpus([{"path": str(texts), "about": "terror"}]), tokenizer)
    written = {row["id"]: row["text"] for row in map(json.loads, texts.read_text().splitlines())}
    about = TAXONOMY.about("terror")
    assert pieces
    assert all(about.search(written[piece.document]) for piece in pieces)
    with pytest.raises(InputError, match="politics, pornography, violence, terror"):
        pieces_of(corpus([{"path": str(texts), "about": "sports"}]), tokenizer)


@pytest.mark.parametrize("about", [None, "terror"])
def test_a_source_that_runs_dry_says_how_much_it_has_and_how_much_was_asked(
    texts: Path, tokenizer: Any, about: str | None
):
    sources = [{"path": str(texts), "about": about, "weight": 1.0}, {"path": str(texts), "weight": 3.0}]
    with pytest.raises(InputError) as caught:
        pieces_of(corpus(sources, n_tokens=4_000_000), tokenizer)
    numbers = [word for word in str(caught.value).split() if word[0].isdigit()]
    assert str(texts) in str(caught.value)
    assert numbers[1].rstrip(";") == "1,000,000"
    rows = dict.fromkeys(json.loads(line)["text"] for line in texts.read_text().splitlines())  # each text counts once
    kept = [text for text in rows if about is None or TAXONOMY.about(about).search(text)]
    n = sum(len(ids) for ids in tokenizer(kept, add_special_tokens=False)["input_ids"])
    assert abs(int(numbers[0].replace(",", "")) - n) <= len(kept)  # pieces of a single token are left out
    assert ("about terror" in str(caught.value)) == (about is not None)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.jsonl", "", r"empty\.jsonl is empty"),
        ("field.jsonl", '{"body": "x", "n": 1}\n', "no field 'text'; it has body, n"),
        ("broken.jsonl", '{"text": "x"\n{{{', r"broken\.jsonl cannot be read as json"),
        ("notes.docx", "x", r"is none of \.json, \.jsonl, \.parquet, \.csv, \.txt"),
        ("broken.parquet", "PAR1 but not really", r"broken\.parquet cannot be read as parquet"),
        (
            "blank.jsonl",
            '{"text": "  "}\n{"text": null}\n',
            r"gives 0 tokens of new text, but its weight asks for 4,000",
        ),
    ],
)
def test_a_source_that_cannot_be_read_is_named(tmp_path: Path, tokenizer: Any, name: str, content: str, message: str):
    (tmp_path / name).write_text(content)
    with pytest.raises(InputError, match=message) as caught:
        pieces_of(corpus([{"path": str(tmp_path / name)}]), tokenizer)
    assert name in str(caught.value)


def test_a_missing_file_is_named(tmp_path: Path, tokenizer: Any):
    with pytest.raises(InputError, match=r"there is no text file .*gone\.jsonl"):
        pieces_of(corpus([{"path": str(tmp_path / "gone.jsonl")}]), tokenizer)


@pytest.mark.parametrize("name", ["t.jsonl", "t.csv", "t.txt", "t.parquet", "t.json"])
def test_every_named_file_format_is_read(tmp_path: Path, tokenizer: Any, name: str):
    import pyarrow as pa
    import pyarrow.parquet as pq

    lines = [f"The teacher saw garden {i} near the river." for i in range(40)]
    path = tmp_path / name
    match path.suffix:
        case ".jsonl":
            path.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
        case ".json":
            path.write_text(json.dumps([{"text": line} for line in lines]))
        case ".csv":
            path.write_text("text\n" + "\n".join(lines) + "\n")
        case ".txt":
            path.write_text("\n".join(lines) + "\n")
        case ".parquet":
            pq.write_table(pa.table({"text": lines}), path)
    pieces = pieces_of(corpus([{"path": str(path)}], n_tokens=200), tokenizer)
    assert {spans_text(tokenizer, piece) for piece in pieces} <= set(lines)


def spans_text(tokenizer: Any, piece: Piece) -> str:
    return "".join(unit.text for unit in spans(tokenizer, piece.ids))


def test_the_fingerprint_of_the_texts_follows_their_content(tmp_path: Path):
    path = tmp_path / "t.jsonl"
    path.write_text('{"text": "one"}\n')
    section = corpus([{"path": str(path)}])
    before = texts_fingerprint(section, files_fingerprint)
    assert texts_fingerprint(section, files_fingerprint) == before
    path.write_text('{"text": "two"}\n')
    assert texts_fingerprint(section, files_fingerprint) != before


# --- harvest ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pieces(texts: Path, tokenizer: Any) -> list[Piece]:
    return pieces_of(corpus([{"path": str(texts)}], n_tokens=6000), tokenizer)


def harvested(model: Any, pieces: list[Piece], folder: Path, **changes: Any) -> dict[str, bytes]:
    """{file name: content} after a harvest into `folder`."""
    folder.mkdir(exist_ok=True)
    options = {"specials": [0, 1], "window": 32, "windows_per_batch": 8}
    harvest(model, pieces, BOTH, folder, **(options | changes))
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.fixture(scope="module")
def whole(model: Any, pieces: list[Piece], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("harvest")
    assert len(harvested(model, pieces, folder)) == 2 + 2 * 4  # pieces, facts, four shards with their checksums
    return folder


def test_a_harvest_has_the_activations_of_every_piece_alone(model: Any, pieces: list[Piece], whole: Path):
    activations = Activations(whole)
    assert activations.n_tokens == sum(len(piece.ids) for piece in pieces)
    assert sorted(activations.piece_ids) == sorted(piece.ids for piece in pieces)
    for i in range(0, len(pieces), 41):
        first, ids = int(activations.row_start[i]), activations.piece_ids[i]
        rows = torch.arange(first, first + len(ids))
        assert activations.token_ids[rows].tolist() == ids
        for name, expected in alone(model, ids).items():
            torch.testing.assert_close(activations.rows(name, rows), expected, rtol=1e-3, atol=1e-3)  # 16 bits
            torch.testing.assert_close(activations.norms(name)[rows], expected.norm(dim=1), rtol=1e-5, atol=1e-5)


def test_every_row_belongs_to_its_document_and_side(pieces: list[Piece], whole: Path):
    activations = Activations(whole)
    expected = Counter({True: 0, False: 0})
    for piece in pieces:
        expected[piece.held_out] += len(piece.ids)
    assert Counter(activations.rows_held_out().tolist()) == expected
    found = {
        (d, h, tuple(i)) for d, h, i in zip(activations.documents, activations.half, activations.piece_ids, strict=True)
    }
    assert found == {(piece.document, piece.half, tuple(piece.ids)) for piece in pieces}


def test_rows_come_in_the_order_asked_for_and_blocks_in_row_order(whole: Path):
    activations = Activations(whole)
    everything = torch.cat([block for _, block in activations.blocks(BOTH[1], size=100)])
    starts = [(start, len(block)) for start, block in activations.blocks(BOTH[1], size=100)]
    assert [start for start, _ in starts] == [0, *torch.tensor([n for _, n in starts]).cumsum(0)[:-1].tolist()]
    wanted = torch.tensor([5000, 3, 3, 1700, 0, activations.n_tokens - 1])
    assert torch.equal(activations.rows(BOTH[1], wanted), everything[wanted])


@pytest.mark.parametrize("names", [["shard-00002"], ["shard-00000", "shard-00003"], ["harvest", "pieces"]])
def test_a_harvest_goes_on_where_shards_are_missing_to_the_same_bytes(
    model: Any, pieces: list[Piece], whole: Path, tmp_path: Path, names: list[str]
):
    shutil.copytree(whole, tmp_path / "copy")
    for path in (tmp_path / "copy").iterdir():
        if path.stem in names:
            path.unlink()
    kept = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "copy").glob("shard-*")}
    again = harvested(model, pieces, tmp_path / "copy")
    assert again == {path.name: path.read_bytes() for path in sorted(whole.iterdir())}
    assert all((tmp_path / "copy" / name).stat().st_mtime_ns == time for name, time in kept.items())


def test_a_harvest_does_not_depend_on_the_batch_size(model: Any, pieces: list[Piece], whole: Path, tmp_path: Path):
    harvested(model, pieces, tmp_path, windows_per_batch=3)
    one, other = Activations(whole), Activations(tmp_path)
    assert torch.equal(one.token_ids, other.token_ids)
    for name in BOTH:
        rows = torch.arange(one.n_tokens)
        torch.testing.assert_close(one.rows(name, rows), other.rows(name, rows), rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize(("value", "shown"), [(7e4, "70000"), (float("nan"), "nan"), (float("inf"), "inf")])
def test_an_activation_that_16_bits_do_not_hold_names_the_hook_point(
    model: Any, pieces: list[Piece], tmp_path: Path, value: float, shown: str
):
    message = rf"activation at layers\.1\.mlp is {shown}"
    with replace(model, "layers.1.mlp", lambda x: torch.full_like(x, value)), pytest.raises(InputError, match=message):
        harvested(model, pieces[:5], tmp_path)
    assert not list(tmp_path.glob("shard-*.safetensors"))


# --- loading ------------------------------------------------------------------------------------------------------


def without(folder: Path, target: Path, pattern: str) -> str:
    shutil.copytree(folder, target)
    for path in target.glob(pattern):
        path.unlink()
    return str(target)


@pytest.mark.parametrize(
    ("pattern", "message"), [("*.safetensors", "has no weights"), ("config.json", "no config.json")]
)
def test_a_model_folder_that_lacks_a_file_says_which(tiny_model: Path, tmp_path: Path, pattern: str, message: str):
    path = without(tiny_model, tmp_path / "model", pattern)
    with pytest.raises(InputError, match=message) as caught:
        causal_lm(path)
    assert path in str(caught.value)
    with pytest.raises(InputError, match=message):
        model_fingerprint(path)


@pytest.mark.parametrize("pattern", ["*.safetensors", "config.json"])
def test_an_encoder_folder_that_lacks_a_file_says_so(tiny_encoder: Path, tmp_path: Path, pattern: str):
    with pytest.raises(InputError, match="the model folder"):
        SentenceEncoder(without(tiny_encoder, tmp_path / "encoder", pattern))


@pytest.mark.parametrize("path", ["./gone", "/no/such/model", "a/b/c"])
def test_a_model_folder_that_does_not_exist_is_named(path: str):
    with pytest.raises(InputError, match=f"the model folder {path} does not exist"):
        causal_lm(path)


def test_models_that_threads_load_at_once_leave_transformers_as_it_was(tiny_model: Path, tiny_encoder: Path):
    from transformers import PreTrainedModel

    tie, jobs = PreTrainedModel.tie_weights, [causal_lm, SentenceEncoder, partial(lm_size, hook_points=(), window=4)]
    with ThreadPoolExecutor(8) as threads:
        paths = {SentenceEncoder: str(tiny_encoder)}
        done = [threads.submit(job, paths.get(job, str(tiny_model))) for job in jobs * 4]
        assert {future.result().n_parameters for future in done[2::3]} == {lm_size(str(tiny_model), (), 4).n_parameters}
    assert PreTrainedModel.tie_weights is tie


def test_damaged_weights_are_an_input_error(tiny_model: Path, tmp_path: Path):
    shutil.copytree(tiny_model, tmp_path / "model")
    weights = tmp_path / "model/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(InputError, match="cannot be loaded"):
        causal_lm(str(tmp_path / "model"))


def test_weights_that_lack_a_tensor_are_refused_and_not_made_up(tiny_model: Path, tmp_path: Path):
    """transformers fills a missing tensor with random numbers, and everything after would study those."""
    shutil.copytree(tiny_model, tmp_path / "model")
    weights, name = tmp_path / "model/model.safetensors", "model.layers.1.mlp.down_proj.weight"
    save_file({key: value for key, value in load_file(weights).items() if key != name}, weights, {"format": "pt"})
    with pytest.raises(InputError, match=r"layers\.1\.mlp\.down_proj"):
        causal_lm(str(tmp_path / "model"))


def test_a_model_fingerprint_follows_the_weights_and_the_vocabulary_hash_the_vocabulary(
    tiny_model: Path, tmp_path: Path, tokenizer: Any
):
    shutil.copytree(tiny_model, tmp_path / "model")
    copy = tmp_path / "model"
    assert model_fingerprint(str(copy)) == model_fingerprint(str(tiny_model))
    assert tokenizer_hash(load_tokenizer(str(copy))) == tokenizer_hash(tokenizer)
    data = bytearray((copy / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (copy / "model.safetensors").write_bytes(data)
    assert model_fingerprint(str(copy)) != model_fingerprint(str(tiny_model))
    tokenizer_copy = load_tokenizer(str(copy))
    tokenizer_copy.add_tokens(["new-word"])
    assert tokenizer_hash(tokenizer_copy) != tokenizer_hash(tokenizer)


def test_a_loaded_model_is_in_evaluation_mode_without_gradients(model: Any):
    assert not model.training
    assert not any(value.requires_grad for value in model.parameters())
