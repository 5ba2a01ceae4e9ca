"""`fluxonnx inspect`: say what an ONNX file holds, and whether its external data are intact."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

from fluxonnx.cli.flags import add_parser, path_name, typed
from fluxonnx.cli.messages import complain, show


@dataclass(frozen=True, kw_only=True)
class Options:
    """The flags of the command, by the names of their long forms."""

    file: Path
    size: str
    text_seq: int
    dim: list[tuple[str, int]]
    json: bool


def add_command(subparsers: argparse._SubParsersAction) -> None:
    """Describe the command and its flags."""
    parser = add_parser(
        subparsers,
        "inspect",
        run,
        "say what an ONNX file holds: inputs, operators, parameters, work, and whether its external data are intact",
        "FILE.onnx [--size WxH] [--text-seq N] [--json]",
        "fluxonnx inspect model/transformer.onnx",
        "fluxonnx inspect model/vae_decoder.onnx --size 1024x768 --json",
    )
    parser.add_argument("file", type=path_name, metavar="FILE.onnx", help="an ONNX file of any maker")
    parser.add_argument(
        "--size", default="512x512", metavar="WxH", help="the picture that work is counted for (default: %(default)s)"
    )
    parser.add_argument(
        "--text-seq",
        type=_positive,
        default=512,
        metavar="N",
        help="the tokens of the prompt that work is counted for (default: %(default)s)",
    )
    parser.add_argument(
        "--dim",
        type=_dimension,
        action="append",
        default=[],
        metavar="NAME=N",
        help="the number that a symbolic dimension stands for, for files of other makers; can be repeated",
    )
    parser.add_argument("--json", action="store_true", help="print everything as JSON")


def _positive(text: str) -> int:
    if not (text.isascii() and text.isdecimal() and 0 < int(text[:12]) <= 1 << 24):
        raise argparse.ArgumentTypeError(f"{text[:40]!r} is not a number from 1 to {1 << 24}")
    return int(text)


def _dimension(text: str) -> tuple[str, int]:
    name, equals, number = text.rpartition("=")
    if not name or not equals:
        raise argparse.ArgumentTypeError(f"{text[:40]!r} is not NAME=N")
    return name, _positive(number)


def run(arguments: argparse.Namespace) -> int:
    """Run the command with its parsed arguments."""
    return inspect(typed(Options, arguments))


def inspect(options: Options) -> int:
    """Print what a file holds.

    Returns:
        The exit code: 1 if the file or its external data are damaged.
    """
    from fluxonnx.check import inspect as inspection
    from fluxonnx.measure.speed import parse_size

    width, height = parse_size(options.size)
    found = inspection.inspect(options.file, width, height, options.text_seq, dict(options.dim))
    show(inspection.to_text(found) if options.json else inspection.report(found))
    if found.problems:
        others = len(found.problems) - 1
        complain(found.problems[0] + (f" (and {others} more)" if others else ""))
    return 1 if found.problems else 0
