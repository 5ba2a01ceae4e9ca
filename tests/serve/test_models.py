"""Which models stay in memory, what is freed for others, and how many pictures are drawn together."""

from __future__ import annotations

import shutil
import threading

import pytest

pytest.importorskip("starlette")

from fluxonnx.runtime.request import Request
from fluxonnx.serve.errors import ApiError
from fluxonnx.serve.models import Models, Opened
from fluxonnx.serve.settings import Settings

pytestmark = pytest.mark.slow

PLENTY, NOTHING = 1 << 40, 0


@pytest.fixture
def two(model, tmp_path):
    """two(free_memory): two models that are open."""
    other = shutil.copytree(model, tmp_path / "other")

    def two(free_memory):
        models = Models(Settings(models=(model, other), data=tmp_path / "data"), free_memory)
        models.open()
        return models

    return two


def wanted(name: str) -> dict:
    return {"model": name, "precision": "bf16"}


def draw(models: Models, name: str, prompt: str = "a red circle"):
    opened = models.ready(wanted(name))
    request = Request(prompt=prompt, width=64, height=64, steps=1)
    models.encode(opened, request)
    return opened, opened.flux.run(request, [1])[0]


def test_models_by_name(two):
    models = two(lambda: PLENTY)
    assert [held.id for held in models.all] == ["tiny-klein", "other"]
    assert models.find(None).id == "tiny-klein"
    assert models.find("other").precisions == ["bf16"]
    with pytest.raises(ApiError, match="there is no model 'third'"):
        models.find("third")
    with pytest.raises(ApiError, match="no build of precision 'int8'"):
        models.find("other").checked_precision("int8")
    models.close()


def test_models_stay_while_there_is_memory(two):
    models = two(lambda: PLENTY)
    first, picture = draw(models, "tiny-klein")
    second, same = draw(models, "other")
    assert first.stays
    assert (first.used, second.used) == (1, 2)
    assert picture.tobytes() == same.tobytes()
    models.close()


def test_the_model_that_was_not_used_for_longest_makes_room(two):
    free = [PLENTY]
    models = two(lambda: free[0])
    first, picture = draw(models, "tiny-klein")
    free[0] = NOTHING
    second, _ = draw(models, "other")
    assert (first.used, second.used > 0) == (0, True)
    again, same = draw(models, "tiny-klein")  # it is loaded again, and draws the same
    assert again is first
    assert second.used == 0
    assert picture.tobytes() == same.tobytes()
    models.close()


class Encoder:
    """A model of which only the prompts matter."""

    is_distilled = False

    def __init__(self):
        self.calls = []

    def encode_prompts(self, prompts, length):
        self.calls.append(prompts)

    def release_text_encoder(self):
        self.calls.append("released")


@pytest.mark.parametrize(("free", "released"), [(3_000_000_000, []), (2_000_000_000, ["released"])])
def test_the_text_encoder_is_kept_or_freed_by_memory(tmp_path, free, released):
    """With 1 GB of other weights, and what a run needs besides."""
    models = Models(Settings(models=(), data=tmp_path), lambda: free)
    opened = Opened(Encoder(), stays=True, weights=5_000_000_000, encoder=4_000_000_000)
    models.encode(opened, Request(prompt="a", negative_prompt="b"))
    assert opened.flux.calls == [["a", "b"], *released]


def test_a_known_prompt_is_not_encoded_again(two):
    models, events = two(lambda: PLENTY), []
    models.watch = lambda event: events.append(getattr(event, "component", ""))
    draw(models, "tiny-klein")
    draw(models, "tiny-klein")
    assert events.count("text_encoder") == 1
    models.close()


def test_without_memory_graphs_do_not_stay(two):
    models = two(lambda: NOTHING)
    opened, picture = draw(models, "tiny-klein")
    assert not opened.stays
    assert picture.size == (64, 64)
    models.close()


def test_readers_may_ask_while_another_draws(two):
    models = two(lambda: PLENTY)
    thread = threading.Thread(target=draw, args=(models, "tiny-klein"))
    thread.start()
    assert [held.flux.defaults["width"] for held in models.all] == [128, 128]
    thread.join()
    models.close()
