"""What a reward model holds at the segment ends of both texts of every preference.

Reads the preferences and the reward model. Writes `shard-00000.safetensors` … (activations in the recipe's dtype, fp32
norms, token ids and positions of a fixed number of texts), a checksum beside each shard, `ends.parquet` (a row for each
side of each pair: which text it is and where its ends are), and `ends.json`. A text that several pairs have is read and
stored once. Readers see the ends in the order of the pairs, of a pair the chosen text's first, of a text by position.
"""

import hashlib
import json
from collections.abc import Callable, Iterator
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors import safe_open
from torch import Tensor

from safesail.distributed import ALONE, Ranks
from safesail.errors import InputError
from safesail.files import replacing
from safesail.lm.activations import Activations
from safesail.lm.corpus import Piece
from safesail.lm.shards import checksum, checksum_or_none, is_whole, recorded_checksum, shard_file, write_shard
from safesail.lm.tokens import special_ids
from safesail.lm.windows import Storage, read_windows
from safesail.progress import bar
from safesail.recipe import TokenPolicy
from safesail.reward_recipe import RewardRecipe
from safesail.rewards.model import RewardModel, by_length
from safesail.rewards.preferences import SIDES, Preference
from safesail.rewards.segments import segment_ends
from safesail.rewards.texts import Text, encode_side
from safesail.run import StageWork, write_json
from safesail.sae.model import Sae

__all__ = ["ENDS_SCHEMA", "Encode", "Ends", "check_ends", "encoded", "ends_stage", "entries_of", "latents_at"]

ENDS_SCHEMA = pa.schema(
    [
        ("pair", pa.int64()),
        ("pair_id", pa.string()),
        ("kind", pa.string()),
        ("held_out", pa.bool_()),
        ("side", pa.uint8()),
        ("text", pa.int64()),
        ("n_tokens", pa.int32()),
        ("n_cut", pa.int32()),
        ("positions", pa.list_(pa.int32())),
    ]
)
"""A row per side of a pair. `pair` is the number of the preference, `text` that of the stored text."""
Encode = Callable[[Any, Preference, str, int], Text]
_TEXTS_PER_SHARD = 256
_PRE_ACTIVATIONS = 1 << 24  # at a time: 64 MB
_N_NAMED = 20
"""How many pairs with bad activations are named."""


def ends_stage(
    recipe: RewardRecipe,
    preferences: list[Preference],
    reward_model: RewardModel,
    work: StageWork,
    ranks: Ranks = ALONE,
    encode: Encode = encode_side,
) -> None:
    """Write the activations at the segment ends of all pairs, held out or not, of every kind.

    Whole shards of an interrupted attempt are kept. Every rank makes its share of the shards.
    """
    tokenizer = reward_model.tokenizer
    texts = _numbered(recipe, tokenizer, preferences, encode)
    sides = [(preference, side) for preference in preferences for side in SIDES]
    having = dict(zip(texts, sides, strict=True))
    stored = [having[number] for number in range(len(having))]
    starts = range(0, len(stored), _TEXTS_PER_SHARD)
    with bar("ends", len(stored), "text") as progress:
        for number in ranks.mine(len(starts)):
            members = stored[starts[number] : starts[number] + _TEXTS_PER_SHARD]
            if not is_whole(work.folder, number):
                write_shard(work.folder, number, _shard(recipe, members, reward_model, encode))
            progress.update(len(members))
    ranks.wait()
    if ranks.first:
        _write_ends(work.folder, preferences, texts, len(starts))
        _summarise(work.folder, recipe, len(starts), special_ids(tokenizer))
    ranks.wait()
    facts = _read_facts(work.folder)
    work.facts |= {name: facts[name] for name in ("n_tokens", "n_stored", "n_texts", "n_texts_cut")}


def encoded(recipe: RewardRecipe, tokenizer: Any, preference: Preference, side: str, encode: Encode) -> Text:
    """One side of a pair as the reward model reads it; InputError where its answer has no token."""
    text = encode(tokenizer, preference, side, recipe.reward.max_length)
    if not text.answer:
        raise InputError(
            f"the {side} answer of pair {preference.id} has no tokens; give it a text, leave the pair out, or raise "
            "reward.max_length."
        )
    return text


def _numbered(recipe: RewardRecipe, tokenizer: Any, preferences: list[Preference], encode: Encode) -> list[int]:
    """For both sides of every pair the number of its text; texts are numbered as they come, equal ones alike."""
    first: dict[int, int] = {}
    return [
        first.setdefault(_digest(encoded(recipe, tokenizer, preference, side, encode)), len(first))
        for preference in preferences
        for side in SIDES
    ]


