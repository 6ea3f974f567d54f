"""The README of every published folder: facts computed here, printed by the templates in `cards/`.

A fact that is absent is absent from the card. Text that came from a model or a corpus goes through `md_cell`, so that
it can neither break a table nor become markup.
"""

import html
import re
from pathlib import Path
from typing import Any

from safesail import __version__
from safesail.assets import asset
from safesail.metrics import DEFINITIONS
from safesail.recipe import Recipe
from safesail.release.summary import domain_table, markdown, sae_table, score_bands
from safesail.taxonomy import Taxonomy

__all__ = ["card_facts", "md_cell", "render", "write_cards"]

Row = dict[str, Any]
_KNOWN_LICENCES = {"apache-2.0", "mit", "cc0-1.0", "cc-by-4.0", "cc-by-sa-3.0", "cc-by-sa-4.0"}


def write_cards(recipe: Recipe, facts: Any, neurons: list[Row], taxonomy: Taxonomy, folder: Path) -> None:
    """Write README.md into saes/, neurons/, examples/ and inspector/ below `folder`."""
    known = card_facts(recipe, facts, neurons, taxonomy)
    for part in ("saes", "neurons", "examples", "inspector"):
        front = FRONT_MATTER[part](known)
        text = render(f"{part}.md", front_matter=front, **known)
        (folder / part / "README.md").write_text(text, encoding="utf-8")


def render(template: str, **facts: Any) -> str:
    """A template of `cards/` filled in; a fact that the template uses and nobody gave is an error."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(asset("cards")),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,
    )
    environment.filters["md_cell"] = md_cell
    return re.sub(r"\n{3,}", "\n\n", environment.get_template(template).render(facts))


def md_cell(value: Any, longest: int = 160) -> str:
    """Any text as the inert content of one Markdown table cell: one line, no markup, no HTML, no cell border."""
    text = " ".join(str("" if value is None else value).split())
    if len(text) > longest:
        text = text[: longest - 1] + "…"
    text = html.escape(text, quote=False)
    return re.sub(r"[\\`*_{}\[\]()#+!|~$:@-]|(?<=www)\.", lambda found: f"&#{ord(found[0])};", text)


def card_facts(recipe: Recipe, facts: Any, neurons: list[Row], taxonomy: Taxonomy) -> dict[str, Any]:
    """Everything the templates may print, measured or declared."""
    first = next(iter(facts.selection["selected"]))
    organization = recipe.publish.organization or "your-organization"
    tokens_by_source = facts.records["harvest"]["tokens_by_source"]
    by_origin = {source.title: source for source in recipe.corpus.sources}
    return {
        "name": recipe.name,
        "title": recipe.publish.title or recipe.name,
        "repository": f"{organization}/{recipe.name}",
        "recipe": recipe,
        "base_model": recipe.model.name,
        "base_model_note": recipe.model.note,
        "version": __version__,
        "example_hook_point": first,
        "example_sae_id": facts.selection["selected"][first],
        "example_latents": _latents_by_hand(facts.selection["curve"][facts.selection["selected"][first]]),
        "sparsity_settings": _sparsity_settings(facts.curve),
        "trained_as": [_TRAINED_AS[name] for name in recipe.train.architectures],
        "hook_points": list(facts.selection["selected"]),
        "d_in": facts.activations.facts["d_in"][first],
        "sae_table": markdown(*sae_table(facts.curve)),
        "curve": facts.curve,
        "n_pairs": facts.selection["n_pairs"],
        "domain_table": markdown(*domain_table(neurons, list(taxonomy.domain_ids))),
        "score_table": markdown(["score", "neurons"], [[band, str(n)] for band, n in score_bands(neurons)]),
        "n_neurons": len(neurons),
        "n_tagged": sum(bool(row["domains"]) for row in neurons),
        "n_weak": sum(row["score"] is not None and row["score"] <= 0.2 for row in neurons),
        "n_failed": sum(row["explanation"] is None for row in neurons),
        "best": [row for row in neurons if row["domains"]][:8],
        "explainer": neurons[0]["explainer"] if neurons else "",
        "simulator": neurons[0]["simulator"] if neurons else "",
        "tagger": neurons[0]["tagger"] if neurons else "",
        "n_tokens": facts.records["harvest"]["n_tokens"],
        "n_documents": facts.records["harvest"]["n_documents"],
        "n_ce_tokens": facts.records["eval"]["n_ce_tokens"],
        "n_explainer_tokens": sum(row["prompt_tokens"] + row["completion_tokens"] for row in facts.explanations),
        "cost_usd": _cost(facts.explanations + facts.scores),
        "sources": [(name, n, by_origin[name].licence) for name, n in tokens_by_source.items()],
        "n_examples": len(facts.examples),
        "languages": list(dict.fromkeys(row["language"] for row in facts.explanations)),
        "definitions": DEFINITIONS,
        "missing_domains": [
            domain.name for domain in taxonomy.domains if not any(domain.id in row["domains"] for row in neurons)
        ],
    }


_TRAINED_AS = {
    "relu": "`relu`: ReLU with an L1 penalty",
    "topk": "`topk`: the k largest pre-activations of a token, then ReLU (Safe-SAIL; Gao et al. 2024)",
    "batchtopk": "`batchtopk`: the largest pre-activations of a batch, k per token on average (Bussmann et al. 2024)",
    "jumprelu": "`jumprelu`: a learnt threshold per latent with an L0 penalty (Rajamanoharan et al. 2024)",
    "matryoshka": "`matryoshka`: batch-wise top-k of nested dictionaries (Bussmann et al. 2025)",
}
_MEANING_OF_SPARSITY = {
    "topk": "`k32`: at most 32 active latents per token",
    "batchtopk": "`k32`: 32 active latents per token on average in training (L0 in the table: as measured)",
    "jumprelu": "`c0.002`: the coefficient of the L0 penalty",
    "relu": "`c0.1`: the coefficient of the L1 penalty",
}


def _sparsity_settings(curve: list[Row]) -> list[str]:
    """What the configured sparsity in a variant's name means, for the architectures that there are."""
    meanings: dict[str, list[str]] = {}
    for name in dict.fromkeys(row["architecture"] for row in curve):
        kind = "batchtopk" if name == "matryoshka" else name  # the same meaning
        meanings.setdefault(kind, []).append(name)
    return [f"{' and '.join(names)} {_MEANING_OF_SPARSITY[kind]}" for kind, names in meanings.items()]


