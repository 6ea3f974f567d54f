"""sparsify: a folder per hook point, named by the module path, with `cfg.json` and `sae.safetensors`.

    h     = relu((x - b_dec) encoder.weightᵀ + encoder.bias)
    f     = the k largest of h
    x_hat = f W_dec + b_dec

encoder.weight, W_dec: (d_sae, d_in). With several seeds the folders are `<hook point>/seed<n>`. `num_latents` 0 means
`d_in · expansion_factor`. Not read: transcoders and skip connections (they write another module's output than they
read), `groupmax`, and `signed` codes of older versions.
"""

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from safesail.errors import InputError
from safesail.files import write_tensors
from safesail.hook_names import from_module_path
from safesail.repository import Repository
from safesail.run import write_json
from safesail.sae.formats.archive import entries, safetensors_of
from safesail.sae.formats.checks import check_shapes, weights
from safesail.sae.formats.foreign import Equations, Foreign, Format, configured, folded, folders, inside, source_dtype
from safesail.sae.model import Sae

__all__ = ["FORMAT", "write_sparsify"]

CONFIG_FILE, WEIGHTS_FILE, RUN_FILE = "cfg.json", "sae.safetensors", "config.json"
_NOT_READ = {
    "transcode": "it writes another module's output than it reads",
    "skip_connection": "it adds a linear map of its input",
    "signed": "its latents may be negative",
}


def find(repository: Repository, names: list[str]) -> list[str]:
    """The folders that hold a config and weights."""
    return folders(names, WEIGHTS_FILE, CONFIG_FILE)


def read(repository: Repository, sae_id: str) -> Foreign:
    """The SAE in one folder."""
    origin = f"{repository.source}/{inside(sae_id, CONFIG_FILE)}"
    cfg = repository.json(inside(sae_id, CONFIG_FILE))
    d_in, d_sae, k = _sizes(cfg, origin)
    path = repository.file(inside(sae_id, WEIGHTS_FILE))
    shapes = {"encoder.weight": (d_sae, d_in), "encoder.bias": (d_sae,), "W_dec": (d_sae, d_in), "b_dec": (d_in,)}
    header = entries(path)
    check_shapes(header, shapes, str(path), CONFIG_FILE)
    tensors = weights(safetensors_of(path), shapes, str(path))
    hook_point, notes = _hook_point(repository, sae_id)
    config = configured(
        origin,
        d_in=d_in,
        d_sae=d_sae,
        k=k,
        architecture="topk",
        hook_point=hook_point,
        model_name=_model_name(repository),
        extra=source_dtype(header["encoder.weight"].dtype),
    )
    b_dec = tensors["b_dec"]
    sae = folded(
        config, tensors["encoder.weight"].T, tensors["encoder.bias"], tensors["W_dec"], b_dec, subtracted=b_dec
    )
    return Foreign("sparsify", sae_id, sae, *_theirs(tensors, k), notes=notes)


def _sizes(cfg: Any, origin: str) -> tuple[int, int, int]:
    """(d_in, d_sae, k); InputError for what has no exact counterpart. Unknown keys mean nothing."""
    if not isinstance(cfg, dict):
        raise InputError(f"{origin} is not the config of an SAE: it is not a JSON object.")
    for key, reason in _NOT_READ.items():
        if cfg.get(key):
            raise InputError(f"{origin}: an SAE with {key} has no exact counterpart: {reason}.")
    if (activation := cfg.get("activation", "topk")) != "topk":
        raise InputError(f"{origin}: activation {activation!r} has no exact counterpart; topk is read.")
    n_latents = _count(cfg, "num_latents", 0, origin, least=0)
    d_in, k = _count(cfg, "d_in", None, origin), _count(cfg, "k", 32, origin)
    return d_in, n_latents or d_in * _count(cfg, "expansion_factor", 32, origin), k


def _count(cfg: dict[str, Any], key: str, default: int | None, origin: str, least: int = 1) -> int:
    value = cfg.get(key, default)
    if type(value) is not int or value < least:
        raise InputError(f"{origin}: {key} is {value!r}, not a count.")
    return value


def _hook_point(repository: Repository, sae_id: str) -> tuple[str, tuple[str, ...]]:
    """The hook point that the folder is named by; of a folder given by itself, its own name."""
    name = Path(repository.source).name if sae_id == "." else sae_id.split("/")[0]
    if not re.fullmatch(r"[a-z_]+(\.\w+)*", name):
        return "", (f"The folder name {name!r} is not a module path: where the SAE reads is not known.",)
    return from_module_path(name) or name, (f"The hook point {name} is the folder's name.",)


def _model_name(repository: Repository) -> str:
    """The model named by the run's `config.json`, empty where there is none."""
    if RUN_FILE not in repository.names():
        return ""
    run = repository.json(RUN_FILE)
    name = run.get("model") if isinstance(run, dict) else None
    return name if isinstance(name, str) and not name.startswith(("/", "~", ".")) else ""


def _theirs(tensors: dict[str, Tensor], k: int) -> Equations:
    """sparsify's own equations."""

    def encode(x: Tensor) -> Tensor:
        h = torch.nn.functional.linear(x - tensors["b_dec"], tensors["encoder.weight"], tensors["encoder.bias"]).relu()
        top = h.topk(k, dim=-1)
        return torch.zeros_like(h).scatter(-1, top.indices, top.values)

    def decode(x: Tensor, latents: Tensor) -> Tensor:
        return latents @ tensors["W_dec"] + tensors["b_dec"]

    return encode, decode


FORMAT = Format("sparsify", find, read)


def write_sparsify(saes: dict[str, Sae], folder: Path) -> None:
    """Write `<hook point>/{cfg.json, sae.safetensors}` for {hook point: Sae}; InputError for what sparsify is not."""
    for name, sae in saes.items():
        _check_writable(name, sae)
    for name, sae in saes.items():
        (folder / name).mkdir(parents=True, exist_ok=True)
        write_tensors(
            folder / name / WEIGHTS_FILE,
            {
                "encoder.weight": sae.W_enc.detach().T.contiguous(),
                "encoder.bias": sae.b_enc.detach().contiguous(),
                "W_dec": sae.W_dec.detach().contiguous(),
                "b_dec": sae.b_dec.detach().contiguous(),
            },
        )
        write_json(folder / name / CONFIG_FILE, _config(sae))
    models = {sae.config.model_name for sae in saes.values() if sae.config.model_name}
    model = {"model": models.pop()} if len(models) == 1 else {}
    write_json(folder / RUN_FILE, {**model, "hookpoints": list(saes), "sae": _config(next(iter(saes.values())))})


def _check_writable(name: str, sae: Sae) -> None:
    if sae.config.architecture != "topk":
        raise InputError(f"{name}: a {sae.config.architecture} SAE has no exact counterpart in sparsify, only a topk.")
    if sae.config.normalize_activations != "none":
        raise InputError(f"{name}: sparsify does not normalise activations ({sae.config.normalize_activations}).")


def _config(sae: Sae) -> dict[str, Any]:
    norms = sae.W_dec.detach().norm(dim=1)
    return {
        "activation": "topk",
        "expansion_factor": max(1, sae.config.d_sae // sae.config.d_in),
        "normalize_decoder": bool((norms - 1).abs().max() < 1e-3),
        "num_latents": sae.config.d_sae,
        "k": sae.config.k,
        "multi_topk": False,
        "skip_connection": False,
        "transcode": False,
        "d_in": sae.config.d_in,
    }
