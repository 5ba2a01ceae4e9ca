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
        "fluxonnx completion bash > ~/.local/share/bash-completion/completions/fluxonnx",
        "fluxonnx completion zsh > ~/.zfunc/_fluxonnx           # with fpath=(~/.zfunc $fpath) before compinit",
        "fluxonnx completion fish > ~/.config/fish/completions/fluxonnx.fish",
    )
    parser.add_argument("shell", metavar="SHELL", help="bash, zsh or fish")


def run(arguments: argparse.Namespace) -> None:
    """Run the command with its parsed arguments."""
    from fluxonnx.terminal.completion import script

    show(script(arguments.parser, arguments.shell))
