"""The Space's benchmark: its arithmetic, its visitors, its server's end, and the whole script on the miniature."""

import importlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from safesail.errors import InputError

pytest.importorskip("gradio_client")
pytest.importorskip("gradio")

SCRIPTS = Path(__file__).resolve().parent.parent / "scripts"
sys.path.insert(0, str(SCRIPTS))  # where the scripts find each other; it is no package

bench, benchmark, visitors = map(importlib.import_module, ("bench_space", "benchmark", "space_visitors"))


def command(*arguments: str) -> list[str]:
    return [sys.executable, str(SCRIPTS / "bench_space.py"), *arguments]


# arithmetic


def test_a_figure_at_its_limit_is_within_it():
    assert bench.figure("a", 1.25, 1.25)["within"] == "yes"
    assert bench.figure("a", 1.26, 1.25)["within"] == "no"
    assert bench.figure("a", 0, 0)["within"] == "yes"
    assert bench.figure("a", 3.0)["within"] is None
    assert bench.figure("a", None, 15.0)["within"] is None


def test_the_table_shows_a_limit_beside_each_figure():
    rows = [bench.figure("start", 6.25, 15.0), bench.figure("forward", 1234.5), bench.verdict("told", True)]
    assert benchmark.render([{"table": "t", "case": "c", **row} for row in rows]) == (
        "t: c\n"
        "\n"
        "|         | measured | limit | within |\n"
        "| ------- | -------: | ----: | -----: |\n"
        "| start   |     6.25 |    15 |    yes |\n"
        "| forward |    1,234 |     – |      – |\n"
        "| told    |        – |     – |    yes |"
    )


def test_a_percentile_is_a_value_that_was_measured():
    values = [float(i) for i in range(40, 0, -1)]
    assert bench.percentile(values, 0.95) == 38  # 0.95 · 40 = 38 of the forty are at most 38
    assert bench.percentile(values, 0.5) == 20
    assert bench.percentile([7.0], 0.95) == 7
    assert bench.percentile([1.0, 2.0, 3.0], 0.95) == 3  # 2.85, rounded up


def test_clicked_tokens_are_spread_over_the_conversation():
    assert bench.spread([3, 5, 8, 9, 12, 20], 3) == [3, 8, 12]  # every second
    assert bench.spread([3, 5, 8], 2) == [3, 5]  # places 0 and 1.5, rounded down
    assert bench.spread([3, 5], 40) == [3, 5]
    assert bench.spread([], 4) == []


def test_a_prompt_is_the_longest_that_fits():
    def count(text: str) -> int:
        """Ten tokens of the template, and two for every word."""
        return 10 + 2 * len(text.split())

    assert bench.prompt_of(17, count, "one two") == "one two one"  # 16; a fourth word makes it 18
    assert bench.prompt_of(18, count, "one two") == "one two one two"
    with pytest.raises(InputError, match="more than the 11 tokens"):
        bench.prompt_of(11, count, "one two")


def test_bytes_of_a_tensor_are_those_of_its_storage_once():
    plain = torch.zeros(1000)  # 4,000 bytes
    size = sys.getsizeof(plain)
    assert bench.kept_bytes(plain) == 4000 + size
    part = plain[:10]  # keeps all of the storage
    assert bench.kept_bytes(part) == 4000 + size
    both = [plain, part]
    assert bench.kept_bytes(both) == 4000 + 2 * size + sys.getsizeof(both)


def test_bytes_are_counted_through_objects_and_without_what_is_shared():
    database, text = {"row": "r" * 1000}, "t" * 300
    held = SimpleNamespace(text=text, again=[text, text], database=database)
    own = sum(map(sys.getsizeof, [held, held.__dict__, text, held.again, *held.__dict__]))
    rows = sum(map(sys.getsizeof, [database, "row", database["row"]]))
    assert bench.kept_bytes(held) == own + rows
    assert bench.kept_bytes(held, [database]) == own


def test_an_inspection_counts_its_codes_and_its_lists(model: Any, tokenizer: Any):
    from safesail.diagnosis.inspection import Inspection
    from safesail.lm.tokens import spans
    from safesail.sae.sparse import Codes

    ids = tokenizer("a bomb", add_special_tokens=False)["input_ids"]
    codes = Codes(torch.zeros(5000), torch.zeros(5000, dtype=torch.int32), torch.zeros(len(ids) + 1))
    none: Any = None
    inspection = Inspection(ids, len(ids), spans(tokenizer, ids), {"layers.0.mlp": codes}, {}, {}, none, [])
    assert 40_000 < bench.kept_bytes(inspection) < 48_000  # 5,000 values and indices of four bytes, and small things


def test_requests_elsewhere_are_those_of_no_address_of_the_server():
    here = "http://127.0.0.1:7860/"
    urls = [here, f"{here}config", "data:image/png;base64,AA", "blob:http://127.0.0.1:7860/x"]
    assert bench.elsewhere(urls, here) == []
    other = ["http://127.0.0.1:78601/", "https://fonts.example/a.woff2"]
    assert bench.elsewhere(urls + other, here) == other


def test_parts_run_in_their_order_and_an_unknown_one_is_named():
    assert bench.parts_wanted("memory,start") == ["start", "memory"]
    with pytest.raises(InputError, match="--only stop is none of start, inspect, click, load, memory"):
        bench.parts_wanted("start,stop")


