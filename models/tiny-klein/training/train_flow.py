"""Step 4: rectified flow, the text encoder trained along: the base model.

python models/tiny-klein/training/train_flow.py WORK [--until HH:MM] [--resume]

Linear layers ask the transformer what it sees on the way, see sight.py.

Each of some processes takes one thread and a batch of its own; they share their gradients. That is faster than one
process with as many threads, as most operations are small.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from common import CONFIG, parse
from flow import Flow, Pool, new_flow, text_ids, training_positions, velocity_loss
from loop import Trainer
from parallel import together
from sight import sights
from torch import nn
from train_text import Reader


def main() -> None:
    together(train, parse("train the base model", "folder with the pool"))


def train(rank: int, arguments: argparse.Namespace) -> None:
    """What one of the processes does."""
    work, config = arguments.work, CONFIG["flow"]
    torch.manual_seed(CONFIG["seed"])
    pool = Pool(work)
    flow = new_flow(pool.tokenizer).train()
    reader = Reader()
    text = torch.load(work / "text.pt")["weights"]
    flow.text_encoder.load_state_dict(text["encoder"])
    reader.load_state_dict(text["reader"])
    seers = sights(flow.transformer)
    modules = {"flow": flow, "reader": reader, "sights": seers}
    trainer = Trainer("flow", arguments, config, modules, *groups(flow, reader, seers))
    trainer.seed(20, rank)
    pool.seed(CONFIG["seed"] + 20 + trainer.step, rank)

    def lesson(step: int) -> tuple[torch.Tensor, dict[str, float]]:
        edits = config["edits"] * min(1.0, step / config["edits_from"])
        batch = pool.batch(config["batch"], config["caption_dropout"], edits)
        sigma = noise_levels(config["batch"], config["pure_noise"])
        noise = torch.randn_like(batch.target)
        noisy = torch.lerp(batch.target, noise, sigma[:, None, None])
        positions = text_ids(training_positions(batch.mask, pool.rng))
        prompt = flow.encode(batch.ids, batch.mask)
        velocity = flow.velocity(noisy, sigma, prompt, batch.references, positions)
        loss, errors = velocity_loss(velocity, noise - batch.target, batch)
        reading, _ = reader.loss(prompt, batch.mask, batch.labels)
        words, tokens = prompt.shape[1], noisy.shape[1]
        target, references = batch.seen.split([tokens, batch.seen.shape[1] - tokens], 1)
        seeing, right = seers["target"].loss(slice(words, words + tokens), target)
        seen = {f"{'edits' if references.numel() else 'pictures'} planned": right}
        if references.numel():
            more, seen["references seen"] = seers["references"].loss(slice(words + tokens, None), references)
            seeing = seeing + more
        helping = min(1.0, (step - trainer.warm) / config["helpers_from"])  # before they know, they should not teach
        loss = loss + helping * (config["reading"] * reading + config["sight"] * seeing)
        return loss, {**errors, **seen, "reading": reading.item()}

    trainer.run(rank, lesson)


def groups(flow: Flow, *helpers: nn.Module) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Matrices within the blocks for Muon, the rest for AdamW; the text encoder has learned most of it already."""
    transformer, text = flow.transformer, flow.text_encoder
    inner = [*transformer.transformer_blocks.parameters(), *transformer.single_transformer_blocks.parameters()]
    known = {p for p in [*inner, *text.model.layers.parameters()] if p.ndim == 2}
    both: tuple[list, list] = ([], [])
    scales = ((transformer, 1.0), (text, CONFIG["flow"]["text_scale"]), *((helper, 1.0) for helper in helpers))
    for module, scale in scales:
        parameters = [p for p in module.parameters() if p.requires_grad]
        for group, inside in zip(both, (True, False), strict=True):
            chosen = [p for p in parameters if (p in known) == inside]
            if chosen:
                group.append({"params": chosen, "scale": scale})
    return both


def noise_levels(count: int, pure: float) -> torch.Tensor:
    """Mostly noisy: that is where it is decided what there is and where, and where the four steps lie."""
    sigma = torch.sigmoid(1.6 + 1.2 * torch.randn(count))
    return torch.where(torch.rand(count) < pure, torch.ones(count), sigma)


if __name__ == "__main__":
    main()
