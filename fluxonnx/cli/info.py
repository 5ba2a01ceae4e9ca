"""`fluxonnx info`: print the parameters in a picture."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TextIO

from fluxonnx.cli.flags import add_parser, path_name
from fluxonnx.cli.messages import UNSAFE, show


def add_command(subparsers: argparse._SubParsersAction) -> None:
    """Describe the command and its flags."""
    parser = add_parser(
        subparsers, "info", run, "print the parameters that made a picture", "PICTURE", "fluxonnx info cat.png"
    )
    parser.add_argument("picture", type=path_name, metavar="PICTURE", help="a picture that fluxonnx made")


def run(arguments: argparse.Namespace) -> None:
    """Run the command with its parsed arguments."""
    info(arguments.picture)


def info(picture: Path) -> None:
    """Print the parameters in a picture as JSON."""
    import json

    from fluxonnx.runtime.metadata import read_parameters

    parameters = read_parameters(picture)
    text = json.dumps(parameters, indent=2, ensure_ascii=False)
    if UNSAFE.search(text.replace("\n", "")) or not _fits(text, sys.stdout):
        text = json.dumps(parameters, indent=2)  # what is escaped has to stay JSON
    show(text)


def _fits(text: str, stream: TextIO | None) -> bool:
    try:
        text.encode((stream and stream.encoding) or "utf-8")
    except UnicodeEncodeError:
        return False
    return True
