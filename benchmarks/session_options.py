"""The effect of single onnxruntime session options on the transformer: seconds to open it, and seconds of a step.

    python benchmarks/session_options.py -d DIR [--precision int8] [--size 256] [--repeat 3]

The first row shows the settings of fluxonnx. Each of the others changes one setting. Rounds alternate between the rows.
In every round a new session is opened and run twice, and the second run is measured. A model with fewer layers
(`make_checkpoint.py --architecture 4b-short`) gives the same answer as the whole one.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).parent.parent))

import numpy as np

from fluxonnx import api
from fluxonnx.checkpoint.manifest import Build, build_name, read_manifest
from fluxonnx.errors import FluxonnxError
from fluxonnx.machine import has_exact_int8_dot
from fluxonnx.measure.speed import parse_size
from fluxonnx.measure.tables import machine, table
from fluxonnx.runtime.engine import SessionOptions
from fluxonnx.runtime.session import Session, Settings, settings

TEXT_TOKENS = 512
Change = Callable[[Settings], Settings]


def config(key: str, value: str) -> Change:
    return lambda chosen: replace(chosen, config={**chosen.config, key: value})


VARIANTS: dict[str, Change] = {
    "as it is": lambda chosen: chosen,
    # onnxruntime binds each thread to a core only where it chooses the number of threads itself.
    "threads not pinned": lambda chosen: replace(chosen, threads=os.cpu_count()),
    "threads do not spin": config("session.intra_op.allow_spinning", "0"),
    "memory pattern": lambda chosen: replace(chosen, memory_pattern=True),
    "buffers wait to be reused": lambda chosen: replace(chosen, memory_reuse=True),
    "no arena": lambda chosen: replace(chosen, arena=False),
    "denormals are zero": config("session.set_denormal_as_zero", "1"),
    "graph optimisation": lambda chosen: replace(chosen, optimise=True),
}


def inputs_of(path: Path, image_tokens: int) -> dict[str, np.ndarray]:
    """Draw random inputs of the sizes that the graph declares."""
    import onnx

    rng = np.random.default_rng(0)
    sizes = {
        i.name: i.type.tensor_type.shape.dim[-1].dim_value
        for i in onnx.load(path, load_external_data=False).graph.input
    }
    angles = rng.uniform(0, 6, (TEXT_TOKENS + image_tokens, sizes["rotary_cos"] // 2)).repeat(2, 1)
    return {
        "hidden_states": rng.standard_normal((1, image_tokens, sizes["hidden_states"]), np.float32),
        "encoder_hidden_states": rng.standard_normal((1, TEXT_TOKENS, sizes["encoder_hidden_states"]), np.float32),
        "timestep_proj": rng.standard_normal((1, sizes["timestep_proj"]), np.float32),
        "rotary_cos": np.cos(angles, dtype=np.float32),
        "rotary_sin": np.sin(angles, dtype=np.float32),
    }


def measure(path: Path, build: Build, inputs: dict[str, np.ndarray], change: Change) -> list[float]:
    """Return the seconds to open a session, and of its second run."""
    options = SessionOptions()
    changed = change(settings("transformer", build, options, has_exact_int8_dot()))
    start = time.perf_counter()
    with Session(path, "transformer", options, build, changed) as session:
        opened = time.perf_counter() - start
        session.run(**inputs)
        start = time.perf_counter()
        session.run(**inputs)
        return [opened, time.perf_counter() - start]


def main(argv: Sequence[str] | None = None) -> int:
    """Measure; returns 0, or 1 if the model can't be used."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], epilog="See the docstring of this file for more."
    )
    parser.add_argument("-d", "--dir", required=True, help="model directory")
    parser.add_argument("--precision", default="int8", metavar="NAME", help="default: %(default)s")
    parser.add_argument("--size", default="256", metavar="WxH", help="default: %(default)s")
    parser.add_argument("--repeat", type=int, default=3, metavar="N", help="rounds (default: %(default)s)")
    arguments = parser.parse_args(argv)
    if arguments.repeat < 1:
        parser.error("argument --repeat: must be at least 1")
    try:
        width, height = parse_size(arguments.size)
        api.load(arguments.dir, precision=arguments.precision).close()
    except FluxonnxError as error:
        print(f"session_options: {error}", file=sys.stderr)
        return 1
    manifest = read_manifest(Path(arguments.dir))
    assert manifest is not None  # `load` has exported the build
    build = manifest.builds[build_name(arguments.precision, "ort")]
    path = Path(arguments.dir) / build.components["transformer"].graph
    inputs = inputs_of(path, width * height // 256)
    found: dict[str, list[list[float]]] = {name: [] for name in VARIANTS}
    for _ in range(arguments.repeat):
        for name, change in VARIANTS.items():
            found[name].append(measure(path, build, inputs, change))
    medians = {name: [median(values) for values in zip(*runs, strict=True)] for name, runs in found.items()}
    base = next(iter(medians.values()))[1]
    here = machine()
    print(f"{here['processor']}, {here['cores']} cores, {arguments.precision}, {width}x{height}\n")
    rows = [[name, f"{opened:.2f}", f"{step:.2f}", f"{step / base:.2f}"] for name, (opened, step) in medians.items()]
    print(table(["option", "open, s", "step, s", "times the first"], rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
