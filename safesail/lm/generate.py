"""Text from a causal LM: batches of greedy completions, and one answer streamed token by token."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from safesail.lm.tokens import conversation

__all__ = ["chat_prompt", "complete", "end_ids", "stream"]


@torch.inference_mode()
def complete(
    model: Any, tokenizer: Any, prompts: list[str], max_tokens: int, stop: tuple[str, ...] = ()
) -> list[tuple[str, int, int]]:
    """Greedy completions of a batch of prompts: (text, n_prompt_tokens, n_completion_tokens) each.

    A completion ends at the first occurrence of a stop string, which is not part of it.
    """
    encoded = [tokenizer(prompt, add_special_tokens=False)["input_ids"] for prompt in prompts]
    n_shared = _shared_prefix(encoded)
    ids, mask = _left_padded([row[n_shared:] for row in encoded], tokenizer.pad_token_id or 0, model.device)
    mask = torch.cat([mask.new_ones(len(prompts), n_shared), mask], dim=1)
    cache = _prefix_cache(model, encoded[0][:n_shared], len(prompts))
    kept: list[list[int]] = [[] for _ in prompts]
    running = [True] * len(prompts)
    ends = end_ids(model, tokenizer)
    step_ids, step_positions = ids, (mask.cumsum(1) - 1)[:, n_shared:].clamp(min=0)
    for _ in range(max_tokens):
        output = model(
            input_ids=step_ids,
            attention_mask=mask,
            position_ids=step_positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        cache, best = output.past_key_values, output.logits[:, -1].argmax(-1)
        for i, token in enumerate(best.tolist()):
            if running[i] and token in ends:
                running[i] = False
            elif running[i]:
                kept[i].append(token)
                running[i] = not any(mark in tokenizer.decode(kept[i]) for mark in stop)
        if not any(running):
            break
        step_ids = best[:, None]
        mask = torch.cat([mask, mask.new_ones(len(prompts), 1)], dim=1)
        step_positions = step_positions[:, -1:] + 1
    return [
        (_before(tokenizer.decode(tokens), stop), len(prompt), len(tokens))
        for tokens, prompt in zip(kept, encoded, strict=True)
    ]


@torch.inference_mode()
def stream(
    model: Any,
    ids: list[int],
    max_tokens: int,
    ends: set[int],
    *,
    temperature: float = 0.0,
    seed: int = 0,
    watch: Callable[[Tensor], None] | None = None,
) -> Iterator[int]:
    """The ids of an answer one by one, greedy at temperature 0, else sampled from a seeded generator.

    `watch` is shown the logits from which each id is chosen, (vocabulary,), before it is.
    """
    generator = torch.Generator(device=model.device).manual_seed(seed)
    step, cache = torch.tensor([ids], device=model.device), None
    for _ in range(max_tokens):
        output = model(input_ids=step, past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache, logits = output.past_key_values, output.logits[0, -1]
        if watch:
            watch(logits)
        token = _choose(logits, temperature, generator)
        yield token
        if token in ends:
            return
        step = torch.tensor([[token]], device=model.device)


def end_ids(model: Any, tokenizer: Any) -> set[int]:
    """The ids after which an answer is complete."""
    configured = model.generation_config.eos_token_id
    ids = configured if isinstance(configured, list) else [configured]
    return {id for id in (*ids, tokenizer.eos_token_id) if id is not None}


def chat_prompt(
    tokenizer: Any, messages: list[dict[str, str]], *, roles: bool = True
) -> tuple[list[int], list[int] | None]:
    """A conversation's ids in the model's chat template, ready for the assistant's turn, and their role codes.

    A tokenizer without a template gets the messages' plain text, which has no roles. `roles` = False asks for none,
    which templates that rewrite earlier turns need.
    """
    if not getattr(tokenizer, "chat_template", None):
        return tokenizer("\n".join(message["content"] for message in messages))["input_ids"], None
    if roles:
        return conversation(tokenizer, messages, answer=True)
    encoded = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)
    return list(encoded["input_ids"]), None


def _shared_prefix(encoded: list[list[int]]) -> int:
    """How many tokens all prompts begin with; at least one token of each is left over."""
    shortest = min(len(ids) for ids in encoded)
    same = next((i for i in range(shortest) if len({ids[i] for ids in encoded}) > 1), shortest)
    return min(same, shortest - 1)


def _prefix_cache(model: Any, ids: list[int], n: int) -> Any:
    """The model's state after a shared prefix, read once and repeated n times; None for an empty prefix."""
    if not ids:
        return None
    cache = model(input_ids=torch.tensor([ids], device=model.device), use_cache=True, logits_to_keep=1).past_key_values
    cache.batch_repeat_interleave(n)
    return cache


def _choose(logits: Tensor, temperature: float, generator: torch.Generator) -> int:
    if temperature <= 0:
        return int(logits.argmax())
    return int(torch.multinomial(torch.softmax(logits.float() / temperature, -1), 1, generator=generator))


def _left_padded(encoded: list[list[int]], pad: int, device: Any) -> tuple[Tensor, Tensor]:
    width = max(len(ids) for ids in encoded)
    ids = torch.tensor([[pad] * (width - len(row)) + row for row in encoded], device=device)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in encoded], device=device)
    return ids, mask


def _before(text: str, stop: tuple[str, ...]) -> str:
    for mark in stop:
        text = text.split(mark, 1)[0]
    return text
