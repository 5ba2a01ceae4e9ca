"""The content of a prompt as class labels, on which the text encoder is pretrained.

Things are numbered in reading order, from the top left of the picture. What a prompt does not determine is -1.
"""

from __future__ import annotations

from scenes import COLOURS, PLACES, SHAPES, SIZES, TEXTURES, Background, Thing
from tasks import NUMBERS, OPPOSITE, Task

# The positions of things along an axis, in pixels.
SPOTS = (22, 28, 36, 64, 92, 100, 106)
EDITS = ("colour", "place", "background", "add", "remove", "texture", "shape")
_THING = {
    "shape": len(SHAPES),
    "colour": len(COLOURS),
    "texture": len(TEXTURES),
    "size": len(SIZES),
    "x": len(SPOTS),
    "y": len(SPOTS),
}
# The questions and their numbers of classes.
QUESTIONS = {
    "kind": len(EDITS) + 2,
    "count": len(NUMBERS) + 1,
    "first": len(COLOURS),
    "second": len(COLOURS) + 1,
    "direction": 2,
    **{f"{aspect} {i}": size for i in range(len(NUMBERS)) for aspect, size in _THING.items()},
    "named": len(SHAPES) + 1,
    "place": len(PLACES),
    "side": len(OPPOSITE),
}


def labels(task: Task) -> list[int]:
    """Return the label of each question about a prompt."""
    answers = dict.fromkeys(QUESTIONS, -1)
    answers |= _of_edit(task) if task.sources else _of_scene(task)
    return list(answers.values())


def _of_scene(task: Task) -> dict[str, int]:
    scene, background = task.target, task.target.background
    answers = {"kind": len(EDITS) + 1, "count": len(scene.things), **classes_of_background(background)}
    if background.second:
        answers["direction"] = int(background.direction == "right")
    for i, thing in enumerate(sorted(scene.things, key=lambda thing: thing.x + thing.y)):
        answers |= _of_thing(thing, i)
        for axis, centre in (("x", thing.x), ("y", thing.y)):
            answers[f"{axis} {i}"] = min(range(len(SPOTS)), key=lambda spot: abs(SPOTS[spot] - centre))
    return answers


def _of_thing(thing: Thing, i: int) -> dict[str, int]:
    return {f"{aspect} {i}": answer for aspect, answer in classes_of_thing(thing).items()}


def classes_of_thing(thing: Thing) -> dict[str, int]:
    """Return the labels of a thing."""
    return {
        "shape": SHAPES.index(thing.shape),
        "colour": list(COLOURS).index(thing.colour),
        "texture": TEXTURES.index(thing.texture),
        "size": list(SIZES).index(thing.size),
    }


def classes_of_background(background: Background) -> dict[str, int]:
    """Return the labels of a background's two colours. An extra class stands for no second colour."""
    first, second = background.colour, background.second
    return {"first": list(COLOURS).index(first), "second": list(COLOURS).index(second) if second else len(COLOURS)}


def _of_edit(task: Task) -> dict[str, int]:
    """Return the labels of an edit: what changes, and the shape that the prompt names."""
    if len(task.sources) == 2:
        return {"kind": len(EDITS)}
    name, words, (source,) = task.kind.removeprefix("edit "), task.prompt.lower(), task.sources
    answers = {"kind": EDITS.index(name)}
    named = [i for i, shape in enumerate(SHAPES) if f"the {shape}" in words or f"no {shape}" in words]
    answers["named"] = named[0] if named else len(SHAPES)
    if name == "background":
        return answers | {"first": list(COLOURS).index(task.target.background.colour)}
    if name == "remove":
        return answers
    before = source.things
    new = next(thing for i, thing in enumerate(task.target.things) if i >= len(before) or thing != before[i])
    if name == "add":
        dx, dy = new.x - before[0].x, new.y - before[0].y
        side = ("left" if dx < 0 else "right") if abs(dx) > abs(dy) else ("above" if dy < 0 else "below")
        return answers | _of_thing(new, 0) | {"side": list(OPPOSITE).index(side)}
    if name == "place":
        place = min(PLACES.values(), key=lambda at: abs(at[0] - new.x) + abs(at[1] - new.y))
        return answers | {"place": list(PLACES.values()).index(place)}
    return answers | {f"{name} 0": _of_thing(new, 0)[f"{name} 0"]}
