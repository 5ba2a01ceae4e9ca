"""A server for all tests; the bundled model is exported once."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from fluxonnx.export import export
from tests.serve.pages import House
from tests.serving import Server, serving

TINY = Path(__file__).parent.parent.parent / "models/tiny-klein"


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled model with its graphs; tests must not change it."""
    copy = tmp_path_factory.mktemp("model") / "tiny-klein"
    shutil.copytree(TINY, copy, ignore=shutil.ignore_patterns("training"))
    export(copy)
    return copy


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the server."""
    return tmp_path_factory.mktemp("data")


@pytest.fixture(scope="session")
def server(model: Path, data: Path) -> Iterator[Server]:
    """A server that tests share: they leave no job in it, and count only what they add."""
    with serving(model, data, "--lora-dir", str(TINY.parent)) as server:
        yield server


@pytest.fixture(scope="module")
def home(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    started = House(model, tmp_path_factory.mktemp("page"))
    yield started
    started.end()


@pytest.fixture
def house(home: House) -> House:
    """A server of a file's own, for the tests of its page; it runs also where the test before has left it killed."""
    home.revive()
    return home
