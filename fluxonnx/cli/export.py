"""`fluxonnx export`: write the graphs of a checkpoint."""

from __future__ import annotations

import argparse
import re
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
from fluxonnx.cli.messages import shortened
from fluxonnx.cli.progress import Progress, phase_line, speaker
from fluxonnx.runtime.fields import MAX_SIDE, MIN_SIDE

# Shards of a few bytes would be a file for each weight.
SMALLEST_SHARD = 10**6


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
    kv: bool | None
    opset: int | None
    shape: tuple[int, int] | None
    text_seq: int | None
    shard_size: int | None
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
        "fluxonnx export -d model --precision fp16 --flavour portable --shape 512x512 --text-seq 512",
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
        help="only this graph (text_encoder, conditioning, transformer, vae_encoder, vae_decoder, references, "
        "transformer_cached); can be repeated",
    )
    parser.add_argument(
        "--kv",
        action=argparse.BooleanOptionalAction,
        help="also the graphs references and transformer_cached, with which generate --kv looks at references once "
        "instead of in each step (default: for models made for it, such as FLUX.2-klein-9b-kv)",
    )
    parser.add_argument("--opset", type=int, metavar="N", help="default: 23 for ort, 17 for portable")
    parser.add_argument(
        "--shape",
        type=_shape,
        metavar="WxH",
        help="make a static build, whose sizes are all numbers, for pictures of this size, one at a time and without "
        "references; generate uses it for them",
    )
    parser.add_argument(
        "--text-seq",
        type=int,
        metavar="N",
        help="for a static build: tokens of a prompt with its padding, 1 to 512 (default: the model's own)",
    )
    parser.add_argument(
        "--shard-size",
        type=_bytes,
        metavar="SIZE",
        help="divide the weight files of the build into files of at most this size, such as 512MB or 2GB; a single "
        "larger weight gets a file of its own (default: one file for each graph)",
    )
    parser.add_argument("--force", action="store_true", help="overwrite graphs that differ")
    add_verbosity(parser)


def _shape(text: str) -> tuple[int, int]:
    """Parse --shape: 512x512."""
    if not (found := re.fullmatch(r"(\d{1,6})x(\d{1,6})", text)):
        raise argparse.ArgumentTypeError(f"{shortened(text, 40)} is no size: write it as 512x512")
    width, height = map(int, found.groups())
    if not all(MIN_SIDE <= side <= MAX_SIDE for side in (width, height)):
        raise argparse.ArgumentTypeError(f"{text} can't be drawn: sides are from {MIN_SIDE} to {MAX_SIDE}")
    return width, height


def _bytes(text: str) -> int:
    """Parse --shard-size: a number with or without a unit."""
    found = re.fullmatch(r"(\d{1,15})\s*([kKMGT]?)(i?)B?", text)
    size = int(found[1]) * (1024 if found[3] else 1000) ** " KMGT".index(found[2].upper() or " ") if found else 0
    if not found or size < SMALLEST_SHARD:
        raise argparse.ArgumentTypeError(f"{shortened(text, 40)} is no size of 1 MB or more: write it as 512MB or 2GB")
    return size


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
            kv=options.kv,
            opset=options.opset,
            shape=options.shape,
            text_seq=options.text_seq,
            shard_size=options.shard_size,
            force=options.force,
            progress=bar.bytes,
        )
    say_seconds(phase_line("export", time.perf_counter() - start))
    say(f"{'graph':<32}{'nodes':>7}{'parameters':>16}{'bytes written':>16}{'seconds':>9}")
    for report in reports:
        seconds = f"{report.seconds:9.2f}" if report.seconds is not None else " up to date"
        say(f"{report.graph:<32}{report.nodes:>7}{report.parameters:>16,}{report.bytes_written:>16,}{seconds}")
