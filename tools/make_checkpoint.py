"""Write a random checkpoint in the layout of FLUX.2-klein, of any size: tiny ones for tests, 16 GB for benchmarks.

python tools/make_checkpoint.py --architecture 4b OUT
"""

from __future__ import annotations

import argparse
import errno
import json
import math
import os
import shutil
import sys
import time
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

sys.path.insert(0, str(Path(__file__).parent.parent))

from fluxonnx.checkpoint.safetensors import DTYPES
from tools.architectures import ARCHITECTURES, Architecture, Shapes

__all__ = ["ARCHITECTURES", "make_checkpoint"]

# The names of a dtype: ours, safetensors', torch's.
DTYPE_NAMES = {"bf16": ("BF16", "bfloat16"), "fp16": ("F16", "float16"), "fp32": ("F32", "float32")}

SCHEDULER = {
    "_class_name": "FlowMatchEulerDiscreteScheduler",
    "_diffusers_version": "0.37.0.dev0",
    "base_image_seq_len": 256,
    "base_shift": 0.5,
    "invert_sigmas": False,
    "max_image_seq_len": 4096,
    "max_shift": 1.15,
    "num_train_timesteps": 1000,
    "shift": 3.0,
    "shift_terminal": None,
    "stochastic_sampling": False,
    "time_shift_type": "exponential",
    "use_beta_sigmas": False,
    "use_dynamic_shifting": True,
    "use_exponential_sigmas": False,
    "use_karras_sigmas": False,
}

# The split of Qwen2Tokenizer.
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
THINK_TOKENS = ("<think>", "</think>")
TRAINING_TEXT = ["a cat and a dog in the rain", "the red house on the hill", "user assistant", "painting of the sea"]

# What Qwen3's template comes to for one user message without thinking.
CHAT_TEMPLATE = (
    "{%- for message in messages %}"
    "{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}"
    "{%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}"
    "{%- endif %}"
)


def make_checkpoint(
    directory: str | Path,
    architecture: Architecture,
    *,
    seed: int = 0,
    dtype: str = "bf16",
    shards: int | None = None,
    is_distilled: bool = True,
) -> Path:
    """Write a checkpoint; its values depend on the arguments only.

    Args:
        directory: Where to; made if missing.
        architecture: The sizes; see `ARCHITECTURES`.
        seed: Of the random weights.
        dtype: "bf16", "fp16" or "fp32".
        shards: Into how many files the text encoder and the transformer are split; by default as the real one is.
        is_distilled: Whether model_index.json says that the model needs no guidance.

    Returns:
        The directory.

    Raises:
        OSError: ENOSPC, before anything is written, where the disk is too small.
    """
    root = Path(directory)
    require_space(root, required_bytes(architecture, dtype))
    # Odd lengths, so that no row of a matrix is the same as another: their lengths are even.
    block = random_block(seed, (1 << 22) - 1 if required_bytes(architecture, dtype) > 1 << 30 else (1 << 17) - 1)
    torch_dtype = DTYPE_NAMES[dtype][1]
    write_json(root / "model_index.json", model_index(is_distilled))
    write_json(root / "scheduler/scheduler_config.json", SCHEDULER)
    write_tokenizer(root / "tokenizer")
    write_json(root / "text_encoder/config.json", architecture.text_encoder.config(torch_dtype))
    write_json(root / "transformer/config.json", architecture.transformer.config())
    write_json(root / "vae/config.json", architecture.vae.config())
    text_shards = shards or architecture.text_encoder_shards
    write_weights(root / "text_encoder", "model", architecture.text_encoder.shapes(), dtype, text_shards, block)
    stem = "diffusion_pytorch_model"
    write_weights(root / "transformer", stem, architecture.transformer.shapes(), dtype, shards or 1, block)
    write_weights(root / "vae", stem, architecture.vae.shapes(), dtype, 1, block)
    return root


