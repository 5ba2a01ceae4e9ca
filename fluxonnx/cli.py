"""The command line: parse, and call `commands`."""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

from fluxonnx import __version__, commands
from fluxonnx.errors import FluxonnxError, UsageError


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code: 0, 1 for a failure, 2 for wrong usage, 130 when interrupted."""
    arguments = build_parser().parse_args(argv)
    quiet = getattr(arguments, "quiet", False)
    warnings.showwarning = lambda message, *_: None if quiet else _complain(f"warning: {message}")
    warnings.simplefilter("always", UserWarning)
    try:
        arguments.run(arguments)
    except UsageError as error:
        _complain(str(error))
        return 2
    except FluxonnxError as error:
        _complain(str(error))
        return 1
    except KeyboardInterrupt:
        _complain("interrupted")
        return 130
    except MemoryError:
        _complain("out of memory: choose a smaller size")
        return 1
    return 0


def _complain(text: str) -> None:
    print(f"fluxonnx: {text}", file=sys.stderr)


def build_parser() -> argparse.ArgumentParser:
    """Describe the commands and their flags."""
    parser = argparse.ArgumentParser(prog="fluxonnx", description="FLUX.2-klein as plain ONNX, without torch.")
    parser.add_argument("--version", action="version", version=f"fluxonnx {__version__}")
    subparsers = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    _add_generate(subparsers)
    _add_export(subparsers)
    _add_info(subparsers)
    _add_bench(subparsers)
    _add_compare(subparsers)
    return parser


def _command(
    subparsers: argparse._SubParsersAction,
    name: str,
    run: Callable[..., None],
    help: str,
    usage: str,
    *examples: str,
) -> argparse.ArgumentParser:
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


def _add_generate(subparsers: argparse._SubParsersAction) -> None:
    parser = _command(
        subparsers,
        "generate",
        commands.generate,
        "make pictures from prompts and pictures",
        "-p TEXT [-d DIR] [-o FILE] [-i FILE [-t X]] [options]",
        'fluxonnx generate -d model -p "a cat on a windowsill" -o cat.png -W 512 -H 512 -S 42',
        'fluxonnx generate -d model -p "make it snow" -i photo.png -o snow.png          # edit: looks at the photo',
        'fluxonnx generate -d model -p "oil painting" -i photo.png -t 0.7 -o oil.png    # paints over the photo',
    )
    prompts = parser.add_argument_group("prompt (one of -p, --prompt-file, --from)")
    prompts.add_argument("-p", "--prompt", metavar="TEXT", help="what to draw")
    prompts.add_argument(
        "--prompt-file",
        type=Path,
        metavar="FILE",
        help='a prompt a line, or JSON objects such as {"prompt": "a cat", "seed": 7, "width": 512}',
    )
    prompts.add_argument(
        "--from",
        dest="source",
        type=Path,
        metavar="PICTURE",
        help="make a fluxonnx picture again, from the parameters in it; other flags override them",
    )
    prompts.add_argument("--negative-prompt", metavar="TEXT", help="what guidance leads away from (base models)")
    prompts.add_argument(
        "--max-sequence-length",
        type=int,
        metavar="N",
        help="tokens a prompt is padded or cut to, a multiple of 8 up to 512 (the default)",
    )
    prompts.add_argument(
        "--cache-dir", type=Path, metavar="DIR", help="keep encoded prompts here: a known one skips the text encoder"
    )

    picture = parser.add_argument_group("picture")
    picture.add_argument(
        "-o", "--output", type=Path, metavar="FILE", help=".png, .jpg, .webp or .ppm (default: out.png)"
    )
    picture.add_argument("-W", "--width", type=int, metavar="PX", help="default: the input picture's, else 256")
    picture.add_argument("-H", "--height", type=int, metavar="PX", help="likewise; both are multiples of 16")
    picture.add_argument(
        "-S", "--seed", type=int, nargs="+", metavar="N", help="several make several pictures (default: random)"
    )
    picture.add_argument(
        "-n", "--count", type=int, metavar="N", help="make N pictures, of seeds S, S+1, ..., in numbered files"
    )

    inputs = parser.add_argument_group(
        "input pictures",
        "-i alone edits: the model looks at the picture and draws a new one. -i with -t paints over it.",
    )
    inputs.add_argument(
        "-i",
        "--input",
        action="append",
        default=[],
        type=Path,
        metavar="FILE",
        help="the picture to edit or paint over",
    )
    inputs.add_argument(
        "-t",
        "--strength",
        type=float,
        nargs="?",
        const=0.75,
        metavar="X",
        help="paint over the input: 0 keeps it, 1 keeps only its size, 0.7 changes the style (-t alone: 0.75)",
    )
    inputs.add_argument(
        "-r",
        "--reference",
        action="append",
        default=[],
        type=Path,
        metavar="FILE",
        help="a picture to look at; up to 10, and together with -i and -t",
    )

    sampling = parser.add_argument_group("sampling")
    sampling.add_argument("-s", "--steps", type=int, metavar="N", help="default: 4, or 50 with a base model")
    sampling.add_argument(
        "-g", "--guidance", type=float, metavar="X", help="guidance scale, 1 turns it off (base models; default: 4)"
    )
    sampling.add_argument("--sampler", metavar="NAME", help="euler (default), heun or dpmpp-2m")
    sampling.add_argument("--schedule", metavar="NAME", help="flow (default), linear, power or custom")
    sampling.add_argument("--sigmas", type=float, nargs="+", metavar="X", help="the custom schedule, falling from 1")
    sampling.add_argument("--power-alpha", type=float, metavar="X", help="of the power schedule (default: 2)")
    sampling.add_argument(
        "--noise", metavar="KIND", help="torch (default), or size-independent: a seed looks alike at all sizes"
    )

    model = parser.add_argument_group("model")
    model.add_argument(
        "-d",
        "--dir",
        metavar="DIR",
        help="model directory (default: $FLUXONNX_MODEL, else ./model, else the small one in the box: coloured shapes)",
    )
    model.add_argument("--precision", metavar="NAME", help="bf16 (default), fp32, fp16, int8, int4, or auto")
    model.add_argument(
        "--provider",
        metavar="NAME",
        help="what computes: cpu (default), or another that the installed onnxruntime has, such as cuda or coreml",
    )
    model.add_argument("--threads", type=int, metavar="N", help="default: one per core")
    model.add_argument(
        "--low-memory",
        action="store_true",
        help="take less memory, and more time: pictures above 576x576 are decoded in tiles, with small differences",
    )
    _add_verbosity(parser)


def _add_export(subparsers: argparse._SubParsersAction) -> None:
    parser = _command(
        subparsers,
        "export",
        commands.export,
        "write a checkpoint's ONNX graphs",
        "-d DIR [-o DIR] [options]",
        "fluxonnx export -d model --flavour portable -o graphs",
        "fluxonnx export -d model --transformer flux-2-klein-4b-int8.safetensors",
    )
    parser.add_argument("-d", "--dir", required=True, metavar="DIR", help="model directory, Hugging Face layout")
    parser.add_argument(
        "-o",
        "--output",
        metavar="DIR",
        help="make a self-contained copy here instead of writing into the model directory",
    )
    parser.add_argument(
        "--transformer",
        type=Path,
        metavar="FILE",
        help="take the transformer's weights from this safetensors file, with diffusers' or the original's names; "
        "ComfyUI's int8_tensorwise integers are kept as they are, and make an int8 build",
    )
    parser.add_argument(
        "--precision",
        metavar="NAME",
        help="bf16: weights stay in the checkpoint's files as they are; fp32: converted; fp16: half of that, and "
        "computed so, for GPUs (on a CPU it takes fp32's memory); int8, int4: quantised; auto: what suits this "
        "machine. Files of fp16, int8 and int4 need no others (default: bf16, or int8 if that is what the weights are)",
    )
    parser.add_argument(
        "--keep",
        metavar="REGEX",
        help="int8, int4: do not quantise linears whose names match, such as 'blocks.0.*to_out'",
    )
    parser.add_argument("--rotate", action="store_true", help="int8: mix inputs by a Hadamard matrix, against outliers")
    parser.add_argument(
        "--block", type=int, metavar="N", help="int4: weights that share a scale, 32, 64 (default) or 128"
    )
    parser.add_argument(
        "--flavour",
        default="ort",
        metavar="NAME",
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


def _add_info(subparsers: argparse._SubParsersAction) -> None:
    parser = _command(
        subparsers, "info", commands.info, "print what made a picture", "PICTURE", "fluxonnx info cat.png"
    )
    parser.add_argument("picture", type=Path, metavar="PICTURE", help="a picture that fluxonnx made")


def _add_bench(subparsers: argparse._SubParsersAction) -> None:
    parser = _command(
        subparsers,
        "bench",
        commands.bench,
        "measure seconds and memory",
        "[-d DIR] [--size WxH ...] [--precision NAME ...] [--threads N ...] [--provider NAME ...] [options]",
        "fluxonnx bench -d model --size 256 512x768 --precision bf16 fp32 --repeat 3",
        "fluxonnx bench -d model --size 512 --steps 1 --profile",
    )
    parser.add_argument("-d", "--dir", metavar="DIR", help="model directory (default: as for generate)")
    varied = parser.add_argument_group(
        "what is varied", "Each may have several values, and be repeated; all combinations take turns."
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
        "--threads", type=int, nargs="+", action="extend", default=[], metavar="N", help="default: one per core"
    )
    varied.add_argument(
        "--provider", nargs="+", action="extend", default=[], metavar="NAME", help="cpu (default), cuda, coreml, ..."
    )
    parser.add_argument("-s", "--steps", type=int, metavar="N", help="default: 4, or 50 with a base model")
    parser.add_argument("-p", "--prompt", metavar="TEXT", help="default: always the same")
    parser.add_argument(
        "--repeat", type=int, default=1, metavar="N", help="rounds, whose medians are reported (default: %(default)s)"
    )
    parser.add_argument("--low-memory", action="store_true", help="measure as generate --low-memory runs")
    parser.add_argument("--export", action="store_true", help="also measure the export: graphs are written anew")
    parser.add_argument(
        "--profile",
        action="store_true",
        help="also show which operators take the time, from one more picture under onnxruntime's profiler",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures here")
    parser.add_argument("-q", "--quiet", action="store_true", help="print errors only")


def _add_compare(subparsers: argparse._SubParsersAction) -> None:
    parser = _command(
        subparsers,
        "compare",
        commands.compare,
        "compare precisions with the checkpoint's own weights",
        "-d DIR [--precision NAME ...] [-o FILE] [options]",
        "fluxonnx compare -d model --precision int8 int4 -o compare.html",
    )
    parser.add_argument("-d", "--dir", metavar="DIR", help="model directory (default: as for generate)")
    parser.add_argument("--precision", nargs="+", default=["int8", "int4"], metavar="NAME", help="default: int8 int4")
    parser.add_argument(
        "-p", "--prompt", action="append", metavar="TEXT", help="may be repeated (default: two, always the same)"
    )
    parser.add_argument("-W", "--width", type=int, metavar="PX", help="default: the model's own")
    parser.add_argument("-H", "--height", type=int, metavar="PX", help="likewise")
    parser.add_argument("-s", "--steps", type=int, metavar="N", help="default: 4, or 50 with a base model")
    parser.add_argument("-S", "--seed", type=int, default=1, metavar="N", help="default: %(default)s")
    parser.add_argument(
        "-o", "--output", type=Path, metavar="FILE", help="a page with pictures and plots (default: compare.html)"
    )
    parser.add_argument("-q", "--quiet", action="store_true", help="print errors only")


def _add_verbosity(parser: argparse.ArgumentParser) -> None:
    group = parser.add_mutually_exclusive_group()
    group.add_argument("-v", "--verbose", action="store_true", help="print the seconds each phase takes")
    group.add_argument("-q", "--quiet", action="store_true", help="print errors only")
