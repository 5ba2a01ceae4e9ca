"""Step 6: fine-tune the decoder on the distilled model's latents. The encoder, and so the latents, stay as they are.

    python models/tiny-klein/training/refine_decoder.py WORK [--until HH:MM] [--resume]

Half of each batch are latents of pictures, so that the decoder keeps its quality on those. The other half have been
noised and denoised by the distilled model's last step: they have the errors of generated latents, and the target is the
picture that they come from.
"""

from __future__ import annotations

import argparse
from random import Random

import torch
from common import CONFIG, SIDE, Log, parse_arguments, prompt_tokens, to_tensor
from diffusers import AutoencoderKLFlux2
from flow import load_flow, pad_prompts, text_ids
from latents import decode, encode
from loop import Trainer
from parallel import run_processes
from scenes import draw
from tasks import training_task
from tokenizers import Tokenizer
from train_vae import example, parameter_groups, psnr, reconstruction_loss, test_psnr

from fluxonnx.runtime.schedule import flow_sigmas


def main() -> None:
    arguments = parse_arguments("fine-tune the decoder", "folder with the autoencoder and the distilled model")
    run_processes(train, arguments)
    work = arguments.work
    vae = AutoencoderKLFlux2.from_pretrained(work / "vae", low_cpu_mem_usage=False).eval()
    saved = torch.load(work / "decoder.pt")
    vae.load_state_dict(saved["average"]["vae"])
    vae.save_pretrained(work / "vae-refined")
    Log(work / "decoder.jsonl").write(step=saved["step"], test_psnr=test_psnr(vae))


def train(rank: int, arguments: argparse.Namespace) -> None:
    """Train in one of the processes."""
    work, config = arguments.work, CONFIG["decoder"]
    vae = AutoencoderKLFlux2.from_pretrained(work / "vae", low_cpu_mem_usage=False).eval().requires_grad_(False)
    vae.decoder.requires_grad_(True)
    vae.post_quant_conv.requires_grad_(True)
    tokenizer = Tokenizer.from_file(str(work / "tokenizer/tokenizer.json"))
    student = load_flow(work / "student.pt", tokenizer)
    last = flow_sigmas(SIDE * SIDE, CONFIG["distillation"]["student_steps"])[-2]
    trainer = Trainer("decoder", arguments, config, {"vae": vae}, *parameter_groups(vae))
    random = Random(trainer.seed(40, rank))

    @torch.no_grad()
    def generated(tokens: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        noisy = torch.lerp(tokens, torch.randn_like(tokens), last)
        ids, mask = pad_prompts(tokenizer, [prompt_tokens(tokenizer, prompt) for prompt in prompts])
        positions = text_ids(torch.arange(ids.shape[1]))
        sigma = torch.full((len(noisy),), last)
        return noisy - last * student.velocity(noisy, sigma, student.encode(ids, mask), tokens[:, :0], positions)

    def loss_step(step: int) -> tuple[torch.Tensor, dict[str, float]]:
        tasks = [training_task(random, edits=0) for _ in range(config["batch"] // 2)]
        scenes = [task.target for task in tasks] + [example(random) for _ in tasks]
        drawings = [draw(scene) for scene in scenes]
        tokens, pictures = encode(vae, drawings), to_tensor(drawings)
        tokens = torch.cat([generated(tokens[: len(tasks)], [task.prompt for task in tasks]), tokens[len(tasks) :]])
        restored = decode(vae, tokens)
        made, clean = (psnr(*pair) for pair in zip(restored.detach().chunk(2), pictures.chunk(2), strict=True))
        return reconstruction_loss(restored, pictures, CONFIG["vae"]["edge_weight"]), {
            "psnr": clean,
            "psnr_generated": made,
        }

    trainer.run(rank, loss_step)


if __name__ == "__main__":
    main()
