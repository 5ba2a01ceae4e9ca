"""Quantised transformers as ComfyUI's tools write them (`int8_tensorwise`).

A quantised layer is three tensors (`_load_quantized_module` of comfy/ops.py in Comfy-Org/ComfyUI;
comfy_kitchen/tensor/int8.py and backends/eager/quantization.py in Comfy-Org/comfy-kitchen):

    LAYER.weight        I8 [out, in]
    LAYER.weight_scale  F32, one number or one per output as [out] or [out, 1]; weight = integer * scale
    LAYER.comfy_quant   U8, JSON: {"format": "int8_tensorwise"} and, for rotated weights, "convrot": true and
                        "convrot_groupsize" (256 by default); both may be inside an object "params"

Older files store the JSON of all layers in the header's metadata, as "layers" of "_quantization_metadata"
(`convert_old_quants` of comfy/utils.py). The first tools that rotated wrote no "format". The first files of all had no
marker: whether their weights are rotated can't be told, and they are taken for unrotated (`unmarked`). Rotated weights
were multiplied by a Hadamard matrix, one group of inputs at a time; the inputs of the layer must be rotated, too.
Activations are rounded to 8 bits row by row, by their own largest value: an `input_scale` is not used
("quantize_input": False of "int8_tensorwise", comfy/quant_ops.py).
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from fluxonnx.checkpoint.names import PREFIXES, renamed
from fluxonnx.checkpoint.reading import parse_json, shown
from fluxonnx.checkpoint.safetensors import Quantisation, Tensor
from fluxonnx.errors import CheckpointError

FORMAT = "int8_tensorwise"
GROUP = 256
MAX_SETTINGS_BYTES = 1 << 16

# Older files call the scale so (`scale_weight` in convert_old_quants of comfy/utils.py).
SCALES = ("weight_scale", "scale_weight")
# Scales of activations; for integers nobody reads them (`parameters` of "int8_tensorwise", comfy/quant_ops.py).
INPUT_SCALES = ("input_scale", "scale_input")
# Further parameters of quantised layers: of activations (fp8), of blocks (nvfp4), of bitsandbytes, GPTQ and AWQ.
FOREIGN_PARAMETERS = (
    *INPUT_SCALES,
    *("weight_scale_2", "weight_scale_inv", "absmax", "quant_map", "nested_absmax", "nested_quant_map", "qweight"),
    *("qzeros", "scales", "g_idx", "SCB", "pre_quant_scale", "weight_zero", "weight_zeros", "weight_s_rel"),
    *("weight_s_channel", "weight_codebook", "weight_correction"),
)
# Says that a file has scaled fp8 weights; tools also write it into files that have none.
FP8_MARKER = "scaled_fp8"
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
        if tensor.dtype.startswith("F8_") and name.endswith(".weight"):
            return name, "to 8-bit floats (fp8)"
        if tensor.dtype == "U8" and name.endswith(".weight"):
            return name, "to 4 bits"
    for name in tensors:
        layer, _, parameter = name.rpartition(".")
        if parameter in FOREIGN_PARAMETERS and not (parameter in INPUT_SCALES and _is_integer(tensors, layer)):
            return name, "in an unknown format"
    return None


def _is_integer(tensors: Mapping[str, Tensor], layer: str) -> bool:
    weight = tensors.get(f"{layer}.weight")
    return weight is not None and weight.dtype == "I8"


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
    formats = _formats(tensors, metadata)
    resolved: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        layer, _, parameter = name.rpartition(".")
        if parameter in ("comfy_quant", FP8_MARKER):
            continue
        if parameter in (*SCALES, *INPUT_SCALES) and f"{layer}.weight" in tensors:
            if not _is_integer(tensors, layer) and layer not in formats:
                weight = tensors[f"{layer}.weight"]
                raise CheckpointError(
                    f"{tensor.file}: {weight.name} is {weight.dtype}, but has a scale ({name}): {READABLE}"
                )
            continue
        if parameter == "weight" and (layer in formats or tensor.dtype == "I8"):
            scales = [tensors[f"{layer}.{name}"] for name in SCALES if f"{layer}.{name}" in tensors]
            tensor = replace(tensor, quantisation=_quantisation(tensor, formats.get(layer), scales))
        for part in renamed(name, tensor):
            if part.name in resolved:
                raise CheckpointError(f"{tensor.file} holds {part.name} twice, by two names: download it again")
            resolved[part.name] = part
    return resolved


def unmarked(tensors: Mapping[str, Tensor]) -> str | None:
    """Return a line about weights of which the file does not say whether they are rotated; None if it says so of all.

    Args:
        tensors: What `resolve` returned.
    """
    found = [t for t in tensors.values() if t.quantisation and not t.quantisation.marked]
    if not found:
        return None
    more = f" and {len(found) - 1} more" if len(found) > 1 else ""
    return (
        f"{found[0].file} does not say how its integers are to be read ({found[0].name}{more} have no comfy_quant): "
        "they are taken for unrotated; if the picture is noise, they are rotated (convrot): use a file that says so"
    )


def check_scales(tensor: Tensor) -> None:
    """Check the scales of a quantised tensor; this reads them.

    Raises:
        CheckpointError: One of them is no finite number, or so large that a weight is none.
    """
    assert tensor.quantisation is not None
    scale = tensor.quantisation.scale
    with np.errstate(over="ignore"):
        largest = scale.array().astype(np.float32) * np.float32(-128)
    if not np.isfinite(largest).all():
        raise CheckpointError(f"{scale.file}: {scale.name} holds infinities or NaNs: download it again")


def _formats(tensors: Mapping[str, Tensor], metadata: Iterable[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return the settings of quantised layers by their names, from the headers and from the layers' own markers.

    Raises:
        CheckpointError: They can't be read, contradict each other, or leave integers out.
    """
    listed: dict[str, dict[str, Any]] = {}
    for item in metadata:
        listed |= {_bare(layer): settings for layer, settings in _formats_in(item, tensors).items()}
    formats = dict(listed)
    for name, tensor in tensors.items():
        layer, _, parameter = name.rpartition(".")
        if parameter != "comfy_quant":
            continue
        formats[layer] = _parsed(tensor)
        if layer in listed and _rotation(listed[layer]) != _rotation(formats[layer]):
            raise CheckpointError(
                f"{tensor.file}: {name} and the header's _quantization_metadata contradict each other: download it "
                "again"
            )
    if listed:
        for name, tensor in tensors.items():
            layer, _, parameter = name.rpartition(".")
            if parameter == "weight" and tensor.dtype == "I8" and layer not in formats:
                raise CheckpointError(
                    f"{tensor.file}: {name} is I8, but the header's _quantization_metadata do not list it: "
                    "download it again"
                )
    return formats


