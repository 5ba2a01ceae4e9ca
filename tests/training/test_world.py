"""The world of the small model: drawn as described, described as drawn, and found again by the checker."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from random import Random

import numpy as np
import pytest

scenes = pytest.importorskip("scenes")
tasks = pytest.importorskip("tasks")
checker = pytest.importorskip("checker")
sight = pytest.importorskip("sight")

COUNT = 120


@pytest.fixture(scope="module")
def drawn() -> list:
    """Tasks of all kinds, held out or not, and their pictures."""
    random = Random(7)
    made = [tasks.training_task(random) for _ in range(COUNT // 2)]
    kinds = ("single", "relation", "several", "edit", "two references")
    made += [tasks.held_out_task(random, kinds[i % len(kinds)]) for i in range(COUNT // 2)]
    return [(task, scenes.draw(task.target)) for task in made]


def test_checker_finds_what_was_drawn(drawn):
    """Over 99 % of all questions about pictures whose content is known."""
    marks = [mark for task, picture in drawn for mark in checker.judge(task, picture).values()]
    assert np.mean(marks) > 0.99


def test_checker_tolerates_noise(drawn):
    """As much as a lossy autoencoder makes: 30 dB."""
    rng = np.random.default_rng(0)
    marks = []
    for task, picture in drawn[:30]:
        noisy = np.clip(picture + rng.normal(0, 8, picture.shape), 0, 255).astype(np.uint8)
        marks += checker.judge(task, noisy).values()
    assert np.mean(marks) > 0.97


def test_checker_sees_what_is_wrong():
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
        marks = checker.judge(task, scenes.draw(scene.with_thing(0, **change)))
        assert {name for name, right in marks.items() if not right} == wrong | {"all"}
    marks = checker.judge(task, scenes.draw(replace(scene, background=scenes.Background("yellow"))))
    assert {name for name, right in marks.items() if not right} == {"background", "all"}
    marks = checker.judge(task, scenes.draw(replace(scene, things=())))
    assert not marks["count"]
    assert not marks["shape"]
    two = replace(scene, things=(thing, replace(thing, x=110.0, r=12.0)))
    assert not checker.judge(task, scenes.draw(two))["count"]


def test_edits_are_judged_by_what_changes_and_what_stays():
    before = scenes.Scene((scenes.Thing("star", "green", x=40, y=64, r=18),), scenes.Background("white"))
    after = before.with_thing(0, colour="purple")
    task = tasks.Task("edit colour", "make it purple", after, (before,))

    def judged(scene):
        marks = checker.judge(task, scenes.draw(scene))
        return marks["change"], marks["rest"]

    assert judged(after) == (True, True)
    assert judged(before) == (False, True)
    assert judged(after.with_thing(0, x=90.0)) == (True, False)
    assert judged(replace(after, background=scenes.Background("yellow"))) == (True, False)


def test_tokens_are_labelled_with_the_things_they_show():
    """Every token in which a thing changes pixels says which thing, and none that is far from all things does."""
    random = Random(13)
    questions = list(sight.QUESTIONS)
    for _ in range(60):
        scene = tasks.training_task(random).target
        labels = sight.token_labels(scene).reshape(8, 8, -1)
        assert (labels < list(sight.QUESTIONS.values())).all()
        masks = np.array([scenes.outline(t.shape, t.x, t.y, t.r) for t in scene.things]).reshape(-1, 8, 16, 8, 16)
        shown = masks.sum((2, 4))
        for thing, covered in zip(scene.things, shown, strict=True):
            here = covered > 40
            assert (labels[here][:, questions.index("shape")] == scenes.SHAPES.index(thing.shape)).all()
            assert (labels[here][:, questions.index("colour")] == list(scenes.COLOURS).index(thing.colour)).all()
        alone = labels[..., 0] == 0
        assert (shown.sum(0)[alone] < 40).all()
        assert (labels[alone][:, 1 : questions.index("first")] == -1).all()


def test_nothing_held_out_is_trained_on():
    random = Random(3)
    for _ in range(300):
        task = tasks.training_task(random)
        assert not any(tasks.held_out(scene) for scene in (task.target, *task.sources))
    for kind in ("single", "relation", "edit"):
        task = tasks.held_out_task(random, kind)
        assert tasks.held_out(task.target)
        assert task.kind.startswith(kind)


def test_an_eighth_is_held_out():
    pairs = [
        tasks.held_out(scenes.Scene((scenes.Thing(shape, colour),), scenes.Background("white")))
        for shape in scenes.SHAPES
        for colour in scenes.COLOURS
    ]
    assert 0.1 < np.mean(pairs) < 0.15


def test_captions_name_what_is_in_the_picture():
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


def test_things_are_inside_and_apart():
    random = Random(5)
    for _ in range(300):
        for scene in (lambda task: (task.target, *task.sources))(tasks.training_task(random)):
            for thing in scene.things:
                assert thing.r < thing.x < 128 - thing.r
                assert thing.r < thing.y < 128 - thing.r
            masks = [scenes.outline(t.shape, t.x, t.y, t.r) > 0.1 for t in scene.things]
            assert sum(mask.astype(int) for mask in masks).max() <= 1 if masks else True


def test_drawing_depends_on_nothing_else():
    random = Random(1)
    task = tasks.training_task(random)
    np.testing.assert_array_equal(scenes.draw(task.target), scenes.draw(task.target))
    assert tasks.training_task(Random(9)) == tasks.training_task(Random(9))
