"""Per-token normalisation: what it does and that it is undone."""

import pytest
import torch

from safesail.sae.config import SaeConfig
from safesail.sae.model import Sae
from safesail.sae.norm import norm_of

X = torch.tensor([[1.0, 2.0, 3.0], [10.0, -10.0, 0.0], [4.0, 4.0, 7.0]])


def test_layer_norm_by_hand():
    norm = norm_of(X, "layer_norm")
    expected = torch.tensor([[-1.0, 0.0, 1.0], [1.0, -1.0, 0.0], [-(3**-0.5), -(3**-0.5), 2 * 3**-0.5]])
    torch.testing.assert_close(norm.apply(X), expected, atol=2e-5, rtol=0)
    torch.testing.assert_close(norm.undo(norm.apply(X)), X, atol=1e-4, rtol=0)


def test_constant_norm_by_hand():
    norm = norm_of(X, "constant_norm_rescale")
    assert norm.apply(X).norm(dim=1).tolist() == pytest.approx([3**0.5] * 3)
    torch.testing.assert_close(norm.undo(norm.apply(X)), X)


def test_a_token_of_zeros_stays_one():
    assert norm_of(torch.zeros(1, 3), "constant_norm_rescale").apply(torch.zeros(1, 3)).tolist() == [[0, 0, 0]]
    assert norm_of(torch.zeros(1, 3), "layer_norm").apply(torch.zeros(1, 3)).tolist() == [[0, 0, 0]]


@pytest.mark.parametrize("kind", ["none", "layer_norm", "constant_norm_rescale"])
def test_an_sae_normalises_and_undoes_it(kind: str):
    """One latent per direction of the identity: what was normalised and read comes back."""
    config = SaeConfig.model_validate(
        {"d_in": 3, "d_sae": 6, "k": 6, "hook_point": "layers.0", "normalize_activations": kind}
    )
    both = torch.cat([torch.eye(3), -torch.eye(3)])
    sae = Sae(config, both.T.contiguous(), torch.zeros(6), both, torch.zeros(3))
    torch.testing.assert_close(sae(X), X, atol=1e-4, rtol=0)
    latents = sae.encode(X)
    normalised = norm_of(X, kind).apply(X)
    torch.testing.assert_close(latents, torch.cat([normalised, -normalised], 1).relu())
    torch.testing.assert_close(sae.decode(latents, like=X), X, atol=1e-4, rtol=0)
    torch.testing.assert_close(sae(X.reshape(3, 1, 3)), X.reshape(3, 1, 3), atol=1e-4, rtol=0)
    assert SaeConfig.from_json(config.to_json(), "cfg.json") == config
