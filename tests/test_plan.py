"""The planner: the numbers of a small plan written out, refusals whose suggestions fit, dry runs without trace."""

import json
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from safesail.errors import InputError
from safesail.lm.size import LmSize, lm_size
from safesail.recipe import Recipe
from safesail.run import Run, write_json
from safesail.training.plan import plan_lines, refuse_what_cannot_fit, waiting
from safesail.training.plan.fit import changed, fits, needs, shortages, suggestion
from safesail.training.plan.job import Job, groups, n_steps, streamed_tokens
from safesail.training.plan.machine import Room, Speed, available_ram, check_device, speed
from safesail.training.plan.plan import make_plan, next_line
from safesail.training.plan.space import disk, memory
from safesail.training.plan.work import compute

REPOSITORY = Path(__file__).resolve().parent.parent
ALL = frozenset({"harvest", "train", "build"})
PLENTY = Room(ram=10**15, gpu=None, disk=10**15)
# 2 blocks of width 8: q and o 64 weights each, k and v 32 each (one of two heads), gate, up and down 128 each, 2 norms
TINY = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 8,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 10,
    "tie_word_embeddings": False,
}
QWEN = {
    "model_type": "qwen2",
    "architectures": ["Qwen2ForCausalLM"],
    "hidden_size": 2048,
    "intermediate_size": 11008,
    "num_hidden_layers": 36,
    "num_attention_heads": 16,
    "num_key_value_heads": 2,
    "vocab_size": 151936,
    "tie_word_embeddings": True,
}


def config_folder(folder: Path, config: dict[str, Any]) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    """A folder that holds a config.json and nothing else."""
    return config_folder(tmp_path / "tiny", TINY)


def recipe(model: Path | str = "tiny", **train: Any) -> Recipe:
    sections: dict[str, Any] = {
        "name": "small",
        "model": {"path": str(model)},
        "corpus": {"n_tokens": 1000, "n_held_out_tokens": 100, "sources": [{"path": "a.jsonl"}]},
        "harvest": {"hook_points": ["layers.0.mlp", "layers.1"], "window": 4},
        "train": {"architectures": ["topk", "relu"], "d_sae": 32, "k": [4], "l1": [0.1], "batch_size": 64, "epochs": 2},
        "explain": {"encoder": "none"},
        "runtime": {"windows_per_batch": 2},
    }
    for name, value in train.items():
        section, _, key = name.partition("__")
        sections[section][key] = value
    return Recipe.parse(sections)


SIZE = LmSize(1352, 8, 16, {"layers.0.mlp": 1280.0, "layers.1": 2560.0}, {"layers.0.mlp": 8, "layers.1": 8})


def job(stages: frozenset[str] = ALL, **settings: Any) -> Job:
    of_job = {key: settings.pop(key) for key in list(settings) if key in Job._fields}
    return Job(recipe(**settings), SIZE, stages, **of_job)


def amounts(items: list[Any]) -> dict[str, int]:
    return {item.what: item.amount for item in items}


# --- the language model ------------------------------------------------------------------------------------------


def test_size_of_a_model_is_that_of_its_config(tiny: Path) -> None:
    hook_points = ("layers.0.mlp", "layers.1.self_attn", "layers.1", "layers.1.mlp.up_proj")
    size = lm_size(str(tiny), hook_points, window=4)
    block = 64 + 32 + 32 + 64 + 3 * 128
    assert size.n_parameters == 2 * 80 + 2 * (block + 16) + 8 == 1352  # embeddings and head, blocks with norms, norm
    attention = 2 * 4 * 8 + 2 * 4 * 8  # scores with 4 keys, and their sum of 4 values
    assert size.flops_per_token == {
        "layers.0.mlp": 2 * block + attention,
        "layers.1.self_attn": 2 * block + attention + 2 * 192 + attention,
        "layers.1": 2 * (2 * block + attention),
        "layers.1.mlp.up_proj": 2 * (2 * block + attention) - 2 * 128,  # all but the down projection
    }
    assert size.d_in == {"layers.0.mlp": 8, "layers.1.self_attn": 8, "layers.1": 8, "layers.1.mlp.up_proj": 16}
    assert (size.d_model, size.widest) == (8, 16)


def test_attention_grows_with_the_window(tiny: Path) -> None:
    short, long = (lm_size(str(tiny), ("layers.0",), window).flops_per_token["layers.0"] for window in (4, 104))
    assert long - short == 4 * 100 * 8


