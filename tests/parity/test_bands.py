"""The autoencoder with pictures in bands of rows equals diffusers' on whole pictures."""

from __future__ import annotations

import pytest

from tests.support import GRAPH_TOLERANCE, Case, relative_error, run_graph

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")
pytestmark = pytest.mark.parity

CASE = Case("wide-vae", "fp32")


@pytest.mark.parametrize(("rows", "columns"), [(1, 2), (3, 5)])
def test_autoencoder_in_bands(checkpoints, reference, rows, columns):
    root, pipe = checkpoints.exported(CASE, "fp32"), reference(checkpoints.get(CASE))
    mean = pipe.vae.bn.running_mean.view(1, -1, 1, 1)
    std = torch.sqrt(pipe.vae.bn.running_var.view(1, -1, 1, 1) + pipe.vae.config.batch_norm_eps)
    generator = torch.Generator().manual_seed(0)
    scale = 2 * pipe.vae_scale_factor
    sample = torch.randn(2, 3, rows * scale, columns * scale, generator=generator).clamp(-1, 1)
    latents = torch.randn(2, pipe.transformer.config.in_channels, rows, columns, generator=generator)
    with torch.no_grad():
        encoded = (pipe._patchify_latents(pipe.vae.encode(sample).latent_dist.mode()) - mean) / std
        decoded = pipe.vae.decode(pipe._unpatchify_latents(latents * std + mean)).sample
    found = run_graph(root, "vae_encoder", "fp32", sample=sample.numpy())
    assert relative_error(found, encoded.numpy()) < GRAPH_TOLERANCE
    found = run_graph(root, "vae_decoder", "fp32", latents=latents.numpy())
    assert relative_error(found, decoded.numpy()) < GRAPH_TOLERANCE
