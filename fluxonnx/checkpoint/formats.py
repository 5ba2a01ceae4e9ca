"""Quantised transformers as ComfyUI's tools write them (`int8_tensorwise`).

A quantised layer is three tensors (`_load_quantized_module` of comfy/ops.py in Comfy-Org/ComfyUI;
comfy_kitchen/tensor/int8.py and backends/eager/quantization.py in Comfy-Org/comfy-kitchen):

    LAYER.weight        I8 [out, in]
    LAYER.weight_scale  F32, one number or one per output as [out] or [out, 1]; weight = integer * scale
    LAYER.comfy_quant   U8, JSON: {"format": "int8_tensorwise"} and, for rotated weights, "convrot": true and
                        "convrot_groupsize" (256 by default); both may be inside an object "params"

Older files store the JSON of all layers in the header's metadata, as "layers" of "_quantization_metadata"
(`convert_old_quants` of comfy/utils.py). Rotated weights were multiplied by a Hadamard matrix, one group of inputs at a
time; the inputs of the layer must be rotated, too. Activations are rounded to 8 bits row by row.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from fluxonnx.checkpoint.names import PREFIXES, renamed
from fluxonnx.checkpoint.safetensors import Quantisation, Tensor
from fluxonnx.errors import CheckpointError

FORMAT = "int8_tensorwise"
GROUP = 256


def resolve(tensors: dict[str, Tensor], metadata: Iterable[dict[str, Any]] = ()) -> dict[str, Tensor]:
    """Return a transformer's tensors by diffusers' names; quantised tensors carry their scales.

    Args:
        tensors: The tensors that the headers of its files list.
        metadata: The metadata of these headers.

    Raises:
        CheckpointError: A layer has an unknown quantisation format, or one of its tensors is missing or malformed.
    """
    prefix = next((prefix for prefix in PREFIXES if any(name.startswith(prefix) for name in tensors)), "")
    tensors = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    formats = {layer.removeprefix(prefix): value for item in metadata for layer, value in _formats_in(item).items()}
    formats |= {
        name.removesuffix(".comfy_quant"): _parsed(tensor, tensor.array().tobytes())
        for name, tensor in tensors.items()
        if name.endswith(".comfy_quant")
    }
    resolved: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        layer, _, parameter = name.rpartition(".")
        if parameter == "comfy_quant" or (parameter == "weight_scale" and f"{layer}.weight" in tensors):
            continue
        if parameter == "weight" and (layer in formats or tensor.dtype == "I8"):
            # The first such files had no marker; rotation came later, so weights without a marker are not rotated.
            settings = formats.get(layer, {"format": FORMAT})
            tensor = replace(tensor, quantisation=_quantisation(tensor, settings, tensors.get(f"{layer}.weight_scale")))
        resolved.update((part.name, part) for part in renamed(name, tensor))
    return resolved


def _formats_in(metadata: dict[str, Any]) -> dict[str, Any]:
    try:
        layers = json.loads(metadata["_quantization_metadata"])["layers"]
        return {layer: {"format": value} if isinstance(value, str) else value for layer, value in layers.items()}
    except (KeyError, TypeError, ValueError, AttributeError):
        return {}


def _parsed(tensor: Tensor, text: bytes) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        raise CheckpointError(f"{tensor.file}: {tensor.name} is not JSON: download it again") from None


def _quantisation(tensor: Tensor, settings: Any, scale: Tensor | None) -> Quantisation:
    where = f"{tensor.file}: {tensor.name}"
    found = settings.get("format") if isinstance(settings, dict) else None
    if found != FORMAT:
        kind = f"as {found}" if found else "in an unknown format"
        raise CheckpointError(
            f"{where} is quantised {kind}, but fluxonnx reads only {FORMAT}: use such a file, or an unquantised one"
        )
    if tensor.dtype != "I8" or len(tensor.shape) != 2:
        raise CheckpointError(f"{where} is {tensor.dtype} {list(tensor.shape)}, but {FORMAT} is I8 [out, in]")
    n_out, n_in = tensor.shape
    if scale is None:
        raise CheckpointError(f"{where} is I8, but has no scale ({tensor.name}_scale): download it again")
    if scale.dtype not in ("F32", "F16", "BF16") or scale.shape not in ((), (1,), (1, 1), (n_out,), (n_out, 1)):
        raise CheckpointError(
            f"{scale.file}: {scale.name} is {scale.dtype} {list(scale.shape)}, expected F32 [] or [{n_out}, 1]"
        )
    nested = settings.get("params") if isinstance(settings.get("params"), dict) else {}
    if not settings.get("convrot", nested.get("convrot", False)):
        return Quantisation(scale)
    group = settings.get("convrot_groupsize", nested.get("convrot_groupsize", GROUP))
    if not isinstance(group, int) or group < 4 or 4 ** round(math.log(group, 4)) != group or n_in % group:
        raise CheckpointError(
            f"{where} [{n_out}, {n_in}] is rotated in groups of {group}, which is no power of four that divides {n_in}"
        )
    return Quantisation(scale, group)
