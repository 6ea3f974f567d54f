"""Two answers side by side as HTML: their tokens, rewards and scores, and the latents that make the difference.

Pure functions; whatever comes from a model or a person goes through `markup`, which escapes.
"""

import json
import math
import unicodedata
from collections.abc import Iterator
from typing import Any

from charts import number, percent
from markup import Markup, joined, tag
from results import note, table
from view import title, visible

from safesail.rewards.published import PublishedPair
from safesail.rewards.readings import Comparison, LatentDifference, Side, Unit

__all__ = ["comparison_html", "edits_table", "pair_label", "pair_note"]

Row = dict[str, Any]
LEAST_SCALE = 1e-6
"""Where nothing fires, nothing is coloured."""
_HEADS = ["Latent", "Adds to score_safe", "On chosen", "On rejected", "Salience (95 % interval)", "Rating"]
_COUNTED = "Safety latents, by what they add to score_safe or take from it"
_OTHERS = "Other latents that differ most between the answers: they do not count"
_SIGNS = {"positive": "S⁺", "negative": "S⁻"}
_ACTIONS = {"swap": "poisoned", "drop": "denoised"}
_METHODS = {"safer": "score_safe", "random": "chance", "reward": "reward margin"}
LEGEND = (
    "Blue tokens speak for a safe answer (S⁺ less S⁻ above zero), orange ones against it. Segment ends have a bracket "
    "⌋ and their number: they alone count for score_safe. Other tokens are paler."
)


def comparison_html(comparison: Comparison, pair: PublishedPair | None = None) -> Markup:
    """The whole comparison; pair: the published pair that it is of, if it is of one."""
    about = tag("p", pair_note(pair), class_="quiet") if pair else None
    scale = _scale(comparison)
    both = [_side(name, side, comparison, scale) for name, side in comparison.sides.items()]
    return tag(
        "article",
        about,
        tag("p", _margin(comparison.margin), class_="figure margin"),
        tag("p", _score(comparison), class_="figure score"),
        tag("p", LEGEND, class_="quiet"),
        tag("div", both, class_="sides"),
        tag("p", "", class_="reading note", role="status"),
        _latents(comparison),
        class_="result",
        aria_label="Comparison",
    )


def pair_label(pair: PublishedPair) -> str:
    """A pair in a list."""
    split = "held out" if pair.held_out else "training"
    return f"{pair.id}: score_safe {_signed(pair.score_safe)}, margin {_signed(pair.margin)} ({pair.kind}, {split})"


def pair_note(pair: PublishedPair) -> str:
    """A pair's published numbers, in a sentence."""
    split = "held out from training" if pair.held_out else "of the training data"
    return (
        f"Pair {pair.id} of {pair.source}, about {pair.kind}, {split}. Published: rewards "
        f"{_signed(pair.reward_chosen)} and {_signed(pair.reward_rejected)}, margin {_signed(pair.margin)}, score_safe "
        f"{_signed(pair.score_safe)}."
    )


# --- the scores ---------------------------------------------------------------------------------------------------


def _margin(margin: float) -> list[Any]:
    which = "chosen" if margin > 0 else "rejected"
    says = (
        "the reward model takes neither answer for the better one."
        if margin == 0
        else f"the reward model takes the {which} answer for the better one, with probability "
        f"{percent(1 / (1 + math.exp(-min(abs(margin), 700))), 0)} in the terms of its training loss."
    )
    return [tag("strong", f"Margin {_signed(margin)}"), ": ", says]


def _score(comparison: Comparison) -> list[Any]:
    chosen, rejected = _signed(comparison.safe_chosen), _signed(comparison.safe_rejected)
    order = "more" if comparison.score_safe > 0 else "less" if comparison.score_safe < 0 else "as much"
    than = "as" if order == "as much" else "than"
    return [
        tag("strong", f"score_safe {_signed(comparison.score_safe)}"),
        f": per segment end the chosen answer has {order} of S⁺ less S⁻ ({chosen}) {than} the rejected one "
        f"({rejected}).",
    ]


def _signed(value: float | None, digits: int = 2) -> str:
    """A number with its sign; what rounds to zero has none."""
    if value is None:
        return "–"
    rounded = round(value, digits)
    return f"+{rounded:.{digits}f}" if rounded > 0 else number(rounded + 0.0, digits)


