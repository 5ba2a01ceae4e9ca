"""Step 1: the autoencoder. Pictures to latents and back, and the BatchNorm statistics of the latents.

python models/tiny-klein/training/train_vae.py WORK
"""

from __future__ import annotations

import argparse
from pathlib import Path
from random import Random

import numpy as np
import torch
import torch.nn.functional as F
from common import CONFIG, Average, Log, learning_rate, set_learning_rate, to_tensor
from diffusers import AutoencoderKLFlux2
from scenes import draw
from tasks import training_task


def main() -> None:
    parser = argparse.ArgumentParser(description="train the autoencoder")
    parser.add_argument("work", type=Path, help="folder for checkpoints and logs")
    work = parser.parse_args().work
    config = CONFIG["vae"]
    torch.manual_seed(CONFIG["seed"])
    random = Random(CONFIG["seed"])
    vae = AutoencoderKLFlux2(**config["model"]).train().to(memory_format=torch.channels_last)
    with torch.no_grad():  # little noise in the latents at first, or there is nothing to learn from
        vae.quant_conv.bias[config["model"]["latent_channels"] :] -= 5
    vae.bn.eval()  # its statistics are measured at the end
    optimizer = torch.optim.AdamW(vae.parameters(), betas=(0.9, 0.98), weight_decay=0.0)
    average = Average({"vae": vae}, 0.998)
    log = Log(work / "vae.jsonl")
    mean_psnr = 0.0

    for step in range(config["steps"]):
        set_learning_rate(optimizer, learning_rate(step, config["steps"], config["learning_rate"]))
        whole = step >= config["steps"] - config["whole_steps"]
        pictures = to_tensor(example(random, whole) for _ in range(config["batch"] // (2 if whole else 1)))
        pictures = pictures.contiguous(memory_format=torch.channels_last)
        posterior = vae.encode(pictures).latent_dist
        restored = vae.decode(posterior.sample()).sample
        loss = loss_of(restored, pictures, config["edge_weight"]) + config["kl_weight"] * posterior.kl().mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        average.update()
        mean_psnr += (psnr(restored.detach(), pictures) - mean_psnr) * (0.05 if step else 1)
        if step % 50 == 49:
            log.write(step=step + 1, loss=loss.item(), psnr=mean_psnr, kl=posterior.kl().mean().item())
        if step % 500 == 499:
            save(vae, average, work)

    save(vae, average, work)
    vae.load_state_dict(average.state["vae"])
    measure_statistics(vae.eval(), Random(CONFIG["seed"] + 1), 1024)
    vae.save_pretrained(work / "vae")
    with torch.no_grad():
        held_out = Random(CONFIG["seed"] + 2)
        pictures = to_tensor(draw(training_task(held_out).target) for _ in range(256))
        restored = torch.cat([vae(part).sample for part in pictures.split(32)])
    log.write(step=config["steps"], test_psnr=psnr(restored, pictures))


def example(random: Random, whole: bool) -> np.ndarray:
    """A picture, or a quarter of one with a thing in it: most of a whole picture is background, and costs as much."""
    scene = training_task(random).target
    picture = draw(scene)
    if whole or not scene.things:
        return picture if whole else picture[:64, :64]
    thing = random.choice(scene.things)
    left, top = (int(min(max(c - 32 + random.uniform(-24, 24), 0), 64)) for c in (thing.x, thing.y))
    return picture[top : top + 64, left : left + 64]


def loss_of(restored: torch.Tensor, pictures: torch.Tensor, edge_weight: float) -> torch.Tensor:
    """Absolute and squared error of the pixels, and of their differences: edges are what shapes are told by."""
    error = restored - pictures
    edges = (error[..., 1:] - error[..., :-1]).abs().mean() + (error[..., 1:, :] - error[..., :-1, :]).abs().mean()
    coarse = F.avg_pool2d(error, 4).abs().mean()
    return error.abs().mean() + 2 * error.square().mean() + edge_weight * edges + coarse


def psnr(restored: torch.Tensor, pictures: torch.Tensor) -> float:
    """Mean peak signal to noise ratio of the pictures, in dB."""
    error = (restored.clamp(-1, 1) - pictures).square().mean((1, 2, 3)) / 4
    return float((-10 * torch.log10(error.clamp(min=1e-10))).mean())


@torch.no_grad()
def measure_statistics(vae: AutoencoderKLFlux2, random: Random, count: int) -> None:
    """Set the mean and variance of the patchified latents, as FLUX.2 has them in its BatchNorm."""
    latents = []
    for _ in range(count // 32):
        mode = vae.encode(to_tensor(draw(training_task(random).target) for _ in range(32))).latent_dist.mode()
        latents.append(patchify(mode).permute(0, 2, 3, 1).reshape(-1, 4 * mode.shape[1]))
    values = torch.cat(latents)
    vae.bn.running_mean.copy_(values.mean(0))
    vae.bn.running_var.copy_(values.var(0))


def patchify(latents: torch.Tensor) -> torch.Tensor:
    """[batch, channels, height, width] -> [batch, 4 * channels, height / 2, width / 2]."""
    return F.pixel_unshuffle(latents, 2)


def save(vae: AutoencoderKLFlux2, average: Average, work: Path) -> None:
    """Keep the averaged weights, so that an interrupted run is not lost."""
    torch.save(average.state["vae"], work / "vae.pt")


if __name__ == "__main__":
    main()
