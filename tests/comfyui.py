"""Writes transformers as ComfyUI's tools do: in one file, by the original's names, quantised or not."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

# Written from the original's layout, not from fluxonnx, so that each checks the other.
NAMES = [
    (r"x_embedder", "img_in"),
    (r"context_embedder", "txt_in"),
    (r"time_guidance_embed\.timestep_embedder\.linear_1", "time_in.in_layer"),
    (r"time_guidance_embed\.timestep_embedder\.linear_2", "time_in.out_layer"),
    (r"(\w+_modulation\w*)\.linear", r"\1.lin"),
    (r"norm_out\.linear", "final_layer.adaLN_modulation.1"),
    (r"proj_out", "final_layer.linear"),
    (r"transformer_blocks\.(\d+)\.attn\.norm_q", r"double_blocks.\1.img_attn.norm.query_norm"),
    (r"transformer_blocks\.(\d+)\.attn\.norm_k", r"double_blocks.\1.img_attn.norm.key_norm"),
    (r"transformer_blocks\.(\d+)\.attn\.norm_added_q", r"double_blocks.\1.txt_attn.norm.query_norm"),
    (r"transformer_blocks\.(\d+)\.attn\.norm_added_k", r"double_blocks.\1.txt_attn.norm.key_norm"),
    (r"transformer_blocks\.(\d+)\.attn\.to_out\.0", r"double_blocks.\1.img_attn.proj"),
    (r"transformer_blocks\.(\d+)\.attn\.to_add_out", r"double_blocks.\1.txt_attn.proj"),
    (r"transformer_blocks\.(\d+)\.ff\.linear_in", r"double_blocks.\1.img_mlp.0"),
    (r"transformer_blocks\.(\d+)\.ff\.linear_out", r"double_blocks.\1.img_mlp.2"),
    (r"transformer_blocks\.(\d+)\.ff_context\.linear_in", r"double_blocks.\1.txt_mlp.0"),
    (r"transformer_blocks\.(\d+)\.ff_context\.linear_out", r"double_blocks.\1.txt_mlp.2"),
    (r"single_transformer_blocks\.(\d+)\.attn\.to_qkv_mlp_proj", r"single_blocks.\1.linear1"),
    (r"single_transformer_blocks\.(\d+)\.attn\.to_out", r"single_blocks.\1.linear2"),
    (r"single_transformer_blocks\.(\d+)\.attn\.norm_q", r"single_blocks.\1.norm.query_norm"),
    (r"single_transformer_blocks\.(\d+)\.attn\.norm_k", r"single_blocks.\1.norm.key_norm"),
]
FUSED = {"img_attn.qkv": ("to_q", "to_k", "to_v"), "txt_attn.qkv": ("add_q_proj", "add_k_proj", "add_v_proj")}


@dataclass(frozen=True)
class Form:
    """How a file is written."""

    names: str = "original"  # or "prefixed", "short prefix", or "diffusers"
    group: int = 0  # of the rotation
    per_row: bool = True
    marker: str = "tensor"  # or "nested", "unnamed", "twice", "metadata", "bare metadata", or "none"
    scale: str = "weight_scale"  # or "scale_weight"
    flat: bool = False  # whether the scales of rows are [out], not [out, 1]
    extras: bool = False  # whether there are tensors that say nothing about integers: of inputs, of fp8

    @property
    def id(self) -> str:
        rows = "rows" if self.per_row else "scalar"
        return f"{self.names}-{'convrot' if self.group else 'plain'}-{rows}-{self.marker}".replace(" ", "_")

    @property
    def prefix(self) -> str:
        """What the names of tensors begin with."""
        return {"prefixed": "model.diffusion_model.", "short prefix": "diffusion_model."}.get(self.names, "")

    def settings(self) -> dict[str, Any]:
        """How a layer's integers are to be read."""
        rotation = {"convrot": True, "convrot_groupsize": self.group} if self.group else {}
        if self.marker == "unnamed":
            return {**rotation, "per_row": self.per_row}
        return {"format": "int8_tensorwise", **({"params": rotation} if self.marker == "nested" else rotation)}

    def stored(self, layer: str, integers: np.ndarray, scale: np.ndarray) -> dict[str, np.ndarray]:
        """The tensors of a quantised layer; `scale` is [out, 1] or []."""
        shaped = scale.reshape(-1) if self.flat and scale.ndim else scale
        tensors = {f"{layer}.weight": integers, f"{layer}.{self.scale}": shaped}
        text = json.dumps(self.settings())
        if self.marker == "twice":
            text = json.dumps(text)
        if self.marker in ("tensor", "nested", "unnamed", "twice"):
            tensors[f"{layer}.comfy_quant"] = np.frombuffer(text.encode(), np.uint8)
        if self.extras:
            tensors[f"{layer}.input_scale"] = np.array(0.5, np.float32)
        return tensors

    def metadata(self, layers: Iterable[str]) -> dict[str, str]:
        """The header's metadata of a file with these quantised layers."""
        if "metadata" not in self.marker:
            return {}
        prefix = self.prefix if self.marker == "metadata" else ""
        listed = {prefix + layer: self.settings() for layer in layers}
        return {"_quantization_metadata": json.dumps({"format_version": "1.0", "layers": listed})}


