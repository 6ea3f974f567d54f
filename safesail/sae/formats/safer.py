"""SAFER's SAE of a reward model: `stage1.pt` (trained on tokens) and `stage2.pt` (on ends of segments).

    x_n   = (x - mean(x)) / (std(x) + 1e-6)                             std unbiased
    h     = (x_n - pre_bias) encoder.weightᵀ + latent_bias
    f     = the k largest of h, of which the positive ones count
    x_hat = f decoder.weightᵀ + pre_bias, an x_n

encoder.weight: (d_sae, d_in), decoder.weight: (d_in, d_sae), k = 64. Ours divides by std(x) + 1e-5, as `layer_norm`
does everywhere else: its x_n is smaller by the share 9e-6 / std(x), which is below 1e-4 where std(x) exceeds 0.09.
"""

import re

from torch import Tensor

from safesail.repository import Repository
from safesail.sae.formats.archive import tensors
from safesail.sae.formats.checks import weights
from safesail.sae.formats.foreign import Foreign, Format, configured, folded
from safesail.sae.formats.suites import Equations, largest, matrix_shape

__all__ = ["FORMAT"]

K = 64
_FILE = re.compile(r"(.*/)?stage[12]\.pt")
_NOTES = (
    f"k = {K} and the hook point are taken from SAFER's code (hidden state 12, the output of the twelfth block of "
    "Llama-3.2-1B trained as a reward model); the file holds neither, nor the name of the reward model.",
    "Of the k largest pre-activations the negative ones are set to zero, as SAFER's scores have it; its training let "
    "them through.",
    "SAFER leaves reconstructions standardised; here they are brought back with the token's mean and std.",
    "SAFER standardises with an epsilon of 1e-6, ours has 1e-5: latents differ by the share 9e-6 / std(x).",
)


def find(repository: Repository, names: list[str]) -> list[str]:
    """The files of the two stages, as `SAE_models/stage2`."""
    return [name.removesuffix(".pt") for name in names if _FILE.fullmatch(name)]


def read(repository: Repository, sae_id: str) -> Foreign:
    """The SAE of one stage."""
    path = repository.file(f"{sae_id}.pt")
    found = tensors(path)
    d_sae, d_in = matrix_shape(found, "encoder.weight", str(path))
    shapes = {
        "encoder.weight": (d_sae, d_in),
        "decoder.weight": (d_in, d_sae),
        "pre_bias": (d_in,),
        "latent_bias": (d_sae,),
    }
    theirs = weights(found, shapes, str(path))
    config = configured(
        str(path), d_in=d_in, d_sae=d_sae, k=K, hook_point="layers.11", normalize_activations="layer_norm"
    )
    bias = theirs["pre_bias"]
    sae = folded(
        config, theirs["encoder.weight"].T, theirs["latent_bias"], theirs["decoder.weight"].T, bias, subtracted=bias
    )
    return Foreign("SAFER", sae_id, sae, *_theirs(theirs), notes=_NOTES)


def _theirs(found: dict[str, Tensor]) -> Equations:
    """SAFER's own equations."""

    def encode(x: Tensor) -> Tensor:
        standardised = (x - x.mean(dim=-1, keepdim=True)) / (x.std(dim=-1, keepdim=True) + 1e-6)
        z = largest((standardised - found["pre_bias"]) @ found["encoder.weight"].T + found["latent_bias"], K)
        return z * (z > 0)

    def decode(x: Tensor, latents: Tensor) -> Tensor:
        standardised = latents @ found["decoder.weight"].T + found["pre_bias"]
        return standardised * x.std(dim=-1, keepdim=True) + x.mean(dim=-1, keepdim=True)

    return encode, decode


FORMAT = Format("SAFER", find, read)
