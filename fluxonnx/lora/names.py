"""Which layer of the model a key of a LoRA file means, by rules instead of tables.

Tools write the path of a layer with dots or underscores, in the words of diffusers or of Black Forest Labs, behind
prefixes of their own. Paths differ in more than their separators, so that all separators are read as underscores.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from fluxonnx.checkpoint.names import BLOCKS, MODULES, SWAPPED
from fluxonnx.contract import Architecture, TextEncoderConfig, TransformerConfig

TRANSFORMER, ENCODER = "transformer", "text_encoder"

# What tools put before the path of a layer, separators as underscores: PEFT, ComfyUI and ai-toolkit, diffusers, kohya,
# OneTrainer, LyCORIS; then those of text encoders.
PREFIXES = re.compile(
    r"(base_model_model|base_model|model_diffusion_model|diffusion_model|transformer|unet|dit"
    r"|lora_unet|lora_transformer|lora|lycoris"
    r"|lora_te\d?|te\d?|text_encoders?|lora_text_encoder|qwen\d?_\w{1,3}|qwen\d?|model)_"
)
# An alias of diffusers' (possible_expanded_block_prefixes, lora_conversion_utils.py).
CLIPPED = "sformer_blocks_"


@dataclass(frozen=True)
class Place:
    """A layer of the model that a key means, and the rows of the key's layer that it is.

    Attributes:
        component: "transformer" or "text_encoder".
        path: The layer's path in the checkpoint.
        rows: Pairs of a first row and the row behind the last one, in the order in which the layer has them.
    """

    component: str
    path: str
    rows: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Target:
    """What a key means: its places, and the shape [out, in] of the layer that the file has to change."""

    places: tuple[Place, ...]
    shape: tuple[int, int]


class Layers:
    """The linear layers of a model, by all the names that LoRA files have for them."""

    def __init__(self, sizes: Architecture) -> None:
        """Take the sizes of a model."""
        self.shapes: dict[str, dict[str, tuple[int, int]]] = {
            TRANSFORMER: transformer_layers(sizes.transformer),
            ENCODER: encoder_layers(sizes.text_encoder),
        }

    @cached_property
    def _known(self) -> Mapping[str, Target]:
        known = {}
        for component, layers in self.shapes.items():
            for path, shape in layers.items():
                known[_joined(path.removeprefix("model."))] = Target((Place(component, path, ((0, shape[0]),)),), shape)
        for name, paths in _original_names(self.shapes[TRANSFORMER]).items():
            known[_joined(name)] = self._fused(paths, swapped=name == SWAPPED)
        return known

    def _fused(self, paths: tuple[str, ...], swapped: bool) -> Target:
        places, start = [], 0
        for path in paths:
            size, n_in = self.shapes[TRANSFORMER][path]
            middle, end = start + size // 2, start + size
            rows = ((middle, end), (start, middle)) if swapped else ((start, end),)
            places.append(Place(TRANSFORMER, path, rows))
            start = end
        return Target(tuple(places), (start, n_in))

    def find(self, name: str) -> Target | None:
        """Return what the path of a layer in a file means; None if this model has no such layer."""
        left = _joined(name)
        while True:
            for spelled in (left, f"tran{left}" if left.startswith(CLIPPED) else left):
                if spelled in self._known:
                    return self._known[spelled]
            prefix = PREFIXES.match(left)
            if prefix is None:
                return None
            left = left[prefix.end() :]


def _joined(name: str) -> str:
    return re.sub(r"[._]+", "_", name)


def _original_names(layers: Mapping[str, tuple[int, int]]) -> dict[str, tuple[str, ...]]:
    """Return the paths of layers by the names of the original and by diffusers' names of fused layers."""
    names: dict[str, tuple[str, ...]] = {name: (path,) for name, path in MODULES.items()}
    for original, (blocks, modules) in BLOCKS.items():
        count = 1 + max((int(path.split(".")[1]) for path in layers if path.startswith(f"{blocks}.")), default=-1)
        for i in range(count):
            for module, parts in modules.items():
                paths = tuple(f"{blocks}.{i}.{part}" for part in parts)
                if all(path in layers for path in paths):  # norms are no linear layers
                    names[f"{original}.{i}.{module}"] = paths
                    if len(paths) > 1:  # fuse_qkv_projections, diffusers
                        fused = "to_qkv" if "img" in module else "to_added_qkv"
                        names[f"{blocks}.{i}.attn.{fused}"] = paths
    return names


def transformer_layers(c: TransformerConfig) -> dict[str, tuple[int, int]]:
    """Return the shape [out, in] of each linear layer of a Flux2Transformer2DModel by its path."""
    dim, mlp = c.dim, c.mlp_dim
    found = {
        "x_embedder": (dim, c.in_channels),
        "context_embedder": (dim, c.text_dim),
        "time_guidance_embed.timestep_embedder.linear_1": (dim, c.timestep_channels),
        "time_guidance_embed.timestep_embedder.linear_2": (dim, dim),
        "double_stream_modulation_img.linear": (6 * dim, dim),
        "double_stream_modulation_txt.linear": (6 * dim, dim),
        "single_stream_modulation.linear": (3 * dim, dim),
        "norm_out.linear": (2 * dim, dim),
        "proj_out": (c.out_channels, dim),
    }
    square = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
    for i in range(c.double_layers):
        block = f"transformer_blocks.{i}"
        found |= {f"{block}.attn.{name}": (dim, dim) for name in square}
        for name in ("ff", "ff_context"):
            found[f"{block}.{name}.linear_in"] = (2 * mlp, dim)
            found[f"{block}.{name}.linear_out"] = (dim, mlp)
    for i in range(c.single_layers):
        block = f"single_transformer_blocks.{i}.attn"
        found[f"{block}.to_qkv_mlp_proj"] = (3 * dim + 2 * mlp, dim)
        found[f"{block}.to_out"] = (dim, dim + mlp)
    return found


def encoder_layers(c: TextEncoderConfig) -> dict[str, tuple[int, int]]:
    """Return the same of a Qwen3 text encoder."""
    q, kv = c.heads * c.head_dim, c.kv_heads * c.head_dim
    found = {}
    for i in range(c.layers):
        layer = f"model.layers.{i}"
        found[f"{layer}.self_attn.q_proj"] = (q, c.hidden)
        found[f"{layer}.self_attn.k_proj"] = found[f"{layer}.self_attn.v_proj"] = (kv, c.hidden)
        found[f"{layer}.self_attn.o_proj"] = (c.hidden, q)
        found[f"{layer}.mlp.gate_proj"] = found[f"{layer}.mlp.up_proj"] = (c.intermediate, c.hidden)
        found[f"{layer}.mlp.down_proj"] = (c.hidden, c.intermediate)
    return found
