"""Tokens as the bytes they stand for, and as text a person can read: multi-byte characters stay whole."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from safesail.recipe import TokenPolicy

__all__ = ["Span", "counted", "spans", "special_ids", "token_bytes"]


class Span(NamedTuple):
    """Consecutive tokens shown as one unit: usually one token, several where a character is split over tokens."""

    text: str
    start: int
    end: int
    special: bool


def special_ids(tokenizer: Any) -> list[int]:
    """The ids of all special tokens, including added ones marked special."""
    added = (id for id, token in tokenizer.added_tokens_decoder.items() if token.special)
    return sorted({*tokenizer.all_special_ids, *added})


def counted(policy: TokenPolicy, ids: Tensor, norms: Tensor, specials: list[int], median_norm: float | None) -> Tensor:
    """Which tokens count under a policy. ids, norms: (n_tokens,) → bool (n_tokens,)."""
    keep = torch.ones(ids.shape, dtype=torch.bool, device=ids.device)
    if policy.exclude_special and specials:
        keep &= ~torch.isin(ids, torch.tensor(specials, device=ids.device, dtype=ids.dtype))
    if policy.sink_norm_multiple is not None and median_norm:
        keep &= norms <= policy.sink_norm_multiple * median_norm
    return keep


def token_bytes(tokenizer: Any, ids: list[int]) -> list[bytes]:
    """The exact bytes of each token: byte-level BPE and byte-fallback vocabularies are undone, not decoded."""
    specials = set(tokenizer.added_tokens_decoder)
    tokens = tokenizer.convert_ids_to_tokens(ids)
    if _is_byte_level(tokenizer):
        table = _byte_of_character()
        return [
            token.encode() if id in specials else bytes(b for char in token for b in _char_bytes(char, table))
            for id, token in zip(ids, tokens, strict=True)
        ]
    return [token.encode() if id in specials else _sentencepiece(token) for id, token in zip(ids, tokens, strict=True)]


def spans(tokenizer: Any, ids: list[int]) -> list[Span]:
    """The tokens as readable units whose texts join to the exact text; invalid bytes show as the replacement sign."""
    pieces, specials = token_bytes(tokenizer, ids), set(special_ids(tokenizer))
    units, start = [], 0
    while start < len(ids):
        end, text = _whole(pieces, start)
        units.append(Span(text, start, end, ids[start] in specials))
        start = end
    return units


def _whole(pieces: list[bytes], start: int, longest: int = 6) -> tuple[int, str]:
    """The shortest run of tokens from `start` that is valid UTF-8, or the single token with replacement signs."""
    for end in range(start + 1, min(start + longest, len(pieces)) + 1):
        try:
            return end, b"".join(pieces[start:end]).decode()
        except UnicodeDecodeError:
            continue
    return start + 1, pieces[start].decode(errors="replace")


def _is_byte_level(tokenizer: Any) -> bool:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    return backend is not None and "ByteLevel" in repr(backend.decoder) + repr(backend.pre_tokenizer)


def _byte_of_character() -> dict[str, int]:
    """The inverse of the GPT-2 table that gives every byte a printable character."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    table = {chr(b): b for b in printable}
    table.update({chr(256 + i): b for i, b in enumerate(others)})
    return table


def _char_bytes(char: str, table: dict[str, int]) -> bytes:
    return bytes([table[char]]) if char in table else char.encode()


def _sentencepiece(token: str) -> bytes:
    if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
        return bytes([int(token[3:5], 16)])
    return token.replace("▁", " ").encode()
