"""Step 2: the tokenizer, and tasks with their pictures as latents, so that training never draws or encodes.

python models/tiny-klein/training/make_pool.py WORK

The pictures that edits refer to have captions too, so that each is a task of its own that costs nothing more.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from random import Random

import numpy as np
import torch
import torch.multiprocessing
from common import CONFIG, tokens_of
from diffusers import AutoencoderKLFlux2
from latents import encode
from scenes import draw
from sight import token_labels
from tasks import Task, training_task
from text_labels import labels
from tokenizers import Tokenizer

from benchmarks.make_checkpoint import write_tokenizer

# Tasks that a process makes at a time.
TOGETHER = 64


def main() -> None:
    parser = argparse.ArgumentParser(description="make the tokenizer and the pool of tasks")
    parser.add_argument("work", type=Path, help="folder with the trained autoencoder")
    parser.add_argument("--only-tokenizer", action="store_true", help="all that the text encoder's first step needs")
    arguments = parser.parse_args()
    work, config = arguments.work, CONFIG["pool"]
    if not (work / "tokenizer").exists():
        random = Random(CONFIG["seed"] + 11)
        words = ["user assistant", *(training_task(random).prompt for _ in range(8000))]
        write_tokenizer(work / "tokenizer", words, config["vocabulary"])
    if arguments.only_tokenizer:
        return

    firsts = range(0, config["tasks"], TOGETHER)
    parts = []
    with torch.multiprocessing.get_context("spawn").Pool(CONFIG["processes"]) as processes:
        for part in processes.imap(make_part, ((work, first) for first in firsts)):
            parts.append(part)
            if len(parts) % 50 == 0:
                print(f"{len(parts)} of {len(firsts)} parts", flush=True)
    groups, latents, seen = zip(*parts, strict=True)
    tasks = [task for group in groups for task in group]
    indices = index(tasks, work / "tokenizer")
    np.savez(work / "pool.npz", latents=np.concatenate(latents), seen=np.concatenate(seen), **indices)
    print(f"{len(tasks)} tasks, {sum(map(len, seen))} pictures")


def make_part(part: tuple[Path, int]) -> tuple[list[Task], np.ndarray, np.ndarray]:
    """Draw some tasks, from the one of this number on, and encode their pictures, in a process of its own.

    Returns:
        The tasks; and of each one's target and sources, one after the other, the latents (float16 [pictures, 64,
        channels]) and what is seen where (int8 [pictures, 64, questions], see sight.py).
    """
    (work, first), config = part, CONFIG["pool"]
    torch.set_num_threads(1)
    random = Random(CONFIG["seed"] + 1000 * (first // TOGETHER) + 10)
    count = min(TOGETHER, config["tasks"] - first)
    tasks = [training_task(random, edits=config["edits"], plain=config["plain"]) for _ in range(count)]
    scenes = [scene for task in tasks for scene in (task.target, *task.sources)]
    return tasks, encode(load_vae(work), map(draw, scenes)).half().numpy(), np.stack(list(map(token_labels, scenes)))


@cache
def load_vae(work: Path) -> AutoencoderKLFlux2:
    """Load the trained autoencoder."""
    return AutoencoderKLFlux2.from_pretrained(work / "vae").eval()


def index(tasks: Sequence[Task], tokenizer: Path) -> dict[str, np.ndarray]:
    """Describe the tasks.

    Returns:
        ids (int16, the tokens of each prompt, -1: none), pictures (int32 [tasks, 3], target and sources, -1: none),
        labels (int8, see text_labels.py).
    """
    encoder = Tokenizer.from_file(str(tokenizer / "tokenizer.json"))
    rows: list[tuple[Task, list[int]]] = []
    drawn = 0
    for task in tasks:
        own = [drawn + i for i in range(1 + len(task.sources))]
        drawn += len(own)
        rows.append((task, own))
        for picture, scene, prompt in zip(own[1:], task.sources, task.source_prompts, strict=True):
            rows.append((Task("source", prompt, scene), [picture]))
    prompts = [tokens_of(encoder, task.prompt) for task, _ in rows]
    ids = np.full((len(rows), max(map(len, prompts))), -1, np.int16)
    pictures = np.full((len(rows), 3), -1, np.int32)
    for row, ((_, own), prompt) in enumerate(zip(rows, prompts, strict=True)):
        ids[row, : len(prompt)] = prompt
        pictures[row, : len(own)] = own
    return {"ids": ids, "pictures": pictures, "labels": np.array([labels(task) for task, _ in rows], np.int8)}


if __name__ == "__main__":
    main()
