"""$3 in a prompt: the third picture of a session, which the model looks at."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from fluxonnx.errors import UsageError

# $$3 is the text $3: a price, say.
MENTION = re.compile(r"(?P<dollars>\$+)(?P<number>\d+)")
LONGEST = 9


@dataclass(frozen=True)
class Made:
    """A picture of a session.

    Attributes:
        path: Its file.
        line: What was typed for it.
        seed: Its seed.
        size: Width and height in pixels.
    """

    path: Path
    line: str
    seed: int
    size: tuple[int, int]


def numbered(made: list[Made], text: str) -> Made:
    """Return the picture that a number stands for, with or without its $.

    Raises:
        UsageError: There is none.
    """
    digits = text.removeprefix("$")
    number = int(digits) if digits.isascii() and digits.isdigit() and len(digits) <= LONGEST else 0
    if not 0 < number <= len(made):
        there = f"there are {len(made)}" if len(made) > 1 else "there is one" if made else "there is none yet"
        raise UsageError(f"there is no picture {text}: {there}")
    return made[number - 1]


def resolve(prompt: str, made: list[Made]) -> tuple[str, list[Path]]:
    """Find the pictures that a prompt mentions.

    Mentions at its start only say what to look at, and are taken away. Others become "image 1", "image 2", ...: so
    prompts for FLUX.2 name pictures, by their order ("How do I reference specific images when editing", help.bfl.ai).

    Returns:
        The prompt for the model, and the files of the pictures, each once.

    Raises:
        UsageError: There is no such picture, or no prompt beside the mentions.
    """
    files: list[Path] = []

    def place(mention: str) -> int:
        path = numbered(made, mention).path
        if path not in files:
            files.append(path)
        return files.index(path) + 1

    rest = prompt
    while (found := MENTION.match(rest)) and found["dollars"] == "$":
        place(found[0])
        rest = rest[found.end() :].lstrip(" ,:;")

    def written(found: re.Match[str]) -> str:
        if len(found["dollars"]) > 1:
            return found[0][1:]
        return f"image {place(found[0])}"

    text = MENTION.sub(written, rest)
    if files and not text.strip():
        raise UsageError("a picture alone is no prompt: say what to draw, such as $1 make it snow")
    return text, files
