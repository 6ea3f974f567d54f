"""What an SAE is: its shape, where it reads, and which tokens it was trained on. Stored as `cfg.json`."""

import re
from typing import Any, Literal

from pydantic import Field, ValidationError, model_validator

from safesail.errors import InputError
from safesail.hook_names import from_module_path, from_transformer_lens, transformer_lens_name
from safesail.recipe import Architecture, Section, TokenPolicy

__all__ = ["SaeConfig"]

# Without a version SAELens takes a config for its flat pre-6.0 format and loses the metadata.
_SAELENS_FORMAT = "6.0.0"
# What an architecture is once it is trained, in SAELens' words: batch-wise top-k leaves a threshold per latent.
_SAELENS_ARCHITECTURE = {
    "relu": "standard",
    "topk": "topk",
    "batchtopk": "jumprelu",
    "jumprelu": "jumprelu",
    "matryoshka": "jumprelu",
}
# The keys that SAELens (v6) needs around ours so that it reads the same file unchanged.
_SAELENS = {
    "device": "cpu",
    "apply_b_dec_to_input": True,
    "reshape_activations": "none",
}
_LONGEST = 500
"""Characters of a text in another tool's metadata that is kept."""
_SAELENS_TOPK = {"rescale_acts_by_decoder_norm": False}


class SaeConfig(Section):
    """Shape, sparsity, hook point and token policy of one SAE."""

    d_in: int = Field(ge=1)
    d_sae: int = Field(ge=1)
    hook_point: str
    """The module path below the base model (`layers.9.mlp`); where another tool read what is no module's output, its
    name for that; empty where its files do not say."""
    architecture: Architecture = "topk"
    k: int | None = Field(default=None, ge=1)
    """Active latents per token: exactly (topk) or on average in training (batchtopk, matryoshka)."""
    coefficient: float | None = None
    """What the sparsity penalty of relu (L1) or jumprelu (L0) was multiplied with in training."""
    normalize_activations: Literal["none", "layer_norm", "constant_norm_rescale"] = "none"
    """What is done to every token before the SAE and undone after it, in SAELens' words (see `sae.norm`)."""
    dtype: str = "float32"
    model_name: str = ""
    token_policy: TokenPolicy = TokenPolicy()
    median_norm: float | None = None
    """The median activation norm at the hook point, to which `token_policy.sink_norm_multiple` refers."""

    extra: dict[str, str | int | float | bool] = Field(default_factory=dict)
    """What else the file of another tool says of the SAE in its metadata, kept in ours."""

    @model_validator(mode="after")
    def _valid(self) -> "SaeConfig":
        if not re.fullmatch(r"(\w[\w-]*(\.\w[\w-]*)*)?", self.hook_point):
            raise ValueError(f"hook point {self.hook_point!r} is not a module path")
        if self.k is not None and self.k > self.d_sae:
            raise ValueError(f"k = {self.k} exceeds d_sae = {self.d_sae}")
        if self.architecture == "topk" and self.k is None:
            raise ValueError("a topk SAE needs k")
        return self

    @property
    def has_threshold(self) -> bool:
        """Whether a latent is active above a learnt threshold (a JumpReLU), stored as the tensor `threshold`."""
        return _SAELENS_ARCHITECTURE[self.architecture] == "jumprelu"

    @property
    def variant(self) -> str:
        """The folder name below the hook point: architecture, configured sparsity and width.

        `topk-k32-w4608`; `jumprelu-c0.002-w20k` for a coefficient of 0.002 and 20,480 latents.
        """
        width = f"{self.d_sae // 1024}k" if self.d_sae % 1024 == 0 and self.d_sae >= 16384 else str(self.d_sae)
        sparsity = f"-k{self.k}" if self.k is not None else f"-c{self.coefficient:g}" if self.coefficient else ""
        return f"{self.architecture}{sparsity}-w{width}"

    @property
    def sae_id(self) -> str:
        """Hook point and variant, as `layers.9.mlp/topk-k32-w4608`."""
        return f"{self.hook_point}/{self.variant}" if self.hook_point else self.variant

    def to_json(self) -> dict[str, Any]:
        """The content of `cfg.json`, which SAELens reads unchanged."""
        topk = {"k": self.k, **_SAELENS_TOPK} if self.architecture == "topk" else {}
        return {
            "architecture": _SAELENS_ARCHITECTURE[self.architecture],
            "d_in": self.d_in,
            "d_sae": self.d_sae,
            "dtype": self.dtype,
            "normalize_activations": self.normalize_activations,
            **_SAELENS,
            **topk,
            "metadata": {
                **self.extra,
                "sae_lens_version": _SAELENS_FORMAT,
                "architecture": self.architecture,
                "k": self.k,
                "coefficient": self.coefficient,
                "model_name": self.model_name,
                "hook_name": transformer_lens_name(self.hook_point),
                **({} if _is_foreign(self.hook_point) else {"hf_hook_name": f"model.{self.hook_point}"}),
                "hook_point": self.hook_point,
                "token_policy": self.token_policy.model_dump(),
                "median_norm": self.median_norm,
                "exclude_special_tokens": self.token_policy.exclude_special,
                "prepend_bos": self.extra.get("prepend_bos", False),
            },
        }

    @classmethod
    def from_json(cls, data: Any, origin: str) -> "SaeConfig":
        """The config in a decoded `cfg.json`; InputError says which key is wrong."""
        metadata = data.get("metadata", {}) if isinstance(data, dict) else None
        if not isinstance(metadata, dict):
            raise InputError(f"{origin} is not the config of an SAE: it or its metadata is not a JSON object.")
        plain = {key: value for key, value in (_SAELENS | _SAELENS_TOPK).items() if key != "device"}
        foreign = {key: data[key] for key, value in plain.items() if data.get(key, value) != value}
        if foreign:
            raise InputError(f"{origin} asks for {foreign}, which safesail does not apply; it reads SAEs with {plain}.")
        try:
            return cls(
                d_in=data["d_in"],
                d_sae=data["d_sae"],
                architecture=_architecture(data["architecture"], metadata.get("architecture"), origin),
                k=data["k"] if data["architecture"] == "topk" else metadata.get("k"),
                coefficient=metadata.get("coefficient"),
                normalize_activations=data.get("normalize_activations") or "none",
                dtype=data.get("dtype", "float32"),
                hook_point=metadata.get("hook_point") or _hook_point(metadata),
                model_name=metadata.get("model_name") or "",
                token_policy=_token_policy(metadata),
                median_norm=metadata.get("median_norm"),
                extra=_extra(metadata),
            )
        except KeyError as error:
            raise InputError(f"{origin} lacks the key {error}.") from error
        except ValidationError as error:
            raise InputError(f"{origin}: {'; '.join(problem['msg'] for problem in error.errors())}.") from error


