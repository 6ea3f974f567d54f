"""Gemma Scope (Gemma 2) and Gemma Scope 2 (Gemma 3): JumpReLU SAEs that do not subtract the decoder's bias.

    h     = x W_enc + b_enc
    f     = relu(h)·[h > threshold]
    x_hat = f W_dec + b_dec

Gemma Scope     layer_<n>/width_<w>/average_l0_<l>/params.npz, and embedding/…; the repository's name tells the
                model and the site (res, mlp, att)
Gemma Scope 2   <site>/layer_<n>_width_<w>_l0_<small|medium|big>/{config.json, params.safetensors}, lower-case names;
                the config is missing at times

Not read: transcoders (also affine ones), cross-layer transcoders and crosscoders, which write another place than they
read. Lieberum et al. 2024.
"""

import re
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from safesail.errors import InputError
from safesail.hook_names import from_module_path
from safesail.recipe import TokenPolicy
from safesail.repository import Repository
from safesail.sae.formats.archive import arrays, entries, safetensors_of
from safesail.sae.formats.checks import check_shapes, weights
from safesail.sae.formats.foreign import EVERY_TOKEN, Foreign, Format, configured, folded
from safesail.sae.formats.suites import Equations, Found, affine, full_name, matrix_shape, stored_as

__all__ = ["FORMAT"]

_FIRST = re.compile(r"(.*/)?(layer_\d+|embedding)/width_\w+/average_l0_\w+")
_SECOND = re.compile(r"(.*/)?layer_\d+_width_\w+_l0_\w+")
_SEVERAL_LAYERS = re.compile(r"(.*/)?(clt|crosscoder)/.*")
_ELSEWHERE = "it writes another place than it reads"


class _Place(NamedTuple):
    """Where an SAE reads, and how that is known."""

    hook_point: str
    model_name: str
    notes: tuple[str, ...]


def find(repository: Repository, names: list[str]) -> list[str]:
    """Folders of parameters; of what spans several layers, the files."""
    folders = [name.rpartition("/")[0] for name in names if name.endswith(("/params.npz", "/params.safetensors"))]
    single = [folder for folder in folders if _FIRST.fullmatch(folder) or _SECOND.fullmatch(folder)]
    several = [name.removesuffix(".safetensors") for name in names if re.search(r"/params\w*\.safetensors$", name)]
    return single + [name for name in several if _SEVERAL_LAYERS.fullmatch(name)]


def read(repository: Repository, sae_id: str) -> Foreign:
    """The SAE in one folder."""
    return _second(repository, sae_id) if not _FIRST.fullmatch(sae_id) else _first(repository, sae_id)


# --- Gemma 2 ----------------------------------------------------------------------------------------------------------


def _first(repository: Repository, sae_id: str) -> Foreign:
    place = _first_place(full_name(repository, sae_id), repository.source)
    path = repository.file(f"{sae_id}/params.npz")
    found = {re.sub("^w_", "W_", name): array for name, array in arrays(path).items()}
    _check_scaling(found, str(path))
    policy = TokenPolicy(exclude_special=True, sink_norm_multiple=None)
    notes = (*place.notes, "That the first token of a text took no part in training is not in the files.")
    return _foreign("Gemma Scope", sae_id, path, found, place._replace(notes=notes), policy)


def _first_place(name: str, source: str) -> _Place:
    """From `gemma-scope-2b-pt-res/layer_20/…`; sites are not in the files."""
    suites = re.findall(r"gemma-scope-(2b|9b|27b)-(pt|it)-(\w+)", name)
    if not suites:
        raise InputError(
            f"{source}: which site of which model its SAEs read is only in the repository's name; "
            "call the folder as the repository, for example gemma-scope-2b-pt-res."
        )
    size, tuning, site = suites[-1]
    layer = re.findall(r"/layer_(\d+)/", name)
    if site not in ("res", "mlp", "att") or (site != "res" and not layer):
        raise InputError(f"{source}: {site} has no exact counterpart: {_ELSEWHERE}; res, mlp and att are read.")
    model = f"google/gemma-2-{size}{'-it' if tuning == 'it' else ''}"
    notes = (f"Model and site ({site}) are taken from the name gemma-scope-{size}-{tuning}-{site}.",)
    if not layer:
        note = "It reads rows of the embedding table, before the model multiplies them by the root of their width."
        return _Place("embed_tokens", model, (*notes, note))
    return _site_of_first(site, layer[-1], model, notes)


def _site_of_first(site: str, layer: str, model: str, notes: tuple[str, ...]) -> _Place:
    if site == "mlp":
        note = "The MLP's output is taken after the norm that follows it, as in Gemma Scope 2."
        return _Place(f"layers.{layer}.post_feedforward_layernorm", model, (*notes, note))
    if site == "att":
        return _heads(layer, model, notes)
    return _Place(f"layers.{layer}", model, notes)


def _heads(layer: str, model: str, notes: tuple[str, ...]) -> _Place:
    note = "It reads the concatenated heads of the attention, the input of o_proj, which is no module's output."
    return _Place(f"blocks.{layer}.attn.hook_z", model, (*notes, note))


def _check_scaling(found: dict[str, Tensor], origin: str) -> None:
    """InputError unless a finetuning factor of the latents, which some files have, is 1."""
    factor = found.get("scaling_factor")
    if factor is not None and not bool(((factor.float() - 1).abs() < 1e-5).all()):
        raise InputError(f"{origin}: its latents are scaled by a scaling_factor that is not 1; that is not read.")


