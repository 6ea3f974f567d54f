"""The harvest: conversations and roles, activations not to be stored, checksums, a full disk, ranks, changed inputs."""

import contextlib
import json
import resource
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from safesail.diagnosis.inspector import Inspector
from safesail.errors import InputError
from safesail.files import write_tensors
from safesail.lm.activations import Activations, harvest, remake
from safesail.lm.corpus import Piece, gather
from safesail.lm.generate import chat_prompt
from safesail.lm.hooks import replace, run_to_depth
from safesail.lm.load import load_tokenizer
from safesail.lm.shards import damaged, is_whole
from safesail.lm.tokens import ROLES, conversation, counted, role_codes, spans
from safesail.lm.windows import Storage
from safesail.neurons import NeuronDatabase
from safesail.pipeline import Pipeline
from safesail.recipe import CorpusSection, Recipe, TokenPolicy
from safesail.run import Run, write_json
from safesail.sae.config import SaeConfig
from safesail.sae.model import Sae
from safesail.taxonomy import Taxonomy

pytestmark = pytest.mark.usefixtures("one_thread")

REPOSITORY = Path(__file__).resolve().parent.parent
BOTH = ("layers.0.mlp", "layers.1.mlp")
CHAT = [
    {"role": "system", "content": "be kind"},
    {"role": "user", "content": "where is the river"},
    {"role": "assistant", "content": "near the garden"},
]


# --- roles --------------------------------------------------------------------------------------------------------


def turns(tokenizer: Any, ids: list[int], roles: list[int]) -> list[tuple[str, str]]:
    """(role, text) of each run of tokens of one role."""
    found: list[tuple[str, str]] = []
    for unit in spans(tokenizer, ids):
        role = ROLES[roles[unit.start]]
        if found and found[-1][0] == role:
            found[-1] = (role, found[-1][1] + unit.text)
        else:
            found.append((role, unit.text))
    return found


def test_every_token_of_a_conversation_has_the_role_of_its_turn(tokenizer: Any):
    ids, roles = conversation(tokenizer, CHAT)
    assert turns(tokenizer, ids, roles) == [
        ("system", "<|im_start|>system\nbe kind<|im_end|>\n"),
        ("user", "<|im_start|>user\nwhere is the river<|im_end|>\n"),
        ("assistant", "<|im_start|>assistant\nnear the garden<|im_end|>\n"),
    ]
    assert ids == tokenizer.apply_chat_template(CHAT, return_dict=True)["input_ids"]


def test_an_opened_answer_is_the_assistants_and_continues_to_the_training_tokens(tokenizer: Any):
    ids, roles = conversation(tokenizer, CHAT[:2], answer=True)
    assert turns(tokenizer, ids, roles)[-1] == ("assistant", "<|im_start|>assistant\n")
    whole, roles_of_whole = conversation(tokenizer, CHAT)
    assert (whole[: len(ids)], roles_of_whole[: len(ids)]) == (ids, roles)
    assert chat_prompt(tokenizer, CHAT[:2]) == (ids, roles)
    assert chat_prompt(tokenizer, CHAT[:2], roles=False) == (ids, None)


def with_template(tiny_model: Path, template: str | None) -> Any:
    tokenizer = load_tokenizer(str(tiny_model))
    tokenizer.chat_template = template
    return tokenizer


