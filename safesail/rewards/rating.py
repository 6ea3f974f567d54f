"""How much each salient latent has to do with safety, from 1 (nothing) to 5, and so which are the safety latents.

Reads the salience table and the contexts of its strongest latents. Writes `ratings.parquet` (a row per rated latent)
and `safety.json`, the two sets that score_safe sums over:

    S⁺ = {i : s_i > 0},  S⁻ = {i : s_i < 0}   among the `max_latents` of largest |s| with a rating of at least `keep`

Two raters behind one door: an OpenAI-compatible endpoint is shown the contexts with the segment end marked and answers
in JSON; a sentence encoder (`encoder_rater`) is given the contexts one a line. An answer that is refused, failed or no
whole number from 1 to 5 is a status and no rating: such a latent is never kept.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Mapping
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from safesail.interpretation.answers import is_refusal, judge
from safesail.interpretation.findings import LONGEST, plain
from safesail.interpretation.llm import Llm, Message, Reply, Request
from safesail.interpretation.prompts import inert, prompt, prompt_hash
from safesail.progress import bar
from safesail.reward_recipe import RewardRecipe
from safesail.run import StageWork, write_json

__all__ = [
    "RATINGS_SCHEMA",
    "Rating",
    "contexts_of_rated",
    "expected_completion",
    "rate_requests",
    "rate_stage",
    "rating_of",
    "safety_latents",
]

Row = dict[str, Any]
SCORES = (1, 2, 3, 4, 5)
RATINGS_SCHEMA = pa.schema(
    [
        ("latent", pa.int64()),
        ("rating", pa.int32()),
        ("explanation", pa.string()),
        ("status", pa.string()),
        ("detail", pa.string()),
        ("rater", pa.string()),
        ("prompt_hash", pa.string()),
        ("prompt_tokens", pa.int32()),
        ("completion_tokens", pa.int32()),
        ("cost_usd", pa.float64()),
    ]
)


class Rating(NamedTuple):
    """What a rater said of one latent."""

    rating: int | None
    """1 … 5; None unless the status is ok."""
    explanation: str
    status: str
    """ok, refused, unparsed or failed."""
    detail: str = ""
    """Why it is not ok; empty when it is."""


def rate_stage(recipe: RewardRecipe, salience: list[Row], contexts: list[Row], llm: Llm, work: StageWork) -> None:
    """Rate every latent whose salience row says `rated`, and keep the safety latents.

    Facts: `usage`, `statuses` {status: latents}, `ratings` {rating: latents}, `n_positive`, `n_negative`.
    """
    requests = rate_requests(recipe, contexts_of_rated(salience, contexts))
    with bar("rate", len(requests), "latent") as progress:
        replies = llm.ask(list(requests.values()), progress=progress.update)
    template = prompt_hash("rate_latent") if recipe.rate.backend == "endpoint" else None
    rows = [_row(latent, reply, llm.backend.name, template) for latent, reply in zip(requests, replies, strict=True)]
    pq.write_table(pa.Table.from_pylist(rows, schema=RATINGS_SCHEMA), work.folder / "ratings.parquet")
    found = Counter(row["rating"] for row in rows if row["rating"] is not None)
    ratings = {str(score): found[score] for score in SCORES}
    statuses = dict(sorted(Counter(row["status"] for row in rows).items()))
    kept = safety_latents(salience, {row["latent"]: row["rating"] for row in rows}, recipe)
    write_json(work.folder / "safety.json", kept | {"ratings": ratings, "statuses": statuses})
    work.facts |= {"usage": llm.usage.summary(), "statuses": statuses, "ratings": ratings}
    work.facts |= {"n_positive": len(kept["positive"]), "n_negative": len(kept["negative"])}


def safety_latents(salience: list[Row], ratings: Mapping[int, int | None], recipe: RewardRecipe) -> Row:
    """S⁺ and S⁻, each in the order of |s|, and what they were chosen by. ratings: {latent: rating or None}."""
    keep, most = recipe.rate.keep, recipe.rate.max_latents
    able = [row for row in salience if (ratings.get(row["latent"]) or 0) >= keep and row["salience"] != 0]
    chosen = sorted(able, key=lambda row: (-abs(row["salience"]), row["latent"]))[:most]
    return {
        "positive": [row["latent"] for row in chosen if row["salience"] > 0],
        "negative": [row["latent"] for row in chosen if row["salience"] < 0],
        "keep": keep,
        "max_latents": most,
    }


# --- what is asked ------------------------------------------------------------------------------------------------


def contexts_of_rated(salience: list[Row], contexts: list[Row]) -> list[Row]:
    """The contexts of the latents that are rated, in the order in which these stand in the salience table."""
    place = {row["latent"]: i for i, row in enumerate(salience) if row["rated"]}
    return sorted((row for row in contexts if row["latent"] in place), key=lambda row: place[row["latent"]])


def rate_requests(recipe: RewardRecipe, contexts: list[Row]) -> dict[int, Request]:
    """What the stage asks about these contexts, one request per latent: {latent: request}."""
    of_latent: dict[int, list[Row]] = defaultdict(list)
    for row in contexts:
        of_latent[row["latent"]].append(row)
    ask = _chat_request if recipe.rate.backend == "endpoint" else _encoder_request
    ranked = {latent: sorted(rows, key=lambda row: row["rank"]) for latent, rows in of_latent.items()}
    return {latent: ask(recipe, rows) for latent, rows in ranked.items()}


def expected_completion(request: Request, recipe: RewardRecipe) -> int:
    """A guess of how many tokens the answer to a request has, for the estimate of a dry run."""
    return min(_ANSWER_TOKENS if recipe.rate.backend == "endpoint" else 0, request.max_tokens)


_ANSWER_TOKENS = 60
_ANSWER_SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"score": {"type": "integer", "enum": list(SCORES)}, "explanation": {"type": "string"}},
    "required": ["score", "explanation"],
    "additionalProperties": False,
}


def _chat_request(recipe: RewardRecipe, contexts: list[Row]) -> Request:
    """The template's first paragraph is the system message. What was read stands in the last block and nowhere else."""
    system, _, user = prompt("rate_latent").partition("\n\n")
    return Request(
        messages=(Message("system", system), Message("user", user.format(places="\n".join(map(_place, contexts))))),
        max_tokens=recipe.rate.max_tokens,
        temperature=recipe.rate.temperature,
        schema=_ANSWER_SCHEMA,
    )


