"""The prompts, one text file each; a prompt's hash goes into every row that it helped to make."""

import hashlib
import re
from pathlib import Path

__all__ = ["inert", "prompt", "prompt_hash", "prompts_fingerprint"]

_FOLDER = Path(__file__).parent
_NO_TEXT = re.compile(r"[\x00-\x08\x0a-\x1f\x7f-\x9f\u2028\u2029]+")  # all but the tab


def inert(text: str) -> str:
    """Foreign text for the inside of a prompt: one line that can neither close its block nor forge a highlight.

    Line ends and control characters become spaces, and the signs that blocks and highlights are made of their
    look-alikes; every other character stays.
    """
    return _NO_TEXT.sub(" ", text).translate({ord("<"): "‹", ord("⟦"): "[", ord("⟧"): "]"})


def prompt(name: str) -> str:
    """The template `name`, with `str.format` placeholders."""
    return (_FOLDER / f"{name}.txt").read_text(encoding="utf-8")


def prompt_hash(name: str) -> str:
    """The first 12 hex digits of a template's SHA-256."""
    return hashlib.sha256(prompt(name).encode()).hexdigest()[:12]


def prompts_fingerprint(stage: str) -> str:
    """One hash over a stage's templates. stage: how their names begin, `explain` or `simulate`."""
    names = sorted(path.stem for path in _FOLDER.glob(f"{stage}_*.txt"))
    return hashlib.sha256("".join(map(prompt_hash, names)).encode()).hexdigest()
