"""Our training step and the peers', interleaved in one process: time, memory, AuxK, a sweep, quality at equal tokens.

    python scripts/bench_train.py --shapes small,wide --tuned --json bench-results/train.json
    python scripts/bench_train.py --aux --sweep runs/demo/scratch/harvest --quality runs/demo/scratch/harvest

A step is all that changes the weights: forward, backward, clipping where an implementation clips, Adam, unit-norm
decoder rows where it keeps them, and its count of silent latents. Batches are in memory; no step loads data. The floor
is the encoder's matrix product alone, which every exact TopK step needs.
"""

import argparse
import functools
import importlib
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import benchmark
import torch
from benchmark import ENCODER_GEMM, OURS, Record, Shape
from torch import Tensor

from safesail.errors import InputError
from safesail.lm.activations import Activations
from safesail.metrics import explained_variance
from safesail.recipe import TokenPolicy, TrainSection
from safesail.sae import kernels
from safesail.sae.config import SaeConfig
from safesail.training.step import SaeTrainer

_NEVER = 1 << 60
_SWEEP = (8, 16, 32, 64, 128, 200)
_BLOCK = 4096


class Options(NamedTuple):
    """What one training run is told; None: the implementation's own default."""

    n_steps: int = 10_000
    learning_rate: float | None = None
    aux: bool = False
    """Whether sparsify adds AuxK, which it leaves out by default; the others always have it."""
    dead_after: int = _NEVER
    """Tokens after which a latent of ours is dead; the peers keep their defaults."""


