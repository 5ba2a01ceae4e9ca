"""What is read before it is needed."""

from __future__ import annotations

import numpy as np
import pytest

from fluxonnx.checkpoint import read_header
from fluxonnx.manifest import read_manifest
from fluxonnx.runtime import models
from fluxonnx.runtime.models import EMBEDDINGS, Models
from fluxonnx.runtime.reading import Span
from fluxonnx.runtime.session import SessionOptions
from tests.conftest import Case

IDS = np.array([[7, 3, 7, 0, 0, 0, 0, 0]])
MASK = (IDS > 0).astype(np.int64)


@pytest.fixture
def root(checkpoints):
    return checkpoints.exported(Case("odd-heads"), "int8")


@pytest.fixture
def opened(root) -> Models:
    manifest = read_manifest(root)
    assert manifest is not None
    return Models(root, manifest.builds["int8"], SessionOptions())


@pytest.fixture
def touched(monkeypatch) -> list[list[Span]]:
    found: list[list[Span]] = []
    real = models.Touching
    monkeypatch.setattr(models, "Touching", lambda spans: found.append(list(spans)) or real(spans))
    return found


def test_reads_graphs_first_and_of_the_embeddings_only_rows(opened, root, monkeypatch):
    found: list[Span] = []
    monkeypatch.setattr(models, "read_ahead", found.extend)
    opened.prompt_embeds(IDS, MASK)
    opened.release_text_encoder()

    encoder, transformer = root / "text_encoder/int8.safetensors", root / "transformer/int8.safetensors"
    table = read_header(encoder)[EMBEDDINGS]
    row = table.nbytes // table.shape[0]
    rows = [Span(encoder, table.offset + i * row, table.offset + (i + 1) * row) for i in (0, 3, 7)]
    size = encoder.stat().st_size
    rest = [Span(encoder, 0, table.offset), Span(encoder, table.offset + table.nbytes, size)]
    graphs = [root / "text_encoder.int8.onnx", root / "transformer.int8.onnx"]
    assert found[1:-2] == rows + rest
    assert [found[0].file, found[-2].file] == graphs
    assert (found[-1].file, found[-1].start, found[-1].end) == (transformer, 0, transformer.stat().st_size)


def test_new_memory_is_touched_once(opened, monkeypatch, touched):
    """Where the weights were in memory when the prompt was encoded, that would be seconds in vain."""
    monkeypatch.setattr(models, "is_in_memory", lambda spans: False)
    opened.prompt_embeds(IDS, MASK)
    opened.release_text_encoder()
    monkeypatch.setattr(models, "is_in_memory", lambda spans: True)
    opened.prompt_embeds(IDS, MASK)
    opened.release_text_encoder()
    for _ in range(2):
        with opened.transformer():
            pass
    opened.prompt_embeds(IDS, MASK)
    opened.release_text_encoder()
    with opened.transformer():
        pass
    assert [len(spans) for spans in touched] == [2, 0, 0]
