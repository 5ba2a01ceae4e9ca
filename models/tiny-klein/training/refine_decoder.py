"""Step 5: the decoder alone, on latents that are a little off, as the flow's are; the latents stay what they are.

python models/tiny-klein/training/refine_decoder.py WORK [--until HH:MM]

It may run at any time after the pool is made, beside the training of the flow.
"""

from __future__ import annotations

import argparse
from random import Random

import torch
import torch.multiprocessing
from common import CONFIG, Average, Budget, Log, learning_rate, parse, save, set_learning_rate, to_tensor
from diffusers import AutoencoderKLFlux2
from muon import Muon
from parallel import join, leave, mean
from scenes import draw
from torch.nn import functional as F
from train_vae import checkpoint, example, loss_of, matrices_of, psnr, test_psnr


def main() -> None:
    arguments = parse("train the decoder on", "folder with the trained autoencoder")
    torch.multiprocessing.spawn(train, (arguments,), CONFIG["processes"])
    work = arguments.work
    vae = AutoencoderKLFlux2.from_pretrained(work / "vae", low_cpu_mem_usage=False).eval()
    saved = torch.load(work / "decoder.pt")
    vae.load_state_dict(saved["average"]["vae"])
    vae.save_pretrained(work / "vae-refined")
    Log(work / "decoder.jsonl").write(step=saved["step"], test_psnr=test_psnr(vae))


def train(rank: int, arguments: argparse.Namespace) -> None:
    """What one of the processes does."""
    work, config = arguments.work, CONFIG["decoder"]
    join(rank, CONFIG["processes"], 29532)
    vae = AutoencoderKLFlux2.from_pretrained(work / "vae", low_cpu_mem_usage=False).eval().requires_grad_(False)
    vae.decoder.requires_grad_(True)
    vae.post_quant_conv.requires_grad_(True)
    parameters = [p for p in vae.parameters() if p.requires_grad]
    matrices = matrices_of(vae.decoder)
    known, muon = set(matrices), Muon(matrices)
    adam = torch.optim.AdamW([p for p in parameters if p not in known], betas=(0.9, 0.98), weight_decay=0.0)
    average = Average({"vae": vae}, CONFIG["vae"]["average"])
    step, mean_psnr = 0, 0.0
    if arguments.resume:
        saved = torch.load(work / "decoder.pt")
        vae.load_state_dict(saved["weights"])
        muon.load_state_dict(saved["muon"])
        adam.load_state_dict(saved["adam"])
        average.state, average.steps, step = saved["average"], saved["step"], saved["step"]
    random = Random(CONFIG["seed"] + 40 + step + 100_000_000 * rank)
    torch.manual_seed(CONFIG["seed"] + 40 + step + 100_000_000 * rank)
    log = Log(work / "decoder.jsonl")
    spread = F.pixel_shuffle(vae.bn.running_var.sqrt().view(1, -1, 1, 1), 2).repeat(1, 1, 8, 8)

    budget = Budget(config["steps"], arguments.until)
    while (fraction := mean(budget.fraction(step))) < 1:
        set_learning_rate(muon, learning_rate(step, fraction, config["matrix_learning_rate"], 20))
        set_learning_rate(adam, learning_rate(step, fraction, config["learning_rate"], 20))
        pictures = to_tensor(draw(example(random)) for _ in range(CONFIG["vae"]["batch"]))
        with torch.no_grad():
            latents = vae.encode(pictures).latent_dist.mode()
            off = config["noise"] * torch.rand(len(latents), 1, 1, 1) * spread
            latents = latents + off * torch.randn_like(latents)
        restored = vae.decode(latents).sample
        vae.zero_grad()
        loss_of(restored, pictures, CONFIG["vae"]["edge_weight"]).backward()
        mean(parameters)
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        muon.step()
        adam.step()
        average.update()
        step += 1
        mean_psnr += (psnr(restored.detach(), pictures) - mean_psnr) * max(0.05, 1 / step)
        if rank == 0 and step % 25 == 0:
            log.write(step=step, psnr=mean_psnr)
        if rank == 0 and step % 100 == 0:
            save(checkpoint(vae, muon, adam, average, step), work / "decoder.pt")
    if rank == 0:
        save(checkpoint(vae, muon, adam, average, step), work / "decoder.pt")
    leave()


if __name__ == "__main__":
    main()
