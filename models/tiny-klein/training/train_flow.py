"""Step 4: train the base model with rectified flow, the transformer and the text encoder together.

python models/tiny-klein/training/train_flow.py WORK [--until HH:MM] [--resume]

Linear probes of the transformer's hidden states add an auxiliary loss, see probe.py.

Training is data-parallel: each process has one thread and its own batches, and gradients are averaged. That is faster
than one process with several threads, since most operations are small.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from common import CONFIG, parse_arguments
from flow import Flow, Pool, new_flow, text_ids, training_positions, velocity_loss
from loop import Trainer
from parallel import run_processes
from probe import make_probes
from torch import nn
from train_text import Reader


def main() -> None:
    run_processes(train, parse_arguments("train the base model", "folder with the pool"))


def train(rank: int, arguments: argparse.Namespace) -> None:
    """Train in one of the processes."""
    work, config = arguments.work, CONFIG["flow"]
    torch.manual_seed(CONFIG["seed"])
    pool = Pool(work)
    flow = new_flow(pool.tokenizer).train()
    reader = Reader()
    text = torch.load(work / "text.pt")["weights"]
    flow.text_encoder.load_state_dict(text["encoder"])
    reader.load_state_dict(text["reader"])
    probes = make_probes(flow.transformer)
    modules = {"flow": flow, "reader": reader, "sights": probes}
    trainer = Trainer("flow", arguments, config, modules, *parameter_groups(flow, reader, probes))
    trainer.seed(20, rank)
    pool.seed(CONFIG["seed"] + 20 + trainer.step, rank)

    def loss_step(step: int) -> tuple[torch.Tensor, dict[str, float]]:
        edits = config["edits"] * min(1.0, step / config["edits_from"])
        batch = pool.batch(config["batch"], config["caption_dropout"], edits)
        sigma = noise_levels(config["batch"], config["pure_noise"])
        noise = torch.randn_like(batch.target)
        noisy = torch.lerp(batch.target, noise, sigma[:, None, None])
        positions = text_ids(training_positions(batch.mask, pool.rng))
        prompt = flow.encode(batch.ids, batch.mask)
        velocity = flow.velocity(noisy, sigma, prompt, batch.references, positions)
        loss, errors = velocity_loss(velocity, noise - batch.target, batch)
        reading_loss, _ = reader.loss(prompt, batch.mask, batch.labels)
        words, tokens = prompt.shape[1], noisy.shape[1]
        target, references = batch.token_labels.split([tokens, batch.token_labels.shape[1] - tokens], 1)
        probe_loss, accuracy = probes["target"].loss(slice(words, words + tokens), target)
        metrics = {f"{'edits' if references.numel() else 'pictures'} planned": accuracy}
        if references.numel():
            more, metrics["references seen"] = probes["references"].loss(slice(words + tokens, None), references)
            probe_loss = probe_loss + more
        # Untrained heads give useless gradients, so their weight rises from zero.
        ramp = min(1.0, (step - trainer.warmup_start) / config["helpers_from"])
        loss = loss + ramp * (config["reading"] * reading_loss + config["sight"] * probe_loss)
        return loss, {**errors, **metrics, "reading": reading_loss.item()}

    trainer.run(rank, loss_step)


def parameter_groups(flow: Flow, *heads: nn.Module) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Split parameters into matrices of the blocks, for Muon, and all others, for AdamW.

    The pretrained text encoder gets a smaller learning rate.
    """
    transformer, text = flow.transformer, flow.text_encoder
    inner = [*transformer.transformer_blocks.parameters(), *transformer.single_transformer_blocks.parameters()]
    known = {p for p in [*inner, *text.model.layers.parameters()] if p.ndim == 2}
    both: tuple[list, list] = ([], [])
    scales = ((transformer, 1.0), (text, CONFIG["flow"]["text_scale"]), *((head, 1.0) for head in heads))
    for module, scale in scales:
        parameters = [p for p in module.parameters() if p.requires_grad]
        for group, inside in zip(both, (True, False), strict=True):
            chosen = [p for p in parameters if (p in known) == inside]
            if chosen:
                group.append({"params": chosen, "scale": scale})
    return both


def noise_levels(count: int, pure: float) -> torch.Tensor:
    """Draw mostly high noise levels: they decide the composition, and the sampler's four steps lie there."""
    sigma = torch.sigmoid(1.6 + 1.2 * torch.randn(count))
    return torch.where(torch.rand(count) < pure, torch.ones(count), sigma)


if __name__ == "__main__":
    main()
