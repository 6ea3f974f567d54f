"""A release of a small reward model, made by the real stages: forty pairs about safety and twenty about chat.

Words of harm stand in the rejected answers, so that some latents fire on one side alone. Whoever rates is replaced by
one that calls every latent a safety latent, which a random sentence encoder cannot judge.
"""

import json
import random
from functools import cache
from pathlib import Path
from typing import Any

from safesail.interpretation.llm import LocalBackend
from safesail.pipeline.safer import RewardPipeline
from safesail.reward_recipe import RewardRecipe
from safesail.run import Run

__all__ = ["EXPLANATION", "HOSTILE", "made_once", "small_recipe", "small_reward_release"]

Row = dict[str, Any]
HOSTILE = "<script>window.pwned=1</script> ${window.pwned=2} {{7*7}} \u202egnp.exe\u2069 שלום 👩‍🔬 <b>bold</b>."
EXPLANATION = "a <b>threat</b> & <script>window.pwned=3</script>"
SAFE = ("No, I will not help with that.", "Please talk to a teacher, or to a friend.", "That is against the law.")
HARM = ("Take the bomb, then wait.", "First stab them; then hide the knife.", "Hostages are useful, terrorists say.")
CHAT = ("The river is near the old house.", "Music on Monday, the garden on Friday.")


@cache
def made_once(base: Path, model: Path, texts: Path, encoder: Path) -> Path:
    """The run folder of the release, one for all test files of a session, which change nothing in it."""
    folder = base / "small-reward"
    folder.mkdir()
    return small_reward_release(folder, model, texts, encoder)


def small_reward_release(folder: Path, model: Path, texts: Path, encoder: Path) -> Path:
    """The run folder of the release, made below `folder`."""
    pairs = folder / "pairs.jsonl"
    pairs.write_text("".join(json.dumps(row) + "\n" for row in _pairs()), encoding="utf-8")
    chat = folder / "chat.jsonl"
    chat.write_text("".join(json.dumps(row) + "\n" for row in _talk()), encoding="utf-8")
    run = Run.create(folder / "small", small_recipe(pairs, chat, model, texts, encoder))
    _Pipeline(run).make()
    return run.folder


class _Pipeline(RewardPipeline):
    def _local(self, section: Any) -> LocalBackend:
        def answer(prompts: list[str], max_tokens: int, stop: tuple[str, ...]) -> list[tuple[str, int, int]]:
            return [(f"Score: 5\nExplanation: {EXPLANATION}", 0, 0) for _ in prompts]

        return LocalBackend(answer, "everything", {"rater": "everything"}, batch_size=16)


def small_recipe(pairs: Path, chat: Path, model: Path, texts: Path, encoder: Path) -> RewardRecipe:
    return RewardRecipe.parse(
        {
            "name": "small",
            "model": {"path": str(model), "base_model": "safesail-tests/tiny-llama", "licence": "mit"},
            "preferences": {
                "sources": [
                    {"path": str(pairs), "kind": "safety", "origin": "made", "licence": "mit"},
                    {"path": str(chat), "kind": "chat", "origin": "made talk", "licence": "mit"},
                ],
            },
            "reward": {
                "max_length": 192,
                "trained_blocks": 1,
                "batch_pairs": 8,
                "accumulate": 1,
                "learning_rate": 1e-3,
            },
            "corpus": {
                "n_tokens": 4000,
                "n_held_out_tokens": 400,
                "sources": [{"path": str(texts), "origin": "any", "licence": "cc0-1.0"}],
            },
            "harvest": {"hook_points": ["layers.0"], "window": 128},
            "train": {"d_sae": 64, "k": [6], "epochs": 1, "batch_size": 256, "aux_k": 8, "dead_after_tokens": 5000},
            "ends": {"min_distance": 2},
            "tune": {"batch_size": 64},
            "salience": {"n_latents": 12, "n_resamples": 20, "min_contexts": 2},
            "rate": {"encoder": str(encoder), "max_latents": 8},
            "edit": {"poison": [0.2], "denoise": [0.2]},
            "compare": {"seeds": 2, "epochs": 1},
            "publish": {"title": "Small", "licence": "mit"},
            "runtime": {"threads": 1},
        }
    )


def _pairs() -> list[Row]:
    chance = random.Random(0)
    return [
        {
            "id": f"s{i}",
            "prompt": f"Question {i} about the {chance.choice(['bomb', 'river', 'garden'])}?" if i else HOSTILE,
            "chosen": " ".join(chance.sample(SAFE, 2)) + (f" {HOSTILE}" if i == 0 else ""),
            "rejected": " ".join(chance.sample(HARM, 2)) + f" The end of {i}, perhaps.",
        }
        for i in range(40)
    ]


def _talk() -> list[Row]:
    return [
        {"id": f"c{i}", "prompt": f"What about {i}?", "chosen": CHAT[i % 2], "rejected": f"{i} and {i}, so what."}
        for i in range(20)
    ]
