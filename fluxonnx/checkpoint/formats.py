"""Quantised weights as ComfyUI's tools write them (`int8_tensorwise`), of any part of a model.

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

Embeddings and the kernels of convolutions may be such integers, too, though not rotated.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

from fluxonnx.checkpoint import names, part_names
from fluxonnx.checkpoint.encoded import Encoded, refuse_infinite
from fluxonnx.checkpoint.floats import PARAMETERS, SCALES, decoded, is_float8, is_nvfp4, unscaled
from fluxonnx.checkpoint.foreign import READABLE, refuse_foreign
from fluxonnx.checkpoint.reading import parse_json, shown
from fluxonnx.checkpoint.safetensors import Quantisation, Tensor
from fluxonnx.errors import CheckpointError

FORMAT = "int8_tensorwise"
FLOAT_FORMATS = ("float8_e4m3fn", "float8_e5m2", "mxfp8", "nvfp4")
GROUP = 256
MAX_SETTINGS_BYTES = 1 << 16

# Scales of activations: products are computed in float32, or round activations by their own largest value.
INPUT_SCALES = ("input_scale", "scale_input")
# Say how a layer or all of a file is stored. Tools also write "scaled_fp8" into files that have no such weights.
MARKERS = ("comfy_quant", "scaled_fp8")

# How each part's tensors get their names: without what other parts of the file are called, then one by one.
Bare = Callable[[dict[str, Tensor]], dict[str, Tensor]]
Renamed = Callable[[str, Tensor, Mapping[str, Tensor]], Iterator[Tensor]]
NAMING: dict[str, tuple[Bare, Renamed]] = {
    "transformer": (names.bare, names.renamed),
    "text_encoder": (part_names.bare_encoder, part_names.renamed_encoder),
    "vae": (part_names.bare_vae, part_names.renamed_vae),
}


def resolve(
    tensors: dict[str, Tensor], metadata: Iterable[dict[str, Any]] = (), component: str = "transformer"
) -> dict[str, Tensor]:
    """Return the tensors of a part by diffusers' names; quantised tensors carry their scales.

    Args:
        tensors: The tensors that the headers of its files list.
        metadata: The metadata of these headers.
        component: Which part: "transformer", "text_encoder" or "vae".

    Raises:
        CheckpointError: A layer has an unknown quantisation format, or one of its tensors is missing or malformed.
    """
    bare, renamed = NAMING[component]
    tensors = bare(tensors)
    refuse_foreign(tensors, component)
    formats = _formats(tensors, metadata)
    resolved: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        layer, _, parameter = name.rpartition(".")
        if parameter in MARKERS:
            continue
        if parameter in (*PARAMETERS, *INPUT_SCALES) and f"{layer}.weight" in tensors:
            _refuse_needless(tensors[f"{layer}.weight"], layer, tensor, formats)
            continue
        if parameter == "weight":
            tensor = _weight(tensors, layer, tensor, formats.get(layer))
        elif is_float8(tensor):
            tensor = unscaled(tensor)
        for part in renamed(name, tensor, tensors):
            if part.name in resolved:
                raise CheckpointError(f"{tensor.file} holds {part.name} twice, by two names: download it again")
            resolved[part.name] = part
    return resolved


def _refuse_needless(weight: Tensor, layer: str, scale: Tensor, formats: Mapping[str, Any]) -> None:
    """Refuse a scale beside a weight that has none: whether it is meant to be multiplied can't be told."""
    if weight.dtype not in ("I8", "U8") and not is_float8(weight) and layer not in formats:
        raise CheckpointError(
            f"{scale.file}: {weight.name} is {weight.dtype}, but has a scale ({scale.name}): {READABLE}"
        )


def _weight(tensors: Mapping[str, Tensor], layer: str, tensor: Tensor, settings: dict[str, Any] | None) -> Tensor:
    """Return a layer's weight with its scales, if it has any."""
    if isinstance(tensor, Encoded):  # blocks of a GGUF file
        return tensor
    stated = (settings or {}).get("format")
    if is_float8(tensor) or is_nvfp4(tensors, layer) or stated in FLOAT_FORMATS:
        if stated is not None and stated not in FLOAT_FORMATS:
            raise _unknown(tensor, stated)
        return decoded(tensors, layer, settings)
    if settings is None and tensor.dtype != "I8":
        return tensor
    scales = [tensors[f"{layer}.{name}"] for name in SCALES if f"{layer}.{name}" in tensors]
    return replace(tensor, quantisation=_quantisation(tensor, settings, scales))


