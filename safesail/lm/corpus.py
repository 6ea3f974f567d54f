"""Texts and conversations mixed by weight into token pieces: what the model reads, document by document.

Documents, not tokens, are held out and split into the *explain* and *score* halves, by a hash of their ids, so that no
text is on two sides. The same functions turn documents into pieces for the harvest and for the stream.
"""

import hashlib
import json
import random
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from safesail.errors import InputError
from safesail.lm.load import first_line
from safesail.lm.tokens import conversation
from safesail.recipe import CorpusSection, Source
from safesail.taxonomy import Taxonomy

__all__ = ["Document", "Piece", "cut", "documents", "encoded", "gather", "is_held_out", "pack", "texts_fingerprint"]

_BUILDERS = {".json": "json", ".jsonl": "json", ".parquet": "parquet", ".csv": "csv", ".txt": "text"}
_CHUNK = 256
_SHUFFLE_BUFFER = 10_000


class Document(NamedTuple):
    """A text, or a conversation as a list of {role, content}."""

    id: str
    content: str | list[dict[str, Any]]

    @property
    def text(self) -> str:
        """The text; of a conversation its messages' contents, a line each."""
        if isinstance(self.content, str):
            return self.content
        return "\n".join(str(message.get("content") or "") for message in self.content)

    @property
    def digest(self) -> bytes:
        """What tells one content from another."""
        whole = self.content if isinstance(self.content, str) else json.dumps(self.content, sort_keys=True, default=str)
        return hashlib.blake2b(whole.encode(errors="replace"), digest_size=16).digest()


class Piece(NamedTuple):
    """At most `context` consecutive tokens of one document."""

    document: str
    source: str
    held_out: bool
    half: str
    """`explain` or `score`."""
    ids: list[int]
    roles: list[int]
    """Per token the code of its role in `tokens.ROLES`; 0 in plain text."""


def gather(
    section: CorpusSection,
    taxonomy: Taxonomy,
    tokenizer: Any,
    seed: int,
    progress: Callable[[int], Any] | None = None,
    *,
    roles: bool = True,
) -> list[Piece]:
    """The pieces of a recipe's corpus: each source fills its share of the tokens, then all are shuffled together.

    A text is taken once, by the first source that comes to it, so that sources may read the same file. `roles`: as in
    `encoded`.
    """
    total_weight = sum(source.weight for source in section.sources)
    pieces: list[Piece] = []
    taken: set[bytes] = set()
    for source in section.sources:
        quota = round(section.n_tokens * source.weight / total_weight)
        texts = documents(source, taxonomy, seed)
        chunks = encoded(texts, tokenizer, roles=roles)
        pieces += _fill(section, source, quota, chunks, taken, progress or (lambda n: None))
    random.Random(seed).shuffle(pieces)
    return pieces


def documents(source: Source, taxonomy: Taxonomy, seed: int) -> Iterator[Document]:
    """One source's documents in a seeded order, empty ones and those not `about` its domain left out."""
    about = taxonomy.about(source.about) if source.about else None
    for number, row in _rows(source, seed):
        content = _content(source, row)
        if content is None:
            continue
        document = Document("", content)
        if document.text.strip() and (about is None or about.search(document.text)):
            yield document._replace(id=str(row.get("id") or _made_id(source, number, document)))


def encoded(
    found: Iterable[Document], tokenizer: Any, *, roles: bool = True
) -> Iterator[list[tuple[Document, list[int], list[int]]]]:
    """Documents with the ids and role codes of their tokens, in chunks: texts are fastest tokenised together.

    Without `roles` (no policy asks for them) the tokens of conversations have none, as those of texts.
    """
    for chunk in _chunks(found):
        texts = [document.content for document in chunk if isinstance(document.content, str)]
        ids_of_texts = iter(tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else ())
        rows = []
        for document in chunk:
            if isinstance(document.content, str):
                ids = next(ids_of_texts)
                rows.append((document, ids, [0] * len(ids)))
            else:
                rows.append((document, *_conversation(tokenizer, document, roles)))
        yield rows


def cut(section: CorpusSection, source: Source, document: str, ids: list[int], roles: list[int]) -> list[Piece]:
    """The pieces of a document; a last piece of a single token is left out."""
    held_out = is_held_out(section, document)
    half = "explain" if _unit(document, "half") < 0.5 else "score"
    return [
        Piece(document, source.title, held_out, half, ids[at : at + section.context], roles[at : at + section.context])
        for at in range(0, len(ids) - 1, section.context)
    ]


def is_held_out(section: CorpusSection, document: str) -> bool:
    """Whether a document is kept from training: by its id alone, whatever else is read and in whatever order."""
    return _unit(document, "held out") < section.n_held_out_tokens / section.n_tokens


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
    """What tells one corpus from another: the content of local files and folders, the ids of Hub datasets."""
    local = {source.path for source in section.sources if _is_local(source.path)}
    contents = {path: files_fingerprint(_files(Path(path))) for path in local}  # several sources may read one file
    parts = [contents.get(source.path) or f"{source.path}:{source.name}" for source in section.sources]
    return hashlib.sha256("|".join(parts).encode()).hexdigest()


