"""`fluxonnx completion`: print what has a shell complete commands, flags and files."""

from __future__ import annotations

import argparse

from fluxonnx.cli.flags import add_parser
from fluxonnx.cli.messages import show


def add_command(subparsers: argparse._SubParsersAction) -> None:
    """Describe the command and its flags."""
    parser = add_parser(
        subparsers,
        "completion",
        run,
        "print the script that completes words in a shell",
        "SHELL",
        'eval "$(fluxonnx completion bash)"  # in ~/.bashrc; see docs/terminal.md for zsh and fish',
    )
    parser.add_argument("shell", metavar="SHELL", help="bash, zsh or fish")


def run(arguments: argparse.Namespace) -> None:
    """Run the command with its parsed arguments."""
    from fluxonnx.terminal.completion import script

    show(script(arguments.parser, arguments.shell))