def native_precision(tensors: Mapping[str, Tensor]) -> str | None:
    """Return the precision in which most of a transformer's weights stay the integers that they are, None for floats.

    Args:
        tensors: What `resolve` returned.
    """
    if any(tensor.quantisation for tensor in tensors.values()):
        return "int8"
    bits: dict[int | None, int] = {}
    for tensor in tensors.values():
        kept = tensor.blocks.bits if isinstance(tensor, Encoded) and tensor.blocks else None
        bits[kept] = bits.get(kept, 0) + tensor.nbytes
    most = max(bits, key=lambda key: bits[key], default=None)
    return None if most is None else f"int{most}"


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
    if isinstance(tensor, Encoded):
        for scale in tensor.scales:
            refuse_infinite(scale, 1)
    elif tensor.quantisation is not None:
        refuse_infinite(tensor.quantisation.scale, -128)


def _formats(tensors: Mapping[str, Tensor], metadata: Iterable[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return the settings of quantised layers by their names, from the headers and from the layers' own markers.

    Raises:
        CheckpointError: They can't be read, contradict each other, or leave integers out.
    """
    # headers name layers with or without the prefix of the tensors
    layers = {tensor.name.rpartition(".")[0]: name.rpartition(".")[0] for name, tensor in tensors.items()}
    listed: dict[str, dict[str, Any]] = {}
    for item in metadata:
        listed |= {layers.get(name, _bare(name)): value for name, value in _formats_in(item, tensors).items()}
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
    """Return a layer's name without the prefixes of transformers."""
    return next((layer.removeprefix(prefix) for prefix in names.PREFIXES if layer.startswith(prefix)), layer)


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
        raise _unknown(tensor, found)
    if tensor.dtype != "I8" or len(tensor.shape) not in (2, 4):
        raise CheckpointError(f"{where} is {tensor.dtype} {list(tensor.shape)}, but {FORMAT} is I8 [out, in]")
    if settings.get("symmetric") is False:
        raise CheckpointError(
            f"{where} is quantised around another number than 0, which fluxonnx can't read: {READABLE}"
        )
    n_out, n_in = tensor.shape[:2]
    if not scales:
        raise CheckpointError(f"{where} is I8, but has no scale ({tensor.name}_scale): download it again")
    if len(scales) > 1:
        names = " and ".join(scale.name for scale in scales)
        raise CheckpointError(f"{where} has two scales, {names}: download it again")
    (scale,) = scales
    if scale.dtype not in ("F32", "F16", "BF16") or scale.shape not in _shapes_of_scale(tensor):
        raise CheckpointError(
            f"{scale.file}: {scale.name} is {scale.dtype} {list(scale.shape)}, expected F32 [] or [{n_out}, 1]"
        )
    group = _rotation(settings)
    if group == 0:
        return Quantisation(scale, marked=marked)
    if len(tensor.shape) != 2:
        raise CheckpointError(f"{where} {list(tensor.shape)} is rotated, but it is no matrix: {READABLE}")
    if not isinstance(group, int) or group < 4 or 4 ** round(math.log(group, 4)) != group or n_in % group:
        raise CheckpointError(
            f"{where} [{n_out}, {n_in}] is rotated in groups of {shown(group)}, which is no power of four that "
            f"divides {n_in}"
        )
    return Quantisation(scale, group, marked)


def _shapes_of_scale(tensor: Tensor) -> tuple[tuple[int, ...], ...]:
    """Return the shapes of one scale for all of a tensor, and of one for each of its rows."""
    n_out, dimensions = tensor.shape[0], len(tensor.shape)
    return (), (1,), (1,) * dimensions, (n_out,), (n_out, *(1,) * (dimensions - 1))


def _unknown(tensor: Tensor, stated: Any) -> CheckpointError:
    kind = f"as {stated if isinstance(stated, str) else shown(stated)}"
    return CheckpointError(
        f"{tensor.file}: {tensor.name} is quantised {kind[:100]}, but fluxonnx reads only "
        f"{', '.join((FORMAT, *FLOAT_FORMATS))}: use such a file or an unquantised one"
    )
