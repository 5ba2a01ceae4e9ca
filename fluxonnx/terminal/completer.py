"""What Tab offers at the prompt of a session: commands, values, files, pictures."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from prompt_toolkit.completion import CompleteEvent, Completer, Completion
from prompt_toolkit.document import Document

from fluxonnx.terminal.commands import MODEL, SETTABLE, TITLE, known_names
from fluxonnx.terminal.completion import PRECISIONS, providers
from fluxonnx.terminal.detection import AUTO, PROTOCOLS
from fluxonnx.terminal.references import Made
from fluxonnx.terminal.session import Session

# What the files end in that a command names; "" for all. Folders are always offered.
PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".tif", ".tiff", ".ppm", ".bmp")
FILES = {"lora": (".safetensors",), "model": (), "out": (), "save": ("",)}
MOST_NAMES = 500


class Lines(Completer):
    """Completes the lines of a session."""

    def __init__(self, session: Session) -> None:
        """Look at a session."""
        self._session = session

    def get_completions(self, document: Document, complete_event: CompleteEvent) -> Iterator[Completion]:
        """Yield what the text before the cursor can become."""
        text = document.text_before_cursor
        if found := re.search(r"(?:^|\s)(\$\d*)$", text):
            yield from self._pictures(found[1])
        elif text.startswith("!"):
            name, space, rest = text[1:].partition(" ")
            if not space:
                yield from _words(name, [*known_names()], "")
            elif name in ("help", "set", "reset") and " " not in rest:
                yield from _words(rest, known_names(), "")
            else:
                if name == "set":
                    name, _, rest = rest.partition(" ")
                yield from self._values(name, rest)

    def _values(self, name: str, text: str) -> Iterator[Completion]:
        field = SETTABLE.get(name)
        start = _last_word(text)
        if name in FILES:
            yield from files(start, FILES[name])
        elif field and field.kind is Path:
            yield from files(start, PICTURES)
        else:
            yield from _words(start, self._choices(name), "")

    def _choices(self, name: str) -> Iterable[str]:
        if name in ("precision", "text-encoder-precision"):
            return (*PRECISIONS, AUTO) if name == "precision" else PRECISIONS
        if name == "provider":
            return providers()
        if name == "show":
            return ("on", "off", *PROTOCOLS)
        if name in ("again", "open", "save"):
            return [str(number) for number in range(1, len(self._session.made) + 1)]
        if name == "low-memory":
            return ("on", "off")
        field = SETTABLE.get(name)
        if field is None or name in MODEL:
            return ()
        if TITLE[field.name] == "size":
            return ("input", "256x256", "512x512", "768x768", "1024x1024", "1024x768", "768x1024")
        return ("on", "off") if field.kind is bool else field.choices

    def _pictures(self, start: str) -> Iterator[Completion]:
        for number, made in enumerate(self._session.made, 1):
            if f"${number}".startswith(start):
                yield Completion(f"${number}", -len(start), display_meta=_meta(made))


def files(start: str, suffixes: tuple[str, ...]) -> Iterator[Completion]:
    """Yield the files and folders whose path begins with a word as it is typed, with quotes or backslashes."""
    plain = re.sub(r"\\(.)", r"\1", start.lstrip("\"'"))
    folder_text, slash, begun = plain.rpartition("/")
    try:
        folder = Path(folder_text + slash).expanduser() if slash else Path()
        names = sorted(folder.iterdir())[:MOST_NAMES]
    except (OSError, RuntimeError, ValueError):
        return
    for path in names:
        if not path.name.startswith(begun) or (path.name.startswith(".") and not begun):
            continue
        is_folder = path.is_dir()
        if is_folder or "" in suffixes or path.suffix.lower() in suffixes:
            whole = f"{folder_text}{slash}{path.name}" + ("/" if is_folder else "")
            yield Completion(_escaped(whole), -len(start), display=path.name + ("/" if is_folder else ""))


def _escaped(name: str) -> str:
    return re.sub(r"([\s\"'\\()&;$!*?\[\]#<>|`])", r"\\\1", name)


def _last_word(text: str) -> str:
    """Return the word at the end of a text; spaces in quotes or after a backslash belong to it."""
    found = re.search(r"""(?:"[^"]*|'[^']*|(?:\\.|[^\s\\"'])*)$""", text)
    return found[0] if found else ""


def _words(start: str, choices: Iterable[str], end: str) -> Iterator[Completion]:
    for choice in choices:
        if choice.startswith(start):
            yield Completion(choice + end, -len(start))


def _meta(made: Made) -> str:
    return f"{made.path} {made.line}"[:60]
