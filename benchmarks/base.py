"""Base models: 50 steps with guidance, with and without step caching, beside diffusers: seconds, ratios, PSNR.

    python benchmarks/base.py MODEL [--precision bf16 int8] [--step-cache 1 2 3] [--size 128] [--dtype bf16]
        [--repeat 3]

All draw the same prompt from the same noise in one process, and take turns, so that other load on the machine affects
all of them. Seconds are those of the denoising steps alone, without loading, encoding and decoding. `--dtype` is that
of diffusers: give the one that is faster on the processor. PSNR is that of the finished picture against fluxonnx's
own bf16 picture with every call, in dB. A ratio is fluxonnx's share of diffusers' time in the same round, of which
the median counts.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

from PIL import Image

sys.path.insert(0, str(Path(__file__).parent.parent))

from fluxonnx import api
from fluxonnx.checkpoint.manifest import read_manifest
from fluxonnx.contract import OUT_LAYERS
from fluxonnx.errors import FluxonnxError
from fluxonnx.measure.picture import SEED
from fluxonnx.measure.quality import psnr
from fluxonnx.measure.tables import table

PROMPT = "a yellow star above a green heart on a purple background"
GUIDANCE = 4.0
# Draws the picture; returns the seconds of all steps, and the picture.
Draw = Callable[[], tuple[float, Image.Image]]


def main() -> int:
    parser = argparse.ArgumentParser(description="measure base models with guidance")
    parser.add_argument("model", type=Path, help="model directory of a base model")
    parser.add_argument("--precision", nargs="+", default=["bf16", "int8"], metavar="NAME", help="default: bf16 int8")
    parser.add_argument("--step-cache", type=int, nargs="+", default=[1, 2, 3], metavar="N", help="default: 1 2 3")
    parser.add_argument("-p", "--prompt", default=PROMPT, metavar="TEXT", help="default: %(default)s")
    parser.add_argument("--size", type=int, default=128, metavar="PX", help="of a square (default: %(default)s)")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32", help="of diffusers (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=50, metavar="N", help="default: %(default)s")
    parser.add_argument("--repeat", type=int, default=3, metavar="N", help="rounds (default: %(default)s)")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    try:
        print(compare(arguments))
    except FluxonnxError as error:
        print(f"benchmarks/base.py: {error}", file=sys.stderr)
        return 1
    return 0


def compare(arguments: argparse.Namespace) -> str:
    """Draw in turns; returns a table."""
    rival = f"diffusers {arguments.dtype}"
    ours: dict[str, Draw] = {}
    for precision in dict.fromkeys(["bf16", *arguments.precision]):
        for every in arguments.step_cache if precision in arguments.precision else [1]:
            ours[f"fluxonnx {precision}" + (f", --step-cache {every}" if every > 1 else "")] = fluxonnx_draw(
                arguments, precision, every
            )
    programs = {rival: diffusers_draw(arguments), **ours}  # opened last: an export says which layers are read
    seconds: dict[str, list[float]] = {name: [] for name in programs}
    pictures: dict[str, Image.Image] = {}
    for i in range(arguments.repeat + 1):
        for name, draw in programs.items():
            took, pictures[name] = draw()
            if i:  # the first round warms up
                seconds[name].append(took)
    whole = pictures["fluxonnx bf16"]
    rows = []
    for name, found in seconds.items():
        pairs = zip(found, seconds[rival], strict=True)
        ratio = statistics.median(ours / theirs for ours, theirs in pairs)
        distance = "" if name == "fluxonnx bf16" else f"{psnr(pictures[name], whole):.1f}"
        rows.append([name, f"{statistics.median(found):.2f}", f"{ratio:.2f}", distance])
    return table(["program", f"{arguments.steps} steps, s", "times diffusers", "PSNR, dB"], rows)


def fluxonnx_draw(arguments: argparse.Namespace, precision: str, every: int) -> Draw:
    flux = api.load(arguments.model, precision=precision, keep_loaded=True)

    def draw() -> tuple[float, Image.Image]:
        size = arguments.size
        image = flux.generate(
            arguments.prompt, size, size, arguments.steps, SEED, guidance_scale=GUIDANCE, step_cache=every
        )
        return flux.phases.seconds["denoise"], image

    return draw


def diffusers_draw(arguments: argparse.Namespace) -> Draw:
    import torch
    from diffusers import Flux2KleinPipeline

    manifest = read_manifest(Path(arguments.model))
    layers = tuple(manifest.text_encoder_out_layers or ()) if manifest else ()
    dtype = torch.bfloat16 if arguments.dtype == "bf16" else torch.float32
    pipe = Flux2KleinPipeline.from_pretrained(arguments.model, torch_dtype=dtype)
    pipe.set_progress_bar_config(disable=True)
    started: list[float] = []
    forward = pipe.transformer.forward

    def timed(*inputs: object, **named: object) -> object:
        started.append(time.perf_counter())
        return forward(*inputs, **named)

    pipe.transformer.forward = timed

    def draw() -> tuple[float, Image.Image]:
        started.clear()
        ends: list[float] = []

        def note(pipe: object, i: int, t: object, values: dict[str, object]) -> dict[str, object]:
            ends.append(time.perf_counter())
            return values

        image = pipe(
            prompt=arguments.prompt,
            width=arguments.size,
            height=arguments.size,
            num_inference_steps=arguments.steps,
            guidance_scale=GUIDANCE,
            text_encoder_out_layers=layers or OUT_LAYERS,
            generator=torch.Generator("cpu").manual_seed(SEED),
            callback_on_step_end=note,
        ).images[0]
        return ends[-1] - started[0], image

    return draw


if __name__ == "__main__":
    sys.exit(main())
