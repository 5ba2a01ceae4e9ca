"""Step 7: assemble the model directory of the base or distilled model, in the layout that fluxonnx and diffusers load.

python models/tiny-klein/training/assemble.py WORK OUT [--base]
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import torch
from common import CONFIG, SIDE
from diffusers import FlowMatchEulerDiscreteScheduler
from flow import load_flow
from latents import load_vae
from safetensors.torch import save_file
from tokenizers import Tokenizer

from tools.architectures import TextEncoderSize
from tools.make_checkpoint import SCHEDULER, model_index


def main() -> None:
    parser = argparse.ArgumentParser(description="assemble a model directory")
    parser.add_argument("work", type=Path, help="folder with the trained checkpoints")
    parser.add_argument("output", type=Path, help="model directory to write")
    parser.add_argument("--base", action="store_true", help="assemble the base model instead of the distilled one")
    arguments = parser.parse_args()
    work, output = arguments.work, arguments.output
    tokenizer = Tokenizer.from_file(str(work / "tokenizer/tokenizer.json"))
    flow = load_flow(work / ("flow.pt" if arguments.base else "student.pt"), tokenizer)

    output.mkdir(parents=True, exist_ok=True)
    write_json(output / "model_index.json", model_index(is_distilled=not arguments.base))
    FlowMatchEulerDiscreteScheduler(**{k: v for k, v in SCHEDULER.items() if k[0] != "_"}).save_pretrained(
        output / "scheduler"
    )
    shutil.copytree(work / "tokenizer", output / "tokenizer", dirs_exist_ok=True)
    size = TextEncoderSize(**CONFIG["flow"]["text_encoder"], vocab=tokenizer.get_vocab_size())
    write_json(output / "text_encoder/config.json", size.config("bfloat16"))
    text_encoder = {name: value.bfloat16().contiguous() for name, value in flow.text_encoder.state_dict().items()}
    text_encoder.pop("lm_head.weight", None)  # tied to the embeddings
    save_file(text_encoder, output / "text_encoder/model.safetensors", metadata={"format": "pt"})
    flow.transformer.to(torch.bfloat16).save_pretrained(output / "transformer")
    load_vae(work).to(torch.bfloat16).save_pretrained(output / "vae")
    # diffusers records the folder that the model was loaded from, which exists only on this machine.
    vae_config = json.loads((output / "vae/config.json").read_text("utf-8"))
    vae_config.pop("_name_or_path", None)
    write_json(output / "vae/config.json", vae_config)
    manifest = {
        "format_version": 1,
        "text_encoder_out_layers": CONFIG["flow"]["out_layers"],
        "defaults": {"width": 16 * SIDE, "height": 16 * SIDE, "max_sequence_length": CONFIG["flow"]["text_length"]},
        "builds": {},
    }
    write_json(output / "fluxonnx.json", manifest)
    parts = [output / name for name in ("text_encoder", "transformer", "vae", "tokenizer", "scheduler")]
    total = sum(path.stat().st_size for part in parts for path in part.iterdir())
    print(f"{output}: {total / 1e6:.1f} MB")


def write_json(path: Path, value: object) -> None:
    """Write a JSON file, and create its folder if it does not exist."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=2) + "\n", "utf-8")


if __name__ == "__main__":
    main()
