"""`fluxonnx repl`, or `fluxonnx` alone on a terminal: a prompt that makes pictures."""

from __future__ import annotations

import argparse
import os
import sys
import threading
import warnings
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fluxonnx.cli.flags import (
    add_model,
    add_parser,
    add_parts,
    add_text_encoder_precision,
    find_model,
    pair,
    path_name,
    thread_count,
    typed,
)
from fluxonnx.cli.messages import complain, tell
from fluxonnx.cli.progress import Progress
from fluxonnx.errors import FluxonnxError, UsageError
from fluxonnx.runtime.fields import FIELD
from fluxonnx.version import __version__

if TYPE_CHECKING:
    from fluxonnx.cli.jobs import Job

NAME = "repl"
# The value of --show where nothing is said about pictures.
UNASKED = "on"
GREETING = f"fluxonnx {__version__}: type what to draw; !help lists commands, Ctrl-D ends."


@dataclass(frozen=True, kw_only=True)
class Options:
    """The flags of the command, by the names of their long forms."""

    dir: str | None
    transformer: Path | None
    text_encoder: Path | None
    vae: Path | None
    precision: str | None
    text_encoder_precision: str | None
    provider: str | None
    provider_option: list[tuple[str, str]]
    threads: int | None
    lora: list[str]
    low_memory: bool
    cache_dir: Path | None
    output: Path | None
    show: str


def add_command(subparsers: argparse._SubParsersAction) -> None:
    """Describe the command and its flags."""
    parser = add_parser(
        subparsers,
        NAME,
        run,
        "type prompts, see pictures; fluxonnx alone on a terminal does the same",
        "[-d DIR] [-o DIR] [options]",
        "fluxonnx repl -d model -o pictures",
        "fluxonnx repl -d model --precision int8 --show off",
    )
    add_model(parser)
    parser.add_argument(
        "-o",
        "--output",
        type=path_name,
        metavar="PATH",
        help="a folder for the pictures, or a file name that numbers are added to (default: out.png, here)",
    )
    parser.add_argument(
        "--show",
        default=UNASKED,
        metavar="HOW",
        help="how pictures are shown in the terminal: auto, kitty, iterm2, sixel, blocks, or off (default: auto, where "
        "the terminal can)",
    )
    add_parts(parser)
    parser.add_argument(
        "--lora", nargs="+", action="extend", default=[], metavar="FILE[:SCALE]", help="LoRA files, as for generate"
    )
    parser.add_argument("--precision", metavar="NAME", help="as for generate")
    add_text_encoder_precision(parser)
    parser.add_argument("--provider", metavar="NAME", help="as for generate")
    parser.add_argument(
        "--provider-option", type=pair, action="append", default=[], metavar="NAME=VALUE", help="as for generate"
    )
    parser.add_argument("--threads", type=thread_count, metavar="N", help="as for generate")
    parser.add_argument("--low-memory", action="store_true", help="use less memory and more time, as for generate")
    parser.add_argument("--cache-dir", type=path_name, metavar="DIR", help="keep encoded prompts here, as for generate")


def is_possible() -> bool:
    """Whether somebody could type: standard input and output are a terminal."""
    return all(stream is not None and not stream.closed and stream.isatty() for stream in (sys.stdin, sys.stdout))


def run(arguments: argparse.Namespace) -> None:
    """Run the command with its parsed arguments."""
    repl(typed(Options, arguments))


def repl(options: Options) -> None:
    """Read prompts from the terminal, and make pictures of them."""
    if not is_possible():
        raise UsageError(
            "the prompt needs a terminal, for input and output: make pictures with fluxonnx generate instead, see "
            "fluxonnx --help"
        )
    if find_spec("prompt_toolkit") is None:
        raise UsageError('the prompt needs prompt_toolkit: pip install "fluxonnx[terminal]"; see also fluxonnx --help')
    if directory := options.dir or os.environ.get("FLUXONNX_MODEL"):
        _check_model(directory)
    from fluxonnx.terminal.gallery import save_to
    from fluxonnx.terminal.prompt import talk
    from fluxonnx.terminal.session import Session
    from fluxonnx.terminal.studio import Choice, Studio

    bar = Progress()
    choice = Choice(
        dir=options.dir,
        precision=options.precision,
        text_encoder_precision=options.text_encoder_precision,
        provider=options.provider,
        provider_option=tuple(options.provider_option),
        threads=options.threads,
        low_memory=options.low_memory,
        cache_dir=options.cache_dir,
        parts={name: getattr(options, name) for name in ("transformer", "text_encoder", "vae")},
        lora=tuple(options.lora) if options.lora != ["none"] else (),
    )

    def below(write: Callable[[str], None]) -> Callable[[str], None]:
        """Write lines below what is on the screen: a bar is wiped, and a preview stays where it is."""

        def written(text: str) -> None:
            bar.close()
            if session.show:
                session.show.forget()
            write(text)

        return written

    say, complaint = below(tell), below(complain)
    find = cache(lambda directory: find_model(directory, say))  # it tells of the demo model once
    studio = Studio(choice, find, say, lambda event: session.watch(event))
    session = Session(plan=plan_values, say=say, complain=complaint, bar=bar, studio=studio)
    if options.output is not None:
        save_to(session, options.output)
    if options.show != "off":
        _show(session, options.show)
    tell(GREETING)
    # What a first picture needs is imported while that is typed.
    imports = threading.Thread(target=_warm_up, name="imports")
    imports.start()
    try:
        with bar, warnings.catch_warnings():
            warnings.showwarning = lambda message, *_: complaint(f"warning: {message}")
            talk(session)
    finally:
        imports.join()  # modules can't be imported any more while Python shuts down


def plan_values(values: Mapping[str, Any]) -> Job:
    """Plan pictures as `generate` does for the flags of these values."""
    from fluxonnx.cli.jobs import Wanted, plan

    request = {name: value for name, value in values.items() if "request" in FIELD[name].places}
    files = {name: values.get(name, []) for name in ("input", "reference")}
    wanted = Wanted(
        values=request,
        seed=values.get("seed"),
        count=values.get("count"),
        files=files,
        mask=values.get("mask"),
        output=values.get("output"),
    )
    return plan(wanted, None)[0]


def _check_model(directory: str) -> None:
    """Find out before a prompt is typed if there is no model.

    Raises:
        FluxonnxError: There is none.
    """
    from fluxonnx.checkpoint.directory import Checkpoint
    from fluxonnx.checkpoint.hub import is_repository

    if not is_repository(directory):
        Checkpoint(Path(directory))


def _show(session: Any, wanted: str) -> None:
    """Show pictures; unasked only on a terminal that can, and as blocks only where colours are welcome."""
    from fluxonnx.terminal.detection import detect
    from fluxonnx.terminal.pictures import open_show

    if wanted != UNASKED:
        session.show = open_show(wanted)
        return
    try:
        found = detect()
        if found.protocol and not (found.protocol == "blocks" and os.environ.get("NO_COLOR")):
            session.show = open_show(terminal=found)
        session.typed = found.typed
    except FluxonnxError as error:
        session.complain(f"pictures are not shown: {error}")


def _warm_up() -> None:
    with suppress(Exception):  # which is raised again, and said, when a picture needs them
        import fluxonnx.api
        import fluxonnx.cli.jobs
        import fluxonnx.runtime.pipeline  # noqa: F401
