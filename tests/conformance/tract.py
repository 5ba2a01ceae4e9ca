"""tract, in Rust. The VAE has fixed sizes, since tract takes minutes to plan it otherwise."""

from __future__ import annotations

import tempfile
from pathlib import Path

import onnx

from tests.conformance.graphs import Graph, Inputs, component_of, with_sizes

TITLE, PACKAGE, MODULES, SIZES = "tract", "tract", ("tract",), "open; VAE fixed"


def load(file: Path, inputs: Inputs) -> Graph:
    import tract

    model = with_sizes(file, inputs) if component_of(file).startswith("vae") else onnx.load(file)
    with tempfile.TemporaryDirectory() as folder:
        onnx.save(model, Path(folder) / "graph.onnx")
        runnable = tract.onnx().load(f"{folder}/graph.onnx").into_model().into_runnable()
    return lambda inputs: [output.to_numpy() for output in runnable.run(list(inputs.values()))]
