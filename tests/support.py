"""What several test files need: cases, tolerances, golden values, and ways to run one graph of a build."""

from __future__ import annotations

import shutil
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import pytest

from fluxonnx.checkpoint.manifest import build_name, graph_file, read_manifest
from fluxonnx.checkpoint.safetensors import Tensor
from fluxonnx.export import export
from fluxonnx.export.precisions.rounding import int8_panels
from fluxonnx.runtime.session import Session, SessionOptions
from tools.make_checkpoint import ARCHITECTURES, make_checkpoint

# Graphs agree with the reference to this relative L2 error: float32 round-off of another order of summation, through
# up to thirty layers. An error of meaning (a wrong epsilon, a transposed axis) shows at 1e-3 and above.
GRAPH_TOLERANCE = 1e-5
# A whole run multiplies the error of the graphs by its steps.
LATENTS_TOLERANCE = 1e-4
# A pixel may fall on the other side of a rounding.
IMAGE_TOLERANCE = 1

# Inputs and outputs of the reference for one random checkpoint, written by `tests/golden/make_golden.py`.
GOLDEN = np.load(Path(__file__).parent / "golden/graphs.npz")
# The names in `GOLDEN` of each graph's inputs and outputs.
GOLDEN_PORTS = {
    "text_encoder": (("input_ids", "attention_mask"), ("prompt_embeds",)),
    "conditioning": (("timestep", "txt_ids", "img_ids"), ("timestep_proj", "rotary_cos", "rotary_sin")),
    "transformer": (
        ("hidden_states", "encoder_hidden_states", "timestep_proj", "rotary_cos", "rotary_sin"),
        ("velocity",),
    ),
    "vae_encoder": (("sample",), ("latents",)),
    "vae_decoder": (("latents",), ("decoded",)),
}


@dataclass(frozen=True)
class Case:
    """One random checkpoint: an architecture of `tools/make_checkpoint.py` and how it is stored."""

    architecture: str
    dtype: str = "bf16"
    shards: int = 1
    is_distilled: bool = True

    @property
    def id(self) -> str:
        return f"{self.architecture}-{self.dtype}-{self.shards}"


class Checkpoints:
    """Makes checkpoints on demand and remembers them; tests must not change the ones they get from `get`."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def get(self, case: Case) -> Path:
        """A checkpoint without graphs."""
        path = self._root / f"{case.id}-{case.is_distilled}"
        if not path.exists():
            make_checkpoint(
                path,
                ARCHITECTURES[case.architecture],
                dtype=case.dtype,
                shards=case.shards,
                is_distilled=case.is_distilled,
            )
        return path

    def exported(self, case: Case, precision: str = "bf16", flavour: str = "ort") -> Path:
        """A checkpoint with the graphs of one build beside its files."""
        path = self._root / f"{case.id}-{case.is_distilled}-exported"
        if not path.exists():
            shutil.copytree(self.get(case), path)
        export(path, precision=precision, flavour=flavour)
        return path


def hub_cache(source: Path, root: Path) -> Path:
    """Lay a checkpoint out as huggingface_hub caches it: a snapshot of links to blobs."""
    blobs = root / "blobs"
    blobs.mkdir(parents=True)
    for i, file in enumerate(path for path in source.rglob("*") if path.is_file()):
        link = root / "snapshots" / "0123abc" / file.relative_to(source)
        link.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, blobs / str(i))
        link.symlink_to(blobs / str(i))
    return root / "snapshots" / "0123abc"


def aged(root: Path, graph_format: int = 0) -> None:
    """Change the manifest to what an exporter of another graph format would have written."""
    manifest = read_manifest(root)
    assert manifest is not None
    for build in manifest.builds.values():
        for component in build.components.values():
            component.graph_format, component.exporter_version = graph_format, "0.0"
            component.exporter_digest = "of another exporter"
    manifest.save(root)


def int8_matrix(tensor: Tensor, limit: int | None, rotation: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """A matrix as `Int8` stores it, in one panel: int8 [in, out], and the steps, f32 [out]."""
    values, scales = int8_panels(tensor, [tensor.shape[0]], limit, rotation)
    return values.reshape(tensor.shape[::-1]), scales


def relative_error(found: np.ndarray, expected: np.ndarray) -> float:
    """Relative L2 error; infinite where shapes differ or values are not finite."""
    if found.shape != expected.shape or not np.isfinite(found).all():
        return float("inf")
    difference = found.astype(np.float64) - expected
    return float(np.linalg.norm(difference) / np.linalg.norm(expected.astype(np.float64)))


def golden_inputs(component: str) -> dict[str, np.ndarray]:
    """The inputs of a graph in `GOLDEN`, by the names in its contract."""
    renamed = {"encoder_hidden_states": "prompt_embeds"}
    return {name: GOLDEN[renamed.get(name, name)] for name in GOLDEN_PORTS[component][0]}


def golden_outputs(component: str) -> list[np.ndarray]:
    """The outputs of a graph in `GOLDEN`."""
    return [GOLDEN[name] for name in GOLDEN_PORTS[component][1]]


def run_graph(root: Path, component: str, precision: str, flavour: str = "ort", **inputs: np.ndarray) -> np.ndarray:
    """Run a graph of a build, on the golden inputs unless others are given; returns its first output."""
    manifest = read_manifest(root)
    assert manifest is not None
    build = manifest.builds[build_name(precision, flavour)]
    with Session(root / graph_file(component, precision, flavour), component, SessionOptions(), build) as session:
        return session.run(**(inputs or golden_inputs(component)))[0]


def operators(root: Path, component: str, precision: str, flavour: str = "ort") -> Counter[str]:
    """How many nodes of each type a graph has."""
    model = onnx.load(root / graph_file(component, precision, flavour), load_external_data=False)
    return Counter(node.op_type for node in model.graph.node)


def optional(*packages: str) -> pytest.MarkDecorator:
    """Mark a test that needs packages which are no dependencies: skipped without them, which CI counts as a failure."""
    from importlib.util import find_spec

    missing = [name for name in packages if find_spec(name) is None]
    return pytest.mark.skipif(bool(missing), reason=f"{', '.join(missing)} not installed")
