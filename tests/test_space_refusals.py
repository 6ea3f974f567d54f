"""What the Space says when something is missing, wrong or full, and that the rest goes on."""

import json
import os
import re
import runpy
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from browsing import ask, cells, neurons, open_tab, opened, serving, start
from hub_double import HubDouble

from safesail.assets import asset
from safesail.diagnosis.inspector import Inspector
from safesail.sae.config import SaeConfig
from safesail.sae.model import Sae

gradio_client = pytest.importorskip("gradio_client")
pytest.importorskip("gradio")

LAYER, MLP = "layers.1", "layers.1.mlp"
SAID = "关于炸弹的词"
BOB = "hf_bob_write"
QUIET = {"GRADIO_ANALYTICS_ENABLED": "False", "GRADIO_RUN_HISTORY": "False"}


# --- releases that lack something, or have more than usual --------------------------------------------------------


def copied(release: Path, folder: Path, *without: str) -> Path:
    """A copy of the parts of a release, some of them left out."""
    return Path(shutil.copytree(release, folder, ignore=shutil.ignore_patterns("scratch", *without)))


def add_sae(release: Path, hook_point: str) -> None:
    """Put an SAE of a second hook point into a release, whose latent 7 is explained."""
    config = SaeConfig(d_in=32, d_sae=16, hook_point=hook_point, architecture="topk", k=4)
    chance = torch.Generator().manual_seed(0)
    shapes = ((32, 16), (16,), (16, 32), (32,))
    Sae(config, *(torch.randn(shape, generator=chance) for shape in shapes)).save(release / "saes" / config.sae_id)
    manifest = json.loads((release / "saes/config.json").read_text(encoding="utf-8"))
    manifest["selected"][hook_point] = config.sae_id
    manifest["saes"].append({"id": config.sae_id, "selected": True})
    (release / "saes/config.json").write_text(json.dumps(manifest), encoding="utf-8")
    place = [{"neuron_id": f"{hook_point}/{i}", "hook_point": hook_point, "latent": i} for i in range(16)]
    append(release / "neurons/quantiles/train.parquet", place)
    said = {"explanation": "a block's neuron", "status": "ok", "score": 0.9, "domains": ["terror"]}
    append(release / "neurons/neurons/train.parquet", [{**place[7], **said, "category": "", "concept": "", "layer": 1}])


def append(path: Path, rows: list[dict[str, Any]]) -> None:
    """Add rows that are like the table's first one but for what they say."""
    table = pq.read_table(path)
    like = table.slice(0, 1).to_pylist()[0]
    added = pa.Table.from_pylist([{**like, **row} for row in rows], schema=table.schema)
    pq.write_table(pa.concat_tables([table, added]), path)


def add_language(release: Path, language: str, said: dict[str, str]) -> None:
    """Put a language into a release in which only the given neurons have an explanation."""
    table = pq.read_table(release / "neurons/explanations/en.parquet")
    nothing = {"language": language, "explanation": None, "status": "unparsed"}
    rows = [{**row, **nothing} for row in table.to_pylist()]
    rows = [
        row | ({"explanation": said[id], "status": "ok"} if (id := row["neuron_id"]) in said else {}) for row in rows
    ]
    path = release / f"neurons/explanations/{language}.parquet"
    pq.write_table(pa.Table.from_pylist(rows, schema=table.schema), path)
    (release / "neurons/languages.json").write_text(json.dumps(["en", language]), encoding="utf-8")


