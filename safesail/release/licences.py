"""Licences: what those of the base model and of the texts leave to the release's own.

A small table, no legal advice. SAEs and explanations inherit from the texts the limits on use, as *non-commercial*;
the examples, which copy the texts, and everything that rests on the base model inherit share-alike and own terms too.
A licence that is not in the table is named, never guessed.
"""

import re
from typing import Any, NamedTuple

from safesail.errors import InputError
from safesail.recipe import BaseRecipe
from safesail.reward_recipe import RewardRecipe

__all__ = ["LICENCES", "Problem", "Terms", "card_licence", "check", "check_licences", "conflict", "licence_of_texts"]


class Terms(NamedTuple):
    """What a licence demands of works that are made from the licensed one."""

    commercial: bool = True
    """Commercial use is allowed."""
    same: tuple[str, ...] = ()
    """Such works must have one of these licences (share-alike, or terms of its own that are passed on)."""
    research_only: bool = False
    on_hub: bool = True
    """The Hub knows it by this name."""


class Problem(NamedTuple):
    """What is wrong with, or not known of, one of a recipe's licences."""

    sentence: str
    refused: bool
    """It contradicts the release's licence; else it is only said in the card."""


_PERMISSIVE = """
afl-3.0 apache-2.0 artistic-2.0 bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear bsl-1.0 cc-by-2.0 cc-by-2.5 cc-by-3.0
cc-by-4.0 cc0-1.0 cdla-permissive-1.0 cdla-permissive-2.0 ecl-2.0 etalab-2.0 isc mit ncsa odc-by pddl postgresql
unlicense wtfpl zlib
"""
_SHARE_ALIKE = {
    "agpl-3.0": "agpl-3.0",
    "cc-by-sa-3.0": "cc-by-sa-3.0 cc-by-sa-4.0",
    "cc-by-sa-4.0": "cc-by-sa-4.0",
    "cdla-sharing-1.0": "cdla-sharing-1.0",
    "gfdl": "gfdl",
    "gpl-2.0": "gpl-2.0",
    "gpl-3.0": "gpl-3.0 agpl-3.0",
    "odbl": "odbl",
    "osl-3.0": "osl-3.0",
}
_NON_COMMERCIAL = {
    "cc-by-nc-2.0": "",
    "cc-by-nc-3.0": "",
    "cc-by-nc-4.0": "",
    "cc-by-nc-sa-2.0": "cc-by-nc-sa-2.0 cc-by-nc-sa-3.0 cc-by-nc-sa-4.0",
    "cc-by-nc-sa-3.0": "cc-by-nc-sa-3.0 cc-by-nc-sa-4.0",
    "cc-by-nc-sa-4.0": "cc-by-nc-sa-4.0",
}
_OWN_TERMS = """
bigcode-openrail-m bigscience-bloom-rail-1.0 bigscience-openrail-m creativeml-openrail-m gemma llama2 llama3 llama3.1
llama3.2 llama3.3 llama4 openrail openrail++
"""
"""Terms that a licensee must pass on, with limits on use."""

LICENCES: dict[str, Terms] = {
    **{name: Terms() for name in _PERMISSIVE.split()},
    **{name: Terms(same=tuple(same.split())) for name, same in _SHARE_ALIKE.items()},
    **{name: Terms(commercial=False, same=tuple(same.split())) for name, same in _NON_COMMERCIAL.items()},
    **{name: Terms(same=(name,)) for name in _OWN_TERMS.split()},
    "qwen-research": Terms(commercial=False, research_only=True, on_hub=False),
    "apple-amlr": Terms(commercial=False, research_only=True),
    "deepfloyd-if-license": Terms(commercial=False, research_only=True),
    "fair-noncommercial-research-license": Terms(commercial=False, research_only=True),
}
"""The licences that are known here, by the names that the Hub gives them."""
_MIXED = ("mixed", "other", "unknown")


def conflict(licence: str, parent: str, *, copied: bool) -> str:
    """What `licence` permits although `parent` forbids it, in words; empty: nothing, or one of them is not known.

    copied: the licensed work rests on the parent or holds parts of it, so share-alike and own terms bind too.
    """
    ours, theirs = LICENCES.get(_id(licence)), LICENCES.get(_id(parent))
    if theirs is None or _id(licence) == _id(parent):
        return ""
    if ours is not None and ours.commercial and not theirs.commercial:
        return "allows commercial use, which is forbidden"
    if copied and theirs.same and ours is not None and _id(licence) not in theirs.same:
        return f"is not {' or '.join(theirs.same)}, which is demanded"
    return ""


