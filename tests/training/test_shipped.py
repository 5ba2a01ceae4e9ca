"""Meaning, not numbers: the whole program, through the command line, draws what it was asked with the model in the box.

The checker explains pictures by the scenes that would be drawn like them; see tests/training/test_world.py for its own
accuracy. Bounds lie below the scores in models/README.md by what so few pictures may differ from them.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from random import Random

import numpy as np
import pytest
from PIL import Image

from fluxonnx.cli import main

scenes = pytest.importorskip("scenes")
tasks = pytest.importorskip("tasks")
checker = pytest.importorskip("checker")

MODELS = Path(__file__).parents[2] / "models"
COUNT = 40
# Least shares of single things whose ... is right.
SINGLE = {"background": 0.95, "colour": 0.92, "shape": 0.92, "place": 0.95}
# Of edits, and of two references.
EDITED = {"edit": {"change": 0.8, "rest": 0.75}, "two references": {"change": 0.85, "rest": 0.75}}
# A point is a hundredth of all answers: with 40 pictures and 5 questions, 2 points are 4 answers.
QUANTISATION_LOSS = 0.02


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """A copy, since graphs are written beside the weights."""
    return Path(shutil.copytree(MODELS / "tiny-klein", tmp_path_factory.mktemp("shipped") / "tiny-klein"))


def draw(model: Path, folder: Path, lines: Sequence[dict], *flags: str) -> list[np.ndarray]:
    """Make a picture per line of a prompt file: uint8 [height, width, 3] each."""
    folder.mkdir(exist_ok=True)
    paths = [folder / f"{i}.png" for i in range(len(lines))]
    text = "\n".join(json.dumps({**line, "output": str(path)}) for line, path in zip(lines, paths, strict=True))
    (folder / "prompts.jsonl").write_text(text)
    assert main(["generate", "-q", "-d", str(model), "--prompt-file", str(folder / "prompts.jsonl"), *flags]) == 0
    return [np.asarray(Image.open(path)) for path in paths]


def singles(count: int = COUNT) -> list:
    """Tasks of one thing, of shapes and colours that were never trained on together."""
    random = Random(77)
    return [tasks.held_out_task(random, "single") for _ in range(count)]


def scores(wanted: Sequence, pictures: Sequence[np.ndarray]) -> dict[str, float]:
    """The share of pictures that is right about each question."""
    marks = [checker.judge(task, picture) for task, picture in zip(wanted, pictures, strict=True)]
    return {question: float(np.mean([mark[question] for mark in marks])) for question in marks[0]}


def prompts(wanted: Sequence) -> list[dict]:
    return [{"prompt": task.prompt, "seed": i} for i, task in enumerate(wanted)]


@pytest.fixture(scope="module")
def drawn(model, tmp_path_factory) -> dict[str, float]:
    wanted = singles()
    pictures = draw(model, tmp_path_factory.mktemp("drawn"), prompts(wanted))
    assert {picture.shape for picture in pictures} == {(128, 128, 3)}
    return scores(wanted, pictures)


@pytest.mark.parametrize("question", SINGLE)
def test_text_to_image(drawn, question):
    assert drawn[question] >= SINGLE[question]


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_few_bits_draw_the_same_things(model, tmp_path, drawn, precision):
    wanted = singles()
    found = scores(wanted, draw(model, tmp_path / precision, prompts(wanted), "--precision", precision))
    assert np.mean([found[key] for key in SINGLE]) >= np.mean([drawn[key] for key in SINGLE]) - QUANTISATION_LOSS


@pytest.mark.parametrize("kind", EDITED)
def test_edits_change_what_is_named_and_keep_the_rest(model, tmp_path, kind):
    random = Random(5)
    wanted = [tasks.held_out_task(random, kind) for _ in range(24)]
    pictures = []
    for i, task in enumerate(wanted):
        flags, output = ["-p", task.prompt, "-S", str(i)], tmp_path / "out.png"
        for number, scene in enumerate(task.sources):
            source = tmp_path / f"source{number}.png"
            Image.fromarray(scenes.draw(scene)).save(source)
            flags += ["-i", str(source)]
        assert main(["generate", "-q", "-d", str(model), *flags, "-o", str(output)]) == 0
        pictures.append(np.asarray(Image.open(output)))
    found, least = scores(wanted, pictures), EDITED[kind]
    assert {question: found[question] >= least[question] for question in least} == dict.fromkeys(least, True)


def test_strength(model, tmp_path):
    """0 keeps the picture, 0.5 recolours it and keeps its layout, 1 keeps nothing."""
    scene = scenes.Scene((scenes.Thing("square", "red", x=28, y=28),), scenes.Background("white"))
    source = tmp_path / "source.png"
    Image.fromarray(scenes.draw(scene)).save(source)
    found = {}
    for strength, prompt in (
        ("0", "a blue heart on a green background"),
        ("0.5", "a blue square in the top left corner on a white background"),
        ("1", "a blue heart on a green background"),
    ):
        output = tmp_path / f"{strength}.png"
        arguments = ["-p", prompt, "-i", str(source), "-t", strength, "-S", "1", "-o", str(output)]
        assert main(["generate", "-q", "-d", str(model), *arguments]) == 0
        found[strength] = np.asarray(Image.open(output))
    np.testing.assert_array_equal(found["0"], scenes.draw(scene))
    middle, whole = checker.look(found["0.5"]), checker.look(found["1"])
    assert [(thing.colour, np.hypot(thing.x - 28, thing.y - 28) < checker.PLACE) for thing in middle.things] == [
        ("blue", True)
    ]
    assert (middle.background.colour, whole.background.colour) == ("white", "green")
    assert [(thing.shape, thing.colour) for thing in whole.things] == [("heart", "blue")]
    assert np.hypot(whole.things[0].x - 64, whole.things[0].y - 64) < checker.PLACE


def test_guidance(tmp_path):
    """With the base model: a prompt and guidance draw the thing, and lead away from a negative prompt's."""
    model = Path(shutil.copytree(MODELS / "tiny-klein-base", tmp_path / "base"))
    lines = [{"prompt": f"a {colour} square on a white background", "seed": 3} for colour in ("red", "blue", "green")]
    flags = ["-s", "12", "-g", "2", "--negative-prompt", "a circle on a purple background"]
    for line, picture in zip(lines, draw(model, tmp_path, lines, *flags), strict=True):
        found = checker.look(picture)
        assert found.background.colour == "white"
        assert [thing.colour for thing in found.things] == [line["prompt"].split()[1]]
