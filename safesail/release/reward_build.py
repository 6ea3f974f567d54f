"""The release of a reward model: one folder per Hub repository, holding exactly what is uploaded.

Reads the results of all stages of a run of SAFER's kind. Writes `saes/`, `reward/`, `salience/`, `preferences/` and
`inspector/` into the run folder, and `poisoned/` only where the recipe consents in so many words; without that consent
a `poisoned/` of an earlier build is removed. Nothing in them depends on the clock or on interruptions.
"""

import shutil
from pathlib import Path
from typing import Any

from safesail import __version__
from safesail.metrics import DEFINITIONS
from safesail.release.build import copy_space
from safesail.release.cards import repository
from safesail.release.manifest import write_manifest
from safesail.release.reward_cards import write_reward_cards
from safesail.release.reward_facts import RewardFacts
from safesail.release.reward_tables import write_edited, write_preferences, write_salience
from safesail.reward_recipe import RewardPublishSection
from safesail.run import REWARD_PARTS, Run, StageWork, write_json
from safesail.sae import model as sae_files
from safesail.training.fidelity import firing_rates

__all__ = ["METRICS", "reward_build_stage"]

Row = dict[str, Any]
METRICS = ("explained_variance", "fvu", "mse", "cosine", "l0", "dead", "dense")
"""What is measured of the SAE of a reward model, which predicts no tokens and so has no cross entropy."""


def reward_build_stage(run: Run, work: StageWork) -> None:
    """Make the release's folders beside the old ones, then swap them in."""
    facts = RewardFacts(run)
    for part in REWARD_PARTS:
        shutil.rmtree(work.folder / part, ignore_errors=True)
    for part in run.parts:
        (work.folder / part).mkdir()
    _saes(facts, work.folder / "saes")
    _reward(facts, work.folder / "reward")
    write_salience(facts, work.folder / "salience")
    _settings(facts, work.folder / "salience")
    write_preferences(facts, work.folder / "preferences")
    if "poisoned" in run.parts:
        write_edited(facts, "swap", work.folder / "poisoned")
    copy_space(work.folder / "inspector")
    write_reward_cards(facts, run.parts, work.folder)
    for part in run.parts:
        _seal(facts, work.folder / part, run.parts)
    for part in REWARD_PARTS:
        shutil.rmtree(run.part(part), ignore_errors=True)
    for part in run.parts:
        (work.folder / part).rename(run.part(part))
    work.facts |= {"n_pairs": len(facts.preferences), "n_safety_latents": sum(map(len, _sides(facts)))}


def _seal(facts: RewardFacts, folder: Path, parts: tuple[str, ...]) -> None:
    """The manifest of a finished part."""
    publish, name = facts.recipe.publish, facts.recipe.name
    gated = _gate(publish, folder.name)
    title = publish.title or name
    write_manifest(folder, folder.name, name, publish.organization, title, publish.version, gated, parts)


def _gate(publish: RewardPublishSection, part: str) -> str | None:
    """Texts are gated as the recipe says; poisoned data always by hand."""
    return {"preferences": publish.gate, "poisoned": "manual"}.get(part)


def _saes(facts: RewardFacts, folder: Path) -> None:
    """The SAE with its metrics, and the manifest that marks it as selected."""
    sae_id, recipe = facts.sae_id, facts.recipe
    sae_files.read(facts.sae_folder).save(folder / sae_id, firing_rates(facts.measured, sae_id))
    numbers = {f"{name}{end}": facts.fidelity.get(f"{name}{end}") for name in METRICS for end in ("", "_low", "_high")}
    definitions = {id: text for id, text in DEFINITIONS.items() if id.partition("/")[0] in METRICS}
    write_json(folder / sae_id / "metrics.json", {"definitions": definitions, "metrics": numbers})
    write_json(
        folder / "config.json",
        {
            "schema": 1,
            "safesail_version": __version__,
            "base_model": f"{repository(recipe)}-reward",
            "base_model_revision": f"v{recipe.publish.version}",
            "kind": "reward",
            "base_model_note": f"A reward model on {recipe.model.name}.",
            "tokenizer_hash": facts.records["harvest"].get("tokenizer_hash"),
            "selected": {recipe.hook_point: sae_id},
            "selected_by": {},
            "saes": [{"id": sae_id, "selected": True, **numbers}],
            "definitions": definitions,
        },
    )


def _reward(facts: RewardFacts, folder: Path) -> None:
    """The reward model as transformers reads it, with its accuracies."""
    shutil.copytree(facts.model, folder, dirs_exist_ok=True)
    write_json(folder / "accuracy.json", facts.accuracy)


def _settings(facts: RewardFacts, folder: Path) -> None:
    """What the salience was computed with, and how well the pairs' scores predict: JSON beside the tables."""
    recipe = facts.recipe
    settings = {
        **facts.settings,
        "hook_point": recipe.hook_point,
        "sae": facts.sae_id,
        "keep": recipe.rate.keep,
        "max_latents": recipe.rate.max_latents,
        "share_of": recipe.edit.share_of,
    }
    write_json(folder / "salience.json", settings)
    write_json(folder / "validity.json", facts.validity)


def _sides(facts: RewardFacts) -> tuple[list[int], list[int]]:
    return facts.safety["positive"], facts.safety["negative"]
