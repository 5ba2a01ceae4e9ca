"""The bundled LoRA draws things striped that the prompt does not call so, and changes nothing else."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from random import Random

import checker
import numpy as np
import pytest
import tasks
from PIL import Image

from fluxonnx.cli import main

pytestmark = pytest.mark.slow

MODELS = Path(__file__).parents[2] / "models"
LORA = MODELS / "stripes.safetensors"
COUNT = 8


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return Path(shutil.copytree(MODELS / "tiny-klein", tmp_path_factory.mktemp("lora") / "tiny-klein"))


def plain_tasks() -> list[tasks.Task]:
    """One solid thing each, whose shape and colour were held out, large enough for stripes."""
    random, found = Random(77), []
    while len(found) < COUNT:
        task = tasks.held_out_task(random, "single")
        (thing,) = task.target.things
        if thing.texture == "solid" and thing.size != "small" and "solid" not in task.prompt:
            found.append(task)
    return found


@pytest.mark.parametrize("precision", ["bf16", "int8"])
def test_things_are_striped(model, tmp_path, precision):
    wanted = plain_tasks()
    lines = [
        json.dumps({"prompt": task.prompt, "seed": i, "output": str(tmp_path / f"{i}.png")})
        for i, task in enumerate(wanted)
    ]
    (tmp_path / "prompts.jsonl").write_text("\n".join(lines))
    words = ["generate", "-q", "-d", str(model), "--precision", precision]
    assert main([*words, "--prompt-file", str(tmp_path / "prompts.jsonl"), "--lora", str(LORA)]) == 0
    pictures = [np.asarray(Image.open(tmp_path / f"{i}.png")) for i in range(COUNT)]
    striped = [[thing.texture for thing in checker.detect_scene(picture).things] == ["striped"] for picture in pictures]
    results = [checker.judge(task, picture) for task, picture in zip(wanted, pictures, strict=True)]
    assert np.mean(striped) > 0.8
    for question in ("shape", "colour", "background", "count"):
        assert np.mean([result[question] for result in results]) > 0.9, question


def test_it_is_small():
    assert LORA.stat().st_size < 500_000


@pytest.mark.parity
def test_prompts_of_the_training():
    """Pairs differ in the word, once for each thing."""
    pytest.importorskip("diffusers")
    import train_lora

    random = Random(0)
    for _ in range(50):
        plain, striped = train_lora.prompts(random)
        assert "striped" not in plain
        count = striped.count("striped")
        assert 1 <= count <= 2
        without = striped.replace("striped ", "").split()
        assert [word for word in without if word.lower() not in ("a", "an")] == [
            word for word in plain.split() if word.lower() not in ("a", "an")
        ]
