"""The text encoder and transformer in training, and batches for them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import CONFIG, SIDE, tokens_of
from diffusers import Flux2Transformer2DModel
from scenes import TEXTURES
from sight import QUESTIONS
from text_labels import EDITS
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import Qwen3Config, Qwen3ForCausalLM

from benchmarks.architectures import TextEncoderSize

PAD = "<|endoftext|>"
# Prompts are padded to a multiple of this.
STRIDE = 8


@dataclass
class Batch:
    """Some tasks with the same number of reference pictures.

    Attributes:
        ids, mask: int64 [batch, text_seq].
        target: float32 [batch, 64, channels].
        references: float32 [batch, 64 * references, channels].
        labels: int64 [batch, questions], see text_labels.py; -1 where the prompt was dropped.
        seen: int64 [batch, 64 * (1 + references), questions], see sight.py: what is where in the target, -1 where the
            prompt was dropped, and in the references.
    """

    ids: Tensor
    mask: Tensor
    target: Tensor
    references: Tensor
    labels: Tensor
    seen: Tensor


class Pool:
    """The tasks that make_pool.py wrote."""

    def __init__(self, work: Path):
        with np.load(work / "pool.npz") as file:
            self.latents, self.ids, self.pictures = file["latents"], file["ids"].astype(np.int64), file["pictures"]
            self.labels, self.seen = file["labels"].astype(np.int64), file["seen"]
        self.tokenizer = Tokenizer.from_file(str(work / "tokenizer/tokenizer.json"))
        self.nothing = tokens_of(self.tokenizer, "")
        self.often = np.where(self.labels[:, 0] == EDITS.index("texture"), CONFIG["pool"]["texture_edits"], 1.0)
        self.seed(0)
        counts = (self.pictures >= 0).sum(1) - 1
        lengths = -(-(self.ids >= 0).sum(1) // STRIDE)
        # Tasks with as many references and about as long prompts, so that little of a batch is padding.
        self.groups = [
            (n, np.flatnonzero((counts == n) & (lengths == length)))
            for n in range(3)
            for length in np.unique(lengths[counts == n])
        ]

    def seed(self, seed: int, rank: int = 0) -> None:
        """Start the random choices anew; those of the form of a batch are the same in all processes."""
        self.shared = np.random.default_rng(seed)
        self.rng = np.random.default_rng((seed, rank))

    def batch(self, size: int, dropout: float = 0.0, edits: float = 0.35) -> Batch:
        """Draw some tasks, edits of textures more often; a share of the prompts is replaced by the empty one."""
        edit = self.shared.random() < edits
        share = np.array([len(rows) * ((count > 0) == edit) for count, rows in self.groups], np.float64)
        count, group = self.groups[self.shared.choice(len(share), p=share / share.sum())]
        often = self.often[group]
        rows = self.rng.choice(group, size, p=often / often.sum())
        dropped = self.rng.random(size) < dropout
        prompts = [self.nothing if no else list(row[row >= 0]) for row, no in zip(self.ids[rows], dropped, strict=True)]
        # Now and then as long as prompts are padded to when the model is used.
        ids, mask = padded(self.tokenizer, prompts, CONFIG["flow"]["text_length"] if self.shared.random() < 0.2 else 0)
        pictures = torch.from_numpy(self.latents[self.pictures[rows, : count + 1]]).float()
        labels = np.where(dropped[:, None], -1, self.labels[rows])
        seen = torch.from_numpy(self.seen[self.pictures[rows, : count + 1]]).long()
        seen[torch.from_numpy(dropped), 0] = -1
        references = pictures[:, 1:].flatten(1, 2)
        return Batch(ids, mask, pictures[:, 0], references, torch.from_numpy(labels), seen.flatten(1, 2))


def padded(tokenizer: Tokenizer, prompts: Sequence[Sequence[int]], length: int = 0) -> tuple[Tensor, Tensor]:
    """Pad prompts on the right, to a multiple of 8 and to a length: int64 ids and mask, [batch, text_seq]."""
    length = max(length, -(-max(map(len, prompts)) // STRIDE) * STRIDE)
    ids = np.full((len(prompts), length), tokenizer.token_to_id(PAD))
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


def new_flow(tokenizer: Tokenizer) -> Flow:
    """A model of the config's sizes that has learned nothing."""
    return Flow(tokenizer.get_vocab_size(), 4 * CONFIG["vae"]["model"]["latent_channels"])


def load_flow(checkpoint: Path, tokenizer: Tokenizer) -> Flow:
    """The averaged weights of a base or distilled model in training, to be used and not trained."""
    flow = new_flow(tokenizer)
    flow.load_state_dict(torch.load(checkpoint)["average"]["flow"])
    return flow.eval()


def velocity_loss(velocity: Tensor, target: Tensor, batch: Batch) -> tuple[Tensor, dict[str, float]]:
    """Squared error, with more weight on the few tokens that matter.

    Those are where a thing is, as most of a picture is background, textured ones above all; and those that an edit
    changes, as copying all is a way out.

    Returns:
        The loss; and for the log, the error without weights.
    """
    config, count = CONFIG["flow"], target.shape[1]
    error = (velocity - target).square().mean(-1)
    thing, texture = (batch.seen[:, :count, list(QUESTIONS).index(question)] for question in ("thing", "texture"))
    subject, name = thing == 1, "pictures"
    if batch.references.shape[1]:
        changed = (batch.target - batch.references[:, :count]).abs().mean(-1) > 0.3
        subject, name = subject | changed, "edits"
    weight = torch.where(subject, config["subject"], 1.0).masked_fill(
        texture > TEXTURES.index("solid"), config["textured"]
    )
    return (weight * error).sum() / weight.sum(), {name: error.mean().item()}


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
