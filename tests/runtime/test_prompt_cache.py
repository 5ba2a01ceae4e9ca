"""Prompt embeddings on disk: never those of another encoder, never damaged ones."""

from __future__ import annotations

import hashlib
import io
import os
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest

import fluxonnx
from fluxonnx.checkpoint.manifest import read_manifest
from fluxonnx.checkpoint.safetensors import read_header
from fluxonnx.export import export
from fluxonnx.runtime.prompts import PromptCache, encoder_identity
from fluxonnx.runtime.text import Tokens
from tests.support import Case

CASE = Case("odd-heads")
TOKENS = Tokens(np.arange(8)[None], np.ones((1, 8), np.int64), "")
EMBEDS = np.random.default_rng(0).standard_normal((1, 8, 12), np.float32)


def draw(root: Path, precision: str, cache: Path | None) -> bytes:
    with fluxonnx.load(root, precision=precision, cache_dir=cache) as flux:
        return flux.generate("a cat", 64, 64, steps=1, seed=1).tobytes()


def change_encoder(root: Path) -> None:
    """Give a checkpoint another text encoder of the same sizes, as a fine-tuned one would be."""
    file = root / "text_encoder/model.safetensors"
    tensor = next(tensor for name, tensor in read_header(file).items() if name.endswith("layers.0.mlp.up_proj.weight"))
    content = bytearray(file.read_bytes())
    content[tensor.offset : tensor.offset + tensor.nbytes] = bytes(tensor.nbytes)
    file.write_bytes(content)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["bf16", "int8", "int4"])
def test_two_encoders_of_the_same_sizes(copy_of, tmp_path, precision):
    """In two self-contained copies, whose graphs are the same byte for byte, and in place."""
    root, copies = copy_of(CASE), []
    for name in ("first", "second"):
        export(root, precision=precision, output=tmp_path / name)
        copies.append(tmp_path / name)
        change_encoder(root)
    alone = [draw(copy, precision, None) for copy in copies]
    assert alone[0] != alone[1]
    for _ in range(2):
        assert [draw(copy, precision, tmp_path / "cache") for copy in copies] == alone
    assert len(list((tmp_path / "cache").glob("*.npy"))) == 2


@pytest.mark.slow
@pytest.mark.parametrize(
    ("precision", "settings"), [("int8", {"rotate": True}), ("int4", {"block": 64}), ("int4", {"keep": "q_proj"})]
)
def test_same_build_with_other_settings(copy_of, tmp_path, precision, settings):
    root = copy_of(CASE)
    for options in ({}, settings, {}):
        export(root, precision=precision, force=True, **options)
        alone = draw(root, precision, None)
        assert draw(root, precision, tmp_path / "cache") == alone


@pytest.mark.parametrize("field", ["opset", "flavour", "settings", "exporter_digest", "graph_format"])
def test_identity_holds_all_that_a_build_says(checkpoints, field):
    root = checkpoints.exported(CASE)
    manifest = read_manifest(root)
    build = manifest.builds["bf16"]
    before = encoder_identity(root, manifest, build, "onnxruntime", "cpu")
    assert encoder_identity(root, manifest, build, "onnxruntime", "cuda") != before
    assert encoder_identity(root, manifest, build, "another", "cpu") != before
    owner = build if hasattr(build, field) else build.components["text_encoder"]
    setattr(owner, field, {"a": "b"} if field == "settings" else 7)
    assert encoder_identity(root, manifest, build, "onnxruntime", "cpu") != before


def with_digest(body: bytes) -> bytes:
    return body + hashlib.sha256(body).digest()


def npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def zipped(content: bytes) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("embeds.npy", content)
    return file.getvalue()


def flipped(content: bytes) -> bytes:
    return content[:-100] + bytes([content[-100] ^ 1]) + content[-99:]


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: b"",
        lambda content: content[: len(content) // 2],
        lambda content: content[:-1],
        lambda content: content + b"x",
        lambda content: content[: len(content) // 2] + bytes(len(content) - len(content) // 2),
        flipped,
        zipped,
        lambda content: npy(EMBEDS),
        lambda content: with_digest(npy(EMBEDS[..., :8])),
        lambda content: with_digest(npy(EMBEDS.astype(np.float64))),
        lambda content: with_digest(npy(np.asfortranarray(EMBEDS))),
        lambda content: with_digest(npy(np.full_like(EMBEDS, np.nan))),
        lambda content: with_digest(npy(np.array([{}], object))),
        lambda content: with_digest(b"\x93NUMPY\x01\x00" + b"\xff" * 300),
    ],
)
def test_damaged_entry_is_made_again(tmp_path, damage):
    cache = PromptCache(tmp_path, lambda: "encoder", 12)
    cache.save(TOKENS, EMBEDS)
    (file,) = tmp_path.iterdir()
    assert np.array_equal(cache.load(TOKENS), EMBEDS)
    file.write_bytes(damage(file.read_bytes()))
    assert cache.load(TOKENS) is None
    cache.save(TOKENS, EMBEDS)
    assert np.array_equal(cache.load(TOKENS), EMBEDS)


def test_numpy_can_read_an_entry(tmp_path):
    PromptCache(tmp_path, lambda: "encoder", 12).save(TOKENS, EMBEDS)
    (file,) = tmp_path.iterdir()
    assert np.array_equal(np.load(file), EMBEDS)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes")
@pytest.mark.parametrize("make", [os.mkdir, getattr(os, "mkfifo", None)])
def test_no_file_in_the_place_of_an_entry(tmp_path, make):
    cache = PromptCache(tmp_path, lambda: "encoder", 12)
    cache.save(TOKENS, EMBEDS)
    (file,) = tmp_path.iterdir()
    file.unlink()
    make(file)
    assert cache.load(TOKENS) is None


def test_only_what_the_open_encoder_gave_is_kept(tmp_path):
    """An encoder that was replaced after it was opened, and numbers that are not finite."""
    names = iter(["before", "after"])
    cache = PromptCache(tmp_path, lambda: next(names), 12)
    cache.save(TOKENS, EMBEDS)
    PromptCache(tmp_path, lambda: "encoder", 12).save(TOKENS, np.full_like(EMBEDS, np.inf))
    PromptCache(tmp_path, lambda: "encoder", 13).save(TOKENS, EMBEDS)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_moved_model_keeps_its_entries(copy_of, tmp_path):
    root = copy_of(CASE)
    first = draw(root, "bf16", tmp_path / "cache")
    moved = shutil.move(root, tmp_path / "moved")
    assert draw(Path(moved), "bf16", tmp_path / "cache") == first
    assert len(list((tmp_path / "cache").iterdir())) == 2  # embeddings and tokens
