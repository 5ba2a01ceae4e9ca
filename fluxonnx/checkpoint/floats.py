"""Weights of 8- and 4-bit floats with scales, as ComfyUI's tools, Qwen and ModelOpt write them.

    LAYER.weight          F8_E4M3 or F8_E5M2 [out, in]: alone, or with one of
    LAYER.weight_scale    one number, or one per output: weight = float * scale ("scale_weight" in older files)
    LAYER.weight_scale_inv  [out / 128, in / 128]: a number per block, which multiplies in spite of its name
                          (Fp8Dequantize, transformers/integrations/finegrained_fp8.py)
    LAYER.weight_scale    F8_E8M0 or U8 [out, in / 32], tiled: mxfp8, weight = float * 2 ** (scale - 127)

    LAYER.weight          U8 [out, in / 2], two E2M1 floats a byte, the first in the high half: nvfp4, with
    LAYER.weight_scale    F8_E4M3 or U8 [out, in / 16], tiled
    LAYER.weight_scale_2  one number; weight = float * (scale_2 * scale)

Sources: `_load_quantized_module` of comfy/ops.py in Comfy-Org/ComfyUI; dequantize_per_tensor_fp8, dequantize_nvfp4,
dequantize_mxfp8 in comfy_kitchen/backends/eager/quantization.py and from_blocked, e8m0_to_f32 in
comfy_kitchen/float_utils.py. Values are computed in float32 as there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import numpy as np

from fluxonnx.checkpoint.encoded import Encoded, Float8, encoded, raw_bytes
from fluxonnx.checkpoint.safetensors import DTYPES, Tensor
from fluxonnx.errors import CheckpointError

FLOAT8 = ("F8_E4M3", "F8_E5M2")
SCALES = ("weight_scale", "scale_weight")
BLOCK_SCALE = "weight_scale_inv"
SECOND_SCALE = "weight_scale_2"
PARAMETERS = (*SCALES, BLOCK_SCALE, SECOND_SCALE)

# Sizes of blocks: Qwen's on both sides, the others along a row.
QWEN_BLOCK, MX_BLOCK, NV_BLOCK = 128, 32, 16
# Tiles of 128 rows and 4 columns in which scales are stored.
TILE_ROWS, TILE_COLUMNS = 128, 4

# Every value of a byte as a float, and of half a byte as E2M1.
_FLOATS = {name: np.arange(256, dtype=np.uint8).view(DTYPES[name]).astype(np.float32) for name in FLOAT8}
_E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
_E2M1 = np.concatenate([_E2M1, -_E2M1])
# E8M0: 8 bits of exponent. 0 counts as zero, as in e8m0_to_f32.
_E8M0 = (np.arange(256, dtype=np.uint32) << 23).view(np.float32)


def is_float8(tensor: Tensor) -> bool:
    """Whether a tensor's values are 8-bit floats."""
    return tensor.dtype in FLOAT8


def is_nvfp4(tensors: Mapping[str, Tensor], layer: str) -> bool:
    """Whether a layer's weight is packed 4-bit floats."""
    weight = tensors.get(f"{layer}.weight")
    return weight is not None and weight.dtype == "U8" and f"{layer}.{SECOND_SCALE}" in tensors


def unscaled(tensor: Tensor) -> Encoded:
    """Return a tensor of 8-bit floats without a scale."""
    table = _FLOATS[tensor.dtype]
    return encoded(tensor, "fp8", lambda raw, first: table[raw], float8=Float8(tensor.dtype))


def decoded(tensors: Mapping[str, Tensor], layer: str, settings: Mapping[str, object] | None) -> Encoded:
    """Return a layer's weight of 8- or 4-bit floats, with its scales.

    Args:
        tensors: The tensors of the file by name.
        layer: The layer's name.
        settings: What the file says about the layer; None for nothing.

    Raises:
        CheckpointError: A scale is missing, of another shape or dtype, or there are several.
    """
    weight = tensors[f"{layer}.weight"]
    stated = (settings or {}).get("format")
    if is_nvfp4(tensors, layer) or stated == "nvfp4":
        return _nvfp4(tensors, layer, weight)
    if not is_float8(weight):
        raise CheckpointError(f"{weight.file}: {weight.name} is {weight.dtype}, but is said to be {stated}")
    found = [tensors[f"{layer}.{name}"] for name in (*SCALES, BLOCK_SCALE) if f"{layer}.{name}" in tensors]
    if len(found) > 1:
        names = " and ".join(scale.name for scale in found)
        raise CheckpointError(f"{weight.file}: {weight.name} has two scales, {names}: download it again")
    if not found:
        if stated == "mxfp8":
            raise CheckpointError(f"{weight.file}: {weight.name} is mxfp8, but has no scales: download it again")
        return unscaled(weight)
    (scale,) = found
    if stated == "mxfp8" or scale.dtype in ("F8_E8M0", "U8"):
        return _mxfp8(weight, scale)
    if scale.dtype not in ("F32", "F16", "BF16"):
        raise CheckpointError(f"{scale.file}: {scale.name} is {scale.dtype}, expected F32, F16 or BF16")
    return _scaled(weight, scale)


