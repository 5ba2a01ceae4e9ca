"""Put outlier channels into a checkpoint, such as trained transformers have and random or small ones lack.

    python -m tools.outliers SOURCE TARGET --kind norm-gains --channels 2 --scale 100

Most kinds preserve the function: a channel is multiplied by `scale` where it is made and divided by it where it is
read, so that only what lies between, which a quantised model rounds, has an outlier. The others change the function, so
a build is to be compared with the float32 build of the same checkpoint.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))

from fluxonnx.checkpoint.directory import Checkpoint, weight_files
from fluxonnx.checkpoint.safetensors import DTYPES, Tensor, read_header, read_metadata
from fluxonnx.contract import open_checkpoint
from fluxonnx.errors import CheckpointError, FluxonnxError, UsageError
from fluxonnx.export.components import read_architecture
from tools.outlier_kinds import EXACT, KINDS, SIGMAS, Edit, Request

__all__ = ["EXACT", "KINDS", "inject"]

# Rows of a tensor are changed in pieces of this many bytes (of float32), so that no large tensor is held in memory.
PIECE_BYTES = 64 << 20


def inject(
    source: str | Path,
    target: str | Path,
    kinds: Sequence[str],
    *,
    channels: int = 2,
    scale: float = 100.0,
    seed: int = 0,
    components: Sequence[str] | None = None,
    token: int | None = None,
    sigmas: Sequence[float] | None = None,
) -> Path:
    """Write a checkpoint with outliers.

    Tensors that change stay bf16 where that is exact: `scale` is a power of two. Else they become float32.

    Args:
        source: A model directory with diffusers' names; it is not changed.
        target: A new directory. Files that stay as they are, are linked, or copied where that is impossible.
        kinds: Some of `KINDS`, applied in this order.
        channels: How many channels have outliers, per norm, block or layer; at least 1.
        scale: By how much; over 0.
        seed: Chooses the channels.
        components: The parts of the model to change: text_encoder, transformer, vae; by default each that has a kind.
        token: For "token" and "massive": the token's id; by default <|im_start|>, the first one of every prompt.
        sigmas: For "modulation": where the function is preserved, in [0, 1]; exactly so where they are fewer than the
            transformer is wide. By default all of [0, 1], as far as one row of weights can.

    Returns:
        The target.

    Raises:
        UsageError: An argument has an impossible value, or the target exists.
        CheckpointError: The source is incomplete, or its tensors have other names or are quantised.
    """
    for kind in kinds:
        if kind not in KINDS:
            raise UsageError(f"kind {kind!r} is unknown: choose from {', '.join(KINDS)}")
    if channels < 1 or not 0 < scale < math.inf:
        raise UsageError(f"channels {channels}, scale {scale}: at least 1 channel and a scale over 0 are needed")
    root = Path(target)
    if root.exists():
        raise UsageError(f"{root} exists: choose a new folder")
    checkpoint = open_checkpoint(source)
    request = Request(
        checkpoint, read_architecture(checkpoint, None), channels, scale, seed, token, tuple(sigmas or SIGMAS)
    )
    edits: dict[str, dict[str, list[Edit]]] = {"text_encoder": {}, "transformer": {}, "vae": {}}
    for kind in kinds:
        for component, make in KINDS[kind].items():
            if not components or component in components:
                for edit in make(request):
                    edits[component].setdefault(edit.tensor, []).append(edit)
    if not any(edits.values()):
        raise UsageError(f"{', '.join(kinds)} changes nothing in {', '.join(components or edits)}")
    for component, changes in edits.items():
        _write_component(checkpoint, component, root / component, changes, is_power_of_two(scale))
    for path in checkpoint.files([]):
        _place(path, root / path.relative_to(checkpoint.root))
    return root


def is_power_of_two(scale: float) -> bool:
    """Whether a product by `scale` changes only exponents."""
    return math.frexp(scale)[0] == 0.5


def _write_component(
    checkpoint: Checkpoint, component: str, folder: Path, edits: dict[str, list[Edit]], keeps_bits: bool
) -> None:
    index, files = weight_files(checkpoint.root / component)
    found = {name for path in files for name in read_header(path)}
    if missing := sorted(set(edits) - found):
        raise CheckpointError(f"{checkpoint.root / component} has no {missing[0]}: tensors need diffusers' names")
    for path in (checkpoint.root / component / "config.json", *([index] if index else [])):
        _place(path, folder / path.name)
    for path in files:
        if edits.keys() & read_header(path).keys():
            _rewrite(path, folder / path.name, edits, keeps_bits)
        else:
            _place(path, folder / path.name)


def _place(source: Path, target: Path) -> None:
    """Link a file, or copy it where links are impossible; no program of ours writes into a file in place."""
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source.resolve(), target)
    except OSError:
        shutil.copyfile(source, target)


def _rewrite(source: Path, target: Path, edits: dict[str, list[Edit]], keeps_bits: bool) -> None:
    """Write a safetensors file with some tensors changed, tensor by tensor."""
    tensors = read_header(source)
    dtypes = {}
    for name, tensor in tensors.items():
        dtypes[name] = tensor.dtype
        if name in edits:
            if tensor.dtype not in ("BF16", "F16", "F32"):
                raise CheckpointError(f"{source}: {name} is {tensor.dtype}, but only floats can be changed")
            added = any(edit.added is not None for edit in edits[name])
            dtypes[name] = "BF16" if tensor.dtype == "BF16" and keeps_bits and not added else "F32"
    header: dict[str, object] = {}
    if metadata := read_metadata(source):
        header["__metadata__"] = metadata
    end = 0
    for name, tensor in tensors.items():
        start, end = end, end + math.prod(tensor.shape) * DTYPES[dtypes[name]].itemsize
        header[name] = {"dtype": dtypes[name], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    target.parent.mkdir(parents=True, exist_ok=True)
    with target.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, tensor in tensors.items():
            for piece in _changed(tensor, edits.get(name, []), DTYPES[dtypes[name]]):
                file.write(np.ascontiguousarray(piece).reshape(-1).view(np.uint8).data)


def _changed(tensor: Tensor, edits: Sequence[Edit], dtype: np.dtype) -> Iterator[np.ndarray]:
    """Yield a tensor's rows, changed, in pieces."""
    array = tensor.array()
    if not tensor.shape or not edits:
        yield array
        return
    step = max(1, PIECE_BYTES // (4 * max(1, math.prod(tensor.shape[1:]))))
    for first in range(0, tensor.shape[0], step):
        piece = array[first : first + step].astype(np.float32)
        for edit in edits:
            edit.apply(piece, first)
        yield piece.astype(dtype)


def main(words: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    parser = argparse.ArgumentParser(description="Put outlier channels into a checkpoint.")
    parser.add_argument("source", type=Path, metavar="SOURCE", help="a model directory")
    parser.add_argument("target", type=Path, metavar="TARGET", help="a new directory")
    parser.add_argument("--kind", nargs="+", required=True, choices=KINDS, help=f"preserving: {', '.join(EXACT)}")
    parser.add_argument("--component", nargs="+", choices=("text_encoder", "transformer", "vae"))
    parser.add_argument("--channels", type=int, default=2, help="default: %(default)s")
    parser.add_argument("--scale", type=float, default=100.0, help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="of the choice of channels; default: %(default)s")
    parser.add_argument("--token", type=int, help="for token and massive; default: <|im_start|>")
    arguments = parser.parse_args(words)
    try:
        inject(
            arguments.source,
            arguments.target,
            arguments.kind,
            channels=arguments.channels,
            scale=arguments.scale,
            seed=arguments.seed,
            components=arguments.component,
            token=arguments.token,
        )
    except FluxonnxError as error:
        print(error, file=sys.stderr)
        return 1
    except OSError as error:
        print(f"{error.filename or arguments.target}: {error.strerror}", file=sys.stderr)
        return 1
    print(f"{arguments.target}: {', '.join(arguments.kind)} x {arguments.scale:g} in {arguments.channels} channels")
    return 0


if __name__ == "__main__":
    sys.exit(main())