def check(recipe: BaseRecipe) -> list[Problem]:
    """What is wrong with the licences of a recipe's base model, texts and release, and what is not known of them."""
    own = _id(recipe.publish.licence)
    if not own or own in _MIXED:
        sentence = f'publish.licence is {own!r}; set it to the licence of the release, as publish.licence = "mit".'
        return [Problem(sentence, True)]
    named = [] if own in LICENCES else [_unknown("the release", own)]
    parents = {("the base model", recipe.model.licence, True): None}  # a dictionary, as an ordered set
    parents |= {(f"the {kind} {title}", licence, False): None for kind, title, licence in _texts(recipe)}
    found = (_problem(recipe, owner, licence, copied) for owner, licence, copied in parents)
    return [*named, *(problem for problem in found if problem)]


def _texts(recipe: BaseRecipe) -> list[tuple[str, str, str]]:
    """(what it is, its title, its licence) of all that a recipe reads: texts, and pairs that a reward model learns."""
    found = [("texts", source.title, source.licence) for source in recipe.corpus.sources]
    if isinstance(recipe, RewardRecipe):
        found += [("preferences", source.title, source.licence) for source in recipe.preferences.sources]
    return found


def check_licences(recipe: BaseRecipe) -> None:
    """InputError where the release's licence permits what that of the base model or of a text forbids."""
    refused = [problem.sentence for problem in check(recipe) if problem.refused]
    if refused:
        rest = f" ({len(refused) - 1} more are in conflict.)" if len(refused) > 1 else ""
        raise InputError(refused[0] + rest)


def _problem(recipe: BaseRecipe, owner: str, licence: str, copied: bool) -> Problem | None:
    """What there is to say of the licence of the base model or a text."""
    own, parent = _id(recipe.publish.licence), _id(licence)
    if not parent:
        return Problem(f"The licence of {owner} is not stated.", False)
    if parent in _MIXED:
        return Problem(f"The licence of {owner} is {parent}: parts have different or unclear terms.", False)
    if parent not in LICENCES:
        return _unknown(owner, parent)
    reason = conflict(own, parent, copied=copied)
    if reason:
        sentence = f"publish.licence = {own!r} {reason} by the licence of {owner}, {parent!r}; {_advice(recipe)}."
        return Problem(sentence, True)
    if LICENCES[parent].research_only and own != parent:
        return Problem(f"The licence of {owner}, {parent}, is for research and evaluation alone.", False)
    return None


def _unknown(owner: str, licence: str) -> Problem:
    return Problem(f"The licence of {owner}, {licence}, is not one that was checked; read it before use.", False)


def _advice(recipe: BaseRecipe) -> str:
    """The first licence that no parent's contradicts, as a setting."""
    parents = [(recipe.model.licence, True), *((licence, False) for *_, licence in _texts(recipe))]
    tried = [*(_id(parent) for parent, _ in parents), "cc-by-nc-4.0"]
    fits = (
        name
        for name in tried
        if name in LICENCES and not any(conflict(name, parent, copied=copied) for parent, copied in parents)
    )
    fitting = next(fits, None)
    return f'set publish.licence = "{fitting}"' if fitting else "no known licence satisfies all of them: leave one out"


def licence_of_texts(licences: list[str]) -> dict[str, Any]:
    """The front matter's licence of excerpts: that of their sources where all agree, else `other`.

    `other` grants nothing beyond the sources' own licences, which the card lists.
    """
    found = {_id(licence) for licence in licences}
    if len(found) == 1 and found <= {name for name, terms in LICENCES.items() if terms.on_hub}:
        return {"license": found.pop()}
    return {"license": "other", "license_name": "licences-of-the-sources"}


def card_licence(licence: str) -> dict[str, Any]:
    """The front matter's licence of a release: the Hub refuses names it does not know except as a name of `other`."""
    name = _id(licence)
    if name in LICENCES and LICENCES[name].on_hub:
        return {"license": name}
    return {"license": "other", "license_name": re.sub(r"[^a-z0-9.]+", "-", name).strip("-.") or "unnamed"}


def _id(licence: str) -> str:
    return licence.strip().lower()
