"""Step 8: score a model on held-out compositions, and draw a contact sheet.

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

GenerateBatch = Callable[[Sequence[Task], Sequence[int]], Sequence[np.ndarray]]
# The criteria of each kind of task, in the order of the table.
QUESTIONS = {
    "single": ("colour", "shape", "background", "place", "texture", "all"),
    "relation": ("place", "colour", "shape", "background", "all"),
    "several": ("count", "colour", "shape", "background", "all"),
    "edit": ("change", "rest", "all"),
    "two references": ("change", "rest", "all"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description="score a model")
    parser.add_argument("model", type=Path, help="model directory")
    parser.add_argument("--count", type=int, default=200, help="tasks of each kind (default: %(default)s)")
    parser.add_argument("--sheet", type=Path, metavar="FILE", help="also write a contact sheet of 64 prompts to FILE")
    parser.add_argument("--precision", metavar="NAME", help="precision of the build (default: bf16)")
    parser.add_argument("--steps", type=int, metavar="N", help="sampler steps (default: the model's)")
    parser.add_argument("--guidance", type=float, metavar="X", help="guidance scale (default: the model's)")
    arguments = parser.parse_args()
    options = {"steps": arguments.steps, "guidance_scale": arguments.guidance}
    with fluxonnx.load(arguments.model, precision=arguments.precision) as flux:

        def generate_batch(tasks: Sequence[Task], seeds: Sequence[int]) -> list[np.ndarray]:
            return [generate(flux, task, seed, options) for task, seed in zip(tasks, seeds, strict=True)]

        print(table(score(generate_batch, arguments.count)))
        if arguments.sheet:
            contact_sheet(generate_batch).save(arguments.sheet)


def generate(flux: fluxonnx.Flux, task: Task, seed: int, options: dict) -> np.ndarray:
    """Generate the picture of a task: uint8 [128, 128, 3]."""
    if task.sources:
        references = [Image.fromarray(draw(scene)) for scene in task.sources]
        return np.asarray(flux.edit(task.prompt, references, seed=seed, **options))
    return np.asarray(flux.generate(task.prompt, 128, 128, seed=seed, **options))


def score(generate_batch: GenerateBatch, count: int) -> dict[str, dict[str, float]]:
    """Return the share of pictures that meet each criterion, per kind of task."""
    scores: dict[str, dict[str, float]] = {}
    for kind, questions in QUESTIONS.items():
        random = Random(SEED)
        tasks = [held_out_task(random, kind) for _ in range(count)]
        pictures = generate_batch(tasks, [SEED + i for i in range(count)])
        results = [judge(task, picture) for task, picture in zip(tasks, pictures, strict=True)]
        scores[kind] = {question: float(np.mean([result[question] for result in results])) for question in questions}
    return scores


def table(scores: dict[str, dict[str, float]]) -> str:
    """Format the scores as a Markdown table."""
    lines = ["| task | what is right |", "|---|---|"]
    for kind, results in scores.items():
        lines.append(f"| {kind} | {', '.join(f'{name} {share:.1%}' for name, share in results.items())} |")
    return "\n".join(lines)


def contact_sheet(generate_batch: GenerateBatch) -> Image.Image:
    """Draw the pictures of the first 64 held-out prompts of a fixed seed, each above its prompt."""
    random = Random(SEED + 1)
    kinds = [random.choices(("single", "relation", "several"), (0.5, 0.3, 0.2))[0] for _ in range(64)]
    tasks = [held_out_task(random, kind) for kind in kinds]
    pictures = generate_batch(tasks, [SEED + i for i in range(64)])
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
