"""Weights of a kind that fluxonnx can't read: what they are, and what to use instead."""

from __future__ import annotations

import re
from collections.abc import Mapping

from fluxonnx.checkpoint.floats import PARAMETERS, is_nvfp4
from fluxonnx.checkpoint.safetensors import Tensor
from fluxonnx.errors import CheckpointError

LORA = re.compile(r"(^|[._])(lora_(A|B|up|down|te)|lokr_w|hada_w|oft_blocks|dora_scale|lora_magnitude_vector)")
READABLE = "use an unquantised file (bf16), or one in fp8, GGUF or ComfyUI's int8_tensorwise"

# Parameters of quantised layers by the tools that write them; the first that is found counts.
TOOLS: tuple[tuple[str, frozenset[str]], ...] = (
    ("by nunchaku (SVDQuant)", frozenset({"smooth_factor", "smooth_factor_orig", "wscales", "wzeros", "wtscale"})),
    ("by bitsandbytes", frozenset({"absmax", "quant_map", "nested_absmax", "nested_quant_map", "SCB"})),
    ("by GPTQ", frozenset({"g_idx"})),
    ("by AWQ or GPTQ", frozenset({"qweight", "qzeros"})),
    ("by llm-compressor (compressed-tensors)", frozenset({"weight_packed", "weight_shape", "weight_zero_point"})),
    ("by quanto", frozenset({"_data", "_scale", "_shift"})),
    ("by HQQ", frozenset({"W_q"})),
    ("by ExLlama", frozenset({"q_weight", "q_scale", "trellis"})),
    (
        "in a ComfyUI format",
        frozenset({"weight_s_rel", "weight_s_channel", "weight_codebook", "weight_correction", "pre_quant_scale"}),
    ),
    ("in an unknown format", frozenset({"scales", "weight_zero", "weight_zeros"})),
)

# What tells the parts of a model from each other: the end of a name, or part of it.
MARKS = {
    "transformer": re.compile(r"(^|\.)(double_blocks|single_blocks|single_transformer_blocks|transformer_blocks)\."),
    "text_encoder": re.compile(r"(^|\.)((layers|blk)\.\d+\.|embed_tokens\.weight$|token_embd\.weight$)"),
    "vae": re.compile(r"(^|\.)(encoder|decoder)\.(conv_in|conv_out|down|up|mid)"),
}
NOUNS = {"transformer": "transformer", "text_encoder": "text encoder", "vae": "autoencoder"}
ARTICLES = {"transformer": "a", "text_encoder": "a", "vae": "an"}


def refuse_foreign(tensors: Mapping[str, Tensor], component: str = "transformer") -> None:
    """Name the kind of a file that can't be a part of a model that fluxonnx reads.

    Raises:
        CheckpointError: The tensors are a LoRA or another part, or are quantised in a way that is not known.
    """
    noun = NOUNS[component]
    if found := quantised(tensors):
        name, how = found
        raise CheckpointError(
            f"{tensors[name].file} is {ARTICLES[component]} {noun} that is quantised {how} ({name}), which fluxonnx "
            f"can't read: {READABLE}"
        )
    for name, tensor in tensors.items():
        if LORA.search(name):
            raise CheckpointError(
                f"{tensor.file} is a LoRA, not a whole {noun} ({name}): pass it with --lora, and the model that it is "
                f"for with -d or --{component.replace('_', '-')}"
            )
    _refuse_another_part(tensors, component)


def _refuse_another_part(tensors: Mapping[str, Tensor], component: str) -> None:
    if not tensors or any(MARKS[component].search(name) for name in tensors):
        return
    for other, mark in MARKS.items():
        name = next((name for name in tensors if mark.search(name)), None)
        if name is not None:
            raise CheckpointError(
                f"{tensors[name].file} holds {ARTICLES[other]} {NOUNS[other]} ({name}), not {ARTICLES[component]} "
                f"{NOUNS[component]}: pass it with --{other.replace('_', '-')}"
            )


def quantised(tensors: Mapping[str, Tensor]) -> tuple[str, str] | None:
    """Return a tensor that shows a quantisation which can't be read, and what it is; None if there is none."""
    ends: dict[str, str] = {}
    for name in tensors:
        ends.setdefault(name.rpartition(".")[2], name)
        if "bitsandbytes__" in name:
            return name, f"by bitsandbytes ({name.rpartition('bitsandbytes__')[2]})"
    for name, tensor in tensors.items():
        if name.endswith(".weight") and tensor.dtype == "U32":
            return name, "by MLX"
    for how, parameters in TOOLS:
        for parameter in sorted(parameters & ends.keys()):
            return ends[parameter], how
    for name, tensor in tensors.items():
        layer, _, parameter = name.rpartition(".")
        if (
            parameter == "weight"
            and tensor.dtype == "U8"
            and not is_nvfp4(tensors, layer)
            and not _marked(tensors, layer)
        ):
            return name, "to 4 bits"
        if parameter in PARAMETERS and f"{layer}.weight" not in tensors:
            return name, "in an unknown format"
    return None


def _marked(tensors: Mapping[str, Tensor], layer: str) -> bool:
    return f"{layer}.comfy_quant" in tensors
