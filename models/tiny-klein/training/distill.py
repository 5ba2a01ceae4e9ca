"""Step 5: four steps without guidance instead of many with it: the distilled model.

At the noise levels of the sampler's four steps only, it learns the velocity that the base model has with guidance. Of
what the base model says, only the difference that guidance makes is taken; the rest of the target is the true
velocity, which the base model is still some way from (after Meng et al., On Distillation of Guided Diffusion Models,
2023, who take all of it from the base model). Edits, which guidance does not make better, learn the true velocity.

    python models/tiny-klein/training/distill.py WORK [--until HH:MM]
"""

from __future__ import annotations

import argparse
import copy

import numpy as np
import torch
from common import CONFIG, SIDE, parse
from flow import Batch, Flow, Pool, load_flow, padded, text_ids, training_positions, velocity_loss
from loop import Trainer
from parallel import together
from torch import Tensor
from train_flow import groups

from fluxonnx.runtime.schedule import flow_sigmas


def main() -> None:
    together(train, parse("distill the base model", "folder with the pool and the base model"))


def train(rank: int, arguments: argparse.Namespace) -> None:
    """What one of the processes does."""
    work, config = arguments.work, CONFIG["distillation"]
    pool = Pool(work)
    teacher = load_flow(work / "flow.pt", pool.tokenizer).requires_grad_(False)
    student = copy.deepcopy(teacher)
    student.transformer.requires_grad_(True)
    trainer = Trainer("student", arguments, config, {"flow": student}, *groups(student))
    trainer.seed(1, rank)
    pool.seed(CONFIG["seed"] + 30 + trainer.step, rank)

    def lesson(step: int) -> tuple[Tensor, dict[str, float]]:
        batch = pool.batch(config["batch"], edits=CONFIG["flow"]["edits"])
        positions = text_ids(training_positions(batch.mask, pool.shared))
        noisy, now, prompt, target = question(teacher, pool, batch, positions)
        velocity = student.velocity(noisy, now, prompt, batch.references, positions)
        return velocity_loss(velocity, target, batch)

    trainer.run(rank, lesson)


@torch.no_grad()
def question(teacher: Flow, pool: Pool, batch: Batch, positions: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Noisy tokens, their noise levels, prompt embeddings, and the velocity to learn."""
    config = CONFIG["distillation"]
    sigmas = torch.from_numpy(np.array(flow_sigmas(SIDE * SIDE, config["student_steps"]), np.float32))
    now = sigmas[torch.randint(config["student_steps"], (len(batch.target),))]
    noise = torch.randn_like(batch.target)
    noisy = torch.lerp(batch.target, noise, now[:, None, None])
    prompt, target = teacher.encode(batch.ids, batch.mask), noise - batch.target
    if not batch.references.shape[1]:  # edits are no better with guidance
        nothing = padded(pool.tokenizer, [pool.nothing])
        empty, plain = teacher.encode(*nothing).expand(len(noisy), -1, -1), text_ids(torch.arange(nothing[0].shape[1]))
        with_prompt = teacher.velocity(noisy, now, prompt, batch.references, positions)
        without = teacher.velocity(noisy, now, empty, batch.references, plain)
        target = target + (config["guidance"] - 1) * (with_prompt - without)
    return noisy, now, prompt, target


if __name__ == "__main__":
    main()