def original_names(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Rename, fuse and swap diffusers' tensors to what Black Forest Labs have."""
    renamed = {}
    for name, array in tensors.items():
        layer = name.removesuffix(".weight")
        for pattern, original in NAMES:
            if re.fullmatch(pattern, layer):
                norm = original.endswith("_norm")
                if layer == "norm_out.linear":
                    array = np.concatenate(np.split(array, 2)[::-1])
                renamed[re.sub(pattern, original, layer) + (".scale" if norm else ".weight")] = array
    blocks = {name.split(".")[1] for name in tensors if name.startswith("transformer_blocks.")}
    for block in blocks:
        for fused, parts in FUSED.items():
            arrays = [tensors[f"transformer_blocks.{block}.attn.{part}.weight"] for part in parts]
            renamed[f"double_blocks.{block}.{fused}.weight"] = np.concatenate(arrays)
    return renamed


def hadamard(size: int) -> np.ndarray:
    """Return the matrix of comfy_kitchen's _build_hadamard, element by element."""
    negative = {(0, 3), (1, 2), (2, 1), (3, 0)}
    matrix = np.empty((size, size), np.float32)
    for row in range(size):
        for column in range(size):
            r, c, sign = row, column, 1
            while (r, c) != (0, 0):
                sign *= -1 if (r % 4, c % 4) in negative else 1
                r, c = r // 4, c // 4
            # digits that are 0 in both count, too: their sign is +
            matrix[row, column] = sign
    return matrix / np.sqrt(np.float32(size))


def rotate(array: np.ndarray, group: int) -> np.ndarray:
    return (array.reshape(-1, group) @ hadamard(group)).reshape(array.shape) if group else array


def quantise(weight: np.ndarray, form: Form) -> tuple[np.ndarray, np.ndarray]:
    """Return int8 [out, in] and float32 [out, 1] or []."""
    weight = rotate(weight.astype(np.float32), form.group)
    scale = np.abs(weight).max(axis=1 if form.per_row else None, keepdims=form.per_row) / np.float32(127)
    return np.clip(np.rint(weight / scale), -128, 127).astype(np.int8), np.asarray(scale, np.float32)


Quantise = Callable[[np.ndarray, Form], tuple[np.ndarray, np.ndarray]]


def write(
    source: Path, path: Path, form: Form, quantise: Quantise = quantise
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Write diffusers' `source` in another form, the linears of the blocks quantised.

    Returns:
        The integers and scales by the layers' names in the file.
    """
    tensors = load_file(source)
    if form.names != "diffusers":
        tensors = original_names(tensors)
    prefix = form.prefix
    stored: dict[str, np.ndarray] = {}
    quantised = {}
    for name, array in tensors.items():
        layer, _, parameter = name.rpartition(".")
        if "blocks." in layer and array.ndim == 2:
            quantised[layer] = quantise(array, form)
            stored |= form.stored(prefix + layer, *quantised[layer])
        else:
            assert parameter in ("weight", "scale")
            stored[prefix + name] = array
    if prefix:
        stored |= {"vae.decoder.conv_in.weight": np.zeros(4, np.float32)}
    if form.extras:
        stored[f"{prefix}scaled_fp8"] = np.zeros(2, np.float32)
    save_file(stored, path, form.metadata(quantised))
    return quantised
