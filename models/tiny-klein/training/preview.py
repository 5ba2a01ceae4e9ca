"""Score a checkpoint during training, in torch and in batches. evaluate.py scores the finished model.

python models/tiny-klein/training/preview.py WORK [--student] [--count N] [--steps N] [--guidance X] [--sheet FILE]
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from common import SIDE, prompt_tokens
from diffusers import AutoencoderKLFlux2
from evaluate import contact_sheet, score, table
from flow import Flow, load_flow, pad_prompts, text_ids
from latents import decode, encode, load_vae
from scenes import draw
from tasks import Task
from tokenizers import Tokenizer
from torch import Tensor

from fluxonnx.runtime.schedule import flow_sigmas


def main() -> None:
    parser = argparse.ArgumentParser(description="score a checkpoint during training")
    parser.add_argument("work", type=Path, help="folder with the checkpoints")
    parser.add_argument("--student", action="store_true", help="score the distilled model instead of the base model")
    parser.add_argument("--count", type=int, default=40, help="tasks of each kind (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=4, metavar="N", help="sampler steps (default: %(default)s)")
    parser.add_argument(
        "--guidance", type=float, default=1.0, metavar="X", help="guidance scale (default: %(default)s)"
    )
    parser.add_argument("--sheet", type=Path, metavar="FILE", help="also write a contact sheet of 64 prompts to FILE")
    arguments = parser.parse_args()
    work = arguments.work
    tokenizer = Tokenizer.from_file(str(work / "tokenizer/tokenizer.json"))
    vae = load_vae(work)
    flow = load_flow(work / ("student.pt" if arguments.student else "flow.pt"), tokenizer)

    def generate_batch(tasks: Sequence[Task], seeds: Sequence[int]) -> list[np.ndarray]:
        prompts = [prompt_tokens(tokenizer, task.prompt) for task in tasks]
        noise = torch.stack(
            [torch.randn(SIDE * SIDE, 4 * vae.config.latent_channels, generator=torch.manual_seed(s)) for s in seeds]
        )
        references = [encode(vae, (draw(t.sources[i]) for t in tasks)) for i in range(len(tasks[0].sources))]
        tokens = torch.cat([noise[:, :0], *references], 1)
        unconditional = (
            pad_prompts(tokenizer, [prompt_tokens(tokenizer, "")] * len(tasks)) if arguments.guidance != 1 else None
        )
        latents = sample(
            flow, noise, pad_prompts(tokenizer, prompts), unconditional, tokens, arguments.steps, arguments.guidance
        )
        return to_pictures(vae, latents)

    print(table(score(generate_batch, arguments.count)))
    if arguments.sheet:
        contact_sheet(generate_batch).save(arguments.sheet)


@torch.no_grad()
def sample(
    flow: Flow,
    noise: Tensor,
    prompt: tuple[Tensor, Tensor],
    unconditional: tuple[Tensor, Tensor] | None,
    references: Tensor,
    steps: int,
    guidance: float,
) -> Tensor:
    """Denoise to latents [batch, 64, channels], with guidance if the tokens of the empty prompt are given."""
    embeds = [
        (flow.encode(*tokens), text_ids(torch.arange(tokens[0].shape[1])))
        for tokens in (prompt, unconditional)
        if tokens
    ]
    latents = noise
    sigmas = flow_sigmas(SIDE * SIDE, steps)
    for now, then in zip(sigmas[:-1].tolist(), sigmas[1:].tolist(), strict=True):
        sigma = torch.full((len(noise),), now)
        velocities = [flow.velocity(latents, sigma, embed, references, ids) for embed, ids in embeds]
        velocity = velocities[0]
        if len(velocities) == 2:
            velocity = velocities[1] + guidance * (velocities[0] - velocities[1])
        latents = latents + (then - now) * velocity
    return latents


@torch.no_grad()
def to_pictures(vae: AutoencoderKLFlux2, tokens: Tensor) -> list[np.ndarray]:
    """Decode tokens [batch, 64, channels] to pictures, uint8 [128, 128, 3] each."""
    decoded = decode(vae, tokens)
    return list(((decoded.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy())


if __name__ == "__main__":
    main()
