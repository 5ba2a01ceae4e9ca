"""Step 2: make the tokenizer and a pool of tasks with encoded pictures, so that later steps need not draw or encode.

python models/tiny-klein/training/make_pool.py WORK

The source pictures of edits have captions too, so each of them is an additional task at no extra cost.
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
from common import CONFIG, prompt_tokens
from diffusers import AutoencoderKLFlux2
from latents import encode
from probe import token_labels
from scenes import draw
from tasks import Task, training_task
from text_labels import labels
from tokenizers import Tokenizer

from tools.make_checkpoint import write_tokenizer

# Tasks per unit of work of a process.
TASKS_PER_PART = 64


def main() -> None:
    parser = argparse.ArgumentParser(description="make the tokenizer and the pool of tasks")
    parser.add_argument("work", type=Path, help="folder with the trained autoencoder")
    parser.add_argument("--only-tokenizer", action="store_true", help="make no pool, which train_text.py does not need")
    arguments = parser.parse_args()
    work, config = arguments.work, CONFIG["pool"]
    if not (work / "tokenizer").exists():
        random = Random(CONFIG["seed"] + 11)
        words = ["user assistant", *(training_task(random).prompt for _ in range(8000))]
        write_tokenizer(work / "tokenizer", words, config["vocabulary"])
    if arguments.only_tokenizer:
        return

    firsts = range(0, config["tasks"], TASKS_PER_PART)
    parts = []
    with torch.multiprocessing.get_context("spawn").Pool(CONFIG["processes"]) as processes:
        for part in processes.imap(make_part, ((work, first) for first in firsts)):
            parts.append(part)
            if len(parts) % 50 == 0:
                print(f"{len(parts)} of {len(firsts)} parts", flush=True)
    groups, latents, answers = zip(*parts, strict=True)
    tasks = [task for group in groups for task in group]
    indices = index(tasks, work / "tokenizer")
    np.savez(work / "pool.npz", latents=np.concatenate(latents), seen=np.concatenate(answers), **indices)
    print(f"{len(tasks)} tasks, {sum(map(len, answers))} pictures")


def make_part(part: tuple[Path, int]) -> tuple[list[Task], np.ndarray, np.ndarray]:
    """Make one part of the pool, in a worker process.

    Args:
        part: the work folder, and the index of the part's first task.

    Returns:
        The tasks; the latents of their pictures, target before sources (float16 [pictures, 64, channels]); and the
        token labels of these pictures (int8 [pictures, 64, questions], see probe.py).
    """
    (work, first), config = part, CONFIG["pool"]
    torch.set_num_threads(1)
    random = Random(CONFIG["seed"] + 1000 * (first // TASKS_PER_PART) + 10)
    count = min(TASKS_PER_PART, config["tasks"] - first)
    tasks = [training_task(random, edits=config["edits"], plain=config["plain"]) for _ in range(count)]
    scenes = [scene for task in tasks for scene in (task.target, *task.sources)]
    return tasks, encode(load_vae(work), map(draw, scenes)).half().numpy(), np.stack(list(map(token_labels, scenes)))


@cache
def load_vae(work: Path) -> AutoencoderKLFlux2:
    """Load the trained autoencoder."""
    return AutoencoderKLFlux2.from_pretrained(work / "vae").eval()


def index(tasks: Sequence[Task], tokenizer: Path) -> dict[str, np.ndarray]:
    """Return the arrays that describe the tasks, those of source pictures included.

    Returns:
        ids (int16, tokens of each prompt, padded with -1), pictures (int32 [tasks, 3], indices of target and sources,
        -1 for none) and labels (int8 [tasks, questions], see text_labels.py).
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
    prompts = [prompt_tokens(encoder, task.prompt) for task, _ in rows]
    ids = np.full((len(rows), max(map(len, prompts))), -1, np.int16)
    pictures = np.full((len(rows), 3), -1, np.int32)
    for row, ((_, own), prompt) in enumerate(zip(rows, prompts, strict=True)):
        ids[row, : len(prompt)] = prompt
        pictures[row, : len(own)] = own
    return {"ids": ids, "pictures": pictures, "labels": np.array([labels(task) for task, _ in rows], np.int8)}


if __name__ == "__main__":
    main()
