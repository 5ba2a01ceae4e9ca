"""What the commands share: how they are described, common flags, and the way from parsed arguments to typed options."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar

from fluxonnx.cli.messages import shortened
from fluxonnx.machine import MOST_THREADS
from fluxonnx.runtime.fields import FIELD

Options = TypeVar("Options")
# What flags are added to: a parser, or a group of its flags.
Flags = argparse._ActionsContainer


def add_parser(
    subparsers: argparse._SubParsersAction,
    name: str,
    run: Callable[[argparse.Namespace], int | None],
    help: str,
    usage: str,
    *examples: str,
) -> argparse.ArgumentParser:
    """Add a command, whose help ends with examples.

    Args:
        subparsers: The commands so far.
        name: The command's name.
        run: Runs it with its parsed arguments; may return an exit code.
        help: What it does.
        usage: Its most important flags.
        examples: Complete command lines.
    """
    lines = "\n".join(f"  {example}" for example in examples)
    parser = subparsers.add_parser(
        name,
        help=help,
        usage=f"fluxonnx {name} {usage}",
        description=help[0].upper() + help[1:] + ".",
        epilog=f"example{'s' if len(examples) > 1 else ''}:\n{lines}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run)
    return parser


def typed(kind: type[Options], arguments: argparse.Namespace) -> Options:
    """Make a dataclass of options from the parsed arguments of the same names."""
    return kind(**{item.name: getattr(arguments, item.name) for item in fields(kind)})  # type: ignore[arg-type]


def add_model(flags: Flags, default: str = "as for generate") -> None:
    """Add -d, which `find_model` takes."""
    flags.add_argument(
        "-d",
        "--dir",
        type=not_empty,
        metavar="DIR",
        help=f"model directory, or a repository of the hub (default: {default})",
    )


def not_empty(text: str) -> str:
    """Parse the name of a file or a folder: an empty one, of a variable that is not set, would be this folder."""
    if not text:
        raise argparse.ArgumentTypeError("the name is empty")
    return text


def path_name(text: str) -> Path:
    """Parse a path; see `not_empty`."""
    return Path(not_empty(text))


def pair(text: str) -> tuple[str, str]:
    """Parse NAME=VALUE; the value may be empty, and hold further signs."""
    name, sign, value = text.partition("=")
    if not name or not sign:
        raise argparse.ArgumentTypeError(f"{shortened(text, 40)} is no option: write it as NAME=VALUE")
    return name, value


def add_parts(flags: Flags) -> None:
    """Add --transformer, --text-encoder and --vae."""
    for name, noun in (("transformer", "transformer"), ("text-encoder", "text encoder"), ("vae", "autoencoder")):
        flags.add_argument(
            f"--{name}",
            type=path_name,
            metavar="FILE",
            help=f"read the weights of the {noun} from this file or folder: safetensors or GGUF, with the names and in "
            "the formats of diffusers, ComfyUI and others (docs/checkpoints.md)",
        )


def add_text_encoder_precision(flags: Flags) -> None:
    """Add --text-encoder-precision."""
    flags.add_argument(
        "--text-encoder-precision", metavar="NAME", help="precision of the text encoder (default: as --precision)"
    )


def thread_count(text: str) -> int:
    """Parse --threads: far more than there are make a run fail late, in words of onnxruntime."""
    count = int(text)
    if count > MOST_THREADS:
        raise argparse.ArgumentTypeError(f"{shortened(text, 40)} are too many: {MOST_THREADS} at most")
    return count


def add_field(flags: Flags, name: str) -> None:
    """Add the flags of a field of a request; the parsed value has the field's name."""
    field = FIELD[name]
    options: dict[str, Any] = {"dest": name, "type": field.kind, "metavar": field.metavar, **field.flag_options}
    if field.kind is bool:  # its flags take no value
        options = {"dest": name, "default": None, **field.flag_options}
    flags.add_argument(*field.flags, help=field.help.format_map(vars(field)), **options)


def add_verbosity(parser: argparse.ArgumentParser) -> None:
    """Add -v and -q, of which one can be given."""
    group = parser.add_mutually_exclusive_group()
    group.add_argument("-v", "--verbose", action="store_true", help="print the seconds that each phase takes")
    add_quiet(group)


def add_quiet(flags: Flags) -> None:
    """Add -q."""
    flags.add_argument("-q", "--quiet", action="store_true", help="print errors only")


def find_model(directory: str | None, say: Callable[[str], None]) -> Path:
    """Return the model directory that -d or a default chooses; `say` is told if it is the bundled demo model."""
    from fluxonnx import api

    model = api.find_model(directory, say)
    if api.is_shipped(model):
        say(
            f"Using {model.name}, the bundled demo model, which draws coloured shapes on backgrounds and nothing else. "
            "Pass -d DIR for the real FLUX.2-klein (fluxonnx download black-forest-labs/FLUX.2-klein-4B -o DIR)"
        )
    return model
