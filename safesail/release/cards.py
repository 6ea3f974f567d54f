"""The README of every published folder: facts computed here, printed by the templates in `cards/`.

A fact that is absent is absent from the card. Text that came from a model, a corpus or a recipe goes through the
filters of `release.inert`, so that it can neither break a table nor become markup.
"""

import json
import re
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from safesail import __version__
from safesail.assets import asset
from safesail.metrics import DEFINITIONS
from safesail.neurons import WEAK_BELOW
from safesail.recipe import BaseRecipe, Recipe
from safesail.release.columns import column_table
from safesail.release.contrast import activity_test, group_table, pair_table, threshold_table
from safesail.release.diagnosis_card import diagnosis_configs
from safesail.release.facts import Facts
from safesail.release.front_matter import CONFIGS, FRONT_MATTER, base_model_id, hub_sources
from safesail.release.inert import json_row, md_cell, md_code, one_line
from safesail.release.landscape import in_words
from safesail.release.licences import card_licence, check, licence_of_texts
from safesail.release.methods import confusion_table, cost_table, definition, method_table, total_cost
from safesail.release.recipe_file import recipe_toml
from safesail.release.summary import (
    candidate_table,
    card_sae_table,
    domain_table,
    domains_summary,
    markdown,
    score_bands,
    selection_table,
    short_domain_table,
    status_table,
)
from safesail.release.tables import split_name
from safesail.taxonomy import Taxonomy

__all__ = ["card_facts", "md_cell", "render", "repository", "write_cards"]

Row = dict[str, Any]
_FEW = 10
"""A domain with fewer neurons than this is named among the limits."""


def write_cards(recipe: Recipe, facts: Facts, neurons: list[Row], taxonomy: Taxonomy, folder: Path) -> None:
    """Write README.md into saes/, neurons/, examples/ and inspector/ below `folder`, and saes/recipe.toml.

    The tables in neurons/ and examples/ must be there already: their columns are read from them.
    """
    (folder / "saes/recipe.toml").write_text(recipe_toml(recipe), encoding="utf-8")
    known = card_facts(recipe, facts, neurons, taxonomy) | _columns(folder, facts, neurons)
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
    environment.filters |= {"md_cell": md_cell, "md_code": md_code}
    return re.sub(r"\n{3,}", "\n\n", environment.get_template(template).render(facts))


def card_facts(recipe: Recipe, facts: Facts, neurons: list[Row], taxonomy: Taxonomy) -> Row:
    """Everything the templates may print but the columns of the tables, measured or declared."""
    return {
        **_release(recipe, facts),
        **_licences(recipe, facts),
        **_sweep(recipe, facts, neurons),
        **_selection(facts, list(taxonomy.domain_ids)),
        **_neurons(neurons, taxonomy),
        **_asked(recipe, facts),
    }


def _release(recipe: Recipe, facts: Facts) -> Row:
    """What it is called and what it was made from."""
    known = base_model_id(recipe)
    harvest = facts.records["harvest"]
    return {
        "name": recipe.name,
        "title": recipe.publish.title or recipe.name,
        "repository": repository(recipe),
        "recipe": recipe,
        "base_model": recipe.model.name,
        "model_link": f"[{known}](https://huggingface.co/{known})" if known else md_cell(recipe.model.name),
        "base_model_revision": recipe.model.revision,
        "base_model_note": recipe.model.note,
        "version": __version__,
        "release_version": recipe.publish.version,
        "gate": recipe.publish.gate,
        "n_tokens": harvest["n_tokens"],
        "n_documents": harvest["n_documents"],
        "n_examples": len(facts.examples),
        "chosen_by_words": any(source.about for source in recipe.corpus.sources),
        "n_near_misses": sum(row["stratum"] == "near-miss" for row in facts.examples),
    }


def repository(recipe: BaseRecipe) -> str:
    """The release's id on the Hub, as `org/demo`, to which every part adds its own name."""
    return f"{recipe.publish.organization or 'your-organization'}/{recipe.name}"


def _licences(recipe: Recipe, facts: Facts) -> Row:
    """The texts with their licences, and what there is to say of the licences of all parts."""
    by_origin = {source.title: source.licence for source in recipe.corpus.sources}
    tokens = facts.records["harvest"]["tokens_by_source"]
    sources = [(name, n, by_origin[name]) for name, n in tokens.items()]
    return {
        "sources": sources,
        "hub_sources": hub_sources(recipe),
        "licence": _shown_licence(card_licence(recipe.publish.licence)),
        "licence_of_texts": _shown_licence(licence_of_texts([licence for _, _, licence in sources])),
        "licence_notes": [problem.sentence for problem in check(recipe)],
    }


def _shown_licence(front: Row) -> str:
    return front.get("license_name", front["license"])


def _sweep(recipe: Recipe, facts: Facts, neurons: list[Row]) -> Row:
    """The SAEs and how faithful they are."""
    selected, curve = facts.selection["selected"], facts.curve
    first, chosen = next(iter(selected)), [row for row in curve if row["selected"]]
    return {
        "example_hook_point": first,
        "example_sae_id": selected[first],
        "example_latents": _latents_by_hand(facts.selection["curve"][selected[first]]),
        "sparsity_settings": _sparsity_settings(curve),
        "trained_as": [_TRAINED_AS[name] for name in recipe.train.architectures],
        "hook_points": list(selected),
        "d_in": facts.activations.facts["d_in"][first],
        "n_saes": len(curve),
        "sae_table": markdown(*card_sae_table(curve, neurons)),
        "curve": curve,
        "curve_alt": md_cell(f"Panels of FVU and I_CDF against L0; selected: {', '.join(selected.values())}", 400),
        "n_ce_tokens": facts.records["eval"]["n_ce_tokens"],
        "definitions": DEFINITIONS,
        "unexplained": _range([100 * row["fvu"] for row in chosen if row["fvu"] is not None]),
        "dead": _range([100 * row["dead"] for row in chosen if row["dead"]]),
    }


