"""Step 6: four steps without guidance instead of many with it: the distilled model.

At the noise levels of the sampler's four steps only, it learns the velocity that the base model has with guidance. Of
what the base model says, only the difference that guidance makes is taken; the rest of the target is the true
velocity, which the base model is still some way from (after Meng et al., On Distillation of Guided Diffusion Models,
2023, who take all of it from the base model).

    python models/tiny-klein/training/distill.py WORK [--until HH:MM]
"""

from __future__ import annotations

import argparse
import copy

import numpy as np
import torch
import torch.multiprocessing
from common import CONFIG, SIDE, Average, Budget, Log, learning_rate, parse, save, set_learning_rate
from flow import Batch, Flow, Pool, padded, text_ids, training_positions
from parallel import join, leave, mean
from torch import Tensor
from train_flow import optimizers

from fluxonnx.runtime.schedule import flow_sigmas


def main() -> None:
    arguments = parse("distill the base model", "folder with the pool and the base model")
    torch.multiprocessing.spawn(train, (arguments,), CONFIG["processes"])


def train(rank: int, arguments: argparse.Namespace) -> None:
    """What one of the processes does."""
    work, config = arguments.work, CONFIG["distillation"]
    join(rank, CONFIG["processes"], 29533)
    pool = Pool(work)
    teacher = Flow(pool.tokenizer.get_vocab_size(), pool.latents.shape[-1]).eval().requires_grad_(False)
    teacher.load_state_dict(torch.load(work / "flow.pt")["average"]["flow"])
    student = copy.deepcopy(teacher)
    student.transformer.requires_grad_(True)
    muon, adam = optimizers(student)
    average = Average({"flow": student}, config["average"])
    parameters = list(student.transformer.parameters())
    log = Log(work / "distillation.jsonl")
    torch.manual_seed(CONFIG["seed"] + 1 + 100_000_000 * rank)
    pool.seed(CONFIG["seed"] + 30, rank)

    step, mean_loss = 0, 0.0
    if arguments.resume:
        saved = torch.load(work / "student.pt")
        student.load_state_dict(saved["average"]["flow"])
        average.state, average.steps, step = saved["average"], saved["step"], saved["step"]
        torch.manual_seed(CONFIG["seed"] + 1 + step + 100_000_000 * rank)
        pool.seed(CONFIG["seed"] + 30 + step, rank)
    budget = Budget(config["steps"], arguments.until)
    while (fraction := mean(budget.fraction(step))) < 1:
        set_learning_rate(muon, learning_rate(step, fraction, config["matrix_learning_rate"], 50))
        set_learning_rate(adam, learning_rate(step, fraction, config["learning_rate"], 50))
        batch = pool.batch(config["batch"])
        positions = text_ids(training_positions(batch.mask, pool.shared))
        noisy, now, prompt, target = lesson(teacher, pool, batch, positions)
        loss = (student.velocity(noisy, now, prompt, batch.references, positions) - target).square().mean()
        muon.zero_grad()
        adam.zero_grad()
        loss.backward()
        mean(parameters)
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        muon.step()
        adam.step()
        average.update()
        step += 1
        mean_loss += (loss.item() - mean_loss) * max(0.03, 1 / step)
        if rank == 0 and step % 25 == 0:
            log.write(step=step, loss=mean_loss)
        if rank == 0 and step % 100 == 0:
            save({"average": average.state, "step": step}, work / "student.pt")
    if rank == 0:
        save({"average": average.state, "step": step}, work / "student.pt")
    leave()


@torch.no_grad()
def lesson(teacher: Flow, pool: Pool, batch: Batch, positions: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Noisy tokens, their noise levels, prompt embeddings, and the velocity to learn."""
    config = CONFIG["distillation"]
    sigmas = torch.from_numpy(np.array(flow_sigmas(SIDE * SIDE, config["student_steps"]), np.float32))
    now = sigmas[torch.randint(config["student_steps"], (len(batch.target),))]
    noise = torch.randn_like(batch.target)
    noisy = torch.lerp(batch.target, noise, now[:, None, None])
    prompt, target = teacher.encode(batch.ids, batch.mask), noise - batch.target
    if config["guidance"] != 1:
        nothing = padded(pool.tokenizer, [pool.nothing])
        empty, plain = teacher.encode(*nothing).expand(len(noisy), -1, -1), text_ids(torch.arange(nothing[0].shape[1]))
        with_prompt = teacher.velocity(noisy, now, prompt, batch.references, positions)
        without = teacher.velocity(noisy, now, empty, batch.references, plain)
        target = target + (config["guidance"] - 1) * (with_prompt - without)
    return noisy, now, prompt, target


if __name__ == "__main__":
    main()
