"""`fluxonnx download`: fetch a model from the Hugging Face hub."""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

from fluxonnx.cli.flags import add_parser, add_quiet, not_empty, path_name, typed
from fluxonnx.cli.messages import show
from fluxonnx.cli.progress import speaker


@dataclass(frozen=True, kw_only=True)
class Options:
    """The flags of the command, by the names of their long forms."""

    repository: str
    revision: str | None
    output: Path | None
    quiet: bool


def add_command(subparsers: argparse._SubParsersAction) -> None:
    """Describe the command and its flags."""
    parser = add_parser(
        subparsers,
        "download",
        run,
        "download a model from the Hugging Face hub: only what is needed, and what is not there yet",
        "ID [--revision R] [-o DIR]",
        "fluxonnx download black-forest-labs/FLUX.2-klein-4B -o klein",
        "fluxonnx generate -d black-forest-labs/FLUX.2-klein-4B -p 'a cat'    # downloads it, too",
    )
    parser.add_argument("repository", type=not_empty, metavar="ID", help="the repository: OWNER/NAME")
    parser.add_argument("--revision", type=not_empty, metavar="R", help="a branch, a tag or a commit (default: main)")
    parser.add_argument(
        "-o", "--output", type=path_name, metavar="DIR", help="a folder for the model (default: the cache of the hub)"
    )
    add_quiet(parser)


def run(arguments: argparse.Namespace) -> None:
    """Run the command with its parsed arguments."""
    download(typed(Options, arguments))


def download(options: Options) -> None:
    """Download a model and print its directory."""
    from fluxonnx.checkpoint.hub import download as fetch

    bars = not options.quiet and sys.stderr is not None and sys.stderr.isatty()
    show(str(fetch(options.repository, options.revision, options.output, speaker(options.quiet), bars)))