def test_a_hook_point_that_the_model_lacks(tiny: Path) -> None:
    with pytest.raises(InputError, match=r"no hook point 'layers\.2\.mlp'; it has .*layers\.0-1\.mlp"):
        lm_size(str(tiny), ("layers.2.mlp",), 4)
    with pytest.raises(InputError, match="never called"):
        lm_size(str(tiny), ("layers",), 4)
    with pytest.raises(InputError, match=r"has no config\.json"):
        lm_size(str(tiny.parent), ("layers.0",), 4)


def test_a_model_that_does_not_run_without_data_is_bounded_by_its_weights(tmp_path: Path) -> None:
    config = {"model_type": "mamba", "hidden_size": 8, "num_hidden_layers": 1, "vocab_size": 10, "state_size": 2}
    size = lm_size(str(config_folder(tmp_path / "mamba", config)), ("layers.0",), 4)
    assert size.flops_per_token["layers.0"] == 2 * (size.n_parameters - 80)
    assert size.d_in["layers.0"] == 8


def test_qwen_has_its_published_size(tmp_path: Path) -> None:
    loaded = Recipe.load(REPOSITORY / "hub/recipes/qwen2.5-3b.toml")
    folder = config_folder(tmp_path / "qwen", QWEN)
    size = lm_size(str(folder), loaded.harvest.hook_points, 512)
    assert size.n_parameters == 3_085_938_688  # 3.09 billion
    assert set(size.d_in.values()) == {2048}
    weights = 2 * 2048 * 2048 + 2 * 2048 * 256 + 3 * 2048 * 11008
    assert size.flops_per_token["layers.35.mlp"] == 36 * (2 * weights + 4 * 512 * 2048)
    assert loaded.train.d_sae == 10 * 2048
    assert 200 in loaded.train.k


# --- arithmetic --------------------------------------------------------------------------------------------------


