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

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from fluxonnx.checkpoint.names import PREFIXES, renamed
from fluxonnx.checkpoint.reading import parse_json, shown
from fluxonnx.checkpoint.safetensors import Quantisation, Tensor
from fluxonnx.errors import CheckpointError

FORMAT = "int8_tensorwise"
GROUP = 256
MAX_SETTINGS_BYTES = 1 << 16

# Older files call the scale so (`scale_weight` in convert_old_quants of comfy/utils.py).
SCALES = ("weight_scale", "scale_weight")
# Further parameters of quantised layers: of activations (fp8), of blocks (nvfp4), of bitsandbytes, GPTQ and AWQ.
FOREIGN_PARAMETERS = (
    *("input_scale", "scale_input", "weight_scale_2", "weight_scale_inv", "absmax", "quant_map", "nested_absmax"),
    *("nested_quant_map", "qweight", "qzeros", "scales", "g_idx", "SCB"),
)
LORA = re.compile(r"(^|[._])(lora_(A|B|up|down|te)|lokr_w|hada_w|oft_blocks|dora_scale|lora_magnitude_vector)")
READABLE = "use an unquantised file (bf16) or one in ComfyUI's int8_tensorwise"


def refuse_foreign(tensors: Mapping[str, Tensor]) -> None:
    """Name the kind of a file that can't be a transformer that fluxonnx reads.

    Raises:
        CheckpointError: The tensors are a LoRA, or are quantised in a way that is not known.
    """
    for name, tensor in tensors.items():
        if LORA.search(name):
            raise CheckpointError(
                f"{tensor.file} is a LoRA, not a whole transformer ({name}): merge it into a transformer first"
            )
    if found := _quantised(tensors):
        name, how = found
        raise CheckpointError(
            f"{tensors[name].file} is quantised {how} ({name}), which fluxonnx can't read: {READABLE}"
        )


def refuse_quantised_encoder(tensors: Mapping[str, Tensor]) -> None:
    """Name a text encoder's quantisation.

    Raises:
        CheckpointError: Its weights are quantised, in whatever way.
    """
    found = _quantised(tensors) or next(
        ((name, "to 8-bit integers") for name, tensor in tensors.items() if tensor.dtype == "I8"), None
    )
    if found:
        name, how = found
        raise CheckpointError(
            f"{tensors[name].file} is a text encoder that is quantised {how} ({name}), but fluxonnx reads only "
            "unquantised ones (bf16): download the original"
        )


def _quantised(tensors: Mapping[str, Tensor]) -> tuple[str, str] | None:
    """Return a tensor that shows a foreign quantisation, and what it is."""
    for name in tensors:
        if name.endswith(".weight_scale_2"):
            return name, "to 4-bit floats (nvfp4)"
    for name, tensor in tensors.items():
        if tensor.dtype.startswith("F8_") and name.endswith((".weight", "scaled_fp8")):
            return name, "to 8-bit floats (fp8)"
        if tensor.dtype == "U8" and name.endswith(".weight"):
            return name, "to 4 bits"
    for name in tensors:
        if name.rpartition(".")[2] in FOREIGN_PARAMETERS:
            return name, "in an unknown format"
    return None


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
    refuse_foreign(tensors)
    formats = {layer.removeprefix(prefix): value for item in metadata for layer, value in _formats_in(item).items()}
    formats |= {
        name.removesuffix(".comfy_quant"): _parsed(tensor)
        for name, tensor in tensors.items()
        if name.endswith(".comfy_quant")
    }
    resolved: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        layer, _, parameter = name.rpartition(".")
        if parameter == "comfy_quant" or (parameter in SCALES and f"{layer}.weight" in tensors):
            continue
        if parameter == "weight" and (layer in formats or tensor.dtype == "I8"):
            # The first such files had no marker; rotation came later, so weights without a marker are not rotated.
            settings = formats.get(layer, {"format": FORMAT})
            scale = next((tensors[f"{layer}.{name}"] for name in SCALES if f"{layer}.{name}" in tensors), None)
            tensor = replace(tensor, quantisation=_quantisation(tensor, settings, scale))
        for part in renamed(name, tensor):
            if part.name in resolved:
                raise CheckpointError(f"{tensor.file} holds {part.name} twice, by two names: download it again")
            resolved[part.name] = part
    return resolved


def _formats_in(metadata: dict[str, Any]) -> dict[str, Any]:
    try:
        layers = parse_json(metadata["_quantization_metadata"])["layers"]
        return {layer: {"format": value} if isinstance(value, str) else value for layer, value in layers.items()}
    except (KeyError, TypeError, ValueError, AttributeError):
        return {}


def _parsed(tensor: Tensor) -> Any:
    if tensor.nbytes > MAX_SETTINGS_BYTES:
        raise CheckpointError(f"{tensor.file}: {tensor.name} has {tensor.nbytes} bytes, expected a short JSON text")
    try:
        return parse_json(tensor.array().tobytes())
    except ValueError:
        raise CheckpointError(f"{tensor.file}: {tensor.name} is not JSON: download it again") from None


def _quantisation(tensor: Tensor, settings: Any, scale: Tensor | None) -> Quantisation:
    where = f"{tensor.file}: {tensor.name}"
    found = settings.get("format") if isinstance(settings, dict) else settings
    # The first markers had no format, when there was only one for integers.
    if found != FORMAT and not (isinstance(settings, dict) and found is None and tensor.dtype == "I8"):
        kind = f"as {found if isinstance(found, str) else shown(found)}"
        raise CheckpointError(
            f"{where} is quantised {kind[:100]}, but fluxonnx reads only {FORMAT}: use such a file or an "
            "unquantised one"
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
            f"{where} [{n_out}, {n_in}] is rotated in groups of {shown(group)}, which is no power of four that "
            f"divides {n_in}"
        )
    return Quantisation(scale, group)