def test_a_system_prompt_that_the_template_puts_in_is_the_systems(tiny_model: Path):
    template = (
        "{% for m in messages %}{% if loop.first and m['role'] != 'system' %}<|im_start|>system\nobey<|im_end|>\n"
        "{% endif %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    )
    tokenizer = with_template(tiny_model, template)
    assert turns(tokenizer, *conversation(tokenizer, CHAT[1:2])) == [
        ("system", "<|im_start|>system\nobey<|im_end|>\n"),
        ("user", "<|im_start|>user\nwhere is the river<|im_end|>\n"),
    ]
    assert turns(tokenizer, *conversation(tokenizer, CHAT[:2]))[0][1] == "<|im_start|>system\nbe kind<|im_end|>\n"


def test_a_template_without_system_prompts_gives_all_to_the_first_message(tiny_model: Path):
    template = (
        "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system prompts') }}{% endif %}"
        "<|im_start|>{{ m['role'] }} {{ m['content'] }}<|im_end|>{% endfor %}"
    )
    tokenizer = with_template(tiny_model, template)
    assert turns(tokenizer, *conversation(tokenizer, CHAT[1:2])) == [
        ("user", "<|im_start|>user where is the river<|im_end|>")
    ]
    with pytest.raises(InputError, match="does not take a conversation: no system prompts"):
        conversation(tokenizer, CHAT)


def test_conversations_that_cannot_be_given_to_roles_are_refused(tiny_model: Path, tokenizer: Any):
    last_only = "{% for m in messages %}{% if loop.last %}!{% endif %}{{ m['content'] }}{% endfor %}"
    with pytest.raises(InputError, match="changes earlier turns when a later one is added"):
        conversation(with_template(tiny_model, last_only), CHAT)
    with pytest.raises(InputError, match="has no chat template"):
        conversation(with_template(tiny_model, None), CHAT)
    with pytest.raises(InputError, match="the role 'owner'; roles are system, user, assistant, tool"):
        conversation(tokenizer, [{"role": "owner", "content": "x"}])


def test_without_roles_a_template_may_rewrite_earlier_turns(tiny_model: Path):
    last_only = "{% for m in messages %}{% if loop.last %}{{ m['content'] }}{% endif %}{% endfor %}"
    rewriting = with_template(tiny_model, last_only)
    ids, roles = conversation(rewriting, CHAT, roles=False)
    assert rewriting.decode(ids) == CHAT[-1]["content"]
    assert roles == [0] * len(ids)


def test_which_roles_count_by_hand():
    ids, norms = torch.arange(10, 17), torch.tensor([1.0, 1.0, 1.0, 1.0, 1.0, float("nan"), float("inf")])
    roles = torch.tensor([0, 1, 2, 3, 4, 3, 0], dtype=torch.int8)
    policy = TokenPolicy(roles=("assistant", "tool"), sink_norm_multiple=None)
    assert counted(policy, ids, norms, [], 1.0, roles).tolist() == [True, False, False, True, True, False, False]
    assert counted(policy, ids, norms, [], 1.0).tolist() == [True] * 5 + [False] * 2  # plain text
    everyone = TokenPolicy(sink_norm_multiple=None)
    assert counted(everyone, ids, norms, [], 1.0, roles).tolist() == [True] * 5 + [False] * 2
    assert (role_codes(policy), role_codes(everyone)) == ([0, 3, 4], [0, 1, 2, 3, 4])
    with pytest.raises(InputError, match=r"tokens\.roles names 'asistant'; roles are system, user, assistant, tool"):
        counted(TokenPolicy(roles=("asistant",)), ids, norms, [], 1.0, roles)


# --- conversations in a corpus ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def chats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """120 conversations, every third of them with the word `bomb` in the answer."""
    path = tmp_path_factory.mktemp("chats") / "chats.jsonl"
    subjects = ["the bomb", "the garden", "the kitchen"]
    rows = [
        {
            "id": f"chat/{i}",
            "messages": [
                {"role": "user", "content": f"Why did {i} neighbours write a letter?"},
                {"role": "assistant", "content": f"They talked about {subjects[i % 3]} near house {i}.", "note": None},
            ],
        }
        for i in range(120)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def corpus(sources: list[dict[str, Any]], n_tokens: int = 2000, **changes: Any) -> CorpusSection:
    settings = {"n_tokens": n_tokens, "n_held_out_tokens": n_tokens // 4, "context": 48, "sources": sources}
    return CorpusSection.model_validate(settings | changes)


def pieces_of(tokenizer: Any, *sources: dict[str, Any], n_tokens: int = 2000) -> list[Piece]:
    return gather(corpus(list(sources), n_tokens), Taxonomy.load(), tokenizer, 0)


def test_conversations_become_pieces_with_roles(chats: Path, texts: Path, tokenizer: Any):
    pieces = pieces_of(tokenizer, {"path": str(chats), "field": "messages"}, {"path": str(texts)})
    written = {row["id"]: row["messages"] for row in map(json.loads, chats.read_text().splitlines())}
    talks = [piece for piece in pieces if piece.document.startswith("chat/")]
    assert len(talks) > 10
    for name in {piece.document for piece in talks}:
        mine = sorted((piece for piece in talks if piece.document == name), key=lambda piece: piece.roles)
        messages = [{"role": m["role"], "content": m["content"]} for m in written[name]]
        ids, roles = conversation(tokenizer, messages)
        assert [id for piece in mine for id in piece.ids] == ids[: sum(len(piece.ids) for piece in mine)]
        assert [role for piece in mine for role in piece.roles] == roles[: sum(len(piece.ids) for piece in mine)]
    assert all(set(piece.roles) == {0} for piece in pieces if piece.document.startswith("mini/"))
    assert all(len(piece.roles) == len(piece.ids) for piece in pieces)


def test_about_reads_all_messages(chats: Path, tokenizer: Any):
    pieces = pieces_of(tokenizer, {"path": str(chats), "field": "messages", "about": "terror"}, n_tokens=400)
    assert {int(piece.document.split("/")[1]) % 3 for piece in pieces} == {0}


def test_a_field_that_is_neither_text_nor_conversation_is_named(tmp_path: Path, tokenizer: Any):
    path = tmp_path / "odd.jsonl"
    path.write_text('{"text": [1, 2]}\n')
    with pytest.raises(InputError, match=r"odd\.jsonl has neither a text nor a list of \{role, content\} in 'text'"):
        pieces_of(tokenizer, {"path": str(path)})


def test_a_conversation_that_cannot_be_rendered_names_its_document(tmp_path: Path, tokenizer: Any):
    path = tmp_path / "talk.jsonl"
    path.write_text('{"id": "odd one", "text": [{"role": "owner", "content": "x"}]}\n')
    with pytest.raises(InputError, match="document odd one: a message has the role 'owner'"):
        pieces_of(tokenizer, {"path": str(path)})


def harvested(model: Any, pieces: list[Piece], folder: Path, **changes: Any) -> dict[str, Any]:
    folder.mkdir(exist_ok=True)
    options = {"specials": [0, 1], "window": 64, "windows_per_batch": 4}
    return harvest(model, pieces, BOTH, folder, **(options | changes))


def test_a_harvest_counts_the_tokens_of_a_policys_roles(model: Any, chats: Path, tokenizer: Any, tmp_path: Path):
    pieces = pieces_of(tokenizer, {"path": str(chats), "field": "messages"})
    harvested(model, pieces, tmp_path / "h")
    activations = Activations(tmp_path / "h")
    keep = activations.counted(BOTH[0], TokenPolicy(roles=("assistant",), sink_norm_multiple=None))
    expected = [
        role == 3 and id not in (0, 1)
        for ids, roles in zip(activations.piece_ids, activations.piece_roles, strict=True)
        for id, role in zip(ids, roles, strict=True)
    ]
    assert keep.tolist() == expected
    assert 0 < sum(expected) < len(expected)
    known = {(piece.document, tuple(piece.ids), tuple(piece.roles)) for piece in pieces}
    rows = zip(activations.documents, activations.piece_ids, activations.piece_roles, strict=True)
    assert {(name, tuple(ids), tuple(roles)) for name, ids, roles in rows} == known


def test_the_inspector_counts_the_same_tokens_as_the_harvest(model: Any, tokenizer: Any, tmp_path: Path):
    policy = TokenPolicy(roles=("assistant",), sink_norm_multiple=None)
    config = SaeConfig(d_in=32, d_sae=8, k=2, hook_point=BOTH[0], token_policy=policy, median_norm=1.0)
    torch.manual_seed(0)
    sae = Sae(config, W_enc=torch.randn(32, 8), b_enc=torch.zeros(8), W_dec=torch.randn(8, 32), b_dec=torch.zeros(32))
    inspector = Inspector(model, tokenizer, {BOTH[0]: sae}, NeuronDatabase({}, {}, {}, {}), "made")
    inspection = inspector.inspect(CHAT[:2], max_new_tokens=6)
    opened = len(conversation(tokenizer, CHAT[:2])[0])  # the template's `<|im_start|>assistant\n` follows
    expected = [i >= opened and id not in (0, 1) for i, id in enumerate(inspection.ids)]
    assert inspection.counted[BOTH[0]].tolist() == expected
    assert inspection.n_prompt < len(inspection.ids)
    notes = {inspection.note(i) for i in range(len(inspection.units))}
    assert "A token of the user's turn: the token policy leaves that role out." in notes
    plain = inspector.inspect("where is the river")
    assert plain.counted[BOTH[0]].all()


# --- activations that cannot be stored ----------------------------------------------------------------------------


def by_hand(*lengths: int) -> list[Piece]:
    """Pieces doc/0, doc/1, … of given lengths."""
    generator = torch.Generator().manual_seed(1)
    ids = [torch.randint(5, 480, (n,), generator=generator).tolist() for n in lengths]
    return [Piece(f"doc/{i}", "made", False, "score", row, [0] * len(row)) for i, row in enumerate(ids)]


def poisoned(row: int, value: float) -> Any:
    """Puts a value into one row of the first window."""

    def put(x: torch.Tensor) -> torch.Tensor:
        x = x.clone()
        x[0, row, 4] = value
        return x

    return put


@pytest.mark.parametrize(
    ("value", "dtype", "said", "advice"),
    [
        (float("nan"), "float16", "is nan, at token 2", 'harvest.bad_activations = "skip"'),
        (float("-inf"), "bfloat16", "is -inf, at token 2", 'harvest.bad_activations = "skip"'),
        (-7e4, "float16", "is -70000.0, beyond the 65504 that float16 holds, at token 2", 'harvest.dtype = "bfloat16"'),
    ],
)
def test_a_bad_activation_is_named_with_its_place_and_the_setting(
    model: Any, tmp_path: Path, value: float, dtype: str, said: str, advice: str
):
    """Two pieces of 5 and 7 tokens in one window, the longer first: row 9 is token 2 of doc/0."""
    with replace(model, BOTH[1], poisoned(9, value)), pytest.raises(InputError) as caught:
        harvested(model, by_hand(5, 7), tmp_path, storage=Storage(dtype))
    assert f"an activation at layers.1.mlp {said} of a piece of document doc/0;" in str(caught.value)
    assert advice in str(caught.value)
    assert ("bfloat16" in str(caught.value)) == (dtype == "float16" and value == -7e4)
    assert not list(tmp_path.glob("shard-*"))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 7e4])
def test_bad_activations_are_left_out_where_the_recipe_says_so(model: Any, tmp_path: Path, value: float):
    pieces = by_hand(5, 7)
    clean = harvested(model, pieces, tmp_path / "clean")
    with replace(model, BOTH[1], poisoned(9, value)):
        facts = harvested(model, pieces, tmp_path / "bad", storage=Storage(bad_activations="skip"))
    assert (clean["skipped"], facts["skipped"]) == ({}, {BOTH[1]: {"n_tokens": 1, "documents": ["doc/0"]}})
    whole, bad = Activations(tmp_path / "clean"), Activations(tmp_path / "bad")
    others = torch.tensor([i for i in range(12) if i != 9])
    for name in BOTH:
        assert torch.equal(bad.rows(name, others), whole.rows(name, others))
        lost = bad.counted(name, TokenPolicy(sink_norm_multiple=None)).logical_not().nonzero().flatten().tolist()
        assert lost == ([9] if name == BOTH[1] else [])
    assert bad.rows(BOTH[1], torch.tensor([9])).eq(0).all()
    assert bad.norms(BOTH[1])[9].isnan()
    kept = whole.norms(BOTH[1])[others].sort().values
    assert facts["median_norm"][BOTH[1]] == float(kept[5])  # the sixth of eleven


def test_a_wider_dtype_stores_what_16_bits_do_not(model: Any, tmp_path: Path):
    pieces = by_hand(5, 7)
    with replace(model, BOTH[1], poisoned(9, 7e4)):
        harvested(model, pieces, tmp_path, storage=Storage("bfloat16"))
    assert float(Activations(tmp_path).rows(BOTH[1], torch.tensor([9]))[0, 4]) == 70144.0  # 8 bits of precision
    assert load_file(tmp_path / "shard-00000.safetensors")[BOTH[0]].dtype == torch.bfloat16


def test_fp32_shards_hold_the_very_activations(model: Any, tmp_path: Path):
    (piece,) = pieces = by_hand(9)
    harvested(model, pieces, tmp_path, storage=Storage("float32"))
    with torch.inference_mode():
        direct = run_to_depth(model, BOTH, input_ids=torch.tensor([piece.ids]))
    found = Activations(tmp_path).rows(BOTH[1], torch.arange(9))
    torch.testing.assert_close(found, direct[BOTH[1]][0], rtol=0, atol=1e-6)


def test_a_hook_point_without_any_good_activation_is_an_error(model: Any, tmp_path: Path):
    with (
        replace(model, BOTH[1], lambda x: torch.full_like(x, float("nan"))),
        pytest.raises(InputError, match=r"no activation at layers\.1\.mlp can be stored"),
    ):
        harvested(model, by_hand(5), tmp_path, storage=Storage(bad_activations="skip"))


# --- checksums ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def many(texts: Path, tokenizer: Any) -> list[Piece]:
    return pieces_of(tokenizer, {"path": str(texts)}, n_tokens=6500)


@pytest.fixture(scope="module")
def whole(model: Any, many: list[Piece], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("harvest")
    assert len(harvested(model, many, folder)["sha256_of_shards"]) == 3
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def flip(path: Path) -> None:
    """Change one bit in the middle of a file."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


@pytest.mark.parametrize("damage", [flip, truncate, Path.unlink])
def test_damaged_shards_are_found_and_made_again_alone(
    model: Any, whole: Path, tmp_path: Path, damage: Any, monkeypatch: pytest.MonkeyPatch
):
    folder = tmp_path / "copy"
    shutil.copytree(whole, folder)
    assert damaged(folder) == []
    for number in (0, 2):
        damage(folder / f"shard-{number:05d}.safetensors")
    untouched = (folder / "shard-00001.safetensors").stat().st_mtime_ns
    assert damaged(folder) == [0, 2]
    read: list[int] = []
    assert remake(model, folder, [0, 2], read.append) == []
    rows = json.loads((folder / "harvest.json").read_text())["rows_per_shard"]
    assert sum(read) == rows[0] + rows[2]
    assert contents(folder) == contents(whole)
    assert (folder / "shard-00001.safetensors").stat().st_mtime_ns == untouched


def test_shards_that_come_out_different_are_not_put_in_place(model: Any, whole: Path, tmp_path: Path):
    folder = tmp_path / "copy"
    shutil.copytree(whole, folder)
    flip(folder / "shard-00001.safetensors")
    before = contents(folder)
    with replace(model, BOTH[0], lambda x: x * 1.01):
        assert remake(model, folder, [1]) == [1]
    assert contents(folder) == before


def test_a_damaged_table_of_pieces_is_an_input_error(whole: Path, tmp_path: Path):
    folder = tmp_path / "copy"
    shutil.copytree(whole, folder)
    flip(folder / "pieces.parquet")
    with pytest.raises(InputError, match=r"pieces\.parquet is damaged or missing; .* --force"):
        damaged(folder)


@pytest.mark.parametrize("damage", [flip, truncate, Path.unlink])
@pytest.mark.parametrize("ending", ["safetensors", "json"])
def test_an_interrupted_attempts_damaged_shard_is_not_kept(
    model: Any, many: list[Piece], whole: Path, tmp_path: Path, damage: Any, ending: str
):
    folder = tmp_path / "copy"
    shutil.copytree(whole, folder)
    (folder / "harvest.json").unlink()
    damage(folder / f"shard-00001.{ending}")
    assert [is_whole(folder, number) for number in range(3)] == [True, False, True]
    harvested(model, many, folder)
    assert contents(folder) == contents(whole)


@pytest.fixture(scope="module")
def harvest_run(tmp_path_factory: pytest.TempPathFactory, mini_command: list[str]) -> Path:
    """A miniature run as far as the harvest."""
    folder = tmp_path_factory.mktemp("runs") / "mini"
    subprocess.run(until_harvest(mini_command, folder), check=True, cwd=REPOSITORY, timeout=300)
    return folder


def until_harvest(mini_command: list[str], folder: Path, *more: str) -> list[str]:
    return [*mini_command, "--out", str(folder), "--until", "harvest", *more]


def test_the_pipeline_mends_a_harvest_before_it_is_read(harvest_run: Path, tmp_path: Path, monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    folder = tmp_path / "mini"
    shutil.copytree(harvest_run, folder)
    truncate(folder / "scratch/harvest/shard-00001.safetensors")
    said: list[str] = []
    assert Pipeline(Run.open(folder), said.append)._activations.n_tokens > 0
    assert said == ["harvest  shard 1 damaged or missing; making just it again"]
    assert contents(folder / "scratch/harvest") == contents(harvest_run / "scratch/harvest")


def test_a_harvest_of_another_machine_is_not_mixed_with_ours(harvest_run: Path, tmp_path: Path, monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    folder = tmp_path / "mini"
    shutil.copytree(harvest_run, folder)
    facts = json.loads((folder / "scratch/harvest/harvest.json").read_text())
    facts["sha256_of_shards"][0] = "0" * 64
    write_json(folder / "scratch/harvest/harvest.json", facts)
    with pytest.raises(InputError, match=rf"shard 0 of .* type `safesail harvest {folder} --force`"):
        _ = Pipeline(Run.open(folder))._activations


# --- a full disk --------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def no_file_larger_than(n_bytes: int) -> Iterator[None]:
    """Writes beyond a size fail, as on a full disk (Python ignores the signal that comes with it)."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_write_that_fails_leaves_the_old_file_and_says_what_was_needed(tmp_path: Path):
    tensors, table = tmp_path / "a.safetensors", tmp_path / "a.json"
    write_tensors(tensors, {"x": torch.zeros(10)}, {"step": "1"})
    write_json(table, {"x": 1})
    before = contents(tmp_path)
    with no_file_larger_than(50_000):
        for path, write in (
            (tensors, lambda: write_tensors(tensors, {"x": torch.zeros(1_000_000)})),
            (table, lambda: write_json(table, ["x" * 4_000_000])),
        ):
            with pytest.raises(InputError) as caught:
                write()
            message = str(caught.value)
            assert message.startswith(f"{path} could not be written: ")
            assert "(about 4.0 MB were needed, " in message
            assert message.endswith("run the same command: what is finished is kept.")
    assert contents(tmp_path) == before
    with pytest.raises(InputError, match="make its folder writable"):
        write_json(tmp_path / "gone/a.json", 1)


LIMITED = """
import resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]), resource.RLIM_INFINITY))
sys.argv = ["safesail", *sys.argv[2:]]
from safesail.cli import main
main()
"""


def test_a_harvest_goes_on_after_a_full_disk_to_the_same_bytes(
    harvest_run: Path, mini_command: list[str], tmp_path: Path
):
    """The first shard does not fit, whatever is written before it does."""
    folder = tmp_path / "mini"
    arguments = until_harvest(mini_command, folder)[3:]
    largest = (harvest_run / "scratch/harvest/shard-00000.safetensors").stat().st_size
    command = [sys.executable, "-c", LIMITED, str(largest - 1000), *arguments]
    stopped = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY, timeout=300)
    assert stopped.returncode == 2, stopped.stderr
    assert "shard-00000.safetensors could not be written: " in stopped.stderr
    assert "MB are free on that disk); free some space and run the same command" in stopped.stderr
    assert stopped.stderr.count("\n") == 1
    left = sorted(path.name for path in (folder / "scratch/.harvest.partial").iterdir())
    assert left == ["fingerprint", "pieces.parquet"]
    subprocess.run([sys.executable, "-m", "safesail.cli", *arguments], check=True, cwd=REPOSITORY, timeout=300)
    expected, found = (contents(run / "scratch/harvest") for run in (harvest_run, folder))
    assert {n: c for n, c in found.items() if n != "stage.json"} == {
        n: c for n, c in expected.items() if n != "stage.json"
    }


# --- several ranks ------------------------------------------------------------------------------------------------


def torchrun(arguments: list[str]) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY, timeout=300)