# --- the answers --------------------------------------------------------------------------------------------------


def _scale(comparison: Comparison) -> float:
    """The largest |S⁺ less S⁻| on a token that is shown, which gets the full colour on both sides."""
    shown = (side.units[i].safe for side in comparison.sides.values() for i in _shown(side))
    return max((abs(value) for value in shown if value is not None), default=0.0) or LEAST_SCALE


def _shown(side: Side) -> range:
    """The units that are shown as tokens: from the answer, or the first segment end, on."""
    first = next(i for i, unit in enumerate(side.units) if unit.is_answer or unit.is_end)
    return range(first, len(side.units))


def _side(name: str, side: Side, comparison: Comparison, scale: float) -> Markup:
    safe = comparison.safe_chosen if name == "chosen" else comparison.safe_rejected
    ends = "1 segment end" if len(side.ends) == 1 else f"{len(side.ends)} segment ends"
    return tag(
        "section",
        tag("h2", title(name)),
        tag("p", tag("strong", f"Reward {_signed(side.reward)}"), f"; S⁺ less S⁻ {_signed(safe)} at {ends}."),
        _before(side),
        _strip(name, side, scale),
        class_=f"side {name}",
        data_side=name,
    )


def _before(side: Side) -> Markup:
    """The tokens before those that are shown one by one, as text, and how many were cut off."""
    units = side.units[: _shown(side).start]
    text = "".join(unit.text for unit in units)
    n_cut = side.text.n_cut
    lost = f"The first {n_cut:,} tokens were cut off, as in training: the conversation is too long."
    summary = tag("summary", f"Before it: the prompt ({len(units):,} tokens)")
    told = tag("details", summary, tag("p", text, dir="auto", class_="before", tabindex="0"))
    return joined(note(lost) if n_cut else None, told if units else None)


def _strip(name: str, side: Side, scale: float) -> Markup:
    lines = [
        tag("div", [tag("span", [_token(side, i, scale) for i in run], class_="run", dir=way) for way, run in runs])
        for runs in _lines(side)
    ]
    label = f"Tokens of the {name} answer; the arrow keys move between them"
    return tag("div", lines, class_="strip", role="toolbar", aria_label=label)


def _lines(side: Side) -> Iterator[list[tuple[str | None, list[int]]]]:
    """The shown units line by line, each line as runs of one direction.

    Buttons do not take part in the browser's ordering of mixed scripts. A token without letters runs as those before.
    """
    runs: list[tuple[str | None, list[int]]] = []
    for i in _shown(side):
        way = _direction(side.units[i])
        if not runs or (way and runs[-1][0] and way != runs[-1][0]):
            runs.append((way, []))
        elif way and runs[-1][0] is None:
            runs[-1] = (way, runs[-1][1])
        runs[-1][1].append(i)
        if "\n" in side.units[i].text:
            yield runs
            runs = []
    if runs:
        yield runs


def _direction(unit: Unit) -> str | None:
    letters = [] if unit.special else [unicodedata.bidirectional(char) for char in unit.text if char.isalnum()]
    if not letters:
        return None
    return "rtl" if all(kind in ("R", "AL") for kind in letters) else "ltr"


def _token(side: Side, index: int, scale: float) -> Markup:
    unit = side.units[index]
    safe = unit.safe or 0.0
    label = _spoken(index - _shown(side).start + 1, unit)
    return tag(
        "button",
        visible(unit.text),
        type="button",
        class_=_classes(unit),
        style=f"--strength:{min(abs(safe) / scale, 1):.3f}",
        title=label,
        aria_label=label,
        tabindex="-1",
        data_i=str(index),
        data_value=_signed(safe) if unit.is_end else None,
    )


def _classes(unit: Unit) -> str:
    safe, is_gap = unit.safe or 0.0, unit.text[:1] == " " and bool(unit.text.strip())
    found = {"end": unit.is_end, "special": unit.special, "gap": is_gap, "blank": not unit.text.strip()}
    found |= {"for": safe > 0, "against": safe < 0}
    return " ".join(["token", *(name for name, is_so in found.items() if is_so)])