def model_index(is_distilled: bool) -> dict[str, Any]:
    """Return model_index.json."""
    return {
        "_class_name": "Flux2KleinPipeline",
        "_diffusers_version": "0.37.0.dev0",
        "is_distilled": is_distilled,
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
        "text_encoder": ["transformers", "Qwen3ForCausalLM"],
        "tokenizer": ["transformers", "Qwen2TokenizerFast"],
        "transformer": ["diffusers", "Flux2Transformer2DModel"],
        "vae": ["diffusers", "AutoencoderKLFlux2"],
    }


def random_block(seed: int, size: int) -> np.ndarray:
    """Draw standard normal float32 values once; tensors are cut from them at offsets of their own.

    Fresh values for all 8 billion weights would take minutes and prove nothing more.
    """
    return np.random.default_rng(seed).standard_normal(size, np.float32)


def scale_and_shift(name: str, shape: tuple[int, ...]) -> tuple[float, float]:
    """Choose a tensor's spread and centre so that activations stay of order one through a deep random network."""
    if name == "bn.running_var":
        return 0.2, 1.5
    if name == "bn.running_mean":
        return 0.5, 0.0
    if len(shape) == 1:
        return (0.05, 0.0) if name.endswith(".bias") else (0.2, 1.0)
    if "embed_tokens" in name:
        return 1.0, 0.0
    fan_in = math.prod(shape[1:])
    # Branches that are added to the residual stream are kept small, or it grows with depth.
    residual = name.endswith(("o_proj.weight", "down_proj.weight", "linear_out.weight", "to_out.weight"))
    return (0.5 if residual else 1.0) / math.sqrt(fan_in), 0.0


def values(name: str, shape: tuple[int, ...], block: np.ndarray, dtype: Any) -> Iterator[np.ndarray]:
    """Yield a tensor's values in flat pieces of `dtype`: one cut of `block`, as often as needed."""
    size = math.prod(shape)
    scale, shift = scale_and_shift(name, shape)
    start = zlib.crc32(name.encode()) % len(block)
    piece = np.roll(block, -start)[:size]
    piece = (np.abs(piece) if name == "bn.running_var" else piece) * np.float32(scale) + np.float32(shift)
    piece = piece.astype(dtype)
    for offset in range(0, size, len(piece)):
        yield piece[: size - offset]


