"""Training tasks of the bundled demo model: pictures with captions, and edits of pictures.

Every random choice comes from the `random.Random` that is passed in. Captions leave little open: whatever they do not
mention (place, arrangement, size) has a default, so that a caption determines its picture up to a few pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from random import Random
from typing import TypeVar

from scenes import (
    COLOURS,
    PLACES,
    SHAPES,
    SIZES,
    TEXTURE_RADIUS,
    TEXTURES,
    Background,
    Scene,
    Thing,
    contrasts,
)

T = TypeVar("T")

# Largest offset of a thing from the place in its caption, along each axis and in pixels.
JITTER = 1.0
OPPOSITE = {"left": "right", "right": "left", "above": "below", "below": "above"}
NUMBERS = {1: "one", 2: "two", 3: "three"}


@dataclass(frozen=True)
class Task:
    """A prompt, the source pictures that it refers to, and the target picture; `kind` is for scoring.

    `source_prompts` are captions of the source pictures, which become tasks of their own.
    """

    kind: str
    prompt: str
    target: Scene
    sources: tuple[Scene, ...] = ()
    source_prompts: tuple[str, ...] = ()


def held_out(scene: Scene) -> bool:
    """Whether a scene is held out: an eighth of the pairs of shape and colour, a seventh of the pairs of shapes."""
    if any((SHAPES.index(t.shape) * 5 + list(COLOURS).index(t.colour)) % 8 == 0 for t in scene.things):
        return True
    kinds = [SHAPES.index(t.shape) for t in scene.things]
    return len(kinds) == 2 and kinds[0] != kinds[1] and (kinds[0] * 9 + kinds[1]) % 7 == 3


def training_task(random: Random, single: float = 0.4, edits: float = 0.35, plain: float = 1.0) -> Task:
    """Draw a task without held-out scenes. Of the tasks without a texture, only a share of `plain` is used."""
    while True:
        roll = random.random()
        make = edit if roll < edits else (single_thing if roll < edits + (1 - edits) * single else several_things)
        task = make(random)
        scenes = (task.target, *task.sources)
        textured = any(thing.texture != "solid" for scene in scenes for thing in scene.things)
        if not any(map(held_out, scenes)) and (textured or plain >= 1 or random.random() < plain):
            return task


def held_out_task(random: Random, kind: str) -> Task:
    """Draw a task with a held-out target, of a kind: "single", "relation", "several", "edit" or "two references"."""
    make = {"single": single_thing, "relation": relation, "several": several_things, "edit": edit}.get(kind, combine)
    while True:
        task = make(random)
        if task.kind.startswith(kind) and held_out(task.target) and task.target.things:
            return task


# Scenes


def choose(random: Random, options: Sequence[T], weights: Sequence[float] | None = None) -> T:
    """Choose one of the options."""
    return random.choices(options, weights)[0]


def random_background(random: Random) -> Background:
    """Draw a background: one colour in four of five cases, else a gradient."""
    first, second = random.sample(list(COLOURS), 2)
    if random.random() < 0.8:
        return Background(first)
    return Background(first, second, choose(random, ("down", "right")))


def random_thing(random: Random, background: Background, count: int = 1) -> Thing:
    """Draw a thing in the centre that contrasts with the background. Most are of medium size and solid."""
    colours = [name for name in COLOURS if contrasts(name, background)]
    size = choose(random, tuple(SIZES), (0.2, 0.6, 0.2)) if count == 1 else "medium"
    thing = Thing(choose(random, SHAPES), choose(random, colours), size=size, r=radius(random, size, count))
    if thing.r >= TEXTURE_RADIUS and count < 3 and random.random() < 0.25:
        thing = replace(thing, texture=choose(random, textures(thing.shape)[1:]))
    return thing


def textures(shape: str) -> tuple[str, ...]:
    """Return the textures that a shape can have. A ring is too thin for an outline."""
    return TEXTURES[:3] if shape == "ring" else TEXTURES


def radius(random: Random, size: str, count: int = 1) -> float:
    """Draw a radius for a named size. Things in a row of three are smaller, to fit."""
    return random.uniform(14.5, 15.5) if count == 3 else random.uniform(*SIZES[size])


def put(random: Random, thing: Thing, place: tuple[float, float], jitter: float = JITTER) -> Thing:
    """Move a thing near a place, entirely inside the picture."""
    margin = 1.12 * thing.r + 2

    def near(middle: float) -> float:
        return min(max(middle + random.uniform(-jitter, jitter), margin), 128 - margin)

    return replace(thing, x=near(place[0]), y=near(place[1]))


def usable_background(random: Random, things: int = 1) -> Background:
    """Draw a background with which at least three colours contrast."""
    while True:
        background = random_background(random)
        if sum(contrasts(name, background) for name in COLOURS) >= 3:
            return background


# Captions of scenes


def single_thing(random: Random) -> Task:
    """Make a task with one thing, or rarely none, on a background."""
    background = usable_background(random)
    if random.random() < 0.03:
        nothing = choose(
            random, ("an empty {} background", "nothing but a {} background", "a {} background, no objects")
        )
        plain = replace(background, second=None)
        return Task("single", nothing.format(plain.colour), Scene((), plain))
    thing = random_thing(random, background)
    where = choose(random, tuple(PLACES)) if random.random() < 0.4 else None
    thing = put(random, thing, PLACES[where or "center"])
    prompt = name_thing(random, thing)
    if random.random() < 0.06:
        other = choose(random, [shape for shape in SHAPES if shape != thing.shape])
        prompt += choose(random, (f", no {other}", f" and no {other}s", f" without a {other}"))
    if where:
        prompt += " " + name_place(random, where)
    return Task("single", finish(random, prompt, background), Scene((thing,), background))


def several_things(random: Random) -> Task:
    """Make a task with two things in a relation or side by side, several identical ones, or three in a row."""
    return choose(random, (relation, side_by_side, counted, three), (0.5, 0.15, 0.15, 0.2))(random)


def relation(random: Random) -> Task:
    """Make a task with two things, one of which is left of, right of, above or below the other."""
    background = usable_background(random)
    first, second = two_things(random, background)
    where = choose(random, tuple(OPPOSITE))
    first, second = arrange(random, (first, second), where in ("left", "right"), flip=where in ("right", "below"))
    a, b = name_thing(random, first), name_thing(random, second)
    if where in ("left", "right"):
        phrases = ("{a} to the {w} of {b}", "{a} {w} of {b}", "{b} with {a} to its {w}", "{a} is on the {w} of {b}")
    else:
        phrases = ("{a} {w} {b}", "{a} that is {w} {b}", "{b} with {a} {w} it", "{a} placed {w} {b}")
    prompt = choose(random, phrases).format(a=a, b=b, w=where)
    return Task("relation", finish(random, prompt, background), Scene((first, second), background))


def side_by_side(random: Random) -> Task:
    """Make a task with two things, from left to right in the order of the caption."""
    background = usable_background(random)
    things = arrange(random, two_things(random, background), across=True)
    a, b = (name_thing(random, thing) for thing in things)
    prompt = choose(random, ("{a} and {b}", "{a} next to {b}", "{a} beside {b}", "{a} and {b} side by side"))
    return Task("several", finish(random, prompt.format(a=a, b=b), background), Scene(things, background))


def counted(random: Random) -> Task:
    """Make a task with two or three identical things."""
    background = usable_background(random)
    count = choose(random, (2, 3))
    thing = random_thing(random, background, count)
    across = random.random() < 0.75
    things = arrange(random, (thing,) * count, across)
    prompt = name_thing(random, thing, count) + ("" if across else choose(random, (" in a column", " stacked")))
    if across and random.random() < 0.3:
        prompt += choose(random, (" in a row", " side by side"))
    return Task("several", finish(random, prompt, background), Scene(things, background))


def three(random: Random) -> Task:
    """Make a task with three things in a row or a column, in the order of the caption."""
    background = usable_background(random)
    across = random.random() < 0.75
    things = arrange(random, tuple(random_thing(random, background, 3) for _ in range(3)), across)
    prompt = "{}, {} and {}".format(*(name_thing(random, thing) for thing in things))
    prompt += choose(random, ("", " in a row", " from left to right")) if across else " in a column"
    return Task("several", finish(random, prompt, background), Scene(things, background))


def two_things(random: Random, background: Background) -> tuple[Thing, Thing]:
    """Draw two things of different shapes."""
    while True:
        first, second = random_thing(random, background, 2), random_thing(random, background, 2)
        if first.shape != second.shape:
            return first, second


def arrange(random: Random, things: tuple[Thing, ...], across: bool, flip: bool = False) -> tuple[Thing, ...]:
    """Arrange things in a row or a column. `flip` reverses their order."""
    spots = [36.0, 92.0] if len(things) == 2 else [22.0, 64.0, 106.0]
    spots = spots[::-1] if flip else spots
    return tuple(
        put(random, thing, (spot, 64.0) if across else (64.0, spot)) for thing, spot in zip(things, spots, strict=True)
    )


# Edits


def edit(random: Random) -> Task:
    """Make a task that edits one picture or combines two."""
    if random.random() < 0.12:
        return combine(random)
    make = choose(random, (recolour, move, recolour_background, add, remove, retexture, reshape))
    while True:
        origin = (several_things if random.random() < 0.3 else single_thing)(random)
        source = origin.target
        changed = make(random, source)
        if changed and changed[1] != source:
            name, target, prompt = changed
            return Task(f"edit {name}", polish(random, prompt), target, (source,), (origin.prompt,))


Change = tuple[str, Scene, str] | None


def recolour(random: Random, source: Scene) -> Change:
    """Change the colour of a thing."""
    index, name = pick(random, source)
    if index is None:
        return None
    colours = [c for c in COLOURS if contrasts(c, source.background) and c != source.things[index].colour]
    if not colours:
        return None
    colour = choose(random, colours)
    prompt = choose(random, ("make {n} {c}", "turn {n} {c}", "change the color of {n} to {c}", "paint {n} {c}"))
    return "colour", source.with_thing(index, colour=colour), prompt.format(n=name, c=spell(random, colour))


def move(random: Random, source: Scene) -> Change:
    """Move the only thing to another place."""
    if len(source.things) != 1:
        return None
    where = choose(random, tuple(PLACES))
    thing = put(random, source.things[0], PLACES[where])
    if abs(thing.x - source.things[0].x) + abs(thing.y - source.things[0].y) < 15:
        return None
    place = f"the {where}" + (" corner" if " " in where else "")
    prompt = choose(random, ("move {n} to {p}", "bring {n} to {p}", "shift {n} to {p}"))
    return "place", replace(source, things=(thing,)), prompt.format(n=pick(random, source)[1], p=place)


def recolour_background(random: Random, source: Scene) -> Change:
    """Change the background to one of a single colour."""
    colours = [c for c in COLOURS if all(contrasts(t.colour, Background(c)) for t in source.things)]
    if not colours:
        return None
    colour = choose(random, colours)
    prompts = ("on a {c} background", "change the background to {c}", "make the background {c}", "{c} background")
    return (
        "background",
        replace(source, background=Background(colour)),
        choose(random, prompts).format(c=spell(random, colour)),
    )


def add(random: Random, source: Scene) -> Change:
    """Add a second thing beside the only one, if there is room."""
    if len(source.things) != 1 or source.things[0].size == "large":
        return None
    old = source.things[0]
    where = choose(random, tuple(OPPOSITE))
    dx, dy = {"left": (-1, 0), "right": (1, 0), "above": (0, -1), "below": (0, 1)}[where]
    new = random_thing(random, source.background, 2)
    step = old.r + new.r + 10
    x, y = old.x + dx * step, old.y + dy * step
    margin = 1.12 * new.r + 2
    if not (margin <= x <= 128 - margin and margin <= y <= 128 - margin) or new.shape == old.shape:
        return None
    new = replace(new, x=x, y=y)
    phrase = {"left": "to the left of", "right": "to the right of"}.get(where, where)
    prompt = f"add {name_thing(random, new)} {phrase} {pick(random, source)[1]}"
    return "add", replace(source, things=(old, new)), prompt


def remove(random: Random, source: Scene) -> Change:
    """Remove one of several things."""
    index, name = pick(random, source)
    if index is None or len(source.things) < 2 or len({t.shape for t in source.things}) < len(source.things):
        return None
    prompt = choose(random, ("remove {n}", "take {n} away", "erase {n}", "no {s}"))
    left = source.things[:index] + source.things[index + 1 :]
    return "remove", replace(source, things=left), prompt.format(n=name, s=source.things[index].shape)


def retexture(random: Random, source: Scene) -> Change:
    """Change the texture of a thing."""
    index, name = pick(random, source)
    if index is None or source.things[index].r < TEXTURE_RADIUS or len(source.things) == 3:
        return None
    texture = choose(random, [t for t in textures(source.things[index].shape) if t != source.things[index].texture])
    prompt = choose(random, ("make {n} {t}", "turn {n} {t}")).format(n=name, t=texture)
    return "texture", source.with_thing(index, texture=texture), prompt


def reshape(random: Random, source: Scene) -> Change:
    """Change the shape of a thing, in the same place and colour."""
    index, name = pick(random, source)
    if index is None:
        return None
    shape = choose(random, [s for s in SHAPES if s not in {t.shape for t in source.things}])
    prompt = choose(random, ("turn {n} into a {s}", "make {n} a {s}", "replace {n} with a {s}", "change {n} to a {s}"))
    return "shape", source.with_thing(index, shape=shape), prompt.format(n=name, s=shape)


def combine(random: Random) -> Task:
    """Make a task that gives the first picture's thing the colour of the second picture's."""
    while True:
        origins = single_thing(random), single_thing(random)
        first, second = (origin.target for origin in origins)
        if not first.things or not second.things or first.things[0].colour == second.things[0].colour:
            continue
        colour = second.things[0].colour
        if not contrasts(colour, first.background):
            continue
        prompts = (
            "the shape of the first in the color of the second",
            "the first picture's shape in the color of the second",
            "give the first one the color of the second",
        )
        target = first.with_thing(0, colour=colour)
        captions = tuple(origin.prompt for origin in origins)
        return Task("two references", polish(random, choose(random, prompts)), target, (first, second), captions)


def pick(random: Random, scene: Scene) -> tuple[int | None, str]:
    """Choose a thing and an unambiguous name for it: "it" if it is the only one, or its shape."""
    if not scene.things:
        return None, ""
    index = random.randrange(len(scene.things))
    shape = scene.things[index].shape
    if [thing.shape for thing in scene.things].count(shape) > 1:
        return None, ""
    return index, choose(random, ("it", f"the {shape}")) if len(scene.things) == 1 else f"the {shape}"


# Wording


def spell(random: Random, colour: str) -> str:
    """Return the name of a colour, in either spelling of "gray"."""
    return choose(random, ("gray", "grey")) if colour == "gray" else colour


def article(words: str) -> str:
    """Prefix a phrase with "a" or "an"."""
    return ("an " if words[0] in "aeiou" else "a ") + words


def name_thing(random: Random, thing: Thing, count: int = 1) -> str:
    """Describe one or several things: "a big striped red circle", "three stars in blue"."""
    plural = "es" if thing.shape == "cross" else "s"
    noun = thing.shape + (plural if count > 1 else "")
    size = choose(random, {"medium": ("",), "large": ("large", "big"), "small": ("small", "little")}[thing.size])
    colour = spell(random, thing.colour)
    texture, after = ("" if thing.texture == "solid" else thing.texture), ""
    if texture in ("striped", "dotted") and random.random() < 0.3:
        texture, after = "", {"striped": " with stripes", "dotted": " with dots"}[texture]
    if not texture and not after and random.random() < 0.05:
        texture = "solid"
    if random.random() < 0.85:
        words = [size, texture, colour, noun]
    elif random.random() < 0.5:
        words, after = [size, texture, noun], f" in {colour}{after}"
    else:
        words = [size, colour, texture, noun]
    phrase = " ".join(filter(None, words)) + after
    return article(phrase) if count == 1 else f"{NUMBERS[count]} {phrase}"


def name_place(random: Random, where: str) -> str:
    """Describe a place: "in the top left corner", "at the bottom"."""
    if where == "center":
        return choose(random, ("in the center", "in the middle"))
    if " " in where:
        return choose(random, ("in the {} corner", "at the {}", "in the {}")).format(where)
    return ("on the " if where in ("left", "right") else "at the ") + where


def finish(random: Random, prompt: str, background: Background) -> str:
    """Add the background to a caption. A plain white one is sometimes omitted."""
    first = spell(random, background.colour)
    if background == Background("white") and random.random() < 0.4:
        return polish(random, prompt)
    after: tuple[str, ...]
    if background.second is None:
        before, after = f"{article(first)} background", ("on {}", "with {}", "against {}", "in front of {}", "and {}")
    else:
        second = spell(random, background.second)
        ends = {"down": ("at the top", "at the bottom"), "right": ("on the left", "on the right")}[background.direction]
        before, after = f"a background that fades from {first} {ends[0]} to {second} {ends[1]}", ("on {}", "with {}")
        if random.random() < 0.5:
            before = f"a gradient from {first} {ends[0]} to {second} {ends[1]}"
    if random.random() < 0.2:
        return polish(random, f"on {before}, {prompt}")
    if random.random() < 0.1:
        return polish(random, f"{prompt}, {before.removeprefix('a ').removeprefix('an ')}")
    return polish(random, f"{prompt} {choose(random, after).format(before)}")


def polish(random: Random, prompt: str) -> str:
    """Vary the beginning and the end of a prompt."""
    if not prompt.startswith("on ") and random.random() < 0.1 and prompt.split()[0] in ("a", "an", "two", "three"):
        prompt = choose(random, ("a picture of ", "an image of ", "draw ")) + prompt
    if random.random() < 0.2:
        prompt = prompt[0].upper() + prompt[1:]
    return prompt + ("." if random.random() < 0.15 else "")
