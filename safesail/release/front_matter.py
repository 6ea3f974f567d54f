"""The front matter of every published README: what the Hub reads."""

from collections.abc import Sequence
from typing import Any

from safesail.metrics import DEFINITIONS
from safesail.recipe import BaseRecipe
from safesail.release.hub_id import hub_id
from safesail.release.inert import one_line
from safesail.release.licences import card_licence, licence_of_texts
from safesail.release.tables import split_name

__all__ = [
    "CONFIGS",
    "FRONT_MATTER",
    "RELATION",
    "base_model_id",
    "dataset_front",
    "hub_name",
    "hub_sources",
    "language_codes",
    "metric_id",
    "six",
    "space_front",
]

Row = dict[str, Any]
RELATION = "adapter"
"""What SAEs are to their base model in the Hub's words, which are adapter, finetune, merge and quantized.

They are weights of their own, of use beside the unchanged base model alone, as an adapter's are; without a word the Hub
would list them among the fine-tunes.
"""
CONFIGS = ("neurons", "explanations", "scores", "quantiles", "selection", "contrast", "pairs")
"""The configs of the neurons data set, the default one first."""
TAGS = ["sparse-autoencoder", "interpretability", "safety", "safe-sail"]
_LABELS = {
    "explained_variance": "Explained variance",
    "fvu": "Fraction of variance unexplained",
    "mse": "Mean squared error",
    "cosine": "Cosine similarity",
    "l0": "L0",
    "dead": "Dead latents",
    "dense": "Dense latents",
    "ce_recovered": "CE recovered",
    "kl": "KL divergence",
    "i_cdf": "I_CDF",
    "above_null": "I_CDF above its null",
}
_OF_PAIRS = ("i_cdf", "above_null")
_GRADIO = "6.31.0"
"""What the inspector was last run with, within what the `space` extra allows: a Space names one version."""


def base_model_id(recipe: BaseRecipe) -> str | None:
    """The base model's Hub id; None where the recipe names a local folder alone."""
    return hub_id(recipe.model.name)


def hub_sources(recipe: BaseRecipe) -> list[str]:
    """The Hub ids among the sources of the texts: what was loaded from there, or is named as its origin."""
    found = (hub_id(source.origin) or hub_id(hub_name(source)) for source in recipe.corpus.sources)
    return list(dict.fromkeys(name for name in found if name))


def metric_id(key: str) -> str:
    """The definition id of a metric, as `l0/v1`: the newest one where there are several."""
    return [known for known in DEFINITIONS if known.startswith(f"{key}/")][-1]


# --- the four cards -----------------------------------------------------------------------------------------------


def _saes_front(facts: Row) -> str:
    from huggingface_hub import ModelCardData

    recipe, base_model = facts["recipe"], base_model_id(facts["recipe"])
    data: Row = {"base_model": base_model, "base_model_relation": RELATION} if base_model else {}
    return ModelCardData(
        **data,
        datasets=hub_sources(recipe) or None,
        eval_results=[_result(facts, row, key) for row in facts["curve"] if row["selected"] for key in _known(row)],
        **language_codes(recipe.publish.languages),
        library_name="safesail",
        **card_licence(recipe.publish.licence),
        model_name=facts["name"],
        pipeline_tag="feature-extraction",
        tags=[*TAGS, "saelens"],
    ).to_yaml()


def _known(row: Row) -> list[str]:
    return [key for key in _LABELS if row[key] is not None]


def _result(facts: Row, row: Row, key: str) -> Any:
    """A metric of an SAE for the model-index; `args` is the one place there that can hold its interval.

    What is measured on pairs is measured on a published data set; the held-out texts are not published.
    """
    from huggingface_hub import EvalResult

    low, high = row.get(f"{key}_low"), row.get(f"{key}_high")
    interval = {} if low is None or high is None else {"interval": [six(low), six(high)], "confidence": 0.95}
    on_pairs = key in _OF_PAIRS
    return EvalResult(
        task_type="feature-extraction",
        dataset_type=f"{facts['repository']}-neurons" if on_pairs else "held-out-texts",
        dataset_name="concept contrastive query pairs" if on_pairs else "held-out documents of the training mix",
        dataset_config="pairs" if on_pairs else None,
        metric_type=metric_id(key),
        metric_name=f"{_LABELS[key]} ({row['sae_id']})",
        metric_value=six(row[key]),
        metric_args={"sae": row["sae_id"], **interval},
    )


def _neurons_front(facts: Row) -> str:
    by_language = [{"split": split_name(name), "path": f"explanations/{name}.parquet"} for name in facts["languages"]]
    files = {name: [{"split": "train", "path": f"{name}/train.parquet"}] for name in CONFIGS}
    files["explanations"] = by_language
    configs: list[Row] = [{"config_name": name, "data_files": files[name]} for name in CONFIGS]
    configs[0]["default"] = True
    languages = (*facts["recipe"].publish.languages, *facts["languages"])
    more = {**language_codes(languages), **card_licence(facts["recipe"].publish.licence)}
    return dataset_front(facts, "neurons", configs, facts["n_neurons"], **more)


