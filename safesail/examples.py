"""The top-activating contexts of a release's neurons, read one neuron at a time.

They hold offensive text, so that on the Hub their repository is gated: a reader needs a token whose owner accepted its
conditions. A release may also come without them.
"""

from pathlib import Path
from typing import Any, NamedTuple

from safesail.errors import InputError
from safesail.repository import Repository, part_of_release

__all__ = ["Example", "Examples"]

_TABLE = "examples/train.parquet"
_COLUMNS = ["stratum", "rank", "tokens", "activations", "source"]


class Example(NamedTuple):
    """A context in which a neuron fires, or nearly so."""

    stratum: str
    """`top`, `level-3` (drawn from the third tenth of the normaliser) or `near-miss`."""
    tokens: list[str]
    activations: list[float]
    """One per token, in the activation's own units."""
    source: str
    """Where the text is from."""


class Examples:
    """The examples of a release: a run folder, the Hub name its repositories start with, or the part itself.

    Keyword arguments (`revision`, `token`, `cache_dir`, …) mean what they mean in transformers. Nothing is read before
    a neuron is asked for.
    """

    def __init__(self, release: str | Path, **kwargs: Any) -> None:
        self.source = part_of_release(release, "examples")
        self._hub = kwargs

    def of(self, neuron_id: str) -> list[Example]:
        """The examples of one neuron, strongest first; InputError when the release has none or does not show them."""
        import pyarrow.parquet as pq

        path = self._path()
        try:
            table = pq.read_table(path, columns=_COLUMNS, filters=[("neuron_id", "=", neuron_id)])
        except (OSError, ValueError) as error:
            raise InputError(f"{path} is no readable table of examples ({error}); fetch or build it again.") from error
        rows = sorted(table.to_pylist(), key=lambda row: (-max(row["activations"], default=0.0), row["rank"]))
        return [Example(row["stratum"], row["tokens"], row["activations"], row["source"]) for row in rows]

    def _path(self) -> Path:
        repository = Repository(self.source, "dataset", **self._hub)  # each time anew: access may be given meanwhile
        if repository.folder is not None and not (repository.folder / _TABLE).is_file():
            raise InputError("this release comes without its examples.")
        return repository.file(_TABLE)
