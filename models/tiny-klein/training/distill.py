"""Step 5: distil the base model into one that takes four steps without guidance.

The student starts from the base model's weights. It is trained on its own rollouts, and only at the noise levels of the
sampler's four steps. A rollout starts from pure noise, or from the target with the noise of a later step, and takes the
remaining steps. Each step starts where the student's previous step ended, and the label is the direction from there to
the target. So the student learns to correct its own errors. A model that is trained only on noised targets never meets
them (after Ross et al., A Reduction of Imitation Learning to No-Regret Online Learning, 2011).

    python models/tiny-klein/training/distill.py WORK [--until HH:MM]
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator

import numpy as np
import torch
from common import CONFIG, SIDE, parse_arguments
from flow import Flow, Pool, load_flow, text_ids, training_positions, velocity_loss
from loop import Trainer
from parallel import run_processes
from torch import Tensor
from train_flow import parameter_groups

from fluxonnx.runtime.schedule import flow_sigmas


def main() -> None:
    run_processes(train, parse_arguments("distill the base model", "folder with the pool and the base model"))


def train(rank: int, arguments: argparse.Namespace) -> None:
    """Train in one of the processes."""
    work, config = arguments.work, CONFIG["distillation"]
    pool = Pool(work)
    student = load_flow(work / "flow.pt", pool.tokenizer)
    student.text_encoder.requires_grad_(False)
    trainer = Trainer("student", arguments, config, {"flow": student}, *parameter_groups(student))
    trainer.seed(1, rank)
    pool.seed(CONFIG["seed"] + 30 + trainer.step, rank)
    steps = rollouts(student, pool)
    trainer.run(rank, lambda step: next(steps))


def rollouts(student: Flow, pool: Pool) -> Iterator[tuple[Tensor, dict[str, float]]]:
    """Yield the loss and the logged metrics of each step of each rollout."""
    config = CONFIG["distillation"]
    sigmas = flow_sigmas(SIDE * SIDE, config["student_steps"]).astype(np.float32)
    while True:
        batch = pool.batch(config["batch"], edits=CONFIG["flow"]["edits"])
        positions = text_ids(training_positions(batch.mask, pool.rng))
        with torch.no_grad():
            prompt = student.encode(batch.ids, batch.mask)
        start = int(pool.shared_rng.integers(config["student_steps"]))
        noisy = torch.lerp(batch.target, torch.randn_like(batch.target), float(sigmas[start]))
        for now, then in zip(sigmas[start:-1].tolist(), sigmas[start + 1 :].tolist(), strict=True):
            velocity = student.velocity(noisy, torch.full((len(noisy),), now), prompt, batch.references, positions)
            yield velocity_loss(velocity, (noisy - batch.target) / now, batch)
            noisy = noisy + (then - now) * velocity.detach()


if __name__ == "__main__":
    main()
