"""A damaged or foreign model directory is named as such, in one line, before anything is done with it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from fluxonnx.checkpoint.directory import read_tensors
from fluxonnx.checkpoint.safetensors import Quantisation, fingerprint, read_header
from fluxonnx.contract import COMPONENT_CLASSES, open_checkpoint
from fluxonnx.errors import CheckpointError
from tests.support import Case

CASE = Case("one-double-three-single", shards=3)


def safetensors(path: Path, header: object, data: bytes = b"", length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)
    return path


def entry(dtype: object = "F32", shape: object = (2,), offsets: object = (0, 8)) -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def test_header_equals_the_librarys_reading(checkpoints):
    """Offsets, shapes and dtypes are those that the safetensors library uses."""
    path = checkpoints.get(Case("odd-heads", "fp32")) / "vae" / "diffusion_pytorch_model.safetensors"
    expected = load_file(path)
    found = read_header(path)
    assert set(found) == set(expected)
    for name, tensor in found.items():
        assert np.array_equal(tensor.array(), expected[name]), name


@pytest.mark.parametrize(
    ("header", "data", "length", "message"),
    [
        ({"a": entry()}, bytes(7), None, "truncated"),
        (b"{", b"", None, "not JSON"),
        (b"[]", b"", None, "not a JSON object"),
        (b"{}", b"", 10**12, "not a whole safetensors file"),
        (b"{}", b"", 50, "not a whole safetensors file"),
        ({"a": entry(dtype="F13")}, bytes(8), None, "dtype 'F13'"),
        ({"a": entry(offsets=(0, 4))}, bytes(8), None, "needs 8"),
        ({"a": entry(shape=(-2,))}, bytes(8), None, "malformed"),
        ({"a": entry(shape=(2.0,))}, bytes(8), None, "malformed"),
        ({"a": entry(shape=None)}, bytes(8), None, "malformed"),
        ({"a": entry(offsets=(0, 8, 9))}, bytes(8), None, "malformed"),
        ({"a": []}, bytes(8), None, "malformed"),
        ({"a": entry(), "b": entry(offsets=(4, 12))}, bytes(12), None, "overlap"),
    ],
)
def test_corrupt_header(tmp_path, header, data, length, message):
    path = safetensors(tmp_path / "model.safetensors", header, data, length)
    with pytest.raises(CheckpointError, match=message) as error:
        read_header(path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_empty_and_missing_files(tmp_path):
    (tmp_path / "empty.safetensors").touch()
    with pytest.raises(CheckpointError, match="0 bytes"):
        read_header(tmp_path / "empty.safetensors")
    with pytest.raises(CheckpointError, match="missing"):
        read_header(tmp_path / "absent.safetensors")


def test_shards_are_read_as_one(checkpoints):
    assert set(read_tensors(checkpoints.get(CASE) / "transformer")) == set(
        read_tensors(checkpoints.get(Case("one-double-three-single")) / "transformer")
    )


def test_missing_shard(copy_of):
    path = copy_of(CASE)
    (path / "transformer" / "diffusion_pytorch_model-00002-of-00003.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"00002-of-00003\.safetensors is missing"):
        read_tensors(path / "transformer")


def test_index_that_does_not_match(copy_of):
    path = copy_of(CASE)
    index = path / "transformer" / "diffusion_pytorch_model.safetensors.index.json"
    values = json.loads(index.read_text())
    values["weight_map"]["ghost.weight"] = "diffusion_pytorch_model-00001-of-00003.safetensors"
    index.write_text(json.dumps(values))
    with pytest.raises(CheckpointError, match=r"ghost\.weight"):
        read_tensors(path / "transformer")
    values["weight_map"]["ghost.weight"] = "../../secret.safetensors"
    index.write_text(json.dumps(values))
    with pytest.raises(CheckpointError, match="outside its folder"):
        read_tensors(path / "transformer")


def test_no_weights_at_all(copy_of):
    path = copy_of(Case("odd-heads"))
    (path / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="holds no weights"):
        read_tensors(path / "vae")


def test_other_pipelines_are_refused(copy_of, tmp_path):
    path = copy_of(Case("odd-heads"))
    with pytest.raises(CheckpointError, match="does not exist"):
        open_checkpoint(tmp_path / "nowhere")
    (path / "model_index.json").write_text('{"_class_name": "StableDiffusionPipeline"}')
    with pytest.raises(CheckpointError, match="StableDiffusionPipeline"):
        open_checkpoint(path)
    (path / "model_index.json").write_text("{")
    with pytest.raises(CheckpointError, match="not valid JSON"):
        open_checkpoint(path)
    (path / "model_index.json").unlink()
    with pytest.raises(CheckpointError, match=r"model_index\.json is missing"):
        open_checkpoint(path)


@pytest.mark.parametrize(("component", "key"), [("transformer", "_class_name"), ("text_encoder", "architectures")])
def test_other_model_classes_are_refused(copy_of, component, key):
    path = copy_of(Case("odd-heads"))
    config = path / component / "config.json"
    values = json.loads(config.read_text())
    values[key] = ["Other"] if key == "architectures" else "Other"
    config.write_text(json.dumps(values))
    with pytest.raises(CheckpointError, match="Other"):
        open_checkpoint(path).config(component, COMPONENT_CLASSES[component])


def test_fingerprint_sees_header_size_and_data(tmp_path):
    """A fine-tune swapped in has the same header: the data has to count, too."""
    original = safetensors(tmp_path / "a", {"a": entry()}, bytes(8))
    same = safetensors(tmp_path / "b", {"a": entry()}, bytes(8))
    other = safetensors(tmp_path / "c", {"a": entry()}, bytes(7) + b"\1")
    assert fingerprint(original) == fingerprint(same) != fingerprint(other)


def test_hub_cache_gives_the_models_name(checkpoints, tmp_path):
    snapshot = tmp_path / "models--black-forest-labs--FLUX.2-klein-4B" / "snapshots" / "0123abc"
    snapshot.parent.mkdir(parents=True)
    snapshot.symlink_to(checkpoints.get(Case("odd-heads")))
    assert (
        open_checkpoint(snapshot).name == open_checkpoint(checkpoints.get(Case("odd-heads"))).name
    )  # a link is followed ...
    snapshot.unlink()
    snapshot.mkdir()
    (snapshot / "model_index.json").write_text('{"_class_name": "Flux2KleinPipeline"}')
    assert open_checkpoint(snapshot).name == "FLUX.2-klein-4B"  # ... a snapshot folder is not called by its hash


def test_rows_of_a_tensor_are_tensors(tmp_path):
    values = np.arange(18, dtype=np.float32).reshape(6, 3)
    save_file({"w": values}, tmp_path / "w.safetensors")
    tensor = read_header(tmp_path / "w.safetensors")["w"]
    swapped = replace(tensor, swapped=True)
    for whole, expected in ((tensor, values), (swapped, np.concatenate([values[3:], values[:3]]))):
        parts = whole.split([1, 2, 3])
        assert [part.name for part in parts] == ["w.0", "w.1", "w.2"]
        np.testing.assert_array_equal(np.concatenate([part.array() for part in parts]), expected)
        # a scale for each row, or one for all
        for scale, shapes in ((tensor, [(1, 3), (2, 3), (3, 3)]), (replace(tensor, shape=(1,), nbytes=4), [(1,)] * 3)):
            scaled = replace(whole, quantisation=Quantisation(scale)).split([1, 2, 3])
            assert [part.quantisation.scale.shape for part in scaled] == shapes
    with pytest.raises(AssertionError, match="not side by side"):
        swapped.split([2, 4])