def write_weights(folder: Path, stem: str, shapes: Shapes, dtype: str, shards: int, block: np.ndarray) -> None:
    """Write one safetensors file, or several and their index; nothing larger than `block` is held in memory."""
    names = sorted(shapes)
    if shards == 1:
        write_safetensors(folder / f"{stem}.safetensors", {name: shapes[name] for name in names}, dtype, block)
        return
    weight_map = {}
    for i in range(shards):
        file = f"{stem}-{i + 1:05}-of-{shards:05}.safetensors"
        part = names[i * len(names) // shards : (i + 1) * len(names) // shards]
        write_safetensors(folder / file, {name: shapes[name] for name in part}, dtype, block)
        weight_map.update(dict.fromkeys(part, file))
    size = sum(math.prod(shape) for shape in shapes.values()) * item_size(dtype)
    write_json(folder / f"{stem}.safetensors.index.json", {"metadata": {"total_size": size}, "weight_map": weight_map})


def item_size(dtype: str) -> int:
    return DTYPES[DTYPE_NAMES[dtype][0]].itemsize


def write_safetensors(path: Path, shapes: Shapes, dtype: str, block: np.ndarray) -> None:
    """Stream tensors into a safetensors file; integer counters are I64, everything else `dtype`."""
    kinds = {name: "I64" if "num_batches" in name else DTYPE_NAMES[dtype][0] for name in shapes}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + math.prod(shape) * DTYPES[kinds[name]].itemsize
        header[name] = {"dtype": kinds[name], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    temporary = path.with_suffix(".tmp")
    try:
        with temporary.open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for name, shape in shapes.items():
                for piece in values(name, shape, block, DTYPES[kinds[name]]):
                    file.write(piece.view(np.uint8).data)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Write JSON, making the folder if need be."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=2) + "\n", "utf-8")


def write_tokenizer(folder: Path, texts: Iterable[str] = TRAINING_TEXT, vocab_size: int = 320) -> None:
    """Write a byte-level BPE tokenizer with Qwen3's splitting and special tokens, its merges learned from `texts`."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    added = [AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS]
    added += [AddedToken(token, special=False, normalized=False) for token in THINK_TOKENS]
    tokenizer.add_tokens(added)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    tokenizer.model.save(str(folder))
    config = {
        "add_bos_token": False,
        "add_prefix_space": False,
        "added_tokens_decoder": {
            str(tokenizer.token_to_id(token.content)): {
                "content": token.content,
                "lstrip": False,
                "normalized": False,
                "rstrip": False,
                "single_word": False,
                "special": token.special,
            }
            for token in added
        },
        "additional_special_tokens": list(SPECIAL_TOKENS[1:]),
        "chat_template": CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|im_end|>",
        "errors": "replace",
        "model_max_length": 131072,
        "pad_token": "<|endoftext|>",
        "split_special_tokens": False,
        "tokenizer_class": "Qwen2Tokenizer",
        "unk_token": None,
    }
    write_json(folder / "tokenizer_config.json", config)
    write_json(
        folder / "special_tokens_map.json",
        {key: config[key] for key in ("additional_special_tokens", "eos_token", "pad_token")},
    )


def required_bytes(architecture: Architecture, dtype: str) -> int:
    """Return about how much space a checkpoint takes."""
    parts = (architecture.text_encoder, architecture.transformer, architecture.vae)
    count = sum(math.prod(shape) for part in parts for shape in part.shapes().values())
    return count * item_size(dtype)


def require_space(directory: Path, size: int) -> None:
    """Raise OSError where the disk that holds `directory` has less than `size` bytes free."""
    existing = next(path for path in (directory, *directory.absolute().parents) if path.exists())
    free = shutil.disk_usage(existing).free
    if free < size:
        raise OSError(errno.ENOSPC, f"needs {size / 1e9:.1f} GB, only {free / 1e9:.1f} GB are free", str(directory))


def main() -> None:
    parser = argparse.ArgumentParser(description="Write a random checkpoint in the layout of FLUX.2-klein.")
    parser.add_argument("output", type=Path, metavar="OUT", nargs="?")
    parser.add_argument("--architecture", choices=ARCHITECTURES, default="4b", help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    parser.add_argument("--dtype", choices=DTYPE_NAMES, default="bf16", help="default: %(default)s")
    parser.add_argument("--shards", type=int, help="files for the transformer and the text encoder")
    parser.add_argument("--base", action="store_true", help="a base model, that needs guidance, not a distilled one")
    parser.add_argument(
        "--list", action="store_true", help="print the architectures and their sizes, and write nothing"
    )
    arguments = parser.parse_args()
    if arguments.list:
        for name, architecture in ARCHITECTURES.items():
            print(f"{name:<24} {required_bytes(architecture, arguments.dtype) / 1e6:>9,.1f} MB")
        return
    if arguments.output is None:
        parser.error("the following arguments are required: OUT")
    start = time.perf_counter()
    try:
        make_checkpoint(
            arguments.output,
            ARCHITECTURES[arguments.architecture],
            seed=arguments.seed,
            dtype=arguments.dtype,
            shards=arguments.shards,
            is_distilled=not arguments.base,
        )
    except OSError as error:
        sys.exit(f"{error.filename or arguments.output}: {error.strerror}")
    for path in sorted(arguments.output.glob("*/*.safetensors")):
        print(f"{path}: {path.stat().st_size:,} bytes")
    print(f"{arguments.output}: written in {time.perf_counter() - start:.1f} s")


if __name__ == "__main__":
    main()
