"""The risks of many texts, as a table: a row is what one neuron adds to one text's risk in one domain."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa

from safesail.diagnosis.domain_neurons import Given, inspected, monitored_domains
from safesail.diagnosis.inspector import Inspector
from safesail.diagnosis.labelled import labelled_texts
from safesail.diagnosis.monitor import Monitor, Risk
from safesail.diagnosis.results import Result
from safesail.errors import InputError

__all__ = ["MONITOR", "find_monitors", "fit_monitors", "load_monitors", "monitor_texts"]

MONITOR = pa.schema(
    [
        ("text", pa.string()),
        ("domain", pa.string()),
        ("probability", pa.float64()),
        ("above", pa.bool_()),
        ("neuron_id", pa.string()),
        ("token", pa.string()),
        ("index", pa.int32()),
        ("activation", pa.float64()),
        ("coefficient", pa.float64()),
        ("contribution", pa.float64()),
        ("number", pa.int32()),
        ("intercept", pa.float64()),
    ]
)
"""A row is a neuron's contribution to a text's risk, or a text on which none fired (then the neuron's are null)."""


def monitor_texts(
    inspector: Inspector,
    texts: Sequence[str],
    monitors: str | Path | dict[str, Monitor] = "shipped",
    *,
    domains: Sequence[str] | None = None,
    threshold: float = 0.5,
) -> Result:
    """The risk of each text in each domain, as a `monitor` result.

    monitors: a folder of saved ones, a .jsonl file of labelled texts (or `shipped`) to calibrate on, or themselves. A
    risk is above when its probability is at least the threshold.
    """
    if not 0 < threshold < 1:
        raise InputError(f"a threshold of {threshold} is no probability; give one between 0 and 1, as 0.5.")
    used = monitors if isinstance(monitors, dict) else find_monitors(inspector, monitors, domains)
    chosen = list(used) if domains is None else list(domains)
    if unknown := [domain for domain in chosen if domain not in used]:
        raise InputError(f"there is no monitor for {unknown[0]!r}; use one of: {', '.join(used)}.")
    rows, above = [], dict.fromkeys(chosen, 0)
    for number, inspection in enumerate(inspected(inspector, texts)):
        for domain in chosen:
            risk = used[domain].score(inspection)
            above[domain] += risk.probability >= threshold
            rows += _rows(number, texts[number], risk, threshold)
    facts = {"threshold": threshold, "n_texts": len(texts), "n_above": above, "saes": inspector.identity}
    facts |= {"neurons": _used(used, chosen)}
    source = monitors if not isinstance(monitors, dict) else _source(used, chosen)
    named = None if domains is None and source is monitors else chosen
    return Result("monitor", rows, MONITOR, _python(inspector.release, texts, source, named, threshold), facts)


def fit_monitors(
    inspector: Inspector, path: str | Path = "shipped", domains: Sequence[str] | None = None
) -> dict[str, Monitor]:
    """{domain: a monitor calibrated on the labelled texts of a file}; `shipped` are those in `hub/monitor/`.

    Without `domains`, all of the file; of the shipped ones, those that some neuron carries.
    """
    texts = labelled_texts(path)
    named = list(dict.fromkeys(text.domain for text in texts))
    if path == "shipped":
        carried = monitored_domains(inspector.database)
        named = [domain for domain in named if domain in carried]
    if domains is not None and (unknown := [domain for domain in domains if domain not in named]):
        raise InputError(f"there is nothing to calibrate a monitor for {unknown[0]!r}; use one of: {', '.join(named)}.")
    monitors = {}
    for domain in named if domains is None else domains:
        mine = [text for text in texts if text.domain == domain]
        given: list[Given] = [text.text for text in mine]
        labels, groups = [text.about for text in mine], [text.whole for text in mine]
        fitted = Monitor.fit(inspector, given, labels, domain, groups=groups)
        monitors[domain] = replace(fitted, calibrated_on=Path(path).name)
    return monitors


def find_monitors(inspector: Inspector, source: str | Path, domains: Sequence[str] | None = None) -> dict[str, Monitor]:
    """{domain: its monitor}: calibrated on `shipped` or a .jsonl file of labelled texts, else loaded from a folder."""
    if source == "shipped" or Path(source).suffix == ".jsonl":
        return fit_monitors(inspector, source, domains)
    return load_monitors(source, inspector)


def load_monitors(folder: str | Path, inspector: Inspector) -> dict[str, Monitor]:
    """{domain: its monitor} of a folder of `Monitor.save`."""
    domains = sorted(file.stem for file in Path(folder).expanduser().glob("*.json"))
    if not domains:
        raise InputError(f"{folder} holds no monitor; make one with `safesail monitor RELEASE --fit TEXTS --monitor`.")
    return {domain: Monitor.load(folder, inspector, domain) for domain in domains}


def _rows(number: int, text: str, risk: Risk, threshold: float) -> list[dict[str, Any]]:
    about: dict[str, Any] = dict.fromkeys(MONITOR.names)
    about |= {"number": number, "text": text, "domain": risk.domain, "intercept": risk.intercept}
    about |= {"probability": risk.probability, "above": risk.probability >= threshold}
    return [about | one._asdict() for one in risk.contributions] or [about]


def _used(monitors: dict[str, Monitor], domains: list[str]) -> dict[str, dict[str, Any]]:
    return {
        domain: {
            "coefficients": dict(zip(monitors[domain].neurons, monitors[domain].coefficients, strict=True)),
            "intercept": monitors[domain].intercept,
            "strength": monitors[domain].strength,
            "min_score": monitors[domain].min_score,
            "calibrated_on": monitors[domain].calibrated_on,
            "n_about": monitors[domain].n_about,
            "n_other": monitors[domain].n_other,
        }
        for domain in domains
    }


def _source(monitors: dict[str, Monitor], domains: list[str]) -> str:
    """Where monitors that were given as they are can be had again: `shipped`, or nowhere."""
    return "shipped" if all(monitors[domain].calibrated_on == "shipped" for domain in domains) else ""


def _python(
    release: str, texts: Sequence[str], source: str | Path, domains: Sequence[str] | None, threshold: float
) -> str:
    """source: what `find_monitors` takes, or an empty string for monitors that it cannot find."""
    more = "" if source == "shipped" else f", {str(source)!r}" if source else ", monitors"
    more += "" if domains is None else f", domains={list(domains)!r}"
    return (
        "from safesail import Inspector\n"
        "from safesail.diagnosis.risks import monitor_texts\n\n"
        f"inspector = Inspector.from_pretrained({str(release)!r})\n"
        + ("" if source else "monitors = ...  # {domain: Monitor}, as they were given\n")
        + f"result = monitor_texts(inspector, {list(texts)!r}{more}, threshold={threshold!r})\n"
    )
