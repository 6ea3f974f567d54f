"""Texts mixed by weight into token pieces: what the model reads, document by document.

Documents, not tokens, are held out and split into the *explain* and *score* halves, by a hash of their ids, so that no
text is on two sides.
"""

import hashlib
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from safesail.errors import InputError
from safesail.recipe import CorpusSection, Source
from safesail.taxonomy import Taxonomy

__all__ = ["Piece", "documents", "gather", "pack", "texts_fingerprint"]

_BUILDERS = {".json": "json", ".jsonl": "json", ".parquet": "parquet", ".csv": "csv", ".txt": "text"}
_CHUNK = 256


class Piece(NamedTuple):
    """At most `context` consecutive tokens of one document."""

    document: str
    source: str
    held_out: bool
    half: str
    """`explain` or `score`."""
    ids: list[int]


def gather(
    section: CorpusSection,
    taxonomy: Taxonomy,
    tokenizer: Any,
    seed: int,
    progress: Callable[[int], Any] | None = None,
) -> list[Piece]:
    """The pieces of a recipe's corpus: each source fills its share of the tokens, then all are shuffled together.

    A text is taken once, by the first source that comes to it, so that sources may read the same file.
    """
    total_weight = sum(source.weight for source in section.sources)
    fraction_held_out = section.n_held_out_tokens / section.n_tokens
    pieces: list[Piece] = []
    taken: set[bytes] = set()
    for source in section.sources:
        quota = round(section.n_tokens * source.weight / total_weight)
        texts = documents(source, taxonomy, seed)
        pieces += _fill(source, quota, texts, taken, section.context, fraction_held_out, tokenizer, progress)
    random.Random(seed).shuffle(pieces)
    return pieces


def documents(source: Source, taxonomy: Taxonomy, seed: int) -> Iterator[tuple[str, str]]:
    """(document id, text) of one source in a seeded order, empty texts and those not `about` its domain left out."""
    about = taxonomy.about(source.about) if source.about else None
    for i, row in _rows(source, seed):
        text = row[source.field]
        if isinstance(text, str) and text.strip() and (about is None or about.search(text)):
            yield str(row.get("id") or f"{Path(source.path).stem}/{i}"), text


def pack(lengths: list[int], window: int) -> list[list[int]]:
    """Windows of at most `window` tokens as lists of piece numbers, packed longest first within runs of 1024 pieces."""
    windows: list[list[int]] = []
    for start in range(0, len(lengths), 1024):
        order = sorted(range(start, min(start + 1024, len(lengths))), key=lambda i: (-lengths[i], i))
        open_windows: list[tuple[list[int], int]] = []
        for i in order:
            for j, (members, used) in enumerate(open_windows):
                if used + lengths[i] <= window:
                    members.append(i)
                    open_windows[j] = (members, used + lengths[i])
                    break
            else:
                open_windows.append(([i], lengths[i]))
        windows += [members for members, _ in open_windows]
    return windows


def texts_fingerprint(section: CorpusSection, files_fingerprint: Callable[[list[Path]], str]) -> str:
    """What tells one corpus from another: the content of local files, the ids of Hub datasets."""
    local = {source.path for source in section.sources if _is_local(source.path)}
    contents = {path: files_fingerprint([Path(path)]) for path in local}  # several sources may read one file
    parts = [contents.get(source.path) or f"{source.path}:{source.name}" for source in section.sources]
    return hashlib.sha256("|".join(parts).encode()).hexdigest()


def _fill(
    source: Source,
    quota: int,
    texts: Iterator[tuple[str, str]],
    taken: set[bytes],
    context: int,
    fraction_held_out: float,
    tokenizer: Any,
    progress: Callable[[int], Any] | None,
) -> list[Piece]:
    pieces, n_tokens = [], 0
    for chunk in _chunks(texts):
        encoded = tokenizer([text for _, text in chunk], add_special_tokens=False)["input_ids"]
        for (document, text), ids in zip(chunk, encoded, strict=True):
            digest = hashlib.blake2b(text.encode(errors="replace"), digest_size=16).digest()
            if digest in taken:
                continue
            taken.add(digest)
            for cut in range(0, len(ids), context):
                piece = ids[cut : cut + context]
                if len(piece) < 2:
                    continue
                held_out = _unit(document, "held out") < fraction_held_out
                half = "explain" if _unit(document, "half") < 0.5 else "score"
                pieces.append(Piece(document, source.title, held_out, half, piece))
                n_tokens += len(piece)
            if n_tokens >= quota:
                break
        if progress:
            progress(min(n_tokens, quota))
        if n_tokens >= quota:
            return pieces
    kept = f" about {source.about}" if source.about else ""
    raise InputError(
        f"{source.path} gives {n_tokens:,} tokens of new text{kept}, but its weight asks for {quota:,}; "
        "lower its weight or corpus.n_tokens, or add texts."
    )


def _unit(document: str, purpose: str) -> float:
    """A number in [0, 1) from a document's id, the same on every machine and in every order."""
    digest = hashlib.blake2b(f"{purpose}\0{document}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64


def _chunks(items: Iterator[tuple[str, str]]) -> Iterator[list[tuple[str, str]]]:
    chunk: list[tuple[str, str]] = []
    for item in items:
        chunk.append(item)
        if len(chunk) == _CHUNK:
            yield chunk
            chunk = []
    if chunk:
        yield chunk


def _is_local(path: str) -> bool:
    return Path(path).suffix.lower() in _BUILDERS or Path(path).exists()


def _rows(source: Source, seed: int) -> Iterator[tuple[int, dict[str, Any]]]:
    import datasets

    if _is_local(source.path):
        dataset = _local(source)
        order = list(range(len(dataset)))
        random.Random(seed).shuffle(order)
        for start in range(0, len(order), _CHUNK):
            batch = dataset[order[start : start + _CHUNK]]
            for j, i in enumerate(order[start : start + _CHUNK]):
                yield i, {name: values[j] for name, values in batch.items()}
        return
    stream = datasets.load_dataset(source.path, source.name, split=source.split, streaming=True)
    _check_field(source, list(stream.column_names or []))
    yield from enumerate(stream.shuffle(seed=seed, buffer_size=10_000))


def _local(source: Source) -> Any:
    import datasets
    from datasets.exceptions import DatasetGenerationError

    path = Path(source.path)
    if not path.is_file():
        raise InputError(f"there is no text file {path}; `bash scripts/demo` makes the embedded ones.")
    builder = _BUILDERS.get(path.suffix.lower())
    if builder is None:
        raise InputError(f"{path} is none of {', '.join(_BUILDERS)}; convert it or give a Hub dataset id.")
    if path.stat().st_size == 0:
        raise InputError(f"{path} is empty.")
    datasets.disable_progress_bars()
    try:
        dataset = datasets.load_dataset(builder, data_files=str(path), split="train")
    except (DatasetGenerationError, ValueError, OSError) as error:
        raise InputError(
            f"{path} cannot be read as {builder}: {str(error.__cause__ or error).splitlines()[0]}"
        ) from error
    _check_field(source, dataset.column_names)
    return dataset


def _check_field(source: Source, columns: list[str]) -> None:
    if columns and source.field not in columns:
        raise InputError(f"{source.path} has no field {source.field!r}; it has {', '.join(columns)}. Set `field`.")
