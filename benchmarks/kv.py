"""What it saves to look at references once: seconds with and without `--kv`, for some numbers and sizes of references.

    python benchmarks/kv.py MODEL [--precision bf16 int8] [--references 1 4] [--size 256 512] [--repeat 3]

Both ways take turns in one process, so that other load on the machine affects both. Picture and references have the
same size. A whole picture counts from the latents of the references to its own latents: reading the references, loading
the transformer, and all steps. Encoding and decoding are the same in both ways, and left out.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
import warnings
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent.parent))

from fluxonnx import api
from fluxonnx.errors import FluxonnxError
from fluxonnx.measure.picture import PROMPT, SEED
from fluxonnx.runtime.pipeline import Flux
from fluxonnx.runtime.request import Request

HEAD = ("size", "references", "s a step", "s with kv", "s reading", "times faster: a step", "a picture")
# The phases that differ.
PHASES = ("read references", "load transformer", "denoise")


@dataclass(frozen=True)
class Run:
    """Seconds of a step, of reading the references, and of a whole picture."""

    step: float
    reading: float
    whole: float


def main() -> int:
    parser = argparse.ArgumentParser(description="measure what it saves to look at references once")
    parser.add_argument("model", type=Path, help="model directory")
    parser.add_argument("--precision", nargs="+", default=["bf16", "int8"], metavar="NAME")
    parser.add_argument("--references", type=int, nargs="+", default=[1, 4], metavar="N", help="default: 1 4")
    parser.add_argument("--size", type=int, nargs="+", default=[256, 512], metavar="PX", help="default: 256 512")
    parser.add_argument("--steps", type=int, default=4, metavar="N", help="default: %(default)s")
    parser.add_argument("--repeat", type=int, default=3, metavar="N", help="rounds (default: %(default)s)")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")  # that a model was not made for it
    try:
        for precision in arguments.precision:
            compare(arguments, precision)
    except FluxonnxError as error:
        print(f"benchmarks/kv.py: {error}", file=sys.stderr)
        return 1
    return 0


def compare(arguments: argparse.Namespace, precision: str) -> None:
    """Measure one precision, and print a row for each size and number of references as soon as it is measured."""
    print(f"\n{precision}\n\n| {' | '.join(HEAD)} |\n|{'---|' * len(HEAD)}", flush=True)
    with api.load(arguments.model, precision=precision, kv=True) as flux:
        for size in arguments.size:
            for count in arguments.references:
                runs: dict[bool, list[Run]] = {False: [], True: []}
                for _ in range(arguments.repeat):
                    for kv, found in runs.items():
                        found.append(measure(flux, size, count, arguments.steps, kv))
                pairs = list(zip(runs[False], runs[True], strict=True))
                row = [
                    f"{size}x{size}",
                    str(count),
                    seconds([run.step for run in runs[False]]),
                    seconds([run.step for run in runs[True]]),
                    seconds([run.reading for run in runs[True]]),
                    # ratios within each round, of which the median counts
                    f"{statistics.median(plain.step / kept.step for plain, kept in pairs):.2f}",
                    f"{statistics.median(plain.whole / kept.whole for plain, kept in pairs):.2f}",
                ]
                print(f"| {' | '.join(row)} |", flush=True)


def measure(flux: Flux, size: int, count: int, steps: int, kv: bool) -> Run:
    """Make one picture that looks at random ones."""
    rng = np.random.default_rng(0)
    pictures = [Image.fromarray(rng.integers(0, 256, (size, size, 3), np.uint8)) for _ in range(count)]
    request = Request(prompt=PROMPT, width=size, height=size, steps=steps, references=pictures, kv=kv)
    ends: list[float] = []
    flux.run(request, [SEED], lambda *_: ends.append(time.perf_counter()))
    took = flux.phases.seconds
    step = statistics.median(after - before for before, after in pairwise(ends))
    return Run(step, took.get("read references", 0.0), sum(took.get(name, 0.0) for name in PHASES))


def seconds(values: list[float]) -> str:
    """Return a median as text."""
    return f"{statistics.median(values):.3f}"


if __name__ == "__main__":
    sys.exit(main())