def _scaled(weight: Tensor, scale: Tensor) -> Encoded:
    """Return 8-bit floats with a scale for all of them, for each row, or for each block of 128 x 128."""
    table, n_out = _FLOATS[weight.dtype], weight.shape[0] if weight.shape else 1
    if math.prod(scale.shape) == 1 or scale.shape in ((n_out,), (n_out, 1)):

        def by_rows(raw: np.ndarray, first: int) -> np.ndarray:
            scales = scale.array().astype(np.float32).reshape(-1)
            return table[raw] * (scales if len(scales) == 1 else scales[first : first + len(raw), None])

        return encoded(weight, "fp8", by_rows, scales=(scale,), float8=Float8(weight.dtype, scale))
    grid = tuple(-(-size // QWEN_BLOCK) for size in weight.shape)
    if len(weight.shape) != 2 or scale.shape != grid:
        raise CheckpointError(
            f"{scale.file}: {scale.name} is {list(scale.shape)}, expected [], [{n_out}, 1] or {list(grid)} for "
            f"{weight.name} {list(weight.shape)}: download it again"
        )

    def by_blocks(raw: np.ndarray, first: int) -> np.ndarray:
        rows = np.arange(first, first + len(raw)) // QWEN_BLOCK
        columns = np.arange(raw.shape[1]) // QWEN_BLOCK
        return table[raw] * scale.array().astype(np.float32)[rows][:, columns]

    return encoded(weight, "fp8 in blocks", by_blocks, scales=(scale,))


def _mxfp8(weight: Tensor, scale: Tensor) -> Encoded:
    table = _FLOATS[weight.dtype]
    tiled = _tiled(weight, weight.shape, scale, MX_BLOCK)

    def decode(raw: np.ndarray, first: int) -> np.ndarray:
        scales = _E8M0[tiled(first, len(raw))]
        return (table[raw].reshape(*scales.shape, MX_BLOCK) * scales[..., None]).reshape(raw.shape)

    return encoded(weight, "mxfp8", decode)


def _nvfp4(tensors: Mapping[str, Tensor], layer: str, weight: Tensor) -> Encoded:
    where = f"{weight.file}: {weight.name}"
    if weight.dtype != "U8" or len(weight.shape) != 2:
        raise CheckpointError(f"{where} is {weight.dtype} {list(weight.shape)}, but nvfp4 is U8 [out, in / 2]")
    names = [f"{layer}.{name}" for name in (SCALES[0], SECOND_SCALE)]
    if missing := [name for name in names if name not in tensors]:
        raise CheckpointError(f"{where} is nvfp4, but has no {missing[0]}: download it again")
    scale, second = (tensors[name] for name in names)
    if math.prod(second.shape) != 1 or second.dtype != "F32":
        raise CheckpointError(f"{where}: {second.name} is {second.dtype} {list(second.shape)}, expected F32 []")
    shape = (weight.shape[0], 2 * weight.shape[1])
    tiled = _tiled(weight, shape, scale, NV_BLOCK)

    def decode(raw: np.ndarray, first: int) -> np.ndarray:
        values = _E2M1[np.stack([raw >> 4, raw & 15], -1)].reshape(len(raw), -1, NV_BLOCK)
        scales = second.array().astype(np.float32).reshape(()) * _FLOATS["F8_E4M3"][tiled(first, len(raw))]
        return (values * scales[..., None]).reshape(len(raw), -1)

    return encoded(weight, "nvfp4", decode, shape, (second,))


def _tiled(weight: Tensor, shape: tuple[int, ...], scale: Tensor, block: int) -> Callable[[int, int], np.ndarray]:
    """Return a function of a first row and a count, which returns the bytes of these rows' scales.

    Tiles of 128 x 4 scales lie one after the other; within one, rows i, i + 32, i + 64 and i + 96 are side by side
    (from_blocked).
    """
    if len(shape) != 2 or shape[1] % block:
        raise CheckpointError(f"{weight.file}: rows of {weight.name} {list(shape)} are no whole blocks of {block}")
    n_out, columns = shape[0], shape[1] // block
    tiles = (-(-n_out // TILE_ROWS), -(-columns // TILE_COLUMNS))
    if scale.nbytes != tiles[0] * tiles[1] * TILE_ROWS * TILE_COLUMNS:
        raise CheckpointError(
            f"{scale.file}: {scale.name} has {scale.nbytes} scales, expected "
            f"{tiles[0] * tiles[1] * TILE_ROWS * TILE_COLUMNS} for {weight.name} {list(shape)}: download it again"
        )

    def rows(first: int, count: int) -> np.ndarray:
        # [tile row, tile column, row % 32, row // 32 % 4, column]
        stored = raw_bytes(scale).reshape(*tiles, 32, TILE_ROWS // 32, TILE_COLUMNS)
        row, column = np.arange(first, first + count)[:, None], np.arange(columns)[None]
        return stored[row // TILE_ROWS, column // TILE_COLUMNS, row % 32, row % TILE_ROWS // 32, column % TILE_COLUMNS]

    return rows
