"""The same pictures made by flux2.c and by fluxonnx: the largest and the mean difference of their pixels.

    python benchmarks/parity_flux2c.py -d DIR --flux2c PATH [--pictures 64x64:1 64x64:2] [--precision bf16 int8]
        [--reference FILE --with-reference 64x64:1] [--keep FOLDER]

Each program gets the same checkpoint, prompt, size, steps and seed, and draws the same noise (`--noise flux2c`), each
in a process of its own. Differences are of 8-bit values, over all pixels and channels. The tokenizer has to be Qwen3's
own: flux2.c has numbers of its special tokens built in, so that it reads the one of `make_checkpoint.py` otherwise.
flux2.c scales a single reference to the size of the picture; fluxonnx, as diffusers, looks at it in its own size. Give
one of the picture's size to compare the models alone. docs/flux2c.md lists what else differs.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import numpy as np
from PIL import Image

from fluxonnx import api
from fluxonnx.errors import FluxonnxError, UsageError
from fluxonnx.measure.picture import PROMPT
from fluxonnx.measure.process import run_program
from fluxonnx.measure.speed import parse_size
from fluxonnx.measure.tables import machine, table
from fluxonnx.runtime.noise import check_seed
from fluxonnx.runtime.outputs import check_output, write_output
from fluxonnx.runtime.request import Request


@dataclass(frozen=True)
class Picture:
    """What both programs draw."""

    width: int
    height: int
    steps: int
    reference: str | None = None

    @property
    def name(self) -> str:
        """A name for tables and files."""
        reference = "-reference" if self.reference else ""
        return f"{self.width}x{self.height}-{self.steps}{reference}"


@dataclass(frozen=True)
class Difference:
    """How far a picture of fluxonnx is from that of flux2.c, in 8-bit values.

    Attributes:
        largest: Of any pixel and channel.
        mean: Over all pixels and channels.
        above_2: The share of values that differ by more than 2, in [0, 1].
    """

    largest: int
    mean: float
    above_2: float


def difference(found: Image.Image, expected: Image.Image) -> Difference:
    """Compare two pictures.

    Raises:
        FluxonnxError: They differ in size.
    """
    if found.size != expected.size:
        sizes = " and ".join("x".join(map(str, image.size)) for image in (expected, found))
        raise FluxonnxError(f"the pictures have the sizes {sizes}: they can't be compared")
    a, b = (np.asarray(image.convert("RGB"), np.int16) for image in (found, expected))
    apart = np.abs(a - b)
    return Difference(int(apart.max()), float(apart.mean()), float((apart > 2).mean()))


def flux2c_command(arguments: argparse.Namespace, picture: Picture, output: Path) -> list[str]:
    reference = ["-i", picture.reference] if picture.reference else []
    return [arguments.flux2c, *common_flags(arguments, picture, output), *reference]


def fluxonnx_command(arguments: argparse.Namespace, picture: Picture, output: Path, precision: str) -> list[str]:
    own = ["--noise", "flux2c", "--precision", precision]
    reference = ["-r", picture.reference] if picture.reference else []
    program = [sys.executable, "-m", "fluxonnx", "generate"]
    return [*program, *common_flags(arguments, picture, output), *own, *reference]


def common_flags(arguments: argparse.Namespace, picture: Picture, output: Path) -> list[str]:
    size = ["-W", str(picture.width), "-H", str(picture.height), "-s", str(picture.steps)]
    return ["-d", arguments.dir, "-p", arguments.prompt, *size, "-S", str(arguments.seed), "-o", str(output)]


def compare(
    arguments: argparse.Namespace, pictures: Sequence[Picture], folder: Path
) -> dict[tuple[Picture, str], Difference]:
    """Draw all pictures with both programs; prints each difference on standard error as soon as it is known.

    Raises:
        FluxonnxError: A program failed.
    """
    found = {}
    for picture in pictures:
        theirs = folder / f"{picture.name}-flux2c.png"
        run_program(flux2c_command(arguments, picture, theirs))
        for precision in arguments.precision:
            ours = folder / f"{picture.name}-{precision}.png"
            run_program(fluxonnx_command(arguments, picture, ours, precision))
            with Image.open(ours) as a, Image.open(theirs) as b:
                apart = found[picture, precision] = difference(a, b)
            line = f"{picture.name}, {precision}: largest difference {apart.largest}, mean {apart.mean:.2f}"
            print(line, file=sys.stderr, flush=True)
    return found


def render(found: dict[tuple[Picture, str], Difference]) -> str:
    """Return the table of differences."""
    header = ["size", "steps", "reference", "precision", "largest difference of 255", "mean", "above 2"]
    rows = [
        [
            f"{picture.width}x{picture.height}",
            str(picture.steps),
            "yes" if picture.reference else "",
            precision,
            str(apart.largest),
            f"{apart.mean:.2f}",
            f"{apart.above_2:.1%}",
        ]
        for (picture, precision), apart in found.items()
    ]
    return table(header, rows)


def parse_picture(text: str, reference: str | None = None) -> Picture:
    """Read SIZE:STEPS.

    Raises:
        UsageError: It is no such thing.
    """
    size, _, steps = text.partition(":")
    if not (steps.isascii() and steps.isdigit()):
        raise UsageError(f"{text} is not a size and a number of steps, such as 64x64:1")
    width, height = parse_size(size)
    return Picture(width, height, int(steps), reference)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], epilog="See the docstring of this file for more."
    )
    parser.add_argument("-d", "--dir", required=True, help="model directory, Hugging Face layout")
    parser.add_argument("--flux2c", required=True, metavar="PATH", help="the binary of antirez/flux2.c")
    parser.add_argument("-p", "--prompt", default=PROMPT, metavar="TEXT", help="default: a fixed prompt")
    parser.add_argument("-S", "--seed", type=int, default=42, metavar="N", help="default: %(default)s")
    parser.add_argument(
        "--pictures",
        nargs="*",
        default=["64x64:1", "64x64:4"],
        metavar="SIZE:STEPS",
        help="text-to-image (default: 64x64:1 64x64:4)",
    )
    parser.add_argument("--reference", metavar="FILE", help="a picture to look at")
    parser.add_argument(
        "--with-reference", nargs="*", default=[], metavar="SIZE:STEPS", help="pictures that look at --reference"
    )
    parser.add_argument("--precision", nargs="+", default=["bf16"], metavar="NAME", help="of fluxonnx (default: bf16)")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="keep the pictures here")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures here")
    arguments = parser.parse_args(argv)
    if arguments.with_reference and not arguments.reference:
        parser.error("argument --with-reference: give a picture with --reference")
    if not arguments.pictures and not arguments.with_reference:
        parser.error("argument --pictures: there is nothing to draw")
    return arguments


def main(argv: Sequence[str] | None = None) -> int:
    """Compare; returns 0, 1 if a program failed, 2 for wrong usage."""
    arguments = parse(argv)
    try:
        if arguments.json is not None:
            check_output(arguments.json, "--json")
        if shutil.which(arguments.flux2c) is None:
            raise UsageError(f"{arguments.flux2c} is not a program: give the binary of flux2.c with --flux2c")
        check_seed(arguments.seed)
        pictures = [parse_picture(text) for text in arguments.pictures]
        pictures += [parse_picture(text, arguments.reference) for text in arguments.with_reference]
        for precision in arguments.precision:  # exports, and refuses what can't be drawn, before the first picture
            with api.load(arguments.dir, precision=precision) as flux:
                for picture in pictures:
                    flux.check(request_of(picture, arguments.prompt))
        with ExitStack() as stack:
            if arguments.keep is None:
                folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="fluxonnx-parity-")))
            else:
                folder = arguments.keep
                folder.mkdir(parents=True, exist_ok=True)
            found = compare(arguments, pictures, folder)
        here = machine()
        print(f"{here['processor']}, {here['cores']} cores\n\n{render(found)}")
        if arguments.json is not None:
            rows = [{**asdict(picture), "precision": name, **asdict(apart)} for (picture, name), apart in found.items()]
            text = json.dumps(
                {"machine": here, "prompt": arguments.prompt, "seed": arguments.seed, "rows": rows}, indent=2
            )
            write_output(arguments.json, (text + "\n").encode())
    except (FluxonnxError, OSError) as error:
        print(f"parity_flux2c: {error}", file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1
    return 0


def request_of(picture: Picture, prompt: str) -> Request:
    """Return the request that `fluxonnx generate` makes of a picture."""
    references = (picture.reference,) if picture.reference else ()
    return Request(
        prompt=prompt,
        width=picture.width,
        height=picture.height,
        steps=picture.steps,
        references=references,
        noise="flux2c",
    )


if __name__ == "__main__":
    sys.exit(main())