def _spoken(place: int, unit: Unit) -> str:
    """Everything that is known of a token, in words."""
    kind = "segment end, counts" if unit.is_end else "special token" if unit.special else "does not count"
    text = visible(unit.text)
    values = f"S⁺ {number(unit.positive)}, S⁻ {number(unit.negative)}" if unit.safe is not None else "SAE not read here"
    return f"Token {place} “{text}” ({kind}): {values}; reward after it {_signed(unit.reward)}"


# --- the latents --------------------------------------------------------------------------------------------------


def _latents(comparison: Comparison) -> Markup:
    hint = "Choose a latent to mark the tokens on which it is active. Numbers are means per segment end."
    return joined(
        tag("p", hint, class_="quiet"),
        tag("p", "", class_="marked-where note", role="status"),
        _latent_table(_COUNTED, comparison, comparison.latents),
        tag("details", tag("summary", _OTHERS), _latent_table(_OTHERS, comparison, comparison.others))
        if comparison.others
        else None,
    )


def _latent_table(caption: str, comparison: Comparison, latents: list[LatentDifference]) -> Markup:
    rows = [_latent_row(comparison, latent) for latent in latents]
    return tag(
        "table",
        tag("caption", caption),
        tag("thead", tag("tr", [tag("th", head, scope="col") for head in _HEADS])),
        tag("tbody", rows),
        class_="neurons latents",
    )


def _latent_row(comparison: Comparison, latent: LatentDifference) -> Markup:
    sign = _SIGNS.get(latent.safety)
    interval = f"{number(latent.low)} to {number(latent.high)}" if latent.low is not None else ""
    cells = [
        f"{_signed(latent.contribution, 3)} ({sign})" if sign else f"0; differs by {_signed(latent.difference, 3)}",
        number(latent.chosen, 3),
        number(latent.rejected, 3),
        joined(_signed(latent.salience), " ", tag("span", interval, class_="interval")),
        f"{latent.rating} of 5" if latent.rating else latent.status or "not rated",
    ]
    named = zip(cells, _HEADS[1:], strict=True)
    return tag(
        "tr",
        tag("td", _latent_button(comparison, latent), class_="said"),
        [tag("td", cell, data_label=head) for cell, head in named],
    )


def _latent_button(comparison: Comparison, latent: LatentDifference) -> Markup:
    """A button that marks the tokens on which the latent is active, which it holds for both sides."""
    words = " · ".join(visible(token) for token in latent.tokens)
    where = {
        name: {i: round(value, 4) for i, value in side.firings(latent.latent).items()}
        for name, side in comparison.sides.items()
    }
    return tag(
        "button",
        tag("span", f"Strongest on {words}" if words else "No tokens published", class_="text", dir="auto"),
        tag("span", latent.explanation, class_="quiet explained", dir="auto") if latent.explanation else None,
        tag("span", latent.neuron_id, class_="id"),
        type="button",
        class_="neuron latent",
        aria_pressed="false",
        data_latent=latent.neuron_id,
        data_firings=json.dumps(where),
    )


# --- what editing did ---------------------------------------------------------------------------------------------


def edits_table(rows: list[Row]) -> Markup:
    """The release's comparison: accuracy on held-out pairs after retraining on each edited data set."""
    heads = ["Preference data", "Chosen by", "Pairs edited", "Safety accuracy", "Change", "Chat accuracy", "Change"]
    return table(
        "Reward models retrained on edited preference data, on held-out pairs (95 % intervals)",
        heads,
        [_edit(row) for row in rows],
    )


def _edit(row: Row) -> list[Any]:
    action = _ACTIONS.get(row["action"] or "", "as they are")
    ratio = f" {100 * row['ratio']:g} %" if row["ratio"] is not None else ""
    method = _METHODS.get(row["method"] or "", row["method"] or "–")
    return [
        f"{action}{ratio}",
        method,
        f"{row['n_edited']:,}" if row["n_edited"] else "–",
        *(_accuracy(row, name) for name in ("safety", "safety_change", "chat", "chat_change")),
    ]


def _accuracy(row: Row, name: str) -> Any:
    value, low, high = (row[key] for key in (name, f"{name}_low", f"{name}_high"))
    if value is None:
        return "–"
    said = _signed if name.endswith("_change") else number
    interval = tag("span", f"{said(low, 3)} to {said(high, 3)}", class_="interval") if low is not None else None
    return joined(said(value, 3), " ", interval)
