"""`fluxonnx compare`: measure what precisions cost in quality."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

from fluxonnx.cli.flags import (
    add_field,
    add_model,
    add_parser,
    add_quiet,
    add_text_encoder_precision,
    find_model,
    path_name,
    typed,
)
from fluxonnx.cli.messages import show
from fluxonnx.cli.progress import speaker


@dataclass(frozen=True, kw_only=True)
class Options:
    """The flags of the command, by the names of their long forms."""

    dir: str | None
    precision: list[str]
    text_encoder_precision: str | None
    prompt: list[str] | None
    width: int | None
    height: int | None
    steps: int | None
    seed: int
    output: Path
    quiet: bool


def add_command(subparsers: argparse._SubParsersAction) -> None:
    """Describe the command and its flags."""
    parser = add_parser(
        subparsers,
        "compare",
        run,
        "compare precisions with the original weights of the checkpoint",
        "-d DIR [--precision NAME ...] [-o FILE] [options]",
        "fluxonnx compare -d model --precision int8 int4 -o compare.html",
    )
    add_model(parser)
    parser.add_argument("--precision", nargs="+", default=["int8", "int4"], metavar="NAME", help="default: int8 int4")
    add_text_encoder_precision(parser)
    parser.add_argument(
        "-p", "--prompt", action="append", metavar="TEXT", help="can be repeated (default: always the same two)"
    )
    parser.add_argument("-W", "--width", type=int, metavar="PX", help="default: the model's own")
    parser.add_argument("-H", "--height", type=int, metavar="PX", help="likewise")
    add_field(parser, "steps")
    parser.add_argument("-S", "--seed", type=int, default=1, metavar="N", help="default: %(default)s")
    parser.add_argument(
        "-o",
        "--output",
        type=path_name,
        default=Path("compare.html"),
        metavar="FILE",
        help="a page with pictures and plots (default: %(default)s)",
    )
    add_quiet(parser)


def run(arguments: argparse.Namespace) -> None:
    """Run the command with its parsed arguments."""
    compare(typed(Options, arguments))


def compare(options: Options) -> None:
    """Compare precisions, print tables, and write a page with pictures and plots."""
    from fluxonnx.measure import page, quality
    from fluxonnx.runtime.outputs import check_output

    say = speaker(options.quiet)
    check_output(options.output, "-o")
    plan = quality.Plan(
        model=find_model(options.dir, say),
        precisions=tuple(options.precision),
        prompts=tuple(options.prompt or quality.PROMPTS),
        seed=options.seed,
        width=options.width,
        height=options.height,
        steps=options.steps,
        text_encoder_precision=options.text_encoder_precision,
    )
    report = quality.run(plan, say)
    page.save(report, options.output)
    if not options.quiet:
        show(page.render(report))
    say(f"{options.output}: pictures and plots")
