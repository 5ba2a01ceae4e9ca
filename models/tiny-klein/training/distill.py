"""Step 4: four steps without guidance instead of many with it: the distilled model.

Each of the sampler's four steps learns to arrive where the base model arrives in several smaller ones with guidance
(Salimans and Ho, Progressive Distillation, 2022; Meng et al., On Distillation of Guided Diffusion Models, 2023).

    python models/tiny-klein/training/distill.py WORK
"""

from __future__ import annotations

import argparse
import copy
from pathlib import Path

import numpy as np
import torch
from common import CONFIG, SIDE, Average, Log, learning_rate, set_learning_rate
from flow import Flow, Pool, text_ids, training_positions

from fluxonnx.runtime.schedule import flow_sigmas


def main() -> None:
    parser = argparse.ArgumentParser(description="distill the base model")
    parser.add_argument("work", type=Path, help="folder with the pool and the base model")
    work, config = parser.parse_args().work, CONFIG["distillation"]
    torch.manual_seed(CONFIG["seed"] + 1)
    pool = Pool(work, CONFIG["seed"] + 30)
    base = torch.load(work / "flow.pt")["average"]["flow"]
    teacher = Flow(pool.tokenizer.get_vocab_size(), pool.latents.shape[-1]).eval()
    teacher.load_state_dict(base)
    student = copy.deepcopy(teacher.transformer).train()
    flow = copy.copy(teacher)
    flow.transformer = student
    optimizer = torch.optim.AdamW(student.parameters(), betas=(0.9, 0.97), weight_decay=0.0)
    average = Average({"student": student}, config["average"])
    sigmas = np.array(flow_sigmas(config["student_steps"], SIDE * SIDE), np.float32)
    log = Log(work / "distillation.jsonl")
    nothing = [pool.nothing] * config["batch"]

    mean_loss = None
    for step in range(config["steps"]):
        set_learning_rate(optimizer, learning_rate(step, config["steps"], config["learning_rate"]))
        batch = pool.batch(config["batch"])
        which = torch.randint(config["student_steps"], (config["batch"],))
        start, end = torch.from_numpy(sigmas)[which], torch.from_numpy(sigmas)[which + 1]
        noisy = torch.lerp(batch.target, torch.randn_like(batch.target), start[:, None, None])
        positions = text_ids(training_positions(batch.mask, pool.rng))
        plain = text_ids(torch.arange(pool.padded(nothing)[0].shape[1]))
        with torch.no_grad():
            prompt = teacher.encode(batch.ids, batch.mask)
            empty = teacher.encode(*pool.padded(nothing))
            arrived = noisy
            for part in range(config["teacher_steps_per_step"]):
                now, then = (torch.lerp(start, end, (part + k) / config["teacher_steps_per_step"]) for k in (0.0, 1.0))
                with_prompt = teacher.velocity(arrived, now, prompt, batch.references, positions)
                without = teacher.velocity(arrived, now, empty, batch.references, plain)
                velocity = without + config["guidance"] * (with_prompt - without)
                arrived = arrived + (then - now)[:, None, None] * velocity
            target = (arrived - noisy) / (end - start)[:, None, None]
        loss = (flow.velocity(noisy, start, prompt, batch.references, positions) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        average.update()
        mean_loss = loss.item() if mean_loss is None else 0.98 * mean_loss + 0.02 * loss.item()
        if step % 20 == 19:
            log.write(step=step + 1, loss=mean_loss)
        if step % 100 == 99 or step + 1 == config["steps"]:
            torch.save(average.state["student"], work / "student.pt")


if __name__ == "__main__":
    main()
