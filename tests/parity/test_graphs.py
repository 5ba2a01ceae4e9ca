"""Every graph equals its torch module, on random checkpoints of several shapes, in both flavours."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from fluxonnx.checkpoint.manifest import graph_file, read_manifest
from fluxonnx.runtime.session import Session, SessionOptions
from tests.support import GRAPH_TOLERANCE, Case, relative_error

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")
pytestmark = pytest.mark.parity

CASES = [
    Case("odd-heads", "fp32"),
    Case("one-double-three-single", "bf16", shards=3),
    Case("head-dim-64", "bf16"),
    Case("deep-text", "fp16"),
]
BUILDS = [("bf16", "ort"), ("bf16", "portable"), ("fp32", "ort"), ("fp32", "portable")]


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


@pytest.fixture(params=CASES, ids=lambda case: case.id)
def case(request) -> Case:
    return request.param


@pytest.fixture(params=BUILDS, ids="-".join)
def build(request) -> tuple[str, str]:
    return request.param


@pytest.fixture
def root(checkpoints, case, build) -> Path:
    return checkpoints.exported(case, *build)


@pytest.fixture
def pipe(checkpoints, reference, case):
    return reference(checkpoints.get(case))


@pytest.fixture
def run(root, build):
    def run(component: str, **inputs: torch.Tensor) -> list[np.ndarray]:
        with Session(root / graph_file(component, *build), component, SessionOptions()) as session:
            return session.run(**{name: value.numpy() for name, value in inputs.items()})

    return run


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("length", "longest"), [(8, 8), (40, 20), (512, 512), (512, 200)])
def test_text_encoder(root, run, pipe, length, longest):
    """Real and padding rows alike: all of them go to the transformer."""
    layers = read_manifest(root).text_encoder_out_layers
    ids = torch.randint(0, pipe.text_encoder.config.vocab_size, (2, length), generator=torch.Generator().manual_seed(1))
    mask = torch.ones(2, length, dtype=torch.int64)
    mask[0, longest:] = 0
    mask[1, length // 3 + 1 :] = 0
    states = pipe.text_encoder(input_ids=ids, attention_mask=mask, output_hidden_states=True).hidden_states
    expected = torch.cat([states[layer] for layer in layers], dim=-1)
    (found,) = run("text_encoder", input_ids=ids, attention_mask=mask)
    for row in range(2):
        assert relative_error(found[row], expected[row].numpy()) < GRAPH_TOLERANCE


@pytest.mark.parametrize(("height", "width", "text_seq"), [(4, 4, 8), (3, 7, 16), (8, 4, 512)])
def test_transformer_and_conditioning(run, pipe, height, width, text_seq):
    """A batch of two at different timesteps, non-square, with a reference picture behind the noisy tokens."""
    transformer = pipe.transformer
    ids = pipe._prepare_latent_ids(torch.zeros(2, 1, height, width))
    reference_ids = pipe._prepare_image_ids([torch.zeros(1, 1, 3, 2)]).repeat(2, 1, 1)
    img_ids = torch.cat([ids, reference_ids], dim=1)
    hidden_states = normal(2, img_ids.shape[1], transformer.config.in_channels)
    embeds = normal(2, text_seq, transformer.config.joint_attention_dim, seed=1)
    txt_ids = pipe._prepare_text_ids(embeds)
    timestep = torch.tensor([1.0, 0.37])
    expected = transformer(
        hidden_states=hidden_states,
        encoder_hidden_states=embeds,
        timestep=timestep,
        txt_ids=txt_ids,
        img_ids=img_ids,
        return_dict=False,
    )[0]

    projected, cos, sin = run("conditioning", timestep=timestep, txt_ids=txt_ids[0], img_ids=img_ids[0])
    assert (
        relative_error(projected, transformer.time_guidance_embed.time_proj(timestep * 1000).numpy()) < GRAPH_TOLERANCE
    )
    expected_cos, expected_sin = transformer.pos_embed(torch.cat([txt_ids[0], img_ids[0]]))
    assert relative_error(cos, expected_cos.numpy()) < GRAPH_TOLERANCE
    assert relative_error(sin, expected_sin.numpy()) < GRAPH_TOLERANCE

    (found,) = run(
        "transformer",
        hidden_states=hidden_states,
        encoder_hidden_states=embeds,
        **{
            name: torch.from_numpy(value)
            for name, value in (("timestep_proj", projected), ("rotary_cos", cos), ("rotary_sin", sin))
        },
    )
    assert relative_error(found, expected.numpy()) < GRAPH_TOLERANCE


def statistics(vae) -> tuple[torch.Tensor, torch.Tensor]:
    mean = vae.bn.running_mean.view(1, -1, 1, 1)
    return mean, torch.sqrt(vae.bn.running_var.view(1, -1, 1, 1) + vae.config.batch_norm_eps)


@pytest.mark.parametrize(("rows", "columns"), [(2, 2), (3, 5)])
def test_vae_encoder(run, pipe, rows, columns):
    scale = 2 * pipe.vae_scale_factor
    sample = normal(2, 3, rows * scale, columns * scale).clamp(-1, 1)
    mean, std = statistics(pipe.vae)
    expected = (pipe._patchify_latents(pipe.vae.encode(sample).latent_dist.mode()) - mean) / std
    (found,) = run("vae_encoder", sample=sample)
    assert relative_error(found, expected.numpy()) < GRAPH_TOLERANCE


@pytest.mark.parametrize(("rows", "columns"), [(2, 2), (3, 5)])
def test_vae_decoder(run, pipe, rows, columns):
    latents = normal(2, pipe.transformer.config.in_channels, rows, columns)
    mean, std = statistics(pipe.vae)
    expected = pipe.vae.decode(pipe._unpatchify_latents(latents * std + mean)).sample
    (found,) = run("vae_decoder", latents=latents)
    assert relative_error(found, expected.numpy()) < GRAPH_TOLERANCE
