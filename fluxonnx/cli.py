"""The command line: parse and call, one function per command."""

from __future__ import annotations

import argparse
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

from fluxonnx import __version__
from fluxonnx.errors import FluxonnxError, UsageError
from fluxonnx.progress import Progress


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code: 0, 1 for a failure, 2 for wrong usage, 130 when interrupted."""
    parser = build_parser()
    arguments = parser.parse_args(argv)
    warnings.showwarning = lambda message, *_: print(f"fluxonnx: warning: {message}", file=sys.stderr)
    try:
        arguments.run(arguments)
    except UsageError as error:
        print(f"fluxonnx: {error}", file=sys.stderr)
        return 2
    except FluxonnxError as error:
        print(f"fluxonnx: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("fluxonnx: interrupted", file=sys.stderr)
        return 130
    except MemoryError:
        print("fluxonnx: out of memory: choose a smaller size", file=sys.stderr)
        return 1
    return 0


def build_parser() -> argparse.ArgumentParser:
    """Describe the commands and their flags."""
    parser = argparse.ArgumentParser(prog="fluxonnx", description="FLUX.2-klein as plain ONNX, without torch.")
    parser.add_argument("--version", action="version", version=f"fluxonnx {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    _add_generate(commands)
    _add_export(commands)
    return parser


def _command(
    commands: argparse._SubParsersAction, name: str, run: Callable, help: str, example: str
) -> argparse.ArgumentParser:
    parser = commands.add_parser(
        name,
        help=help,
        description=help[0].upper() + help[1:] + ".",
        epilog=f"example:\n  {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run)
    return parser


def _add_generate(commands: argparse._SubParsersAction) -> None:
    parser = _command(
        commands,
        "generate",
        generate,
        "make a picture from a prompt",
        'fluxonnx generate -d model -p "a cat on a windowsill" -o cat.png -W 512 -H 512 -S 42',
    )
    parser.add_argument("-p", "--prompt", required=True, help="what to draw")
    parser.add_argument(
        "-o", "--output", type=Path, default=Path("out.png"), help=".png, .jpg, .webp or .ppm (default: %(default)s)"
    )

    picture = parser.add_argument_group("picture")
    picture.add_argument("-W", "--width", type=int, default=256, metavar="PX", help="default: %(default)s")
    picture.add_argument("-H", "--height", type=int, default=256, metavar="PX", help="default: %(default)s")
    picture.add_argument("-s", "--steps", type=int, metavar="N", help="denoising steps (default: 4)")
    picture.add_argument("-S", "--seed", type=int, metavar="N", help="default: a random one, which is printed")
    picture.add_argument(
        "--max-sequence-length",
        type=int,
        default=512,
        metavar="N",
        help="tokens a prompt is padded or cut to, a multiple of 8 up to %(default)s (the default)",
    )

    model = parser.add_argument_group("model")
    model.add_argument(
        "-d",
        "--dir",
        metavar="DIR",
        help="model directory (default: $FLUXONNX_MODEL, else ./model, else a tiny one in the box, which draws noise)",
    )
    model.add_argument("--precision", choices=("bf16", "fp32"), default="bf16", help="default: %(default)s")
    model.add_argument("--threads", type=int, metavar="N", help="default: one per core")
    _add_verbosity(parser)


def _add_export(commands: argparse._SubParsersAction) -> None:
    parser = _command(
        commands,
        "export",
        export,
        "write a checkpoint's ONNX graphs",
        "fluxonnx export -d model --flavour portable -o graphs",
    )
    parser.add_argument("-d", "--dir", required=True, metavar="DIR", help="model directory, Hugging Face layout")
    parser.add_argument(
        "-o",
        "--output",
        metavar="DIR",
        help="make a self-contained copy here instead of writing into the model directory",
    )
    parser.add_argument(
        "--precision",
        choices=("bf16", "fp32"),
        default="bf16",
        help="bf16: weights stay in the checkpoint's files as they are; fp32: converted (default: %(default)s)",
    )
    parser.add_argument(
        "--flavour",
        choices=("ort", "portable"),
        default="ort",
        help="ort: onnxruntime's fused operators; portable: any ONNX runtime (default: %(default)s)",
    )
    parser.add_argument(
        "--component",
        action="append",
        metavar="NAME",
        help="only this graph (text_encoder, conditioning, transformer, vae_encoder, vae_decoder); may be repeated",
    )
    parser.add_argument("--opset", type=int, metavar="N", help="default: 23 for ort, 17 for portable")
    parser.add_argument("--force", action="store_true", help="overwrite graphs that differ")
    _add_verbosity(parser)


def _add_verbosity(parser: argparse.ArgumentParser) -> None:
    group = parser.add_mutually_exclusive_group()
    group.add_argument("-v", "--verbose", action="store_true", help="print the seconds each phase takes")
    group.add_argument("-q", "--quiet", action="store_true", help="print errors only")


def generate(arguments: argparse.Namespace) -> None:
    """Make a picture and save it."""
    from fluxonnx import api
    from fluxonnx.runtime.images import check_output_path, save_image
    from fluxonnx.runtime.pipeline import random_seed

    say = _speaker(arguments)
    check_output_path(arguments.output)
    start = time.perf_counter()
    model = api.find_model(arguments.dir)
    if api.is_shipped(model) and not arguments.quiet:
        print(
            "fluxonnx: using the tiny model in the box, whose weights are random: it draws noise. "
            "Pass -d DIR for FLUX.2-klein (see models/README.md)",
            file=sys.stderr,
        )
    flux = api.load(
        model,
        precision=arguments.precision,
        threads=arguments.threads,
        on_export=lambda root: say(f"Exporting {root} ..."),
    )
    loaded = time.perf_counter() - start
    seed = random_seed() if arguments.seed is None else arguments.seed
    say(f"Seed: {seed}")
    with flux, Progress(arguments.quiet) as bar:
        image = flux.generate(
            arguments.prompt,
            arguments.width,
            arguments.height,
            steps=arguments.steps,
            seed=seed,
            max_sequence_length=arguments.max_sequence_length,
            callback=bar.step,
        )
    start = time.perf_counter()
    save_image(image, arguments.output, dict(image.info))
    phases = {"open model": loaded, **flux.phases.seconds, "save": time.perf_counter() - start}
    if arguments.verbose:
        for name, seconds in phases.items():
            say(f"{name:<18}{seconds:8.2f} s")
    say(f"{arguments.output} {image.width}x{image.height} ({sum(phases.values()):.1f} s)")


def export(arguments: argparse.Namespace) -> None:
    """Export graphs and print a table of what was written."""
    from fluxonnx.export import export as run

    say = _speaker(arguments)
    with Progress(arguments.quiet) as bar:
        reports = run(
            arguments.dir,
            arguments.output,
            precision=arguments.precision,
            flavour=arguments.flavour,
            components=arguments.component,
            opset=arguments.opset,
            force=arguments.force,
            progress=bar.bytes,
        )
    say(f"{'graph':<32}{'nodes':>7}{'parameters':>16}{'bytes written':>16}{'seconds':>9}")
    for report in reports:
        seconds = f"{report.seconds:9.2f}" if report.seconds is not None else " up to date"
        say(f"{report.graph:<32}{report.nodes:>7}{report.parameters:>16,}{report.bytes_written:>16,}{seconds}")


def _speaker(arguments: argparse.Namespace) -> Callable[[str], None]:
    return (lambda text: None) if arguments.quiet else (lambda text: print(text, file=sys.stderr, flush=True))
