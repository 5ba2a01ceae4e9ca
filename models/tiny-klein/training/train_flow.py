"""Step 4: rectified flow, the text encoder trained along: the base model.

python models/tiny-klein/training/train_flow.py WORK [--until HH:MM] [--resume]

Each of some processes takes one thread and a batch of its own; they share their gradients. That is faster than one
process with as many threads, as most operations are small.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
import torch.multiprocessing
from common import CONFIG, Average, Budget, Log, learning_rate, parse, save, set_learning_rate
from flow import Flow, Pool, text_ids, training_positions
from muon import Muon
from parallel import join, leave, mean
from train_text import Reader


def main() -> None:
    arguments = parse("train the base model", "folder with the pool")
    torch.multiprocessing.spawn(train, (arguments,), CONFIG["processes"])


def train(rank: int, arguments: argparse.Namespace) -> None:
    """What one of the processes does."""
    work, config = arguments.work, CONFIG["flow"]
    join(rank, CONFIG["processes"])
    torch.manual_seed(CONFIG["seed"])
    pool = Pool(work)
    flow = Flow(pool.tokenizer.get_vocab_size(), pool.latents.shape[-1]).train()
    reader = Reader()
    text = torch.load(work / "text.pt")
    flow.text_encoder.load_state_dict(text["encoder"])
    reader.load_state_dict(text["reader"])
    muon, adam = optimizers(flow, reader)
    average = Average({"flow": flow}, config["average"])
    step = 0
    if arguments.resume:
        saved = torch.load(work / "flow.pt")
        flow.load_state_dict(saved["weights"])
        reader.load_state_dict(saved["reader"])
        muon.load_state_dict(saved["muon"])
        adam.load_state_dict(saved["adam"])
        average.state, average.steps, step = saved["average"], saved["step"], saved["step"]
    torch.manual_seed(CONFIG["seed"] + 20 + step + 100_000_000 * rank)
    pool.seed(CONFIG["seed"] + 20 + step, rank)
    log = Log(work / "flow.jsonl")
    parameters = [*flow.parameters(), *reader.parameters()]

    means: dict[str, float] = {}
    budget = Budget(config["steps"], arguments.until)
    while (fraction := mean(budget.fraction(step))) < 1:
        set_learning_rate(muon, learning_rate(step, fraction, config["matrix_learning_rate"]))
        set_learning_rate(adam, learning_rate(step, fraction, config["learning_rate"]))
        edits = config["edits"] * min(1.0, step / config["edits_from"])
        batch = pool.batch(config["batch"], config["caption_dropout"], edits)
        sigma = noise_levels(config["batch"], config["pure_noise"])
        noise = torch.randn_like(batch.target)
        noisy = torch.lerp(batch.target, noise, sigma[:, None, None])
        positions = text_ids(training_positions(batch.mask, pool.shared))
        prompt = flow.encode(batch.ids, batch.mask)
        velocity = flow.velocity(noisy, sigma, prompt, batch.references, positions)
        loss = (velocity - (noise - batch.target)).square().mean()
        reading, _ = reader.loss(prompt, batch.mask, batch.labels)
        muon.zero_grad()
        adam.zero_grad()
        (loss + config["reading"] * reading).backward()
        mean(parameters)
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        muon.step()
        adam.step()
        average.update()
        step += 1
        kind = "edits" if batch.references.shape[1] else "pictures"
        for key, value in ((kind, loss), ("reading", reading)):
            means[key] = means.get(key, value.item()) * 0.97 + 0.03 * value.item()
        if rank == 0 and step % 25 == 0:
            log.write(step=step, **means)
        if rank == 0 and step % 100 == 0:
            save(checkpoint(flow, reader, muon, adam, average, step), work / "flow.pt")
    if rank == 0:
        save(checkpoint(flow, reader, muon, adam, average, step), work / "flow.pt")
    leave()


def optimizers(flow: Flow, reader: Reader | None = None) -> tuple[Muon, torch.optim.AdamW]:
    """Muon for the matrices within the blocks, AdamW for the rest; the text encoder has learned most of it already."""
    transformer, text = flow.transformer, flow.text_encoder
    inner = [*transformer.transformer_blocks.parameters(), *transformer.single_transformer_blocks.parameters()]
    known = {p for p in [*inner, *text.model.layers.parameters()] if p.ndim == 2}
    groups: tuple[list, list] = ([], [])
    for module, scale in ((transformer, 1.0), (text, CONFIG["flow"]["text_scale"]), (reader, 1.0)):
        parameters = [p for p in module.parameters() if p.requires_grad] if module else []
        for group, inside in zip(groups, (True, False), strict=True):
            chosen = [p for p in parameters if (p in known) == inside]
            if chosen:
                group.append({"params": chosen, "scale": scale})
    return Muon(groups[0]), torch.optim.AdamW(groups[1], betas=(0.9, 0.97), weight_decay=0.0, fused=True)


def noise_levels(count: int, pure: float) -> torch.Tensor:
    """Mostly noisy: that is where it is decided what there is and where, and where the four steps lie."""
    sigma = torch.sigmoid(1.6 + 1.2 * torch.randn(count))
    return torch.where(torch.rand(count) < pure, torch.ones(count), sigma)


def checkpoint(
    flow: Flow, reader: Reader, muon: Muon, adam: torch.optim.Optimizer, average: Average, step: int
) -> dict[str, Any]:
    """All that is needed to go on."""
    state = {"weights": flow.state_dict(), "reader": reader.state_dict(), "average": average.state, "step": step}
    return {**state, "muon": muon.state_dict(), "adam": adam.state_dict()}


if __name__ == "__main__":
    main()