def _fill(
    section: CorpusSection,
    source: Source,
    quota: int,
    chunks: Iterator[list[tuple[Document, list[int], list[int]]]],
    taken: set[bytes],
    progress: Callable[[int], Any],
) -> list[Piece]:
    pieces, n_tokens = [], 0
    for chunk in chunks:
        before = n_tokens
        for document, ids, roles in chunk:
            if n_tokens >= quota:
                break
            if document.digest not in taken:
                taken.add(document.digest)
                pieces += (found := cut(section, source, document.id, ids, roles))
                n_tokens += sum(len(piece.ids) for piece in found)
        progress(min(n_tokens, quota) - before)
        if n_tokens >= quota:
            return pieces
    kept = f" about {source.about}" if source.about else ""
    raise InputError(
        f"{source.path} gives {n_tokens:,} tokens of new text{kept}, but its weight asks for {quota:,}; "
        "lower its weight or corpus.n_tokens, or add texts."
    )


def _content(source: Source, row: dict[str, Any]) -> str | list[dict[str, Any]] | None:
    """The text or conversation in a row; None when it is empty. InputError when it is neither."""
    if source.field not in row:
        raise InputError(_no_field(source, list(row)))
    value = row[source.field]
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, list) and all(isinstance(m, dict) and "role" in m and "content" in m for m in value):
        # a key that only other messages have comes as None, and templates ask whether a key is there
        return [{k: v for k, v in m.items() if v is not None or k == "content"} for m in value] or None
    raise InputError(
        f"{source.path} has neither a text nor a list of {{role, content}} in {source.field!r} "
        f"but {str(value)[:60]!r}. Set `field` to another."
    )


def _conversation(tokenizer: Any, document: Document, roles: bool) -> tuple[list[int], list[int]]:
    assert not isinstance(document.content, str)
    try:
        return conversation(tokenizer, document.content, roles=roles)
    except InputError as error:
        raise InputError(f"document {document.id}: {error}") from error


def _made_id(source: Source, number: int | None, document: Document) -> str:
    """An id for a row that has none: its number in a local file, its content on the Hub (in no fixed order)."""
    return f"{Path(source.path).stem}/{document.digest.hex() if number is None else number}"


def _unit(document: str, purpose: str) -> float:
    """A number in [0, 1) from a document's id, the same on every machine and in every order."""
    digest = hashlib.blake2b(f"{purpose}\0{document}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64


def _chunks(items: Iterable[Document]) -> Iterator[list[Document]]:
    chunk: list[Document] = []
    for item in items:
        chunk.append(item)
        if len(chunk) == _CHUNK:
            yield chunk
            chunk = []
    if chunk:
        yield chunk


def _is_local(path: str) -> bool:
    return Path(path).suffix.lower() in _BUILDERS or Path(path).exists()


def _files(path: Path) -> list[Path]:
    """The file, or the files of a folder that are not hidden."""
    if not path.is_dir():
        return [_there(path)]
    inside = sorted(file for file in path.rglob("*") if file.is_file())
    return [file for file in inside if not any(part.startswith(".") for part in file.relative_to(path).parts)]


def _there(path: Path) -> Path:
    if path.is_file():
        return path
    where = "" if path.is_absolute() else f" in {Path.cwd()}, where the paths of the recipe begin"
    raise InputError(f"there is no text file {path}{where}; `bash scripts/demo` makes the embedded ones.")


def _rows(source: Source, seed: int) -> Iterator[tuple[int | None, dict[str, Any]]]:
    """The rows of a source in a seeded order, with their numbers where they have one."""
    if not _is_local(source.path):
        for row in _hub(source).shuffle(seed=seed, buffer_size=_SHUFFLE_BUFFER):
            yield None, row
        return
    dataset = _local(source)
    order = list(range(len(dataset)))
    random.Random(seed).shuffle(order)
    for start in range(0, len(order), _CHUNK):
        batch = dataset[order[start : start + _CHUNK]]
        for j, i in enumerate(order[start : start + _CHUNK]):
            yield i, {name: values[j] for name, values in batch.items()}


def _hub(source: Source) -> Any:
    """A Hub dataset, read as it comes and never downloaded as a whole."""
    import datasets

    try:
        stream = datasets.load_dataset(source.path, source.name, split=source.split, streaming=True)
    except (OSError, ValueError) as error:
        raise InputError(
            f"the dataset {source.path} cannot be read from the Hub: {first_line(error)} "
            "Check its id, `name` and `split`, or give a local file."
        ) from error
    _check_field(source, list(stream.column_names or []))
    return stream


def _local(source: Source) -> Any:
    import datasets
    from datasets.exceptions import DatasetGenerationError

    path = Path(source.path)
    builder = _builder(path)
    where: dict[str, Any] = {"path": str(path), "name": source.name, "split": source.split}
    if builder:
        where = {"path": builder, "data_files": str(path), "split": "train"}
    datasets.disable_progress_bars()
    try:
        dataset = datasets.load_dataset(**where)
    except (DatasetGenerationError, ValueError, OSError) as error:
        raise InputError(
            f"{path} cannot be read as {builder or 'a dataset'}: {first_line(error.__cause__ or error)}"
        ) from error
    _check_field(source, dataset.column_names)
    return dataset


def _builder(path: Path) -> str | None:
    """Which reader of `datasets` takes a local file; None for a folder, which finds its own. InputError for others."""
    if path.is_dir():
        return None
    _there(path)
    builder = _BUILDERS.get(path.suffix.lower())
    if builder is None:
        raise InputError(f"{path} is none of {', '.join(_BUILDERS)}; convert it or give a Hub dataset id.")
    if path.stat().st_size == 0:
        raise InputError(f"{path} is empty.")
    return builder


def _check_field(source: Source, columns: list[str]) -> None:
    if columns and source.field not in columns:
        raise InputError(_no_field(source, columns))


def _no_field(source: Source, columns: list[str]) -> str:
    return f"{source.path} has no field {source.field!r}; it has {', '.join(columns)}. Set `field`."
