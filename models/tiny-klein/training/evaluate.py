"""Step 8: scores on prompts whose compositions were never seen in training, and a contact sheet.

python models/tiny-klein/training/evaluate.py MODEL [--count 200] [--sheet FILE] [--precision NAME]
"""

from __future__ import annotations

import argparse
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random

import numpy as np
from checker import judge
from PIL import Image, ImageDraw
from scenes import draw
from tasks import Task, held_out_task

import fluxonnx

SEED = 1000

Painter = Callable[[Sequence[Task], Sequence[int]], Sequence[np.ndarray]]
# What is asked about each kind of task; the first of a pair are for the table.
QUESTIONS = {
    "single": ("colour", "shape", "background", "place", "texture", "all"),
    "relation": ("place", "colour", "shape", "background", "all"),
    "several": ("count", "colour", "shape", "background", "all"),
    "edit": ("change", "rest", "all"),
    "two references": ("change", "rest", "all"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description="score a model")
    parser.add_argument("model", type=Path)
    parser.add_argument("--count", type=int, default=200, help="tasks of each kind (default: %(default)s)")
    parser.add_argument("--sheet", type=Path, metavar="FILE", help="write a contact sheet of 64 prompts here")
    parser.add_argument("--precision", metavar="NAME", help="default: bf16")
    parser.add_argument("--steps", type=int, metavar="N")
    parser.add_argument("--guidance", type=float, metavar="X")
    arguments = parser.parse_args()
    options = {"steps": arguments.steps, "guidance_scale": arguments.guidance}
    with fluxonnx.load(arguments.model, precision=arguments.precision) as flux:

        def painter(tasks: Sequence[Task], seeds: Sequence[int]) -> list[np.ndarray]:
            return [paint(flux, task, seed, options) for task, seed in zip(tasks, seeds, strict=True)]

        print(table(score(painter, arguments.count)))
        if arguments.sheet:
            contact_sheet(painter).save(arguments.sheet)


def paint(flux: fluxonnx.Flux, task: Task, seed: int, options: dict) -> np.ndarray:
    """Make the picture of a task: uint8 [128, 128, 3]."""
    if task.sources:
        references = [Image.fromarray(draw(scene)) for scene in task.sources]
        return np.asarray(flux.edit(task.prompt, references, seed=seed, **options))
    return np.asarray(flux.generate(task.prompt, 128, 128, seed=seed, **options))


def score(painter: Painter, count: int) -> dict[str, dict[str, float]]:
    """Return, per kind of task and question, the share of pictures that are right."""
    scores: dict[str, dict[str, float]] = {}
    for kind, questions in QUESTIONS.items():
        random = Random(SEED)
        tasks = [held_out_task(random, kind) for _ in range(count)]
        pictures = painter(tasks, [SEED + i for i in range(count)])
        marks = [judge(task, picture) for task, picture in zip(tasks, pictures, strict=True)]
        scores[kind] = {question: float(np.mean([mark[question] for mark in marks])) for question in questions}
    return scores


def table(scores: dict[str, dict[str, float]]) -> str:
    """Lay the scores out in Markdown."""
    lines = ["| task | what is right |", "|---|---|"]
    for kind, marks in scores.items():
        lines.append(f"| {kind} | {', '.join(f'{name} {share:.1%}' for name, share in marks.items())} |")
    return "\n".join(lines)


def contact_sheet(painter: Painter) -> Image.Image:
    """Draw the first 64 held-out prompts of a fixed seed, with what was asked below each."""
    random = Random(SEED + 1)
    kinds = [random.choices(("single", "relation", "several"), (0.5, 0.3, 0.2))[0] for _ in range(64)]
    tasks = [held_out_task(random, kind) for kind in kinds]
    pictures = painter(tasks, [SEED + i for i in range(64)])
    sheet = Image.new("RGB", (8 * 140, 8 * 176), "white")
    pen = ImageDraw.Draw(sheet)
    for i, (task, picture) in enumerate(zip(tasks, pictures, strict=True)):
        left, top = 140 * (i % 8) + 6, 176 * (i // 8) + 4
        sheet.paste(Image.fromarray(picture), (left, top))
        for line, words in enumerate(textwrap.wrap(task.prompt, 25)[:4]):
            pen.text((left, top + 130 + 10 * line), words, fill="black", font_size=9)
    return sheet


if __name__ == "__main__":
    main()
