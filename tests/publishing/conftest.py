"""A small release and an empty Hub."""

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hub_double import HubDouble
from made_publication import running, small_release


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_release(tmp_path_factory.mktemp("release") / "run")


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[HubDouble]:
    with running(tmp_path / "hub") as double:
        yield double


@pytest.fixture
def naps(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Nobody waits; the seconds that were asked for."""
    asked: list[float] = []
    monkeypatch.setattr(time, "sleep", asked.append)
    return asked