@pytest.fixture(scope="module")
def release(demo_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Without examples, with two SAEs on one layer, and with a language that explains one neuron only."""
    release = copied(demo_run, tmp_path_factory.mktemp("odd") / "release", "examples")
    first = pq.read_table(release / "neurons/explanations/en.parquet")["neuron_id"][0].as_py()
    add_sae(release, LAYER)
    add_language(release, "zh", {first: SAID})
    return release


@pytest.fixture(scope="module")
def inspector(release: Path) -> Inspector:
    return Inspector.from_pretrained(release)


@pytest.fixture(scope="module")
def address(release: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with serving(release, tmp_path_factory.mktemp("space")) as address:
        yield address


@pytest.fixture
def page(browser: Any, address: str) -> Iterator[Any]:
    with opened(browser, address) as page:
        yield page


@pytest.fixture(scope="module")
def client(address: str) -> Iterator[Any]:
    client = gradio_client.Client(address, verbose=False)
    yield client
    client.close()


def test_a_release_without_examples_says_so_and_shows_the_card(page: Any) -> None:
    ask(page, "The president saw a bomb.")
    page.locator("#neurons button.neuron").first.click()
    page.locator("#inspector-card article").wait_for()
    page.locator("#inspector-ask").click()
    page.locator("#inspector-examples", has_text="This release comes without its examples.").wait_for()
    page.locator("#inspector-card h2").wait_for()
    page.locator("#strip button").last.click()
    page.locator("#headline", has_text=f"Token {page.locator('#strip button').count()} ").wait_for()


def test_two_saes_on_one_layer_are_told_apart(page: Any, client: Any, inspector: Inspector) -> None:
    prompt = "The president saw a bomb."
    inspection = inspector.inspect([{"role": "user", "content": prompt}], max_new_tokens=4)
    assert page.get_by_text(f"{len(inspector.database)} explained neurons").count() == 1
    for name in inspector.saes:
        assert page.locator("code", has_text=re.compile(rf"^{re.escape(name)}$")).count() == 1
    tokens = ask(page, prompt)
    page.locator("#listing label", has_text="all that fire").click()
    index = next(i for i in range(len(inspection.units)) if inspection.hits(i))
    tokens.nth(index).click()
    page.locator("#headline", has_text=f"Token {index + 1} ").wait_for()
    page.wait_for_function(
        "n => document.querySelectorAll('#neurons tbody tr').length === n", arg=min(len(inspection.hits(index)), 100)
    )
    for name in (LAYER, MLP):
        page.get_by_label("Hook point").first.click()
        page.get_by_role("option", name=name, exact=True).click()
        expected = [hit.neuron_id for hit in inspection.hits(index) if hit.hook_point == name]
        assert expected
        page.wait_for_function(
            "ids => [...document.querySelectorAll('#neurons button.neuron')].map(b => b.dataset.value).join() === ids",
            arg=",".join(expected),
        )
        assert page.locator("#headline").text_content().count(f"{name} ") == 1
    with pytest.raises(gradio_client.exceptions.AppError, match="'1_7' is not a neuron here"):
        client.predict(id="1_7", api_name="/neuron")
    assert client.predict(id=f"{LAYER}/7", api_name="/neuron")["explanation"] == "a block's neuron"
    assert [row["neuron_id"] for row in client.predict(hook_point=LAYER, api_name="/search")] == [f"{LAYER}/7"]


def test_a_language_without_an_explanation_falls_back_and_says_so(page: Any, client: Any, inspector: Inspector) -> None:
    database = inspector.database
    translated = next(id for id, said in database.explanations.items() if said["zh"]["explanation"])
    other = next(id for id in database.explanations if id != translated)
    page.locator("#language input").click()
    page.get_by_role("option", name="zh", exact=True).click()
    open_tab(page, "Neurons")
    row = page.locator(f'#found button[data-value="{translated}"]')
    row.filter(has_text=SAID).wait_for()
    shown = {text[1].splitlines()[-1]: text[1] for text in cells(page, "#found")}
    assert "(en)" not in shown[translated]
    assert "(en)" in shown[other]
    assert sum("(en)" in text for text in shown.values()) == len(database) - 1
    row.click()
    card = page.locator("#neurons-card article")
    card.locator("h2", has_text=SAID).wait_for()
    assert card.locator(".note").count() == 0
    page.locator(f'#found button[data-value="{other}"]').click()
    card.locator(".note", has_text="There is no explanation in zh (unparsed); this one is in en.").wait_for()
    assert card.locator("h2").text_content() == database[other]["explanation"]
    given = {id: client.predict(id=id, language="zh", api_name="/neuron") for id in (translated, other)}
    assert (given[translated]["explanation"], given[translated]["language"]) == (SAID, "zh")
    assert (given[other]["explanation"], given[other]["language"]) == (database[other]["explanation"], "en")
    found = client.predict(language="zh", api_name="/search")
    assert [row["neuron_id"] for row in found if row["language"] == "zh"] == [translated]


def test_an_empty_and_a_too_long_prompt(page: Any) -> None:
    page.get_by_text("Up to 512 tokens, answer included.").wait_for()
    for prompt, sentence in (
        ("", "The prompt is empty; type some text."),
        (" \n\t ", "The prompt is empty; type some text."),
        ("word " * 600, "but the limit here is 512; shorten them."),
        ("x" * 10_241, "The prompt has 10,241 characters; the limit is 10,240."),
    ):
        page.locator("#prompt textarea").fill(prompt)
        start(page, "#run")
        page.locator("#strip", has_text=sentence).wait_for()
        page.get_by_test_id("toast-text").filter(has_text=sentence).first.wait_for()
        page.locator("#neurons").wait_for(state="hidden")
    assert ask(page, "a bomb").count() > 0


# --- examples behind the Hub's gate -------------------------------------------------------------------------------


def test_gated_examples_are_shown_once_the_gate_opens(
    browser: Any, demo_run: Path, tiny_model: Path, tmp_path: Path
) -> None:
    with HubDouble(tmp_path / "hub") as hub:
        for part, kind in (("saes", "model"), ("neurons", "dataset"), ("examples", "dataset")):
            hub.create(kind, f"acme/mini-{part}", demo_run / part)
        hub.repo("dataset", "acme/mini-examples").gated = "manual"
        environment = hub.environment(BOB, home=tmp_path / "home") | {"SAFESAIL_MODEL": str(tiny_model)}
        environment = {name: value for name, value in environment.items() if os.environ.get(name) != value}
        with serving("acme/mini", tmp_path, **environment) as address, opened(browser, address) as page:
            ask(page, "The president saw a bomb.")
            page.locator("#neurons button.neuron").first.click()
            page.locator("#inspector-card article").wait_for()
            page.locator("#inspector-ask").click()
            refusal = page.locator("#inspector-examples .note", has_text="your account has no access")
            refusal.wait_for()
            assert page.locator("#inspector-examples li").count() == 0
            page.locator("#inspector-card h2").wait_for()
            assert neurons(page)
            hub.grant("dataset", "acme/mini-examples", "bob")
            page.locator("#inspector-ask").click()
            page.locator("#inspector-examples li").first.wait_for()
            assert refusal.count() == 0


# --- what keeps it from starting ----------------------------------------------------------------------------------


def ended(release: Path | str, **environment: str) -> tuple[int, str, str]:
    """The Space as a process that ends at once: its exit status, output and errors."""
    inherited = {key: value for key, value in os.environ.items() if not key.startswith(("SAFESAIL_", "SPACE_"))}
    ours = {"SAFESAIL_RELEASE": str(release), "HF_HUB_OFFLINE": "1", **environment}
    command = [sys.executable, str(asset("space/app.py"))]
    done = subprocess.run(command, env=inherited | ours, capture_output=True, text=True, timeout=120)
    return done.returncode, done.stdout, done.stderr


def test_without_its_base_model_it_ends_with_one_sentence(demo_run: Path, tmp_path: Path) -> None:
    status, output, errors = ended(copied(demo_run, tmp_path / "release", "run.json"))
    assert (status, output) == (2, "")
    assert re.fullmatch(r"safesail: the tokenizer of safesail-tests/tiny-llama cannot be loaded: .*\n", errors)


def other_tokenizer(folder: Path, model: Path) -> Path:
    """A copy of a model whose tokenizer knows one word more."""
    from transformers import AutoTokenizer

    shutil.copytree(model, folder)
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.add_tokens(["zzz"])
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def refusal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """What the Space says on standard error when it ends at once; started in this process, as `safesail serve` does."""

    def said(release: Path, **settings: str) -> str:
        monkeypatch.syspath_prepend(str(asset("space")))
        for name, value in {"SAFESAIL_RELEASE": str(release), **QUIET, **settings}.items():
            monkeypatch.setenv(name, value)
        with pytest.raises(SystemExit) as caught:
            runpy.run_path(str(asset("space/app.py")), run_name="__main__")
        shown = capsys.readouterr()
        assert (caught.value.code, shown.out) == (2, "")
        return shown.err

    return said


def test_a_model_with_another_tokenizer_is_refused(
    refusal: Callable[..., str], demo_run: Path, tiny_model: Path, tmp_path: Path
) -> None:
    other = other_tokenizer(tmp_path / "other", tiny_model)
    assert refusal(demo_run, SAFESAIL_MODEL=str(other)) == (
        f"safesail: the tokenizer of {other} is not the one these SAEs were trained with; "
        "give the model safesail-tests/tiny-llama (`--model`).\n"
    )


@pytest.mark.parametrize("port", ["http", "-1", "99999", "", "²"])
def test_a_port_that_is_none_is_refused(refusal: Callable[..., str], demo_run: Path, port: str) -> None:
    said = f"safesail: SAFESAIL_PORT is {port!r}; set it to a number, as 7860.\n"
    assert refusal(demo_run, SAFESAIL_PORT=port) == said


def test_a_port_that_is_taken_is_refused(demo_run: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        said = f"safesail: cannot serve at 127.0.0.1:{port}; is the port taken? Set SAFESAIL_PORT to another.\n"
        assert ended(demo_run, SAFESAIL_PORT=port) == (2, "", said)


# --- too many visitors --------------------------------------------------------------------------------------------

HELD = """
import time
from pathlib import Path
from safesail.diagnosis.inspector import Inspector

answer = Inspector.answer

def held(*arguments, **options):
    while not Path({go!r}).exists():
        time.sleep(0.02)
    yield from answer(*arguments, **options)

Inspector.answer = held
"""


def asked(address: str) -> str:
    """Ask a question as a program does; the name under which its answer is kept."""
    body = json.dumps({"data": ["a bomb", "chat", 0, 0, 0, "", ""]}).encode()
    request = urllib.request.Request(
        f"{address}gradio_api/call/inspect", body, headers={"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=20) as reply:
        return json.load(reply)["event_id"]


def asked_in_time(address: str) -> str:
    """The same, once more while the first that waits has not begun to run and the queue is full."""
    for _ in range(200):
        try:
            return asked(address)
        except urllib.error.HTTPError as full:
            full.close()
        time.sleep(0.05)
    raise AssertionError("the queue stayed full for 10 seconds")


def answered(address: str, event: str) -> Any:
    """Wait for the answer."""
    with urllib.request.urlopen(f"{address}gradio_api/call/inspect/{event}", timeout=60) as stream:
        *_, kind, data = stream.read().decode().strip().splitlines()
    assert kind == "event: complete", data
    return json.loads(data.removeprefix("data: "))[0]


def test_a_visitor_too_many_is_told_at_once_and_nobody_else_is_lost(
    browser: Any, demo_run: Path, inspector: Inspector, tmp_path: Path
) -> None:
    go = tmp_path / "go"
    (tmp_path / "sitecustomize.py").write_text(HELD.format(go=str(go)))
    path = os.pathsep.join(filter(None, [str(tmp_path), os.environ.get("PYTHONPATH")]))
    with serving(demo_run, tmp_path, PYTHONPATH=path) as address:
        events = [asked_in_time(address) for _ in range(65)]  # one runs, 64 wait
        with pytest.raises(urllib.error.HTTPError, match="503") as refused:
            asked(address)
        with refused.value as reply:
            assert "Queue is full" in reply.read().decode()
        page = browser.new_page()
        page.goto(address)
        page.locator("#prompt textarea").fill("a bomb")
        start(page, "#run")
        busy = page.get_by_test_id("toast-text").filter(has_text="currently busy. Please try again.")
        tokens = page.locator("#strip button")
        busy.wait_for()
        go.touch()
        ids = inspector.inspect([{"role": "user", "content": "a bomb"}]).ids
        assert [answered(address, event)["ids"] for event in events] == [ids] * len(events)
        start(page, "#run")
        tokens.first.wait_for()
        page.close()
