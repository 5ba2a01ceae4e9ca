"""Values, mentions of pictures and commands of a session, from text."""

from __future__ import annotations

from pathlib import Path

import pytest

from fluxonnx.errors import UsageError
from fluxonnx.runtime.fields import FIELDS
from fluxonnx.terminal.commands import found_name, known_names
from fluxonnx.terminal.references import Made, resolve
from fluxonnx.terminal.settings import SETTABLE, in_our_words, parse, shown, size

MADE = [Made(Path(f"{name}.png"), name, 1, (64, 64)) for name in "abc"]


def value(name: str, text: str):
    return parse(SETTABLE[name], text, Path)


def test_every_value_of_a_request_can_be_set():
    known = {field.name for field in SETTABLE.values()}
    assert {field.name for field in FIELDS if field.flags} - known == {"prompt", "output"}
    for field in FIELDS:
        for flag in field.flags if field.name in known else ():
            assert SETTABLE[flag.lstrip("-")] is field


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("steps", "8", 8),
        ("s", "8", 8),
        ("seed", "42", [42]),
        ("seed", "1 2 3", [1, 2, 3]),
        ("guidance", "4.5", 4.5),
        ("guidance_scale", "4.5", 4.5),
        ("negative-prompt", "a dog, it's -blurred", "a dog, it's -blurred"),
        ("mask", "my mask.png", Path("my mask.png")),
        ("input", r"my\ cat.png 'other cat.png'", [Path("my cat.png"), Path("other cat.png")]),
        ("keep-unmasked", "off", False),
        ("expand", "64,0,64,0", [64, 0, 64, 0]),
        ("sigmas", "1 0.7 0.3", [1.0, 0.7, 0.3]),
        ("sampler", "heun", "heun"),
        ("width", "512", 512),
    ],
)
def test_values(tmp_path, monkeypatch, name, text, expected):
    monkeypatch.chdir(tmp_path)
    Path("my mask.png").touch()
    assert value(name, text) == expected


@pytest.mark.parametrize(
    ("name", "text", "pattern"),
    [
        ("steps", "many", "steps is 'many', expected an integer"),
        ("steps", "0", "steps is 0, but must be from 1 to 1000"),
        ("steps", "1 2", "takes one value, and '1 2' are 2"),
        ("steps", "9" * 5000, "steps is '999"),
        ("guidance", "nan", "guidance_scale is nan"),
        ("seed", "1 -2", "seed is -2, but must be from 0"),
        ("sampler", "ddim", "sampler 'ddim' is unknown: choose one of euler"),
        ("width", "500", "width 500 can't be drawn.*nearest is 496"),
        ("keep-unmasked", "perhaps", "say on or off"),
        ("expand", "64", "not four numbers"),
        ("sigmas", "1 x", "expected a number"),
        ("input", "'a b", "a quote without its other half"),
        ("count", "0", "count is 0"),
    ],
)
def test_bad_values(name, text, pattern):
    with pytest.raises(UsageError, match=pattern):
        value(name, text)


@pytest.mark.parametrize("text", ["512x384", "512X384", "512 x 384", "512*384", "512, 384", "512 384", "512×384"])  # noqa: RUF001
def test_sizes(text):
    assert size(text) == {"width": 512, "height": 384}
    assert size("512") == {"width": 512, "height": 512}
    assert size("input") == {"size": "input"}


@pytest.mark.parametrize("text", ["", "512x", "x512", "a", "512x500", "16x16", "99999999", "512x512x512", "-512x512"])
def test_bad_sizes(text):
    with pytest.raises(UsageError):
        size(text)


@pytest.mark.parametrize(
    ("prompt", "text", "files"),
    [
        ("a cat", "a cat", ""),
        ("$1 make it snow", "make it snow", "a"),
        ("$1 $3: the cat of the first", "the cat of the first", "ac"),
        ("the cat of $3 in the house of $1", "the cat of image 1 in the house of image 2", "ca"),
        ("$2 like $2, but red", "like image 1, but red", "b"),
        ("costs $$5", "costs $5", ""),
        ("US$ and $x", "US$ and $x", ""),
        ("$$1 coin", "$1 coin", ""),
    ],
)
def test_mentions_of_pictures(prompt, text, files):
    assert resolve(prompt, MADE) == (text, [Path(f"{name}.png") for name in files])


@pytest.mark.parametrize("prompt", ["$4 x", "$0 x", "a $99999999999999999999 x", "$1", "$1 $2 "])
def test_bad_mentions(prompt):
    with pytest.raises(UsageError, match=r"no picture|no prompt"):
        resolve(prompt, MADE)
    with pytest.raises(UsageError, match=r"there is none yet|no prompt|one"):
        resolve(prompt, MADE[:1] if prompt.startswith("$1") else [])


@pytest.mark.parametrize(
    ("name", "expected"),
    [("help", "help"), ("neg", "negative-prompt"), ("ag", "again"), ("W", "W"), ("STEPS", "steps")],
)
def test_names_of_commands(name, expected):
    assert found_name(name) == expected


@pytest.mark.parametrize(
    ("name", "pattern"),
    [
        ("stesp", "did you mean !steps"),
        ("quiet", "did you mean !quit"),
        ("zzz", "!help lists"),
        ("s" * 1000, "!help lists"),
        ("pre", None),
        ("re", "could be .*!reset.*!reference"),
    ],
)
def test_unknown_commands(name, pattern):
    if pattern is None:
        assert found_name(name) == "precision"
        return
    with pytest.raises(UsageError, match=pattern):
        found_name(name)


def test_no_name_stands_for_two_things():
    assert len(known_names()) == len(set(known_names()))


def test_messages_name_commands_and_not_flags():
    assert in_our_words("give the picture with -i, or -t") == "give the picture with !input, or !strength"
    assert in_our_words("run fluxonnx export -d model --force, a-i, x -1") == (
        "run fluxonnx export -d model --force, a-i, x -1"
    )


def test_values_are_shown_as_they_are_typed():
    assert shown([Path("a b.png"), Path("c.png")]) == "'a b.png' c.png"
    assert (shown(True), shown([1, 2]), shown(0.5)) == ("on", "1 2", "0.5")
