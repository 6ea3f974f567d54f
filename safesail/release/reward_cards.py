"""The README of every published folder of a reward model's release: facts computed here, printed by `cards/`.

Text that came from a model, a source or a recipe goes through the filters of `release.inert`. A fact that is absent is
absent from the card.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from safesail import __version__
from safesail.metrics import DEFINITIONS
from safesail.release.cards import render, repository
from safesail.release.columns import column_table
from safesail.release.front_matter import hub_sources
from safesail.release.hub_id import hub_id
from safesail.release.inert import md_cell, md_code
from safesail.release.licences import card_licence, check, licence_of_texts
from safesail.release.recipe_file import recipe_toml
from safesail.release.reward_columns import reward_meaning
from safesail.release.reward_facts import RewardFacts
from safesail.release.reward_front import REWARD_FRONT_MATTER, configs_of, hub_preferences
from safesail.release.reward_summary import (
    accuracies,
    accuracy_table,
    fidelity_table,
    latent_table,
    not_rated,
    rating_counts,
    source_table,
    validity_table,
    verdict_table,
)
from safesail.release.reward_tables import REWARD_SCHEMAS, salience_rows
from safesail.release.summary import markdown
from safesail.reward_recipe import RewardRecipe
from safesail.rewards.comparison import comparison_table

__all__ = ["write_reward_cards"]

Row = dict[str, Any]
_TEMPLATES = {"saes": "reward_saes.md", "inspector": "reward_inspector.md"}
_MEANS = "h is a mean per segment end where its code sums, so that more or longer answers on one side do not move s."


def write_reward_cards(facts: RewardFacts, parts: Iterable[str], folder: Path) -> None:
    """Write README.md into every part below `folder`, and saes/recipe.toml. The tables must be there already."""
    (folder / "saes/recipe.toml").write_text(recipe_toml(facts.recipe), encoding="utf-8")
    parts = tuple(parts)
    known = _facts(facts) | {"poisoned_published": "poisoned" in parts}
    for part in parts:
        own = known | _of_files(facts, folder / part)
        front = REWARD_FRONT_MATTER[part](own, folder / part)
        text = render(_TEMPLATES.get(part, f"{part}.md"), front_matter=front, **own)
        (folder / part / "README.md").write_text(text, encoding="utf-8")


def _facts(facts: RewardFacts) -> Row:
    """Everything the templates may print but what the files of a part say."""
    return {
        **_release(facts.recipe),
        **_licences(facts),
        **_pairs(facts),
        **_model(facts),
        **_sae(facts),
        **_salience(facts),
        **_compared(facts),
    }


def _release(recipe: RewardRecipe) -> Row:
    known = hub_id(recipe.model.name)
    return {
        "name": recipe.name,
        "title": recipe.publish.title or recipe.name,
        "repository": repository(recipe),
        "recipe": recipe,
        "model_link": f"[{known}](https://huggingface.co/{known})" if known else md_cell(recipe.model.name),
        "base_model_note": recipe.model.note,
        "version": __version__,
        "release_version": recipe.publish.version,
    }


def _licences(facts: RewardFacts) -> Row:
    recipe, harvested = facts.recipe, facts.records["harvest"]
    by_title = {source.title: source.licence for source in recipe.corpus.sources}
    texts = licence_of_texts([source.licence for source in recipe.preferences.sources])
    own = card_licence(recipe.publish.licence)
    return {
        "sources": [(title, n, by_title[title]) for title, n in harvested.get("tokens_by_source", {}).items()],
        "hub_sources": hub_sources(recipe),
        "hub_preferences": hub_preferences(recipe),
        "licence": own.get("license_name", own["license"]),
        "licence_of_texts": texts.get("license_name", texts["license"]),
        "licence_notes": [problem.sentence for problem in check(recipe)],
    }


def _pairs(facts: RewardFacts) -> Row:
    """Where the preference data are from."""
    held_out = sum(each.held_out for each in facts.preferences)
    harm = (each.harm_chosen is not None and each.harm_rejected is not None for each in facts.preferences)
    return {
        "source_table": markdown(*source_table(facts.records["preferences"]["sources"])),
        "n_pairs": len(facts.preferences),
        "n_held_out": held_out,
        "n_train": len(facts.preferences) - held_out,
        "n_harm": sum(harm),
    }


def _model(facts: RewardFacts) -> Row:
    """The reward model, and how often it is right."""
    rows = accuracies(facts.accuracy)
    held_out = [row for row in rows if row["held_out"]]
    n = facts.recipe.reward.n_blocks
    return {
        "n_blocks_said": f"The first {n} block{'s' if n != 1 else ''} of" if n else "All blocks of",
        "has_chat_template": _has_chat_template(facts.model),
        "accuracy_table": markdown(*accuracy_table(rows)),
        "held_out_accuracies": held_out,
        "not_told_apart": [row for row in held_out if row["low"] is not None and row["low"] <= 0.5 <= row["high"]],
    }


def _has_chat_template(model: Path) -> bool:
    """Whether the tokenizer in a folder has a chat template, in a file of its own or in its config."""
    config = model / "tokenizer_config.json"
    known = json.loads(config.read_text(encoding="utf-8")) if config.is_file() else {}
    return bool(known.get("chat_template")) or (model / "chat_template.jinja").is_file()


def _sae(facts: RewardFacts) -> Row:
    harvested = facts.records["harvest"]
    names = {id.partition("/")[0]: id for id in DEFINITIONS}
    shown = [id for name, id in names.items() if facts.fidelity.get(name) is not None]
    return {
        "sae_id": facts.sae_id,
        "d_in": facts.d_in,
        "n_tokens": harvested["n_tokens"],
        "n_documents": harvested["n_documents"],
        "fidelity": facts.fidelity,
        "fidelity_table": markdown(*fidelity_table(facts.fidelity)),
        "definitions": {id: DEFINITIONS[id] for id in shown},
    }


def _salience(facts: RewardFacts) -> Row:
    """Which latents tell the sides apart, which of them are about safety, and whether that predicts anything."""
    rows, recipe = salience_rows(facts), facts.recipe
    looked_at = [row for row in rows if row["rank"] < recipe.salience.n_latents]
    return {
        "settings": facts.settings,
        "n_rated": sum(row["rated"] for row in looked_at),
        "not_rated": not_rated(looked_at),
        "rater_said": _rater(facts),
        "rating_counts": rating_counts(facts.safety),
        "n_positive": len(facts.safety["positive"]),
        "n_negative": len(facts.safety["negative"]),
        "latent_table": markdown(*latent_table(rows)),
        "validity_table": markdown(*validity_table(facts.validity["rows"])),
        "deviations": _deviations(recipe),
    }


def _rater(facts: RewardFacts) -> str:
    """Who rated, in a sentence."""
    raters = " and ".join(dict.fromkeys(md_code(row["rater"]) for row in facts.ratings)) or "nobody"
    if facts.recipe.rate.backend == "local":
        return f"Rated by a sentence encoder, {raters}: 1 to 5 by how like its contexts are to texts about safety."
    hashes = " and ".join(dict.fromkeys(md_code(row["prompt_hash"]) for row in facts.ratings if row["prompt_hash"]))
    return f"Rated from 1 to 5 by a language model, {raters}, which was shown the contexts (prompt {hashes})."


def _deviations(recipe: RewardRecipe) -> list[str]:
    """Where this differs from the published code of SAFER, in sentences; of the paper itself nothing is said."""
    rater = "It rates by a language model; here a sentence encoder does." if recipe.rate.backend == "local" else ""
    head = "Its reward models are retrained whole; here the comparison trains the head alone."
    said = [
        _MEANS if recipe.salience.mode == "means" else "",
        "A latent without a valid rating is never a safety latent; there it stays one.",
        rater,
        "Pairs have ids; there the order of lines says which text is chosen and which pair a score belongs to.",
        "Its accuracies are RewardBench's; here they are on held-out pairs of the same sources.",
        "Nothing is inserted into the texts at segment ends; there a marker token shifts the positions after it.",
        "The limit on the tokens that a latent's contexts end in acts here; there that token is lost before it is "
        "counted.",
        "Padding is never trained on or counted, all files of the corpus are read, and the learning rate decays "
        "linearly where it jumps there.",
        "Held-out pairs say how well score_safe predicts, and every number has an interval; there none has.",
        head if recipe.compare.trained_blocks == 0 else "",
    ]
    return [sentence for sentence in said if sentence]


def _compared(facts: RewardFacts) -> Row:
    against = facts.compared["against_random"]
    return {
        "comparison_table": markdown(*comparison_table(facts.compared["rows"])),
        "verdict_table": markdown(*verdict_table(against)) if against else "",
    }


def _of_files(facts: RewardFacts, folder: Path) -> Row:
    """What the files of a part say: the columns of its tables, and the sizes of its edited data sets."""
    names = [config["config_name"] for config in configs_of(folder)] if folder.name in REWARD_SCHEMAS else []
    edited = [_size(facts, folder, name) for name in names if name.startswith(("denoised-", "poisoned-"))]
    first = edited[0]["name"] if edited else None
    shown = [name for name in names if name == first or name not in {row["name"] for row in edited}]
    columns = {_title(name): _columns(folder / name / "train.parquet") for name in shown}
    if folder.name == "poisoned":
        swapped = {f"{row['n_edited']:,}" for row in edited}
        return {"poisoned": edited, "columns": columns["poisoned-…"], "n_swapped_said": _swapped(edited, swapped)}
    return {"denoised": edited, "columns": columns}


def _columns(path: Path) -> str:
    return markdown(*column_table(path, reward_meaning))


def _title(name: str) -> str:
    """Edited data sets share their columns, and so a heading."""
    prefix = name.partition("-")[0]
    return f"{prefix}-…" if prefix in ("denoised", "poisoned") else name


def _size(facts: RewardFacts, folder: Path, name: str) -> Row:
    n_rows = pq.read_metadata(folder / name / "train.parquet").num_rows
    return {"name": name, "n_rows": n_rows, "n_edited": sum(row["edit"] == name for row in facts.edits)}


def _swapped(edited: list[Row], numbers: set[str]) -> str:
    if len(numbers) == 1:
        return f"{numbers.pop()} pairs"
    return f"{edited[0]['n_edited']:,} to {edited[-1]['n_edited']:,} pairs"
