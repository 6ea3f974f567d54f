"""Failures and interruptions at every kind of request, and that the token is nowhere."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hub_double import HubDouble
from made_publication import READS, TOKEN, running, silently, state

from safesail.errors import InputError
from safesail.release.plan import plan_publication
from safesail.release.publish import publish
from safesail.release.remote import Hub

WRITES = {
    "create": "POST /api/repos/create",
    "gate": "PUT /api/datasets/.*examples/settings",
    "preupload": "POST .*/preupload/",
    "lfs batch": "POST .*/info/lfs/objects/batch",
    "storage": "PUT /storage/",
    "commit": "POST .*neurons/commit/",
    "tag": "POST .*/tag/",
    "collection": "POST /api/collections$",
    "item": "POST /api/collections/.*/items",
    "visibility": "PUT /api/spaces/.*/settings",
    "open collection": "PATCH /api/collections/",
}
READINGS = {
    "whoami": "GET /api/whoami-v2",
    "card": "POST /api/validate-yaml",
    "info": "GET /api/models/acme/small-saes",
    "refs": "GET .*/refs",
    "tree": "GET .*/tree/",
    "collections": "GET /api/collections",
}


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory, release: Path) -> dict[str, Any]:
    """The state after a publication that nothing has disturbed."""
    with running(tmp_path_factory.mktemp("calm")) as hub:
        silently(release)
        return state(hub)


@pytest.mark.parametrize("how", [500, 429, "cut", "lost"])
def test_every_kind_of_request_may_fail_once(
    hub: HubDouble, release: Path, expected: dict[str, Any], naps: list[float], how: int | str
) -> None:
    for request in (WRITES | READINGS).values():
        hub.fail(request, how)
    silently(release)
    assert state(hub) == expected
    assert len([seen for seen in hub.requests if seen.status == how]) >= len(WRITES | READINGS) - 1


@pytest.mark.parametrize("name", WRITES)
def test_run_after_a_lasting_failure_goes_on(
    hub: HubDouble, release: Path, expected: dict[str, Any], naps: list[float], name: str
) -> None:
    hub.fail(WRITES[name], 503, times=100)
    with pytest.raises(InputError, match=r"could not .*the Hub answered 503.*run the same command again later"):
        silently(release)
    hub.recover()
    silently(release)
    assert state(hub) == expected


@pytest.mark.parametrize("n", [2, 7, 14, 20, 27])
def test_killed_process_is_gone_on_with(
    tmp_path: Path, hub: HubDouble, release: Path, expected: dict[str, Any], n: int
) -> None:
    code = "import sys; from pathlib import Path; from safesail.release import plan, publish\n"
    code += "publish.publish(plan.plan_publication(Path(sys.argv[1])))"
    child = subprocess.Popen(
        [sys.executable, "-c", code, str(release)], env=hub.environment(TOKEN), stdout=subprocess.DEVNULL
    )
    seen: list[str] = []

    def kill(request: str) -> bool:
        seen.append(request)
        written = [each for each in seen if not each.startswith(READS) and "validate-yaml" not in each]
        if len(written) == n and child.returncode is None:
            os.kill(child.pid, signal.SIGKILL)
        return False

    hub.fail(kill, 500)
    assert child.wait(60) == -signal.SIGKILL
    hub.recover()
    silently(release)
    assert state(hub) == expected


@pytest.mark.parametrize(
    ("status", "words"),
    [
        (401, "does not accept this login"),
        (402, "asks for payment"),
        (403, r"may not do that .*hf auth login"),
        (404, "it is not there, or not for this login"),
        (409, "changed it at the same time"),
        (412, "changed it at the same time"),
        (413, "larger than the account has room for"),
        (429, "rate limit is reached; run the same command again in some minutes"),
        (500, "answered 500"),
        (418, "answered 418"),
    ],
)
def test_refusal_of_the_hub_is_one_sentence(
    hub: HubDouble, release: Path, naps: list[float], status: int, words: str
) -> None:
    hub.fail("POST .*/commit/", status, times=100)
    with pytest.raises(InputError, match=f"could not upload acme/small-saes: .*{words}") as caught:
        silently(release)
    assert "\n" not in str(caught.value)
    assert TOKEN not in str(caught.value)


def test_hub_says_how_long_to_wait(hub: HubDouble, release: Path, naps: list[float]) -> None:
    hub.fail("GET /api/whoami-v2", 429, retry_after=7)
    said: list[str] = []
    publish(plan_publication(release), say=said.append)
    assert 8 in naps  # a second more than asked, since the headers are rounded
    assert "could not log in to the Hub (the Hub answered 429); trying again in 8 s" in said


def test_wait_that_is_too_long_is_left_to_the_person(hub: HubDouble, release: Path, naps: list[float]) -> None:
    hub.fail("GET /api/whoami-v2", 429, retry_after=3600)
    with pytest.raises(InputError, match="rate limit is reached; run the same command again in 3600 s"):
        silently(release)
    assert 3601 not in naps


def test_no_network_and_offline_mode_are_sentences(tmp_path: Path, release: Path, naps: list[float]) -> None:
    with HubDouble(tmp_path / "hub") as hub:
        with hub.used(TOKEN, offline=True), pytest.raises(InputError, match="switched off here by HF_HUB_OFFLINE"):
            silently(release)
        assert hub.requests == []
    with hub.used(TOKEN), pytest.raises(InputError, match=r"the Hub cannot be reached .* it goes on"):
        silently(release)


def test_token_is_nowhere(
    hub: HubDouble, release: Path, tmp_path: Path, naps: list[float], capfd: pytest.CaptureFixture[str]
) -> None:
    said: list[str] = []
    home = tmp_path / "home"
    home.mkdir()
    hub.fail("POST .*/commit/", 500, times=1)
    hub.fail("POST .*/tag/", 403, times=1)
    with hub.used(TOKEN, home=home):
        with pytest.raises(InputError) as caught:
            publish(plan_publication(release), say=said.append)
        done = publish(plan_publication(release), say=said.append)
    texts = [*said, *done.lines(), json.dumps(done.to_json()), str(caught.value), *capfd.readouterr()]
    texts += [repr(Hub.login(TOKEN)), json.dumps(plan_publication(release).to_json())]
    assert not any(TOKEN in text for text in texts)
    written = [path for folder in (release, home) for path in folder.rglob("*") if path.is_file()]
    assert not any(TOKEN.encode() in path.read_bytes() for path in written)


def test_answer_that_holds_the_token_is_printed_without_it(naps: list[float]) -> None:
    said: list[str] = []

    def refuse(_: Any) -> None:
        raise OSError(f"Bearer {TOKEN} was refused")

    with pytest.raises(InputError, match=r"could not try: Bearer … was refused"):
        Hub.login(TOKEN, said.append).ask("try", refuse)
