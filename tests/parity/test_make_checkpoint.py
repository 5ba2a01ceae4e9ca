"""The random checkpoints have exactly the tensors of the real classes; everything else rests on that."""

from __future__ import annotations

import pytest

from benchmarks.make_checkpoint import ARCHITECTURES

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")
pytestmark = pytest.mark.parity


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
