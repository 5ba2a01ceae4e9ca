"""`fluxonnx export`: write the graphs of a checkpoint."""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass
from pathlib import Path

from fluxonnx.cli.flags import (
    add_parser,
    add_parts,
    add_text_encoder_precision,
    add_verbosity,
    not_empty,
    typed,
)
from fluxonnx.cli.progress import Progress, phase_line, speaker


@dataclass(frozen=True, kw_only=True)
class Options:
    """The flags of the command, by the names of their long forms."""

    dir: str
    output: str | None
    transformer: Path | None
    text_encoder: Path | None
    vae: Path | None
    precision: str | None
    text_encoder_precision: str | None
    keep: str | None
    rotate: bool
    block: int | None
    flavour: str
    component: list[str] | None
    opset: int | None
    force: bool
    verbose: bool
    quiet: bool


def add_command(subparsers: argparse._SubParsersAction) -> None:
    """Describe the command and its flags."""
    parser = add_parser(
        subparsers,
        "export",
        run,
        "write the ONNX graphs of a checkpoint",
        "-d DIR [-o DIR] [options]",
        "fluxonnx export -d model --flavour portable -o graphs",
        "fluxonnx export -d model --transformer flux-2-klein-4b-int8.safetensors",
    )
    parser.add_argument(
        "-d",
        "--dir",
        type=not_empty,
        required=True,
        metavar="DIR",
        help="model directory, or a repository of the Hugging Face hub",
    )
    parser.add_argument(
        "-o",
        "--output",
        type=not_empty,
        metavar="DIR",
        help="write a self-contained copy here instead of writing into the model directory",
    )
    add_parts(parser)
    parser.add_argument(
        "--precision",
        metavar="NAME",
        help="bf16: weights stay as they are in the files of the checkpoint; fp32: converted; fp16: converted to half "
        "the size and computed in half precision, for GPUs (on a CPU it needs as much memory as fp32); int8, int4: "
        "quantised; auto: whatever suits this machine. Builds of fp16, int8 and int4 need no other files (default: "
        "bf16, or int8 or int4 if the weights are such integers already)",
    )
    add_text_encoder_precision(parser)
    parser.add_argument(
        "--keep",
        metavar="REGEX",
        help="int8, int4: do not quantise linear layers whose names match, such as 'blocks.0.*to_out'",
    )
    parser.add_argument(
        "--rotate", action="store_true", help="int8: rotate inputs by a Hadamard matrix, which spreads outliers"
    )
    parser.add_argument(
        "--block", type=int, metavar="N", help="int4: the number of weights that share a scale: 32, 64 (default) or 128"
    )
    parser.add_argument(
        "--flavour",
        default="ort",
        metavar="NAME",
        help="ort: fused operators of onnxruntime; portable: any ONNX runtime (default: %(default)s)",
    )
    parser.add_argument(
        "--component",
        action="append",
        metavar="NAME",
        help="only this graph (text_encoder, conditioning, transformer, vae_encoder, vae_decoder); can be repeated",
    )
    parser.add_argument("--opset", type=int, metavar="N", help="default: 23 for ort, 17 for portable")
    parser.add_argument("--force", action="store_true", help="overwrite graphs that differ")
    add_verbosity(parser)


def run(arguments: argparse.Namespace) -> None:
    """Run the command with its parsed arguments."""
    export(typed(Options, arguments))


def export(options: Options) -> None:
    """Export graphs and print a table of the files that were written."""
    from fluxonnx import export as exporter
    from fluxonnx.api import AUTO, default_precision, find_model
    from fluxonnx.auto import choose
    from fluxonnx.contract import open_checkpoint

    say = speaker(options.quiet)
    say_seconds = speaker(quiet=not options.verbose)
    start = time.perf_counter()
    model = find_model(options.dir, say)
    checkpoint = open_checkpoint(model, options.transformer, text_encoder=options.text_encoder, vae=options.vae)
    precision = options.precision or default_precision(checkpoint)
    if precision == AUTO:
        choice = choose(checkpoint)
        precision = choice.precision
        say(str(choice))
    say_seconds(phase_line("open checkpoint", time.perf_counter() - start))
    start = time.perf_counter()
    with Progress(options.quiet) as bar:
        reports = exporter.export(
            model,
            options.output,
            transformer=options.transformer,
            text_encoder=options.text_encoder,
            vae=options.vae,
            precision=precision,
            text_encoder_precision=options.text_encoder_precision,
            keep=options.keep,
            block=options.block,
            rotate=options.rotate,
            flavour=options.flavour,
            components=options.component,
            opset=options.opset,
            force=options.force,
            progress=bar.bytes,
        )
    say_seconds(phase_line("export", time.perf_counter() - start))
    say(f"{'graph':<32}{'nodes':>7}{'parameters':>16}{'bytes written':>16}{'seconds':>9}")
    for report in reports:
        seconds = f"{report.seconds:9.2f}" if report.seconds is not None else " up to date"
        say(f"{report.graph:<32}{report.nodes:>7}{report.parameters:>16,}{report.bytes_written:>16,}{seconds}")
