"""The SAEs: their config, metrics, card and the headers of their weights say the same; no weights are read."""

from typing import Any

from safesail.errors import InputError
from safesail.release.checks.finding import Looked, close, unlike
from safesail.release.checks.part import Part, ReleaseConfig
from safesail.repository import Repository
from safesail.sae.config import SaeConfig

__all__ = ["config", "metrics", "model_index", "tensor_shapes", "weights"]

Row = dict[str, Any]
Tensors = dict[str, tuple[str, tuple[int, ...]]]
"""{name: (dtype, shape)}, dtypes in the words of safetensors."""
_DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16", "float64": "F64"}


def config(part: Part) -> Looked:
    """config.json is whole: every selected SAE is listed, marked, and at its hook point."""
    try:
        config = part.config
    except InputError as error:
        return Looked("", [str(error)])
    problems = [f"config.json selects {id}, which it does not list." for id in _unlisted(config)]
    problems += [f"{id} is selected for {name}." for name, id in config.selected.items() if not id.startswith(name)]
    chosen = set(config.selected.values())
    wrong = [id for id, row in config.by_id.items() if bool(row.get("selected")) != (id in chosen)]
    problems += [f"{id} is {'not ' * (id in chosen)}marked as selected, against `selected`." for id in wrong]
    folders = {name.rpartition("/")[0] for name in part.there if name.endswith("/cfg.json")}
    problems += [f"config.json does not list {id}." for id in sorted(folders - config.by_id.keys())]
    return Looked(f"{len(config.saes)} SAEs, {len(config.selected)} selected", problems)


def _unlisted(config: ReleaseConfig) -> list[str]:
    return [id for id in config.selected.values() if id not in config.by_id]


def metrics(part: Part) -> Looked:
    """Every SAE's metrics.json says what config.json says of it."""
    problems, n = [], 0
    for id, row in part.config.by_id.items():
        numbers = {key: value for key, value in row.items() if key not in ("id", "selected")}
        if not numbers and f"{id}/metrics.json" not in part.there:
            continue
        try:
            said = part.repository.json(f"{id}/metrics.json")
        except InputError as error:
            problems.append(str(error))
            continue
        n += len(numbers)
        if not isinstance(said, dict) or not isinstance(said.get("metrics"), dict):
            problems.append(f"{id}/metrics.json has no metrics.")
            continue
        problems += unlike(f"{id}/metrics.json", said["metrics"], numbers, "config.json")
        if said.get("definitions") != part.config.definitions:
            problems.append(f"{id}/metrics.json has other definitions than config.json.")
    return Looked(f"{n} numbers", problems)


def weights(part: Part) -> Looked:
    """cfg.json is valid and belongs to its folder; the tensors have its shapes and dtype, by their headers alone."""
    problems = []
    for id in part.config.by_id:
        try:
            config = part.sae_config(id)
            if config.hook_point != id.rpartition("/")[0]:
                problems.append(f"{id}/cfg.json is of the hook point {config.hook_point}.")
            problems += _tensor_problems(part, id, config)
        except InputError as error:
            problems.append(str(error))
    return Looked(f"headers of {len(part.config.saes)} SAEs", problems)


def _tensor_problems(part: Part, id: str, config: SaeConfig) -> list[str]:
    n, d, dtype = config.d_sae, config.d_in, _DTYPES.get(config.dtype, config.dtype)
    expected = {"W_enc": (d, n), "b_enc": (n,), "W_dec": (n, d), "b_dec": (d,)}
    expected |= {"threshold": (n,)} if config.has_threshold else {}
    problems = _header_problems(part, f"{id}/sae_weights.safetensors", expected, dtype)
    if f"{id}/sparsity.safetensors" in part.there:
        problems += _header_problems(part, f"{id}/sparsity.safetensors", {"sparsity": (n,)}, "F32")
    return problems


def _header_problems(part: Part, name: str, expected: dict[str, tuple[int, ...]], dtype: str) -> list[str]:
    found, problems = _header(part.repository, name), []
    for tensor, shape in expected.items():
        if tensor not in found:
            problems.append(f"{name} has no tensor {tensor}.")
        elif found[tensor][1] != shape:
            problems.append(f"{name}: {tensor} is {found[tensor][1]}, its cfg.json says {shape}.")
        elif found[tensor][0] not in (dtype, "F32" if tensor == "threshold" else dtype):
            problems.append(f"{name}: {tensor} is {found[tensor][0]}, its cfg.json says {dtype}.")
    return problems


def tensor_shapes(part: Part, name: str) -> dict[str, tuple[int, ...]]:
    """{tensor: shape} of a safetensors file, by its header alone."""
    return {tensor: shape for tensor, (_, shape) in _header(part.repository, name).items()}


def _header(repository: Repository, name: str) -> dict[str, tuple[str, tuple[int, ...]]]:
    """{tensor: (dtype, shape)} of a safetensors file; of one on the Hub its first bytes alone are read."""
    from safetensors import SafetensorError, safe_open

    if repository.folder is None:
        return _header_on_the_hub(repository, name)
    try:
        with safe_open(repository.file(name), framework="pt") as handle:
            slices = {key: handle.get_slice(key) for key in handle.keys()}  # noqa: SIM118
            return {key: (part.get_dtype(), tuple(part.get_shape())) for key, part in slices.items()}
    except (SafetensorError, OSError) as error:
        raise InputError(f"{name} is not a readable safetensors file ({error}).") from error


def _header_on_the_hub(repository: Repository, name: str) -> dict[str, tuple[str, tuple[int, ...]]]:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, NotASafetensorsRepoError, SafetensorsParsingError

    where = {"repo_type": repository.repo_type, "revision": repository.revision, "token": repository.token}
    try:
        found = HfApi(library_name="safesail").parse_safetensors_file_metadata(repository.source, name, **where)
    except (SafetensorsParsingError, NotASafetensorsRepoError) as error:
        raise InputError(f"{name} is not a readable safetensors file ({error}).") from error
    except (HfHubHTTPError, OSError) as error:
        raise InputError(f"{name} of {repository.source} could not be read from the Hub: {error}") from error
    return {key: (info.dtype, tuple(info.shape)) for key, info in found.tensors.items()}


def model_index(part: Part) -> Looked:
    """The numbers in the card's model-index are those of config.json, as far as they are printed (six digits)."""
    results = [result for entry in part.front.get("model-index") or [] for result in entry.get("results") or []]
    printed = [metric for result in results for metric in result.get("metrics") or []]
    if not printed:
        raise InputError("the card has no model-index.")
    problems, seen = [], set()
    for metric in printed:
        id = next((name for name in part.config.by_id if name in str(metric.get("name"))), None)
        key = str(metric.get("type")).partition("/")[0]
        value = part.config.by_id[id].get(key) if id else None
        if value is None:
            problems.append(f"the model-index has {metric.get('name')!r}, which is not in config.json.")
        elif not close(metric.get("value"), value, 5e-6 * abs(value)):
            problems.append(f"the model-index has {metric['name']} = {metric['value']}, config.json {value:.6g}.")
        seen.add(id)
    problems += [f"the model-index says nothing of {id}." for id in part.config.selected.values() if id not in seen]
    return Looked(f"{len(printed)} numbers", problems)
