"""The same pictures made by fluxonnx and by diffusers on a GPU: seconds, memory, and ratios.

    python benchmarks/gpu.py -d DIR [--size 512 1024] [--steps 4] [--precision bf16-native fp16] [--provider cuda]
        [--rivals diffusers diffusers-compiled] [--pictures 3] [--repeat 1] [--json FILE]

Each program gets a process of its own, which keeps all parts of the model loaded, and makes pictures of other prompts
one after the other. Programs alternate (A B A B) if they are repeated. diffusers computes in bfloat16; compiled, its
transformer's blocks are compiled by `compile_repeated_blocks`, once per size.

"Ready" is the time from the process's start to the first picture of the first size. The time of a step is the median
of all steps but the first of each picture, and that of a picture the median of all pictures of a size but the first.
Memory is what the system reports as used on the device, at its highest, less what was used before.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

from fluxonnx.contract import OUT_LAYERS
from fluxonnx.errors import FluxonnxError
from fluxonnx.measure.picture import PROMPT, SEED
from fluxonnx.measure.process import run_program
from fluxonnx.measure.speed import parse_size
from fluxonnx.measure.tables import number, table
from fluxonnx.runtime.outputs import check_output, write_output

RIVALS = ("diffusers", "diffusers-compiled")
# Seconds between two readings of the device's memory.
INTERVAL = 0.2

# draw(prompt, width, height, note), where note is to be called after each step
Draw = Callable[[str, int, int, Callable[[], None]], None]


class DeviceMemory:
    """The highest memory in use on the first NVIDIA device, in GB, read in the background."""

    def __init__(self) -> None:
        self._command = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits", "-i", "0"]
        self.before = self.peak = self._read()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _read(self) -> float:
        try:
            output = subprocess.run(self._command, capture_output=True, text=True, check=True).stdout
            return float(output.splitlines()[0]) * 2**20 / 1e9
        except (OSError, subprocess.CalledProcessError, ValueError, IndexError):
            return float("nan")

    def _run(self) -> None:
        while not self._stop.wait(INTERVAL):
            self.peak = max(self.peak, self._read())

    def used(self) -> float:
        """Stop reading, and return the peak less what was in use before."""
        self._stop.set()
        self._thread.join()
        return self.peak - self.before


def fluxonnx_draw(model: str, steps: int, precision: str, provider: str) -> Draw:
    from fluxonnx import api

    flux = api.load(model, precision=precision, provider=provider, keep_loaded=True)

    def draw(prompt: str, width: int, height: int, note: Callable[[], None]) -> None:
        flux.generate(prompt, width, height, steps, SEED, callback=lambda *_: note())

    return draw


def diffusers_draw(model: str, steps: int, compiled: bool) -> Draw:
    import torch
    from diffusers import Flux2KleinPipeline

    pipe = Flux2KleinPipeline.from_pretrained(model, torch_dtype=torch.bfloat16).to("cuda")
    pipe.set_progress_bar_config(disable=True)
    if compiled:
        pipe.transformer.compile_repeated_blocks(fullgraph=True, dynamic=False)
        pipe.vae.decode = torch.compile(pipe.vae.decode, dynamic=False)

    def draw(prompt: str, width: int, height: int, note: Callable[[], None]) -> None:
        def end(pipe: Any, i: int, t: Any, values: dict[str, Any]) -> dict[str, Any]:
            torch.cuda.synchronize()
            note()
            return values

        pipe(
            prompt=prompt,
            width=width,
            height=height,
            num_inference_steps=steps,
            guidance_scale=1.0,
            generator=torch.Generator("cpu").manual_seed(SEED),
            text_encoder_out_layers=OUT_LAYERS,
            callback_on_step_end=end,
        )

    return draw


def measure(started: float, draw: Draw, sizes: Sequence[tuple[int, int]], pictures: int) -> dict[str, Any]:
    """Make pictures of each size; returns seconds."""
    found: dict[str, Any] = {}
    for width, height in sizes:
        steps: list[float] = []
        totals: list[float] = []
        for i in range(pictures + 1):
            ends: list[float] = []
            start = time.perf_counter()
            draw(f"{PROMPT}, number {i}", width, height, lambda: ends.append(time.perf_counter()))  # noqa: B023
            totals.append(time.perf_counter() - start)
            found.setdefault("ready", time.time() - started)
            if i:
                steps += [after - before for before, after in pairwise(ends)]
        first, *rest = totals
        found[f"{width}x{height}"] = {
            "first": first,
            "picture": statistics.median(rest),
            "step": statistics.median(steps),
        }
    return found


def child(job: dict[str, Any]) -> int:
    """Measure one program in this process, and print what was found as JSON."""
    started, sizes, pictures, program = job["started"], job["sizes"], job["pictures"], job["program"]
    if program.startswith("diffusers"):
        draw = diffusers_draw(job["model"], job["steps"], program.endswith("compiled"))
    else:
        draw = fluxonnx_draw(job["model"], job["steps"], program, job["provider"])
    print(json.dumps(measure(started, draw, sizes, pictures)))
    return 0


def run(program: str, job: dict[str, Any]) -> dict[str, Any]:
    """Run a program in a process of its own; an error is part of what is returned."""
    memory = DeviceMemory()
    command = [sys.executable, str(Path(__file__).resolve()), "--child"]
    try:
        done = run_program([*command, json.dumps({**job, "program": program, "started": time.time()})])
        found = json.loads(done.output.splitlines()[-1])
    except FluxonnxError as error:
        found = {"error": str(error)}
    return {**found, "memory": memory.used()}


def render(found: dict[str, list[dict[str, Any]]], sizes: Sequence[str]) -> str:
    """Return a table per size: medians over the rounds, and ratios to the first program in brackets."""
    parts = []
    for size in sizes:
        rows, base = [], None
        for program, rounds in found.items():
            good = [item for item in rounds if "error" not in item]
            if not good:
                rows.append([program, rounds[0]["error"].splitlines()[-1][:60], "", "", "", ""])
                continue
            values = [statistics.median(item[size][key] for item in good) for key in ("step", "picture", "first")]
            values += [statistics.median(item[key] for item in good) for key in ("ready", "memory")]
            base = base or values
            shown = [f"{number(v)} ({b / v:.2f})" for v, b in zip(values, base, strict=True)]
            rows.append([program, *shown])
        parts.append(table([size, "step, s", "picture, s", "first picture, s", "ready, s", "device, GB"], rows))
    return "\n\n".join(parts)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], epilog="See the docstring of this file for more."
    )
    parser.add_argument("-d", "--dir", required=True, help="model directory, Hugging Face layout")
    parser.add_argument("--size", nargs="+", default=["512", "1024"], metavar="WxH", help="default: 512 1024")
    parser.add_argument("-s", "--steps", type=int, default=4, metavar="N", help="default: %(default)s")
    parser.add_argument("--precision", nargs="+", default=["bf16-native", "fp16"], metavar="NAME", help="of fluxonnx")
    parser.add_argument("--provider", default="cuda", metavar="NAME", help="of fluxonnx (default: %(default)s)")
    parser.add_argument("--rivals", nargs="*", choices=RIVALS, default=RIVALS, help="default: all")
    parser.add_argument("--pictures", type=int, default=3, metavar="N", help="per size, after a first one")
    parser.add_argument("--repeat", type=int, default=1, metavar="N", help="rounds (default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures here")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Compare; returns 0, or 1 if a program failed."""
    arguments = parse(argv)
    sizes = [parse_size(size) for size in arguments.size]
    if arguments.json is not None:
        check_output(arguments.json, "--json")
    job = {
        "model": arguments.dir,
        "steps": arguments.steps,
        "sizes": sizes,
        "pictures": arguments.pictures,
        "provider": arguments.provider,
    }
    found: dict[str, list[dict[str, Any]]] = {}
    for _ in range(arguments.repeat):
        for program in [*arguments.precision, *arguments.rivals]:
            result = run(program, job)
            found.setdefault(program, []).append(result)
            print(program, json.dumps(result), file=sys.stderr, flush=True)
    print(render(found, [f"{width}x{height}" for width, height in sizes]))
    if arguments.json is not None:
        write_output(arguments.json, (json.dumps({**job, "programs": found}, indent=2) + "\n").encode())
    return 1 if any("error" in item for rounds in found.values() for item in rounds) else 0


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        sys.exit(child(json.loads(sys.argv[2])))
    sys.exit(main())
