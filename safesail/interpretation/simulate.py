"""Simulation: whoever sees only an explanation says where its neuron is active.

One request holds one explanation and many segments, several explanations and the segments they share, or one
explanation and the tokens of one excerpt. An endpoint answers in JSON: the numbers of the active pieces, a level for
each token, or, with `score.logprobs`, a digit for each piece, whose log-probabilities become a probability. A local
model is not asked to answer at all: what it finds probable at each piece is read from its logits.

A reply that is not exactly what was asked for gives a status and no prediction: nothing is filled in, cut off or
guessed. What this does not do: choose texts (`excerpts`) or compute scores (`score`).
"""

import math
import re
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from safesail.interpretation.excerpts import Level, Units
from safesail.interpretation.exchange import SLOT, Message, Reply, Request
from safesail.interpretation.llm import Llm
from safesail.interpretation.prompts import inert, prompt
from safesail.recipe import ScoreSection

__all__ = ["Job", "Simulated", "expected_completion", "simulate", "simulation_requests"]

YES_NO = ("no", "yes")
DIGITS = tuple("0123456789")
"""A local model's levels: each must be told from the others by its first token, which 10 and 1 are not."""

_TOP_LEVEL = 10
_ACTIVE_SHARE = 0.15
"""The share of pieces that a simulator is taken to name, for the estimate before any answer is known."""
Answer = tuple[str, str, Tensor | None]
"""Status, detail and prediction."""


class Job(NamedTuple):
    """One explanation and the units on which it is tried."""

    neuron_id: str
    language: str
    explanation: str
    units: Units


class Simulated(NamedTuple):
    """What the simulator made of one job, and what that cost."""

    predicted: Tensor | None
    """(n_units,) 0 or 1, a probability, or a level 0 … 10; None unless the status is ok."""
    status: str
    detail: str
    prompt_tokens: int
    completion_tokens: int
    cost_usd: float | None


class _Call(NamedTuple):
    """One request, the jobs it is about, and the units that it asks about, the same of each of these jobs."""

    request: Request
    jobs: list[int]
    units: range
    read: Callable[[Reply, int, int], Tensor]
    """(reply, which of the jobs, n_units) → (n_units,); ValueError says what is wrong with the answer."""


class _Part(NamedTuple):
    """What one reply means for one job."""

    call: _Call
    reply: Reply
    place: int
    """Which of the call's jobs it is."""
    payer: int
    """Which of those that paid for the reply."""
    n_payers: int


def simulation_requests(jobs: list[Job], level: Level, section: ScoreSection, local: bool) -> list[Request]:
    """The requests that `simulate` sends for these jobs."""
    return [call.request for call in _calls(jobs, level, section, local)]


def simulate(
    jobs: list[Job],
    level: Level,
    section: ScoreSection,
    llm: Llm,
    progress: Callable[[int], object] | None = None,
) -> list[Simulated]:
    """What each job's explanation predicts, in the order of the jobs; `progress(n)` is told of n more replies.

    The first of a job's replies that is not ok decides the job's status. A request that is about several jobs is paid
    for by all of them in equal shares, and so are equal requests, which are sent once.
    """
    calls = list(_calls(jobs, level, section, section.backend == "local"))
    replies = llm.ask([call.request for call in calls], progress=progress)
    n_payers = Counter(call.request.messages for call in calls for _ in call.jobs)
    n_paid: Counter[Any] = Counter()
    parts: list[list[_Part]] = [[] for _ in jobs]
    for call, reply in zip(calls, replies, strict=True):
        asked = call.request.messages
        for place, job in enumerate(call.jobs):
            parts[job].append(_Part(call, reply, place, n_paid[asked], n_payers[asked]))
            n_paid[asked] += 1
    return [_joined(len(job.units.texts), mine) for job, mine in zip(jobs, parts, strict=True)]


def expected_completion(request: Request) -> int:
    """A guess at the tokens of the answer to a simulation request."""
    if request.choices:
        return 0
    assert request.schema is not None, "what an endpoint is asked has a schema"
    lists = list(request.schema["properties"].values())
    per_list = [
        2 * part["maxItems"] if "minItems" in part else round(3 * _ACTIVE_SHARE * part["maxItems"]) for part in lists
    ]
    return 2 + sum(5 + n for n in per_list)


# --- requests -----------------------------------------------------------------------------------------------------


def _calls(jobs: list[Job], level: Level, section: ScoreSection, local: bool) -> Iterator[_Call]:
    alone = local or level == "token"
    for group in _groups(jobs, 1 if alone else section.neurons_per_request):
        units = jobs[group[0]].units
        descriptions = [jobs[i].explanation for i in group]
        for part in _parts(units, level, section.segments_per_request):
            pieces = units.texts[part.start : part.stop]
            if local:
                yield _Call(_judged(descriptions[0], pieces, level), group, part, _read_judged)
            elif level == "token":
                yield _Call(_tokens(descriptions[0], pieces), group, part, _read_tokens)
            elif section.logprobs:
                yield _Call(_activity(descriptions, pieces), group, part, _read_activity)
            else:
                yield _Call(_active(descriptions, pieces), group, part, _read_active)