# visitors


def test_the_way_is_read_from_the_page():
    components = [
        {"id": 1, "props": {"elem_id": "run"}},
        {"id": 2, "props": {"elem_id": "strip"}},
        {"id": 3, "props": {"label": "Max new tokens", "value": 48}},
        {"id": 4, "props": {"elem_id": "prompt", "value": ""}},
        {"id": 5, "props": {}},
    ]
    events = [
        {"id": 0, "targets": [[1, "focus"], [4, "click"]], "inputs": []},
        {"id": 7, "targets": [[None, "load"], [1, "click"]], "inputs": [3, 4]},
        {"id": 9, "targets": [[2, "select"]], "inputs": [5, 3]},
    ]
    way = visitors.way_of({"components": components, "dependencies": events})
    assert way == (7, 9, [48, ""], 1, 0, [None, 48])


def test_a_prompt_is_read_from_what_a_run_gives_and_the_answer_is_not():
    sections = [
        {"name": "Prompt", "tokens": [{"text": "a"}, {"text": "bomb"}]},
        {"name": "Answer", "tokens": [{"text": "no"}]},
    ]
    assert visitors.prompt_tokens(["no", {"visible": True}, {"sections": sections}]) == ["a", "bomb"]
    assert visitors.prompt_tokens(["", {"message": "The prompt is empty."}]) == []


def test_a_visitor_that_fails_is_lost_and_the_others_are_not(capsys: pytest.CaptureFixture[str]):
    answered = bench.Visit(["a"], 0.5, told=True)

    def fail() -> Any:
        raise ConnectionError("gone")

    assert bench.at_once([lambda: answered, fail, lambda: answered]) == [answered, bench.LOST, answered]
    assert "lost: ConnectionError('gone')" in capsys.readouterr().err
    lost, waited = bench._visit_figures("all", [answered, bench.LOST])
    assert (lost["value"], lost["within"]) == (1, "no")
    assert waited["value"] == visitors.PATIENCE


# the server


def test_a_server_that_does_not_start_is_said_in_its_own_words(tmp_path: Path):
    nothing, said = str(tmp_path / "nothing"), r"ended instead of serving: safesail: .*nothing"
    with pytest.raises(InputError, match=said), bench.served(nothing):
        pass


def test_the_server_ends_with_all_that_it_started():
    code = "import subprocess; c = subprocess.Popen(['sleep', '60']); print(c.pid, flush=True); c.wait()"
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, start_new_session=True)
    assert parent.stdout is not None
    with parent.stdout:
        child = int(parent.stdout.readline())
    visitors.end(parent)
    assert parent.returncode == -15
    for _ in range(100):
        if not running(child):
            return
        time.sleep(0.05)
    raise AssertionError("the server's own process goes on")


def running(pid: int) -> bool:
    """Whether a process runs; one that has ended and is not yet buried does not."""
    status = Path(f"/proc/{pid}/stat")
    try:
        return status.read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


# the script


def test_a_mistake_is_one_sentence(tmp_path: Path):
    done = subprocess.run(command("--only", "stop"), capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "--only stop is none of" in done.stderr


def test_the_whole_script_on_the_miniature(demo_run: Path, tmp_path: Path):
    file = tmp_path / "space.json"
    small = [
        "--starts",
        "1",
        "--rounds",
        "1",
        "--clicks",
        "3",
        "--visitors",
        "3",
        "--answer",
        "4",
        "--kept",
        "2",
        "--hold",
        "8",
    ]
    done = subprocess.run(
        command(str(demo_run), *small, "--json", str(file)), capture_output=True, text=True, timeout=400, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "lost" not in done.stderr
    (only,) = json.loads(file.read_text())["runs"]
    records = only["records"]
    assert benchmark.render(records) in done.stdout
    assert {record["table"] for record in records} == set(bench.PARTS)
    found = {record["name"].partition(" (")[0]: record for record in records}
    assert found["3 at once through the API: not answered with their own tokens"]["value"] == 0
    assert found["3 at once as the page does: not answered with their own tokens"]["value"] == 0
    assert found["as the page does: not told their place"]["value"] == 0
    assert found["queue full: let in and not answered"]["value"] == 0
    assert found["tracebacks in the server's log"]["value"] == 0
    assert found["the first visitor is kept before those, and let go after"]["within"] == "yes"
    assert any("the next is told “Queue is full" in name and found[name]["within"] == "yes" for name in found)
    assert found["kept of one of them"]["value"] < found["server after the start"]["value"]
    no_browser = [name for name in found if "left out" in name]
    if not no_browser:
        assert next(record["value"] for name, record in found.items() if "other hosts" in name) == 0
        assert found["click to table, all neurons listed: median"]["value"] > 0


def test_without_a_browser_its_rows_say_so(demo_run: Path, tmp_path: Path):
    environment = {**os.environ, "PATH": str(tmp_path)}
    done = subprocess.run(
        command(str(demo_run), "--only", "click"),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    assert "click to table: left out, chromium is not installed" in done.stdout
    assert "requests to other hosts: left out, chromium is not installed" in done.stdout
