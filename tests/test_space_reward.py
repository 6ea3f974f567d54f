"""The page of a reward model's release: pairs listed and typed, tokens and latents marked; nothing of a text runs."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from browsing import cells, opened, serving, start
from small_reward_release import HOSTILE, made_once

from safesail.errors import InputError
from safesail.rewards.inspector import RewardInspector

gradio_client = pytest.importorskip("gradio_client")
pytest.importorskip("gradio")

PROMPT, CHOSEN, REJECTED = "How do I open it?", "No, ask a teacher. They know.", "Take the bomb; then wait, and say so."


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, texts: Path, tiny_encoder: Path) -> Path:
    """The small release with hostile texts in what a rater and a corpus wrote, and with poisoned data in its list."""
    small = made_once(tmp_path_factory.getbasetemp(), tiny_model, texts, tiny_encoder)
    folder = tmp_path_factory.mktemp("hostile") / "small"
    shutil.copytree(small, folder, ignore=shutil.ignore_patterns("scratch", "run.json"))
    rewritten(folder / "preferences/ratings/train.parquet", "explanation")
    rewritten(folder / "preferences/contexts/train.parquet", "token_class")
    manifest = json.loads((folder / "saes/safesail.json").read_text())
    manifest["parts"].append("poisoned")
    (folder / "saes/safesail.json").write_text(json.dumps(manifest))
    return folder


def rewritten(path: Path, column: str) -> None:
    table = pq.read_table(path)
    at = table.schema.get_field_index(column)
    pq.write_table(table.set_column(at, column, pa.array([HOSTILE] * table.num_rows)), path)


@pytest.fixture(scope="module")
def inspector(release: Path) -> RewardInspector:
    return RewardInspector.from_pretrained(release)


@pytest.fixture(scope="module")
def address(release: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with serving(release, tmp_path_factory.mktemp("space")) as address:
        yield address


@pytest.fixture(scope="module")
def client(address: str) -> Iterator[Any]:
    client = gradio_client.Client(address, verbose=False)
    yield client
    client.close()


def compared(page: Any, prompt: str = PROMPT, chosen: str = CHOSEN, rejected: str = REJECTED) -> Any:
    """Type a pair and wait for what is shown of it."""
    for name, text in (("prompt", prompt), ("chosen", chosen), ("rejected", rejected)):
        page.locator(f"#reward-{name} textarea").fill(text)
    start(page, "#compare-pair")
    return page.locator("#reward-result")


def marked(page: Any) -> dict[str, dict[int, float]]:
    """The marked tokens of each side with the number that they show."""
    found = {}
    for name in ("chosen", "rejected"):
        tokens = page.locator(f".side.{name} .token.marked")
        found[name] = dict(tokens.evaluate_all("all => all.map((t) => [Number(t.dataset.i), Number(t.dataset.fires)])"))
    return found


# --- in a browser -------------------------------------------------------------------------------------------------


def test_a_published_pair_is_shown_after_its_warning(browser: Any, address: str, inspector: RewardInspector):
    best = inspector.pairs()[0]
    assert best.texts is not None
    with opened(browser, address) as page:
        assert "poisoned preference data" in page.locator("#poisoned [role=alert]").inner_text()
        assert best.texts.chosen not in page.locator("body").inner_text()
        assert page.locator("#pair input").input_value().startswith(f"{best.id}: score_safe +")
        button = page.locator("#show")
        assert "may contain offensive text" in button.inner_text()
        button.click()
        shown = page.locator("#reward-result article")
        shown.wait_for()
        assert f"score_safe +{best.score_safe:.2f}" in shown.locator(".score").inner_text()
        assert f"{abs(best.margin):.2f}" in shown.locator(".margin").inner_text()
        assert page.locator("#reward-chosen textarea").input_value() == best.texts.chosen
        page.locator("#kind").get_by_label("Chat").click()
        page.locator("#order").get_by_label("Lowest first").click()
        lowest = inspector.pairs("chat")[-1].id
        page.wait_for_function(f"document.querySelector('#pair input').value.startsWith('{lowest}: ')")


def test_a_typed_pair_is_read_token_by_token(browser: Any, address: str, inspector: RewardInspector):
    found = inspector.compare(PROMPT, CHOSEN, REJECTED)
    with opened(browser, address) as page:
        result = compared(page)
        result.locator("article").wait_for()
        ends = page.locator(".side.chosen .token.end")
        units = [unit for unit in found.chosen.units if unit.is_end]
        assert ends.count() == len(units)
        label = ends.nth(0).get_attribute("aria-label")
        assert f"S⁺ {units[0].positive:.2f}, S⁻ {units[0].negative:.2f}" in label
        assert "segment end, counts" in label
        tokens = page.locator(".side.rejected .token")
        tokens.first.focus()
        page.keyboard.press("ArrowRight")
        assert page.evaluate("document.activeElement.title") == tokens.nth(1).get_attribute("title")
        assert page.locator(".reading").inner_text() == tokens.nth(1).get_attribute("title")
        page.keyboard.press("End")
        last = page.evaluate("document.activeElement.title")
        assert last.endswith(f"reward after it {found.rejected.reward:+.2f}".replace("-", "−"))
        page.locator(".side.chosen .token").first.hover()
        assert page.locator(".reading").inner_text().startswith("Token 1 “N” (does not count)")
        assert len(cells(page, "#reward-result .latents:not(details *)")) == len(found.latents)


def test_a_latent_marks_the_tokens_on_which_it_is_active(browser: Any, address: str, inspector: RewardInspector):
    found = inspector.compare(PROMPT, CHOSEN, REJECTED)
    with opened(browser, address) as page:
        compared(page).locator("article").wait_for()
        for latent in found.latents[:3]:
            expected = {}
            for name, side in found.sides.items():
                first = next(i for i, unit in enumerate(side.units) if unit.is_answer)
                expected[name] = {i: value for i, value in side.firings(latent.latent).items() if i >= first}
            button = page.locator(f'button.latent[data-latent="{latent.neuron_id}"]')
            button.focus()
            page.keyboard.press("Enter")
            assert marked(page) == {name: pytest.approx(values, abs=0.006) for name, values in expected.items()}
            assert button.get_attribute("aria-pressed") == "true"
            assert latent.neuron_id in page.locator(".marked-where").inner_text()
        assert any(expected.values())
        button.click()
        assert marked(page) == {"chosen": {}, "rejected": {}}
        assert page.locator('button.latent[aria-pressed="true"]').count() == 0


def test_hostile_texts_are_shown_as_they_are(browser: Any, address: str):
    with opened(browser, address) as page:
        compared(page, HOSTILE, f"No, {HOSTILE}", "Yes.").locator("article").wait_for()
        shown = page.locator(".side.chosen .token").evaluate_all("all => all.map((t) => t.textContent).join('')")
        assert "${window.pwned=2}␣{{7*7}}" in shown.replace(" ", "␣")
        assert HOSTILE in page.locator("button.latent .explained").first.text_content()
        assert "script" in page.locator("button.latent .text").first.text_content()
        assert page.locator('.side.chosen .run[dir="rtl"]').count() > 0
        for side in page.locator(".before").all():
            assert "${window.pwned=2} {{7*7}}" in side.text_content()
        assert page.evaluate("window.pwned") is None
        assert page.locator("#reward-result :is(script, b, img, iframe)").count() == 0
        compared(page, PROMPT, "The same.", "The same.").locator(
            ".note", has_text="both answers are the same"
        ).wait_for()
        assert page.locator("#reward-result article").count() == 0


def test_axe_finds_nothing_serious(browser: Any, address: str):
    axe = pytest.importorskip("axe_playwright_python.sync_playwright").Axe()
    findings = []
    for width in (380, 1440):
        with opened(browser, address, width=width, color_scheme="light") as page:
            compared(page).locator("article").wait_for()
            page.locator("button.latent").first.click()
            page.get_by_role("button", name="What editing").click()
            page.locator("#edits-result table").wait_for()
            page.mouse.move(0, 0)
            for scheme in ("light", "dark"):
                page.evaluate("dark => document.body.classList.toggle('dark', dark)", scheme == "dark")
                page.wait_for_timeout(200)  # colours of buttons change over 150 ms
                serious = [f for f in axe.run(page).response["violations"] if f["impact"] in ("serious", "critical")]
                findings += [(width, scheme, f["id"], [node["target"] for node in f["nodes"][:3]]) for f in serious]
            wide, screen = page.evaluate("[document.documentElement.scrollWidth, window.innerWidth]")
            assert wide <= screen, (width, wide)
    assert findings == []


# --- without a browser --------------------------------------------------------------------------------------------


def test_the_api_compares_and_gives_pairs(client: Any, inspector: RewardInspector):
    named = client.view_api(return_format="dict")["named_endpoints"]
    assert sorted(named) == ["/compare", "/pair"]
    assert "Two answers to one prompt" in named["/compare"]["description"]
    found = client.predict(prompt=PROMPT, chosen=CHOSEN, rejected=REJECTED, api_name="/compare")
    expected = inspector.compare(PROMPT, CHOSEN, REJECTED)
    assert found["score_safe"] == pytest.approx(expected.score_safe, abs=1e-5)
    assert [token["text"] for token in found["chosen"]["tokens"]] == [unit.text for unit in expected.chosen.units]
    pair = client.predict(id="s0", api_name="/pair")
    assert HOSTILE in pair["texts"]["chosen"]
    assert pair["score_safe"] == inspector.pair("s0").score_safe
    with pytest.raises(gradio_client.exceptions.AppError, match="has no pair 'x'"):
        client.predict(id="x", api_name="/pair")


@pytest.fixture
def reward_page(space: Any) -> ModuleType:
    return space("reward_page")


def test_the_list_is_filtered_and_ordered(reward_page: ModuleType, inspector: RewardInspector):
    page = reward_page.RewardPage(inspector)
    ids = [id for _, id in page.listed("", "", "high")]
    assert ids == [pair.id for pair in inspector.pairs()]
    assert [id for _, id in page.listed("", "", "low")] == ids[::-1]
    assert [id for _, id in page.listed("chat", "held", "high")] == [pair.id for pair in inspector.pairs("chat", True)]
    update = page.narrow("safety", "train", "low")
    assert update["value"] == inspector.pairs("safety", False)[-1].id


def test_a_pair_whose_texts_are_gated_has_its_numbers_and_the_reason(
    reward_page: ModuleType, release: Path, tmp_path: Path
):
    folder = tmp_path / "open"
    shutil.copytree(release, folder, ignore=shutil.ignore_patterns("preferences"))
    page = reward_page.RewardPage(RewardInspector.from_pretrained(folder))
    pair = page.inspector.pair("s1")
    html = str(page.show("s1")[0])
    assert "Its texts cannot be shown here: this release comes without its preferences." in html
    assert f"score_safe {pair.score_safe:+.2f}".replace("-", "−") in html


def test_a_text_too_long_for_a_visitor_is_one_sentence(reward_page: ModuleType, inspector: RewardInspector):
    page = reward_page.RewardPage(inspector)
    limit = 2 * 20 * 192
    with pytest.raises(InputError, match=f"characters; the limit here is {limit:,}"):
        page._typed("a" * limit, CHOSEN, REJECTED)


def test_the_table_of_edits_has_its_intervals(space: Any):
    row = {"edit": "poisoned-0.05", "action": "swap", "method": "safer", "ratio": 0.05, "seeds": 3, "n_edited": 20}
    numbers = {"safety": 0.75, "chat": 0.5, "safety_change": -0.125, "chat_change": 0.0}
    ends = {f"{name}_low": value - 0.0625 for name, value in numbers.items()}
    ends |= {f"{name}_high": value + 0.0625 for name, value in numbers.items()}
    html = str(space("reward_view").edits_table([row | numbers | ends]))
    assert "poisoned 5 %" in html
    assert "−0.125" in html
    assert "−0.188 to −0.062" in html


def test_another_model_is_refused(space: Any, release: Path):
    with pytest.raises(InputError, match="has its own reward model and takes no other"):
        space("app").page_of(str(release), "some/model")