def _architecture(saelens: str, ours: Architecture | None, origin: str) -> Architecture:
    """Our name of an architecture: the one in the metadata where it is a kind of what SAELens' name says."""
    known: dict[str, Architecture] = {"standard": "relu", "topk": "topk", "jumprelu": "jumprelu"}
    if saelens not in known:
        raise InputError(f"{origin}: architecture {saelens!r} is unknown; known: {', '.join(known)}.")
    return ours if ours and _SAELENS_ARCHITECTURE.get(ours) == saelens else known[saelens]


def _is_foreign(hook_point: str) -> bool:
    return not hook_point or hook_point.startswith(("blocks.", "hook_"))


def _hook_point(metadata: dict[str, Any]) -> str:
    """Our name of the place that SAELens' metadata names; its own name where that is no module's output."""
    module, name = str(metadata.get("hf_hook_name") or ""), str(metadata.get("hook_name") or "")
    translated = from_transformer_lens(name, str(metadata.get("model_name") or "")) or from_module_path(name)
    return from_module_path(module) or translated or name or module


def _token_policy(metadata: dict[str, Any]) -> TokenPolicy:
    """Ours where it is there; else all tokens, or all but the special ones, as SAELens' metadata says."""
    if metadata.get("token_policy"):
        return TokenPolicy.model_validate(metadata["token_policy"])
    return TokenPolicy(exclude_special=bool(metadata.get("exclude_special_tokens")), sink_norm_multiple=None)


def _extra(metadata: dict[str, Any]) -> dict[str, Any]:
    """The short plain values of metadata that nothing else here holds, without paths of somebody's machine."""
    held = {*SaeConfig.model_fields, "sae_lens_version", "hook_name", "hf_hook_name", "exclude_special_tokens"}
    return {
        key: value
        for key, value in metadata.items()
        if key not in held
        and isinstance(value, str | int | float | bool)
        and len(str(value)) <= _LONGEST
        and (key, value) != ("prepend_bos", False)
        and not re.match(r"[/~\\]|\w:[/\\]", str(value))
    }
