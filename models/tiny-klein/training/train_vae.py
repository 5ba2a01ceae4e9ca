"""Step 1: the autoencoder. Pictures to latents and back, and the BatchNorm statistics of the latents.

python models/tiny-klein/training/train_vae.py WORK
"""

from __future__ import annotations

import argparse
from pathlib import Path
from random import Random
from typing import Any

import torch
import torch.multiprocessing
import torch.nn.functional as F
from common import CONFIG, Average, Budget, Log, learning_rate, parse, save, set_learning_rate, to_tensor
from diffusers import AutoencoderKLFlux2
from muon import Muon
from parallel import join, leave, mean
from scenes import Scene, draw
from tasks import put, random_thing, training_task, usable_background


def main() -> None:
    arguments = parse("train the autoencoder", "folder for checkpoints and logs")
    torch.multiprocessing.spawn(train, (arguments,), CONFIG["processes"])
    finish(arguments.work)


def train(rank: int, arguments: argparse.Namespace) -> None:
    """What one of the processes does."""
    work, config = arguments.work, CONFIG["vae"]
    join(rank, CONFIG["processes"], 29530)
    torch.manual_seed(CONFIG["seed"])
    vae = AutoencoderKLFlux2(**config["model"]).train().to(memory_format=torch.channels_last)
    with torch.no_grad():  # little noise in the latents at first, or there is nothing to learn from
        vae.quant_conv.bias[config["model"]["latent_channels"] :] -= 5
    vae.bn.eval()  # its statistics are measured at the end
    matrices = matrices_of(vae)
    known, muon = set(matrices), Muon(matrices)
    adam = torch.optim.AdamW([p for p in vae.parameters() if p not in known], betas=(0.9, 0.98), weight_decay=0.0)
    average = Average({"vae": vae}, config["average"])
    step = 0
    if arguments.resume:
        saved = torch.load(work / "vae.pt")
        vae.load_state_dict(saved["weights"])
        muon.load_state_dict(saved["muon"])
        adam.load_state_dict(saved["adam"])
        average.state, average.steps, step = saved["average"], saved["step"], saved["step"]
    random = Random(CONFIG["seed"] + step + 100_000_000 * rank)
    torch.manual_seed(CONFIG["seed"] + step + 100_000_000 * rank)
    parameters = list(vae.parameters())
    log = Log(work / "vae.jsonl")
    mean_psnr = 0.0

    def forward(pictures: torch.Tensor, kl_weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        posterior = vae.encode(pictures).latent_dist
        restored = vae.decode(posterior.sample()).sample
        kl = posterior.kl().mean() / posterior.mean[0].numel()
        return loss_of(restored, pictures, config["edge_weight"]) + kl_weight * kl, kl, restored

    budget = Budget(config["steps"], arguments.until)
    while (fraction := mean(budget.fraction(step))) < 1:
        set_learning_rate(muon, learning_rate(step, fraction, config["matrix_learning_rate"], 20))
        set_learning_rate(adam, learning_rate(step, fraction, config["learning_rate"], 20))
        pictures = to_tensor(draw(example(random)) for _ in range(config["batch"]))
        pictures = pictures.contiguous(memory_format=torch.channels_last)
        # From zero: before the decoder reads the latents, there is nothing to hold against their collapse.
        kl_weight = torch.tensor(config["kl_weight"] * min(1.0, step / config["kl_warmup"]))
        loss, kl, restored = forward(pictures, kl_weight)
        vae.zero_grad()
        loss.backward()
        mean(parameters)
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        muon.step()
        adam.step()
        average.update()
        mean_psnr += (psnr(restored.detach(), pictures) - mean_psnr) * (0.05 if step else 1)
        step += 1
        if rank == 0 and step % 25 == 0:
            log.write(step=step, loss=loss.item(), psnr=mean_psnr, kl=kl.item())
        if rank == 0 and step % 100 == 0:
            save(checkpoint(vae, muon, adam, average, step), work / "vae.pt")

    if rank == 0:
        save(checkpoint(vae, muon, adam, average, step), work / "vae.pt")
    leave()


def finish(work: Path) -> None:
    """Measure the statistics of the latents, write the averaged autoencoder, and say how well it restores pictures."""
    saved = torch.load(work / "vae.pt")
    vae = AutoencoderKLFlux2(**CONFIG["vae"]["model"]).eval()
    vae.load_state_dict(saved["average"]["vae"])
    measure_statistics(vae, Random(CONFIG["seed"] + 1), 1024)
    vae.save_pretrained(work / "vae")
    Log(work / "vae.jsonl").write(step=saved["step"], test_psnr=test_psnr(vae))


@torch.no_grad()
def test_psnr(vae: AutoencoderKLFlux2) -> float:
    """Mean PSNR of pictures that were not trained on, in dB."""
    held_out = Random(CONFIG["seed"] + 2)
    pictures = to_tensor(draw(training_task(held_out).target) for _ in range(256))
    return psnr(torch.cat([vae(part).sample for part in pictures.split(16)]), pictures)


def example(random: Random) -> Scene:
    """The target of a task, or a crowd: most of a task's picture is background, and costs as much."""
    if random.random() < 0.4:
        return training_task(random).target
    background = usable_background(random)
    things = tuple(
        put(random, random_thing(random, background, random.choice((2, 3))), (24.0 + 40 * column, 24.0 + 40 * row), 6.0)
        for column in range(3)
        for row in range(3)
        if random.random() < 0.7
    )
    return Scene(things, background)


def matrices_of(module: torch.nn.Module) -> list[torch.nn.Parameter]:
    """What Muon trains: all but biases, norms, and the first and last layers."""
    last = ("decoder.conv_out.weight", "conv_out.weight")
    parameters = [(name, p) for name, p in module.named_parameters() if p.ndim > 1]
    return [p for name, p in parameters if "conv_in" not in name and name not in last]


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


def checkpoint(
    vae: AutoencoderKLFlux2, muon: Muon, adam: torch.optim.Optimizer, average: Average, step: int
) -> dict[str, Any]:
    """All that is needed to go on."""
    state = {"weights": vae.state_dict(), "average": average.state, "step": step}
    return {**state, "muon": muon.state_dict(), "adam": adam.state_dict()}


if __name__ == "__main__":
    main()
