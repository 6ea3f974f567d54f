"""safesail: train, select, explain, score and publish safety sparse autoencoders, and inspect tokens with them.

>>> from safesail import Sae, NeuronDatabase, Inspector
>>> sae = Sae.from_pretrained("runs/demo/saes", "layers.9.mlp")

Names are imported when first used, so that `import safesail` is immediate.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["Inspector", "NeuronDatabase", "Recipe", "RewardInspector", "Run", "Sae", "SaeConfig", "__version__"]

_HOMES = {
    "Inspector": "safesail.diagnosis.inspector",
    "NeuronDatabase": "safesail.neurons",
    "Recipe": "safesail.recipe",
    "RewardInspector": "safesail.rewards.inspector",
    "Run": "safesail.run",
    "Sae": "safesail.sae.model",
    "SaeConfig": "safesail.sae.config",
}

if TYPE_CHECKING:
    from safesail.diagnosis.inspector import Inspector
    from safesail.neurons import NeuronDatabase
    from safesail.recipe import Recipe
    from safesail.rewards.inspector import RewardInspector
    from safesail.run import Run
    from safesail.sae.config import SaeConfig
    from safesail.sae.model import Sae


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'safesail' has no attribute {name!r}")
