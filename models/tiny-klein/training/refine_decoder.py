"""Step 6: the decoder alone, on what the distilled model makes; the latents stay what they are.

    python models/tiny-klein/training/refine_decoder.py WORK [--until HH:MM] [--resume]

Half of what it learns from are latents of pictures, so that it stays a decoder of those. The other half are the same
after the last of the four steps: they are a little off in just the way that those of a generated picture are, and
the decoder is told what they should have been.
"""

from __future__ import annotations

import argparse
from random import Random

import torch
from common import CONFIG, SIDE, Log, parse, to_tensor, tokens_of
from diffusers import AutoencoderKLFlux2
from flow import load_flow, padded, text_ids
from latents import decode, encode
from loop import Trainer
from parallel import together
from scenes import draw
from tasks import training_task
from tokenizers import Tokenizer
from train_vae import example, groups, loss_of, psnr, test_psnr

from fluxonnx.runtime.schedule import flow_sigmas


def main() -> None:
    arguments = parse("train the decoder on", "folder with the autoencoder and the distilled model")
    together(train, arguments)
    work = arguments.work
    vae = AutoencoderKLFlux2.from_pretrained(work / "vae", low_cpu_mem_usage=False).eval()
    saved = torch.load(work / "decoder.pt")
    vae.load_state_dict(saved["average"]["vae"])
    vae.save_pretrained(work / "vae-refined")
    Log(work / "decoder.jsonl").write(step=saved["step"], test_psnr=test_psnr(vae))


def train(rank: int, arguments: argparse.Namespace) -> None:
    """What one of the processes does."""
    work, config = arguments.work, CONFIG["decoder"]
    vae = AutoencoderKLFlux2.from_pretrained(work / "vae", low_cpu_mem_usage=False).eval().requires_grad_(False)
    vae.decoder.requires_grad_(True)
    vae.post_quant_conv.requires_grad_(True)
    tokenizer = Tokenizer.from_file(str(work / "tokenizer/tokenizer.json"))
    student = load_flow(work / "student.pt", tokenizer)
    last = flow_sigmas(SIDE * SIDE, CONFIG["distillation"]["student_steps"])[-2]
    trainer = Trainer("decoder", arguments, config, {"vae": vae}, *groups(vae))
    random = Random(trainer.seed(40, rank))

    @torch.no_grad()
    def generated(tokens: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        noisy = torch.lerp(tokens, torch.randn_like(tokens), last)
        ids, mask = padded(tokenizer, [tokens_of(tokenizer, prompt) for prompt in prompts])
        positions = text_ids(torch.arange(ids.shape[1]))
        sigma = torch.full((len(noisy),), last)
        return noisy - last * student.velocity(noisy, sigma, student.encode(ids, mask), tokens[:, :0], positions)

    def lesson(step: int) -> tuple[torch.Tensor, dict[str, float]]:
        tasks = [training_task(random, edits=0) for _ in range(config["batch"] // 2)]
        scenes = [task.target for task in tasks] + [example(random) for _ in tasks]
        drawings = [draw(scene) for scene in scenes]
        tokens, pictures = encode(vae, drawings), to_tensor(drawings)
        tokens = torch.cat([generated(tokens[: len(tasks)], [task.prompt for task in tasks]), tokens[len(tasks) :]])
        restored = decode(vae, tokens)
        made, clean = (psnr(*pair) for pair in zip(restored.detach().chunk(2), pictures.chunk(2), strict=True))
        return loss_of(restored, pictures, CONFIG["vae"]["edge_weight"]), {"psnr": clean, "psnr_generated": made}

    trainer.run(rank, lesson)


if __name__ == "__main__":
    main()
