"""The commands of a session, each of which begins with an exclamation mark."""

from __future__ import annotations

import shutil
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from fluxonnx.errors import Cancelled, FluxonnxError, UsageError
from fluxonnx.runtime.fields import FIELD
from fluxonnx.terminal import gallery
from fluxonnx.terminal.gallery import one_name, path_of
from fluxonnx.terminal.references import numbered
from fluxonnx.terminal.session import Session
from fluxonnx.terminal.settings import (
    BOOLEANS,
    DEFAULTS,
    SETTABLE,
    TITLE,
    in_our_words,
    nearest,
    parse,
    shown,
    size,
    words,
)

# People type these, and mean no picture of them. With a space before it, any line is a prompt.
PLAIN_WORDS = {"exit": "!quit", "quit": "!quit", "help": "!help", "?": "!help"}
# What changes the model, with the attribute of `Choice` that it changes.
MODEL = {
    "model": "dir",
    "precision": "precision",
    "text-encoder-precision": "text_encoder_precision",
    "provider": "provider",
    "threads": "threads",
    "low-memory": "low_memory",
}
# Of these fields, the first word is another value than their kind's.
SIZE = ("width", "height", "size")
# The width of the names in lists.
WIDTH = 24


class Ended(Exception):
    """The session is over."""


@dataclass(frozen=True)
class Command:
    """A command.

    Attributes:
        run: Takes the session and what follows the name.
        usage: What follows the name, for the help.
        help: What it does.
    """

    run: Callable[[Session, str], None]
    usage: str
    help: str


def obey(session: Session, line: str) -> None:
    """Do what a line says: draw a prompt, or run a command. What is wrong is said, and the session goes on.

    Raises:
        Ended: It ends the session.
    """
    try:
        text = PLAIN_WORDS.get(line.rstrip(), line)
        if text.startswith("!"):
            command(session, text[1:])
        elif text.strip():
            session.draw(text.strip())
    except Cancelled:
        session.say("Stopped.")
    except FluxonnxError as error:
        session.complain(in_our_words(str(error)))
    except MemoryError:
        session.studio.close()
        session.complain("out of memory: choose a smaller size")
    except KeyboardInterrupt:
        session.studio.close()  # it may have been interrupted anywhere: loaded again, it is whole
        session.say("Stopped.")
    finally:
        session.bar.close()
        if session.show:
            session.show.forget()


def command(session: Session, text: str) -> None:
    """Run a command.

    Args:
        session: The session.
        text: What follows the exclamation mark.

    Raises:
        UsageError: It is unknown, or can't be done so.
        FluxonnxError: It failed.
        Ended: It ends the session.
    """
    name, _, rest = text.strip().partition(" ")
    if not name:
        raise UsageError("! begins a command: !help lists them")
    found = found_name(name)
    rest = rest.strip()
    if found in COMMANDS:
        COMMANDS[found].run(session, rest)
    elif found in MODEL:
        _set_model(session, found, rest)
    else:
        _set_field(session, found, rest)


def known_names() -> list[str]:
    """Return all names of commands, the usual ones of fields included."""
    return [*COMMANDS, *MODEL, *dict.fromkeys(TITLE[field.name] for field in SETTABLE.values())]


def found_name(name: str) -> str:
    """Return the name that a whole or an abbreviated one stands for.

    Raises:
        UsageError: There is none, or several.
    """
    if name in COMMANDS or name in MODEL or name in SETTABLE:
        return name
    lowered = name.lower().replace("_", "-")
    begun = [known for known in known_names() if known.startswith(lowered)]
    if lowered in begun or len(begun) == 1:
        return lowered if lowered in begun else begun[0]
    if begun:
        raise UsageError(f"!{name} could be {', '.join(f'!{known}' for known in begun)}: type more of it")
    raise UsageError(f"!{name} is unknown: {nearest(lowered, known_names())}")


def _set_field(session: Session, name: str, text: str) -> None:
    field = SETTABLE[name]
    if not text:
        session.say(f"{TITLE[field.name]}: {_field_shown(session, field.name)}")
        return
    if text.lower() in DEFAULTS and not (field.kind is bool and text.lower() in BOOLEANS):
        _reset(session, name)
        return
    if field.name == "size":
        values = size(text)
        for old in SIZE:
            session.values.pop(old, None)
    else:
        values = {field.name: parse(field, text, partial(path_of, session))}
        for file in _files(values[field.name]):
            _check_picture(file)
        if field.name in SIZE:
            session.values.pop("size", None)
    session.values.update(values)
    session.say(f"{TITLE[field.name]}: {_field_shown(session, field.name)}")


def _files(value: Any) -> list[Path]:
    return [item for item in (value if isinstance(value, list) else [value]) if isinstance(item, Path)]


def _check_picture(path: Path) -> None:
    from fluxonnx.runtime.images import load_image

    load_image(path)


def _field_shown(session: Session, name: str) -> str:
    """Return the value of a field, for a person."""
    values, field = session.values, FIELD[name]
    if name == "size":
        if {"width", "height"} & values.keys():
            return "x".join(str(values.get(side, "default")) for side in ("width", "height"))
        return str(values.get("size", "default"))
    if name in values:
        return shown(values[name])
    if name == "seed":
        return "random"
    return (
        "default"
        if field.default in (None, "") or field.base_default is not None
        else f"{shown(field.default)} (default)"
    )


