"""Transformers in one safetensors file, as ComfyUI loads them: Black Forest Labs' names, and int8_tensorwise weights.

A layer that ComfyUI's tools have quantised is three tensors (`_load_quantized_module` of comfy/ops.py in
Comfy-Org/ComfyUI; comfy_kitchen/tensor/int8.py and backends/eager/quantization.py in Comfy-Org/comfy-kitchen):

    LAYER.weight        I8 [out, in]
    LAYER.weight_scale  F32: one number, or one per output as [out] or [out, 1]; a weight is its integer times this
    LAYER.comfy_quant   U8: JSON, {"format": "int8_tensorwise"} and, if rotated, "convrot": true and
                        "convrot_groupsize", 256 by default (both may be in an object "params" instead)

Older files have the JSON of all layers in the header's metadata, as "layers" of "_quantization_metadata"
(`convert_old_quants` of comfy/utils.py). Rotated weights were multiplied by `quantise.hadamard`, so many inputs at a
time; the layer's inputs have to be, too. They are rounded to 8 bits row by row, as ours are.

The mapping of names is that of convert_flux2_transformer_checkpoint_to_diffusers, single_file_utils.py of diffusers.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

from fluxonnx.checkpoint import Checkpoint, Quantisation, Tensor, read_metadata
from fluxonnx.errors import CheckpointError

FORMAT = "int8_tensorwise"
GROUP = 256

# What a checkpoint of several models puts before the transformer's names; the rest of it is not the transformer.
PREFIXES = ("model.diffusion_model.", "diffusion_model.")

MODULES = {
    "img_in": "x_embedder",
    "txt_in": "context_embedder",
    "time_in.in_layer": "time_guidance_embed.timestep_embedder.linear_1",
    "time_in.out_layer": "time_guidance_embed.timestep_embedder.linear_2",
    "double_stream_modulation_img.lin": "double_stream_modulation_img.linear",
    "double_stream_modulation_txt.lin": "double_stream_modulation_txt.linear",
    "single_stream_modulation.lin": "single_stream_modulation.linear",
    "final_layer.adaLN_modulation.1": "norm_out.linear",
    "final_layer.linear": "proj_out",
}
# Where the original has shift and scale, diffusers has scale and shift.
SWAPPED = "final_layer.adaLN_modulation.1"
# Of the original's list of blocks: the name of ours, and the modules in a block; a fused one is several of ours.
BLOCKS: dict[str, tuple[str, dict[str, tuple[str, ...]]]] = {
    "double_blocks": (
        "transformer_blocks",
        {
            "img_attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
            "img_attn.norm.query_norm": ("attn.norm_q",),
            "img_attn.norm.key_norm": ("attn.norm_k",),
            "img_attn.proj": ("attn.to_out.0",),
            "img_mlp.0": ("ff.linear_in",),
            "img_mlp.2": ("ff.linear_out",),
            "txt_attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
            "txt_attn.norm.query_norm": ("attn.norm_added_q",),
            "txt_attn.norm.key_norm": ("attn.norm_added_k",),
            "txt_attn.proj": ("attn.to_add_out",),
            "txt_mlp.0": ("ff_context.linear_in",),
            "txt_mlp.2": ("ff_context.linear_out",),
        },
    ),
    "single_blocks": (
        "single_transformer_blocks",
        {
            "linear1": ("attn.to_qkv_mlp_proj",),
            "linear2": ("attn.to_out",),
            "norm.query_norm": ("attn.norm_q",),
            "norm.key_norm": ("attn.norm_k",),
        },
    ),
}


def transformer_tensors(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """Read the tensor table of a checkpoint's transformer; raises as `resolve` does."""
    tensors = checkpoint.tensors("transformer")
    files = sorted({tensor.file for tensor in tensors.values()})
    return resolve(tensors, [read_metadata(file) for file in files])


def resolve(tensors: dict[str, Tensor], metadata: Iterable[dict[str, Any]] = ()) -> dict[str, Tensor]:
    """Return a transformer's tensors by diffusers' names, quantised ones with their scales; others as they are.

    Args:
        tensors: What the headers of its file or files list.
        metadata: What else is in the headers.

    Raises:
        CheckpointError: A layer is quantised in another format, or what belongs to it is missing or malformed.
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
            # without a marker, as the first such files were, it can't be rotated
            settings = formats.get(layer, {"format": FORMAT})
            tensor = replace(tensor, quantisation=_quantisation(tensor, settings, tensors.get(f"{layer}.weight_scale")))
        resolved.update((part.name, part) for part in _renamed(name, tensor))
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


def _renamed(name: str, tensor: Tensor) -> Iterator[Tensor]:
    """Yield what a tensor of the original is for diffusers; one with diffusers' name is itself."""
    layer, _, parameter = name.rpartition(".")
    kind, *rest = layer.split(".", 2)
    if layer in MODULES:
        tensor = replace(tensor, name=f"{MODULES[layer]}.{parameter}")
        yield _with_halves_swapped(tensor) if layer == SWAPPED else tensor
    elif kind in BLOCKS and len(rest) == 2 and rest[1] in BLOCKS[kind][1]:
        blocks, modules = BLOCKS[kind]
        parameter = "weight" if parameter == "scale" else parameter  # of a norm
        parts = modules[rest[1]]
        for i, module in enumerate(parts):
            name = f"{blocks}.{rest[0]}.{module}.{parameter}"
            yield replace(_part(tensor, i, len(parts)), name=name, whole=None, first_row=0)
    else:
        yield replace(tensor, name=name)


def _with_halves_swapped(tensor: Tensor) -> Tensor:
    quantisation = tensor.quantisation
    if quantisation and math.prod(quantisation.scale.shape) > 1:
        quantisation = replace(quantisation, scale=replace(quantisation.scale, swapped=True))
    return replace(tensor, swapped=True, quantisation=quantisation)


def _part(tensor: Tensor, i: int, count: int) -> Tensor:
    """Return one of `count` equal runs of a tensor's rows, with the scales of these rows."""
    if count == 1:
        return tensor
    if not tensor.shape or tensor.shape[0] % count:
        raise CheckpointError(f"{tensor.file}: {tensor.name} {list(tensor.shape)} does not divide into {count} parts")
    return tensor.split([tensor.shape[0] // count] * count)[i]
