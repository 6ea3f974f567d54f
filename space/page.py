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


import time
from collections.abc import Iterator
from contextlib import contextmanager
from html import escape
from typing import Any, NamedTuple
from urllib.parse import parse_qs, unquote

import browse
import gradio as gr
import view
from card import card, examples_list
from landscape import landscape
from markup import Markup, tag

from safesail.diagnosis.inspection import Inspection, Where
from safesail.diagnosis.inspector import Inspector
from safesail.errors import InputError
from safesail.examples import Examples
from safesail.neurons import neuron_id as joined_id
from safesail.neurons import parse_neuron_id

__all__ = [
    "LISTINGS",
    "MAX_NEW_TOKENS",
    "MAX_TOKENS",
    "SESSIONS",
    "Asked",
    "Filter",
    "Page",
    "Seen",
    "as_message",
    "on_gpu",
    "sentence_of",
    "text_of",
]

MAX_NEW_TOKENS = 256
MAX_TOKENS = 2048
"""Prompt and answer together: bounds the time of one visitor's run and the memory of what is kept of it."""
SESSIONS = 128
"""Visitors whose last inspection is kept; the one idle the longest is dropped for the next."""
LISTINGS = {"colouring": "those that colour the tokens", "explained": "all explained", "all": "all that fire"}
_FIELDS = ("prompt", "mode", "system", "max_new_tokens", "temperature", "seed")


class Asked(NamedTuple):
    """A prompt and its settings, checked."""

    prompt: str
    mode: str
    system: str
    max_new_tokens: int
    temperature: float
    seed: int

    @property
    def messages(self) -> str | list[dict[str, str]]:
        """What the inspector takes: a raw text, or a conversation."""
        if self.mode == "raw":
            return self.prompt
        system = [{"role": "system", "content": self.system}] if self.system.strip() else []
        return [*system, {"role": "user", "content": self.prompt}]


class Filter(NamedTuple):
    """Which neurons a visitor wants to see, as the page's controls say it."""

    domains: list[str]
    hook_point: str
    above: float
    """0 for every score."""
    words: str
    listing: str
    """A key of LISTINGS."""
    language: str
    """Of the explanations; empty for the main one."""

    @property
    def colouring(self) -> Where:
        """The neurons that colour the tokens."""
        return Where(self.domains, self.hook_point or None, self.above or None, self.words or "")

    @property
    def listed(self) -> Where:
        """The neurons that the table lists."""
        listed = self.colouring
        return listed if self.listing == "colouring" else listed._replace(domains=None, above=None)


class Seen(NamedTuple):
    """What one visitor looks at: an inspection, what was asked for it, and the selected token."""

    inspection: Inspection
    asked: Asked
    index: int


