"""Step 2: the tokenizer, and tasks with their pictures as latents, so that training never draws or encodes.

python models/tiny-klein/training/make_pool.py WORK
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from random import Random

import numpy as np
import torch
from common import CONFIG, to_tensor, tokens_of
from diffusers import AutoencoderKLFlux2
from scenes import Scene, draw
from tasks import Task, training_task
from tokenizers import Tokenizer
from train_vae import patchify

from benchmarks.make_checkpoint import write_tokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description="make the tokenizer and the pool of tasks")
    parser.add_argument("work", type=Path, help="folder with the trained autoencoder")
    work = parser.parse_args().work
    config = CONFIG["pool"]
    random = Random(CONFIG["seed"] + 10)
    tasks = [training_task(random) for _ in range(config["tasks"])]
    words = ["user assistant", *(task.prompt for task in tasks)]
    write_tokenizer(work / "tokenizer", words, config["vocabulary"])

    vae = AutoencoderKLFlux2.from_pretrained(work / "vae").eval().to(memory_format=torch.channels_last)
    scenes = [scene for task in tasks for scene in (task.target, *task.sources)]
    latents = np.concatenate([encode(vae, scenes[i : i + 64]) for i in range(0, len(scenes), 64)])
    np.savez(work / "pool.npz", latents=latents, **index(tasks, work / "tokenizer"))
    print(f"{len(tasks)} tasks, {len(scenes)} pictures")


@torch.no_grad()
def encode(vae: AutoencoderKLFlux2, scenes: Sequence[Scene]) -> np.ndarray:
    """Normalised tokens of some pictures: float16 [pictures, 64, channels]."""
    pictures = to_tensor(draw(scene) for scene in scenes).contiguous(memory_format=torch.channels_last)
    latents = patchify(vae.encode(pictures).latent_dist.mode())
    mean, variance = (v.view(1, -1, 1, 1) for v in (vae.bn.running_mean, vae.bn.running_var))
    normal = (latents - mean) / torch.sqrt(variance + vae.config.batch_norm_eps)
    return normal.flatten(2).transpose(1, 2).half().numpy()


def index(tasks: Sequence[Task], tokenizer: Path) -> dict[str, np.ndarray]:
    """The token ids of each task's prompt (-1: none), and which pictures are its target and its sources (-1: none)."""
    encoder = Tokenizer.from_file(str(tokenizer / "tokenizer.json"))
    prompts = [tokens_of(encoder, task.prompt) for task in tasks]
    ids = np.full((len(tasks), max(map(len, prompts))), -1, np.int16)
    pictures = np.full((len(tasks), 3), -1, np.int32)
    drawn = 0
    for row, (task, prompt) in enumerate(zip(tasks, prompts, strict=True)):
        ids[row, : len(prompt)] = prompt
        count = 1 + len(task.sources)
        pictures[row, :count] = range(drawn, drawn + count)
        drawn += count
    return {"ids": ids, "pictures": pictures}


if __name__ == "__main__":
    main()
