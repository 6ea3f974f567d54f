"""Encoding alone: which latents of a TopK SAE are active on each token, ours and the peers', and a few chosen latents.

    python scripts/bench_encode.py --shapes small,wide --tuned --json bench-results/encode.json

Every implementation encodes the same batch with the same random weights and gives what its own code gives: SAELens a
full matrix, sparsify and ours the active entries. A chosen latent of a TopK SAE needs all pre-activations of its token,
unless the codes were stored; both are measured.
"""

import argparse
import sys
from collections.abc import Callable
from typing import Any

import benchmark
import torch
from benchmark import ENCODER_GEMM, OURS, Record, Shape
from torch import Tensor

from safesail.sae import kernels
from safesail.sae.config import SaeConfig
from safesail.sae.model import Sae

STORED = "safesail, from stored codes"
Encoder = Callable[[Tensor], Any]


def encoders(shape: Shape, names: list[str]) -> dict[str, tuple[Encoder, Encoder]]:
    """For each name how it encodes x, and how it gives the columns of the chosen latents. x: (batch, d_in)."""
    W_dec = torch.nn.functional.normalize(torch.randn(shape.d_sae, shape.d_in), dim=1)
    chosen = torch.randperm(shape.d_sae)[: shape.d_sae // 64].sort().values
    makers = {OURS[False]: _ours(False), OURS[True]: _ours(True), "SAELens": _saelens, "sparsify": _sparsify}
    return {name: makers[name](shape, W_dec, chosen) for name in names}


def _ours(compiled: bool) -> Callable[[Shape, Tensor, Tensor], tuple[Encoder, Encoder]]:
    def make(shape: Shape, W_dec: Tensor, chosen: Tensor) -> tuple[Encoder, Encoder]:
        sae = our_sae(shape, W_dec)

        def encode(x: Tensor) -> Any:
            kernels.use(compiled)
            return sae.encode_sparse(x)

        column = _columns(shape, chosen)
        return encode, lambda x: _pick(encode(x), column, len(chosen))

    return make


def our_sae(shape: Shape, W_dec: Tensor) -> Sae:
    """A TopK SAE with tied weights and no biases. W_dec: (d_sae, d_in)."""
    config = SaeConfig(d_in=shape.d_in, d_sae=shape.d_sae, k=shape.k, hook_point="layers.0.mlp")
    return Sae(config, W_dec.T.contiguous(), torch.zeros(shape.d_sae), W_dec, torch.zeros(shape.d_in))


def _saelens(shape: Shape, W_dec: Tensor, chosen: Tensor) -> tuple[Encoder, Encoder]:
    package = benchmark.module_of("saelens")
    sae = package.TopKSAE(package.TopKSAEConfig(d_in=shape.d_in, d_sae=shape.d_sae, k=shape.k))
    sae.W_dec.data, sae.W_enc.data = W_dec, W_dec.T.contiguous()
    return sae.encode, lambda x: sae.encode(x)[:, chosen]


def _sparsify(shape: Shape, W_dec: Tensor, chosen: Tensor) -> tuple[Encoder, Encoder]:
    package = benchmark.module_of("sparsify")
    config = package.SparseCoderConfig(num_latents=shape.d_sae, k=shape.k)
    sae = package.SparseCoder(shape.d_in, config, dtype=torch.float32)
    sae.encoder.weight.data, column = W_dec.clone(), _columns(shape, chosen)

    def pick(x: Tensor) -> Tensor:
        values, indices, _ = sae.encode(x)
        out = values.new_zeros(len(x), len(chosen) + 1)
        return out.scatter_(1, column[indices], values)[:, :-1]

    return sae.encode, pick


def _columns(shape: Shape, chosen: Tensor) -> Tensor:
    """The column of each latent among the chosen ones; those not chosen share one column after the last."""
    column = torch.full((shape.d_sae,), len(chosen))
    column[chosen] = torch.arange(len(chosen))
    return column


def _pick(codes: Any, column: Tensor, n: int) -> Tensor:
    """The chosen latents of sparse codes as a matrix: (n_tokens, n)."""
    wanted = column[codes.indices.long()]
    keep = wanted < n
    out = codes.values.new_zeros(codes.n_tokens, n)
    out[codes.tokens()[keep], wanted[keep]] = codes.values[keep]
    return out


@torch.no_grad()
def measure_encoding(shape: Shape, names: list[str], rounds: int) -> list[Record]:
    """Two tables: all latents of a batch, and one latent in 64."""
    torch.manual_seed(0)
    x = torch.randn(shape.batch, shape.d_in)
    made = encoders(shape, names)
    functions = {ENCODER_GEMM: benchmark.encoder_gemm(x, shape.d_sae)}
    functions |= {name: lambda encode=encode: encode(x) for name, (encode, _) in made.items()}
    records = benchmark.time_records("encoding", shape, benchmark.interleave(functions, rounds))
    chosen = {name: lambda pick=pick: pick(x) for name, (_, pick) in made.items()} | _stored(shape, x)
    title = f"{shape.d_sae // 64} chosen latents"
    return records + benchmark.time_records(title, shape, benchmark.interleave(chosen, rounds))


def _stored(shape: Shape, x: Tensor) -> dict[str, Callable[[], object]]:
    sae = our_sae(shape, torch.randn(shape.d_sae, shape.d_in))
    chosen = torch.randperm(shape.d_sae)[: shape.d_sae // 64].sort().values
    codes, column = sae.encode_sparse(x).active(), _columns(shape, chosen)
    return {STORED: lambda: _pick(codes, column, len(chosen))}


def measure(arguments: argparse.Namespace) -> list[Record]:
    """The records of all shapes."""
    shapes = benchmark.shapes_wanted(arguments.shapes)
    names = benchmark.names_wanted(arguments.kernels, arguments.peers)
    return [record for shape in shapes for record in measure_encoding(shape, names, arguments.rounds)]


def main() -> int:
    parser = argparse.ArgumentParser(description="Compare our encoding with the peers'.")
    benchmark.add_common_options(parser)
    benchmark.add_implementation_options(parser)
    return benchmark.run_script(parser, measure)


if __name__ == "__main__":
    sys.exit(main())
