"""Tokens: which count, whose turn of a conversation they are, and the exact bytes and text they stand for."""

import bisect
import functools
import itertools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from safesail.errors import InputError
from safesail.recipe import TokenPolicy

__all__ = ["ROLES", "Span", "conversation", "counted", "role_codes", "spans", "special_ids", "token_bytes"]

ROLES = ("", "system", "user", "assistant", "tool")
"""What a token's role code stands for; "" is plain text, which belongs to nobody's turn."""


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


def counted(
    policy: TokenPolicy,
    ids: Tensor,
    norms: Tensor,
    specials: list[int],
    median_norm: float | None,
    roles: Tensor | None = None,
) -> Tensor:
    """Which tokens count under a policy. ids, norms, roles (codes into ROLES): (n_tokens,) → bool (n_tokens,).

    A token whose norm is not finite never counts: its activation could not be read. Without roles all is plain text.
    """
    keep = torch.isfinite(norms)
    if policy.exclude_special and specials:
        keep &= ~torch.isin(ids, torch.tensor(specials, device=ids.device, dtype=ids.dtype))
    if policy.sink_norm_multiple is not None and median_norm:
        keep &= norms <= policy.sink_norm_multiple * median_norm
    if policy.roles and roles is not None:
        keep &= torch.isin(roles, torch.tensor(role_codes(policy), device=roles.device, dtype=roles.dtype))
    return keep


def role_codes(policy: TokenPolicy) -> list[int]:
    """The role codes that a policy counts, that of plain text among them; InputError names the valid roles."""
    unknown = [role for role in policy.roles if role not in ROLES[1:]]
    if unknown:
        raise InputError(f"tokens.roles names {unknown[0]!r}; roles are {', '.join(ROLES[1:])}.")
    return [0, *(ROLES.index(role) for role in policy.roles)] if policy.roles else list(range(len(ROLES)))


def conversation(
    tokenizer: Any, messages: list[dict[str, Any]], *, answer: bool = False, roles: bool = True
) -> tuple[list[int], list[int]]:
    """The ids of a conversation in the chat template, and the role code of each.

    A token belongs to the message whose rendering it begins in; what the template puts before the first message by
    itself (a default system prompt) is the system's. With `answer` the template also opens the assistant's next turn.
    Without `roles` all codes are 0 and the template may rewrite earlier turns, as those of reasoning models do.
    """
    text = _rendered(tokenizer, messages, answer)
    if not roles:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        return list(ids), [0] * len(ids)
    ends, codes = _turns(tokenizer, messages, answer)
    try:
        encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    except NotImplementedError as error:
        raise InputError("the tokenizer cannot say where its tokens begin (it is not a fast one).") from error
    found = [codes[min(bisect.bisect_right(ends, start), len(codes) - 1)] for start, _ in encoded["offset_mapping"]]
    return list(encoded["input_ids"]), found


def _turns(tokenizer: Any, messages: list[dict[str, Any]], answer: bool) -> tuple[list[int], list[int]]:
    """Where each turn of the rendered conversation ends, in characters, and the role code of each turn."""
    codes = [_role_code(message) for message in messages]
    prefixes = [_rendered(tokenizer, messages[: i + 1], False) for i in range(len(messages))]
    if answer:
        prefixes.append(_rendered(tokenizer, messages, True))
        codes.append(ROLES.index("assistant"))
    for shorter, longer in itertools.pairwise(prefixes):
        if not longer.startswith(shorter):
            raise InputError(
                "the chat template changes earlier turns when a later one is added, so its tokens cannot be given to "
                "roles; leave tokens.roles empty, give the conversations as plain text, or another chat template."
            )
    preamble = _preamble(tokenizer, messages[0], prefixes[0])
    return [preamble, *map(len, prefixes)], [ROLES.index("system"), *codes]


def _role_code(message: dict[str, Any]) -> int:
    role = message.get("role")
    if not role or role not in ROLES:
        raise InputError(f"a message has the role {role!r}; roles are {', '.join(ROLES[1:])}.")
    return ROLES.index(role)


def _preamble(tokenizer: Any, first: dict[str, Any], rendered: str) -> int:
    """How many characters a template puts before the first message by itself, and not before a second one."""
    if first["role"] == "system":
        return 0
    system = {"role": "system", "content": "x"}
    try:
        before, both = _rendered(tokenizer, [system], False), _rendered(tokenizer, [system, first], False)
    except InputError:  # a template without system prompts has no default one
        return 0
    own = both.removeprefix(before)
    return len(rendered) - len(own) if both.startswith(before) and rendered.endswith(own) else 0


def _rendered(tokenizer: Any, messages: list[dict[str, Any]], answer: bool) -> str:
    from jinja2 import TemplateError

    if not getattr(tokenizer, "chat_template", None):
        raise InputError("the texts hold conversations, but the tokenizer has no chat template; give plain texts.")
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=answer)
    except (TemplateError, TypeError, ValueError) as error:
        raise InputError(f"the chat template does not take a conversation: {str(error).splitlines()[0]}.") from error


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


@functools.cache
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