def _groups(jobs: list[Job], size: int) -> list[list[int]]:
    """The jobs by number, at most `size` together: only jobs of one language on the same texts share a request."""
    same: dict[Any, list[int]] = {}
    for i, job in enumerate(jobs):
        same.setdefault((job.language, *job.units.texts) if size > 1 else i, []).append(i)
    return [members[start : start + size] for members in same.values() for start in range(0, len(members), size)]


def _parts(units: Units, level: Level, at_most: int) -> list[range]:
    """The units of each request: a whole excerpt's tokens, else at most so many pieces."""
    if level != "token":
        n = len(units.texts)
        return [range(start, min(start + at_most, n)) for start in range(0, n, at_most)]
    _, sizes = torch.unique_consecutive(units.text_of, return_counts=True)
    ends = sizes.cumsum(0).tolist()
    return [range(end - size, end) for end, size in zip(ends, sizes.tolist(), strict=True)]


def _active(descriptions: list[str], pieces: list[str]) -> Request:
    """Which pieces are active: their numbers."""
    items = {"type": "integer", "minimum": 1, "maximum": len(pieces)}
    numbers = {"type": "array", "items": items, "maxItems": len(pieces)}
    text = _template("segments", "shared", descriptions).format(**_filled(descriptions, pieces))
    return _asked(text, _keys("active", descriptions), numbers, 6 * len(pieces) + 16)


def _activity(descriptions: list[str], pieces: list[str]) -> Request:
    """Whether each piece is active: a digit, with the log-probabilities of its alternatives."""
    digits = _exactly(len(pieces), 1)
    text = _template("activity", "shared_activity", descriptions).format(**_filled(descriptions, pieces))
    return _asked(text, _keys("activity", descriptions), digits, 4 * len(pieces) + 16)._replace(logprobs=True)


def _tokens(description: str, tokens: list[str]) -> Request:
    """How active each token is: its level."""
    lines = _numbered(tokens)
    text = prompt("simulate_tokens").format(description=inert(description), tokens=lines, n=len(tokens))
    return _asked(text, ["activations"], _exactly(len(tokens), _TOP_LEVEL), 6 * len(tokens) + 16)


def _judged(description: str, pieces: list[str], level: Level) -> Request:
    """How probable a local model finds each choice after each piece."""
    lines = _numbered([piece.replace("␣", " ") for piece in pieces], SLOT)
    description = inert(description).replace("␣", " ")
    if level == "token":
        text, choices = prompt("simulate_local_tokens").format(description=description, tokens=lines), DIGITS
    else:
        text, choices = prompt("simulate_local").format(description=description, pieces=lines), YES_NO
    return Request((Message("user", text.rstrip("\n")),), max_tokens=1, choices=choices)


def _asked(text: str, keys: list[str], numbers: dict[str, Any], most_per_key: int) -> Request:
    """The request for an object with a list of numbers under each key, and nothing else."""
    schema = {
        "type": "object",
        "properties": dict.fromkeys(keys, numbers),
        "required": keys,
        "additionalProperties": False,
    }
    return Request((Message("user", text),), max_tokens=16 + most_per_key * len(keys), schema=schema)


def _exactly(n: int, most: int) -> dict[str, Any]:
    """The schema of a list of exactly n whole numbers from 0 to `most`."""
    items = {"type": "integer", "minimum": 0, "maximum": most}
    return {"type": "array", "items": items, "minItems": n, "maxItems": n}


def _keys(alone: str, descriptions: list[str]) -> list[str]:
    return [alone] if len(descriptions) == 1 else [str(i) for i in range(1, len(descriptions) + 1)]


def _template(alone: str, shared: str, descriptions: list[str]) -> str:
    return prompt(f"simulate_{alone if len(descriptions) == 1 else shared}")


def _filled(descriptions: list[str], pieces: list[str]) -> dict[str, Any]:
    """What the templates about pieces can ask for."""
    blocks = (f'<description id="{i}">{inert(text)}</description>' for i, text in enumerate(descriptions, 1))
    return {
        "description": inert(descriptions[0]),
        "descriptions": "\n".join(blocks),
        "pieces": _numbered(pieces),
        "n": len(pieces),
    }


def _numbered(pieces: list[str], end: str = "") -> str:
    """One line a piece. A piece stays on its line, so what looks like another number in it is a part of it."""
    return "\n".join(f"{i}: {inert(piece)}{end}" for i, piece in enumerate(pieces, 1))


