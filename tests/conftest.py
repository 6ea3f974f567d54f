"""A tiny world made in memory: a random two-layer language model, a random sentence encoder, texts, and a release."""

import importlib
import json
import random
import re
import string
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
SUBJECTS = {
    "politics": ["president", "senator", "election", "government", "parliament"],
    "pornography": ["porn", "sex", "naked", "erotic", "nude"],
    "violence": ["murder", "stabbed", "assault", "killed", "idiot"],
    "terror": ["terrorist", "hostages", "jihad", "bomb", "extremists"],
    "neutral": ["garden", "teacher", "kitchen", "river", "music"],
}
FRAMES = [
    "The {a} was seen near the old house on Monday morning.",
    "My neighbour talked about the {a} and the {b} for an hour.",
    "Why did the {a} change so much after the long summer?",
    "She wrote a short letter about the {b}, then about the {a}.",
    "In 2019 the {a} came back and everybody looked at the {b}.",
]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """The report of a test that fails says what its open browser pages showed."""
    report = yield
    if report.failed and "browser" in getattr(item, "fixturenames", ()):
        from browsing import seen_at_failure

        if seen := seen_at_failure():
            report.sections.append(("pages", seen))
    return report


@pytest.fixture(autouse=True)
def same_kernels() -> Iterator[None]:
    """The choice between compiled and torch's kernels, which differ in the last bits, outlives no test."""
    from safesail.sae import kernels

    before = kernels.used()
    yield
    kernels.use(before)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """One torch thread during a test: bits and times do not depend on the machine's cores."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """600 short documents in which every domain has its words, as a jsonl file."""
    chance, path = random.Random(0), tmp_path_factory.mktemp("texts") / "mini.jsonl"
    rows = []
    for i in range(600):
        words = list(SUBJECTS.values())[i % len(SUBJECTS)]
        a, b = chance.choice(words), chance.choice(words)
        rows.append({"id": f"mini/{i}", "text": " ".join(f.format(a=a, b=b) for f in chance.sample(FRAMES, 3))})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory, texts: Path) -> Path:
    """A random two-layer Llama with a byte-level BPE tokenizer and a chat template, saved as a folder."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("tiny") / "tiny-llama"
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=700,
        special_tokens=["<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([json.loads(line)["text"] for line in texts.read_text().splitlines()], trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<|im_start|>", eos_token="<|im_end|>", pad_token="<|im_end|>"
    )
    fast.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(fast),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=512,
        initializer_range=0.3,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    fast.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def model(tiny_model: Path) -> Any:
    """The tiny model, loaded anew for every test file."""
    from safesail.lm.load import causal_lm

    return causal_lm(str(tiny_model))


@pytest.fixture(scope="module")
def tokenizer(tiny_model: Path) -> Any:
    """The tiny model's tokenizer."""
    from safesail.lm.load import load_tokenizer

    return load_tokenizer(str(tiny_model))


@pytest.fixture(scope="session")
def tiny_encoder(tmp_path_factory: pytest.TempPathFactory, texts: Path) -> Path:
    """A random one-layer BERT as sentence encoder, saved as a folder."""
    import torch
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("tiny") / "tiny-bert"
    specials = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    letters = [prefix + letter for prefix in ("", "##") for letter in string.ascii_lowercase + string.digits]
    words = Counter(re.findall("[a-z]{2,}", texts.read_text().lower()))
    # the most frequent words, since the training of tokenizers breaks ties by chance, in each process another way
    pieces = [*specials, *letters, *sorted(words, key=lambda word: (-words[word], word))[:300]]
    tokenizer = Tokenizer(models.WordPiece({piece: i for i, piece in enumerate(pieces)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="[UNK]", pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]"
    )
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(fast), hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64
    )
    BertModel(config).save_pretrained(folder)
    fast.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def mini_settings(texts: Path, tiny_model: Path, tiny_encoder: Path) -> list[str]:
    """The `--set` options that turn the demo recipe into a miniature of itself."""
    source = f'path = "{texts}", licence = "cc0-1.0"'
    sources = [f'{{{source}, origin = "about {d}", about = "{d}", weight = 0.2}}' for d in list(SUBJECTS)[:4]]
    sources.append(f'{{{source}, origin = "any", weight = 0.2}}')
    settings = {
        "name": '"mini"',
        "model.path": f'"{tiny_model}"',
        "model.base_model": '"safesail-tests/tiny-llama"',
        "model.note": '"Random weights."',
        "corpus.n_tokens": "12000",
        "corpus.n_held_out_tokens": "1500",
        "corpus.sources": f"[{', '.join(sources)}]",
        "harvest.hook_points": '["layers.0.mlp", "layers.1.mlp"]',
        "harvest.window": "128",
        "train.d_sae": "128",
        "train.k": "[4, 8, 16]",
        "train.epochs": "3",
        "train.batch_size": "256",
        "train.dead_after_tokens": "5000",
        "train.aux_k": "16",
        "eval.n_ce_tokens": "600",
        "select.fdr": "0.9",
        "select.max_latents_per_domain": "8",
        "explain.encoder": f'"{tiny_encoder}"',
        "score.n_active_texts": "6",
        "score.n_silent_texts": "6",
        "runtime.checkpoint_seconds": "0.05",
        "runtime.threads": "1",
    }
    return [f"{key}={value}" for key, value in settings.items()]


@pytest.fixture(scope="session")
def mini_command(mini_settings: list[str]) -> list[str]:
    """`safesail run` of the miniature, to which `--out FOLDER` is added."""
    options = [part for setting in mini_settings for part in ("--set", setting)]
    return [sys.executable, "-m", "safesail.cli", "run", str(REPOSITORY / "hub/recipes/demo.toml"), *options]


@pytest.fixture(scope="session")
def demo_run(tmp_path_factory: pytest.TempPathFactory, mini_command: list[str]) -> Path:
    """A finished run of the miniature, made by the command line."""
    folder = tmp_path_factory.mktemp("runs") / "mini"
    subprocess.run([*mini_command, "--out", str(folder)], check=True, cwd=REPOSITORY, timeout=600)
    return folder


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A release of invented facts in two languages, with every kind of failure."""
    from made_release import made_release

    return made_release(tmp_path_factory.mktemp("release"))


@pytest.fixture(params=["made", "demo_run"])
def release(request: pytest.FixtureRequest) -> Path:
    """The release of invented facts, and one that was made in truth."""
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="session")
def space() -> Iterator[Callable[[str], ModuleType]]:
    """Imports a module of the Space by its name, as on the Hub: its folder is where Python looks for modules first."""
    from safesail.assets import asset

    sys.path.insert(0, str(asset("space")))
    yield importlib.import_module
    sys.path.remove(str(asset("space")))


@pytest.fixture(scope="session")
def told(tmp_path_factory: pytest.TempPathFactory, demo_run: Path) -> Path:
    """The miniature's model and SAEs with invented neurons in two languages, for what is shown of a release."""
    from told_release import told_release

    return told_release(demo_run, tmp_path_factory.mktemp("told") / "told")


@pytest.fixture(scope="session")
def told_space(tmp_path_factory: pytest.TempPathFactory, told: Path) -> Iterator[str]:
    """The address of a Space of the `told` release: one for all the tests that only look at it."""
    from browsing import serving

    with serving(told, tmp_path_factory.mktemp("space")) as address:
        yield address


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    """A headless Chromium; tests that need it are skipped where it or playwright is not installed."""
    from browsing import chromium

    with chromium() as browser:
        yield browser
