"""The scenes and tasks of the bundled demo model: captions match pictures, and the checker recovers drawn scenes."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from random import Random

import checker
import numpy as np
import pytest
import scenes
import tasks

pytestmark = pytest.mark.slow

COUNT = 120


@pytest.fixture(scope="module")
def drawn() -> list[tuple[tasks.Task, np.ndarray]]:
    """Tasks of all kinds, training and held-out ones, and their pictures."""
    random = Random(7)
    made = [tasks.training_task(random) for _ in range(COUNT // 2)]
    kinds = ("single", "relation", "several", "edit", "two references")
    made += [tasks.held_out_task(random, kinds[i % len(kinds)]) for i in range(COUNT // 2)]
    return [(task, scenes.draw(task.target)) for task in made]


def test_checker_recovers_drawn_scenes(drawn):
    """The checker is right on more than 99 % of all criteria, for pictures of known content."""
    results = [result for task, picture in drawn for result in checker.judge(task, picture).values()]
    assert np.mean(results) > 0.99


def test_checker_tolerates_noise(drawn):
    """Noise of standard deviation 8, a PSNR of about 30 dB, is as much error as a lossy autoencoder makes."""
    rng = np.random.default_rng(0)
    results = []
    for task, picture in drawn[:30]:
        noisy = np.clip(picture + rng.normal(0, 8, picture.shape), 0, 255).astype(np.uint8)
        results += checker.judge(task, noisy).values()
    assert np.mean(results) > 0.97


def test_checker_detects_each_kind_of_error():
    thing = scenes.Thing("circle", "red", x=64, y=64, r=18)
    scene = scenes.Scene((thing,), scenes.Background("white"))
    task = tasks.Task("single", "a red circle", scene)
    for change, wrong in (
        ({"shape": "square"}, {"shape"}),
        ({"colour": "blue"}, {"colour"}),
        ({"texture": "striped"}, {"texture"}),
        ({"x": 90.0}, {"place"}),
        ({"r": 29.0}, {"size"}),
    ):
        results = checker.judge(task, scenes.draw(scene.with_thing(0, **change)))
        assert {name for name, right in results.items() if not right} == wrong | {"all"}
    results = checker.judge(task, scenes.draw(replace(scene, background=scenes.Background("yellow"))))
    assert {name for name, right in results.items() if not right} == {"background", "all"}
    results = checker.judge(task, scenes.draw(replace(scene, things=())))
    assert not results["count"]
    assert not results["shape"]
    two = replace(scene, things=(thing, replace(thing, x=110.0, r=12.0)))
    assert not checker.judge(task, scenes.draw(two))["count"]


def test_edits_are_judged_by_the_change_and_by_the_rest():
    before = scenes.Scene((scenes.Thing("star", "green", x=40, y=64, r=18),), scenes.Background("white"))
    after = before.with_thing(0, colour="purple")
    task = tasks.Task("edit colour", "make it purple", after, (before,))

    def judged(scene):
        results = checker.judge(task, scenes.draw(scene))
        return results["change"], results["rest"]

    assert judged(after) == (True, True)
    assert judged(before) == (False, True)
    assert judged(after.with_thing(0, x=90.0)) == (True, False)
    assert judged(replace(after, background=scenes.Background("yellow"))) == (True, False)


def test_tokens_are_labelled_with_the_things_they_show():
    """Tokens that show part of a thing have the labels of that thing. Other tokens have none."""
    pytest.importorskip("torch")
    import probe

    random = Random(13)
    questions = list(probe.QUESTIONS)
    for _ in range(60):
        scene = tasks.training_task(random).target
        labels = probe.token_labels(scene).reshape(8, 8, -1)
        assert (labels < list(probe.QUESTIONS.values())).all()
        masks = np.array([scenes.outline(t.shape, t.x, t.y, t.r) for t in scene.things]).reshape(-1, 8, 16, 8, 16)
        shown = masks.sum((2, 4))
        for thing, covered in zip(scene.things, shown, strict=True):
            here = covered > 40
            assert (labels[here][:, questions.index("shape")] == scenes.SHAPES.index(thing.shape)).all()
            assert (labels[here][:, questions.index("colour")] == list(scenes.COLOURS).index(thing.colour)).all()
        alone = labels[..., 0] == 0
        assert (shown.sum(0)[alone] < 40).all()
        assert (labels[alone][:, 1 : questions.index("first")] == -1).all()


def test_training_tasks_have_no_held_out_scenes():
    random = Random(3)
    for _ in range(300):
        task = tasks.training_task(random)
        assert not any(tasks.held_out(scene) for scene in (task.target, *task.sources))
    for kind in ("single", "relation", "edit"):
        task = tasks.held_out_task(random, kind)
        assert tasks.held_out(task.target)
        assert task.kind.startswith(kind)


def test_an_eighth_of_the_shape_and_colour_pairs_is_held_out():
    pairs = [
        tasks.held_out(scenes.Scene((scenes.Thing(shape, colour),), scenes.Background("white")))
        for shape in scenes.SHAPES
        for colour in scenes.COLOURS
    ]
    assert 0.1 < np.mean(pairs) < 0.15


def test_captions_mention_every_thing_in_the_picture():
    random = Random(11)
    for _ in range(200):
        task = tasks.several_things(random)
        words = task.prompt.lower().replace("grey", "gray")
        for thing in task.target.things:
            assert thing.shape in words
            assert thing.colour in words
            assert (
                thing.texture == "solid"
                or {"striped": "strip", "dotted": "dot"}.get(thing.texture, "outlined") in words
            )
        background = task.target.background
        assert background.colour in words or background.colour == "white"


def test_captions_vary():
    random = Random(0)
    task_kinds = Counter(tasks.training_task(random).kind.split()[0] for _ in range(400))
    assert {"single", "relation", "several", "edit", "two"} <= set(task_kinds)
    assert len({tasks.training_task(random).prompt for _ in range(400)}) > 330


def test_things_are_inside_the_picture_and_do_not_overlap():
    random = Random(5)
    for _ in range(300):
        task = tasks.training_task(random)
        for scene in (task.target, *task.sources):
            for thing in scene.things:
                assert thing.r < thing.x < 128 - thing.r
                assert thing.r < thing.y < 128 - thing.r
            masks = [scenes.outline(t.shape, t.x, t.y, t.r) > 0.1 for t in scene.things]
            assert sum(mask.astype(int) for mask in masks).max() <= 1 if masks else True


def test_drawing_and_tasks_are_deterministic():
    random = Random(1)
    task = tasks.training_task(random)
    np.testing.assert_array_equal(scenes.draw(task.target), scenes.draw(task.target))
    assert tasks.training_task(Random(9)) == tasks.training_task(Random(9))
