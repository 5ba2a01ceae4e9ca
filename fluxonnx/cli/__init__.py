"""The command line: parse the flags, run the command, turn errors into one line and an exit code."""

from __future__ import annotations

import argparse
import os
import re
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from fluxonnx.cli import (
    batch,
    bench,
    check,
    compare,
    completion,
    download,
    export,
    generate,
    info,
    inspect,
    providers,
    repl,
    serve,
)
from fluxonnx.cli.messages import complain, escaped, finish, occupy_streams, shortened
from fluxonnx.cli.signals import Terminated, ending_cleanly
from fluxonnx.errors import FluxonnxError, UsageError
from fluxonnx.version import __version__

COMMANDS = (
    generate,
    repl,
    serve,
    batch,
    export,
    download,
    info,
    inspect,
    check,
    providers,
    bench,
    compare,
    completion,
)
# If set, errors that nobody foresaw keep their traceback.
TRACEBACK = "FLUXONNX_TRACEBACK"
EMPTY_VALUE = re.compile(r"--?[A-Za-z-]+=--")


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    Returns:
        The exit code: 0, 1 for a failure, 2 for wrong usage; 130 when interrupted, and 128 + N for another signal N.
    """
    occupy_streams()
    try:
        words = sys.argv[1:] if argv is None else argv
        if not words and repl.is_possible():
            words = [repl.NAME]
        arguments = build_parser().parse_args(words)
        quiet = getattr(arguments, "quiet", False)
        with warnings.catch_warnings():
            warnings.simplefilter("always", UserWarning)
            warnings.showwarning = lambda message, *_: None if quiet else complain(f"warning: {message}")
            return _run(arguments.run, arguments)
    finally:
        finish()


def _run(command: Callable[[argparse.Namespace], int | None], arguments: argparse.Namespace) -> int:
    try:
        with ending_cleanly():
            return command(arguments) or 0
    except UsageError as error:
        complain(str(error))
        return 2
    except FluxonnxError as error:
        complain(str(error))
        return 1
    except KeyboardInterrupt:
        complain("interrupted")
        return 130
    except Terminated as error:
        complain(f"ended by {error}")
        return 128 + error.number
    except MemoryError:
        complain("out of memory: choose a smaller size")
        return 1
    except Exception as error:
        if os.environ.get(TRACEBACK):
            raise
        complain(_unforeseen(error))
        return 1


def _unforeseen(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    reason = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    return f"internal error, please report it: {reason} ({TRACEBACK}=1 shows where)"


class Parser(argparse.ArgumentParser):
    """A parser whose errors may quote anything."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Refuse words that no program can be given, and a value that argparse itself loses: the -- of --flag=--."""
        for word in sys.argv[1:] if args is None else args:
            if "\0" in word or not _is_file_system_text(word):
                self.error(f"{word!r} is not valid text: check the encoding it was read with")
            if EMPTY_VALUE.fullmatch(word):
                self.error(f"argument {word[:-3]}: -- is no value")
        return super().parse_known_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        """Print the usage and an error, and exit with 2."""
        self.print_usage(sys.stderr)
        self.exit(2, f"{self.prog}: error: {escaped(shortened(message))}\n")


def _is_file_system_text(word: str) -> bool:
    try:
        os.fsencode(word)
    except UnicodeEncodeError:
        return False
    return True


def build_parser() -> argparse.ArgumentParser:
    """Describe the commands and their flags."""
    parser = Parser(prog="fluxonnx", description="FLUX.2-klein as plain ONNX, without torch.")
    parser.add_argument("--version", action="version", version=f"fluxonnx {__version__}")
    subparsers = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for command in COMMANDS:
        command.add_command(subparsers)
    parser.set_defaults(parser=parser)
    return parser