# --- Gemma 3 ----------------------------------------------------------------------------------------------------------


def _second(repository: Repository, sae_id: str) -> Foreign:
    if _SEVERAL_LAYERS.fullmatch(sae_id) or re.search(r"(^|/)transcoder", sae_id):
        raise InputError(f"{repository.source}/{sae_id} has no exact counterpart: {_ELSEWHERE}.")
    place = _second_place(repository, sae_id)
    path = repository.file(f"{sae_id}/params.safetensors")
    header = {re.sub("^w_", "W_", name): entry for name, entry in entries(path).items()}
    if "affine_skip_connection" in header:
        raise InputError(f"{path} has no exact counterpart: it adds a linear map of its input.")
    check_shapes(header, _shapes(header, str(path)), str(path))
    found = {re.sub("^w_", "W_", name): tensor for name, tensor in safetensors_of(path).items()}
    return _foreign("Gemma Scope 2", sae_id, path, found, place, EVERY_TOKEN)


def _second_place(repository: Repository, sae_id: str) -> _Place:
    """From the config, or where there is none from the folder's name."""
    name = f"{sae_id}/config.json"
    if name not in repository.names():
        return _place_by_folder(repository, sae_id)
    config = repository.json(name)
    _check_config(config, f"{repository.source}/{name}")
    return _place_of(str(config.get("hf_hook_point_in") or ""), _model_name(str(config.get("model_name") or "")), ())


def _place_by_folder(repository: Repository, sae_id: str) -> _Place:
    sites = {
        "resid_post": "output",
        "attn_out": "self_attn.o_proj.input",
        "mlp_out": "post_feedforward_layernorm.output",
    }
    found = re.search(rf"({'|'.join(sites)})(?:_all)?/layer_(\d+)_", full_name(repository, sae_id))
    if not found:
        raise InputError(
            f"{repository.source}/{sae_id} has no config.json, and no folder above it is called {', '.join(sites)}: "
            "what it reads is not known."
        )
    model = re.findall(r"gemma-scope-2-(\w+-(?:pt|it))", full_name(repository, sae_id))
    note = f"There is no config.json: the site {found[1]}, the layer and the model are taken from the folders' names."
    path = f"model.layers.{found[2]}.{sites[found[1]]}"
    return _place_of(path, _model_name(f"gemma-3-{model[-1]}") if model else "", (note,))


def _place_of(path: str, model: str, notes: tuple[str, ...]) -> _Place:
    if heads := re.fullmatch(r"model\.layers\.(\d+)\.self_attn\.o_proj\.input", path):
        return _heads(heads[1], model, notes)
    hook_point = from_module_path(path)
    if hook_point is None and path:
        raise InputError(f"{path} is not a module's output, and no other place of Gemma Scope 2 is known.")
    return _Place(hook_point or "", model, notes if hook_point else (*notes, "The config names no hook point."))


def _check_config(config: Any, origin: str) -> None:
    if not isinstance(config, dict):
        raise InputError(f"{origin} is not the config of an SAE: it is not a JSON object.")
    if config.get("architecture") != "jump_relu":
        raise InputError(f"{origin}: architecture {config.get('architecture')!r} is unknown; jump_relu is read.")
    if config.get("affine_connection"):
        raise InputError(f"{origin} has no exact counterpart: it adds a linear map of its input.")
    if config.get("hf_hook_point_out") not in (None, config.get("hf_hook_point_in")):
        raise InputError(f"{origin} has no exact counterpart: {_ELSEWHERE}.")


def _model_name(name: str) -> str:
    """`google/gemma-3-4b-pt`; configs say gemma-v3 at times, and the 270m base model's name has no -pt."""
    name = name.replace("gemma-v3", "gemma-3")
    name = name.removesuffix("-pt") if "270m" in name else name
    return name if "/" in name or not name else f"google/{name}"


# --- both -------------------------------------------------------------------------------------------------------------


def _shapes(found: Found, origin: str) -> dict[str, tuple[int, ...]]:
    d_in, d_sae = matrix_shape(found, "W_enc", origin)
    return {
        "W_enc": (d_in, d_sae),
        "W_dec": (d_sae, d_in),
        "b_enc": (d_sae,),
        "b_dec": (d_in,),
        "threshold": (d_sae,),
    }


def _foreign(name: str, sae_id: str, path: Path, found: Found, place: _Place, policy: TokenPolicy) -> Foreign:
    shapes = _shapes(found, str(path))
    tensors = weights(found, shapes, str(path), ignored=("scaling_factor",))
    d_in, d_sae = shapes["W_enc"]
    config = configured(
        str(path),
        d_in=d_in,
        d_sae=d_sae,
        architecture="jumprelu",
        hook_point=place.hook_point,
        model_name=place.model_name,
        token_policy=policy,
        extra=stored_as(found["W_enc"]),
    )
    names = ("W_enc", "b_enc", "W_dec", "b_dec", "threshold")
    sae = folded(config, *(tensors[name] for name in names), subtracted=0.0)
    return Foreign(name, sae_id, sae, *_theirs(tensors), notes=place.notes)


def _theirs(tensors: dict[str, Tensor]) -> Equations:
    """Gemma Scope's own equations."""

    def encode(x: Tensor) -> Tensor:
        h = x @ tensors["W_enc"] + tensors["b_enc"]
        return h.relu() * (h > tensors["threshold"])

    return encode, affine(tensors["W_dec"], tensors["b_dec"])


FORMAT = Format("Gemma Scope", find, read)