class Implementation(Protocol):
    """One SAE in training."""

    learning_rate: float
    aux_k: int

    def step(self, x: Tensor) -> object: ...

    def mark_dead(self, n: int) -> None:
        """Let the first n latents, and no others, count as dead in the next step."""

    def reconstruct(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x_hat and which latents fire at all. x: (n, d_in) → (n, d_in), bool (d_sae,)."""
        ...


class Ours:
    """safesail's step, in plain torch or with the compiled kernels."""

    def __init__(self, shape: Shape, options: Options, mean: Tensor, *, compiled: bool) -> None:
        given: dict[str, Any] = {"learning_rate": options.learning_rate} if options.learning_rate else {}
        section = TrainSection(
            d_sae=shape.d_sae, k=(shape.k,), batch_size=shape.batch, dead_after_tokens=options.dead_after, **given
        )
        config = SaeConfig(d_in=shape.d_in, d_sae=shape.d_sae, k=shape.k, hook_point="layers.0.mlp")
        self.trainer = SaeTrainer(config, section, mean, 0, options.n_steps)
        self.learning_rate, self.aux_k = section.learning_rate, section.aux_k
        self._dead_after, self._compiled = options.dead_after, compiled

    def step(self, x: Tensor) -> object:
        kernels.use(self._compiled)
        return self.trainer.step(x)

    def mark_dead(self, n: int) -> None:
        self.trainer.silent_for.zero_()
        self.trainer.silent_for[:n] = self._dead_after + 1

    def reconstruct(self, x: Tensor) -> tuple[Tensor, Tensor]:
        sae = self.trainer.finish(1.0)
        codes = sae.encode_sparse(x).active()
        return sae.decode_sparse(codes), _fired(codes.indices, self.trainer.config.d_sae)


@functools.cache
def _saelens() -> tuple[Any, Any, Any]:
    """SAELens' package, trainer settings and trainer."""
    package = benchmark.module_of("saelens")
    settings = importlib.import_module("sae_lens.config").SAETrainerConfig
    return package, settings, importlib.import_module("sae_lens.training.sae_trainer").SAETrainer


class SaeLens:
    """SAELens' own `SAETrainer.step` on its `TopKTrainingSAE`, with its defaults; the rate decays in the last fifth.

    It clips at a gradient norm of 1. Its top-k sees activations times decoder norms, so it renormalises no decoder.
    Its option use_sparse_activations is off, as by default: on a CPU its backward pass fails beside those norms.
    """

    def __init__(self, shape: Shape, options: Options, _mean: Tensor) -> None:
        package, settings_class, trainer_class = _saelens()
        given: dict[str, Any] = {"lr": options.learning_rate} if options.learning_rate else {}
        settings = settings_class(
            total_training_samples=options.n_steps * shape.batch,
            train_batch_size_samples=shape.batch,
            lr_decay_steps=options.n_steps // 5,
            **given,
        )
        self.sae = package.TopKTrainingSAE(package.TopKTrainingSAEConfig(d_in=shape.d_in, d_sae=shape.d_sae, k=shape.k))
        settings.lr_end = settings.lr / 10  # as its runner sets it; a constant rate ignores it
        self.trainer = trainer_class(settings, self.sae, iter(()))
        self.learning_rate, self.aux_k = settings.lr, shape.d_in // 2

    def step(self, x: Tensor) -> object:
        output = self.trainer.step(x)
        self.trainer.n_training_steps += 1  # as its `fit` does after every step
        return output

    def mark_dead(self, n: int) -> None:
        self.trainer.n_forward_passes_since_fired.zero_()
        self.trainer.n_forward_passes_since_fired[:n] = self.trainer.cfg.dead_feature_window + 1

    @torch.no_grad()
    def reconstruct(self, x: Tensor) -> tuple[Tensor, Tensor]:
        latents = self.sae.encode(x)
        return self.sae.decode(latents), (latents > 0).any(0)


class Sparsify:
    """sparsify's `SparseCoder` and Adam, in the order of its `Trainer.fit`, whose step lives inside a model's hook.

    Decoder rows to unit norm, forward, backward, the gradient's part along the decoder rows removed, Adam, schedule,
    counts of silence. It does not clip. Its Adam is torch's where bitsandbytes is missing, as on a CPU.
    """

    def __init__(self, shape: Shape, options: Options, mean: Tensor) -> None:
        package = benchmark.module_of("sparsify")
        config = package.SparseCoderConfig(num_latents=shape.d_sae, k=shape.k)
        self.defaults = package.TrainConfig(config, auxk_alpha=1 / 32 if options.aux else 0.0)
        self.sae = package.SparseCoder(shape.d_in, config, dtype=torch.float32)
        self.sae.b_dec.data = mean.clone()
        self.learning_rate = options.learning_rate or 2e-4 / (shape.d_sae / 2**14) ** 0.5  # its rule
        self.aux_k = shape.d_in // 2
        self.optimizer = torch.optim.Adam([{"params": self.sae.parameters(), "lr": self.learning_rate}])
        # its default of 1000 steps would be the whole of a short run
        warm_up = min(self.defaults.lr_warmup_steps, options.n_steps // 20)
        linear = importlib.import_module("transformers").get_linear_schedule_with_warmup
        self.schedule = linear(self.optimizer, warm_up, options.n_steps)
        self.silent_for = torch.zeros(shape.d_sae, dtype=torch.long)

    def step(self, x: Tensor) -> object:
        self.sae.set_decoder_norm_to_unit_norm()
        alpha = self.defaults.auxk_alpha
        dead = self.silent_for > self.defaults.dead_feature_threshold if alpha > 0 else None
        out = self.sae(x=x, y=x, dead_mask=dead, total_variance=(x - x.mean(0)).pow(2).sum())
        fired = _fired(out.latent_indices.flatten(), len(self.silent_for))
        (out.fvu + alpha * out.auxk_loss + out.multi_topk_fvu / 8).backward()
        self.sae.remove_gradient_parallel_to_decoder_directions()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.schedule.step()
        self.silent_for += len(x)
        self.silent_for[fired] = 0
        return out

    def mark_dead(self, n: int) -> None:
        self.silent_for.zero_()
        self.silent_for[:n] = self.defaults.dead_feature_threshold + 1

    @torch.no_grad()
    def reconstruct(self, x: Tensor) -> tuple[Tensor, Tensor]:
        values, indices, _ = self.sae.encode(x)
        return self.sae.decode(values, indices), _fired(indices[values > 0], len(self.silent_for))


IMPLEMENTATIONS: dict[str, Callable[[Shape, Options, Tensor], Implementation]] = {
    OURS[False]: functools.partial(Ours, compiled=False),
    OURS[True]: functools.partial(Ours, compiled=True),
    "SAELens": SaeLens,
    "sparsify": Sparsify,
}


def _fired(indices: Tensor, d_sae: int) -> Tensor:
    fired = torch.zeros(d_sae, dtype=torch.bool)
    fired[indices.long()] = True
    return fired


def _batches(shape: Shape, n: int = 4) -> list[Tensor]:
    """Random batches whose rows have the mean norm √d_in, as scaled activations do: n times (batch, d_in)."""
    source = torch.Generator().manual_seed(0)
    return [torch.randn(shape.batch, shape.d_in, generator=source) for _ in range(n)]


# the step


def measure_steps(shape: Shape, names: list[str], rounds: int) -> list[Record]:
    """The table of step times, with the encoder GEMM as the floor."""
    batches = _batches(shape)
    functions = {ENCODER_GEMM: benchmark.encoder_gemm(batches[0], shape.d_sae)}
    for name in names:
        functions[name] = _stepper(IMPLEMENTATIONS[name](shape, Options(), batches[0].mean(0)), batches)
    return benchmark.time_records("training step", shape, benchmark.interleave(functions, rounds))


def _stepper(implementation: Implementation, batches: list[Tensor], n_dead: int | None = None) -> Callable[[], object]:
    """A function that takes the next step; every call sees another batch."""
    state = {"next": 0}

    def step() -> object:
        x = batches[state["next"] % len(batches)]
        state["next"] += 1
        if n_dead is not None:
            implementation.mark_dead(n_dead)
        return implementation.step(x)

    return step


def measure_aux(shape: Shape, names: list[str], rounds: int) -> list[Record]:
    """Steps with a third of the latents counted as dead against steps with none, on the same SAE."""
    batches, records = _batches(shape), []
    functions, aux_k = {}, {}
    for name in names:
        sae = IMPLEMENTATIONS[name](shape, Options(aux=True), batches[0].mean(0))
        functions[name] = _stepper(sae, batches, 0)
        functions[f"{name}, dead"] = _stepper(sae, batches, shape.d_sae // 3)
        aux_k[name] = sae.aux_k
    seconds = benchmark.interleave(functions, rounds)
    for name in names:
        alive, dead = benchmark.median_ms(seconds[name]), benchmark.median_ms(seconds[f"{name}, dead"])
        numbers = {"milliseconds": alive, "dead_milliseconds": dead, "added": dead / alive - 1, "aux_k": aux_k[name]}
        records.append({"table": "AuxK, a third of the latents dead", "case": str(shape), "name": name, **numbers})
    return records


# memory


def least_mib(shape: Shape) -> float:
    """MiB of parameters, Adam's two moments, gradients and one pre-activation buffer, all fp32."""
    parameters = 2 * shape.d_in * shape.d_sae + shape.d_sae + shape.d_in
    return 4 * (4 * parameters + shape.batch * shape.d_sae) / 2**20


def measure_memory(shape: Shape, names: list[str]) -> list[Record]:
    """Peak resident memory of three steps above the imports and one batch, each in a fresh process."""
    records = []
    for name in names:
        command = [sys.executable, __file__, "--memory-of", name, "--shapes", "x".join(map(str, shape))]
        threads = ["--threads", str(torch.get_num_threads())]
        run = subprocess.run([*command, *threads], check=True, stdout=subprocess.PIPE, text=True)
        measured = json.loads(run.stdout.splitlines()[-1])
        numbers = {**measured, "bound_mib": least_mib(shape), "times_bound": measured["peak_mib"] / least_mib(shape)}
        records.append({"table": "peak memory of training", "case": str(shape), "name": name, **numbers})
    return records


def print_memory(shape: Shape, name: str) -> None:
    """What the fresh process does: print as JSON its peak memory above the imports and the batch.

    A step of a tiny SAE comes first: torch imports its compiler at the first optimizer step, the compiled kernels are
    made or read at the first call. What that takes is a number of its own, for it does not grow with the SAE.
    """
    if name in ("SAELens", "sparsify"):
        benchmark.module_of(name.lower())
    if name == "SAELens":
        _saelens()
    x = _batches(shape, 1)[0]
    first = benchmark.peak_memory(lambda: _take_steps(name, Shape(8, 32, 2, 16), _batches(Shape(8, 32, 2, 16), 1)[0]))
    memory = benchmark.peak_memory(lambda: _take_steps(name, shape, x))
    print(json.dumps({"peak_mib": memory.above, "first_use_mib": memory.before - first.before}))


def _take_steps(name: str, shape: Shape, x: Tensor) -> None:
    step = _stepper(IMPLEMENTATIONS[name](shape, Options(), x.mean(0)), [x])
    for _ in range(3):
        step()


# real activations


class Data:
    """The counted activations of one hook point, scaled so that their mean norm is √d_in."""

    def __init__(self, folder: Path, hook_point: str) -> None:
        if not (folder / "harvest.json").is_file():
            raise InputError(f"{folder} holds no harvest; `bash scripts/demo` makes runs/demo/scratch/harvest.")
        self.activations, self.hook_point = Activations(folder), hook_point
        if hook_point not in self.activations.hook_points:
            known = ", ".join(self.activations.hook_points)
            raise InputError(f"{folder} has no hook point {hook_point}; it has {known}.")
        counted, held_out = self.activations.counted(hook_point, TokenPolicy()), self.activations.rows_held_out()
        self.counted = counted.nonzero().flatten()
        self.training, self.held_out = ((counted & rows).nonzero().flatten() for rows in (~held_out, held_out))
        order = torch.randperm(len(self.training), generator=torch.Generator().manual_seed(0))
        sample = self.activations.rows(hook_point, self.training[order[:16384]])
        self.scale = sample.shape[1] ** 0.5 / float(sample.norm(dim=1).mean())
        self.mean, self.d_in = sample.mean(0) * self.scale, sample.shape[1]

    def rows(self, indices: Tensor) -> Tensor:
        return self.activations.rows(self.hook_point, indices) * self.scale

    def batches(self, size: int, n: int) -> Iterator[Tensor]:
        """The first n batches of shuffled epochs, the same at every call."""
        source, order = torch.Generator().manual_seed(0), torch.empty(0, dtype=torch.long)
        for _ in range(n):
            if len(order) < size:
                order = self.training[torch.randperm(len(self.training), generator=source)]
            yield self.rows(order[:size])
            order = order[size:]


def measure_sweep(folder: Path | None, hook_point: str, names: list[str], rounds: int) -> list[Record]:
    """Six SAEs on the same batches, reading included, against their steps one SAE at a time, with one harvest each."""
    data = Data(folder, hook_point) if folder else None
    shape = Shape(data.d_in if data else 576, 4608, 0, 2048)
    harvest = _harvest_seconds(folder) if folder else 0.0
    n_batches = len(data.training) // shape.batch if data else 100
    records = []
    for name in (name for name in names if name in OURS.values()):
        parts, together = _sweep_seconds(data, shape, IMPLEMENTATIONS[name], rounds)
        one, six, at_once = (harvest + n_batches * s for s in (parts[_SWEEP.index(32)], sum(parts), together))
        rows = {"one SAE (k 32)": one, "sum of six SAEs' steps": six, "six SAEs in one go": at_once}
        case = f"{shape.d_in} → {shape.d_sae}, k {_SWEEP}, {n_batches} batches of {shape.batch}, {name}"
        case += f", each with one harvest of {harvest:.0f} s" if harvest else ""
        records += [
            {"table": "sweep", "case": case, "name": row, "seconds": seconds, "times_parts": seconds / six}
            for row, seconds in rows.items()
        ]
    return records


def _sweep_seconds(
    data: Data | None, shape: Shape, make: Callable[..., Implementation], rounds: int
) -> tuple[list[float], float]:
    """Median seconds a step of each SAE alone, and of one batch read and given to all six."""
    fixed = _batches(shape, 1)[0] if data is None else next(data.batches(shape.batch, 1))
    saes = [make(shape._replace(k=k), Options(), fixed.mean(0)) for k in _SWEEP]
    stream = data.batches(shape.batch, rounds + 2) if data else iter([fixed] * (rounds + 2))

    def together() -> None:
        x = next(stream)
        for sae in saes:
            sae.step(x)

    functions: dict[str, Callable[[], object]] = {str(i): _stepper(sae, [fixed]) for i, sae in enumerate(saes)}
    seconds = benchmark.interleave({**functions, "together": together}, rounds)
    medians = {name: benchmark.median_ms(values) / 1000 for name, values in seconds.items()}
    return [medians[str(i)] for i in range(len(saes))], medians["together"]


def _harvest_seconds(folder: Path) -> float:
    """What the run's ledger says the harvest took; 0 where the folder belongs to no run."""
    ledger = folder.parent.parent / "run.json"
    return json.loads(ledger.read_text(encoding="utf-8"))["stages"]["harvest"]["seconds"] if ledger.is_file() else 0.0


def measure_quality(data: Data, shape: Shape, names: list[str], n_steps: int) -> list[Record]:
    """EV on held-out rows and the share of latents that fire on no row, after training on the same batches.

    Each peer is trained at its own learning rate and, since a short run favours a high one, at ours as well.
    """
    records, ours = [], Options(n_steps, dead_after=TrainSection.model_fields["dead_after_tokens"].default)
    rate = TrainSection.model_fields["learning_rate"].default
    for name in names:
        for options in [ours] if name in OURS.values() else [ours, ours._replace(learning_rate=rate)]:
            torch.manual_seed(0)
            start, sae = time.perf_counter(), IMPLEMENTATIONS[name](shape, options, data.mean)
            for x in data.batches(shape.batch, n_steps):
                sae.step(x)
            seconds = time.perf_counter() - start
            print(f"trained {name} for {n_steps} steps in {seconds:.0f} s", file=sys.stderr, flush=True)
            numbers = {"learning_rate": sae.learning_rate, "seconds": seconds, **_fidelity(data, sae)}
            case = f"{data.hook_point}, {shape}, {n_steps} steps"
            row = f"{name}, our rate" if options.learning_rate else name
            records.append({"table": "quality at equal tokens", "case": case, "name": row, **numbers})
    return records


def _fidelity(data: Data, sae: Implementation) -> dict[str, float]:
    x = data.rows(data.held_out)
    x_hat = torch.cat([sae.reconstruct(block)[0] for block in x.split(_BLOCK)])
    fired = [sae.reconstruct(data.rows(indices))[1] for indices in data.counted.split(_BLOCK)]
    dead = ~torch.stack(fired).any(0)
    return {"explained_variance": explained_variance(x, x_hat), "dead": float(dead.float().mean())}


# the command line


def measure(arguments: argparse.Namespace) -> list[Record]:
    """The records of all tables that were asked for; those of step and memory if none was."""
    shapes = benchmark.shapes_wanted(arguments.shapes)
    names = benchmark.names_wanted(arguments.kernels, arguments.peers)
    records: list[Record] = []
    chosen = (arguments.step, arguments.memory, arguments.aux, arguments.sweep is not None, arguments.quality)
    nothing = not any(chosen)
    for shape in shapes:
        if arguments.step or nothing:
            records += measure_steps(shape, names, arguments.rounds)
        if arguments.memory or nothing:
            records += measure_memory(shape, names)
        if arguments.aux:
            records += measure_aux(shape, names, arguments.rounds)
    if arguments.sweep is not None:
        folder = Path(arguments.sweep) if arguments.sweep else None
        records += measure_sweep(folder, arguments.hook_point, names, arguments.rounds)
    if arguments.quality:
        data = Data(arguments.quality, arguments.hook_point)
        shape = Shape(data.d_in, arguments.d_sae, arguments.k, arguments.batch)
        records += measure_quality(data, shape, names, arguments.steps)
    return records


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Compare our training step with the peers'.")
    benchmark.add_common_options(parser)
    benchmark.add_implementation_options(parser)
    parser.add_argument("--step", action="store_true", help="step times (with --memory what is measured by default)")
    parser.add_argument("--memory", action="store_true", help="peak memory, each implementation in a fresh process")
    parser.add_argument("--aux", action="store_true", help="what AuxK adds with a third of the latents dead")
    parser.add_argument(
        "--sweep", nargs="?", const="", metavar="FOLDER", help="six SAEs in one go, on a harvest or on random data"
    )
    parser.add_argument("--quality", type=Path, metavar="FOLDER", help="EV and dead share on this harvest")
    parser.add_argument("--hook-point", default="layers.9.mlp", help="of --sweep and --quality")
    parser.add_argument("--k", type=int, default=32, help="of --quality (default 32)")
    parser.add_argument("--d-sae", type=int, default=4608, help="of --quality (default 4608)")
    parser.add_argument("--batch", type=int, default=2048, help="of --quality (default 2048)")
    parser.add_argument("--steps", type=int, default=300, help="of --quality (default 300)")
    parser.add_argument("--memory-of", choices=list(IMPLEMENTATIONS), help=argparse.SUPPRESS)
    return parser


def main() -> int:
    parser = _parser()
    arguments = parser.parse_args()
    if arguments.memory_of:
        torch.set_num_threads(arguments.threads)
        print_memory(benchmark.shapes_wanted(arguments.shapes)[0], arguments.memory_of)
        return 0
    return benchmark.run_script(parser, measure)


if __name__ == "__main__":
    sys.exit(main())
