"""Pictures in bands of rows: the autoencoder of wide models computes what it computes of whole pictures."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from fluxonnx.checkpoint.manifest import read_manifest
from fluxonnx.checkpoint.safetensors import read_header
from fluxonnx.export import export
from tests.support import GRAPH_TOLERANCE, Case, operators, relative_error, run_graph

pytestmark = pytest.mark.slow

VAE = ("vae_encoder", "vae_decoder")


@pytest.fixture(scope="module")
def root(checkpoints) -> Path:
    """Both flavours of one checkpoint: portable graphs have whole pictures."""
    checkpoints.exported(Case("wide-vae"), "bf16", "portable")
    return checkpoints.exported(Case("wide-vae"))


def sample_and_latents(rows: int, columns: int, batch: int = 2) -> dict[str, dict[str, np.ndarray]]:
    """Inputs of the autoencoder's graphs, in tokens of 8 pixels."""
    rng = np.random.default_rng(rows)
    return {
        "vae_encoder": {"sample": rng.uniform(-1, 1, (batch, 3, 8 * rows, 8 * columns)).astype(np.float32)},
        "vae_decoder": {"latents": rng.standard_normal((batch, 32, rows, columns), np.float32)},
    }


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (1, 4), (3, 2), (8, 5)])
@pytest.mark.parametrize("component", VAE)
def test_bands_are_the_whole_picture(root, component, rows, columns):
    """Also where a band is one row, and where rows are odd."""
    inputs = sample_and_latents(rows, columns)[component]
    found = run_graph(root, component, "bf16", **inputs)
    assert relative_error(found, run_graph(root, component, "bf16", "portable", **inputs)) < GRAPH_TOLERANCE


@pytest.mark.parametrize("opset", [17, 18])
def test_bands_of_any_opset(copy_of, opset):
    """Split was told the number of parts by its outputs, and is by an attribute since 18."""
    root = copy_of(Case("wide-vae"))
    export(root, opset=opset, components=list(VAE))
    export(root, flavour="portable", components=list(VAE))
    for component, inputs in sample_and_latents(2, 3).items():
        found = run_graph(root, component, "bf16", **inputs)
        assert relative_error(found, run_graph(root, component, "bf16", "portable", **inputs)) < GRAPH_TOLERANCE


def test_flavours_share_a_weight_file(copy_of):
    """Bands take weights in the order in which whole pictures do."""
    root = copy_of(Case("wide-vae"))
    headers = []
    for flavour in ("ort", "portable"):
        export(root, precision="fp32", flavour=flavour, components=list(VAE))
        manifest = read_manifest(root)
        assert manifest is not None
        parts = [c for name, build in manifest.builds.items() for c in build.components.values() if "fp32" in name]
        headers.append([list(read_header(root / file)) for part in parts[-2:] for file in part.weights])
    assert headers[0] == headers[1]


def test_only_wide_models_have_bands(checkpoints, root):
    narrow = checkpoints.exported(Case("odd-heads"))
    for component in VAE:  # norms of whole pictures are one operator
        assert "ReduceMean" not in operators(narrow, component, "bf16")
        assert "ReduceMean" in operators(root, component, "bf16")