def _range(values: list[float]) -> str:
    """`18 to 39`, or `18` where both ends look alike; empty for none."""
    ends = [f"{value:.0f}" if value >= 1 else f"{value:.1g}" for value in (min(values), max(values))] if values else []
    return " to ".join(dict.fromkeys(ends))


def _selection(facts: Facts, domain_ids: list[str]) -> Row:
    """How SAEs and latents were chosen, with the options that every number depends on."""
    options = facts.selection["options"]
    pairs = pair_table(facts.pairs, domain_ids)
    groups = [group_table(facts.contrast, name) for name in ("domain", "language")]
    return {
        "options": options,
        "pair_sets": [md_cell(name) for name in options["pairs"]],
        "pair_languages": list(dict.fromkeys(pair.language for pair in facts.pairs)),
        "activity_test": activity_test(options),
        "pair_table": markdown(*pairs),
        "selection_table": markdown(*selection_table(facts.curve)),
        "threshold_table": markdown(*threshold_table(facts.curve)),
        "domain_contrast": markdown(*groups[0]) if groups[0][1] else "",
        "language_contrast": markdown(*groups[1]) if len(groups[1][1]) > 1 else "",
        "candidate_table": markdown(*candidate_table(facts.candidates, options["fdr"])),
    }


def _neurons(neurons: list[Row], taxonomy: Taxonomy) -> Row:
    """What the main table holds."""
    domain_ids = list(taxonomy.domain_ids)
    groups = {group["domain"]: group["n"] for group in domains_summary(neurons, domain_ids)}
    both = [row for row in neurons if row["score"] is not None and row["lexical_score"] is not None]
    best = [row for row in neurons if row["domains"] and row["explanation"]][:8]
    return {
        "domain_table": markdown(*domain_table(neurons, domain_ids)),
        "short_domain_table": markdown(*short_domain_table(neurons, domain_ids)),
        "score_table": markdown(["score", "neurons"], [[band, str(n)] for band, n in score_bands(neurons)]),
        "n_neurons": len(neurons),
        "n_tagged": sum(bool(row["domains"]) for row in neurons),
        "n_weak": sum(row["score"] is not None and row["score"] <= WEAK_BELOW for row in neurons),
        "n_scored": sum(row["score"] is not None for row in neurons),
        "n_beside_lexical": len(both),
        "n_above_lexical": sum(row["score"] > row["lexical_score"] for row in both),
        "best": best,
        "subjects": _and([one_line(domain.name).lower() for domain in taxonomy.domains]),
        "tagger": neurons[0]["tagger"] if neurons else "",
        "missing_domains": [name for name in domain_ids if not groups[name]],
        "few_domains": {name: groups[name] for name in domain_ids if 0 < groups[name] < _FEW},
    }


def _and(names: list[str]) -> str:
    return " and ".join(filter(None, (", ".join(names[:-1]), names[-1])))


def _asked(recipe: Recipe, facts: Facts) -> Row:
    """What the language models answered, how far it predicts the neurons, and what it cost."""
    scores, explanations, refused = facts.scores, facts.explanations, facts.records["explain"].get("refused_by_domain")
    confusion, costs = confusion_table(scores), cost_table(explanations, scores)
    methods = list(dict.fromkeys(row["method"] for row in scores))
    return {
        "languages": facts.languages,
        "language": facts.language,
        "splits": [split_name(language) for language in facts.languages],
        "explainers": list(dict.fromkeys(row["explainer"] for row in explanations)),
        "prompts": list(dict.fromkeys(row["prompt_hash"] for row in explanations)),
        "explains_itself": recipe.explain.backend == "local" and not recipe.explain.model,
        "status_table": markdown(*status_table(explanations, scores)),
        "refused_by_domain": {domain: n for domain, n in (refused or {}).items() if n},
        "methods": [(name, definition(name, recipe.score), _simulators(scores, name)) for name in methods],
        "method_table": markdown(*method_table(scores)),
        "confusion_table": markdown(*confusion) if confusion[1] else "",
        "cost_table": markdown(*costs) if costs[1] else "",
        "cost_usd": total_cost(explanations + scores),
    }


def _simulators(scores: list[Row], method: str) -> list[str]:
    return list(dict.fromkeys(row["simulator"] for row in scores if row["method"] == method and row["simulator"]))


def _columns(folder: Path, facts: Facts, neurons: list[Row]) -> Row:
    """What the files say: the columns of every config, a row of the main table, and the results of the diagnosis.

    folder: the release.
    """
    files = {name: folder / "neurons" / name / "train.parquet" for name in CONFIGS}
    files["explanations"] = folder / "neurons/explanations" / f"{facts.language}.parquet"
    first = next((row for row in neurons if row["domains"] and row["explanation"]), (neurons or [None])[0])
    row = {name: first[name] for name in pq.read_schema(files["neurons"]).names} if first else {}
    return {
        "columns": {name: markdown(*column_table(file)) for name, file in files.items()},
        "example_columns": markdown(*column_table(folder / "examples/examples/train.parquet")),
        "diagnoses": diagnosis_configs(folder / "examples"),
        "example_row": json_row(row) if row else "",
        "landscape": in_words(json.loads((folder / "neurons/landscape.json").read_text(encoding="utf-8"))),
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