def _latents_by_hand(row: Row) -> str:
    """The line of code that makes an SAE's latents from its pre-activations `a` and tensors `w`. row: of the curve."""
    if row["architecture"] == "topk":
        return f"values, indices = a.relu().topk({row['k']})"
    return "latents = a.relu()" if row["architecture"] == "relu" else 'latents = a.relu() * (a > w["threshold"])'


def _cost(rows: list[Row]) -> float | None:
    """What the language model's answers cost, or None when a price is unknown."""
    costs = [row["cost_usd"] for row in rows]
    return None if any(cost is None for cost in costs) else sum(costs)


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
}


def _saes_front(facts: dict[str, Any]) -> str:
    from huggingface_hub import EvalResult, ModelCardData

    results = [
        EvalResult(
            task_type="feature-extraction",
            dataset_type="held-out-texts",
            dataset_name="held-out documents of the training mix",
            metric_type=f"{key}/v1",
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

    return DatasetCardData(
        language=list(facts["recipe"].publish.languages),
        **{"license": facts["recipe"].publish.licence, **extra},
        pretty_name=pretty,
        tags=["sparse-autoencoder", "interpretability", "safety"],
        configs=configs,
    ).to_yaml()


def _neurons_front(facts: dict[str, Any]) -> str:
    configs: list[Row] = [
        {"config_name": name, "data_files": [{"split": "train", "path": f"{name}/train.parquet"}]}
        for name in ("neurons", "scores", "quantiles", "selection")
    ]
    configs[0]["default"] = True
    splits = [{"split": language, "path": f"explanations/{language}.parquet"} for language in facts["languages"]]
    configs.insert(1, {"config_name": "explanations", "data_files": splits})
    return _dataset_front(facts, configs, f"{facts['title']}: neurons")


def _examples_front(facts: dict[str, Any]) -> str:
    files = [{"split": "train", "path": "examples/train.parquet"}]
    configs = [{"config_name": "examples", "data_files": files, "default": True}]
    return _dataset_front(
        facts,
        configs,
        f"{facts['title']}: examples",
        **_licence_of_texts(facts["sources"]),
        extra_gated_heading="These texts contain offensive and disturbing content",
        extra_gated_prompt="The examples are excerpts on which safety-related neurons fire. "
        "They are for research on the safety of language models.",
    )


def _licence_of_texts(sources: list[tuple[str, int, str]]) -> Row:
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


FRONT_MATTER = {"saes": _saes_front, "neurons": _neurons_front, "examples": _examples_front, "inspector": _space_front}