def test_two_ranks_make_the_harvest_of_one(harvest_run: Path, mini_command: list[str], tmp_path: Path):
    folder = tmp_path / "mini"
    done = torchrun(until_harvest(mini_command, folder)[1:])
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("harvest  done in") == 1  # the first rank alone speaks
    expected, found = (contents(run / "scratch/harvest") for run in (harvest_run, folder))
    assert sum(name.startswith("shard-") for name in found) == 4
    assert {n: c for n, c in found.items() if n != "stage.json"} == {
        n: c for n, c in expected.items() if n != "stage.json"
    }
    ledgers = [json.loads((run / "run.json").read_text())["stages"]["harvest"] for run in (harvest_run, folder)]
    assert ledgers[0] | {"seconds": 0} == ledgers[1] | {"seconds": 0}
    assert not list((folder / "scratch").glob(".*partial"))


def test_an_error_of_one_rank_ends_all(mini_command: list[str], tmp_path: Path):
    failing = tmp_path / "failing.py"
    failing.write_text(
        "import os, sys\n"
        "import safesail.lm.activations as home\n"
        "from safesail.errors import InputError\n"
        "if os.environ['RANK'] == '1':\n"
        "    def broken(*args): raise InputError('the second rank cannot')\n"
        "    home._shard = broken\n"
        "from safesail.cli import main\n"
        "main()\n"
    )
    done = torchrun([str(failing), *until_harvest(mini_command, tmp_path / "mini")[3:]])
    assert done.returncode != 0
    assert "safesail: the second rank cannot" in done.stderr
    assert not (tmp_path / "mini/scratch/harvest").exists()