def _bare(layer: str) -> str:
    """Return a layer's name as `resolve` sees it: headers name layers with or without the prefix of the tensors."""
    return next((layer.removeprefix(prefix) for prefix in PREFIXES if layer.startswith(prefix)), layer)


def _formats_in(metadata: dict[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Any]]:
    text = metadata.get("_quantization_metadata")
    if text is None:
        return {}
    try:
        layers = parse_json(text)["layers"]
        return {layer: _settings(value) for layer, value in layers.items()}
    except (KeyError, TypeError, ValueError, AttributeError):
        file = next((tensor.file for tensor in tensors.values()), "the file")
        raise CheckpointError(f"{file}: the header's _quantization_metadata are malformed: download it again") from None


def _settings(value: Any) -> dict[str, Any]:
    """Return the settings of a layer: an object, or just the name of its format.

    Raises:
        TypeError: They are neither.
    """
    if isinstance(value, str):
        return {"format": value}
    if not isinstance(value, dict):
        raise TypeError(value)
    return value


def _parsed(tensor: Tensor) -> dict[str, Any]:
    if tensor.nbytes > MAX_SETTINGS_BYTES:
        raise CheckpointError(f"{tensor.file}: {tensor.name} has {tensor.nbytes} bytes, expected a short JSON text")
    try:
        value = parse_json(tensor.array().tobytes())
        if isinstance(value, str) and value.startswith("{"):  # some tools encode it twice
            value = parse_json(value)
        return _settings(value)
    except ValueError:
        raise CheckpointError(f"{tensor.file}: {tensor.name} is not JSON: download it again") from None
    except TypeError:
        raise CheckpointError(f"{tensor.file}: {tensor.name} is no JSON object: download it again") from None


def _rotation(settings: dict[str, Any]) -> Any:
    """Return the group size of rotated weights as the file has it, 0 for weights that are not rotated."""
    nested = settings.get("params")
    nested = nested if isinstance(nested, dict) else {}
    if not settings.get("convrot", nested.get("convrot", False)):
        return 0
    return settings.get("convrot_groupsize", nested.get("convrot_groupsize", GROUP))


def _quantisation(tensor: Tensor, settings: dict[str, Any] | None, scales: list[Tensor]) -> Quantisation:
    where = f"{tensor.file}: {tensor.name}"
    marked = settings is not None
    settings = settings or {}
    found = settings.get("format")
    # The first markers had no format, when there was only one for integers.
    if found != FORMAT and not (found is None and tensor.dtype == "I8"):
        kind = f"as {found if isinstance(found, str) else shown(found)}"
        raise CheckpointError(
            f"{where} is quantised {kind[:100]}, but fluxonnx reads only {FORMAT}: use such a file or an "
            "unquantised one"
        )
    if tensor.dtype != "I8" or len(tensor.shape) != 2:
        raise CheckpointError(f"{where} is {tensor.dtype} {list(tensor.shape)}, but {FORMAT} is I8 [out, in]")
    if settings.get("symmetric") is False:
        raise CheckpointError(
            f"{where} is quantised around another number than 0, which fluxonnx can't read: {READABLE}"
        )
    n_out, n_in = tensor.shape
    if not scales:
        raise CheckpointError(f"{where} is I8, but has no scale ({tensor.name}_scale): download it again")
    if len(scales) > 1:
        names = " and ".join(scale.name for scale in scales)
        raise CheckpointError(f"{where} has two scales, {names}: download it again")
    (scale,) = scales
    if scale.dtype not in ("F32", "F16", "BF16") or scale.shape not in ((), (1,), (1, 1), (n_out,), (n_out, 1)):
        raise CheckpointError(
            f"{scale.file}: {scale.name} is {scale.dtype} {list(scale.shape)}, expected F32 [] or [{n_out}, 1]"
        )
    group = _rotation(settings)
    if group == 0:
        return Quantisation(scale, marked=marked)
    if not isinstance(group, int) or group < 4 or 4 ** round(math.log(group, 4)) != group or n_in % group:
        raise CheckpointError(
            f"{where} [{n_out}, {n_in}] is rotated in groups of {shown(group)}, which is no power of four that "
            f"divides {n_in}"
        )
    return Quantisation(scale, group, marked)
