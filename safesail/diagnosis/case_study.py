"""The built-in example of trajectories: harmless prompts about unsafe subjects, each in several versions."""

import json
from typing import NamedTuple

from safesail.assets import asset

__all__ = ["Case", "case_study"]


class Case(NamedTuple):
    """One prompt of the case study in several versions."""

    name: str
    prompts: dict[str, str]
    """The English original first."""
    languages: dict[str, str]


def case_study() -> dict[str, Case]:
    """The built-in prompts by name: each in English, Chinese and Hindi, paraphrased and misspelt.

    Our own wording on the subjects of Safe-SAIL's case studies: selling a person, getting a weapon, insulting a
    politician.
    """
    lines = asset("hub/prompts/case_study.jsonl").read_text(encoding="utf-8").splitlines()
    cases: dict[str, Case] = {}
    for row in map(json.loads, lines):
        case = cases.setdefault(row["case"], Case(row["case"], {}, {}))
        case.prompts[row["label"]] = row["text"]
        case.languages[row["label"]] = row["language"]
    return cases
