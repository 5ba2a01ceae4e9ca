"""The random checkpoints are what the real classes read and write; everything else rests on that."""

from __future__ import annotations

import errno
import shutil
from types import SimpleNamespace

import numpy as np
import pytest

from tests.support import Case
from tools.make_checkpoint import ARCHITECTURES, make_checkpoint

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")
pytestmark = pytest.mark.parity

SMALL = [name for name in ARCHITECTURES if name not in ("4b", "4b-short", "4b-vae", "9b")]
STORED = [Case("odd-heads"), Case("head-dim-64", "fp16"), Case("one-double-three-single", "fp32", shards=3)]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_tensors_are_those_of_the_classes(name):
    from diffusers import AutoencoderKLFlux2, Flux2Transformer2DModel
    from transformers import Qwen3Config, Qwen3ForCausalLM

    sizes = ARCHITECTURES[name]
    with torch.device("meta"):
        modules = [
            (Qwen3ForCausalLM(Qwen3Config(**sizes.text_encoder.config("bfloat16"))), sizes.text_encoder),
            (Flux2Transformer2DModel.from_config(sizes.transformer.config()), sizes.transformer),
            (AutoencoderKLFlux2.from_config(sizes.vae.config()), sizes.vae),
        ]
    for module, size in modules:
        expected = {key: tuple(value.shape) for key, value in module.state_dict().items()}
        if "lm_head.weight" in expected and sizes.text_encoder.tied:
            del expected["lm_head.weight"]
        assert size.shapes() == expected


@pytest.mark.parametrize("case", STORED, ids=lambda case: case.id)
def test_files_are_byte_for_byte_those_of_the_library(checkpoints, case):
    """Order of tensors, alignment, metadata and the scalar counter: written again by safetensors, nothing changes."""
    import safetensors.torch

    files = sorted(checkpoints.get(case).glob("*/*.safetensors"))
    assert len(files) == 1 + 2 * case.shards
    for file in files:
        content = file.read_bytes()
        assert safetensors.torch.save(safetensors.torch.load(content), {"format": "pt"}) == content


@pytest.mark.parametrize("name", SMALL)
def test_pipeline_makes_a_picture(checkpoints, reference, name):
    sizes = ARCHITECTURES[name]
    pipe = reference(checkpoints.get(Case(name, shards=2)))
    assert type(pipe).__name__ == "Flux2KleinPipeline"
    latents = []
    image = pipe(
        prompt="a cat",
        width=64,
        height=64,
        num_inference_steps=2,
        guidance_scale=1.0,
        generator=torch.Generator("cpu").manual_seed(0),
        text_encoder_out_layers=(9, 18, 27) if sizes.text_encoder.layers >= 27 else (1, 2, 3),
        callback_on_step_end=lambda pipe, i, t, values: latents.append(values["latents"].numpy()) or values,
    ).images[0]
    assert image.size == (64, 64)
    assert np.asarray(image).std() > 0
    # The last step goes from sigmas[1] to 0. Its velocity is of order one, neither dead nor exploding: then tolerances
    # elsewhere mean something.
    velocity = (latents[1] - latents[0]).std() / float(pipe.scheduler.sigmas[1])
    assert 0.1 < velocity < 10


def test_every_stored_value_reaches_the_model(checkpoints, reference):
    """No tensor is dropped, renamed or drawn afresh on loading."""
    from safetensors.torch import load_file

    path = checkpoints.get(Case("odd-heads"))
    pipe = reference(path)
    for component in ("text_encoder", "transformer", "vae"):
        state = getattr(pipe, component).state_dict()
        stored = {
            name: value for file in (path / component).glob("*.safetensors") for name, value in load_file(file).items()
        }
        assert state.keys() == stored.keys()
        for name, value in stored.items():
            assert torch.equal(state[name], value.to(state[name].dtype)), name


def test_tokenizer_formats_a_prompt_as_qwen3_does(checkpoints, reference):
    tokenizer = reference(checkpoints.get(Case("odd-heads"))).tokenizer
    prompt = " a “cat” é <think> {{ 7 }}\n\n"
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True, enable_thinking=False
    )
    assert text == f"<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
    assert tokenizer.pad_token == "<|endoftext|>"
    ids = tokenizer(text, padding="max_length", truncation=True, max_length=512)["input_ids"]
    assert len(ids) == 512
    assert ids[-1] == tokenizer.pad_token_id
    assert tokenizer.decode(ids).startswith(text)
    assert max(ids) < len(tokenizer) <= min(sizes.text_encoder.vocab for sizes in ARCHITECTURES.values())


def test_values_depend_on_the_seed_only(tmp_path):
    paths = [
        make_checkpoint(tmp_path / str(i), ARCHITECTURES["tiny-random"], seed=seed) for i, seed in enumerate((3, 3, 4))
    ]
    first, again, other = [(path / "transformer/diffusion_pytorch_model.safetensors").read_bytes() for path in paths]
    assert first == again != other


def test_full_disk_is_told_before_writing(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(OSError, match="GB are free") as caught:
        make_checkpoint(tmp_path / "new" / "model", ARCHITECTURES["4b"])
    assert caught.value.errno == errno.ENOSPC
    assert list(tmp_path.iterdir()) == []
