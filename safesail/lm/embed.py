"""Sentence embeddings from any transformers encoder: mean of the last hidden states, unit norm."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from safesail.lm.load import check_complete, check_weights, load_tokenizer, loading

__all__ = ["SentenceEncoder"]


class SentenceEncoder:
    """Turns texts into unit vectors whose inner product is their similarity."""

    def __init__(self, path: str) -> None:
        from transformers import AutoModel

        check_weights(path)
        with loading(f"the sentence encoder {path} cannot be loaded"):
            model, report = AutoModel.from_pretrained(path, dtype=torch.float32, output_loading_info=True)
        check_complete(path, {"missing_keys": [key for key in report["missing_keys"] if "pooler" not in key]})
        self._model: Any = model.eval().requires_grad_(False)
        self._tokenizer = load_tokenizer(path)

    @torch.inference_mode()
    def encode(self, texts: list[str], *, batch_size: int = 64, progress: Callable[[int], Any] | None = None) -> Tensor:
        """The embedding of each text: (n_texts, d). Equal texts are encoded once, those of similar length together."""
        unique = sorted(set(texts), key=lambda text: (len(text), text))
        vectors = []
        for start in range(0, len(unique), batch_size):
            batch = unique[start : start + batch_size]
            vectors.append(self._batch(batch))
            if progress:
                progress(len(batch))
        row = {text: i for i, text in enumerate(unique)}
        return torch.cat(vectors)[[row[text] for text in texts]] if texts else torch.zeros(0, 1)

    def _batch(self, texts: list[str]) -> Tensor:
        inputs = self._tokenizer(texts, padding=True, truncation=True, max_length=256, return_tensors="pt")
        hidden = self._model(**inputs).last_hidden_state
        mask = inputs["attention_mask"].unsqueeze(-1).to(hidden.dtype)
        return F.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)