class Page:
    """What the page and the API do, over one inspector. It keeps nothing of any visitor."""

    def __init__(self, inspector: Inspector) -> None:
        self.inspector, self.database = inspector, inspector.database
        self.examples = Examples(inspector.release)
        self.max_tokens = min(inspector.max_tokens, MAX_TOKENS)
        self._answer = on_gpu(inspector.answer)
        self._promoted = on_gpu(inspector.promoted_tokens)

    # --- the Inspector tab ----------------------------------------------------------------------------------------

    def run(self, wanted: int | None, *values: Any) -> Iterator[tuple[Any, ...]]:
        """Stream the answer, then show every token and select one: the wanted, else the strongest.

        values: those of the fields of Asked, then of Filter. Gives the answer, strip, headline, table, Seen, the
        details' and the panel's visibility, and None for `wanted`, which holds for one run only.
        """
        given, shown = values[: len(_FIELDS)], Filter(*values[len(_FIELDS) :])
        skip, closed = gr.skip(), gr.update(visible=False)
        yield "", view.waiting("Reading the prompt…"), "", "", None, skip, closed, None
        try:
            asked = self._asked(*given)
            for text, inspection in self._answers(asked):
                if inspection is None:
                    yield text, view.waiting("Writing the answer…"), skip, skip, skip, skip, skip, skip
                    continue
                strengths = inspection.strengths(shown.colouring)
                index = view.strongest(inspection, strengths)
                if wanted is not None and 0 <= wanted < len(inspection.units):
                    index = wanted
                seen = self.show(Seen(inspection, asked, index), *shown)
                yield text, *seen, gr.update(visible=True), skip, skip
        except InputError as error:
            gr.Warning(sentence_of(error))
            yield "", view.waiting(sentence_of(error, escaped=False)), "", "", None, closed, skip, skip

    def stop(self, seen: Seen | None) -> tuple[Any, Any]:
        """Say that the answer was stopped, unless it was finished before."""
        if seen is not None:
            return gr.skip(), gr.skip()
        sentence = "Stopped. Tokens are shown of finished answers; fewer new tokens make a shorter one."
        return view.waiting(sentence), gr.update(visible=False)

    def show(self, seen: Seen | None, *values: Any) -> tuple[Any, ...]:
        """The strip, the headline, the table and Seen of what a visitor looks at. values: the fields of Filter."""
        if seen is None:
            return gr.skip(), gr.skip(), gr.skip(), gr.skip()
        shown = Filter(*values)
        strengths = seen.inspection.strengths(shown.colouring)
        return view.strip(seen.inspection, strengths, seen.index), *self._details(seen, shown, strengths), seen

    def recolour(self, seen: Seen | None, *values: Any) -> Any:
        """The strip in other colours, which then asks for what it shows of its token. values: the fields of Filter."""
        if seen is None:
            return gr.skip()
        strip = view.strip(seen.inspection, seen.inspection.strengths(Filter(*values).colouring), seen.index)
        return strip | {"recoloured": time.monotonic_ns()}  # never the same twice: the page asks again each time

    def select(self, seen: Seen | None, index: int, *values: Any) -> tuple[Any, ...]:
        """The headline, the table and Seen of the token that was clicked. values: the fields of Filter."""
        if seen is None or not 0 <= index < len(seen.inspection.units):
            gr.Warning("These tokens are no longer kept here; run the prompt again.")
            return gr.skip(), gr.skip(), gr.skip()
        seen, shown = seen._replace(index=index), Filter(*values)
        return *self._details(seen, shown, seen.inspection.strengths(shown.colouring)), seen

    def _details(self, seen: Seen, shown: Filter, strengths: list[float]) -> tuple[Markup, Markup]:
        inspection, index = seen.inspection, seen.index
        hits = inspection.hits(index, shown.listed, explained_only=shown.listing != "all")
        link = view.inspection_link(seen.asked._asdict(), index)
        headline = view.headline(inspection, index, strengths[index], link)
        if inspection.note(index):
            return headline, Markup("")
        why_none = _why_none(shown, bool(inspection.hits(index)))
        return headline, view.hit_table(inspection, index, hits, shown.language, why_none)

    # --- a neuron's panel -----------------------------------------------------------------------------------------

    def open(self, id: str, language: str, seen: Seen | None, *, linked: bool) -> tuple[Any, ...]:
        """The neuron's id, its panel shown, where it fires in the conversation, its card, and no examples yet."""
        try:
            name = self._neuron(id)
            shown = self.card(name, language, linked=linked)
        except InputError as error:
            gr.Warning(sentence_of(error))
            return tuple(gr.skip() for _ in range(6))
        where = view.firings(seen.inspection, name, seen.inspection.firings(name)) if seen else Markup("")
        return name, gr.update(visible=True), where, shown, gr.update(visible=True), Markup("")

    def card(self, id: str, language: str, *, linked: bool) -> Markup:
        """The card of a neuron; InputError for what is none."""
        return card(self.database, id, language, self._promoted(id), linked=linked)

    def show_examples(self, id: str | None) -> tuple[Any, Any]:
        """The examples of the neuron that is shown, or why they cannot be; the button goes when they are there."""
        if not id:
            return gr.skip(), gr.skip()
        try:
            found = self.examples.of(id)
        except InputError as error:
            return tag("p", sentence_of(error, escaped=False), class_="note", role="status"), gr.update(visible=True)
        scale = self.database.normaliser(*parse_neuron_id(id, self.database.hook_points))
        return examples_list(found, scale), gr.update(visible=False)

    def _neuron(self, id: str) -> str:
        """The id in its long form; InputError for what is no latent of this release's SAEs."""
        return joined_id(*self.inspector.place_of(id))

    # --- the Neurons and Landscape tabs ---------------------------------------------------------------------------

    def find(
        self, text: str, domains: list[str], category: str, hook_point: str, above: float, language: str, n_shown: int
    ) -> tuple[Markup, Markup, Any]:
        """The counts, the table of the first neurons, and whether a button asks for more."""
        rows = self.database.search(
            text or "",
            domain=domains,
            category=category or None,
            hook_point=hook_point or None,
            min_score=above or None,
        )
        table = browse.found_table(self.database, rows, language, n_shown)
        counts = tag("p", browse.count_line(len(rows), n_shown), role="status")
        found = tag("div", counts, browse.facets(rows) if rows else None)
        return found, table, gr.update(visible=len(rows) > n_shown)

    def landscape(self, language: str) -> dict[str, Any]:
        """The value of the landscape's plot."""
        return landscape(self.database, language)

    # --- links ----------------------------------------------------------------------------------------------------

    def linked_prompt(self, fragment: str) -> tuple[Any, ...]:
        """What the link of an inspection asks for: the fields of Asked, and the token to select."""
        given: dict[str, Any] = {name: values[0] for name, values in parse_qs(fragment.partition("?")[2]).items()}
        with as_message(escaped=True):
            for name, kind in (("max_new_tokens", int), ("temperature", float), ("seed", int), ("token", int)):
                given[name] = _parsed(name, given.get(name, "1" if name == "token" else "0"), kind)
            asked = self._asked(*(given.get(name, "chat" if name == "mode" else "") for name in _FIELDS))
        return *asked, given["token"] - 1

    def linked_neuron(self, fragment: str) -> str:
        """The neuron that a link names."""
        with as_message(escaped=True):
            return self._neuron(unquote(fragment.removeprefix("#/neuron/")))

    # --- the API --------------------------------------------------------------------------------------------------

    def inspect(
        self,
        prompt: str,
        mode: str = "chat",
        max_new_tokens: int = 48,
        temperature: float = 0.0,
        seed: int = 0,
        system: str = "",
        language: str = "",
    ) -> dict[str, Any]:
        """Which neurons fire on each token of a prompt and of the model's answer.

        Args:
            prompt: A question (mode `chat`) or any text (mode `raw`, which is continued as it is).
            mode: `chat` puts the prompt into the model's chat template; `raw` takes it as it is.
            max_new_tokens: 0 to 256; 0 inspects the prompt only.
            temperature: 0 to 2; 0 takes the likeliest token every time.
            seed: Of the sampling, for a temperature above 0.
            system: A system prompt for mode `chat`; empty for the template's own.
            language: Of the explanations, as `en`; empty for the main one, which also stands in where there is none.

        Returns:
            `ids`, `n_prompt`, `answer`, and `tokens`: per token its `text`, place and strongest explained `neurons`.
        """
        with as_message(escaped=False):
            language = text_of("language", language)
            asked = self._asked(prompt, mode, system, max_new_tokens, temperature, seed)
            for answer in self._answers(asked):
                inspection = answer.inspection
        found = {**inspection.to_json(), "answer": inspection.answer}
        for token in found["tokens"]:
            token["neurons"] = [self._in_language(neuron, language) for neuron in token["neurons"]]
        return found

    def neuron(self, id: str, language: str = "") -> dict[str, Any]:
        """All that is known of one neuron; of one that was not explained, its statistics.

        Args:
            id: A neuron id, as `layers.9.mlp/1234` (or `9_1234` where that names one hook point only).
            language: Of the explanation, as `en`; empty for the main one.

        Returns:
            Its row (`explanation`, `domains`, `score`, …), its `explanations` by language, its `scores` by every
            method, its `quantiles` with the `histogram` of its activations, and the tokens it raises (`promoted`).
        """
        with as_message(escaped=False):
            name, language = self._neuron(text_of("id", id)), text_of("language", language)
            promoted = [token._asdict() for token in self._promoted(name)]
        hook_point, latent = parse_neuron_id(name, self.database.hook_points)
        nothing = {"neuron_id": name, "hook_point": hook_point, "latent": latent, "explanation": None, "domains": []}
        return {
            **self._in_language(self.database.neurons.get(name, nothing), language),
            "explanations": self.database.explanations.get(name, {}),
            "scores": self.database.scores.get(name, []),
            "quantiles": self.database.quantiles.get(name),
            "promoted": promoted,
        }

    def search(
        self,
        text: str = "",
        domain: str = "",
        hook_point: str = "",
        min_score: float | None = None,
        language: str = "",
    ) -> list[dict[str, Any]]:
        """The neurons whose explanation, concept or id holds every word of a text, best score first.

        Args:
            text: Words, in any order and any language; empty for all neurons.
            domain: Only neurons of this domain; empty for all.
            hook_point: Only neurons of this hook point; empty for all.
            min_score: Only neurons with at least this score; null for all, those without a score included.
            language: Of the explanations given back, as `en`; empty for the main one.
        """
        with as_message(escaped=False):
            least = None if min_score is None else _within("min_score", min_score, -1, 1)
            text, domain, language = text_of("text", text), text_of("domain", domain), text_of("language", language)
        rows = self.database.search(text, domain=domain or None, hook_point=hook_point or None, min_score=least)
        return [self._in_language(row, language) for row in rows]

    def _in_language(self, row: dict[str, Any], language: str) -> dict[str, Any]:
        """A neuron with the explanation of a language, and which language it turned out to be."""
        said = self.database.said(row["neuron_id"], language)
        return {**row, "explanation": said.explanation, "language": said.language}

    # --- asking the model -----------------------------------------------------------------------------------------

    def _asked(self, prompt: Any, mode: Any, system: Any, max_new_tokens: Any, temperature: Any, seed: Any) -> Asked:
        """The settings, or InputError for the one that is wrong."""
        prompt, system = prompt or "", system or ""
        if mode not in ("chat", "raw"):
            raise InputError(f"the mode is {mode!r}; use chat or raw.")
        if not (isinstance(prompt, str) and isinstance(system, str)):
            raise InputError("the prompt and the system prompt must be texts.")
        longest = 20 * self.max_tokens
        if len(prompt) + len(system) > longest:
            raise InputError(f"the prompt has {len(prompt) + len(system):,} characters; the limit is {longest:,}.")
        return Asked(
            _well_formed(prompt),
            mode,
            _well_formed(system),
            int(_within("max_new_tokens", max_new_tokens, 0, MAX_NEW_TOKENS)),
            _within("temperature", temperature, 0, 2),
            int(_within("seed", seed or 0, 0, 2**32 - 1)),
        )

    def _answers(self, asked: Asked) -> Any:
        """Stream the answer; InputError when it would take more tokens than the page allows."""
        n = len(self.inspector.encode(asked.messages)) + asked.max_new_tokens
        if n > self.max_tokens:
            raise InputError(
                f"prompt and answer take {n:,} tokens, but the limit here is {self.max_tokens:,}; shorten them."
            )
        return self._answer(
            asked.messages, max_new_tokens=asked.max_new_tokens, temperature=asked.temperature, seed=asked.seed
        )