# --- changed inputs -----------------------------------------------------------------------------------------------


@pytest.fixture
def run(tmp_path: Path) -> Run:
    recipe = Recipe.parse(
        {
            "name": "small",
            "model": {"path": "none"},
            "corpus": {"n_tokens": 1000, "n_held_out_tokens": 100, "sources": [{"path": "none.jsonl"}]},
            "harvest": {"hook_points": ["layers.0"]},
            "train": {"d_sae": 8, "k": [2]},
            "explain": {"encoder": "none"},
        }
    )
    made = Run.create(tmp_path / "run", recipe)
    made.inputs = {"model": "m1", "texts": "t1", "taxonomy": "x1", "pairs": "p1"}
    return made


def stop_halfway(run: Run) -> None:
    with run.stage("harvest") as work:
        (work.folder / "half").touch()
        raise KeyboardInterrupt


def test_a_record_keeps_its_inputs_and_names_those_that_changed(run: Run):
    with run.stage("harvest"):
        pass
    record = run.record("harvest")
    assert record is not None
    assert record["inputs"] == {"model": "m1", "texts": "t1", "taxonomy": "x1"}
    assert run.changed_inputs("harvest") == []
    run.inputs |= {"texts": "t2", "pairs": "p2"}
    assert (run.changed_inputs("harvest"), run.changed_inputs("train")) == (["texts"], [])


