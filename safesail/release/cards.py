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
from safesail.release.contrast import activity_test, group_table, pair_table, threshold_table
from safesail.release.facts import Facts
from safesail.release.front_matter import FRONT_MATTER
from safesail.release.methods import confusion_table, cost_table, definition, method_table, total_cost
from safesail.release.summary import (
    candidate_table,
    domain_table,
    markdown,
    sae_table,
    score_bands,
    selection_table,
    status_table,
)
from safesail.release.tables import split_name
from safesail.taxonomy import Taxonomy

__all__ = ["card_facts", "md_cell", "render", "write_cards"]

Row = dict[str, Any]


def write_cards(recipe: Recipe, facts: Facts, neurons: list[Row], taxonomy: Taxonomy, folder: Path) -> None:
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


def card_facts(recipe: Recipe, facts: Facts, neurons: list[Row], taxonomy: Taxonomy) -> dict[str, Any]:
    """Everything the templates may print, measured or declared."""
    return {
        **_release(recipe, facts),
        **_sweep(recipe, facts),
        **_selection(facts, list(taxonomy.domain_ids)),
        **_neurons(neurons, taxonomy),
        **_asked(recipe, facts),
    }


def _release(recipe: Recipe, facts: Facts) -> dict[str, Any]:
    """What it is called and what it was made from."""
    organization = recipe.publish.organization or "your-organization"
    harvest = facts.records["harvest"]
    by_origin = {source.title: source for source in recipe.corpus.sources}
    return {
        "name": recipe.name,
        "title": recipe.publish.title or recipe.name,
        "repository": f"{organization}/{recipe.name}",
        "recipe": recipe,
        "base_model": recipe.model.name,
        "base_model_note": recipe.model.note,
        "version": __version__,
        "n_tokens": harvest["n_tokens"],
        "n_documents": harvest["n_documents"],
        "sources": [(name, n, by_origin[name].licence) for name, n in harvest["tokens_by_source"].items()],
        "n_examples": len(facts.examples),
        "n_near_misses": sum(row["stratum"] == "near-miss" for row in facts.examples),
    }


def _sweep(recipe: Recipe, facts: Facts) -> dict[str, Any]:
    """The SAEs and how faithful they are."""
    selected, curve = facts.selection["selected"], facts.curve
    first = next(iter(selected))
    return {
        "example_hook_point": first,
        "example_sae_id": selected[first],
        "example_latents": _latents_by_hand(facts.selection["curve"][selected[first]]),
        "sparsity_settings": _sparsity_settings(curve),
        "trained_as": [_TRAINED_AS[name] for name in recipe.train.architectures],
        "hook_points": list(selected),
        "d_in": facts.activations.facts["d_in"][first],
        "sae_table": markdown(*sae_table(curve)),
        "curve": curve,
        "curve_alt": md_cell(f"Panels of FVU and I_CDF against L0; selected: {', '.join(selected.values())}", 400),
        "n_ce_tokens": facts.records["eval"]["n_ce_tokens"],
        "definitions": DEFINITIONS,
    }


def _selection(facts: Facts, domain_ids: list[str]) -> dict[str, Any]:
    """How SAEs and latents were chosen, with the options that every number depends on."""
    options = facts.selection["options"]
    pairs = pair_table(facts.pairs, domain_ids)
    groups = [group_table(facts.contrast, name) for name in ("domain", "language")]
    return {
        "options": options,
        "pair_sets": [md_cell(name) for name in options["pairs"]],
        "activity_test": activity_test(options),
        "pair_table": markdown(*pairs),
        "selection_table": markdown(*selection_table(facts.curve)),
        "threshold_table": markdown(*threshold_table(facts.curve)),
        "domain_contrast": markdown(*groups[0]) if groups[0][1] else "",
        "language_contrast": markdown(*groups[1]) if len(groups[1][1]) > 1 else "",
        "candidate_table": markdown(*candidate_table(facts.candidates, options["fdr"])),
    }


def _neurons(neurons: list[Row], taxonomy: Taxonomy) -> dict[str, Any]:
    """What the main table holds."""
    return {
        "domain_table": markdown(*domain_table(neurons, list(taxonomy.domain_ids))),
        "score_table": markdown(["score", "neurons"], [[band, str(n)] for band, n in score_bands(neurons)]),
        "n_neurons": len(neurons),
        "n_tagged": sum(bool(row["domains"]) for row in neurons),
        "n_weak": sum(row["score"] is not None and row["score"] <= 0.2 for row in neurons),
        "n_scored": sum(row["score"] is not None for row in neurons),
        "n_failed": sum(row["explanation"] is None for row in neurons),
        "best": [row for row in neurons if row["domains"] and row["explanation"]][:8],
        "tagger": neurons[0]["tagger"] if neurons else "",
        "missing_domains": [
            domain.name for domain in taxonomy.domains if not any(domain.id in row["domains"] for row in neurons)
        ],
    }


def _asked(recipe: Recipe, facts: Facts) -> dict[str, Any]:
    """What the language models answered, how far it predicts the neurons, and what it cost."""
    scores, explanations, refused = facts.scores, facts.explanations, facts.records["explain"].get("refused_by_domain")
    confusion, costs = confusion_table(scores), cost_table(explanations, scores)
    methods = list(dict.fromkeys(row["method"] for row in scores))
    return {
        "languages": facts.languages,
        "language": facts.language,
        "splits": [split_name(language) for language in facts.languages],
        "explainers": list(dict.fromkeys(row["explainer"] for row in explanations)),
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
