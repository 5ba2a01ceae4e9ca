"""What a LoRA costs: seconds of a step and memory with rank 16, 32 and 128 in all linear layers, against none.

    python benchmarks/lora.py MODEL [--precision bf16 int8 int4] [--rank 16 32 128] [--size 256] [--repeat 3]

Each picture is made by a process of its own; the rounds go through all ranks in turn, so that other load on the machine
affects all of them. The matrices are random: time does not depend on values. Files are bf16, as trainers write them.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))

import ml_dtypes
from safetensors.numpy import save

from fluxonnx import api
from fluxonnx.checkpoint.manifest import read_manifest
from fluxonnx.contract import Architecture
from fluxonnx.errors import FluxonnxError
from fluxonnx.lora.names import transformer_layers
from fluxonnx.measure.picture import PROMPT, measure
from fluxonnx.measure.tables import table


def main() -> int:
    parser = argparse.ArgumentParser(description="measure what a LoRA costs")
    parser.add_argument("model", type=Path, help="model directory")
    parser.add_argument("--precision", nargs="+", default=["bf16", "int8", "int4"], metavar="NAME")
    parser.add_argument("--rank", type=int, nargs="+", default=[16, 32, 128], metavar="N")
    parser.add_argument("--size", type=int, default=256, metavar="PX", help="of a square (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=4, metavar="N", help="default: %(default)s")
    parser.add_argument("--repeat", type=int, default=3, metavar="N", help="rounds (default: %(default)s)")
    arguments = parser.parse_args()
    try:
        for precision in arguments.precision:
            print(f"\n{precision}\n\n{run(arguments, precision)}", flush=True)
    except FluxonnxError as error:
        print(f"benchmarks/lora.py: {error}", file=sys.stderr)
        return 1
    return 0


def run(arguments: argparse.Namespace, precision: str) -> str:
    """Measure one precision; returns a table."""
    api.load(arguments.model, precision=precision).close()  # exports it where it is missing
    with tempfile.TemporaryDirectory() as folder:
        files: dict[int, list[str]] = {0: []}
        for rank in arguments.rank:
            files[rank] = [str(Path(folder) / f"rank{rank}.safetensors")]
            write(arguments.model, Path(files[rank][0]), rank)
        sizes = {rank: sum(Path(file).stat().st_size for file in found) for rank, found in files.items()}
        runs: dict[int, list[dict[str, Any]]] = {rank: [] for rank in files}
        for _ in range(arguments.repeat):
            for rank, lora in files.items():
                job = {"model": str(arguments.model), "precision": precision, "prompt": PROMPT, "lora": lora}
                job |= {"width": arguments.size, "height": arguments.size, "steps": arguments.steps}
                runs[rank].append(measure("picture", **job))
    rows = []
    for rank, found in runs.items():
        # a ratio within each round, of which the median counts
        pairs = zip(found, runs[0], strict=True)
        ratio = statistics.median(step(one) / step(other) for one, other in pairs)
        peaks = [run["phases"]["denoise"] for run in found]
        anonymous, mapped = (
            f"{statistics.median(peak[key] or 0 for peak in peaks):.2f}" for key in ("anonymous_gb", "mapped_gb")
        )
        seconds = f"{statistics.median(map(step, found)):.3f}"
        name = str(rank) if rank else "none"
        rows.append([name, f"{sizes[rank] / 1e6:.1f}", seconds, f"{ratio:.3f}", anonymous, mapped])
    return table(["rank", "MB of the file", "seconds a step", "ratio", "anonymous GB", "mapped GB"], rows)


def step(run: dict[str, Any]) -> float:
    """Return the median seconds of the steps after the first."""
    return statistics.median(run["steps"])


def write(model: Path, path: Path, rank: int) -> None:
    """Write a LoRA of all linear layers of the transformer."""
    manifest = read_manifest(model)
    assert manifest is not None
    sizes = Architecture.from_json(manifest.architecture, model).transformer
    block = np.random.default_rng(0).standard_normal(1 << 20, np.float32).astype(ml_dtypes.bfloat16)
    tensors = {}
    for name, (n_out, n_in) in transformer_layers(sizes).items():
        tensors[f"transformer.{name}.lora_A.weight"] = np.resize(block, (rank, n_in))
        tensors[f"transformer.{name}.lora_B.weight"] = np.resize(block, (n_out, rank)) * ml_dtypes.bfloat16(1e-3)
    path.write_bytes(save(tensors))


if __name__ == "__main__":
    sys.exit(main())
