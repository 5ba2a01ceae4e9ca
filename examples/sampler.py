"""Draw a picture from a folder of graphs: python sampler.py FOLDER PROMPT OUTPUT.ppm [NOISE.f32 HEIGHT WIDTH].

NOISE.f32 holds the noise, float32 [1, channels, HEIGHT / 16, WIDTH / 16], without a header.
"""

import json
import math
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
from onnxruntime import InferenceSession, SessionOptions
from tokenizers import Tokenizer

TEMPLATE = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
CONDITIONS = ("timestep_proj", "rotary_cos", "rotary_sin")


def read_manifest(folder: Path) -> dict:
    """Return what the exporter noted about the folder."""
    return json.loads((folder / "fluxonnx.json").read_text())


def open_graph(folder: Path, component: str) -> InferenceSession:
    """Open a graph such that each bf16 weight is cast when it is needed, and freed afterwards."""
    builds = read_manifest(folder)["builds"]
    build = next(name for name in builds if name.endswith("portable"))
    path = folder / builds[build]["components"][component]["graph"]
    options = SessionOptions()
    options.enable_mem_pattern = options.enable_mem_reuse = False
    disabled = ["ConstantFolding"] if component in ("text_encoder", "transformer") else []
    return InferenceSession(path, options, providers=["CPUExecutionProvider"], disabled_optimizers=disabled)


def encode(folder: Path, prompt: str, length: int) -> np.ndarray:
    """Return the embeddings of a prompt, float32 [1, length, 3 * hidden]."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer/tokenizer.json"))
    ids = tokenizer.encode(TEMPLATE.format(prompt), add_special_tokens=False).ids[:length]
    padding = length - len(ids)
    padded = np.array([ids + [tokenizer.token_to_id("<|endoftext|>")] * padding], np.int64)
    mask = np.array([[1] * len(ids) + [0] * padding], np.int64)
    return open_graph(folder, "text_encoder").run(None, {"input_ids": padded, "attention_mask": mask})[0].copy()


def schedule(tokens: int, steps: int) -> np.ndarray:
    """Return the noise levels, float32 [steps + 1], from 1 down to 0."""
    at_10, at_200 = 8.73809524e-05 * tokens + 1.89833333, 0.00016927 * tokens + 0.45666666
    mu = at_200 if tokens > 4300 else at_200 + (at_200 - at_10) / 190 * (steps - 200)
    linear = np.linspace(1, 1 / steps, steps).astype(np.float32)
    return np.append(math.exp(mu) / (math.exp(mu) + (1 / linear - 1)), 0).astype(np.float32)


def draw(folder: Path, prompt: str, noise: np.ndarray, steps: int = 4) -> np.ndarray:
    """Turn noise [1, channels, height / 16, width / 16] into a picture, uint8 [height, width, 3]."""
    length = read_manifest(folder)["defaults"].get("max_sequence_length", 512)
    _, channels, rows, columns = noise.shape
    embeds = encode(folder, prompt, length)
    txt_ids, img_ids = np.zeros((length, 4), np.int64), np.zeros((rows * columns, 4), np.int64)
    txt_ids[:, 3] = np.arange(length)
    img_ids[:, 1:3] = np.indices((rows, columns)).reshape(2, -1).T
    latents = noise.reshape(1, channels, -1).transpose(0, 2, 1)  # [1, rows * columns, channels]

    conditioning, transformer = open_graph(folder, "conditioning"), open_graph(folder, "transformer")
    for sigma, following in pairwise(schedule(rows * columns, steps)):
        timestep = np.array([sigma * np.float32(1000) / np.float32(1000)])
        values = conditioning.run(CONDITIONS, {"timestep": timestep, "txt_ids": txt_ids, "img_ids": img_ids})
        inputs = dict(zip(CONDITIONS, values, strict=True), hidden_states=latents, encoder_hidden_states=embeds)
        latents = latents + (following - sigma) * transformer.run(["velocity"], inputs)[0]

    grid = latents.transpose(0, 2, 1).reshape(noise.shape)
    sample = open_graph(folder, "vae_decoder").run(["sample"], {"latents": grid})[0][0]
    return np.round(np.clip(sample / 2 + 0.5, 0, 1) * 255).astype(np.uint8).transpose(1, 2, 0)


if __name__ == "__main__":
    if len(sys.argv) not in (4, 7):
        sys.exit(__doc__)
    folder, prompt, output, *given = sys.argv[1:]
    height, width = map(int, given[1:] or (128, 128))
    channels = open_graph(Path(folder), "vae_decoder").get_inputs()[0].shape[1]
    shape = (1, channels, height // 16, width // 16)
    if given:
        noise = np.fromfile(given[0], np.float32).reshape(shape)
    else:
        noise = np.random.default_rng(42).standard_normal(shape, np.float32)
    picture = draw(Path(folder), prompt, noise)
    Path(output).write_bytes(b"P6 %d %d 255\n" % (width, height) + picture.tobytes())
