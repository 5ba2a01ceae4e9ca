"""Not one of the steps: train a LoRA of the finished model, which draws everything striped without being told to.

    python models/tiny-klein/training/train_lora.py models/tiny-klein models/stripes.safetensors [--steps 480]

The label of each step is what the model itself would do if the prompt said "striped". The states are those of the
student's own rollouts, as in distill.py. So no pictures are needed, and four steps without guidance stay enough.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from random import Random

import torch
from common import CONFIG, SIDE, prompt_tokens
from diffusers import Flux2Transformer2DModel
from flow import Flow, new_flow, pad_prompts, text_ids
from safetensors.torch import load_file, save_file
from tasks import held_out, relation, side_by_side, single_thing
from tokenizers import Tokenizer
from torch import Tensor, nn

from fluxonnx.runtime.schedule import flow_sigmas

RANK = 4
BATCH = 8
LEARNING_RATE = 3e-3
# The padded length of a prompt at inference, "max_sequence_length" in the model's fluxonnx.json.
TEXT_LENGTH = 64


class Adapted(nn.Module):
    """A linear layer with a low-rank matrix added to its weight, which can be switched off."""

    def __init__(self, layer: nn.Linear, switch: list[bool]):
        super().__init__()
        self.layer, self.switch = layer, switch
        self.lora_a = nn.Parameter(torch.randn(RANK, layer.in_features) / layer.in_features**0.5)
        self.lora_b = nn.Parameter(torch.zeros(layer.out_features, RANK))

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer, with the matrix where it is switched on."""
        y = self.layer(x)
        return y + x @ self.lora_a.T @ self.lora_b.T if self.switch[0] else y


def main() -> None:
    parser = argparse.ArgumentParser(description="train a LoRA that draws everything striped")
    parser.add_argument("model", type=Path, help="model directory")
    parser.add_argument("output", type=Path, help="safetensors file to write")
    parser.add_argument("--steps", type=int, default=480, help="steps of the optimiser (default: %(default)s)")
    arguments = parser.parse_args()
    torch.manual_seed(CONFIG["seed"])
    torch.set_num_threads(1)
    tokenizer = Tokenizer.from_file(str(arguments.model / "tokenizer/tokenizer.json"))
    flow = load(arguments.model, tokenizer)
    switch = [False]
    adapted = adapt(flow.transformer, switch)
    parameters = [p for module in adapted.values() for p in (module.lora_a, module.lora_b)]
    optimizer = torch.optim.AdamW(parameters, LEARNING_RATE, weight_decay=0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, arguments.steps, pct_start=0.1)
    steps = losses(flow, tokenizer, switch)
    for step in range(arguments.steps):
        loss = next(steps)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 20 == 0 or step == arguments.steps - 1:
            print(f"step {step} loss {loss.item():.4f}", flush=True)
    tensors = {}
    for name, module in adapted.items():
        tensors[f"transformer.{name}.lora_A.weight"] = module.lora_a.detach().to(torch.bfloat16)
        tensors[f"transformer.{name}.lora_B.weight"] = module.lora_b.detach().to(torch.bfloat16)
    save_file(tensors, arguments.output, {"format": "pt"})


def load(model: Path, tokenizer: Tokenizer) -> Flow:
    """Load the finished model, in float32."""
    flow = new_flow(tokenizer)
    text_encoder = load_file(model / "text_encoder/model.safetensors")
    text_encoder["lm_head.weight"] = text_encoder["model.embed_tokens.weight"]
    flow.text_encoder.load_state_dict(text_encoder)
    flow.transformer.load_state_dict(load_file(model / "transformer/diffusion_pytorch_model.safetensors"))
    return flow.eval().requires_grad_(False)


def adapt(transformer: Flux2Transformer2DModel, switch: list[bool]) -> dict[str, Adapted]:
    """Wrap all linear layers of the blocks; returns the wrappers by the names of the layers."""
    found = {}
    for name, module in list(transformer.named_modules()):
        if isinstance(module, nn.Linear) and "transformer_blocks." in name:
            parent, _, last = name.rpartition(".")
            found[name] = Adapted(module, switch)
            setattr(transformer.get_submodule(parent), last, found[name])
    return found


def losses(flow: Flow, tokenizer: Tokenizer, switch: list[bool]) -> Iterator[Tensor]:
    """Yield the loss of each step of each rollout."""
    random, steps = Random(CONFIG["seed"]), CONFIG["distillation"]["student_steps"]
    sigmas = flow_sigmas(SIDE * SIDE, steps).tolist()
    channels = 4 * CONFIG["vae"]["model"]["latent_channels"]
    positions = text_ids(torch.arange(TEXT_LENGTH))
    references = torch.zeros(BATCH, 0, channels)
    while True:
        pairs = [prompts(random) for _ in range(BATCH)]
        plain, striped = (
            flow.encode(*pad_prompts(tokenizer, [prompt_tokens(tokenizer, text) for text in texts], TEXT_LENGTH))
            for texts in zip(*pairs, strict=True)
        )
        noisy = torch.randn(BATCH, SIDE * SIDE, channels)
        for now, then in pairwise(sigmas):
            sigma = torch.full((BATCH,), now)
            switch[0] = False
            with torch.no_grad():
                wanted = flow.velocity(noisy, sigma, striped, references, positions)
            switch[0] = True
            velocity = flow.velocity(noisy, sigma, plain, references, positions)
            yield (velocity - wanted).square().mean()
            noisy = noisy + (then - now) * velocity.detach()


def prompts(random: Random) -> tuple[str, str]:
    """Draw a prompt of one or two solid things that are not held out, and the same prompt with striped ones."""
    while True:
        make = random.choices((single_thing, relation, side_by_side), (0.6, 0.25, 0.15))[0]
        task = make(random)
        things = task.target.things
        if not things or held_out(task.target) or "solid" in task.prompt:
            continue
        if any(thing.texture != "solid" or thing.size == "small" for thing in things):
            continue
        shapes = "|".join({thing.shape for thing in things})
        text, count = re.subn(rf"\b(\w+ (?:{shapes}))\b", r"striped \1", task.prompt)
        if count == len(things) and not re.search(
            r"(an?|no) striped (a|an|no|and|out) |striped (an?|no|large|big) ", text
        ):
            return task.prompt, re.sub(r"\b([Aa])n striped", r"\1 striped", text)


if __name__ == "__main__":
    main()
