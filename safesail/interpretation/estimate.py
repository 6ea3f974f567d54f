"""What a stage's requests will take, before any is sent: calls, tokens, cost.

Tokens are counted in the requests' texts and guessed for the answers. Where answers to some of the requests are kept
already, what they really used corrects both by the ratio of sums, so a small pilot tells how the server's tokenizer and
chat template count and how long the model's answers are.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from safesail.interpretation.cache import AnswerCache
from safesail.interpretation.exchange import Reply, Request
from safesail.interpretation.llm import Llm

__all__ = ["Estimate", "estimate", "estimate_lines"]


class Estimate(NamedTuple):
    """What a stage's requests would take now."""

    n_requests: int
    """Distinct ones."""
    n_cached: int
    """Answered already: free."""
    n_calls: int
    """To be sent; the tokens and the cost are theirs."""
    prompt_tokens: int
    completion_tokens: int
    cost_usd: float | None
    """None when no price is known."""
    calibrated_on: int
    """Kept answers whose use corrected the count."""


class _Tokens(NamedTuple):
    prompt: int
    completion: int


def estimate(
    llm: Llm, requests: Sequence[Request], count: Callable[[str], int], completion: Callable[[Request], int]
) -> Estimate:
    """The estimate for `llm.ask(requests)`; sends nothing and makes no file.

    count: the tokens of a text; completion: the tokens expected of an answer, of which `max_tokens` are the most.
    """
    places = llm.places(requests)
    kept = _kept(llm.cache, list(places))
    guesses = {key: _guess(requests[places[key][0]], count, completion) for key in places}
    known = [(guesses[key], _Tokens(reply.prompt_tokens, reply.completion_tokens)) for key, reply in kept.items()]
    known = [(guess, used) for guess, used in known if used.prompt > 0]  # others do not say what they used
    missing = [guess for key, guess in guesses.items() if key not in kept]
    prompt_tokens = _corrected([guess.prompt for guess in missing], [(g.prompt, used.prompt) for g, used in known])
    completion_tokens = _corrected(
        [guess.completion for guess in missing], [(g.completion, used.completion) for g, used in known]
    )
    cost = llm.backend.prices.cost(prompt_tokens, completion_tokens) if missing else 0.0
    return Estimate(len(places), len(kept), len(missing), prompt_tokens, completion_tokens, cost, len(known))


def estimate_lines(stage: str, estimate: Estimate) -> list[str]:
    """The estimate in words, for the terminal."""
    n_tokens = f"{estimate.prompt_tokens:,} prompt and {estimate.completion_tokens:,} completion tokens"
    line = f"{stage:8} {estimate.n_calls:,} calls to a language model, about {n_tokens}"
    if estimate.cost_usd is not None:
        line += f", about {estimate.cost_usd:.4f} USD" if estimate.cost_usd else ", free of charge"
    lines = [f"{line} ({estimate.n_cached:,} of {estimate.n_requests:,} answers are kept already)"]
    if estimate.cost_usd is None:
        keys = f"{stage}.usd_per_million_prompt_tokens and {stage}.usd_per_million_completion_tokens"
        lines.append(f"{'':8} the cost is not known: no price is set; set {keys} in the recipe")
    if estimate.n_calls:
        lines.append(f"{'':8} {_basis(estimate.calibrated_on)}")
    return lines


def _basis(n: int) -> str:
    if n == 0:
        return "counted by the tokenizer, answers at their expected length; no kept answer to correct it by"
    return f"corrected by what {n:,} kept answers used"


def _kept(path: Path | None, keys: list[str]) -> dict[str, Reply]:
    if path is None or not path.exists():
        return {}
    with AnswerCache(path) as cache:
        answers = {key: cache.get(key) for key in keys}
    return {key: Reply(**answer) for key, answer in answers.items() if answer is not None}


def _guess(request: Request, count: Callable[[str], int], completion: Callable[[Request], int]) -> _Tokens:
    prompt = sum(count(message.content) for message in request.messages)
    return _Tokens(prompt, 0 if request.choices else min(completion(request), request.max_tokens))


def _corrected(guesses: list[int], known: list[tuple[int, int]]) -> int:
    """The sum of the guesses, times what was used for what was guessed where both are known."""
    guessed, used = sum(guess for guess, _ in known), sum(used for _, used in known)
    return round(sum(guesses) * used / guessed) if guessed else sum(guesses)
