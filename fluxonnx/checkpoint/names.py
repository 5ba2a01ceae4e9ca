"""Black Forest Labs' names of the transformer's tensors, translated to those of diffusers.

Source: convert_flux2_transformer_checkpoint_to_diffusers, single_file_utils.py of diffusers.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace

from fluxonnx.checkpoint.encoded import Encoded
from fluxonnx.checkpoint.safetensors import Tensor
from fluxonnx.errors import CheckpointError

# Prefixes of the transformer's tensors in a file that holds several models; tensors without it belong to others.
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
# The original stores (shift, scale) here, diffusers (scale, shift).
SWAPPED = "final_layer.adaLN_modulation.1"
# Block lists of the original: diffusers' name, and the modules of a block; a fused module is several of diffusers'.
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


def bare(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the transformer's tensors of a file that may hold several models, without their prefix."""
    prefix = next((prefix for prefix in PREFIXES if any(name.startswith(prefix) for name in tensors)), "")
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def renamed(name: str, tensor: Tensor, others: Mapping[str, Tensor]) -> Iterator[Tensor]:
    """Yield the tensors that a tensor of the original is in diffusers; tensors with diffusers' names are kept."""
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
    _part(tensor, 0, 2)  # raises if there are no halves
    quantisation = tensor.quantisation
    if quantisation and math.prod(quantisation.scale.shape) > 1:
        quantisation = replace(quantisation, scale=replace(quantisation.scale, swapped=True))
    if isinstance(tensor, Encoded):
        return replace(tensor, swapped=True, float8=tensor.float8.swapped() if tensor.float8 else None)
    return replace(tensor, swapped=True, quantisation=quantisation)


def _part(tensor: Tensor, i: int, count: int) -> Tensor:
    """Return block `i` of `count` equal blocks of rows, with the scales of these rows."""
    if count == 1:
        return tensor
    if not tensor.shape or tensor.shape[0] % count:
        raise CheckpointError(f"{tensor.file}: {tensor.name} {list(tensor.shape)} does not divide into {count} parts")
    return tensor.split([tensor.shape[0] // count] * count)[i]
