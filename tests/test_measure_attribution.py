"""What `scripts/measure_attribution.py` counts of the versions of a prompt."""

import importlib
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "scripts"))  # the scripts are no package
script = importlib.import_module("measure_attribution")


def test_what_stays_on_a_version_is_counted_by_hook_point():
    changes = {"a": ("missing", "weaker", "weaker", "stronger", "new", "equal"), "b": ("missing", "new")}
    table = [{"hook_point": point, "change": change} for point, told in changes.items() for change in told]
    assert dict(script.counts(table, "a")) == {"plain": 5, "kept": 4, "weaker": 2, "new": 1}
    assert dict(script.counts(table, "b")) == {"plain": 1, "kept": 0, "weaker": 0, "new": 1}
    found = script.counts(table, "a")
    found["others"] = 3  # on the versions of the two other prompts together
    assert (
        script._row("weapon", "zh", "known | 1.2", "a", found)
        == "| weapon | zh | known | 1.2 | a | 5 | 4 | 2 | 1.5 | 1 |"
    )
