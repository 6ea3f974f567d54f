"""The sparse autoencoder itself, and reading one from a folder or the Hub."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ValidationError
from torch import Tensor, nn

from safesail.errors import InputError
from safesail.files import write_tensors
from safesail.repository import Repository
from safesail.run import write_json
from safesail.sae.config import SaeConfig
from safesail.sae.norm import norm_of
from safesail.sae.sparse import Codes, above, decode, topk

__all__ = ["Sae"]

CONFIG_FILE, WEIGHTS_FILE, SPARSITY_FILE = "cfg.json", "sae_weights.safetensors", "sparsity.safetensors"
MANIFEST_FILE, RELEASE_FILE, SCHEMA = "config.json", "safesail.json", 1
_OF_A_RELEASE = {"selected", "saes", "safesail_version"}
"""Keys of which a release's `config.json` has at least one, and other tools' none."""


class Sae(nn.Module):
    """A sparse autoencoder.

        a     = (x - b_dec) W_enc + b_enc
        z     = σ(a)
        x_hat = z W_dec + b_dec

    W_enc: (d_in, d_sae), b_enc: (d_sae,), W_dec: (d_sae, d_in) with rows of unit norm, b_dec: (d_in,).
    x has any leading dimensions: x: (..., d_in), z: (..., d_sae). Where `config.normalize_activations` says so, x is
    each token's normalised activation, and x_hat is brought back to the token's scale (`sae.norm`). σ by architecture:

        topk         the k largest a_j of the token, negative ones set to zero   (Safe-SAIL's; Gao et al. 2024)
        relu         max(a_j, 0)                                                 (Bricken et al. 2023)
        jumprelu     a_j where a_j > threshold_j, else 0                         (Rajamanoharan et al. 2024)
        batchtopk    trained with the k·n largest of a batch of n tokens, used as jumprelu with the threshold that
                     training found                                              (Bussmann et al. 2024)
        matryoshka   as batchtopk, and every nested dictionary of the first m latents reconstructs x as well
                                                                                 (Bussmann et al. 2025)

    threshold: (d_sae,), fp32, only where `config.has_threshold`.
    """

    def __init__(
        self,
        config: SaeConfig,
        W_enc: Tensor,
        b_enc: Tensor,
        W_dec: Tensor,
        b_dec: Tensor,
        threshold: Tensor | None = None,
    ) -> None:
        super().__init__()
        assert config.has_threshold == (threshold is not None)
        self.config = config
        self.W_enc = nn.Parameter(W_enc, requires_grad=False)
        self.b_enc = nn.Parameter(b_enc, requires_grad=False)
        self.W_dec = nn.Parameter(W_dec, requires_grad=False)
        self.b_dec = nn.Parameter(b_dec, requires_grad=False)
        self.threshold = None if threshold is None else nn.Parameter(threshold, requires_grad=False)

    @property
    def identity(self) -> str:
        """Which SAE this is: its id, which another may be given too, and a hash of numbers that no other has."""
        part = torch.cat([self.b_enc.detach().flatten(), self.W_enc.detach()[:8].flatten()]).float().cpu().contiguous()
        return f"{self.config.sae_id} {hashlib.sha256(part.numpy().tobytes()).hexdigest()[:16]}"

    def encode(self, x: Tensor) -> Tensor:
        """The latents of each token. x: (..., d_in) → (..., d_sae)."""
        codes = self.encode_sparse(x)
        return codes.dense(self.config.d_sae).reshape(*x.shape[:-1], self.config.d_sae)

    def encode_sparse(self, x: Tensor) -> Codes:
        """The active latents of each token. x: (..., d_in), flattened to (n_tokens, d_in).

        A topk SAE lists k entries for every token; those that the ReLU zeroed have value 0 (`Codes.active` drops them).
        """
        pre = self.pre_activations(x)
        if self.config.architecture == "topk":
            assert self.config.k is not None
            codes = topk(pre, self.config.k)
            return codes.with_values(codes.values.relu())
        return above(pre, 0.0 if self.threshold is None else self.threshold.clamp(min=0))

    def pre_activations(self, x: Tensor) -> Tensor:
        """a = (x - b_dec) W_enc + b_enc, flattened to (n_tokens, d_sae)."""
        flat = x.reshape(-1, self.config.d_in).to(self.W_enc.dtype)
        flat = norm_of(flat, self.config.normalize_activations).apply(flat)
        return torch.addmm(self.b_enc, flat - self.b_dec, self.W_enc)

    def decode(self, latents: Tensor, like: Tensor | None = None) -> Tensor:
        """x_hat = z W_dec + b_dec. latents: (..., d_sae) → (..., d_in).

        like: (..., d_in), the activations that the latents came from: an SAE that normalises needs them to bring x_hat
        back to each token's scale; without them it is left normalised. Others leave them unread.
        """
        return self._scaled_back(latents @ self.W_dec + self.b_dec, like)

    def decode_sparse(self, codes: Codes, like: Tensor | None = None) -> Tensor:
        """x_hat from active latents only: (n_tokens, d_in). like: as for `decode`."""
        return self._scaled_back(decode(codes, self.W_dec) + self.b_dec, like)

    def _scaled_back(self, x_hat: Tensor, like: Tensor | None) -> Tensor:
        if like is None:
            return x_hat
        return norm_of(like.to(self.W_dec.dtype), self.config.normalize_activations).undo(x_hat.reshape(like.shape))

    def forward(self, x: Tensor) -> Tensor:
        """The reconstruction. x: (..., d_in) → (..., d_in)."""
        flat = x.reshape(-1, self.config.d_in)
        return self.decode_sparse(self.encode_sparse(flat), like=flat).reshape(x.shape)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Sae":
        """What `to`, `half`, `cuda` and the like are made of; the threshold follows in its device alone.

        Rounded, it would switch latents on and off.
        """
        exact = None if self.threshold is None else self.threshold.data.float()
        super()._apply(fn, recurse)
        if self.threshold is not None and exact is not None and self.threshold.dtype != exact.dtype:
            self.threshold.data = exact.to(self.threshold.device)
        return self

    def extra_repr(self) -> str:
        return f"{self.config.sae_id}, d_in={self.config.d_in}, d_sae={self.config.d_sae}"

    def save(self, folder: Path, firing_rates: Tensor | None = None) -> None:
        """Write cfg.json and sae_weights.safetensors (and log10 firing rates, as SAELens does) into `folder`."""
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / CONFIG_FILE, self.config.to_json())
        write_tensors(
            folder / WEIGHTS_FILE, {name: value.detach().contiguous() for name, value in self.named_parameters()}
        )
        if firing_rates is not None:
            write_tensors(folder / SPARSITY_FILE, {"sparsity": (firing_rates.float() + 1e-10).log10().contiguous()})

    @classmethod
    def from_pretrained(
        cls,
        path_or_repo: str | Path,
        sae_id: str | None = None,
        *,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        force_download: bool = False,
        local_files_only: bool = False,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> "Sae":
        """The SAE `sae_id` of a release's `saes` folder or Hub repository, or of another tool's (`sae.formats`).

        `sae_id` is a hook point (`layers.9.mlp`: its selected variant) or hook point and variant
        (`layers.9.mlp/topk-k32-w4608`); elsewhere the id that the other tool uses, or a hook point that only one of its
        SAEs reads. The other arguments mean what they mean in transformers.
        """
        repository = Repository(
            str(path_or_repo), "model", revision, token, cache_dir, force_download, local_files_only
        )
        if manifest := _Manifest.of(repository):
            return cls._read(repository, manifest.resolve(sae_id, repository.source), device, dtype)
        from safesail.sae.formats.read import foreign  # formats are read on top of this module

        return foreign(repository, sae_id).sae.to(device=device, dtype=dtype)

    @classmethod
    def load_all(cls, path_or_repo: str | Path, **kwargs: Any) -> dict[str, "Sae"]:
        """The selected SAE of every hook point, {hook point: Sae}; keyword arguments as in `from_pretrained`.

        Another tool's folder or repository selects none: it must have one SAE per hook point.
        """
        options = {"device": kwargs.pop("device", "cpu"), "dtype": kwargs.pop("dtype", torch.float32)}
        repository = Repository(str(path_or_repo), "model", **kwargs)
        if manifest := _Manifest.of(repository):
            return {name: cls._read(repository, sae_id, **options) for name, sae_id in manifest.selected.items()}
        from safesail.sae.formats.read import foreign_saes

        return {found.sae.config.hook_point: found.sae.to(**options) for found in foreign_saes(repository)}

    @classmethod
    def _read(cls, repository: Repository, sae_id: str, device: str | torch.device, dtype: torch.dtype) -> "Sae":
        config = SaeConfig.from_json(
            repository.json(f"{sae_id}/{CONFIG_FILE}"), f"{repository.source}/{sae_id}/{CONFIG_FILE}"
        )
        return cls.load(repository.file(f"{sae_id}/{WEIGHTS_FILE}"), config).to(device=device, dtype=dtype)

    @classmethod
    def load(cls, weights: Path, config: SaeConfig) -> "Sae":
        """The SAE in a safetensors file, its names and shapes checked before it is read, its numbers after."""
        from safesail.sae.formats.archive import entries, safetensors_of  # formats are read on top of this module
        from safesail.sae.formats.checks import check_finite, check_shapes

        shapes = {
            "W_enc": (config.d_in, config.d_sae),
            "b_enc": (config.d_sae,),
            "W_dec": (config.d_sae, config.d_in),
            "b_dec": (config.d_in,),
        } | ({"threshold": (config.d_sae,)} if config.has_threshold else {})
        check_shapes(entries(weights), shapes, str(weights), CONFIG_FILE)
        tensors = safetensors_of(weights)
        check_finite(tensors, str(weights))
        return cls(config, **tensors)


def read_config(folder: Path) -> SaeConfig:
    """The config of the SAE saved in a local folder."""
    path = folder / CONFIG_FILE
    return SaeConfig.from_json(json.loads(path.read_text(encoding="utf-8")), str(path))


def read(folder: Path) -> Sae:
    """The SAE saved in a local folder by `Sae.save`."""
    return Sae.load(folder / WEIGHTS_FILE, read_config(folder))


def _refuse_newer(data: Any, origin: str) -> None:
    if isinstance(data, dict) and data.get("schema", SCHEMA) != SCHEMA:
        raise InputError(
            f"{origin} has schema {data['schema']!r}, and this safesail reads schema {SCHEMA}; "
            "install a newer safesail with `pip install -U safesail`."
        )


class _Manifest(BaseModel):
    """What `config.json` of a release must say for its SAEs to be found; it says more."""

    class Listed(BaseModel):
        id: str

    selected: dict[str, str]
    """{hook point: id of its selected SAE}."""
    saes: list[Listed]

    @classmethod
    def of(cls, repository: Repository) -> "_Manifest | None":
        """The manifest of a release; None where there is another tool's config or none at all."""
        try:
            data = repository.json(MANIFEST_FILE)
        except InputError:
            if MANIFEST_FILE in repository.names():  # or the names say why nothing can be read
                raise
            data = None
        if not isinstance(data, dict) or not _OF_A_RELEASE & data.keys():
            if RELEASE_FILE in repository.names():
                _refuse_newer(repository.json(RELEASE_FILE), f"{repository.source}/{RELEASE_FILE}")
            return None
        _refuse_newer(data, f"{repository.source}/{MANIFEST_FILE}")
        try:
            return cls.model_validate(data)
        except ValidationError as error:
            key = ".".join(map(str, error.errors()[0]["loc"]))
            raise InputError(
                f"{repository.source}/{MANIFEST_FILE} is not the manifest of a safesail release: {key} is missing or "
                "malformed; give a release's saes folder or repository."
            ) from error

    def resolve(self, sae_id: str | None, source: str) -> str:
        """The full id (hook point and variant) that a possibly shorter id means."""
        known = [sae.id for sae in self.saes]
        if sae_id is None and len(self.selected) == 1:
            return next(iter(self.selected.values()))
        if sae_id in self.selected:
            return self.selected[sae_id]
        if sae_id in known:
            return str(sae_id)
        raise InputError(
            f"{source} has no SAE {sae_id!r}. Hook points: {', '.join(self.selected)}. All SAEs: {', '.join(known)}."
        )
