"""The reverse of assemble.py: convert a base model's directory to checkpoints that --resume continues from.

python models/tiny-klein/training/to_checkpoints.py WORK MODEL

A model directory has neither optimiser state nor the heads that are discarded after training, so these start from
scratch: the probes of probe.py and the reader of train_text.py.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

from common import CONFIG, save
from diffusers import AutoencoderKLFlux2
from flow import new_flow
from probe import make_probes
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch import nn
from train_text import Reader


def main() -> None:
    parser = argparse.ArgumentParser(description="convert a base model to checkpoints")
    parser.add_argument("work", type=Path, help="folder for the checkpoints")
    parser.add_argument("model", type=Path, help="model directory to read")
    arguments = parser.parse_args()
    work, model = arguments.work, arguments.model
    work.mkdir(parents=True, exist_ok=True)
    shutil.copytree(model / "tokenizer", work / "tokenizer", dirs_exist_ok=True)
    tokenizer = Tokenizer.from_file(str(work / "tokenizer/tokenizer.json"))

    flow = new_flow(tokenizer)
    text_encoder = load_file(model / "text_encoder/model.safetensors")
    text_encoder["lm_head.weight"] = text_encoder["model.embed_tokens.weight"]
    flow.text_encoder.load_state_dict(text_encoder)
    flow.transformer.load_state_dict(load_file(model / "transformer/diffusion_pytorch_model.safetensors"))
    reader = Reader()
    vae = AutoencoderKLFlux2.from_pretrained(model / "vae", low_cpu_mem_usage=False).float()
    vae.save_pretrained(work / "vae")

    write(work / "vae.pt", CONFIG["vae"]["steps"], vae=vae)
    write(work / "text.pt", CONFIG["text"]["steps"], encoder=flow.text_encoder, reader=reader)
    write(work / "flow.pt", CONFIG["flow"]["steps"], flow=flow, reader=reader, sights=make_probes(flow.transformer))


def write(path: Path, step: int, **modules: nn.Module) -> None:
    """Write a checkpoint without optimiser state, in which the averaged weights equal the weights."""
    weights = {name: module.state_dict() for name, module in modules.items()}
    save({"weights": weights, "average": weights, "step": step, "warm": step}, path)


if __name__ == "__main__":
    main()
