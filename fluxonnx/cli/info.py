"""`fluxonnx info`: print the parameters in a picture."""

from __future__ import annotations

import argparse
from pathlib import Path

from fluxonnx.cli.flags import add_parser


def add_command(subparsers: argparse._SubParsersAction) -> None:
    """Describe the command and its flags."""
    parser = add_parser(
        subparsers, "info", run, "print the parameters that made a picture", "PICTURE", "fluxonnx info cat.png"
    )
    parser.add_argument("picture", type=Path, metavar="PICTURE", help="a picture that fluxonnx made")


def run(arguments: argparse.Namespace) -> None:
    """Run the command with its parsed arguments."""
    info(arguments.picture)


def info(picture: Path) -> None:
    """Print the parameters in a picture as JSON."""
    import json

    from fluxonnx.runtime.metadata import read_parameters

    print(json.dumps(read_parameters(picture), indent=2, ensure_ascii=False))
