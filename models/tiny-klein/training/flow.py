"""The trainable text encoder and transformer, their batches and the loss."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import CONFIG, SIDE, prompt_tokens
from diffusers import Flux2Transformer2DModel
from probe import QUESTIONS
from scenes import TEXTURES
from text_labels import EDITS
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import Qwen3Config, Qwen3ForCausalLM

from tools.architectures import TextEncoderSize

PAD = "<|endoftext|>"
# Prompts are padded to a multiple of this number of tokens.
PAD_MULTIPLE = 8


@dataclass
class Batch:
    """A batch of tasks with the same number of reference pictures.

    Attributes:
        ids, mask: int64 [batch, text_seq].
        target: float32 [batch, 64, channels].
        references: float32 [batch, 64 * references, channels].
        labels: int64 [batch, questions], labels of the prompts (see text_labels.py); -1 where the prompt was dropped.
        token_labels: int64 [batch, 64 * (1 + references), questions], labels of the tokens of the target and of the
            references (see probe.py); those of the target are -1 where the prompt was dropped.
    """

    ids: Tensor
    mask: Tensor
    target: Tensor
    references: Tensor
    labels: Tensor
    token_labels: Tensor


class Pool:
    """The tasks in the file that make_pool.py wrote."""

    def __init__(self, work: Path):
        with np.load(work / "pool.npz") as file:
            self.latents, self.ids, self.pictures = file["latents"], file["ids"].astype(np.int64), file["pictures"]
            self.labels, self.token_labels = file["labels"].astype(np.int64), file["seen"]
        self.tokenizer = Tokenizer.from_file(str(work / "tokenizer/tokenizer.json"))
        self.empty_prompt = prompt_tokens(self.tokenizer, "")
        self.sampling_weights = np.where(
            self.labels[:, 0] == EDITS.index("texture"), CONFIG["pool"]["texture_edits"], 1.0
        )
        self.seed(0)
        counts = (self.pictures >= 0).sum(1) - 1
        lengths = -(-(self.ids >= 0).sum(1) // PAD_MULTIPLE)
        # Group tasks by number of references and by length of the padded prompt, so that batches have little padding.
        self.groups = [
            (n, np.flatnonzero((counts == n) & (lengths == length)))
            for n in range(3)
            for length in np.unique(lengths[counts == n])
        ]

    def seed(self, seed: int, rank: int = 0) -> None:
        """Seed the random generators. The one that decides the shape of a batch is the same in all processes."""
        self.shared_rng = np.random.default_rng(seed)
        self.rng = np.random.default_rng((seed, rank))

    def batch(self, size: int, dropout: float = 0.0, edits: float = 0.35) -> Batch:
        """Draw tasks, with texture edits oversampled. A share `dropout` of the prompts is replaced by the empty one."""
        edit = self.shared_rng.random() < edits
        share = np.array([len(rows) * ((count > 0) == edit) for count, rows in self.groups], np.float64)
        count, group = self.groups[self.shared_rng.choice(len(share), p=share / share.sum())]
        sampling_weights = self.sampling_weights[group]
        rows = self.rng.choice(group, size, p=sampling_weights / sampling_weights.sum())
        dropped = self.rng.random(size) < dropout
        prompts = [
            self.empty_prompt if no else list(row[row >= 0]) for row, no in zip(self.ids[rows], dropped, strict=True)
        ]
        # Sometimes pad to the full length, which is what inference does.
        ids, mask = pad_prompts(
            self.tokenizer, prompts, CONFIG["flow"]["text_length"] if self.shared_rng.random() < 0.2 else 0
        )
        pictures = torch.from_numpy(self.latents[self.pictures[rows, : count + 1]]).float()
        labels = np.where(dropped[:, None], -1, self.labels[rows])
        token_labels = torch.from_numpy(self.token_labels[self.pictures[rows, : count + 1]]).long()
        token_labels[torch.from_numpy(dropped), 0] = -1
        references = pictures[:, 1:].flatten(1, 2)
        return Batch(ids, mask, pictures[:, 0], references, torch.from_numpy(labels), token_labels.flatten(1, 2))


def pad_prompts(tokenizer: Tokenizer, prompts: Sequence[Sequence[int]], length: int = 0) -> tuple[Tensor, Tensor]:
    """Pad prompts on the right, to a multiple of 8 and at least to `length`: int64 ids and mask, [batch, text_seq]."""
    length = max(length, -(-max(map(len, prompts)) // PAD_MULTIPLE) * PAD_MULTIPLE)
    ids = np.full((len(prompts), length), tokenizer.token_to_id(PAD))
    mask = np.zeros((len(prompts), length), np.int64)
    for row, prompt in enumerate(prompts):
        ids[row, : len(prompt)] = prompt
        mask[row, : len(prompt)] = 1
    return torch.from_numpy(ids), torch.from_numpy(mask)


class Flow(nn.Module):
    """Predicts the velocity of latents from a prompt and reference pictures."""

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
            # Blocks start as the identity and the velocity as zero (Peebles and Xie, Scalable Diffusion Models with
            # Transformers, 2023).
            for name, parameter in self.transformer.named_parameters():
                if "modulation" in name or name.startswith(("proj_out", "norm_out")):
                    parameter.zero_()

    def encode(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Return the prompt embeddings: float32 [batch, text_seq, 3 * hidden]."""
        states = self.text_encoder.model(
            input_ids=ids, attention_mask=mask, output_hidden_states=True, use_cache=False
        ).hidden_states
        return torch.cat([states[layer] for layer in self.out_layers], -1)

    def velocity(self, noisy: Tensor, sigma: Tensor, prompt: Tensor, references: Tensor, txt_ids: Tensor) -> Tensor:
        """Return the velocity of noisy tokens [batch, 64, channels] at noise levels [batch]."""
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
    """Return an untrained model of the sizes in the config."""
    return Flow(tokenizer.get_vocab_size(), 4 * CONFIG["vae"]["model"]["latent_channels"])


