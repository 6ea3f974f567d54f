"""A language model in this process, behind the same door as an endpoint."""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from safesail.errors import InputError
from safesail.interpretation.answers import judged
from safesail.interpretation.exchange import SLOT, Admit, OnReplies, Prices, Reply, Request

__all__ = ["LocalBackend"]

Generate = Callable[[list[str], int, tuple[str, ...]], list[tuple[str, int, int]]]
Judge = Callable[[list[str], tuple[str, ...]], list[tuple[list[list[float]], int]]]


class LocalBackend:
    """Answers in this process: `generate(prompts, max_tokens, stop) -> [(text, n_prompt_tokens, n_completion_tokens)]`.

    Decoding is greedy and free of charge. An answer that runs on to max_tokens after its JSON is complete is ok: a base
    model seldom stops by itself.

    Requests with `choices` go to `judge(prompts, choices) -> [(n_slots × n_choices probabilities, n_prompt_tokens)]`.
    """

    prices = Prices(0.0, 0.0)

    def __init__(
        self,
        generate: Generate,
        name: str,
        identity: dict[str, Any],
        batch_size: int,
        judge: Judge | None = None,
    ):
        if batch_size < 1:
            raise InputError(f"the local language model's batch size is {batch_size}; give 1 or more")
        self.name = name
        self._generate = generate
        self._judge = judge
        self._identity = identity
        self._batch_size = batch_size

    def __repr__(self) -> str:
        return f"LocalBackend({self.name!r})"

    def identity(self) -> dict[str, Any]:
        """The identity that was given."""
        return {"kind": "local", **self._identity}

    def answer(self, requests: Sequence[Request], on_replies: OnReplies, admit: Admit) -> None:
        """Answers in batches of requests that can share one, in their order, as far as `admit` lets them.

        A text's last bits can depend on the batch it was generated in, so a batch's replies are kept together: work
        that was interrupted goes on with the same batches, and ends with the same bytes.
        """
        for request in requests:
            self._check(request)
        for batch in self._batches(requests):
            if not admit(batch):
                return
            these = [requests[i] for i in batch]
            replies = self._judgements(these) if these[0].choices else self._generated(these)
            on_replies(list(zip(batch, replies, strict=True)))

    def _check(self, request: Request) -> None:
        assert [message.role for message in request.messages] == ["user"], "a local model takes one user message"
        if request.temperature != 0.0:
            raise InputError(
                f"temperature {request.temperature} was asked of {self.name}, which is greedy; set it to 0"
            )
        if request.choices and self._judge is None:
            raise InputError(
                f"{self.name} was loaded without a judge and gives no probabilities of choices; "
                "give LocalBackend a judge, or ask for text"
            )

    def _generated(self, requests: list[Request]) -> list[Reply]:
        first = requests[0]
        texts = self._generate([_prompt(request) for request in requests], first.max_tokens, first.stop)
        return [
            judged(text, request.schema, prompt_tokens=n_prompt, completion_tokens=n_completion, cost_usd=0.0)
            for request, (text, n_prompt, n_completion) in zip(requests, texts, strict=True)
        ]

    def _judgements(self, requests: list[Request]) -> list[Reply]:
        assert self._judge is not None, "checked before the first batch"
        found = self._judge([_prompt(request) for request in requests], requests[0].choices)
        return [
            _judgement(request, weights, n_prompt) for request, (weights, n_prompt) in zip(requests, found, strict=True)
        ]

    def _batches(self, requests: Sequence[Request]) -> Iterator[list[int]]:
        groups: dict[Any, list[int]] = {}
        for i, request in enumerate(requests):
            groups.setdefault((request.choices, request.max_tokens, request.stop), []).append(i)
        for group in groups.values():
            for start in range(0, len(group), self._batch_size):
                yield group[start : start + self._batch_size]


def _prompt(request: Request) -> str:
    return request.messages[0].content


def _judgement(request: Request, weights: list[list[float]], n_prompt: int) -> Reply:
    """The judge's probabilities, each slot's summing to 1; unparsed when some slot's cannot."""
    n_slots = _prompt(request).count(SLOT)
    assert n_slots > 0, "a request with choices has no slot in its prompt"
    shape = [len(row) for row in weights]
    assert shape == [len(request.choices)] * n_slots, f"{n_slots} slots × {len(request.choices)} choices, not {shape}"
    sums = [math.fsum(row) for row in weights]
    used: dict[str, Any] = {"prompt_tokens": n_prompt, "completion_tokens": 0, "cost_usd": 0.0}
    if not all(math.isfinite(total) and total > 0 for total in sums):
        return Reply("unparsed", detail="the model's probabilities of the choices are not numbers", **used)
    value = [[weight / total for weight in row] for row, total in zip(weights, sums, strict=True)]
    return Reply("ok", value, **used)