def test_steps_and_tokens() -> None:
    assert n_steps(recipe()) == 2 * (900 // 64) == 28
    streams = job(train__stream_tokens=1000, train__epochs=1, train__buffer_tokens=200)
    assert n_steps(streams.recipe) == 1000 // 64 == 15
    assert streamed_tokens(streams) == 5 * 200  # 3 batches of 64 in a buffer, so 5 buffers for 15 batches


def test_flops_of_every_part() -> None:
    parts = {part.what: part.flops for part in compute(job(), 0)}
    encoder = 2 * 64 * 8 * 32
    assert parts == {
        "harvest: model": 1000 * 2560,
        "train: 2 × topk": pytest.approx(2 * 28 * (encoder + 8 * 64 * 4 * 8)),
        "train: 2 × relu": pytest.approx(2 * 28 * (encoder + 8 * 64 * (0.023 * 32) * 8)),
    }
    streams = job(train__stream_tokens=1000, train__epochs=1, train__buffer_tokens=200)
    assert compute(streams, 0)[1].flops == 1000 * 2560


def test_seconds_are_products_and_moved_bytes_at_their_rates() -> None:
    rates = Speed(flops_per_second=1e6, model_flops_per_second=1e5, bytes_per_second=1e7)
    model, topk, _ = compute(job(), 0)
    assert model.seconds(rates) == pytest.approx(1000 * 2560 / 0.9 / 1e5)
    moved = 4 * (2.5 * 64 * 4 * 8 + (10 + 0.15 * 4) * 64 * 32 + 40 * 552)
    assert topk.seconds(rates) == pytest.approx(2 * 28 * (2 * 64 * 8 * 32 / 1e6 + moved / 1e7))


def test_fewer_saes_at_once_are_more_passes_of_the_model() -> None:
    settings: dict[str, Any] = {"train__stream_tokens": 1000, "train__epochs": 1, "train__buffer_tokens": 200}
    together, single = job(**settings), job(**settings, runtime__saes_at_once=1)
    assert [len(groups(plan, 0)) for plan in (together, single, job())] == [1, 4, 2]  # harvested: by hook point
    assert compute(single, 0)[1].flops == 2 * 1000 * (1280 + 2560)  # two SAEs at each hook point


def test_memory_of_every_part() -> None:
    host, gpu = memory(job(), 0)
    assert gpu == {}
    parameters = 2 * 8 * 32 + 32 + 8  # 552
    assert amounts(host["training"]) == {
        "tokens and statistics of the harvest": 1000 * 110,
        "language model": 1352 * 4,  # still there after the harvest
        "SAE parameters": 2 * parameters * 4,
        "Adam moments": 2 * 2 * parameters * 4 + 2 * 32 * 8,
        "gradients": parameters * 4,
        "pre-activations": 64 * 32 * 4,
        "active entries": 64 * 4 * 48,
        "batch": 64 * 6 * 8 * 4,
        "libraries, allocator": 300_000_000,
    }
    assert amounts(host["the harvest"]) == {
        "texts as tokens": 1000 * 60,
        "a shard, in parts and joined": 2 * 64 * 4 * (2 * (8 * 2 + 4) + 9),
        "language model": 1352 * 4,
        "a batch in the model": 2 * 4 * ((8 * 8 + 3 * 16) * 4 + 16 * 4) + 2 * 4 * 4 * 5,
        "libraries, allocator": 300_000_000,
    }
    assert amounts(host["the start of training"])["rows for scale and mean"] == 900 * 8 * 12


def test_memory_of_thresholds_streams_and_finished_harvests() -> None:
    alone, _ = memory(job(frozenset({"train"})), 0)
    assert set(alone) == {"the start of training", "training"}
    assert "language model" not in amounts(alone["training"])
    streams, _ = memory(job(train__stream_tokens=1000, train__epochs=1, train__buffer_tokens=200), 0)
    assert amounts(streams["training"])["stream buffer"] == 2 * 200 * (8 + 8) * 2
    assert amounts(streams["training"])["SAE parameters"] == 4 * 552 * 4  # all hook points at once
    jump, _ = memory(job(train__architectures=["jumprelu"], train__l0=[0.1]), 0)
    assert amounts(jump["training"])["SAE parameters"] == (552 + 32) * 4


def test_on_a_gpu_model_and_saes_are_there_and_the_rest_is_not() -> None:
    host, gpu = memory(job(on_gpu=True, model__dtype="bfloat16"), 0)
    assert set(amounts(gpu["training"])) >= {"language model", "SAE parameters", "Adam moments", "gradients"}
    assert amounts(gpu["training"])["language model"] == 1352 * 2
    assert amounts(host["the harvest"])["language model while it is loaded"] == 1352 * 2
    assert "SAE parameters" not in amounts(host["training"])
    full = Room(ram=10**12, gpu=10**6, disk=10**12)
    assert [shortage.what for shortage in shortages(job(on_gpu=True), full)] == ["GPU memory"]


def test_disk_of_every_part() -> None:
    assert amounts(disk(job())) == {
        "activation shards": 1000 * (2 * (8 * 2 + 4) + 9),
        "checkpoints": 2 * (3 * 2 * 552 * 4 + 2 * 32 * 8),
        "weights": 4 * 552 * 4,
        "weights in the release": 4 * 552 * 4,
    }
    assert set(amounts(disk(job(frozenset({"train"}))))) == {"checkpoints", "weights"}  # the harvest is done
    assert needs(job(n_bytes_there=40_000))["disk"] == needs(job())["disk"] - 40_000


def test_ranks_share_hook_points_or_batches() -> None:
    by_hook_point = job(n_ranks=2, n_local_ranks=2)
    assert [v.hook_point for group in groups(by_hook_point, 1) for v in group] == ["layers.1", "layers.1"]
    parts = {part.what: part.flops for part in compute(by_hook_point, 0)}
    assert parts["harvest: model"] == 500 * 2560
    assert parts["train: 1 × topk"] == pytest.approx(28 * (2 * 64 * 8 * 32 + 8 * 64 * 4 * 8))
    assert needs(by_hook_point)["memory"] > 2 * 300_000_000
    by_data = job(n_ranks=2, n_local_ranks=2, runtime__parallel="data")
    parts = {part.what: part.flops for part in compute(by_data, 0)}
    assert parts["train: 2 × topk"] == pytest.approx(2 * 28 * (2 * 32 * 8 * 32 + 8 * 32 * 4 * 8))
    assert amounts(memory(by_data, 0)[0]["training"])["pre-activations"] == 32 * 32 * 4
    assert amounts(disk(by_data))["checkpoints"] == amounts(disk(job()))["checkpoints"]  # the first rank's alone
    assert amounts(disk(by_hook_point))["checkpoints"] == 2 * amounts(disk(job()))["checkpoints"]


# --- refusing and suggesting -------------------------------------------------------------------------------------


def wide(**settings: Any) -> Job:
    """Ten SAEs at one hook point, each of 1,000 × 100,000: 0.2 billion parameters."""
    sweep = {"train__architectures": ["topk"], "train__k": list(range(1, 11)), "train__d_sae": 100_000}
    size = SIZE._replace(flops_per_token={"layers.1": 2560.0}, d_in={"layers.1": 1000})
    return job(**{"harvest__hook_points": ["layers.1"], **sweep, **settings})._replace(lm=size)


def room_for(planned: Job, what: str, **settings: Any) -> Room:
    """Just what a changed job needs of one thing, and of the others plenty; suggestions leave a twentieth free."""
    changes = {name.replace("__", "."): value for name, value in settings.items()}
    needed = needs(planned._replace(recipe=changed(planned.recipe, changes)))
    least = int(needed[what] / 0.95) + 2
    return PLENTY._replace(**{{"memory": "ram", "disk": "disk"}[what]: least})


def suggested(planned: Job, room: Room) -> dict[str, Any]:
    """The suggestion for a job that does not fit, which is accepted as `--set` options and fits."""
    assert not fits(planned, room)
    changes = suggestion(planned, room)
    assert changes is not None
    assert fits(planned._replace(recipe=changed(planned.recipe, changes)), room)
    return changes


def test_the_most_saes_at_once_that_fit() -> None:
    planned = wide()
    assert suggested(planned, room_for(planned, "memory", runtime__saes_at_once=7)) == {"runtime.saes_at_once": 7}
    batches = wide(train__batch_size=3200, corpus__n_tokens=10_000)  # where halving the batch would do as well
    assert suggested(batches, room_for(batches, "memory", runtime__saes_at_once=9)) == {"runtime.saes_at_once": 9}


def test_the_largest_batch_that_fits_when_one_sae_at_a_time_does_not() -> None:
    planned = wide(train__k=[4], train__batch_size=800, corpus__n_tokens=10_000)
    assert suggested(planned, room_for(planned, "memory", train__batch_size=200)) == {"train.batch_size": 200}
    several = wide(train__batch_size=800, corpus__n_tokens=10_000)
    room = room_for(several, "memory", train__batch_size=200, runtime__saes_at_once=1)
    assert suggested(several, room) == {"runtime.saes_at_once": 1, "train.batch_size": 200}


def test_shares_of_a_batch_stay_equal() -> None:
    two = {"runtime__parallel": "data", "n_ranks": 2, "corpus__n_tokens": 10_000}
    planned = wide(train__architectures=["batchtopk"], train__k=[4], train__batch_size=6432, **two)
    assert suggested(planned, room_for(planned, "memory", train__batch_size=1608)) == {"train.batch_size": 1608}
    changes = suggested(planned, room_for(planned, "memory", train__batch_size=804))  # shares of 402: no multiple of 4
    assert changes.get("train.batch_size", 1608) != 804


def test_the_largest_corpus_that_fits_the_disk_and_nothing_lost_from_training() -> None:
    small: dict[str, Any] = {"train__k": [4], "train__d_sae": 1000, "corpus__n_tokens": 800_000}
    planned = wide(**small)
    room = room_for(planned, "disk", corpus__n_tokens=500_000, train__stream_tokens=1, train__epochs=1)
    assert suggested(planned, room) == {
        "corpus.n_tokens": 500_000,
        "train.stream_tokens": 2 * (799_900 // 64) * 64,
        "train.epochs": 1,
    }
    streams = wide(
        train__k=[4], train__d_sae=1000, corpus__n_tokens=800_000, train__stream_tokens=10**6, train__epochs=1
    )
    room = room_for(streams, "disk", corpus__n_tokens=500_000)
    assert suggested(streams, room) == {"corpus.n_tokens": 500_000}


def test_the_widest_dictionary_that_fits_when_nothing_else_helps() -> None:
    planned = wide(stages=frozenset({"train"}), train__k=[4])
    room = room_for(planned, "disk", train__d_sae=70_000)
    assert suggested(planned, room) == {"train.d_sae": 70_000}


def test_memory_and_disk_short_together() -> None:
    planned = wide(train__d_sae=10_000, corpus__n_tokens=8_000_000)
    ram = room_for(planned, "memory", runtime__saes_at_once=3, corpus__n_tokens=8_000_000).ram
    needed = needs(planned._replace(recipe=changed(planned.recipe, {"runtime.saes_at_once": 3})))["disk"]
    changes = suggested(planned, Room(ram, None, needed - 1_000_000_000))
    assert set(changes) == {"runtime.saes_at_once", "corpus.n_tokens"}  # no room for the buffer of a stream
    assert changes["runtime.saes_at_once"] == 3
    assert changes["corpus.n_tokens"] < 8_000_000


def test_no_suggestion_where_none_fits() -> None:
    planned, room = wide(), PLENTY._replace(ram=100_000_000)  # the libraries alone take more
    assert suggestion(planned, room) is None
    plan = make_plan(planned, room, Speed(1e9, 1e9, 1e9))
    assert next_line(plan, ["safesail", "run", "a.toml"], Path("x")).startswith("No settings make it fit")


def test_the_next_command_is_accepted(tmp_path: Path) -> None:
    planned = wide()
    plan = make_plan(planned, room_for(planned, "memory", runtime__saes_at_once=7), Speed(1e9, 1e9, 1e9))
    assert not plan.fits
    assert plan.limit == "memory"
    command = next_line(plan, ["safesail", "run", "a b.toml", "--set", "seed=1"], tmp_path)
    assert command == "next: safesail run 'a b.toml' --set seed=1 --set runtime.saes_at_once=7"
    of_a_stage = next_line(plan, ["safesail", "train", "x"], Path("x"))
    assert of_a_stage == "next: safesail run RECIPE --out x --set runtime.saes_at_once=7"
    lines = plan_lines(plan)
    assert lines[-1].startswith("it does not fit: too little memory (")
    assert lines[-1].endswith("it would with runtime.saes_at_once = 7")


def test_a_real_run_is_refused_before_anything_is_made(tiny: Path, tmp_path: Path) -> None:
    run = Run.create(tmp_path / "run", recipe(tiny, train__d_sae=10**9))
    with pytest.raises(InputError, match=r"cannot fit here .*disk: .* GB free.*--adopt --set .*train\.d_sae=\d+"):
        refuse_what_cannot_fit(run, "train")
    refuse_what_cannot_fit(Run.create(tmp_path / "other", recipe(tiny)), "build")


def test_what_is_done_does_not_count(tiny: Path, tmp_path: Path) -> None:
    run = Run.create(tmp_path / "run", recipe(tiny, train__d_sae=10**9))
    for stage in ("harvest", "train"):
        (run.scratch / stage).mkdir()
        write_json(run.scratch / stage / "stage.json", {"fingerprint": run.expected_fingerprint(stage)})
    assert waiting(run, "train") == set()
    assert waiting(run, "train", force=True) == {"train"}
    refuse_what_cannot_fit(run, "train")
    with pytest.raises(InputError, match="cannot fit"):
        refuse_what_cannot_fit(run, "train", force=True)


# --- the machine -------------------------------------------------------------------------------------------------


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there() -> None:
    with pytest.raises(InputError, match=r"no GPU .* --set runtime\.device=cpu"):
        check_device(recipe(runtime__device="cuda"))
    check_device(recipe())


def test_memory_is_what_the_tightest_control_group_leaves(tmp_path: Path) -> None:
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/meminfo").write_text("MemTotal: 9000 kB\nMemAvailable: 8000 kB\n")
    assert available_ram(tmp_path) == 8000 * 1024
    (tmp_path / "proc/self/cgroup").write_text("0::/outer/inner\n")
    inner = tmp_path / "sys/fs/cgroup/outer/inner"
    inner.mkdir(parents=True)
    (inner / "memory.max").write_text("max\n")
    assert available_ram(tmp_path) == 8000 * 1024
    (inner.parent / "memory.max").write_text("5000000\n")
    (inner.parent / "memory.current").write_text("3000000\n")
    (inner.parent / "memory.stat").write_text("anon 1\nactive_file 400000\ninactive_file 600000\n")
    assert available_ram(tmp_path) == 5_000_000 - 3_000_000 + 1_000_000


def test_memory_of_a_version_1_control_group(tmp_path: Path) -> None:
    group = tmp_path / "sys/fs/cgroup/memory/mine"
    group.mkdir(parents=True)
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/meminfo").write_text("MemAvailable: 8000 kB\n")
    (tmp_path / "proc/self/cgroup").write_text("4:memory:/mine\n2:cpu:/\n0::/\n")
    (group / "memory.limit_in_bytes").write_text("3000000\n")
    (group / "memory.usage_in_bytes").write_text("1000000\n")
    (group / "memory.stat").write_text("total_active_file 0\ntotal_inactive_file 500000\n")
    assert available_ram(tmp_path) == 2_500_000


def test_this_machine_has_a_speed() -> None:
    threads = torch.get_num_threads()
    rates = speed(recipe(runtime__threads=1))
    assert all(rate > 1e6 for rate in rates)
    assert rates.model_flops_per_second == rates.flops_per_second  # one dtype, one measurement
    assert torch.get_num_threads() == threads


# --- the command line --------------------------------------------------------------------------------------------


def dry_run(folder: Path, settings: list[str], *more: str) -> subprocess.CompletedProcess[str]:
    """`safesail run demo.toml --dry-run` in an empty folder."""
    options = [part for setting in settings for part in ("--set", setting)]
    words = ["run", str(REPOSITORY / "hub/recipes/demo.toml"), *options, "--dry-run", *more]
    command = [sys.executable, "-W", "error", "-m", "safesail.cli", *words]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120)


def test_a_dry_run_prints_the_plan_and_leaves_nothing(mini_settings: list[str], tmp_path: Path) -> None:
    done = dry_run(tmp_path, mini_settings, "--until", "train")
    assert (done.returncode, done.stderr) == (0, "")
    assert list(tmp_path.iterdir()) == []
    lines = done.stdout.splitlines()
    assert lines[0] == "mini: 6 SAEs, on cpu; still to be made: harvest, train"
    assert [line.split()[0] for line in lines[2:-3] if not line.startswith(" ")] == [
        *("tokens", "compute", "memory", "disk")
    ]
    assert lines[-2].startswith("it fits; what limits is ")
    words = shlex.split(lines[-1])
    assert words[:3] == ["next:", "safesail", "run"]
    assert "--dry-run" not in words
    assert words.count("--set") == len(mini_settings)


def test_json_holds_the_same_and_a_job_that_cannot_fit_exits_with_2(mini_settings: list[str], tmp_path: Path) -> None:
    done = dry_run(tmp_path, [*mini_settings, "train.d_sae=1000000000000"], "--json")
    assert (done.returncode, done.stderr) == (2, "")
    plan = json.loads(done.stdout)
    assert plan["fits"] is False
    assert {shortage["what"] for shortage in plan["shortages"]} == {"memory", "disk"}
    assert plan["changes"]["train.d_sae"] < 10**12
    assert plan["n_steps"] == 3 * ((12_000 - 1500) // 256)
    assert plan["total_flops"] == pytest.approx(sum(part["flops"] for part in plan["compute"]))
    assert list(tmp_path.iterdir()) == []


def test_the_stage_verbs_plan_what_they_make(tiny: Path, tmp_path: Path, tiny_encoder: Path, texts: Path) -> None:
    settings = recipe(tiny).model_copy(update={})
    data = settings.dump()
    data["corpus"]["sources"][0]["path"], data["explain"]["encoder"] = str(texts), str(tiny_encoder)
    (tiny / "model.safetensors").write_bytes(b"")  # its weights are never read
    run = Run.create(tmp_path / "run", Recipe.parse(data))
    before = sorted(run.folder.rglob("*"))
    for verb, stages in (("harvest", ["harvest"]), ("train", ["harvest", "train"])):
        command = [sys.executable, "-W", "error", "-m", "safesail.cli", verb, str(run.folder), "--dry-run", "--json"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        assert (done.returncode, done.stderr) == (0, "")
        assert json.loads(done.stdout)["stages"] == stages
    assert sorted(run.folder.rglob("*")) == before


def test_the_script_is_valid_shell() -> None:
    script = REPOSITORY / "scripts/safe_sail_qwen2.5-3b.sh"
    subprocess.run(["bash", "-n", str(script)], check=True)
    nobody = {"GPUS": "0", "PATH": "/usr/bin:/bin"}
    refused = subprocess.run(["bash", str(script)], env=nobody, capture_output=True, text=True)
    assert refused.returncode == 2
    assert "at least one GPU" in refused.stderr


def test_the_script_of_safer_says_what_it_takes() -> None:
    done = subprocess.run(["bash", "scripts/safer.sh", "--help"], cwd=REPOSITORY, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert "RECIPE   another recipe (default: hub/recipes/safer-demo.toml)" in done.stdout
