"""Write a checkpoint as the files that stable-diffusion.cpp reads, for `rivals.py`.

    python benchmarks/sdcpp_files.py -d DIR OUT [--int8]

OUT gets transformer.safetensors, text_encoder.safetensors and vae.safetensors: the checkpoint's bytes, each model in
one file, the transformer by Black Forest Labs' names. With `--int8` the linear layers of the transformer's blocks are
rotated and rounded to 8 bits as ComfyUI's "int8_tensorwise" files with "convrot" are: each group of 256 inputs is
multiplied by a Hadamard matrix, and each row has a scale of its own. Its file is then called
transformer-int8-convrot.safetensors.

stable-diffusion.cpp itself makes other types of them: `sd-cli -M convert -m FILE -o FILE.gguf --type q8_0`.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))

from fluxonnx.checkpoint.names import BLOCKS, MODULES, SWAPPED
from fluxonnx.checkpoint.safetensors import DTYPES, Tensor, read_header
from fluxonnx.errors import CheckpointError, FluxonnxError

GROUP = 256
ROWS = 1024
CONVROT = {"format": "int8_tensorwise", "convrot": True, "convrot_groupsize": GROUP}


@dataclass(frozen=True)
class Part:
    """A tensor to write: its name, safetensors dtype, shape, and what gives its bytes."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    data: Callable[[], bytes | np.ndarray]

    @property
    def nbytes(self) -> int:
        """Length in bytes."""
        return int(np.prod(self.shape, dtype=np.int64)) * DTYPES[self.dtype].itemsize


def tensors_of(folder: Path) -> dict[str, Tensor]:
    """Return the tensors of all safetensors files in a folder.

    Raises:
        CheckpointError: There are none.
    """
    if not any(folder.glob("*.safetensors")):
        raise CheckpointError(f"{folder} holds no safetensors files: -d takes a checkpoint in Hugging Face's layout")
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in read_header(file).items()}


def as_stored(name: str, tensors: list[Tensor], swapped: bool = False) -> Part:
    """Return tensors below each other, with their bytes as they are."""
    shape = (sum(tensor.shape[0] for tensor in tensors), *tensors[0].shape[1:]) if tensors[0].shape else ()

    def data() -> np.ndarray:
        array = np.concatenate([tensor.array() for tensor in tensors]) if shape else tensors[0].array()
        return np.concatenate(np.split(array, 2)[::-1]) if swapped else array

    return Part(name, tensors[0].dtype, shape, data)


def original_names(tensors: dict[str, Tensor]) -> list[Part]:
    """Return a transformer's tensors by the names of the original, where some are fused."""
    parts = [
        as_stored(f"{theirs}.weight", [tensors[f"{ours}.weight"]], theirs == SWAPPED)
        for theirs, ours in MODULES.items()
    ]
    for theirs, (ours, modules) in BLOCKS.items():
        count = 1 + max(int(name.split(".")[1]) for name in tensors if name.startswith(f"{ours}."))
        for block in range(count):
            for module, sources in modules.items():
                parameter = "scale" if ".norm." in f".{module}" else "weight"
                found = [tensors[f"{ours}.{block}.{source}.weight"] for source in sources]
                parts.append(as_stored(f"{theirs}.{block}.{module}.{parameter}", found))
    return parts


def hadamard(size: int) -> np.ndarray:
    """Return the normalised regular Hadamard matrix of a power of 4, float32 [size, size]."""
    base = np.array([[1, 1, 1, -1], [1, 1, -1, 1], [1, -1, 1, 1], [-1, 1, 1, 1]], np.float32) / 2
    matrix = np.ones((1, 1), np.float32)
    while len(matrix) < size:
        matrix = np.kron(matrix, base)
    return matrix


def rounded(part: Part) -> list[Part]:
    """Return the tensors of a linear layer of 8-bit integers in place of its weight."""
    layer = part.name.removesuffix(".weight")
    matrix = hadamard(GROUP)
    scales = np.empty((part.shape[0], 1), np.float32)

    def integers() -> np.ndarray:
        weight = part.data()
        assert isinstance(weight, np.ndarray)
        found = np.empty(part.shape, np.int8)
        for start in range(0, len(weight), ROWS):
            rows = weight[start : start + ROWS].astype(np.float32)
            rows = (rows.reshape(-1, GROUP) @ matrix).reshape(rows.shape)
            scale = np.maximum(np.abs(rows).max(axis=1, keepdims=True), np.float32(1e-30)) / np.float32(127)
            scales[start : start + ROWS] = scale
            found[start : start + ROWS] = np.clip(np.rint(rows / scale), -127, 127)
        return found

    said = json.dumps(CONVROT).encode()
    return [
        Part(part.name, "I8", part.shape, integers),
        Part(f"{layer}.weight_scale", "F32", scales.shape, lambda: scales),
        Part(f"{layer}.comfy_quant", "U8", (len(said),), lambda: said),
    ]


def is_rounded(part: Part) -> bool:
    """Whether a layer's weight is among those that ComfyUI's files hold as integers."""
    in_block = part.name.startswith(("double_blocks.", "single_blocks.")) and part.name.endswith(".weight")
    return in_block and len(part.shape) == 2 and part.shape[1] % GROUP == 0


def write(path: Path, parts: list[Part]) -> None:
    """Write a safetensors file, a tensor at a time: bytes are asked for in the order of `parts`."""
    header, offset = {}, 0
    for part in parts:
        header[part.name] = {
            "dtype": part.dtype,
            "shape": part.shape,
            "data_offsets": [offset, offset + part.nbytes],
        }
        offset += part.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for part in parts:
            data = part.data()
            file.write(data if isinstance(data, bytes) else np.ascontiguousarray(data).view(np.uint8).data)


def main() -> int:
    """Write the files; returns 0, or 1 if the checkpoint can't be read."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], epilog="See the docstring of this file for more."
    )
    parser.add_argument("-d", "--dir", type=Path, required=True, help="model directory, Hugging Face layout")
    parser.add_argument("out", type=Path, metavar="OUT", help="folder to write to")
    parser.add_argument("--int8", action="store_true", help="round the transformer's linear layers to 8 bits")
    arguments = parser.parse_args()
    try:
        transformer = original_names(tensors_of(arguments.dir / "transformer"))
        others = {
            name: [as_stored(tensor.name, [tensor]) for tensor in tensors_of(arguments.dir / name).values()]
            for name in ("text_encoder", "vae")
        }
        arguments.out.mkdir(parents=True, exist_ok=True)
        if arguments.int8:
            layers = [rounded(part) if is_rounded(part) else [part] for part in transformer]
            write(arguments.out / "transformer-int8-convrot.safetensors", [part for layer in layers for part in layer])
        else:
            write(arguments.out / "transformer.safetensors", transformer)
        for name, parts in others.items():
            write(arguments.out / f"{name}.safetensors", parts)
    except (FluxonnxError, OSError) as error:
        print(f"sdcpp_files: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
