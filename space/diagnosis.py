"""What the pages of the diagnosis do over one inspector: checked settings in, HTML out.

They keep nothing of any visitor. The monitors, which belong to the release, are calibrated once, when they are first
asked for.
"""

import json
import threading
from collections.abc import Callable, Iterator
from typing import Any

import gradio as gr
from interventions_view import answers_html, rates_html
from knowledge_view import knowledge_html
from markup import Markup, tag
from monitor_view import risks_html
from page import Page
from results import note
from trajectories_view import graph_html, trajectories_html

from safesail.diagnosis.attribution import graph
from safesail.diagnosis.interventions import Intervention, answers_under, declining_change
from safesail.diagnosis.knowledge import Entity, knowledge
from safesail.diagnosis.monitor import Monitor
from safesail.diagnosis.risks import find_monitors, monitor_texts
from safesail.diagnosis.trajectories import trajectories
from safesail.errors import InputError

__all__ = ["MAX_AMOUNT", "MAX_ENTITIES", "MAX_NEW", "MAX_PROMPTS", "Diagnosis"]

MAX_NEW = 64
"""New tokens of one answer."""
MAX_PROMPTS, MAX_ENTITIES = 16, 60
"""What one visitor may ask for at once; the command line has no such limits."""
MAX_AMOUNT = 20.0
TOP = 12
"""Neurons kept of each concept and hook point."""


class Diagnosis:
    """Trajectories, attribution, interventions, knowledge and the monitor, over one inspector."""

    def __init__(self, page: Page) -> None:
        self.page, self.inspector = page, page.inspector
        self._monitors: dict[str, Monitor] = {}
        self._calibrating = threading.Lock()

    def trajectories(self, by: str, new_tokens: int, *versions: str) -> Markup:
        """versions: label, text, label, text, …; those without a text are left out."""

        def made() -> Markup:
            pairs = [(versions[i] or "", versions[i + 1] or "") for i in range(0, len(versions), 2)]
            given = [(label.strip(), text) for label, text in pairs if text.strip()]
            if twice := next((label for i, (label, _) in enumerate(given) if label in dict(given[:i])), None):
                raise InputError(f"two versions are called {twice!r}; give each a name of its own.")
            for _, text in given:
                self._check_length(text, new_tokens)
            return trajectories_html(
                trajectories(self.inspector, dict(given), answer=int(new_tokens), top=TOP, by=by)  # type: ignore[arg-type]
            )

        return _told(made)

    def graph(self, text: str, neuron: str) -> Markup:
        """What leads to a neuron on the token of a text where it fires most."""

        def made() -> Markup:
            self._check_length(text, 0)
            return graph_html(graph(self.inspector, text, (neuron or "").strip()))

        return _told(made)

    def answers(
        self,
        text: str,
        mode: str,
        neurons: str,
        kind: Any,
        amount: float,
        new_tokens: int,
        temperature: float,
        seed: int,
    ) -> Markup:
        """One prompt's answers without and with the interventions."""

        def made() -> Markup:
            self._check_length(text, new_tokens)
            prompt = text if mode == "raw" else [{"role": "user", "content": text}]
            changes = _interventions(neurons, kind, amount)
            result = answers_under(
                self.inspector,
                [prompt],
                changes,
                max_new_tokens=int(new_tokens),
                temperature=float(temperature),
                seed=int(seed or 0),
            )
            return answers_html(result)

        return _told(made)

    def rates(self, texts: str, neurons: str, kind: Any, amount: float, new_tokens: int) -> Markup:
        """How often the prompts, one a line, are declined without and with the interventions."""

        def made() -> Markup:
            prompts = [line.strip() for line in (texts or "").splitlines() if line.strip()]
            if len(prompts) > MAX_PROMPTS:
                raise InputError(
                    f"{len(prompts)} prompts were given; here at most {MAX_PROMPTS}, any number with `safesail steer`."
                )
            for prompt in prompts:
                self._check_length(prompt, new_tokens)
            chats: list[Any] = [[{"role": "user", "content": prompt}] for prompt in prompts]
            changes = _interventions(neurons, kind, amount)
            return rates_html(declining_change(self.inspector, chats, changes, max_new_tokens=int(new_tokens)))

        return _told(made)

    def knowledge(self, neuron: str, source: str, own: str) -> Iterator[Markup]:
        """On which names a neuron fires, and which the model knows. own: entities as JSON, one a line."""
        yield note("Asking the model about every name: a second or less for each.")

        def made() -> Markup:
            entities: Any = _entities(own) if (own or "").strip() else source
            return knowledge_html(knowledge(self.inspector, (neuron or "").strip(), entities))

        yield _told(made)

    def risks(self, text: str, threshold: float) -> Iterator[Markup]:
        """How likely a text is about each domain; the first call says that the monitors are being calibrated."""
        if not self._monitors:
            yield note("Calibrating the monitors on the shipped labelled texts: once, for all who come after.")

        def made() -> Markup:
            self._check_length(text, 0)
            result = monitor_texts(self.inspector, [text], self._calibrated(), threshold=float(threshold))
            return risks_html(result, self.page.database)

        yield _told(made)

    def _calibrated(self) -> dict[str, Monitor]:
        with self._calibrating:
            if not self._monitors:
                self._monitors = find_monitors(self.inspector, "shipped")
        return self._monitors

    def _check_length(self, text: str, new_tokens: int) -> None:
        if not (text or "").strip():
            raise InputError("there is no text; type some.")
        if len(text) > 20 * self.page.max_tokens:
            raise InputError(f"the text has {len(text):,} characters; the limit is {20 * self.page.max_tokens:,}.")
        n = len(self.inspector.encode(text)) + int(new_tokens)
        if n > self.page.max_tokens:
            raise InputError(f"the text takes {n:,} tokens; the limit here is {self.page.max_tokens:,}.")


def _interventions(neurons: str, kind: Any, amount: float) -> list[Intervention]:
    names = (neurons or "").replace(",", " ").split()
    if not names:
        raise InputError("no neuron was named; give its id, as layers.9.mlp/1234.")
    if not -MAX_AMOUNT <= float(amount) <= MAX_AMOUNT:
        raise InputError(f"the amount {amount:g} is outside -{MAX_AMOUNT:g} to {MAX_AMOUNT:g}.")
    return [Intervention(name, kind, float(amount)) for name in names]


def _entities(text: str) -> list[Entity]:
    lines = [line for line in text.splitlines() if line.strip()]
    if len(lines) > MAX_ENTITIES:
        raise InputError(f"{len(lines)} entities were given; here at most {MAX_ENTITIES}.")
    found = []
    for i, line in enumerate(lines, 1):
        try:
            found.append(Entity.model_validate(json.loads(line)))
        except ValueError as error:
            shape = '{"name": "…", "prompt": "…", "accepted": ["…"]}'
            raise InputError(f"line {i} is no entity; write it as {shape}.") from error
    return found


def _told(made: Callable[[], Markup]) -> Markup:
    """The result, or the sentence that says what was wrong."""
    try:
        return made()
    except InputError as error:
        gr.Warning(str(tag("span", str(error))))
        return note(str(error))