def _place(row: Row) -> str:
    token = _visible(row["token"])
    column = token.replace("|", "¦").strip()
    return f"{column} | {row['activation']:.2f} | {inert(row['before'])}⟦{token}⟧{inert(row['after'])}"


def _visible(token: str) -> str:
    """A token in one line: a line break, which ends a segment as a full stop does, is shown as a sign."""
    return inert(token.replace("\r\n", "↵").replace("\n", "↵"))


def _encoder_request(recipe: RewardRecipe, contexts: list[Row]) -> Request:
    """What had been said at each of the latent's places, one a line.

    An encoder gives a text one vector, so it is shown the turn in which the place stands and not what came before; what
    comes after cannot have moved the latent.
    """
    said = [row["before"][len(row["before"]) - row["n_own"] :] + row["token"] for row in contexts]
    read = [" ".join(inert(text).split()) for text in said]
    return Request(messages=(Message("user", "\n".join(read)),), max_tokens=recipe.rate.max_tokens)


# --- what was said ------------------------------------------------------------------------------------------------


def rating_of(reply: Reply) -> Rating:
    """The rating in a reply: of a structured answer, or of prose that says `Score: 4`."""
    if isinstance(reply.value, dict):
        return _of_json(reply.value)
    if reply.status == "ok":
        return _of_prose(reply.value, "")
    if reply.status == "unparsed":  # as JSON; a server without structured answers gives prose
        return _of_prose(reply.raw, reply.detail)
    return Rating(None, "", reply.status, _short(reply.detail))


def _of_json(value: Row) -> Rating:
    explanation = _short(value["explanation"])
    if is_refusal(explanation):
        return Rating(None, "", "refused", explanation)
    return Rating(value["score"], explanation, "ok")


def _of_prose(text: str, detail: str) -> Rating:
    """detail: why the text is no structured answer; empty where none was asked for."""
    status, answer, why = judge(text, None)
    if status != "ok":
        return Rating(None, "", status, _short(why))
    bare = _MARKUP.sub("", answer)
    said = list(_SAID.finditer(bare))
    numbers = [_GIVEN.match(bare, match.end()) for match in said]
    given = {number.group(1) for number in numbers if number}
    if "{" in bare or None in numbers or len(given) != 1:  # a part of a broken JSON value is not the answer
        return Rating(None, "", "unparsed", _short(detail or "the answer gives no one score from 1 to 5"))
    end = max(number.end() for number in numbers if number)
    _, label, explained = bare.partition("Explanation:")
    return Rating(int(given.pop()), _short(explained if label else bare[end:].lstrip(" .\n")), "ok")


_MARKUP = re.compile(r"[*_`\"\[\]()]")
_SAID = re.compile(r"\bscore\s*[:=]", re.IGNORECASE)
# a digit that is the whole number: not of 4.5, 45, 4/10, 4-5 or "4 or 5"; 4/5 says out of how many
_GIVEN = re.compile(r"\s*([1-5])(?:\s*(?:/|out of)\s*5)?(?!\s*(?:[/.,–-]|or|to|and|out of)?\s*\d)(?!\w)")


def _short(text: str) -> str:
    return plain(text)[:LONGEST]


def _row(latent: int, reply: Reply, rater: str, template: str | None) -> Row:
    return {
        "latent": latent,
        **rating_of(reply)._asdict(),
        "rater": rater,
        "prompt_hash": template,
        "prompt_tokens": reply.prompt_tokens,
        "completion_tokens": reply.completion_tokens,
        "cost_usd": reply.cost_usd,
    }
