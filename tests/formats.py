"""Writes the parts of a model as others' tools do: names, 8- and 4-bit floats, GGUF."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np

from fluxonnx.checkpoint.safetensors import DTYPES, read_header

Arrays = dict[str, np.ndarray]


def load(path: Path) -> Arrays:
    """Read a safetensors file with 8-bit floats, which the library does not give to numpy."""
    return {name: np.array(tensor.array()) for name, tensor in read_header(path).items()}


# Written from the original's code, not from fluxonnx, so that each checks the other: diffusers' name -> LDM's. `{up}`
# is counted from the other end.
VAE = [
    (r"(encoder)\.down_blocks\.(\d)\.resnets\.(\d)\.", r"\1.down.\2.block.\3."),
    (r"(encoder)\.down_blocks\.(\d)\.downsamplers\.0\.", r"\1.down.\2.downsample."),
    (r"(decoder)\.up_blocks\.(\d)\.resnets\.(\d)\.", r"\1.up.{\2}.block.\3."),
    (r"(decoder)\.up_blocks\.(\d)\.upsamplers\.0\.", r"\1.up.{\2}.upsample."),
    (r"(encoder|decoder)\.mid_block\.resnets\.0\.", r"\1.mid.block_1."),
    (r"(encoder|decoder)\.mid_block\.resnets\.1\.", r"\1.mid.block_2."),
    (r"(encoder|decoder)\.mid_block\.attentions\.0\.group_norm\.", r"\1.mid.attn_1.norm."),
    (r"(encoder|decoder)\.mid_block\.attentions\.0\.to_([qkv])\.", r"\1.mid.attn_1.\2."),
    (r"(encoder|decoder)\.mid_block\.attentions\.0\.to_out\.0\.", r"\1.mid.attn_1.proj_out."),
    (r"(encoder|decoder)\.conv_norm_out\.", r"\1.norm_out."),
    (r"conv_shortcut\.", "nin_shortcut."),
]


def ldm_names(tensors: Arrays, inside: bool = False) -> Arrays:
    """Rename an autoencoder's tensors; `inside` puts the outer convolutions where Black Forest Labs have them."""
    last = max(int(name.split(".")[2]) for name in tensors if name.startswith("decoder.up_blocks."))
    renamed = {}
    for name, array in tensors.items():
        for pattern, original in VAE:
            name = re.sub(pattern, original, name)
        name = re.sub(r"\{(\d)\}", lambda match: str(last - int(match[1])), name)
        if inside and name.startswith(("quant_conv.", "post_quant_conv.")):
            name = ("encoder." if name.startswith("quant") else "decoder.") + name
        if ".mid.attn_1." in name and array.ndim == 2:
            array = array[:, :, None, None]
        renamed[name] = array
    return renamed


def old_attention_names(tensors: Arrays) -> Arrays:
    """Rename as versions of diffusers before 0.18 did."""
    old = {"to_q.": "query.", "to_k.": "key.", "to_v.": "value.", "to_out.0.": "proj_attn."}
    renamed = {}
    for name, array in tensors.items():
        for new, before in old.items():
            name = name.replace(f"attentions.0.{new}", f"attentions.0.{before}")
        renamed[name] = array
    return renamed


