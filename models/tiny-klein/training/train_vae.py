"""Step 1: train the autoencoder, then measure the BatchNorm statistics of its latents.

python models/tiny-klein/training/train_vae.py WORK
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from random import Random

import torch
import torch.nn.functional as F
from common import CONFIG, Log, parse_arguments, to_tensor
from diffusers import AutoencoderKLFlux2
from latents import CHUNK, patchify
from loop import Trainer
from parallel import run_processes
from scenes import Background, Scene, Thing, draw
from tasks import choose, put, radius, random_thing, textures, training_task, usable_background


def main() -> None:
    arguments = parse_arguments("train the autoencoder", "folder for checkpoints and logs")
    run_processes(train, arguments)
    finish(arguments.work)


def train(rank: int, arguments: argparse.Namespace) -> None:
    """Train in one of the processes."""
    config = CONFIG["vae"]
    torch.manual_seed(CONFIG["seed"])
    vae = AutoencoderKLFlux2(**config["model"]).train().to(memory_format=torch.channels_last)
    with torch.no_grad():  # start with little noise in the latents, or the decoder has no signal to learn from
        vae.quant_conv.bias[config["model"]["latent_channels"] :] -= 5
    vae.bn.eval()  # the statistics are measured at the end
    trainer = Trainer("vae", arguments, config, {"vae": vae}, *parameter_groups(vae))
    random = Random(trainer.seed(0, rank))

    def loss_step(step: int) -> tuple[torch.Tensor, dict[str, float]]:
        pictures = to_tensor(draw(example(random)) for _ in range(config["batch"]))
        pictures = pictures.contiguous(memory_format=torch.channels_last)
        posterior = vae.encode(pictures).latent_dist
        restored = vae.decode(posterior.sample()).sample
        kl = posterior.kl().mean() / posterior.mean[0].numel()
        # Rises from zero: until the decoder uses the latents, nothing counters their collapse by the KL term.
        kl_weight = config["kl_weight"] * min(1.0, step / config["kl_warmup"])
        loss = reconstruction_loss(restored, pictures, config["edge_weight"])
        return loss + kl_weight * kl, {"psnr": psnr(restored.detach(), pictures), "kl": kl.item()}

    trainer.run(rank, loss_step)


def finish(work: Path) -> None:
    """Measure the statistics of the latents, write the averaged autoencoder, and log its PSNR."""
    saved = torch.load(work / "vae.pt")
    vae = AutoencoderKLFlux2(**CONFIG["vae"]["model"]).eval()
    vae.load_state_dict(saved["average"]["vae"])
    measure_statistics(vae, Random(CONFIG["seed"] + 1), 1024)
    vae.save_pretrained(work / "vae")
    Log(work / "vae.jsonl").write(step=saved["step"], test_psnr=test_psnr(vae))


@torch.no_grad()
def test_psnr(vae: AutoencoderKLFlux2) -> float:
    """Return the mean PSNR, in dB, of pictures that were not trained on."""
    held_out = Random(CONFIG["seed"] + 2)
    pictures = to_tensor(draw(training_task(held_out).target) for _ in range(256))
    return psnr(torch.cat([vae(part).sample for part in pictures.split(CHUNK)]), pictures)


def example(random: Random) -> Scene:
    """Draw the target of a task, or a crowded scene, since most of a task's picture is background at the same cost."""
    if random.random() < 0.4:
        return training_task(random).target
    background = usable_background(random)
    things = tuple(
        put(random, detailed_thing(random, background), (24.0 + 40 * column, 24.0 + 40 * row), 6.0)
        for column in range(3)
        for row in range(3)
        if random.random() < 0.7
    )
    return Scene(things, background)


def detailed_thing(random: Random, background: Background) -> Thing:
    """Draw a thing that is small or textured more often than in tasks: these details are lost most easily."""
    thing = random_thing(random, background, random.choice((2, 3)))
    if random.random() < 0.3:
        return replace(thing, r=radius(random, "small"), texture="solid")
    if random.random() < 0.5:
        return replace(thing, texture=choose(random, textures(thing.shape)))
    return thing


def parameter_groups(module: torch.nn.Module) -> tuple[list[torch.nn.Parameter], list[torch.nn.Parameter]]:
    """Split trainable parameters: AdamW gets biases, norms, and the first and last layers; Muon gets all others."""
    last = ("decoder.conv_out.weight", "conv_out.weight")
    both: tuple[list[torch.nn.Parameter], list[torch.nn.Parameter]] = ([], [])
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            both[parameter.ndim < 2 or "conv_in" in name or name in last].append(parameter)
    return both


def reconstruction_loss(restored: torch.Tensor, pictures: torch.Tensor, edge_weight: float) -> torch.Tensor:
    """Return the error of pixels, of their differences (shapes are recognised by their edges), and of 4x4 means."""
    error = restored - pictures
    edges = (error[..., 1:] - error[..., :-1]).abs().mean() + (error[..., 1:, :] - error[..., :-1, :]).abs().mean()
    coarse = F.avg_pool2d(error, 4).abs().mean()
    return error.abs().mean() + 2 * error.square().mean() + edge_weight * edges + coarse


def psnr(restored: torch.Tensor, pictures: torch.Tensor) -> float:
    """Return the mean peak signal-to-noise ratio of the pictures, in dB."""
    error = (restored.clamp(-1, 1) - pictures).square().mean((1, 2, 3)) / 4
    return float((-10 * torch.log10(error.clamp(min=1e-10))).mean())


@torch.no_grad()
def measure_statistics(vae: AutoencoderKLFlux2, random: Random, count: int) -> None:
    """Store the mean and variance of the patchified latents in the BatchNorm, as in FLUX.2."""
    latents = []
    for _ in range(count // CHUNK):
        mode = vae.encode(to_tensor(draw(training_task(random).target) for _ in range(CHUNK))).latent_dist.mode()
        latents.append(patchify(mode).permute(0, 2, 3, 1).reshape(-1, 4 * mode.shape[1]))
    values = torch.cat(latents)
    vae.bn.running_mean.copy_(values.mean(0))
    vae.bn.running_var.copy_(values.var(0))


if __name__ == "__main__":
    main()
