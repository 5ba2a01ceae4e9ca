"""Measurements that need a process of their own, so that its memory is that of the measurement alone.

`measure` starts such a process: `python -m fluxonnx.measure.picture JOB` reads its job as JSON from the command line
and prints what it measured as JSON.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fluxonnx.errors import FluxonnxError
from fluxonnx.measure.process import Memory, PeakMemory, ReadMemory, resident, run_program

if TYPE_CHECKING:
    from fluxonnx.runtime.events import Event
    from fluxonnx.runtime.pipeline import Flux

# Every measurement uses the same seed and, unless another is given, the same prompt: all do the same work.
SEED = 1
PROMPT = "a lighthouse on a cliff at night, waves breaking below, long exposure photograph"


def measure_export(
    model: str, precision: str, flavour: str, text_encoder_precision: str | None = None
) -> dict[str, Any]:
    """Write a build anew; returns seconds, bytes written and peak memory."""
    from fluxonnx.export import export

    start = time.perf_counter()
    with PeakMemory() as memory:
        memory.begin("export")
        reports = export(
            model,
            precision=precision,
            text_encoder_precision=text_encoder_precision,
            flavour=flavour,
            force=True,
        )
        seconds = time.perf_counter() - start
        memory.begin("")
    written = sum(report.bytes_written for report in reports)
    return {"seconds": seconds, **_gigabytes(memory.of("export")), "bytes_written": written}


def measure_picture(
    model: str,
    width: int,
    height: int,
    steps: int | None,
    prompt: str,
    guidance: float | None = None,
    lora: Sequence[str] = (),
    read: ReadMemory = resident,
    **loading: Any,
) -> dict[str, Any]:
    """Make a picture.

    Args:
        model: The model directory.
        width: In pixels.
        height: In pixels.
        steps: Denoising steps; None for the model's own number.
        prompt: What to draw.
        guidance: The guidance scale; None for the model's own.
        lora: LoRA files, as FILE or FILE:SCALE.
        read: Returns the memory of this process.
        **loading: Arguments of `api.load`: precision, threads, ...

    Returns:
        The seconds from the prompt to the picture; seconds and peak memory of each phase; the seconds of each step
        after the first.
    """
    from fluxonnx import api
    from fluxonnx.runtime.events import PhaseBegan

    memory = PeakMemory(read)
    ends: list[float] = []

    def watch(event: Event) -> None:
        if isinstance(event, PhaseBegan):
            memory.begin(event.name)

    with api.load(model, **loading, watch=watch) as flux, memory:
        load_all(flux, lora)
        start = time.perf_counter()
        flux.generate(
            prompt,
            width,
            height,
            steps,
            SEED,
            guidance_scale=guidance,
            callback=lambda *_: ends.append(time.perf_counter()),
        )
        seconds = time.perf_counter() - start
    phases = {name: {"seconds": took, **_gigabytes(memory.of(name))} for name, took in flux.phases.seconds.items()}
    return {"seconds": seconds, "phases": phases, "steps": [after - before for before, after in pairwise(ends)]}


def measure_operators(
    model: str, width: int, height: int, steps: int | None, prompt: str, lora: Sequence[str] = (), **loading: Any
) -> dict[str, Any]:
    """Make a picture under onnxruntime's profiler; returns the operator types of each graph, the slowest first."""
    from fluxonnx import api
    from fluxonnx.runtime.events import OperatorsTimed, total

    timed: list[OperatorsTimed] = []

    def watch(event: Event) -> None:
        if isinstance(event, OperatorsTimed):
            timed.append(event)

    with api.load(model, **loading, profile=True, watch=watch) as flux:
        load_all(flux, lora)
        flux.generate(prompt, width, height, steps, SEED)
    return {graph: [asdict(row) for row in rows] for graph, rows in total(timed).items()}


def load_all(flux: Flux, lora: Sequence[str]) -> None:
    """Load LoRA files, as FILE or FILE:SCALE."""
    from fluxonnx.runtime.lora_files import parse

    for i, text in enumerate(lora):
        item = parse(text)
        flux.load_lora(item.file, item.scale, name=str(i))


def _gigabytes(peak: Memory) -> dict[str, float | None]:
    anonymous, mapped = peak or (None, None)
    return {"anonymous_gb": anonymous, "mapped_gb": mapped}


MEASUREMENTS: dict[str, Callable[..., dict[str, Any]]] = {
    "export": measure_export,
    "picture": measure_picture,
    "operators": measure_operators,
}


def measure(measurement: str, **job: Any) -> dict[str, Any]:
    """Run one of `MEASUREMENTS` in a fresh process.

    Raises:
        FluxonnxError: It failed.
    """
    root = str(Path(__file__).parents[2])  # the folder that holds the package
    path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    command = [sys.executable, "-m", "fluxonnx.measure.picture", json.dumps({"measurement": measurement, **job})]
    output = run_program(command, {**os.environ, "PYTHONPATH": path}).output
    return json.loads(output.splitlines()[-1])


def main() -> int:
    """Run the measurement that the first argument describes and print its result; returns the exit code."""
    job = json.loads(sys.argv[1])
    try:
        print(json.dumps(MEASUREMENTS[job.pop("measurement")](**job)))
    except KeyboardInterrupt:
        return 130
    except MemoryError:
        print("out of memory", file=sys.stderr)
        return 1
    except FluxonnxError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