def load_flow(checkpoint: Path, tokenizer: Tokenizer) -> Flow:
    """Load the averaged weights of a base or distilled checkpoint, for inference."""
    flow = new_flow(tokenizer)
    flow.load_state_dict(torch.load(checkpoint)["average"]["flow"])
    return flow.eval()


def velocity_loss(velocity: Tensor, target: Tensor, batch: Batch) -> tuple[Tensor, dict[str, float]]:
    """Return the weighted squared error.

    Tokens that show a thing have a larger weight, since most of a picture is background; those with a texture have the
    largest. So have tokens that an edit changes, since the model could otherwise settle for a copy of the reference.

    Returns:
        The loss, and the unweighted error for the log.
    """
    config, count = CONFIG["flow"], target.shape[1]
    error = (velocity - target).square().mean(-1)
    thing, texture = (
        batch.token_labels[:, :count, list(QUESTIONS).index(question)] for question in ("thing", "texture")
    )
    subject, name = thing == 1, "pictures"
    if batch.references.shape[1]:
        changed = (batch.target - batch.references[:, :count]).abs().mean(-1) > 0.3
        subject, name = subject | changed, "edits"
    weight = torch.where(subject, config["subject"], 1.0).masked_fill(
        texture > TEXTURES.index("solid"), config["textured"]
    )
    return (weight * error).sum() / weight.sum(), {name: error.mean().item()}


def qwen_config(size: TextEncoderSize) -> dict[str, Any]:
    """Return the arguments of transformers' Qwen3Config for the text encoder."""
    config = size.config("float32")
    return {key: value for key, value in config.items() if key not in ("architectures", "torch_dtype", "model_type")}


def image_ids(t: int) -> Tensor:
    """Return the position ids of a picture's tokens: int64 [64, 4]."""
    return torch.cartesian_prod(torch.tensor([t]), torch.arange(SIDE), torch.arange(SIDE), torch.tensor([0]))


def text_ids(positions: Tensor) -> Tensor:
    """Return the position ids of text tokens: int64 [text_seq, 4]."""
    return torch.stack([torch.zeros_like(positions)] * 3 + [positions], -1)


def training_positions(mask: Tensor, rng: np.random.Generator) -> Tensor:
    """Return positions of text tokens. Padding gets random positions below 512, so that the model has seen them all."""
    length, words = mask.shape[1], int(mask.sum(1).max())
    padding = np.sort(rng.choice(np.arange(words, 512), length - words, replace=False))
    return torch.from_numpy(np.concatenate([np.arange(words), padding]))