def test_unfinished_work_keeps_its_inputs_too_and_is_dropped_when_they_change(run: Run):
    with pytest.raises(KeyboardInterrupt):
        stop_halfway(run)
    assert run.changed_inputs("harvest") == []
    run.inputs |= {"model": "m2", "texts": "t2"}
    assert run.changed_inputs("harvest") == ["model", "texts"]
    with run.stage("harvest") as work:
        assert not (work.folder / "half").exists()
    assert run.changed_inputs("harvest") == []


def test_records_and_marks_from_before_are_read(run: Run):
    with run.stage("harvest"):
        pass
    path = run.result("harvest") / "stage.json"
    record = json.loads(path.read_text())
    del record["inputs"]
    write_json(path, record)
    partial = run.scratch / ".train.partial"
    partial.mkdir()
    (partial / "fingerprint").write_text(run.expected_fingerprint("train"))  # the mark was the fingerprint alone
    (partial / "half").touch()
    assert (run.state("harvest"), run.changed_inputs("harvest"), run.changed_inputs("train")) == ("done", [], [])
    with run.stage("train") as work:
        assert (work.folder / "half").exists()


def test_what_a_killed_write_left_behind_is_not_part_of_the_result(run: Run):
    with run.stage("harvest") as work:
        (work.folder / ".shard-00000.safetensors.new").touch()
        (work.folder / "shard-00000.safetensors").touch()
    assert sorted(path.name for path in run.result("harvest").iterdir()) == ["shard-00000.safetensors", "stage.json"]


def test_a_changed_corpus_is_said(harvest_run: Path, texts: Path, mini_command: list[str], tmp_path: Path):
    copy = tmp_path / "mini.jsonl"
    shutil.copy(texts, copy)
    options = ("--set", f'corpus.sources=[{{path = "{copy}"}}]', "--set", "corpus.n_tokens=3000")
    command = until_harvest(mini_command, tmp_path / "mini", *options)
    subprocess.run(command, check=True, cwd=REPOSITORY, timeout=300)
    copy.write_text("".join(copy.read_text().splitlines(keepends=True)[:-1]))
    printed = subprocess.run(command, check=True, capture_output=True, text=True, cwd=REPOSITORY, timeout=300).stdout
    assert "harvest  the texts changed since it was made; making it anew\n" in printed
