"""The front matter of the cards of a reward model's release: what the Hub reads."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from safesail.release.front_matter import (
    RELATION,
    dataset_front,
    hub_name,
    hub_sources,
    language_codes,
    six,
    space_front,
)
from safesail.release.hub_id import hub_id
from safesail.release.licences import card_licence, licence_of_texts
from safesail.release.reward_tables import REWARD_SCHEMAS
from safesail.reward_recipe import RewardRecipe

__all__ = ["REWARD_FRONT_MATTER", "configs_of", "hub_preferences"]

Row = dict[str, Any]
_TAGS = ["safety", "reward-model", "safer"]
_OF_SAES = ["sparse-autoencoder", "interpretability"]
_OF_TEXTS = ["preference", "not-for-all-audiences"]
_LABELS = {
    "explained_variance": "Explained variance",
    "fvu": "Fraction of variance unexplained",
    "mse": "Mean squared error",
    "cosine": "Cosine similarity",
    "l0": "L0",
    "dead": "Dead latents",
    "dense": "Dense latents",
}


def hub_preferences(recipe: RewardRecipe) -> list[str]:
    """The Hub ids among the sources of the pairs: what was loaded from there, or is named as its origin."""
    found = (hub_id(source.origin) or hub_id(hub_name(source)) for source in recipe.preferences.sources)
    return list(dict.fromkeys(name for name in found if name))


def configs_of(folder: Path) -> list[Row]:
    """The configs of a data set as its files say: {config_name, data_files by split}, the default one first."""
    known = list(REWARD_SCHEMAS[folder.name])
    edited = {path.parent.name for path in folder.glob("*/*.parquet")} - {*known}
    configs: list[Row] = []
    for name in [*known, *sorted(edited, key=_ratio)]:
        splits = sorted((path.stem for path in (folder / name).glob("*.parquet")), key=lambda split: split != "train")
        configs.append({"config_name": name, "data_files": [_split(name, split) for split in splits]})
    for config in configs[:1]:
        config["default"] = True
    return configs


def _split(config: str, split: str) -> Row:
    return {"split": split, "path": f"{config}/{split}.parquet"}


def _ratio(name: str) -> float:
    """The ratio in the name of an edited data set."""
    return float(name.partition("-")[2])


# --- the models ---------------------------------------------------------------------------------------------------


def _saes_front(facts: Row, _: Path) -> str:
    from huggingface_hub import ModelCardData

    recipe, base_model = facts["recipe"], hub_id(facts["recipe"].model.name)
    datasets = [f"{facts['repository']}-preferences", *hub_sources(recipe), *hub_preferences(recipe)]
    return ModelCardData(
        base_model=[f"{facts['repository']}-reward", *([base_model] if base_model else [])],
        base_model_relation=RELATION,
        datasets=list(dict.fromkeys(datasets)),
        eval_results=[_sae_result(facts, key) for key in _LABELS if facts["fidelity"].get(key) is not None],
        **language_codes(recipe.publish.languages),
        library_name="safesail",
        **card_licence(recipe.publish.licence),
        model_name=facts["name"],
        pipeline_tag="feature-extraction",
        tags=[*_TAGS, *_OF_SAES, "saelens"],
    ).to_yaml()


def _sae_result(facts: Row, key: str) -> Any:
    from huggingface_hub import EvalResult

    row, sae_id = facts["fidelity"], facts["sae_id"]
    return EvalResult(
        task_type="feature-extraction",
        dataset_type=f"{facts['repository']}-preferences",
        dataset_name="segment ends of held-out preference pairs",
        dataset_config="pairs",
        metric_type=f"{key}/v1",
        metric_name=f"{_LABELS[key]} ({sae_id})",
        metric_value=six(row[key]),
        metric_args={"sae": sae_id, **_interval(row.get(f"{key}_low"), row.get(f"{key}_high"))},
    )


def _interval(low: float | None, high: float | None) -> Row:
    return {} if low is None or high is None else {"interval": [six(low), six(high)], "confidence": 0.95}


def _reward_front(facts: Row, _: Path) -> str:
    from huggingface_hub import ModelCardData

    recipe, base_model = facts["recipe"], hub_id(facts["recipe"].model.name)
    data: Row = {"base_model": base_model, "base_model_relation": "finetune"} if base_model else {}
    return ModelCardData(
        **data,
        datasets=list(dict.fromkeys([f"{facts['repository']}-preferences", *hub_preferences(recipe)])),
        eval_results=[_accuracy_result(facts, row) for row in facts["held_out_accuracies"]],
        **language_codes(recipe.publish.languages),
        library_name="transformers",
        **card_licence(recipe.publish.licence),
        model_name=f"{facts['name']}-reward",
        pipeline_tag="text-classification",
        tags=_TAGS,
    ).to_yaml()


def _accuracy_result(facts: Row, row: Row) -> Any:
    """The share of held-out pairs of a kind whose chosen answer has the higher reward."""
    from huggingface_hub import EvalResult

    return EvalResult(
        task_type="text-classification",
        dataset_type=f"{facts['repository']}-preferences",
        dataset_name="held-out preference pairs",
        dataset_config="pairs",
        dataset_split="test",
        metric_type="accuracy",
        metric_name=f"Pairwise accuracy, {row['kind']}",
        metric_value=six(row["value"]),
        metric_args={"n_pairs": row["n"], **_interval(row.get("low"), row.get("high"))},
    )


# --- the data sets ------------------------------------------------------------------------------------------------


def _salience_front(facts: Row, folder: Path) -> str:
    more = {**language_codes(facts["recipe"].publish.languages), **card_licence(facts["recipe"].publish.licence)}
    return _dataset_front(facts, folder, _OF_SAES, **more)


def _preferences_front(facts: Row, folder: Path) -> str:
    gate = _gate(
        facts["recipe"].publish.gate,
        "These texts contain offensive and disturbing content",
        "Harmful requests and answers to them, as they were found. They are for research on the safety of language "
        "models.",
        "I will not use these texts to make harmful content, and will not try to identify persons",
    )
    return _dataset_front(facts, folder, _OF_TEXTS, annotations_creators=["found"], **_of_texts(facts), **gate)


def _poisoned_front(facts: Row, folder: Path) -> str:
    gate = _gate(
        "manual",
        "Poisoned on purpose: a model trained on these data may prefer harmful answers",
        "Labels of these pairs are swapped on purpose, to test defences against poisoned preference data. They also "
        "contain harmful requests and answers.",
        "I will use these data to test defences alone, and will train no model on them that others then use",
    )
    return _dataset_front(facts, folder, [*_OF_TEXTS, "poisoned"], **_of_texts(facts), **gate)


def _of_texts(facts: Row) -> Row:
    """Languages and licence of data sets that copy the sources' texts."""
    recipe = facts["recipe"]
    licences = [source.licence for source in recipe.preferences.sources]
    return {**language_codes(recipe.publish.languages), **licence_of_texts(licences)}


