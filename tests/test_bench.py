"""The benchmark scripts' arithmetic and command line. Nothing is timed, and no peer need be installed."""

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from safesail.errors import InputError
from safesail.training.step import StepFacts

SCRIPTS = Path(__file__).resolve().parent.parent / "scripts"
sys.path.insert(0, str(SCRIPTS))  # where the scripts find each other; it is no package

bench_encode, bench_harvest, bench_train, benchmark = map(
    importlib.import_module, ("bench_encode", "bench_harvest", "bench_train", "benchmark")
)
Shape = benchmark.Shape
SHAPE = Shape(d_in=6, d_sae=32, k=4, batch=200)


def run(script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """A benchmark script in an interpreter that finds neither peer."""
    code = (
        "import runpy, sys\n"
        "for name in ('sae_lens', 'sparsify'): sys.modules[name] = None\n"
        f"sys.path.insert(0, {str(SCRIPTS)!r}); sys.argv = {[script, *arguments]!r}\n"
        f"runpy.run_path({str(SCRIPTS / script)!r}, run_name='__main__')"
    )
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)


# arithmetic


def test_times_and_ratios_are_those_of_the_medians():
    seconds = {
        benchmark.ENCODER_GEMM: [0.1, 0.1, 0.3],
        "safesail, torch": [0.2, 9.0, 0.2],  # one slow round moves no median
        "SAELens": [0.8, 0.7, 0.9],
        "sparsify": [0.4, 0.4, 0.5],
    }
    rows = {row["name"]: row for row in benchmark.time_records("step", SHAPE, seconds)}
    ours = rows["safesail, torch"]
    assert ours["milliseconds"] == pytest.approx(200)
    assert ours["fastest_milliseconds"] == pytest.approx(200)
    assert ours["tokens_per_second"] == pytest.approx(1000)  # 200 tokens in 0.2 s
    assert ours["times_saelens"] == pytest.approx(4.0)  # 0.8 / 0.2
    assert ours["times_sparsify"] == pytest.approx(2.0)  # 0.4 / 0.2
    assert ours["gemm_share"] == pytest.approx(0.5)  # 0.1 / 0.2
    assert rows["SAELens"]["fastest_milliseconds"] == pytest.approx(700)
    assert rows["SAELens"]["times_saelens"] == 1.0


def test_without_a_peer_its_ratio_is_undefined_and_its_column_is_not_printed():
    records = benchmark.time_records("step", SHAPE, {"safesail, torch": [0.2], "SAELens": [0.8]})
    assert {record["times_sparsify"] for record in records} == {None}
    assert "× sparsify" not in benchmark.render(records)
    assert benchmark.ratio(None, 2.0) is None
    assert benchmark.ratio(1.0, 0.0) is None


def test_a_table_is_aligned_and_shows_a_missing_number_as_a_dash():
    records = [
        {"table": "step", "case": "tiny", "name": "a", "milliseconds": 1234.56, "times_bound": 1.2345},
        {"table": "step", "case": "tiny", "name": "longer", "milliseconds": 7.0, "times_bound": None},
    ]
    assert benchmark.render(records) == (
        "step: tiny\n"
        "\n"
        "|        | ms (median) | × least |\n"
        "| ------ | ----------: | ------: |\n"
        "| a      |     1,234.6 |    1.23 |\n"
        "| longer |         7.0 |       – |"
    )


def test_every_round_calls_each_function_once_and_begins_with_the_next_one():
    calls: list[str] = []
    functions = {name: lambda name=name: calls.append(name) for name in "abc"}
    seconds = benchmark.interleave(functions, rounds=2, warm_up=1)
    assert "".join(calls) == "abc" + "bca" + "cab"
    assert {name: len(values) for name, values in seconds.items()} == {"a": 2, "b": 2, "c": 2}


def test_the_least_memory_is_four_times_the_parameters_and_one_buffer():
    # 6·32 twice, 32 and 6: 422 parameters; their gradients and two moments: 1,688 numbers; the buffer 200·32 = 6,400
    assert bench_train.least_mib(SHAPE) == pytest.approx(4 * (1688 + 6400) / 2**20)


def test_peak_memory_sees_a_buffer_that_is_gone_again():
    torch.ones(96 << 18)  # an earlier, higher peak of 96 MiB does not count
    held = torch.ones(32 << 18)  # nor do 32 MiB that are there before

    def work() -> None:
        torch.ones(48 << 18)  # 48 MiB of fp32

    memory = benchmark.peak_memory(work)
    assert 47 < memory.above < 60
    assert len(held) == 32 << 18