# --- answers ------------------------------------------------------------------------------------------------------


def _read_active(reply: Reply, place: int, n: int) -> Tensor:
    numbers = reply.value[_key(reply, "active", place)]
    if len(set(numbers)) < len(numbers):
        raise ValueError("the answer names a piece twice")
    if any(not 1 <= number <= n for number in numbers):
        raise ValueError(f"the answer names a piece outside 1 to {n}")
    predicted = torch.zeros(n)
    predicted[[number - 1 for number in numbers]] = 1.0
    return predicted


def _read_activity(reply: Reply, place: int, n: int) -> Tensor:
    """The probability of 1 at each digit; where the server gave no log-probabilities that fit, the digits."""
    key = _key(reply, "activity", place)
    digits = _checked(reply.value[key], n, 1)
    found = _probabilities(reply.logprobs, key, digits) if reply.logprobs else None
    return torch.tensor(digits if found is None else found, dtype=torch.float32)


def _read_tokens(reply: Reply, place: int, n: int) -> Tensor:
    return torch.tensor(_checked(reply.value["activations"], n, _TOP_LEVEL), dtype=torch.float32)


def _read_judged(reply: Reply, place: int, n: int) -> Tensor:
    """The probability of yes, or the expected level."""
    probabilities = torch.tensor(reply.value, dtype=torch.float32)
    assert len(probabilities) == n, f"the judge answered {len(probabilities)} of {n} slots"
    return probabilities @ torch.arange(probabilities.shape[1], dtype=torch.float32)


def _key(reply: Reply, alone: str, place: int) -> str:
    return alone if alone in reply.value else str(place + 1)


def _checked(numbers: list[int], n: int, most: int) -> list[int]:
    if len(numbers) != n:
        raise ValueError(f"the answer has {len(numbers)} numbers where {n} were asked for")
    if any(not 0 <= number <= most for number in numbers):
        raise ValueError(f"the answer has a number outside 0 to {most}")
    return numbers


def _probabilities(logprobs: list[Any], key: str, digits: list[int]) -> list[float] | None:
    """P(1) / (P(0) + P(1)) at each digit of the list under `key`; None where the tokens do not spell that list.

    logprobs: per token its text and {text: log-probability} of its alternatives. Tokens may hold more than the digit
    (`[0`, `,1`): the alternatives that count are those that differ in the digit alone.
    """
    text = "".join(token for token, _ in logprobs)
    spelt = re.finditer(rf'"{re.escape(key)}"\s*:\s*\[([\s\d,]*)\]', text)
    matching = (match for match in spelt if [int(d) for d in re.findall(r"\d+", match[1])] == digits)
    match = next(matching, None)
    if match is None:
        return None
    owners = [(token, place, others) for token, others in logprobs for place in range(len(token))]
    places = [match.start(1) + found.start() for found in re.finditer(r"\d", match[1])]
    return [_probability(*owners[place], digit) for place, digit in zip(places, digits, strict=True)]


def _probability(token: str, place: int, alternatives: dict[str, float], digit: int) -> float:
    """The probability of 1 at one place of a token; `digit`, which was said, is certain where nothing else is known."""
    one, zero = (
        sum(math.exp(logprob) for text, logprob in alternatives.items() if text.strip() == wanted)
        for wanted in ((token[:place] + said + token[place + 1 :]).strip() for said in "10")
    )
    return one / (one + zero) if one + zero > 0 else float(digit)


# --- a job's parts ------------------------------------------------------------------------------------------------


def _joined(n_units: int, parts: list[_Part]) -> Simulated:
    predicted, status, detail = torch.zeros(n_units), "ok", ""
    for part in parts:
        said, why, values = _read(part)
        if values is not None:
            predicted[part.call.units.start : part.call.units.stop] = values
        elif status == "ok":
            status, detail = said, why
    costs = [part.reply.cost_usd and part.reply.cost_usd / part.n_payers for part in parts]
    return Simulated(
        predicted if status == "ok" else None,
        status,
        detail,
        sum(_share(part.reply.prompt_tokens, part) for part in parts),
        sum(_share(part.reply.completion_tokens, part) for part in parts),
        None if None in costs else sum(cost for cost in costs if cost),
    )


def _read(part: _Part) -> Answer:
    if part.reply.status != "ok":
        return part.reply.status, " ".join(part.reply.detail.split())[:200], None
    try:
        return "ok", "", part.call.read(part.reply, part.place, len(part.call.units))
    except ValueError as problem:
        return "unparsed", str(problem), None


def _share(n_tokens: int, part: _Part) -> int:
    """A payer's share of a reply's tokens; the shares' sum is the whole."""
    return n_tokens // part.n_payers + (part.payer < n_tokens % part.n_payers)
