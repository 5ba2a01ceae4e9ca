"""Others' names of the text encoder's and the autoencoder's tensors, translated to those of transformers and diffusers.

Sources: convert_ldm_vae_checkpoint, single_file_utils.py of diffusers; load_text_encoder_state_dicts, comfy/sd.py in
Comfy-Org/ComfyUI; TENSOR_NAMES of gguf/constants.py.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace

from fluxonnx.checkpoint.safetensors import Tensor

# The module of Qwen3ForCausalLM that holds the layers; files of the bare model lack it, files of several models have
# "text_encoders.qwen3_4b.transformer." before it.
ENCODER_PREFIX = "model."
ENCODER_PARTS = ("layers.", "embed_tokens.", "norm.")
EMBEDDING = "embed_tokens.weight"
HEAD = "lm_head."

# llama.cpp's names.
LLAMA_BLOCK = re.compile(r"blk\.(\d+)\.(\w+)\.(\w+)")
LLAMA_MODULES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
LLAMA_ENDS = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}

VAE_PREFIXES = ("vae.", "first_stage_model.")
# Modules of the original autoencoder; blocks of the decoder are counted from the other end.
VAE_MODULES: tuple[tuple[str, str], ...] = (
    (r"(encoder|decoder)\.mid\.attn_1\.", r"\1.mid_block.attentions.0."),
    (r"encoder\.down\.(\d+)\.block\.(\d+)\.", r"encoder.down_blocks.\1.resnets.\2."),
    (r"encoder\.down\.(\d+)\.downsample\.", r"encoder.down_blocks.\1.downsamplers.0."),
    (r"decoder\.up\.(\d+)\.block\.(\d+)\.", r"decoder.up_blocks.\1.resnets.\2."),
    (r"decoder\.up\.(\d+)\.upsample\.", r"decoder.up_blocks.\1.upsamplers.0."),
    (r"(encoder|decoder)\.norm_out\.", r"\1.conv_norm_out."),
    # Black Forest Labs' code has these inside encoder and decoder
    (r"encoder\.quant_conv\.", "quant_conv."),
    (r"decoder\.post_quant_conv\.", "post_quant_conv."),
)
VAE_MID = re.compile(r"(encoder|decoder)\.mid\.block_(\d+)\.")
VAE_UP = re.compile(r"decoder\.up\.(\d+)\.")
# Names inside blocks: the original's, and those of old versions of diffusers.
VAE_SHORTCUT = "nin_shortcut."
VAE_ATTENTION = {
    **{"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"},
    **{"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"},
}
ATTENTION = re.compile(r"(.*\.attentions\.0\.)(\w+)\.(weight|bias)")


def bare_encoder(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the text encoder's tensors of a file that may hold several models, by the names of Qwen3ForCausalLM."""
    if any(name.startswith("blk.") for name in tensors):
        return {_of_llama(name): tensor for name, tensor in tensors.items()}
    table = next((name for name in tensors if name.endswith(EMBEDDING)), None)
    if table is None or table == ENCODER_PREFIX + EMBEDDING:
        return tensors
    if table == EMBEDDING:
        return {ENCODER_PREFIX + name if name.startswith(ENCODER_PARTS) else name: t for name, t in tensors.items()}
    prefix = table.removesuffix(EMBEDDING)
    outer = prefix.removesuffix(ENCODER_PREFIX)
    inside = {
        ENCODER_PREFIX + name.removeprefix(prefix): tensor
        for name, tensor in tensors.items()
        if name.startswith(prefix) and name.removeprefix(prefix).startswith(ENCODER_PARTS)
    }
    heads = {name.removeprefix(outer): tensor for name, tensor in tensors.items() if name.startswith(outer + HEAD)}
    return inside | heads


def _of_llama(name: str) -> str:
    if match := LLAMA_BLOCK.fullmatch(name):
        layer, module, parameter = match.groups()
        return f"model.layers.{layer}.{LLAMA_MODULES.get(module, module)}.{parameter}"
    module, _, parameter = name.rpartition(".")
    return f"{LLAMA_ENDS.get(module, module)}.{parameter}"


def renamed_encoder(name: str, tensor: Tensor, others: Mapping[str, Tensor]) -> Iterator[Tensor]:
    """Yield a text encoder's tensor by its name."""
    yield replace(tensor, name=name)


def bare_vae(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the autoencoder's tensors of a file that may hold several models, without their prefix."""
    prefix = next((prefix for prefix in VAE_PREFIXES if any(name.startswith(prefix) for name in tensors)), "")
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def renamed_vae(name: str, tensor: Tensor, others: Mapping[str, Tensor]) -> Iterator[Tensor]:
    """Yield an autoencoder's tensor by diffusers' name; linears that are convolutions of one pixel become matrices."""
    if match := VAE_UP.match(name):
        last = max(int(found[1]) for found in map(VAE_UP.match, others) if found)
        name = f"decoder.up.{last - int(match[1])}.{name[match.end() :]}"
    if match := VAE_MID.match(name):
        name = f"{match[1]}.mid_block.resnets.{int(match[2]) - 1}.{name[match.end() :]}"
    for pattern, module in VAE_MODULES:
        name, found = re.subn(f"^{pattern}", module, name)
        if found:
            break
    name = name.replace(f".{VAE_SHORTCUT}", ".conv_shortcut.")
    if match := ATTENTION.fullmatch(name):
        name = f"{match[1]}{VAE_ATTENTION.get(match[2], match[2])}.{match[3]}"
        if len(tensor.shape) > 2 and all(n == 1 for n in tensor.shape[2:]):
            tensor = replace(tensor, shape=tensor.shape[:2])
    yield replace(tensor, name=name)


def vae_channels(tensors: Mapping[str, Tensor]) -> dict[str, list[int]]:
    """Return the channels of the blocks of encoder and decoder as config.json has them, read off the weights."""
    found: dict[str, list[int]] = {}
    for key, part, blocks in (
        ("block_out_channels", "encoder", "down_blocks"),
        ("decoder_block_out_channels", "decoder", "up_blocks"),
    ):
        widths: list[int] = []
        while (tensor := tensors.get(f"{part}.{blocks}.{len(widths)}.resnets.0.conv1.weight")) is not None:
            widths.append(tensor.shape[0] if tensor.shape else 0)
        found[key] = widths if part == "encoder" else widths[::-1]
    return {key: widths for key, widths in found.items() if widths}