def test_harvest_ratios_and_the_share_of_real_tokens():
    seconds = {bench_harvest.OURS: [2.0], bench_harvest.BARE: [1.9], bench_harvest.HOOKED: [5.0]}
    ours = bench_harvest.rates("case", "harvest", 3000, seconds)[0]
    assert ours["tokens_per_second"] == pytest.approx(1500)
    assert ours["times_bare"] == pytest.approx(0.95)
    assert ours["times_causal_lm"] == pytest.approx(2.5)
    mask = torch.tensor([[1, 1, 1, 1], [1, 0, 0, 0]])
    assert bench_harvest.filled([{"input_ids": mask, "attention_mask": mask}]) == pytest.approx(5 / 8)


def test_the_deepest_block_is_found_by_number():
    assert bench_harvest.deepest_block(("layers.9.mlp", "layers.15", "layers.2.self_attn")) == 15


def test_chosen_latents_are_the_columns_of_the_full_matrix(one_thread):
    rows = torch.randn(32, 6, generator=torch.Generator().manual_seed(1))
    W_dec = rows / rows.norm(dim=1, keepdim=True)
    x, chosen = torch.randn(50, 6, generator=torch.Generator().manual_seed(2)), torch.tensor([3, 4, 17])
    for compiled in (False, True):
        _, pick = bench_encode._ours(compiled)(SHAPE, W_dec, chosen)
        expected = bench_encode.our_sae(SHAPE, W_dec).encode(x)[:, chosen]
        assert (expected > 0).any(0).all()
        torch.testing.assert_close(pick(x), expected)


# the steps


def test_marking_latents_as_dead_makes_our_auxiliary_loss_count_them(one_thread):
    name = benchmark.OURS[False]
    x = bench_train._batches(SHAPE, 1)[0]
    sae = bench_train.IMPLEMENTATIONS[name](SHAPE, bench_train.Options(), x.mean(0))
    sae.mark_dead(10)
    facts = sae.step(x)
    assert isinstance(facts, StepFacts)
    assert facts.n_dead == 10
    assert facts.auxiliary > 0
    sae.mark_dead(0)
    again = bench_train._stepper(sae, [x], 0)()
    assert isinstance(again, StepFacts)
    assert again.n_dead == 0


# the command line


def test_shapes_by_name_and_by_number():
    assert benchmark.shapes_wanted("small,8x16x2x4") == [Shape(576, 4608, 64, 4096), Shape(8, 16, 2, 4)]
    assert len(benchmark.shapes_wanted("all")) == 4
    for wrong in ("tiny", "8x16x2", "8x16x0x4"):
        with pytest.raises(InputError, match="is none of small, wide, k200, all"):
            benchmark.shapes_wanted(wrong)


def test_the_allocator_is_named_with_its_settings():
    plain = benchmark.allocator({"HOME": "/"})
    assert "MALLOC" not in plain
    assert "THP" in plain
    tuned = benchmark.allocator(benchmark.tuned_environment({"LD_PRELOAD": "/usr/lib/libjemalloc.so.2"}))
    assert tuned.startswith("libjemalloc.so.2, MALLOC_MMAP_MAX_=0, ")
    assert "glibc.malloc.hugetlb=1" in tuned


@pytest.mark.parametrize("script", ["bench_train.py", "bench_encode.py", "bench_harvest.py"])
def test_help_works_without_the_peers(script: str):
    done = run(script, "--help")
    assert done.returncode == 0, done.stderr
    assert "--tuned" in done.stdout


def test_a_missing_peer_is_named_with_the_command_that_installs_it():
    done = run("bench_encode.py", "--peers", "sparsify", "--shapes", "8x16x2x4", "--rounds", "1")
    assert done.returncode == 2
    assert "sparsify (eai-sparsify) is not installed: pip install" in done.stderr
    assert "--peers none" in done.stderr
    assert "Traceback" not in done.stderr


def test_without_peers_ours_is_measured_and_the_json_holds_what_is_printed(tmp_path: Path):
    file = tmp_path / "bench.json"
    options = ["--peers", "none", "--kernels", "torch", "--shapes", "8x16x2x4", "--rounds", "1", "--threads", "1"]
    done = run("bench_encode.py", *options, "--json", str(file))
    assert done.returncode == 0, done.stderr
    (only,) = json.loads(file.read_text())["runs"]
    assert {record["name"] for record in only["records"]} >= {benchmark.ENCODER_GEMM, "safesail, torch"}
    assert benchmark.render(only["records"]) in done.stdout
    assert only["machine"]["threads"] == 1


def test_compiled_kernels_are_asked_for_only_where_they_are(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(benchmark.kernels, "AVAILABLE", False)
    assert benchmark.names_wanted("both", "none") == ["safesail, torch"]
    with pytest.raises(InputError, match=r"pip install -e '\.\[fast\]'"):
        benchmark.names_wanted("compiled", "none")
