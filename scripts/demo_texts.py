"""Reads question-answer items `{"input", "target"}`. Writes plain documents `{"id", "text"}`: what SAEs are trained on.

Every reader keeps the order of its items, so the same items always give the same ids. Markup that would own latents of
its own (`[title]`, Penn-Treebank spacing) is undone where that is a matter of one rule, and left where it is not.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping

__all__ = ["READERS", "cvalues", "detokenise", "hellaswag", "numbered", "passages", "stories", "toxicity", "wiki"]

Item = dict[str, str]
Row = Mapping[str, str | bool]

_WIKIHOW_MARK = re.compile(r"(\S?)\s*\[(?:header|title|step|substeps|body)\]\s*")
_MISSING_SPACE = re.compile(r"(?<=[a-z]{2})([.!?]+[\"”’)]?)(?=[A-Z][a-z ])")
_SPACE_BEFORE = re.compile(r" (?=[,.;:?!%)\]](?:\W|$)|'s\b|n't\b|'(?:re|ve|ll|d|m)\b)")
_LIST_TAG = re.compile(r" *</?(?:D[dlt]|Li|[OU]l|T[rdh]|Table|P)> *", re.IGNORECASE)


def numbered(name: str, rows: Iterable[Row]) -> Iterator[Row]:
    """Rows that have text get ids `name/000000`, `name/000001`, …"""
    kept = (row for row in rows if row["text"])
    for number, row in enumerate(kept):
        yield {"id": f"{name}/{number:06d}", **row}


def toxicity(items: list[Item]) -> Iterator[Row]:
    """RealToxicityPrompts: items 2i and 2i+1 are the two halves of a sentence; halves that do not pair are left out.

    A prompt never begins with a space, which tells a shifted pair. `toxic` says that either half was labelled so.
    """
    pairs = zip(items[::2], items[1::2], strict=False)
    halves = ((prompt, continuation) for prompt, continuation in pairs if not prompt["input"][:1].isspace())
    texts = {(a["input"] + b["input"]).strip(): "Yes" in (a["target"], b["target"]) for a, b in halves}
    yield from ({"text": text, "toxic": toxic} for text, toxic in texts.items())


def hellaswag(items: list[Item]) -> Iterator[Row]:
    """HellaSwag: each context with its right ending once; an item whose target is no option is left out."""
    texts: dict[str, None] = {}
    for item in items:
        context, _, options = item["input"].partition("\nA. ")
        if item["target"] in ("A. " + options).splitlines():
            texts.setdefault(_with_ending(context, item["target"][3:]))
    yield from ({"text": text} for text in texts)


def _with_ending(context: str, ending: str) -> str:
    """The last, begun sentence of the context gets its capital back, and WikiHow's marks become full stops."""
    begun = re.sub(r"(?<=[.!?:\"] )[a-z](?=[^.!?]*$)", lambda found: found[0].upper(), context.strip())
    joined = begun + ("" if ending[:1] in ",.;:?!'" else " ") + ending
    return _WIKIHOW_MARK.sub(_full_stop, joined).strip()


def _full_stop(mark: re.Match[str]) -> str:
    before = mark[1]
    return f"{before} " if before in (*'.!?:"”', "") else f"{before}. "


def passages(items: list[Item]) -> Iterator[Row]:
    """SQuAD and SquadShifts: each Background passage once, with its title."""
    found: dict[str, str] = {}
    for item in items:
        title, _, rest = item["input"].removeprefix("Title: ").partition("\nBackground: ")
        found.setdefault(rest.rpartition("\nQuestion: ")[0].strip(), title)
    yield from ({"text": _MISSING_SPACE.sub(r"\1 ", text), "title": title} for text, title in found.items())


def stories(items: list[Item]) -> Iterator[Row]:
    """CoQA: each Story once."""
    texts = (item["input"].removeprefix("Story:\n").rpartition("\nQuestion:")[0].strip() for item in items)
    yield from ({"text": re.sub(r" +\n", "\n", re.sub("``|''", '"', text))} for text in dict.fromkeys(texts))


def wiki(items: list[Item]) -> Iterator[Row]:
    """Natural Questions passages in which one entity was swapped: the target names the intruder, the other option the
    original, which is put back. An item whose intruder does not occur was not swapped and is taken as it is.
    """
    texts = (detokenise(_restored(item)) for item in items)
    yield from ({"text": text} for text in dict.fromkeys(texts))


def _restored(item: Item) -> str:
    """The item's context with the original entity."""
    head, *options = re.split(r"\n(?=[AB]\. )", item["input"])
    context = head.partition("\nContext: ")[2]
    named = {option[0]: option[3:] for option in options}
    intruder = named.pop(item["target"], "")
    original = next(iter(named.values()), "")
    return context.replace(intruder, original) if intruder and original else context


def cvalues(items: list[Item]) -> Iterator[Row]:
    """CValues: each question with each of its two answers once; an item without both is left out."""
    texts: dict[str, None] = {}
    for item in items:
        question, _, options = item["input"].partition("\n\nA. ")
        answers = options.partition("\nB.")
        if all(part.strip() for part in answers):
            texts |= dict.fromkeys(f"{question.strip()}\n{answer.strip()}" for answer in answers[::2])
    yield from ({"text": text} for text in texts)


def detokenise(text: str) -> str:
    """Penn-Treebank spacing undone: `Al 's `` thing '' , too .` is `Al's "thing", too.`; list tags are line breaks."""
    text = _LIST_TAG.sub("\n", re.sub("[\u200b\u200e\u200f\u202c\ufeff]", "", text))
    text = re.sub(r" *\n\s*| {2,}", "\n", text.strip())
    text = re.sub(r"`` *", '"', text)
    text = re.sub(r" *''", '"', text)
    text = re.sub(r"(?<=\w) - (?=\w)", "-", text)
    text = re.sub(r"(?<=\d) -- (?=\w)", "–", text)
    text = re.sub(r"(?<=[(\[]) |(?<=[$£€₹#]) (?=\d)", "", text)
    return _SPACE_BEFORE.sub("", text).replace(" -- ", " – ")


READERS: dict[str, Callable[[list[Item]], Iterator[Row]]] = {
    "toxicity": toxicity,
    "hellaswag": hellaswag,
    "passages": passages,
    "stories": stories,
    "wiki": wiki,
    "cvalues": cvalues,
}