def _digest(text: Text) -> int:
    """A 128-bit hash of a text's tokens and of where its answer is."""
    content = torch.tensor([text.answer.start, text.answer.stop, *text.ids], dtype=torch.int32).numpy().tobytes()
    return int.from_bytes(hashlib.sha256(content).digest()[:16], "big")


# --- reading the model --------------------------------------------------------------------------------------------


def _shard(
    recipe: RewardRecipe, members: list[tuple[Preference, str]], reward_model: RewardModel, encode: Encode
) -> dict[str, Tensor]:
    """The rows of some texts and, per text, how many rows, tokens and lost tokens it has."""
    tokenizer = reward_model.tokenizer
    texts = [encoded(recipe, tokenizer, preference, side, encode) for preference, side in members]
    positions = [segment_ends(tokenizer, text, recipe.ends) for text in texts]
    pieces = [
        _piece(f"{preference.id} ({side})", text) for (preference, side), text in zip(members, texts, strict=True)
    ]
    ids = [text.ids[position] for text, found in zip(texts, positions, strict=True) for position in found]
    return {
        "token_ids": torch.tensor(ids, dtype=torch.int32),
        "positions": torch.tensor([position for found in positions for position in found], dtype=torch.int32),
        "n_ends": torch.tensor([len(found) for found in positions], dtype=torch.int32),
        "n_tokens": torch.tensor([len(text.ids) for text in texts], dtype=torch.int32),
        "n_cut": torch.tensor([text.n_cut for text in texts], dtype=torch.int32),
        **_activations(recipe, reward_model.model, pieces, positions),
    }


def _activations(
    recipe: RewardRecipe, model: Any, pieces: list[Piece], positions: list[list[int]]
) -> dict[str, Tensor]:
    """The activations and norms at the positions of each text, texts in the order given: (n_ends, d_in), (n_ends,).

    Texts of like lengths are read together, one per window; what pads the shorter ones is never read.
    """
    name, storage = recipe.hook_point, Storage(recipe.harvest.dtype, "skip")  # only ends are complained of, below
    budget = recipe.runtime.windows_per_batch * recipe.harvest.window
    rows: dict[int, Tensor] = {}
    norms: dict[int, Tensor] = {}
    for batch in by_length([len(piece.ids) for piece in pieces], budget):
        members = [pieces[i] for i in batch]
        windows = [[number] for number in range(len(batch))]
        (reading,) = read_windows(model, members, windows, (name,), len(batch), storage)
        lengths = [len(piece.ids) for piece in members]
        for i, start in zip(batch, accumulate(lengths, initial=0), strict=False):  # the last start is the end
            wanted = torch.tensor(positions[i]) + start
            rows[i], norms[i] = reading.rows[name][wanted], reading.norms[name][wanted]
            if recipe.harvest.bad_activations == "stop":
                _check_storable(recipe, norms[i], positions[i], pieces[i].document)
    order = range(len(pieces))
    return {name: torch.cat([rows[i] for i in order]), f"{name}:norm": torch.cat([norms[i] for i in order])}


def _check_storable(recipe: RewardRecipe, norms: Tensor, positions: list[int], text: str) -> None:
    """InputError for the first end of a text whose norm is NaN: its activation could not be stored."""
    bad = (~norms.isfinite()).nonzero().flatten()
    if len(bad):
        dtype, at = recipe.harvest.dtype, positions[int(bad[0])]
        wider = ' harvest.dtype = "bfloat16" holds larger numbers,' if dtype == "float16" else ""
        raise InputError(
            f"an activation at {recipe.hook_point} is not finite or beyond what {dtype} holds, at token {at} of pair "
            f'{text};{wider} harvest.bad_activations = "skip" leaves such tokens out. Check also the reward model\'s '
            "weights."
        )


def _piece(name: str, text: Text) -> Piece:
    return Piece(name, "", False, "", text.ids, [0] * len(text.ids))


# --- what is beside the shards ------------------------------------------------------------------------------------


def _write_ends(folder: Path, preferences: list[Preference], texts: list[int], n_shards: int) -> None:
    found = {name: _column(folder, n_shards, name) for name in ("positions", "n_ends", "n_tokens", "n_cut")}
    positions = [part.tolist() for part in found["positions"].split(found["n_ends"].tolist())]
    table = pa.table(
        {
            "pair": [pair for pair in range(len(preferences)) for _ in SIDES],
            "pair_id": [preference.id for preference in preferences for _ in SIDES],
            "kind": [preference.kind for preference in preferences for _ in SIDES],
            "held_out": [preference.held_out for preference in preferences for _ in SIDES],
            "side": [side for _ in preferences for side in range(len(SIDES))],
            "text": texts,
            "n_tokens": found["n_tokens"][texts].tolist(),
            "n_cut": found["n_cut"][texts].tolist(),
            "positions": [positions[text] for text in texts],
        },
        schema=ENDS_SCHEMA,
    )
    with replacing(folder / "ends.parquet", table.nbytes) as temporary:
        pq.write_table(table, temporary)