def _dataset_front(facts: Row, folder: Path, tags: Sequence[str], **more: Any) -> str:
    n_rows = sum(pq.read_metadata(path).num_rows for path in folder.glob("*/*.parquet"))
    return dataset_front(facts, folder.name, configs_of(folder), n_rows, tags=[*_TAGS, *tags], **more)


def _gate(gate: str, heading: str, prompt: str, promise: str) -> Row:
    """What the Hub asks before it gives the files out."""
    return {
        "extra_gated_heading": heading,
        "extra_gated_description": "A person decides on every request."
        if gate == "manual"
        else "Access is given as soon as you agree.",
        "extra_gated_prompt": prompt,
        "extra_gated_fields": {
            "Affiliation": "text",
            "Purpose": {"type": "select", "options": ["Research", "Evaluation or moderation", "Education", "Other"]},
            promise: "checkbox",
            "I am of age and agree to see offensive content": "checkbox",
        },
        "extra_gated_button_content": "Agree and ask for access" if gate == "manual" else "Agree and get access",
    }


# --- the Space ----------------------------------------------------------------------------------------------------


def _space_front(facts: Row, _: Path) -> str:
    base_model, here = hub_id(facts["recipe"].model.name), facts["repository"]
    return space_front(
        facts,
        models=[f"{here}-saes", f"{here}-reward", *([base_model] if base_model else [])],
        datasets=[f"{here}-salience", f"{here}-preferences"],
        tags=[*_TAGS, *_OF_SAES],
        short_description="Why a reward model prefers one answer",
    )


REWARD_FRONT_MATTER = {
    "saes": _saes_front,
    "reward": _reward_front,
    "salience": _salience_front,
    "preferences": _preferences_front,
    "poisoned": _poisoned_front,
    "inspector": _space_front,
}
