"""LoRA files of random matrices for random checkpoints, and the checkpoints with these matrices in their weights."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

from fluxonnx.contract import open_checkpoint
from fluxonnx.export.components import read_architecture
from fluxonnx.lora.names import Layers
from tests.support import Case

CASE = Case("one-double-three-single", "fp32")
RANK = 3
WEIGHTS = {
    "transformer": "transformer/diffusion_pytorch_model.safetensors",
    "text_encoder": "text_encoder/model.safetensors",
}
Tensors = dict[str, np.ndarray]


def layers_of(root: Path) -> Layers:
    """The linear layers of a checkpoint."""
    return Layers(read_architecture(open_checkpoint(root), None))


def random(*shape: int, seed: int = 0, size: float = 1.0) -> np.ndarray:
    """float32 values of a normal distribution, about as large as the weights of a layer with this many inputs."""
    rng = np.random.default_rng([seed, *shape])
    return (size * rng.standard_normal(shape) / np.sqrt(shape[-1])).astype(np.float32)


def pair(shape: tuple[int, int], seed: int, rank: int = RANK) -> tuple[np.ndarray, np.ndarray]:
    """The matrices of a LoRA: down [rank, in] and up [out, rank]."""
    return random(rank, shape[1], seed=seed), random(shape[0], rank, seed=seed + 1)


def everything(shapes: Mapping[str, tuple[int, int]], prefix: str = "transformer.", rank: int = RANK) -> Tensors:
    """A LoRA of all layers by diffusers' keys."""
    tensors = {}
    for seed, (path, shape) in enumerate(shapes.items()):
        down, up = pair(shape, 2 * seed, rank)
        tensors |= {f"{prefix}{path}.lora_A.weight": down, f"{prefix}{path}.lora_B.weight": up}
    return tensors


def written(path: Path, tensors: Tensors, metadata: dict[str, str] | None = None) -> Path:
    """A safetensors file of these tensors."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: np.ascontiguousarray(array) for name, array in tensors.items()}, path, metadata)
    return path


def merged(source: Path, target: Path, changes: Mapping[str, np.ndarray], component: str = "transformer") -> Path:
    """A copy of a float32 checkpoint in one file, in which the weights of some layers are others."""
    root = Path(shutil.copytree(source, target))
    values = load_file(root / WEIGHTS[component])
    for path, weight in changes.items():
        name = f"{path}.weight"
        assert values[name].shape == weight.shape, name
        values[name] = weight.astype(np.float32)
    save_file(values, root / WEIGHTS[component])
    return root


def weight(root: Path, path: str, component: str = "transformer") -> np.ndarray:
    """A layer's weight in a checkpoint in one file, float64."""
    return load_file(root / WEIGHTS[component])[f"{path}.weight"].astype(np.float64)
