"""What is read before it is needed, and what stays loaded."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

import numpy as np
import pytest

from fluxonnx.checkpoint.manifest import read_manifest
from fluxonnx.checkpoint.safetensors import read_header
from fluxonnx.contract import EMBEDDING_TABLE, Architecture, grid_ids
from fluxonnx.errors import CheckpointError
from fluxonnx.runtime.engine import SessionOptions
from fluxonnx.runtime.events import GraphRan
from fluxonnx.runtime.models import Models
from fluxonnx.runtime.prefault import Prefault, Span
from fluxonnx.runtime.session import DeviceInputs
from fluxonnx.runtime.tiles import Tiling
from tests.support import Case

IDS = np.array([[7, 3, 7, 0, 0, 0, 0, 0]])
MASK = (IDS > 0).astype(np.int64)


@pytest.fixture
def root(checkpoints):
    return checkpoints.exported(Case("odd-heads"), "int8")


@pytest.fixture
def models(root, engine) -> Callable[..., Models]:
    """models(...): the graphs, with the given ways to get weights into memory."""
    manifest = read_manifest(root)
    assert manifest is not None
    options = SessionOptions(engine=engine, free_memory=lambda: 12345)
    return lambda **ways: Models(root, manifest.builds["int8"], options, **ways)


def encode(models: Models) -> None:
    models.prompt_embeds(IDS, MASK)
    models.release("text_encoder")


def test_graphs_are_read_first_and_only_some_rows_of_the_embeddings(models, root):
    found: list[Span] = []

    def read_ahead(spans: Sequence[Span], free: int) -> None:
        assert free == 12345
        found.extend(spans)

    encode(models(read_ahead=read_ahead))

    encoder, transformer = root / "text_encoder/int8.safetensors", root / "transformer/int8.safetensors"
    table = read_header(encoder)[EMBEDDING_TABLE]
    row = table.nbytes // table.shape[0]
    rows = [Span(encoder, table.offset + i * row, table.offset + (i + 1) * row) for i in (0, 3, 7)]
    size = encoder.stat().st_size
    rest = [Span(encoder, 0, table.offset), Span(encoder, table.offset + table.nbytes, size)]
    graphs = [root / "text_encoder.int8.onnx", root / "transformer.int8.onnx"]
    assert found[1:-2] == rows + rest
    assert [found[0].file, found[-2].file] == graphs
    assert found[-1] == Span(transformer, 0, transformer.stat().st_size)


def test_new_memory_is_touched_once(models):
    """Where the weights were in memory when the prompt was encoded, touching them would waste seconds."""
    touched: list[int] = []
    in_memory = iter([False, True, True])

    def prefault(spans: Sequence[Span], free: int) -> Prefault:
        assert free == 12345
        touched.append(len(spans))
        return Prefault((), free)

    opened = models(resident=lambda spans: next(in_memory), prefault=prefault)
    encode(opened)
    encode(opened)
    for _ in range(2):
        with opened.transformer():
            pass
    encode(opened)
    with opened.transformer():
        pass
    assert touched == [2, 0, 0]


def test_prefaulting_ends_with_the_transformer(models):
    with models().transformer():
        pass
    assert not [thread for thread in threading.enumerate() if thread.name == "prefault"]


def test_encoder_and_decoder_stay_loaded_until_they_are_released(models, engine):
    opened = models()
    for _ in range(2):
        opened.prompt_embeds(IDS, MASK)
        opened.decode(np.zeros((1, 32, 4, 4), np.float32), Tiling(None, 16))
    assert engine.loaded == engine.open == ["text_encoder", "vae_decoder"]
    for component in ("text_encoder", "vae_decoder", "vae_decoder"):
        opened.release(component)
    assert engine.open == []


def test_build_without_a_graph(root, engine):
    manifest = read_manifest(root)
    assert manifest is not None
    build = manifest.builds["int8"]
    del build.components["vae_encoder"]
    with pytest.raises(CheckpointError, match=r"lacks the vae_encoder graph: run fluxonnx export .*--precision int8"):
        Models(root, build, SessionOptions())


def test_rotary_tables_are_made_once(root, engine):
    """And the features of later timesteps, made beside smaller tables, are the same bits."""
    manifest = read_manifest(root)
    assert manifest is not None
    runs: list[GraphRan] = []
    options = SessionOptions(engine=engine, watch=lambda event: isinstance(event, GraphRan) and runs.append(event))
    opened = Models(root, manifest.builds["int8"], options)
    width, channels = opened_sizes(root)
    rng = np.random.default_rng(0)
    embeds = rng.standard_normal((1, 8, width), np.float32)
    latents = rng.standard_normal((1, 6, channels), np.float32)
    sigmas = np.array([1, 0.8, 0.3], np.float32)
    for at_once in (True, False):
        with opened.transformer() as transformer:
            velocity = transformer.velocity(embeds, grid_ids(2, 3))
            for sigma in sigmas if at_once else sigmas[::-1]:
                velocity(latents, sigma)
    steps = [run.inputs for run in runs if run.component == "transformer"]
    assert steps[0]["rotary_cos"] is steps[2]["rotary_cos"]
    for first, second in zip(steps[:3], reversed(steps[3:]), strict=True):
        for name, value in first.items():
            np.testing.assert_array_equal(value, second[name])
    assert [len(run.outputs[1]) for run in runs if run.component == "conditioning"] == [14, 2, 2, 14, 2, 2]


def opened_sizes(root) -> tuple[int, int]:
    """Return the width of prompt embeddings and the channels of a latent token."""
    manifest = read_manifest(root)
    assert manifest is not None
    sizes = Architecture.from_json(manifest.architecture, root)
    return sizes.text_encoder.embedding_dim, sizes.transformer.in_channels


def test_graphs_stay_loaded_where_that_is_asked_for(root, engine):
    manifest = read_manifest(root)
    assert manifest is not None
    opened = Models(root, manifest.builds["int8"], SessionOptions(engine=engine, keep_loaded=True))
    for _ in range(2):
        encode(opened)
        with opened.transformer():
            pass
    assert engine.loaded == ["text_encoder", "conditioning", "transformer"]
    opened.close("text_encoder")
    assert engine.open == ["conditioning", "transformer"]
    opened.close()
    assert engine.open == []


def test_inputs_stay_on_a_device_until_others_come():
    device = DeviceInputs("cpu")
    still, moving = np.arange(6, dtype=np.float32), np.zeros(2, np.int64)
    first = device.placed({"still": still, "moving": moving})
    second = device.placed({"still": still, "moving": moving + 1})
    assert second["still"] is first["still"]
    assert second["moving"] is not first["moving"]
    np.testing.assert_array_equal(second["moving"].numpy(), moving + 1)
    np.testing.assert_array_equal(second["still"].numpy(), still)
