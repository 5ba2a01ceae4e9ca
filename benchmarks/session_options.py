"""What onnxruntime's options are worth for a step of the transformer: seconds to open it, and seconds a step, in turns.

    python benchmarks/session_options.py -d DIR [--precision int8] [--size 256] [--repeat 3]

The first row is what fluxonnx does. Each of the others changes one thing. Every session is opened anew in every round,
and runs twice; the second run counts. A model of fewer layers (`make_checkpoint.py --architecture 4b-short`) tells as
much as the whole one.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).parent.parent))

import numpy as np
import onnxruntime

from fluxonnx import api
from fluxonnx.bench import machine, middle, parse_size, table
from fluxonnx.errors import FluxonnxError
from fluxonnx.manifest import Build, build_name, read_manifest
from fluxonnx.runtime.session import Session, SessionOptions

TEXT_TOKENS = 512
Change = Callable[[onnxruntime.SessionOptions], None]


def config(key: str, value: str) -> Change:
    return lambda settings: settings.add_session_config_entry(key, value)


def attribute(name: str, value: Any) -> Change:
    return lambda settings: setattr(settings, name, value)


VARIANTS: dict[str, Change] = {
    "as it is": lambda settings: None,
    # Only where onnxruntime chooses how many threads there are does it bind each to a core.
    "threads not pinned": attribute("intra_op_num_threads", os.cpu_count()),
    "threads do not spin": config("session.intra_op.allow_spinning", "0"),
    "memory pattern": attribute("enable_mem_pattern", True),
    "buffers wait to be reused": attribute("enable_mem_reuse", True),
    "no arena": attribute("enable_cpu_mem_arena", False),
    "denormals are zero": config("session.set_denormal_as_zero", "1"),
    "graph optimisation": attribute("graph_optimization_level", onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL),
}


def inputs_of(path: Path, image_tokens: int) -> dict[str, np.ndarray]:
    """Draw inputs of the sizes that the graph wants."""
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
    opener = onnxruntime.InferenceSession

    def changed(path: str, settings: onnxruntime.SessionOptions, **options: Any) -> onnxruntime.InferenceSession:
        change(settings)
        return opener(path, settings, **options)

    with mock.patch.object(onnxruntime, "InferenceSession", changed):
        start = time.perf_counter()
        with Session(path, "transformer", SessionOptions(), build) as session:
            opened = time.perf_counter() - start
            session.run(**inputs)
            start = time.perf_counter()
            session.run(**inputs)
            return [opened, time.perf_counter() - start]


def main() -> int:
    """Measure; returns 0, or 1 if the model can't be used."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], epilog="More in the head of this file.")
    parser.add_argument("-d", "--dir", required=True, help="model directory")
    parser.add_argument("--precision", default="int8", metavar="NAME", help="default: %(default)s")
    parser.add_argument("--size", default="256", metavar="WxH", help="default: %(default)s")
    parser.add_argument("--repeat", type=int, default=3, metavar="N", help="rounds (default: %(default)s)")
    arguments = parser.parse_args()
    try:
        width, height = parse_size(arguments.size)
        api.load(arguments.dir, precision=arguments.precision).close()
    except FluxonnxError as error:
        print(f"session_options: {error}", file=sys.stderr)
        return 1
    manifest = read_manifest(Path(arguments.dir))
    assert manifest is not None
    build = manifest.builds[build_name(arguments.precision, "ort")]
    path = Path(arguments.dir) / build.components["transformer"].graph
    inputs = inputs_of(path, width * height // 256)
    found: dict[str, list[list[float]]] = {name: [] for name in VARIANTS}
    for _ in range(arguments.repeat):
        for name, change in VARIANTS.items():
            found[name].append(measure(path, build, inputs, change))
    medians = {name: [middle(values) or 0.0 for values in zip(*runs, strict=True)] for name, runs in found.items()}
    base = next(iter(medians.values()))[1]
    here = machine()
    print(f"{here['processor']}, {here['cores']} cores, {arguments.precision}, {width}x{height}\n")
    rows = [[name, f"{opened:.2f}", f"{step:.2f}", f"{step / base:.2f}"] for name, (opened, step) in medians.items()]
    print(table(["option", "open, s", "step, s", "times the first"], rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
