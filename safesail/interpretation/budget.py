"""What a command may spend on language models, kept by reserving a call's worst case before the call is sent.

The worst case of a call: no tokenizer makes more tokens of a text than the text has bytes, a chat template adds a few
dozen, and an answer has at most `max_tokens`. A call is sent when what is spent, what is reserved for the calls in
flight and its own worst case stay within the cap together. When its answer comes, what it used takes the place of what
was reserved, so near the cap calls wait for each other instead of stopping.

What this does not do: know what a provider bills for answers that never arrived (time-outs).
"""

import json
import math
from collections.abc import Sequence
from typing import NamedTuple, Self

from safesail.errors import InputError
from safesail.interpretation.exchange import Prices, Reply, Request

__all__ = ["Budget", "BudgetReached", "Charge", "Gate", "worst_case"]

_TEMPLATE_TOKENS, _TURN_TOKENS = 64, 8


class BudgetReached(InputError):
    """The next call might pass the command's cap, so it was not sent; the answers so far are kept."""


class Charge(NamedTuple):
    """What a call has cost or may cost."""

    tokens: int
    usd: float


Call = tuple["Gate", int]
"""The gate that let it through, and the place of its request."""


class Budget:
    """The caps of one command, and what it has spent; None: no cap. All of the command's `Llm`s share one.

    Tokens are prompt and completion tokens together. A model in this process that is given a budget uses up its tokens
    too, at 0 USD.
    """

    def __init__(self, usd: float | None = None, tokens: int | None = None):
        for name, cap in (("usd", usd), ("tokens", tokens)):
            if cap is not None and not cap >= 0:
                raise InputError(f"the budget is {cap} {name}; give 0 or more, or none for no limit")
        self.usd = usd
        self.tokens = tokens
        self.spent = Charge(0, 0.0)
        self._reserved: dict[Call, Charge] = {}

    def reserve(self, charges: dict[Call, Charge]) -> bool:
        """Whether these calls still fit under the caps; if so their charges are set aside until they are settled."""
        held = [self.spent, *self._reserved.values(), *charges.values()]
        tokens, usd = sum(each.tokens for each in held), math.fsum(each.usd for each in held)
        if (self.tokens is not None and tokens > self.tokens) or (self.usd is not None and usd > self.usd):
            return False
        self._reserved |= charges
        return True

    def settle(self, call: Call, charge: Charge | None) -> None:
        """What was set aside for the call is free again, and `charge` is spent; None: what was set aside is spent."""
        reserved = self._reserved.pop(call)
        charge = reserved if charge is None else charge
        self.spent = Charge(self.spent.tokens + charge.tokens, self.spent.usd + charge.usd)

    def forget(self, gate: "Gate") -> None:
        """Frees what is set aside for a gate's calls that will not be settled any more."""
        self._reserved = {call: charge for call, charge in self._reserved.items() if call[0] is not gate}


class Gate:
    """Lets the requests of one `ask` through as far as the budget goes; entered before the first is sent.

    Entering raises InputError when a cap in USD cannot be kept because no price is known, leaving raises BudgetReached
    when a request was turned down and never sent. n_kept: how many answers to the same `ask` were kept already.
    """

    def __init__(self, budget: Budget, prices: Prices, requests: Sequence[Request], n_kept: int = 0):
        self._budget = budget
        self._prices = prices
        self._requests = requests
        self._unsent = set(range(len(requests)))
        self._failed: set[int] = set()
        self._n_kept = n_kept
        self._turned_down = False
        self._surplus = 0
        """The most prompt tokens beyond our count that an answer was billed: servers may put a prompt before ours."""

    def __enter__(self) -> Self:
        if self._budget.usd is not None and not self._prices.known:
            raise InputError(
                f"a budget of {self._budget.usd:g} USD was set, but what the model costs is not known; set "
                "usd_per_million_prompt_tokens and usd_per_million_completion_tokens in the recipe's section "
                "([explain] or [score]), or limit the tokens by --budget-tokens"
            )
        return self

    def __exit__(self, error_type: type[BaseException] | None, *_: object) -> None:
        self._budget.forget(self)
        if error_type is None and self._unsent and self._turned_down:
            raise self._reached()

    def admit(self, places: list[int]) -> bool:
        """Whether these requests may all be sent now; reserves their worst case."""
        admitted = self._budget.reserve({(self, place): self._worst(place) for place in places})
        if admitted:
            self._unsent.difference_update(places)
        else:
            self._turned_down = True
        return admitted

    def settle(self, place: int, reply: Reply) -> None:
        """Puts what the reply was billed in the place of what was reserved for it."""
        tokens = reply.prompt_tokens + reply.completion_tokens
        is_silent = tokens == 0 and reply.status != "failed"  # it does not say what it used: it may be all of it
        self._budget.settle((self, place), None if is_silent else Charge(tokens, reply.cost_usd or 0.0))
        self._surplus = max(self._surplus, reply.prompt_tokens - worst_case(self._requests[place])[0])
        if reply.status == "failed":
            self._failed.add(place)

    def _reached(self) -> BudgetReached:
        """What was spent, what is kept, and what to type for the rest."""
        caps, spent = self._budget, self._budget.spent
        missing = self._unsent | self._failed
        need = [self._worst(place) for place in missing]
        used, options = [], []
        if caps.usd is not None:
            used.append(f"{spent.usd:.4f} of {caps.usd:g} USD")
            options.append(f"--budget-usd {_in_cents(max(caps.usd, math.fsum(each.usd for each in need)))}")
        if caps.tokens is not None:
            used.append(f"{spent.tokens:,} of {caps.tokens:,} tokens")
            options.append(f"--budget-tokens {max(caps.tokens, sum(each.tokens for each in need))}")
        n_all = self._n_kept + len(self._requests)
        return BudgetReached(
            f"the budget is reached: {' and '.join(used)} are spent, and the next call might use more than is left; "
            f"{n_all - len(missing)} of {n_all} answers are kept. Run the same command with "
            f"`{' '.join(options)}`, which is enough for the other {len(missing)} at their longest"
        )

    def _worst(self, place: int) -> Charge:
        prompt, completion = worst_case(self._requests[place])
        prompt += self._surplus
        return Charge(prompt + completion, self._prices.cost(prompt, completion) or 0.0)


def worst_case(request: Request) -> tuple[int, int]:
    """The most prompt and completion tokens that a request may use."""
    texts = [message.content for message in request.messages]
    if request.schema is not None:  # counted by some servers, and told in words to others
        texts += ["Answer only with JSON that is valid against this JSON schema:", json.dumps(request.schema)]
    n_bytes = sum(len(text.encode()) for text in texts)
    completion = 0 if request.choices else request.max_tokens
    return n_bytes + _TURN_TOKENS * len(request.messages) + _TEMPLATE_TOKENS, completion


def _in_cents(usd: float) -> str:
    """The amount rounded up to cents."""
    return f"{math.ceil(usd * 100) / 100:.2f}"