def _reset(session: Session, text: str) -> None:
    if not text:
        session.values.clear()
        session.say("Everything is as it was at first, except the model and its LoRA files.")
        return
    name = found_name(text.lstrip("!"))
    if name == "lora":
        return _lora(session, "none")
    if name in MODEL:
        session.studio.change(**{MODEL[name]: False if name == "low-memory" else None})
        return session.say(f"{name}: default")
    if name not in SETTABLE:
        raise UsageError(f"!{name} has no value that could be reset")
    field = SETTABLE[name]
    for gone in SIZE if field.name == "size" else (field.name,):
        session.values.pop(gone, None)
    return session.say(f"{TITLE[field.name]}: {_field_shown(session, field.name)}")


def _set(session: Session, text: str) -> None:
    name, _, rest = text.partition(" ")
    if name:
        found = found_name(name)
        if found not in SETTABLE and found not in MODEL and found not in ("lora", "out", "show"):
            raise UsageError(f"{found} is a command, and no value: !set lists the values")
        return command(session, f"{found} {rest}")
    for title, value in settings(session):
        session.say(f"{title:<{WIDTH}}{value}")
    return None


def settings(session: Session) -> list[tuple[str, str]]:
    """Return all values of a session by their names, for a person."""
    choice = session.studio.choice
    fields = dict.fromkeys(field.name for field in SETTABLE.values() if field.name not in ("width", "height"))
    model = [(name, _model_shown(session, name)) for name in MODEL]
    lora = ("lora", " ".join(choice.lora) or "none")
    return [*((TITLE[name], _field_shown(session, name)) for name in fields), *model, lora]


def _model_shown(session: Session, name: str) -> str:
    value = getattr(session.studio.choice, MODEL[name])
    return "default" if value is None else shown(value)


def _set_model(session: Session, name: str, text: str) -> None:
    if text:
        value: Any = None if text in DEFAULTS[:2] else text
        if name == "low-memory":
            if text.lower() not in BOOLEANS:
                raise UsageError(f"low-memory is {text[:60]!r}: say on or off")
            value = BOOLEANS[text.lower()]
        elif name == "threads" and value is not None:
            if not (text.isascii() and text.isdigit() and len(text) < 6):
                raise UsageError(f"threads is {text[:60]!r}, expected an integer")
            value = int(text)
        elif name == "model" and value is not None:
            value = str(path_of(session, one_name(text)))
        session.studio.change(**{MODEL[name]: value})
    session.say(f"{name}: {_model_shown(session, name)}")


def _lora(session: Session, text: str) -> None:
    if text:
        found = () if text == "none" else tuple(str(path_of(session, word)) for word in words(text))
        session.studio.use_loras(found)
    session.say(f"lora: {' '.join(session.studio.choice.lora) or 'none'}")


def _again(session: Session, text: str) -> None:
    session.again(numbered(session.made, text) if text else None)


def _help(session: Session, text: str) -> None:
    columns = shutil.get_terminal_size().columns - 1
    for line, indent in [(_about(found_name(text.lstrip("!"))), 0)] if text else _overview():
        width = max(columns, 2 * indent, 1)
        for part in textwrap.wrap(line, width, subsequent_indent=" " * indent, break_on_hyphens=False):
            session.say(part)


def _about(name: str) -> str:
    if name in COMMANDS:
        return f"!{name} {COMMANDS[name].usage}".rstrip() + f": {COMMANDS[name].help}"
    if name in MODEL:
        return f"!{name} VALUE: as the flag of generate; loads the model anew"
    field = SETTABLE[name]
    return f"!{name} {field.metavar}".rstrip() + f": {in_our_words(field.help.format_map(vars(field)))}"


def _overview() -> list[tuple[str, int]]:
    """Return lines, each with the column at which it goes on in a narrow window."""
    names = dict.fromkeys(TITLE[field.name] for field in SETTABLE.values())
    return [
        ("A line is a prompt: a picture of it is made and saved. $3 in it is the third picture, to look at.", 0),
        *((f"{f'!{name} {found.usage}':<{WIDTH}} {found.help}", WIDTH + 1) for name, found in COMMANDS.items()),
        (f"Values: {', '.join(f'!{name}' for name in (*names, *MODEL))}.", 0),
        ("!steps 8 sets a value, !steps shows it, !steps default resets it, !help steps explains it.", 0),
        ("Ctrl-C stops the picture, Ctrl-D ends.", 0),
    ]


def _quit(session: Session, text: str) -> None:
    raise Ended


COMMANDS = {
    "help": Command(_help, "[NAME]", "explain a command or a value"),
    "again": Command(_again, "[N]", "draw the last prompt again, or that of picture N, with the present values"),
    "lora": Command(_lora, "FILE[:SCALE]...", "use these LoRA files, or none"),
    "set": Command(_set, "[NAME VALUE]", "set a value; alone: show all"),
    "reset": Command(_reset, "[NAME]", "take a value back to its default; alone: all"),
    "out": Command(gallery.out, "[DIR or FILE]", "where pictures are saved, under numbers"),
    "list": Command(gallery.list_made, "", "the pictures so far"),
    "show": Command(gallery.show, "on|off|N", "show pictures here, or picture N"),
    "open": Command(gallery.open_picture, "[N]", "open picture N, or the last one, in a viewer"),
    "save": Command(gallery.save, "[N] FILE", "copy picture N, or the last one, to a file"),
    "quit": Command(_quit, "", "end, as Ctrl-D"),
}
