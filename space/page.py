"""What the page and the API do over one inspector: checked settings in, plain values out.

The page keeps nothing of any visitor: what one looks at is in that visitor's `gr.State`.
"""

try:
    import spaces  # pyright: ignore[reportMissingImports]  # only on ZeroGPU hardware, and before CUDA is used

    on_gpu = spaces.GPU
except ImportError:

    def on_gpu(function):
        """The function itself: there is no ZeroGPU here."""
        return function


from collections.abc import Iterator
from contextlib import contextmanager
from html import escape
from typing import Any, NamedTuple

import gradio as gr
import view

from safesail.diagnosis.inspector import Inspection, Inspector
from safesail.errors import InputError

__all__ = ["MAX_NEW_TOKENS", "Page", "Seen"]

MAX_NEW_TOKENS = 256


class Seen(NamedTuple):
    """What one visitor looks at: an inspection and the selected token."""

    inspection: Inspection
    index: int


class Page:
    """What the page and the API do, over one inspector. It keeps nothing of any visitor."""

    def __init__(self, inspector: Inspector) -> None:
        self.inspector, self.database = inspector, inspector.database
        self._answer = on_gpu(inspector.answer)

    def run(
        self,
        prompt: str | None,
        mode: str,
        system: str | None,
        max_new_tokens: int,
        temperature: float,
        seed: int,
        domains: list[str],
        above: float,
        explained_only: bool,
    ) -> Iterator[tuple[Any, ...]]:
        """Stream the answer, then show every token and select the strongest one."""
        skip = gr.skip()
        yield "", view.waiting("Reading the prompt…"), "", [], None, skip
        try:
            for text, inspection in self._answers(prompt or "", mode, max_new_tokens, temperature, seed, system or ""):
                if inspection is None:
                    yield text, view.waiting("Writing the answer…"), skip, skip, skip, skip
                    continue
                index = view.strongest(inspection, inspection.strengths(domains, above=above or None))
                shown = self.show(Seen(inspection, index), domains, above, explained_only)
                yield text, *shown, gr.Column(visible=True)
        except InputError as error:
            gr.Warning(_sentence(error))
            yield "", view.waiting(_sentence(error, escaped=False)), "", [], None, gr.Column(visible=False)

    def stop(self, seen: Seen | None) -> tuple[Any, Any]:
        """Say that the answer was stopped, unless it was finished before."""
        if seen is not None:
            return gr.skip(), gr.skip()
        sentence = "Stopped. Tokens are shown of finished answers; fewer new tokens make a shorter one."
        return view.waiting(sentence), gr.Column(visible=False)

    def show(self, seen: Seen | None, domains: list[str], above: float, explained_only: bool) -> tuple[Any, ...]:
        """The strip, the headline and the table of what a visitor looks at; `above` 0 colours by every neuron."""
        if seen is None:
            return gr.skip(), gr.skip(), gr.skip(), gr.skip()
        strengths = seen.inspection.strengths(domains, above=above or None)
        return view.strip(seen.inspection, strengths, seen.index), *self._details(seen, strengths, explained_only), seen

    def select(
        self, seen: Seen | None, domains: list[str], above: float, explained_only: bool, event: gr.SelectData
    ) -> tuple[Any, ...]:
        """The headline and the table of the token that was clicked."""
        if seen is None or not 0 <= int(event.index) < len(seen.inspection.units):
            gr.Warning("These tokens are no longer kept here; run the prompt again.")
            return gr.skip(), gr.skip(), gr.skip()
        seen = Seen(seen.inspection, int(event.index))
        strengths = seen.inspection.strengths(domains, above=above or None)
        return *self._details(seen, strengths, explained_only), seen

    def find(self, text: str, domain: str, hook_point: str, min_score: float) -> tuple[str, list[view.Row]]:
        """The search tab's count and table; a minimum score of 0 asks for every neuron."""
        rows = self.search(text, domain, hook_point, min_score or None)
        return view.count_line(len(rows)), view.found_rows(rows)

    def inspect(
        self,
        prompt: str,
        mode: str = "chat",
        max_new_tokens: int = 48,
        temperature: float = 0.0,
        seed: int = 0,
        system: str = "",
    ) -> dict[str, Any]:
        """Which neurons fire on each token of a prompt and of the model's answer.

        Args:
            prompt: A question (mode `chat`) or any text (mode `raw`, which is continued as it is).
            mode: `chat` puts the prompt into the model's chat template; `raw` takes it as it is.
            max_new_tokens: 0 to 256; 0 inspects the prompt only.
            temperature: 0 to 2; 0 takes the likeliest token every time.
            seed: Of the sampling, for a temperature above 0.
            system: A system prompt for mode `chat`; empty for the template's own.

        Returns:
            `ids`, `n_prompt`, `answer`, and `tokens`: per token its `text`, place and strongest explained `neurons`.
        """
        with _api_errors():
            for answer in self._answers(prompt, mode, max_new_tokens, temperature, seed, system):
                inspection = answer.inspection
        return {**inspection.to_json(), "answer": inspection.answer}

    def neuron(self, id: str) -> dict[str, Any]:
        """All that is known of one neuron.

        Args:
            id: A neuron id, as `layers.9.mlp/1234` (or `9_1234` where that names one hook point only).

        Returns:
            Its row (`explanation`, `domains`, `score`, …), its `scores` by every method, and its `quantiles`.
        """
        with _api_errors():
            row = self.database[str(id)]
        name = row["neuron_id"]
        return {**row, "scores": self.database.scores.get(name, []), "quantiles": self.database.quantiles.get(name)}

    def search(
        self, text: str = "", domain: str = "", hook_point: str = "", min_score: float | None = None
    ) -> list[dict[str, Any]]:
        """The neurons whose explanation, concept or id holds every word of a text, best score first.

        Args:
            text: Words, in any order; empty for all neurons.
            domain: Only neurons of this domain; empty for all.
            hook_point: Only neurons of this hook point; empty for all.
            min_score: Only neurons with at least this score; null for all, those without a score included.
        """
        with _api_errors():
            least = None if min_score is None else _within("min_score", min_score, -1, 1)
        return self.database.search(
            str(text or ""), domain=domain or None, hook_point=hook_point or None, min_score=least
        )

    def _answers(self, prompt: str, mode: str, max_new_tokens: Any, temperature: Any, seed: Any, system: str) -> Any:
        """Stream the answer to checked settings; InputError says which of them is wrong."""
        if mode not in ("chat", "raw"):
            raise InputError(f"the mode is {mode!r}; use chat or raw.")
        if not (isinstance(prompt, str) and isinstance(system, str)):
            raise InputError("the prompt and the system prompt must be texts.")
        longest = 20 * self.inspector.max_tokens
        if len(prompt) + len(system) > longest:
            raise InputError(f"the prompt has {len(prompt) + len(system):,} characters; the limit is {longest:,}.")
        messages = [{"role": "system", "content": system}] if system.strip() else []
        return self._answer(
            prompt if mode == "raw" else [*messages, {"role": "user", "content": prompt}],
            max_new_tokens=int(_within("max_new_tokens", max_new_tokens, 0, MAX_NEW_TOKENS)),
            temperature=_within("temperature", temperature, 0, 2),
            seed=int(_within("seed", seed or 0, 0, 2**32 - 1)),
        )

    def _details(self, seen: Seen, strengths: list[float], explained_only: bool) -> tuple[str, list[view.Row]]:
        hits = seen.inspection.hits(seen.index, explained_only=explained_only)
        return view.headline(seen.inspection, seen.index, hits, strengths[seen.index]), view.hit_rows(hits)


@contextmanager
def _api_errors() -> Iterator[None]:
    """A person's mistake reaches the API's caller as its sentence, without a traceback in the log."""
    try:
        yield
    except InputError as error:
        raise gr.Error(str(error), print_exception=False) from error


def _within(name: str, value: Any, low: float, high: float) -> float:
    """The number, or InputError when it is none or out of range."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise InputError(f"{name} is {value!r}; give a number from {low:g} to {high:g}.")
    return value


def _sentence(error: InputError, *, escaped: bool = True) -> str:
    """The error's sentence with a capital letter; escaped for gradio's messages, which are HTML."""
    text = str(error)[:1].upper() + str(error)[1:]
    return escape(text, quote=False) if escaped else text
