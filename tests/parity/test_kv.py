"""References that are looked at once: whole runs equal `Flux2KleinKVPipeline` in float32."""

from __future__ import annotations

import pytest

import fluxonnx
from fluxonnx.export import export
from tests.parity.support import assert_same, picture, run_fluxonnx, run_reference
from tests.support import Case

pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
pytestmark = pytest.mark.parity

PICTURES = [picture(64, 96), picture(80, 64, seed=1), picture(160, 64, seed=2)]


@pytest.fixture
def kept_by_both(checkpoints, reference):
    """kept_by_both(case, flavour) -> a Flux with the graphs, the reference pipeline, the hidden states they use."""
    opened = []

    def both(case: Case, flavour: str = "ort"):
        path = checkpoints.exported(case, flavour=flavour)
        export(path, flavour=flavour, kv=True)
        flux = fluxonnx.load(path, flavour=flavour, kv=True)
        opened.append(flux)
        plain = reference(checkpoints.get(case))
        pipe = diffusers.Flux2KleinKVPipeline(**plain.components)
        pipe.set_progress_bar_config(disable=True)
        return flux, pipe, flux.text_encoder_out_layers

    yield both
    for flux in opened:
        flux.close()


@pytest.mark.parametrize(
    ("architecture", "dtype", "flavour"),
    [
        ("odd-heads", "fp32", "ort"),
        ("one-double-three-single", "bf16", "ort"),
        ("deep-text", "bf16", "portable"),
    ],
)
@pytest.mark.parametrize("count", [1, 3])
def test_references(kept_by_both, architecture, dtype, flavour, count):
    flux, pipe, layers = kept_by_both(Case(architecture, dtype), flavour)
    options = {"width": 96, "height": 64}
    found = run_fluxonnx(flux, references=PICTURES[:count], steps=3, kv=True, **options)
    expected = run_reference(pipe, layers, image=PICTURES[:count], num_inference_steps=3, **options)
    assert_same(found, expected)


def test_without_references(kept_by_both):
    """The transformer that reads no references is that of any other model."""
    flux, pipe, layers = kept_by_both(Case("odd-heads", "fp32"))
    found = run_fluxonnx(flux, width=64, height=64, steps=2)
    assert_same(found, run_reference(pipe, layers, width=64, height=64, num_inference_steps=2))


def test_one_step(kept_by_both):
    """The reference's first step reads text, references and picture together; ours reads the references before."""
    flux, pipe, layers = kept_by_both(Case("odd-heads", "fp32"))
    found = run_fluxonnx(flux, references=PICTURES[:1], width=64, height=64, steps=1, kv=True)
    options = {"width": 64, "height": 64, "num_inference_steps": 1}
    assert_same(found, run_reference(pipe, layers, image=PICTURES[:1], **options))