LLAMA = {
    "model.embed_tokens.": "token_embd.",
    "model.norm.": "output_norm.",
    "lm_head.": "output.",
    "model.layers.": "blk.",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def llama_names(tensors: Arrays) -> Arrays:
    """Rename a text encoder's tensors as llama.cpp does."""
    renamed = {}
    for name, array in tensors.items():
        for theirs, ours in LLAMA.items():
            name = name.replace(theirs, ours)
        renamed[name] = array
    return renamed


# A layer's tensors in a form, by the ends of their names, and the float32 weights that they are.
Layer = tuple[Arrays, np.ndarray]


def fp8_plain(weight: np.ndarray, dtype: type = ml_dtypes.float8_e4m3fn) -> Layer:
    """8-bit floats without scales."""
    stored = weight.astype(dtype)
    return {"weight": stored}, stored.astype(np.float32)


def fp8_e5m2(weight: np.ndarray) -> Layer:
    """The same with more exponents."""
    return fp8_plain(weight, ml_dtypes.float8_e5m2)


def fp8_scaled(weight: np.ndarray, name: str = "weight_scale") -> Layer:
    """A scale for all, as ComfyUI's tools store it."""
    scale = np.float32(np.abs(weight).max() / 448)
    stored = (weight / scale).astype(ml_dtypes.float8_e4m3fn)
    extras = {"input_scale": np.float32(0.25).reshape(())}
    return {"weight": stored, name: scale.reshape(()), **extras}, stored.astype(np.float32) * scale


def fp8_older(weight: np.ndarray) -> Layer:
    """The older name of the scale, [1]."""
    tensors, values = fp8_scaled(weight)
    return {"weight": tensors["weight"], "scale_weight": tensors["weight_scale"].reshape(1)}, values


def fp8_rows(weight: np.ndarray) -> Layer:
    """A scale per row."""
    scale = (np.abs(weight).max(1, keepdims=True) / 448).astype(np.float32)
    stored = (weight / scale).astype(ml_dtypes.float8_e4m3fn)
    return {"weight": stored, "weight_scale": scale}, stored.astype(np.float32) * scale


def fp8_blocks(weight: np.ndarray) -> Layer:
    """A scale per block of 128 x 128, as Qwen stores it."""
    rows, columns = (np.arange(size) // 128 for size in weight.shape)
    scale = np.zeros((rows[-1] + 1, columns[-1] + 1), np.float32)
    np.maximum.at(scale, (rows[:, None], columns[None]), np.abs(weight) / 448)
    scale = scale.astype(ml_dtypes.bfloat16)
    spread = scale.astype(np.float32)[rows][:, columns]
    stored = (weight / spread).clip(-448, 448).astype(ml_dtypes.float8_e4m3fn)
    return {"weight": stored, "weight_scale_inv": scale}, stored.astype(np.float32) * spread


FORMS: dict[str, Callable[[np.ndarray], Layer]] = {
    "fp8": fp8_plain,
    "fp8-e5m2": fp8_e5m2,
    "fp8-scaled": fp8_scaled,
    "fp8-older": fp8_older,
    "fp8-rows": fp8_rows,
    "fp8-blocks": fp8_blocks,
}


def in_form(tensors: Arrays, form: Callable[[np.ndarray], Layer], markers: bool = False) -> tuple[Arrays, Arrays]:
    """Store the matrices of blocks in a form.

    Returns:
        What the file holds, and what its weights are.
    """
    stored: Arrays = {}
    values: Arrays = {}
    for name, array in tensors.items():
        layer, _, parameter = name.rpartition(".")
        if array.ndim == 2 and parameter == "weight" and re.search(r"blocks\.|layers\.|blk\.|final", name):
            found, values[name] = form(array.astype(np.float32))
            stored |= {f"{layer}.{end}": part for end, part in found.items()}
        else:
            stored[name] = values[name] = array
    if markers:
        stored["scaled_fp8"] = np.zeros(2, ml_dtypes.float8_e4m3fn)
    return stored, values


def write(path: Path, tensors: Arrays, prefix: str = "", others: Arrays | None = None) -> Path:
    """Write a safetensors file, of several models if `others` are given.

    By hand, as versions of the library know different 8-bit floats; types that fluxonnx does not know get another name.
    """
    names = {dtype: name for name, dtype in DTYPES.items()}
    header, pieces, end = {}, [], 0
    for name, array in ({prefix + name: array for name, array in tensors.items()} | (others or {})).items():
        pieces.append(np.array(array, order="C").tobytes())
        start, end = end, end + len(pieces[-1])
        header[name] = {
            "dtype": names.get(array.dtype, "F8_UNKNOWN"),
            "shape": list(array.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"".join(pieces))
    return path


def write_gguf(path: Path, tensors: Arrays, kind: str, architecture: str | None = "flux", prefix: str = "") -> Arrays:
    """Write a GGUF file whose matrices are blocks of a type, as far as rows divide; others are float32.

    Types that the package can't make get random bytes, with small scales.

    Returns:
        The values of its tensors, as the package decodes them.
    """
    import gguf

    writer = gguf.GGUFWriter(path, architecture or "none")
    if architecture is None:
        writer.kv_data[0].clear()
    block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    values: Arrays = {}
    for i, (name, array) in enumerate(tensors.items()):
        wide = array.astype(np.float32)
        if wide.ndim < 2 or wide.shape[-1] % block:
            writer.add_tensor(prefix + name, wide)
            values[name] = wide
            continue
        qtype = gguf.GGMLQuantizationType[kind]
        try:
            raw = gguf.quants.quantize(wide, qtype)
        except NotImplementedError:
            raw = random_blocks(kind, (*wide.shape[:-1], wide.shape[-1] // block), size, i)
        writer.add_tensor(prefix + name, raw, raw_shape=raw.shape if raw.dtype == np.uint8 else None, raw_dtype=qtype)
        values[name] = gguf.quants.dequantize(raw, qtype).reshape(wide.shape)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return values


# Where the float16 scales of a block lie, by type.
SCALES_AT = {"Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,), "IQ4_NL": (0,)}
SCALES_AT |= {"IQ4_XS": (0,)}


def random_blocks(kind: str, shape: tuple[int, ...], size: int, seed: int) -> np.ndarray:
    """Return blocks of random bytes whose scales make weights of usual sizes: uint8 [..., blocks * size]."""
    random = np.random.RandomState(seed)
    raw = random.randint(0, 256, (*shape, size)).astype(np.uint8)
    for at in SCALES_AT[kind]:
        scale = (random.rand(*shape, 1) * 1e-3).astype(np.float16)
        raw[..., at : at + 2] = scale.view(np.uint8)
    return raw.reshape(*shape[:-1], -1)
