"""Pictures with a LoRA equal those of diffusers, which reads the same file: loaded and fused with PEFT where that is
installed, else added to the weights from what diffusers' own reader makes of the file.
"""

from __future__ import annotations

from importlib.util import find_spec

import numpy as np
import pytest

import fluxonnx
from tests.lora.making import CASE, layers_of, pair, random, written
from tests.support import IMAGE_TOLERANCE, LATENTS_TOLERANCE, relative_error

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")
pytestmark = pytest.mark.parity

DOUBLE, SINGLE = "double_blocks.0", "single_blocks.2"
# Layers of the original by name: outputs and inputs in units of the width.
ORIGINAL = {
    f"{DOUBLE}.img_attn.qkv": (3, 1),
    f"{DOUBLE}.txt_attn.qkv": (3, 1),
    f"{DOUBLE}.img_attn.proj": (1, 1),
    f"{DOUBLE}.txt_mlp.0": (6, 1),
    f"{DOUBLE}.img_mlp.2": (1, 3),
    f"{SINGLE}.linear1": (9, 1),
    f"{SINGLE}.linear2": (1, 4),
    "single_stream_modulation.lin": (3, 1),
}


def low_rank(prefix, ends, joined=False, alpha=None):
    def make(layers):
        dim, tensors = layers.shapes["transformer"]["x_embedder"][0], {}
        for seed, (name, (outs, ins)) in enumerate(ORIGINAL.items()):
            if joined and name.startswith("single_stream"):
                continue  # kohya's reader in diffusers does not know it
            key = prefix + (name.replace(".", "_") if joined else name)
            for end, matrix in zip(ends, pair((outs * dim, ins * dim), 2 * seed), strict=True):
                tensors[key + end] = matrix
            if alpha:
                tensors[f"{key}.alpha"] = np.float32(alpha)
        return tensors

    return make


def by_diffusers_names(prefix):
    def make(layers):
        tensors = {}
        for seed, (path, shape) in enumerate(layers.shapes["transformer"].items()):
            down, up = pair(shape, 2 * seed)
            tensors |= {f"{prefix}{path}.lora_A.weight": down, f"{prefix}{path}.lora_B.weight": up}
        return tensors

    return make


def lokr(layers):
    tensors = {}
    for seed, (path, (n_out, n_in)) in enumerate(layers.shapes["transformer"].items()):
        if "transformer_blocks" in path:
            key = f"lycoris_{path.replace('.', '_')}"
            down, up = pair((n_out // 2, n_in // 2), seed)
            tensors |= {f"{key}.lokr_w1": random(2, 2, seed=seed), f"{key}.lokr_w2_a": up, f"{key}.lokr_w2_b": down}
            tensors[f"{key}.alpha"] = np.float32(6)
    return tensors


A_B, DOWN_UP = (".lora_A.weight", ".lora_B.weight"), (".lora_down.weight", ".lora_up.weight")
FILES = {
    "diffusers": by_diffusers_names("transformer."),
    "ai-toolkit": low_rank("diffusion_model.", A_B),
    "peft": low_rank("base_model.model.", A_B),
    "kohya": low_rank("lora_unet_", DOWN_UP, joined=True, alpha=2),
    "lokr": lokr,
}


@pytest.fixture
def pipe(checkpoints, reference):
    """The pipeline of the checkpoint, whose weights are put back."""
    pipe = reference(checkpoints.get(CASE))
    before = {name: value.clone() for name, value in pipe.transformer.state_dict().items()}
    yield pipe
    if hasattr(pipe, "unload_lora_weights") and find_spec("peft"):
        pipe.unload_lora_weights()
    pipe.transformer.load_state_dict(before)


def add(pipe, path):
    """Have the pipeline draw with the file."""
    if find_spec("peft"):
        pipe.load_lora_weights(str(path.parent), weight_name=path.name)
        pipe.fuse_lora()
        return
    state = pipe.lora_state_dict(str(path.parent), weight_name=path.name)
    weights = dict(pipe.transformer.named_parameters())
    with torch.no_grad():
        for key in state:
            name, _, kind = key.removeprefix("transformer.").partition(".lo")
            if kind == "ra_A.weight":
                weights[f"{name}.weight"] += state[key.replace("lora_A", "lora_B")] @ state[key]
            elif kind == "kr_w1":
                second = state[key.replace("w1", "w2_a")] @ state[key.replace("w1", "w2_b")]
                weights[f"{name}.weight"] += torch.kron(state[key], second)


@pytest.mark.parametrize("kind", FILES)
def test_pictures(checkpoints, pipe, tmp_path, kind):
    path = checkpoints.exported(CASE)
    file = written(tmp_path / "lora.safetensors", FILES[kind](layers_of(path)))
    latents, expected_latents = [], []
    with fluxonnx.load(path) as flux:
        flux.load_lora(file)
        image = flux.generate(
            "a bird", 64, 96, steps=2, seed=7, max_sequence_length=16, callback=lambda *step: latents.append(step[-1])
        )
        plain = flux.text_encoder_out_layers
    add(pipe, file)
    expected = pipe(
        prompt="a bird",
        width=64,
        height=96,
        num_inference_steps=2,
        guidance_scale=1.0,
        generator=torch.Generator("cpu").manual_seed(7),
        max_sequence_length=16,
        text_encoder_out_layers=plain,
        callback_on_step_end=lambda pipe, i, t, values: expected_latents.append(values["latents"].numpy()) or values,
    ).images[0]
    for found, wanted in zip(latents, expected_latents, strict=True):
        assert relative_error(found, wanted) < LATENTS_TOLERANCE
    assert np.abs(np.asarray(image, np.int16) - np.asarray(expected, np.int16)).max() <= IMAGE_TOLERANCE