def _why_none(shown: Filter, others: bool) -> str:
    """Why the table of a token is empty."""
    if not others:
        return "No neuron fires here."
    listed = {"colouring": "that colours the tokens", "explained": "with an explanation"}.get(shown.listing, "")
    narrowed = " of the words or hook point chosen" if shown.words or shown.hook_point else ""
    more = "" if shown.listing == "all" else "; list all that fire to see the others"
    return f"No neuron {listed}{narrowed} fires here{more}."


@contextmanager
def as_message(*, escaped: bool) -> Iterator[None]:
    """A person's mistake reaches them as its sentence, without a traceback in the log; escaped where it is HTML."""
    try:
        yield
    except InputError as error:
        raise gr.Error(sentence_of(error) if escaped else str(error), print_exception=False) from error


def _within(name: str, value: Any, low: float, high: float) -> float:
    """The number, or InputError when it is none or out of range."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise InputError(f"{name} is {value!r}; give a number from {low:g} to {high:g}.")
    return value


def text_of(name: str, value: Any) -> str:
    """The text, an empty one for null, or InputError for anything else."""
    if not isinstance(value, str | None):
        raise InputError(f"{name} is {value!r}; give a text.")
    return value or ""


def _parsed(name: str, text: str, kind: type) -> Any:
    try:
        return kind(text)
    except ValueError:
        raise InputError(f"{name} is {text!r} in this link; it should be a number.") from None


def _well_formed(text: str) -> str:
    """The text with lone surrogates replaced, which neither a tokenizer nor a browser takes back."""
    return text.encode("utf-8", errors="replace").decode()


def sentence_of(error: InputError, *, escaped: bool = True) -> str:
    """The error's sentence with a capital letter, unless it begins with a name; escaped where it is HTML."""
    text = str(error)
    if text.partition(" ")[0].isalpha():
        text = text[:1].upper() + text[1:]
    return escape(text, quote=False) if escaped else text
