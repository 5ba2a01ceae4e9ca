"""The text encoder and transformer in training, and batches for them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import CONFIG, SIDE, tokens_of
from diffusers import Flux2Transformer2DModel
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import Qwen3Config, Qwen3ForCausalLM

from benchmarks.architectures import TextEncoderSize

PAD = "<|endoftext|>"


@dataclass
class Batch:
    """Some tasks with the same number of reference pictures.

    Attributes:
        ids, mask: int64 [batch, text_seq].
        target: float32 [batch, 64, channels].
        references: float32 [batch, 64 * references, channels].
    """

    ids: Tensor
    mask: Tensor
    target: Tensor
    references: Tensor


class Pool:
    """The tasks that make_pool.py wrote."""

    def __init__(self, work: Path, seed: int):
        with np.load(work / "pool.npz") as file:
            self.latents, self.ids, self.pictures = file["latents"], file["ids"].astype(np.int64), file["pictures"]
        self.tokenizer = Tokenizer.from_file(str(work / "tokenizer/tokenizer.json"))
        self.pad = self.tokenizer.token_to_id(PAD)
        self.nothing = np.array(tokens_of(self.tokenizer, ""))
        self.rng = np.random.default_rng(seed)
        counts = (self.pictures >= 0).sum(1) - 1
        self.by_count = [np.flatnonzero(counts == n) for n in range(3)]
        self.share = np.array([len(rows) for rows in self.by_count]) / len(counts)

    def batch(self, size: int, dropout: float = 0.0) -> Batch:
        """Draw some tasks; a share of the prompts is replaced by the empty one."""
        count = self.rng.choice(3, p=self.share)
        rows = self.rng.choice(self.by_count[count], size)
        prompts = [row[row >= 0] for row in self.ids[rows]]
        prompts = [self.nothing if self.rng.random() < dropout else prompt for prompt in prompts]
        ids, mask = self.padded(prompts, int(self.rng.choice([0, 8, 16, 32], p=[0.6, 0.2, 0.1, 0.1])))
        pictures = torch.from_numpy(self.latents[self.pictures[rows, : count + 1]]).float()
        return Batch(ids, mask, pictures[:, 0], pictures[:, 1:].flatten(1, 2))

    def padded(self, prompts: list[np.ndarray], extra: int = 0) -> tuple[Tensor, Tensor]:
        """Pad on the right, to a multiple of 8 and then some more."""
        length = -(-max(map(len, prompts)) // 8) * 8 + extra
        ids = np.full((len(prompts), length), self.pad)
        mask = np.zeros((len(prompts), length), np.int64)
        for row, prompt in enumerate(prompts):
            ids[row, : len(prompt)] = prompt
            mask[row, : len(prompt)] = 1
        return torch.from_numpy(ids), torch.from_numpy(mask)


class Flow(nn.Module):
    """Velocity of the latents, given a prompt and reference pictures."""

    def __init__(self, vocabulary: int, channels: int):
        super().__init__()
        config = CONFIG["flow"]
        size = TextEncoderSize(**config["text_encoder"], vocab=vocabulary)
        self.out_layers: list[int] = config["out_layers"]
        self.text_encoder = Qwen3ForCausalLM(Qwen3Config(**qwen_config(size)))
        self.transformer = Flux2Transformer2DModel(
            in_channels=channels,
            joint_attention_dim=len(self.out_layers) * size.hidden,
            guidance_embeds=False,
            **config["transformer"],
        )
        with torch.no_grad():
            # Blocks start as identities, the velocity as zero (Peebles and Xie, Scalable Diffusion Models with
            # Transformers, 2023).
            for name, parameter in self.transformer.named_parameters():
                if "modulation" in name or name.startswith(("proj_out", "norm_out")):
                    parameter.zero_()

    def encode(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Prompt embeddings: float32 [batch, text_seq, 3 * hidden]."""
        states = self.text_encoder.model(
            input_ids=ids, attention_mask=mask, output_hidden_states=True, use_cache=False
        ).hidden_states
        return torch.cat([states[layer] for layer in self.out_layers], -1)

    def velocity(self, noisy: Tensor, sigma: Tensor, prompt: Tensor, references: Tensor, txt_ids: Tensor) -> Tensor:
        """Velocity of noisy tokens [batch, 64, channels] at noise levels [batch]."""
        count = references.shape[1] // (SIDE * SIDE)
        return self.transformer(
            hidden_states=torch.cat([noisy, references], 1),
            encoder_hidden_states=prompt,
            timestep=sigma,
            img_ids=torch.cat([image_ids(10 * n) for n in range(count + 1)]),
            txt_ids=txt_ids,
            return_dict=False,
        )[0][:, : noisy.shape[1]]


def qwen_config(size: TextEncoderSize) -> dict[str, Any]:
    """The config of the text encoder, for transformers."""
    config = size.config("float32")
    return {key: value for key, value in config.items() if key not in ("architectures", "torch_dtype", "model_type")}


def image_ids(t: int) -> Tensor:
    """Positions of a picture's tokens: int64 [64, 4]."""
    return torch.cartesian_prod(torch.tensor([t]), torch.arange(SIDE), torch.arange(SIDE), torch.tensor([0]))


def text_ids(positions: Tensor) -> Tensor:
    """Positions of text tokens: int64 [text_seq, 4]."""
    return torch.stack([torch.zeros_like(positions)] * 3 + [positions], -1)


def training_positions(mask: Tensor, rng: np.random.Generator) -> Tensor:
    """Positions of text tokens, those of nothing but padding anywhere up to 512, so that the model knows them all."""
    length, words = mask.shape[1], int(mask.sum(1).max())
    padding = np.sort(rng.choice(np.arange(words, 512), length - words, replace=False))
    return torch.from_numpy(np.concatenate([np.arange(words), padding]))