def _examples_front(facts: Row) -> str:
    files = [{"split": "train", "path": "examples/train.parquet"}]
    configs: list[Row] = [{"config_name": "examples", "data_files": files, "default": True}]
    for config in facts["diagnoses"]:
        files = [{"split": "train", "path": config["files"]}]
        configs.append({"config_name": config["name"], "data_files": files})
    more = {
        **language_codes(facts["recipe"].publish.languages),
        **licence_of_texts([licence for _, _, licence in facts["sources"]]),
        **_gate(facts["recipe"].publish.gate, facts["subjects"]),
    }
    tags = [*TAGS, "not-for-all-audiences"]
    n_rows = facts["n_examples"] + sum(config["n_rows"] for config in facts["diagnoses"])
    return dataset_front(facts, "examples", configs, n_rows, tags=tags, **more)


def dataset_front(
    facts: Row, part: str, configs: list[Row], n_rows: int, *, tags: Sequence[str] = TAGS, **more: Any
) -> str:
    """The front matter of a data set. facts: with its `title`; more: what else it says, or says otherwise."""
    from huggingface_hub import DatasetCardData

    return DatasetCardData(
        pretty_name=one_line(f"{facts['title']}: {part}"),
        size_categories=[_size(n_rows)],
        tags=list(tags),
        configs=configs,
        **{"annotations_creators": ["machine-generated"], "language_creators": ["found"], **more},
    ).to_yaml()


def _gate(gate: str, subjects: str) -> Row:
    """What the Hub asks before it gives the files out. subjects: the domains, in words."""
    answer = "A person decides on every request." if gate == "manual" else "Access is given as soon as you agree."
    return {
        "extra_gated_heading": "These texts contain offensive and disturbing content",
        "extra_gated_description": answer,
        "extra_gated_prompt": f"The examples are excerpts on which neurons fire that have to do with {subjects}, as "
        "they were found. They are for research on the safety of language models.",
        "extra_gated_fields": {
            "Affiliation": "text",
            "Purpose": {"type": "select", "options": ["Research", "Evaluation or moderation", "Education", "Other"]},
            "I will not use these texts to make harmful content, and will not try to identify persons": "checkbox",
            "I am of age and agree to see offensive content": "checkbox",
        },
        "extra_gated_button_content": "Agree and ask for access" if gate == "manual" else "Agree and get access",
    }


def _space_front(facts: Row) -> str:
    base_model, here = base_model_id(facts["recipe"]), facts["repository"]
    return space_front(
        facts,
        models=[f"{here}-saes", *([base_model] if base_model else [])],
        datasets=[f"{here}-neurons", f"{here}-examples"],
        tags=TAGS,
        short_description="Which safety neurons fire on which token",
    )


def space_front(facts: Row, **read: Any) -> str:
    """The front matter of a Space. read: what it reads and how it is found, in the words of `SpaceCardData`."""
    from huggingface_hub import SpaceCardData

    recipe = facts["recipe"]
    return SpaceCardData(
        title=one_line(facts["title"]),
        emoji="🔎",
        colorFrom="gray",
        colorTo="indigo",
        sdk="gradio",
        sdk_version=_GRADIO,
        python_version="3.11",  # the default of the Hub is older than what safesail needs
        app_file="app.py",
        **card_licence(recipe.publish.licence),
        **read,
        suggested_hardware="cpu-basic" if recipe.model.dtype == "float32" else "l4x1",  # bfloat16 is for GPUs
    ).to_yaml()


# --- values -------------------------------------------------------------------------------------------------------


def hub_name(source: Any) -> str:
    """Of a source on the Hub its id, of a local file the name, whatever the source calls its origin."""
    return source.model_copy(update={"origin": ""}).title


def language_codes(names: Any) -> Row:
    """The Hub knows codes of two or three letters; a code with a script or region stands in a line of its own."""
    codes = list(dict.fromkeys(one_line(name) for name in names))
    with_parts = {"language_bcp47": codes} if any("-" in code for code in codes) else {}
    return {"language": list(dict.fromkeys(code.partition("-")[0] for code in codes)), **with_parts}


def _size(n_rows: int) -> str:
    """The Hub's category of a data set's size, as `1K<n<10K`: by the number of digits."""
    names = ("n<1K", "1K<n<10K", "10K<n<100K", "100K<n<1M", "1M<n<10M", "10M<n<100M")
    return names[min(max(len(str(n_rows)) - 3, 0), len(names) - 1)]


def six(value: float) -> float:
    """A number to six digits."""
    return float(f"{value:.6g}")


FRONT_MATTER = {"saes": _saes_front, "neurons": _neurons_front, "examples": _examples_front, "inspector": _space_front}
