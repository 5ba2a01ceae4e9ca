"""Graphs and a whole run against numbers of the reference that are stored in a file: real checks without torch."""

from __future__ import annotations

import numpy as np
import pytest

import fluxonnx
from fluxonnx.checkpoint.manifest import build_name, graph_file, read_manifest
from fluxonnx.runtime.session import Session, SessionOptions
from tests.golden import make_golden
from tests.support import (
    GOLDEN,
    GOLDEN_PORTS,
    GRAPH_TOLERANCE,
    IMAGE_TOLERANCE,
    Case,
    golden_inputs,
    golden_outputs,
    relative_error,
)

CASE = Case(make_golden.ARCHITECTURE)
BUILDS = [("bf16", "ort"), ("bf16", "portable"), ("fp32", "ort"), ("fp32", "portable")]


@pytest.mark.parametrize(("precision", "flavour"), BUILDS)
@pytest.mark.parametrize("component", GOLDEN_PORTS)
def test_graph(checkpoints, component, precision, flavour):
    root = checkpoints.exported(CASE, precision, flavour)
    manifest = read_manifest(root)
    assert manifest is not None
    build = manifest.builds[build_name(precision, flavour)]
    with Session(root / graph_file(component, precision, flavour), component, SessionOptions(), build) as session:
        outputs = session.run(**golden_inputs(component))
    for found, expected in zip(outputs, golden_outputs(component), strict=True):
        assert relative_error(found, expected) < GRAPH_TOLERANCE


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
    assert difference.max() <= IMAGE_TOLERANCE
