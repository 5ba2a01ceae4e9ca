"""Step 5: four steps without guidance instead of many: the distilled model.

It starts as the base model, sees the noise levels of the sampler's four steps only, and walks: from pure noise, or from
the truth with the noise of a later step, it takes the steps that are left, each from where its own last one led, and is
told at each in which direction the truth lies. So it learns to mend what it did wrong before, which a model that saw
the truth behind every noise never had to (after Ross et al., A Reduction of Imitation Learning to No-Regret Online
Learning, 2011).

    python models/tiny-klein/training/distill.py WORK [--until HH:MM]
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator

import numpy as np
import torch
from common import CONFIG, SIDE, parse
from flow import Flow, Pool, load_flow, text_ids, training_positions, velocity_loss
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
    student = load_flow(work / "flow.pt", pool.tokenizer)
    student.text_encoder.requires_grad_(False)
    trainer = Trainer("student", arguments, config, {"flow": student}, *groups(student))
    trainer.seed(1, rank)
    pool.seed(CONFIG["seed"] + 30 + trainer.step, rank)
    steps = walks(student, pool)
    trainer.run(rank, lambda step: next(steps))


def walks(student: Flow, pool: Pool) -> Iterator[tuple[Tensor, dict[str, float]]]:
    """The loss of one step after the other, and what of it is worth a line in the log."""
    config = CONFIG["distillation"]
    sigmas = flow_sigmas(SIDE * SIDE, config["student_steps"]).astype(np.float32)
    while True:
        batch = pool.batch(config["batch"], edits=CONFIG["flow"]["edits"])
        positions = text_ids(training_positions(batch.mask, pool.rng))
        with torch.no_grad():
            prompt = student.encode(batch.ids, batch.mask)
        start = int(pool.shared.integers(config["student_steps"]))
        noisy = torch.lerp(batch.target, torch.randn_like(batch.target), float(sigmas[start]))
        for now, then in zip(sigmas[start:-1].tolist(), sigmas[start + 1 :].tolist(), strict=True):
            velocity = student.velocity(noisy, torch.full((len(noisy),), now), prompt, batch.references, positions)
            yield velocity_loss(velocity, (noisy - batch.target) / now, batch)
            noisy = noisy + (then - now) * velocity.detach()


if __name__ == "__main__":
    main()