def _summarise(folder: Path, recipe: RewardRecipe, n_shards: int, specials: list[int]) -> None:
    """Write ends.json: what the shards hold, their checksums, and how they were made."""
    name, norms = recipe.hook_point, _column(folder, n_shards, f"{recipe.hook_point}:norm")
    good = norms.isfinite()
    if not good.any():
        raise InputError(f"no activation at {name} can be stored; check the reward model's weights and dtype.")
    table = pq.read_table(folder / "ends.parquet", columns=["positions"])
    facts = {
        "hook_points": [name],
        "d_in": {name: _d_in(folder, name)},
        "median_norm": {name: float(norms[good].median())},
        "special_ids": specials,
        "rows_per_shard": [int(_column(folder, 1, "n_ends", number).sum()) for number in range(n_shards)],
        "sha256_of_shards": [recorded_checksum(folder, number) for number in range(n_shards)],
        "ends_sha256": checksum(folder / "ends.parquet"),
        "n_tokens": sum(len(positions) for positions in table["positions"].to_pylist()),
        "n_stored": len(norms),
        "n_texts": len(_column(folder, n_shards, "n_ends")),
        "n_texts_cut": int((_column(folder, n_shards, "n_cut") > 0).sum()),
        "skipped": {name: _skipped(folder, n_shards, ~good)} if not good.all() else {},
        "texts_per_shard": _TEXTS_PER_SHARD,
        "dtype": recipe.harvest.dtype,
        "bad_activations": recipe.harvest.bad_activations,
        **recipe.ends.model_dump(),
    }
    write_json(folder / "ends.json", facts)


def _column(folder: Path, n_shards: int, name: str, first: int = 0) -> Tensor:
    """One of the shards' vectors, joined over shards."""
    parts = []
    for number in range(first, first + n_shards):
        with safe_open(shard_file(folder, number), framework="pt") as handle:
            parts.append(handle.get_tensor(name))
    return torch.cat(parts)


def _d_in(folder: Path, hook_point: str) -> int:
    with safe_open(shard_file(folder, 0), framework="pt") as handle:
        return handle.get_slice(hook_point).get_shape()[1]


def _skipped(folder: Path, n_shards: int, bad: Tensor) -> dict[str, Any]:
    """How many stored rows could not be read, and of which pairs. bad: bool (n_stored,)."""
    of_row = torch.repeat_interleave(_column(folder, n_shards, "n_ends").long())
    texts = set(of_row[bad].tolist())
    table = pq.read_table(folder / "ends.parquet", columns=["pair_id", "text"])
    pairs = [row["pair_id"] for row in table.to_pylist() if row["text"] in texts]
    return {"n_tokens": int(bad.sum()), "pairs": list(dict.fromkeys(pairs))[:_N_NAMED]}


