"""Graphs and a whole run against numbers of the reference kept in a file: real checks without torch."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import fluxonnx
from fluxonnx.manifest import graph_file
from fluxonnx.runtime.session import Session, SessionOptions
from tests.conftest import Case
from tests.golden import make_golden

GOLDEN = np.load(Path(make_golden.__file__).parent / "graphs.npz")
CASE = Case(make_golden.ARCHITECTURE)
BUILDS = [("bf16", "ort"), ("bf16", "portable"), ("fp32", "ort"), ("fp32", "portable")]

# See tests/parity/conftest.py.
TOLERANCE = 1e-5

GRAPHS = {
    "text_encoder": (("input_ids", "attention_mask"), ("prompt_embeds",)),
    "conditioning": (("timestep", "txt_ids", "img_ids"), ("timestep_proj", "rotary_cos", "rotary_sin")),
    "vae_encoder": (("sample",), ("latents",)),
}


@pytest.fixture(params=BUILDS, ids="-".join)
def run(request, checkpoints):
    root = checkpoints.exported(CASE, *request.param)

    def run(component: str, **inputs: np.ndarray) -> list[np.ndarray]:
        with Session(root / graph_file(component, *request.param), component, SessionOptions()) as session:
            return session.run(**inputs)

    return run


def assert_close(found: np.ndarray, expected: np.ndarray) -> None:
    assert found.shape == expected.shape
    assert np.linalg.norm(found - expected) < TOLERANCE * np.linalg.norm(expected)


@pytest.mark.parametrize("component", GRAPHS)
def test_graph(run, component):
    inputs, outputs = GRAPHS[component]
    found = run(component, **{name: GOLDEN[name] for name in inputs})
    for value, name in zip(found, outputs, strict=True):
        assert_close(value, GOLDEN[name])


def test_transformer(run):
    names = ("hidden_states", "timestep_proj", "rotary_cos", "rotary_sin")
    inputs = {name: GOLDEN[name] for name in names}
    (found,) = run("transformer", encoder_hidden_states=GOLDEN["prompt_embeds"], **inputs)
    assert_close(found, GOLDEN["velocity"])


def test_vae_decoder(run):
    (found,) = run("vae_decoder", latents=GOLDEN["latents"])
    assert_close(found, GOLDEN["decoded"])


@pytest.mark.parametrize(("precision", "flavour"), BUILDS)
def test_whole_run(checkpoints, precision, flavour):
    """Prompt and seed to pixels."""
    with fluxonnx.load(checkpoints.exported(CASE, precision, flavour), precision=precision, flavour=flavour) as flux:
        image = flux.generate(
            make_golden.PROMPT,
            make_golden.WIDTH,
            make_golden.HEIGHT,
            steps=make_golden.STEPS,
            seed=make_golden.SEED,
            max_sequence_length=make_golden.LENGTH,
        )
    difference = np.abs(np.asarray(image, np.int16) - GOLDEN["picture"])
    assert difference.max() <= 1
