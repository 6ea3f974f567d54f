"""Activations read on the fly: texts go through the model in rounds, and nothing is kept on disk.

The second source of training activations beside `Activations`; the statistics (median norms, special tokens) come from
the harvest, which is always there. Texts that several sources hold may come from each of them, and all texts come again
in another order when a source ends.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from safesail.distributed import ALONE, Ranks
from safesail.errors import InputError
from safesail.lm.corpus import Document, Piece, cut, documents, encoded, is_held_out, pack
from safesail.lm.tokens import counted
from safesail.lm.windows import Storage, read_windows
from safesail.recipe import Recipe, Source
from safesail.taxonomy import Taxonomy

__all__ = ["Stream"]


class Stream:
    """The counted training activations of a recipe's corpus, without end, in rounds of about `buffer_tokens` tokens."""

    def __init__(
        self,
        recipe: Recipe,
        model: Any,
        tokenizer: Any,
        taxonomy: Taxonomy,
        facts: dict[str, Any],
        hook_points: tuple[str, ...],
        ranks: Ranks = ALONE,
    ) -> None:
        """facts: the content of the finished harvest's harvest.json; hook_points: those whose rows are wanted."""
        self.recipe, self.model, self.tokenizer, self.taxonomy = recipe, model, tokenizer, taxonomy
        self.facts, self.hook_points, self.ranks = facts, hook_points, ranks

    def rounds(self, first: int = 0) -> Iterator[dict[str, Tensor]]:
        """Round after round, from round `first` on, the counted rows per hook point: (n, d_in) in harvest.dtype.

        The texts of the rounds before are tokenised but not run through the model, so the rounds that follow are the
        same as without the interruption. Of several ranks each reads its share of a round's pieces.
        """
        for number, pieces in enumerate(self._rounds_of_pieces()):
            if number >= first:
                yield self._read(pieces[self.ranks.rank :: self.ranks.size])

    def _rounds_of_pieces(self) -> Iterator[list[Piece]]:
        pieces, n_tokens = [], 0
        for piece in self._mixed():
            pieces.append(piece)
            n_tokens += len(piece.ids)
            if n_tokens >= self.recipe.train.buffer_tokens:
                yield pieces
                pieces, n_tokens = [], 0

    def _mixed(self) -> Iterator[Piece]:
        """The pieces of all sources: the source furthest behind its share gives the next document."""
        sources = self.recipe.corpus.sources
        readers = [self._endless(source) for source in sources]
        given = [0] * len(sources)
        while True:
            behind = min(range(len(sources)), key=lambda i: given[i] / sources[i].weight)
            pieces = next(readers[behind])
            given[behind] += sum(len(piece.ids) for piece in pieces)
            yield from pieces

    def _endless(self, source: Source) -> Iterator[list[Piece]]:
        """The pieces of one training document after another; each pass over the source has an order of its own."""
        number = 0
        while True:
            empty = True
            for chunk in encoded(self._training(source, number), self.tokenizer, roles=bool(self.recipe.tokens.roles)):
                for document, ids, roles in chunk:
                    if pieces := cut(self.recipe.corpus, source, document.id, ids, roles):
                        empty = False
                        yield pieces
            if empty:
                about = f" about {source.about}" if source.about else ""
                raise InputError(f"{source.path} has no text to train on{about}; add texts or leave the source out.")
            number += 1

    def _training(self, source: Source, number: int) -> Iterator[Document]:
        for document in documents(source, self.taxonomy, self.recipe.seed + number):
            if not is_held_out(self.recipe.corpus, document.id):
                yield document

    def _read(self, pieces: list[Piece]) -> dict[str, Tensor]:
        """The counted rows of some pieces per hook point: (n, d_in)."""
        harvest = self.recipe.harvest
        windows = pack([len(piece.ids) for piece in pieces], harvest.window)
        storage = Storage(harvest.dtype, harvest.bad_activations)
        n_rows, dtype = sum(len(piece.ids) for piece in pieces), getattr(torch, harvest.dtype)
        # filled in place: joining a list of parts would need twice the memory
        rows = {name: torch.empty(n_rows, self.facts["d_in"][name], dtype=dtype) for name in self.hook_points}
        filled = dict.fromkeys(self.hook_points, 0)
        per_batch = self.recipe.runtime.windows_per_batch
        for reading in read_windows(self.model, pieces, windows, self.hook_points, per_batch, storage):
            roles = torch.tensor([role for i in reading.pieces for role in pieces[i].roles], dtype=torch.int8)
            for name in self.hook_points:
                keep = self._counted(name, reading.token_ids, reading.norms[name], roles)
                kept = reading.rows[name][keep]
                rows[name][filled[name] : filled[name] + len(kept)] = kept
                filled[name] += len(kept)
        return {name: tensor[: filled[name]] for name, tensor in rows.items()}

    def _counted(self, hook_point: str, ids: Tensor, norms: Tensor, roles: Tensor) -> Tensor:
        median = self.facts["median_norm"][hook_point]
        return counted(self.recipe.tokens, ids, norms, self.facts["special_ids"], median, roles)
