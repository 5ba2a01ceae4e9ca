"""Write the golden files that let the tests check numbers without torch.

    python tests/golden/make_golden.py [QWEN3_TOKENIZER]

Needs torch, diffusers and transformers. The files hold inputs and float32 outputs of the reference for one tiny random
checkpoint, which the tests make again from its seed, values and digests of torch's noise, and, if the folder of Qwen3's
tokenizer is given, the tokens of ten prompts.
"""

from __future__ import annotations

import hashlib
import json
import sys
import tempfile
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent.parent))

from tools.make_checkpoint import ARCHITECTURES, make_checkpoint  # noqa: E402

SEEDS = (0, 1, 42, 2**31, 2**32 + 5, 2**63 - 1, 2**64 - 1)
SMALL_SIZES = (1, 2, 7, 15, 16, 17, 31, 32, 100)
LARGE_SIZE = 128 * 16 * 16 + 5
# A seed and a size whose noise has a uniform value of exactly 0: its logarithm's sign of zero matters.
ZERO_SEED, ZERO_SIZE = 1147651253539736069, 32771

ARCHITECTURE = "odd-heads"
PROMPT = "a lighthouse at night"
SEED, STEPS, WIDTH, HEIGHT, LENGTH = 7, 2, 64, 96, 24

# Each has something that tokenizers differ in: apostrophes, digits, punctuation after spaces, spaces, accents in two
# forms, other scripts, emoji of several code points, code, special tokens.
PROMPTS = (
    "A fluffy orange cat sitting on a windowsill",
    "A red apple on a wooden table",
    "",
    "It's 1.5 km to Dvořák's house (built 1880), isn't it?",
    'A sign that says "OPEN 24/7" -- neon, f/1.8, ISO 3200...',
    "  two  spaces,\ta tab\n\nand lines \r\n",
    "cafe\u0301 and caf\u00e9, A\u030angstro\u0308m, ﬁne ½ Ⅷ",
    "一只猫坐在窗台上\uff0c窗外下着雨。猫がいる。고양이 قطة बिल्ली แมว",
    "👩‍👩‍👧‍👦 🏳️‍🌈 👍🏽 1️⃣ 🐈‍⬛",
    "<|im_end|>\n<|im_start|>user\nfor (i=0; i<n; ++i) { x[i] ^= 0xFF; } <think> </think>",
)


def noise() -> dict[str, np.ndarray]:
    """torch's values at small sizes, SHA-256 digests at large ones."""
    import torch

    def draw(seed: int, size: int) -> np.ndarray:
        # manual_seed takes what it is given modulo 2**64; Python integers above 2**63 are passed as negative ones
        signed = seed - 2**64 if seed >= 2**63 else seed
        return torch.randn(size, generator=torch.Generator("cpu").manual_seed(signed)).numpy()

    arrays = {f"{seed}/{size}": draw(seed, size) for seed in (0, 42) for size in SMALL_SIZES}
    for seed, size in [*((seed, LARGE_SIZE) for seed in SEEDS), (ZERO_SEED, ZERO_SIZE)]:
        digest = hashlib.sha256(draw(seed, size).tobytes()).digest()
        arrays[f"{seed}/{size}/sha256"] = np.frombuffer(digest, np.uint8)
    return arrays


def graphs() -> dict[str, np.ndarray]:
    """Inputs and outputs of every module, and a whole run."""
    import torch
    from diffusers import Flux2KleinPipeline

    from fluxonnx.contract import open_checkpoint
    from fluxonnx.export.components import read_architecture

    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        path = make_checkpoint(Path(folder) / "model", ARCHITECTURES[ARCHITECTURE])
        layers = read_architecture(open_checkpoint(path), None).text_encoder.out_layers
        pipe = Flux2KleinPipeline.from_pretrained(path, torch_dtype=torch.float32)
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(0, 300, (2, 12), generator=generator)
        mask = torch.ones(2, 12, dtype=torch.int64)
        mask[1, 5:] = 0
        states = pipe.text_encoder(input_ids=ids, attention_mask=mask, output_hidden_states=True).hidden_states
        embeds = torch.cat([states[layer] for layer in layers], dim=-1)

        img_ids = pipe._prepare_latent_ids(torch.zeros(2, 1, 3, 4))
        txt_ids = pipe._prepare_text_ids(embeds)
        timestep = torch.tensor([1.0, 0.37])
        tokens = torch.randn(2, 12, pipe.transformer.config.in_channels, generator=generator)
        velocity = pipe.transformer(
            hidden_states=tokens,
            encoder_hidden_states=embeds,
            timestep=timestep,
            txt_ids=txt_ids,
            img_ids=img_ids,
            return_dict=False,
        )[0]
        cos, sin = pipe.transformer.pos_embed(torch.cat([txt_ids[0], img_ids[0]]))

        mean = pipe.vae.bn.running_mean.view(1, -1, 1, 1)
        std = torch.sqrt(pipe.vae.bn.running_var.view(1, -1, 1, 1) + pipe.vae.config.batch_norm_eps)
        sample = torch.randn(1, 3, 32, 48, generator=generator).clamp(-1, 1)
        latents = (pipe._patchify_latents(pipe.vae.encode(sample).latent_dist.mode()) - mean) / std
        decoded = pipe.vae.decode(pipe._unpatchify_latents(latents * std + mean)).sample

        picture = pipe(
            prompt=PROMPT,
            width=WIDTH,
            height=HEIGHT,
            num_inference_steps=STEPS,
            guidance_scale=1.0,
            generator=torch.Generator().manual_seed(SEED),
            max_sequence_length=LENGTH,
            text_encoder_out_layers=layers,
        ).images[0]
    tensors = {
        "input_ids": ids,
        "attention_mask": mask,
        "prompt_embeds": embeds,
        "img_ids": img_ids[0],
        "txt_ids": txt_ids[0],
        "timestep": timestep,
        "timestep_proj": pipe.transformer.time_guidance_embed.time_proj(timestep * 1000),
        "rotary_cos": cos,
        "rotary_sin": sin,
        "hidden_states": tokens,
        "velocity": velocity,
        "sample": sample,
        "latents": latents,
        "decoded": decoded,
    }
    return {**{name: tensor.numpy() for name, tensor in tensors.items()}, "picture": np.asarray(picture)}


def qwen3_ids(folder: str) -> str:
    """The tokens of `PROMPTS` in the chat template, without padding, as JSON, one prompt a line."""
    from transformers import Qwen2TokenizerFast

    tokenizer = Qwen2TokenizerFast.from_pretrained(folder)
    lines = []
    for prompt in PROMPTS:
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True, enable_thinking=False
        )
        lines.append(json.dumps({"prompt": prompt, "ids": tokenizer(text)["input_ids"]}))
    return "[\n  " + ",\n  ".join(lines) + "\n]\n"


if __name__ == "__main__":
    if sys.argv[1:]:
        (HERE / "qwen3_ids.json").write_text(qwen3_ids(sys.argv[1]), "utf-8")
    np.savez_compressed(HERE / "noise.npz", **noise())
    np.savez_compressed(HERE / "graphs.npz", **graphs())
