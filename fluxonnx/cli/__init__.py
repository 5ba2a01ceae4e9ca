"""The command line: parse the flags, run the command, turn errors into one line and an exit code."""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Sequence

from fluxonnx.cli import bench, compare, export, generate, info
from fluxonnx.errors import FluxonnxError, UsageError
from fluxonnx.version import __version__

COMMANDS = (generate, export, info, bench, compare)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code: 0, 1 for a failure, 2 for wrong usage, 130 when interrupted."""
    arguments = build_parser().parse_args(argv)
    quiet = getattr(arguments, "quiet", False)
    with warnings.catch_warnings():
        warnings.simplefilter("always", UserWarning)
        warnings.showwarning = lambda message, *_: None if quiet else _complain(f"warning: {message}")
        try:
            arguments.run(arguments)
        except UsageError as error:
            _complain(str(error))
            return 2
        except FluxonnxError as error:
            _complain(str(error))
            return 1
        except KeyboardInterrupt:
            _complain("interrupted")
            return 130
        except MemoryError:
            _complain("out of memory: choose a smaller size")
            return 1
    return 0


def _complain(text: str) -> None:
    print(f"fluxonnx: {text}", file=sys.stderr)


def build_parser() -> argparse.ArgumentParser:
    """Describe the commands and their flags."""
    parser = argparse.ArgumentParser(prog="fluxonnx", description="FLUX.2-klein as plain ONNX, without torch.")
    parser.add_argument("--version", action="version", version=f"fluxonnx {__version__}")
    subparsers = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for command in COMMANDS:
        command.add_command(subparsers)
    return parser
