"""The front matter of every published README: what the Hub reads."""

from typing import Any

from safesail.metrics import DEFINITIONS
from safesail.release.tables import split_name

__all__ = ["CONFIGS", "FRONT_MATTER", "licence_of_texts"]

Row = dict[str, Any]
CONFIGS = ("neurons", "explanations", "scores", "quantiles", "selection", "contrast", "pairs")
"""The configs of the neurons data set, the default one first."""
_KNOWN_LICENCES = {"apache-2.0", "mit", "cc0-1.0", "cc-by-4.0", "cc-by-sa-3.0", "cc-by-sa-4.0"}
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


def _saes_front(facts: dict[str, Any]) -> str:
    from huggingface_hub import EvalResult, ModelCardData

    results = [
        EvalResult(
            task_type="feature-extraction",
            dataset_type="held-out-texts",
            dataset_name="held-out documents of the training mix",
            metric_type=metric_id(key),
            metric_name=f"{label} ({row['sae_id']})",
            metric_value=float(f"{row[key]:.6g}"),
        )
        for row in facts["curve"]
        if row["selected"]
        for key, label in _LABELS.items()
        if row[key] is not None
    ]
    return ModelCardData(
        base_model=facts["base_model"],
        eval_results=results,
        language=list(facts["recipe"].publish.languages),
        library_name="safesail",
        license=facts["recipe"].publish.licence,
        model_name=facts["name"],
        tags=["sparse-autoencoder", "interpretability", "safety", "saelens"],
    ).to_yaml()


def _dataset_front(facts: dict[str, Any], configs: list[Row], pretty: str, **extra: Any) -> str:
    from huggingface_hub import DatasetCardData

    languages = extra.pop("languages", facts["recipe"].publish.languages)
    return DatasetCardData(
        language=list(languages),
        **{"license": facts["recipe"].publish.licence, **extra},
        pretty_name=pretty,
        tags=["sparse-autoencoder", "interpretability", "safety"],
        configs=configs,
    ).to_yaml()


def _neurons_front(facts: dict[str, Any]) -> str:
    by_language = [{"split": split_name(name), "path": f"explanations/{name}.parquet"} for name in facts["languages"]]
    files = {name: [{"split": "train", "path": f"{name}/train.parquet"}] for name in CONFIGS}
    files["explanations"] = by_language
    configs: list[Row] = [{"config_name": name, "data_files": files[name]} for name in CONFIGS]
    configs[0]["default"] = True
    languages = dict.fromkeys((*facts["recipe"].publish.languages, *facts["languages"]))
    return _dataset_front(facts, configs, f"{facts['title']}: neurons", languages=languages)


def _examples_front(facts: dict[str, Any]) -> str:
    files = [{"split": "train", "path": "examples/train.parquet"}]
    configs = [{"config_name": "examples", "data_files": files, "default": True}]
    return _dataset_front(
        facts,
        configs,
        f"{facts['title']}: examples",
        **licence_of_texts(facts["sources"]),
        extra_gated_heading="These texts contain offensive and disturbing content",
        extra_gated_prompt="The examples are excerpts on which safety-related neurons fire. "
        "They are for research on the safety of language models.",
    )


def licence_of_texts(sources: list[tuple[str, int, str]]) -> Row:
    """The licence of excerpts: that of their sources where all agree, else `other`, with the table in the card."""
    licences = {licence for _, _, licence in sources}
    if len(licences) == 1 and licences <= _KNOWN_LICENCES:
        return {"license": licences.pop()}
    return {"license": "other", "license_name": "licences-of-the-sources"}


def _space_front(facts: dict[str, Any]) -> str:
    from huggingface_hub import SpaceCardData

    return SpaceCardData(
        title=facts["title"],
        sdk="gradio",
        app_file="app.py",
        license=facts["recipe"].publish.licence,
        models=[f"{facts['repository']}-saes", facts["base_model"]],
        datasets=[f"{facts['repository']}-neurons", f"{facts['repository']}-examples"],
        short_description="Which safety neurons fire on which token",
    ).to_yaml()


def metric_id(key: str) -> str:
    """The definition id of a metric, as `l0/v1`: the newest one where there are several."""
    return [known for known in DEFINITIONS if known.startswith(f"{key}/")][-1]


FRONT_MATTER = {"saes": _saes_front, "neurons": _neurons_front, "examples": _examples_front, "inspector": _space_front}
