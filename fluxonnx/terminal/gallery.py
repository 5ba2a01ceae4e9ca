"""The pictures of a session: where they go, and what is done with those that were made."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from fluxonnx.checkpoint.reading import exists, is_file, is_folder
from fluxonnx.errors import UsageError
from fluxonnx.runtime.fields import FIELD
from fluxonnx.terminal.detection import AUTO, PROTOCOLS
from fluxonnx.terminal.references import Made, numbered
from fluxonnx.terminal.session import Session
from fluxonnx.terminal.settings import words

# The longest prompt in a list.
LONGEST = 60


def path_of(session: Session, word: str) -> Path:
    """Return the file that a word names: $3 for the third picture, ~ for the home folder."""
    if word.startswith("$") and word[1:].isdigit():
        return numbered(session.made, word).path
    try:
        return Path(word).expanduser()
    except RuntimeError:  # no such user
        return Path(word)


def one_name(text: str) -> str:
    """Return a name that may be quoted; one with spaces need not be."""
    return text if exists(Path(text)) or len(found := words(text)) != 1 else found[0]


def out(session: Session, text: str) -> None:
    """Say where pictures go, or let them go elsewhere.

    Raises:
        UsageError: They can't go there.
    """
    if text:
        save_to(session, path_of(session, one_name(text)))
    current: Path = session.values.get("output", FIELD["output"].default)
    session.say(f"Pictures go to {current.with_name(f'{current.stem}-NUMBER{current.suffix}')}")


def save_to(session: Session, path: Path) -> None:
    """Let pictures go into a folder, which is made, or to a file name that numbers are added to.

    Raises:
        UsageError: They can't go there.
        ImageError: There is no permission.
    """
    from fluxonnx.files import describe_os_error
    from fluxonnx.runtime.saving import FORMATS, check_output_path

    if path.suffix.lower() not in FORMATS or is_folder(path):
        try:
            path.mkdir(parents=True, exist_ok=True)
        except (OSError, ValueError) as error:
            reason = f"{path} can't be the name of a folder"
            if isinstance(error, OSError):
                reason = describe_os_error(error, path, "choose another folder")
            raise UsageError(reason) from None
        path /= session.values.get("output", FIELD["output"].default).name
    check_output_path(path, numbered=True)
    session.values["output"] = path


def show(session: Session, text: str) -> None:
    """Show pictures here from now on, or no more; or show one.

    Raises:
        UsageError: The terminal can't, or there is no such picture.
        FluxonnxError: A package is missing.
    """
    from fluxonnx.runtime.images import load_image
    from fluxonnx.terminal.pictures import open_show

    if text in ("on", AUTO, *PROTOCOLS):
        session.show = open_show(AUTO if text == "on" else text)
    elif text == "off":
        session.show = None
    elif text:
        found = picture(session, text)
        (session.show or open_show()).finish(load_image(found.path))
        return
    session.say(f"show: {'on' if session.show else 'off'}")


def picture(session: Session, text: str) -> Made:
    """Return the picture of a number, or the last one if there is none."""
    return numbered(session.made, text or str(len(session.made)))


def list_made(session: Session, text: str) -> None:
    """List the pictures so far."""
    if not session.made:
        session.say("There is no picture yet: type a prompt")
    for number, made in enumerate(session.made, 1):
        line = made.line if len(made.line) <= LONGEST else f"{made.line[:LONGEST]}..."
        session.say(f"${number}: {made.path} {made.size[0]}x{made.size[1]}, seed {made.seed}: {line}")


def save(session: Session, text: str) -> None:
    """Copy a picture under a name of one's own, with its parameters, and never over another file.

    Raises:
        UsageError: There is no such picture, or the file can't be written.
        ImageError: The picture is gone, or there is no permission.
    """
    from fluxonnx.runtime.images import load_image
    from fluxonnx.runtime.metadata import read_parameters
    from fluxonnx.runtime.outputs import write_output
    from fluxonnx.runtime.saving import check_output_path, save_image

    first, _, rest = text.partition(" ")
    is_number = first.removeprefix("$").isdigit() and bool(rest.strip())
    found = picture(session, first if is_number else "")
    name = rest.strip() if is_number else text
    if not name:
        raise UsageError("!save needs a name: !save 3 cat.png, or !save cat.png for the last picture")
    path = path_of(session, one_name(name))
    if exists(path):
        raise UsageError(f"{path} is there already: choose another name")
    check_output_path(path)
    if path.suffix.lower() == found.path.suffix.lower():
        try:
            write_output(path, found.path.read_bytes())
        except OSError as error:
            raise UsageError(f"{found.path} can't be copied to {path}: {error.strerror or error}") from None
    else:
        save_image(load_image(found.path), path, read_parameters(found.path))
    session.say(f"Saved {path}")


def open_picture(session: Session, text: str) -> None:
    """Open a picture in the viewer of the desktop.

    Raises:
        UsageError: There is no such picture, or no viewer.
    """
    path = picture(session, text).path
    if not is_file(path):
        raise UsageError(f"{path} is gone: !list shows what was made")
    if sys.platform == "win32":
        os.startfile(path)
        return
    program = "open" if sys.platform == "darwin" else "xdg-open"
    if shutil.which(program) is None:
        raise UsageError(f"there is no {program} here to open pictures with: open {path} yourself, or see !show")
    subprocess.Popen(
        [program, str(path)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,  # Ctrl-C is not for the viewer
    )
    session.say(f"Opening {path} with {program}")
