"""`fluxonnx bench`: measure seconds and memory."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, replace
from pathlib import Path

from fluxonnx.cli.flags import (
    add_field,
    add_model,
    add_parser,
    add_quiet,
    add_text_encoder_precision,
    find_model,
    path_name,
    thread_count,
    typed,
)
from fluxonnx.cli.messages import show
from fluxonnx.cli.progress import speaker
from fluxonnx.errors import FluxonnxError


@dataclass(frozen=True, kw_only=True)
class Options:
    """The flags of the command, by the names of their long forms."""

    dir: str | None
    size: list[str]
    precision: list[str]
    text_encoder_precision: str | None
    threads: list[int]
    provider: list[str]
    steps: int | None
    prompt: str | None
    repeat: int
    lora: list[str]
    low_memory: bool
    export: bool
    profile: bool
    json: Path | None
    quiet: bool


def add_command(subparsers: argparse._SubParsersAction) -> None:
    """Describe the command and its flags."""
    parser = add_parser(
        subparsers,
        "bench",
        run,
        "measure seconds and memory",
        "[-d DIR] [--size WxH ...] [--precision NAME ...] [--threads N ...] [--provider NAME ...] [options]",
        "fluxonnx bench -d model --size 256 512x768 --precision bf16 fp32 --repeat 3",
        "fluxonnx bench -d model --size 512 --steps 1 --profile",
    )
    add_model(parser)
    varied = parser.add_argument_group(
        "what is varied",
        "Each flag takes several values and can be repeated. All combinations are measured, in alternating order.",
    )
    varied.add_argument(
        "--size", nargs="+", action="extend", default=[], metavar="WxH", help="256x512, or 256 (default) for a square"
    )
    varied.add_argument(
        "--precision",
        nargs="+",
        action="extend",
        default=[],
        metavar="NAME",
        help="bf16 (default), fp32, fp16, int8 or int4",
    )
    varied.add_argument(
        "--threads",
        type=thread_count,
        nargs="+",
        action="extend",
        default=[],
        metavar="N",
        help="default: one per core that this process may use",
    )
    varied.add_argument(
        "--provider",
        nargs="+",
        action="extend",
        default=[],
        metavar="NAME",
        help="cpu (default), openblas, cuda, coreml, ...",
    )
    add_text_encoder_precision(parser)
    add_field(parser, "steps")
    parser.add_argument("-p", "--prompt", metavar="TEXT", help="default: always the same prompt")
    parser.add_argument(
        "--repeat", type=int, default=1, metavar="N", help="rounds, whose medians are reported (default: %(default)s)"
    )
    parser.add_argument(
        "--lora",
        nargs="+",
        action="extend",
        default=[],
        metavar="FILE[:SCALE]",
        help="measure with these LoRA files, as in generate",
    )
    parser.add_argument("--low-memory", action="store_true", help="measure what generate --low-memory does")
    parser.add_argument("--export", action="store_true", help="also measure the export; graphs are written again")
    parser.add_argument(
        "--profile",
        action="store_true",
        help="also show which operators take the time, from one more picture under the profiler of onnxruntime",
    )
    parser.add_argument("--json", type=path_name, metavar="FILE", help="write all figures to this file")
    add_quiet(parser)


def run(arguments: argparse.Namespace) -> None:
    """Run the command with its parsed arguments."""
    bench(typed(Options, arguments))


def bench(options: Options) -> None:
    """Measure configurations against each other, print tables, and write JSON if asked to."""
    from fluxonnx.measure import speed
    from fluxonnx.runtime.outputs import check_output

    say = speaker(options.quiet)
    plan = speed.Plan(
        model=find_model(options.dir, say),
        configurations=speed.combine(options.size, options.precision, options.threads, options.provider),
        steps=options.steps,
        repeat=options.repeat,
        export=options.export,
        profile=options.profile,
        low_memory=options.low_memory,
        text_encoder_precision=options.text_encoder_precision,
        lora=tuple(options.lora),
    )
    if options.prompt is not None:
        plan = replace(plan, prompt=options.prompt)
    if options.json is not None:
        check_output(options.json, "--json")
    report = speed.run(plan, say)
    if options.json is not None:
        speed.save(report, options.json)
    if not options.quiet:
        show(speed.render(report))
    if report.failure:
        raise FluxonnxError(report.failure)
