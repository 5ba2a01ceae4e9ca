"""Outlier channels, put into checkpoints by `tools/outliers.py`: what that preserves, and what builds make of them."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

from benchmarks import outliers as benchmark
from fluxonnx.checkpoint.directory import Checkpoint
from fluxonnx.contract import open_checkpoint
from fluxonnx.errors import CheckpointError, UsageError
from fluxonnx.export import export
from fluxonnx.export.components import read_architecture
from tests.support import Case, relative_error, run_graph
from tools.architectures import Architecture, TextEncoderSize, TransformerSize, VaeSize
from tools.make_checkpoint import make_checkpoint
from tools.outliers import EXACT, KINDS, inject, main

pytestmark = pytest.mark.slow

TINY_KLEIN = Path(__file__).parent.parent.parent / "models/tiny-klein"
# float32 round-off of other products, through the depth of a small model; and the fit of "modulation".
PRESERVED = 1e-4
# Random weights, wide enough that rounding errors average out as in a real model.
WIDE = Architecture(
    TextEncoderSize(hidden=512, layers=4, heads=8, kv_heads=4, head_dim=64, intermediate=1024),
    TransformerSize(8, 64, 1, 2, text_dim=1536, in_channels=32, axes=(16, 16, 16, 16)),
    VaeSize((16, 24, 32, 32), latent_channels=8, layers_per_block=1, groups=4),
)


def outputs(root: Path) -> dict[str, np.ndarray]:
    """What each float32 graph of a checkpoint computes; the inputs do not depend on the outliers."""
    export(root, precision="fp32")
    sizes = read_architecture(open_checkpoint(root), None)
    graphs = ("text_encoder", "transformer", "vae_decoder")
    found = {graph: run_graph(root, graph, "fp32", **benchmark.graph_inputs(root, graph, sizes)) for graph in graphs}
    sample = np.random.default_rng(0).uniform(-1, 1, (1, 3, 64, 64)).astype(np.float32)
    return found | {"vae_encoder": run_graph(root, "vae_encoder", "fp32", sample=sample)}


@pytest.mark.parametrize("name", ["tiny-klein", "head-dim-64"])
def test_exact_kinds_preserve_the_function(checkpoints, tmp_path, name):
    """All of them at once, into a model with biases, and one with attention and 1x1 convolutions in the autoencoder."""
    source = TINY_KLEIN if name == "tiny-klein" else checkpoints.get(Case(name))
    changed = inject(source, tmp_path / "changed", EXACT, channels=2, scale=100, sigmas=[benchmark.SIGMA])
    # a scale of 1 changes nothing, and makes a copy
    expected = outputs(inject(source, tmp_path / "same", ["norm-gains"], scale=1))
    for graph, found in outputs(changed).items():
        assert relative_error(found, expected[graph]) < PRESERVED, graph


def tensors(root: Path) -> dict[str, np.ndarray]:
    checkpoint = Checkpoint(root)
    return {
        f"{part}.{name}": tensor.array().astype(np.float32)
        for part in ("text_encoder", "transformer", "vae")
        for name, tensor in checkpoint.tensors(part).items()
    }


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_changes_weights(tmp_path, kind):
    before, after = tensors(TINY_KLEIN), tensors(inject(TINY_KLEIN, tmp_path / "changed", [kind], scale=64))
    changed = {name for name in before if not np.array_equal(before[name], after[name])}
    assert {name.partition(".")[0] for name in changed} == set(KINDS[kind])


def test_powers_of_two_keep_bf16(tmp_path):
    """Then every value of the result is the exact product; other scales make float32 of the tensors that change."""
    exact = inject(TINY_KLEIN, tmp_path / "exact", ["swiglu"], scale=128)
    rounded = inject(TINY_KLEIN, tmp_path / "rounded", ["swiglu"], scale=100)
    name = "model.layers.0.mlp.up_proj.weight"
    tensor = Checkpoint(exact).tensors("text_encoder")[name]
    ratio = tensor.array().astype(np.float64) / Checkpoint(TINY_KLEIN).tensors("text_encoder")[name].array()
    assert tensor.dtype == "BF16"
    assert set(np.unique(ratio)) == {1, 128}
    assert (ratio == 128).all(axis=1).sum() == 2
    dtypes = {key: found.dtype for key, found in Checkpoint(rounded).tensors("text_encoder").items()}
    assert dtypes[name] == "F32"
    assert dtypes["model.layers.0.self_attn.q_proj.weight"] == "BF16"


def test_seed_and_number_of_channels(tmp_path):
    def rows(number: int, **options: int) -> list[int]:
        root = inject(TINY_KLEIN, tmp_path / str(number), ["norm-gains"], scale=64, **options)
        ratio = tensors(root)["text_encoder.model.layers.0.input_layernorm.weight"] / gains
        return np.flatnonzero(ratio != 1).tolist()

    gains = tensors(TINY_KLEIN)["text_encoder.model.layers.0.input_layernorm.weight"]
    first = rows(0)
    assert len(first) == 2
    assert rows(1) == first
    assert rows(2, seed=1) != first
    assert len(rows(3, channels=20)) == 20


def test_token_is_the_first_of_every_prompt(tmp_path):
    name = "text_encoder.model.embed_tokens.weight"
    before = tensors(TINY_KLEIN)[name]
    after = tensors(inject(TINY_KLEIN, tmp_path / "first", ["token"], scale=1024))[name]
    (row,) = np.flatnonzero((before != after).any(axis=1))
    tokenizer = json.loads((TINY_KLEIN / "tokenizer/tokenizer.json").read_text("utf-8"))
    assert next(entry["content"] for entry in tokenizer["added_tokens"] if entry["id"] == row) == "<|im_start|>"
    after = tensors(inject(TINY_KLEIN, tmp_path / "seventh", ["token"], scale=1024, token=7))[name]
    assert np.flatnonzero((before != after).any(axis=1)).tolist() == [7]


@pytest.mark.parametrize(
    ("kinds", "options", "pattern"),
    [
        (["nothing"], {}, "kind 'nothing' is unknown: choose from norm-gains"),
        (["gates"], {"components": ["vae"]}, "gates changes nothing in vae"),
        (["gates"], {"channels": 0}, "at least 1 channel"),
        (["gates"], {"scale": 0.0}, "a scale over 0"),
        (["gates"], {"scale": math.inf}, "a scale over 0"),
        (["token"], {"token": 100_000}, "token 100000 is not in the vocabulary"),
    ],
)
def test_usage_errors(tmp_path, kinds, options, pattern):
    with pytest.raises(UsageError, match=pattern):
        inject(TINY_KLEIN, tmp_path / "changed", kinds, **options)
    assert not list(tmp_path.iterdir())


def test_existing_folder_and_missing_model(tmp_path):
    with pytest.raises(UsageError, match="exists: choose a new folder"):
        inject(TINY_KLEIN, tmp_path, ["gates"])
    with pytest.raises(CheckpointError, match="does not exist"):
        inject(tmp_path / "missing", tmp_path / "changed", ["gates"])


def test_command(tmp_path, capsys):
    target = tmp_path / "changed"
    assert main([str(TINY_KLEIN), str(target), "--kind", "norm-gains", "--channels", "3", "--scale", "8"]) == 0
    assert "norm-gains x 8 in 3 channels" in capsys.readouterr().out
    assert main([str(TINY_KLEIN), str(target), "--kind", "gates"]) == 1
    assert capsys.readouterr().err.count("\n") == 1


def test_benchmark(tmp_path, capsys):
    arguments = ["-d", str(TINY_KLEIN), "--kind", "gates", "--scale", "1", "64", "--precision", "int8"]
    assert benchmark.main([*arguments, "--work", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "s = 64" in printed
    assert "| gates | transformer | int8" in printed
    assert not list(tmp_path.iterdir())
    assert benchmark.main(["-d", "no/such/model"]) == 1
    assert benchmark.main(["-d", str(TINY_KLEIN), "--kind", "gates", "--component", "vae"]) == 1


# What int8 and int4 make of outliers: scaling is undone when weights are written.
HELD = {
    "text_encoder": ("norm-gains", "values", "swiglu", "query-key"),
    "transformer": ("values", "swiglu", "query-key", "gates", "modulation"),
}


@pytest.mark.parametrize("component", HELD)
@pytest.mark.parametrize("width", [128, 512])
def test_outliers_cost_little(tmp_path, width, component):
    """All kinds at once, two channels each."""
    source = TINY_KLEIN if width == 128 else make_checkpoint(tmp_path / "wide", WIDE)

    def errors(scale: float, *builds: str) -> dict[str, float]:
        rows = benchmark.measure(source, tmp_path, HELD[component], scale, builds, components=[component])
        return {row.precision: row.error for row in rows}

    assert errors(100, "int8")["int8"] < 0.03
    plain, found = errors(1, "int4"), errors(300, "int8", "int4")
    assert found["int8"] < 0.05
    assert found["int4"] < 1.3 * plain["int4"]
