"""End to end, through the command line: the bundled demo model draws what a prompt asks for.

The rule-based checker detects the content of pictures; test_scenes.py tests its accuracy. The bounds are lower than the
scores in models/README.md, to allow for the variance of a small sample.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from random import Random

import checker
import numpy as np
import pytest
import scenes
import tasks
from PIL import Image

from fluxonnx.cli import main

pytestmark = pytest.mark.slow

MODELS = Path(__file__).parents[2] / "models"
COUNT = 40
# Smallest accepted share of single things for which each criterion is met.
SINGLE = {"background": 0.95, "colour": 0.92, "shape": 0.92, "place": 0.95}
# The same for edits, and for edits with two references.
EDITED = {"edit": {"change": 0.8, "rest": 0.75}, "two references": {"change": 0.85, "rest": 0.75}}
# Largest accepted loss of the mean share. With 40 pictures and 4 criteria, it allows 3 more errors among 160 results.
QUANTISATION_LOSS = 0.02


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """A copy of the model, since the graphs are exported next to the weights."""
    return Path(shutil.copytree(MODELS / "tiny-klein", tmp_path_factory.mktemp("shipped") / "tiny-klein"))


def draw(model: Path, folder: Path, lines: Sequence[dict], *flags: str) -> list[np.ndarray]:
    """Generate one picture per line of a prompt file: uint8 [height, width, 3] each."""
    folder.mkdir(exist_ok=True)
    paths = [folder / f"{i}.png" for i in range(len(lines))]
    text = "\n".join(json.dumps({**line, "output": str(path)}) for line, path in zip(lines, paths, strict=True))
    (folder / "prompts.jsonl").write_text(text)
    assert main(["generate", "-q", "-d", str(model), "--prompt-file", str(folder / "prompts.jsonl"), *flags]) == 0
    return [np.asarray(Image.open(path)) for path in paths]


def singles(count: int = COUNT) -> list[tasks.Task]:
    """Tasks with one thing, in held-out pairs of shape and colour."""
    random = Random(77)
    return [tasks.held_out_task(random, "single") for _ in range(count)]


def scores(wanted: Sequence[tasks.Task], pictures: Sequence[np.ndarray]) -> dict[str, float]:
    """The share of pictures that meet each criterion."""
    results = [checker.judge(task, picture) for task, picture in zip(wanted, pictures, strict=True)]
    return {question: float(np.mean([result[question] for result in results])) for question in results[0]}


def prompts(wanted: Sequence[tasks.Task]) -> list[dict]:
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
def test_quantised_builds_draw_the_same_things(model, tmp_path, drawn, precision):
    wanted = singles()
    found = scores(wanted, draw(model, tmp_path / precision, prompts(wanted), "--precision", precision))
    assert np.mean([found[key] for key in SINGLE]) >= np.mean([drawn[key] for key in SINGLE]) - QUANTISATION_LOSS


@pytest.mark.parametrize("kind", EDITED)
def test_edits_make_the_requested_change_and_keep_the_rest(model, tmp_path, kind):
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
    """Strength 0 keeps the picture, 0.5 changes colours but keeps the layout, 1 keeps nothing."""
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
    middle, whole = checker.detect_scene(found["0.5"]), checker.detect_scene(found["1"])
    assert [(thing.colour, np.hypot(thing.x - 28, thing.y - 28) < checker.PLACE) for thing in middle.things] == [
        ("blue", True)
    ]
    assert (middle.background.colour, whole.background.colour) == ("white", "green")
    assert [(thing.shape, thing.colour) for thing in whole.things] == [("heart", "blue")]
    assert np.hypot(whole.things[0].x - 64, whole.things[0].y - 64) < checker.PLACE


def test_guidance(tmp_path):
    """With guidance, the base model follows the prompt and avoids the content of the negative prompt."""
    model = Path(shutil.copytree(MODELS / "tiny-klein-base", tmp_path / "base"))
    lines = [{"prompt": f"a {colour} square on a white background", "seed": 3} for colour in ("red", "blue", "green")]
    flags = ["-s", "12", "-g", "2", "--negative-prompt", "a circle on a purple background"]
    for line, picture in zip(lines, draw(model, tmp_path, lines, *flags), strict=True):
        found = checker.detect_scene(picture)
        assert found.background.colour == "white"
        assert [thing.colour for thing in found.things] == [line["prompt"].split()[1]]