def _read_facts(folder: Path) -> dict[str, Any]:
    try:
        return json.loads((folder / "ends.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(
            f"{folder / 'ends.json'} cannot be read ({error}); remove {folder} and run the recipe again."
        ) from error


def check_ends(folder: Path, again: str) -> None:
    """InputError for the first file of finished ends that is missing or changed. again: the command that makes them."""
    facts = _read_facts(folder)
    expected = {shard_file(folder, number): wanted for number, wanted in enumerate(facts["sha256_of_shards"])}
    if "ends_sha256" in facts:
        expected[folder / "ends.parquet"] = facts["ends_sha256"]
    with bar("check the ends", len(expected), "file") as progress:
        for path, wanted in expected.items():
            if checksum_or_none(path) != wanted:
                raise InputError(f"{path} is damaged or missing; make the segment ends anew: `{again} --force`.")
            progress.update(1)


# --- reading the ends ---------------------------------------------------------------------------------------------


class Ends(Activations):
    """What `ends_stage` wrote: memory-mapped activations at segment ends, with the pair and side of each.

    An SAE is trained on it as on a harvest. What `Activations` says of documents and pieces it does not have.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.facts = _read_facts(folder)
        self.hook_points: list[str] = self.facts["hook_points"]
        self.n_tokens: int = self.facts["n_tokens"]
        table = pq.read_table(folder / "ends.parquet")
        positions, texts = table["positions"].combine_chunks(), torch.tensor(table["text"].to_numpy())
        n_ends = torch.tensor(positions.value_lengths().to_numpy()).long()
        of_row = torch.repeat_interleave(n_ends)
        self.position: Tensor = torch.tensor(positions.flatten().to_numpy()).long()
        """(n_tokens,) in `Text.ids`."""
        self.pair: Tensor = torch.tensor(table["pair"].to_numpy())[of_row]
        """(n_tokens,) the number of the row's preference."""
        self.side: Tensor = torch.tensor(table["side"].to_numpy())[of_row]
        """(n_tokens,) uint8, 0 chosen, 1 rejected."""
        self.text: Tensor = texts[of_row]
        """(n_tokens,) the number of the text, the same where several pairs have it."""
        self._stored = _stored_rows(texts, n_ends)
        self.pair_ids: list[str] = table["pair_id"].to_pylist()[:: len(SIDES)]
        self.kind: list[str] = table["kind"].to_pylist()[:: len(SIDES)]
        self.held_out = torch.tensor(table["held_out"].to_pylist()[:: len(SIDES)])
        """(n_pairs,)."""

    @cached_property
    def token_ids(self) -> Tensor:
        """(n_tokens,) the token that stands at each end."""
        return torch.cat([shard.get_tensor("token_ids") for shard in self._shards])[self._stored]

    @property
    def roles(self) -> Tensor:
        """No row has a role of its own: ends were chosen already."""
        return torch.zeros(self.n_tokens, dtype=torch.int8)

    def counted(self, hook_point: str, policy: TokenPolicy) -> Tensor:
        """The rows that could be read and are no attention sinks: bool (n_tokens,).

        Roles and special tokens were decided on when the ends were chosen.
        """
        return super().counted(hook_point, policy.model_copy(update={"exclude_special": False}))

    def norms(self, hook_point: str) -> Tensor:
        """The fp32 norm of every activation before it was stored, NaN where it could not be: (n_tokens,)."""
        return super().norms(hook_point)[self._stored]

    def rows(self, hook_point: str, indices: Tensor) -> Tensor:
        """The activations of chosen rows, in the order asked for, as fp32: (n, d_in)."""
        return super().rows(hook_point, self._stored[indices])

    def blocks(self, hook_point: str, size: int = 4096) -> Iterator[tuple[int, Tensor]]:
        """All activations in row order: (first row, fp32 block of at most `size` rows)."""
        for part in torch.arange(self.n_tokens).split(size):
            yield int(part[0]), self.rows(hook_point, part)

    def rows_held_out(self) -> Tensor:
        """Which rows belong to held-out pairs: bool (n_tokens,)."""
        return self.held_out[self.pair]


def _stored_rows(texts: Tensor, n_ends: Tensor) -> Tensor:
    """Where the shards hold each row: (n_tokens,). texts, n_ends: per side of a pair its text and number of rows."""
    per_text = torch.zeros(int(texts.max()) + 1, dtype=torch.long)
    per_text[texts] = n_ends
    starts = per_text.cumsum(0) - per_text
    within = torch.arange(int(n_ends.sum())) - torch.repeat_interleave(n_ends.cumsum(0) - n_ends, n_ends)
    return torch.repeat_interleave(starts[texts], n_ends) + within


@torch.inference_mode()
def entries_of(
    ends: Ends, sae: Sae, rows: Tensor, progress: Callable[[int], object] = lambda n: None
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Every activation above zero on some rows, part by part: latents, values (fp32) and rows, each (n,)."""
    for part in rows.split(max(_PRE_ACTIVATIONS // sae.config.d_sae, 1)):
        codes = sae.encode_sparse(ends.rows(sae.config.hook_point, part).to(sae.W_enc.device)).to("cpu")
        active = codes.values > 0
        yield codes.indices[active].long(), codes.values[active].float(), part[codes.tokens()[active].long()]
        progress(len(part))


def latents_at(ends: Ends, sae: Sae, latents: Tensor) -> Tensor:
    """The activations of some latents on every row: (n_rows, len(latents)); zero where a row does not count."""
    column = torch.full((sae.config.d_sae,), -1)
    column[latents] = torch.arange(len(latents))
    found = torch.zeros(ends.n_tokens, len(latents))
    counted = ends.counted(sae.config.hook_point, sae.config.token_policy).nonzero().flatten()
    for which, values, rows in entries_of(ends, sae, counted):
        known = column[which] >= 0
        found[rows[known], column[which[known]]] = values[known]
    return found
