"""A damaged or foreign model directory is named as such, in one line, before anything is done with it."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from fluxonnx.api import find_model
from fluxonnx.checkpoint.config import read_json
from fluxonnx.checkpoint.directory import read_tensors
from fluxonnx.checkpoint.formats import resolve
from fluxonnx.checkpoint.reading import MAX_TEXT_BYTES
from fluxonnx.checkpoint.safetensors import Quantisation, fingerprint, read_header
from fluxonnx.contract import COMPONENT_CLASSES, Architecture, open_checkpoint
from fluxonnx.errors import CheckpointError
from fluxonnx.export.components import read_architecture
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
        ({"a": entry(offsets=(0, 4))}, bytes(8), None, "needs 8"),
        ({"a": entry(shape=(-2,))}, bytes(8), None, "malformed"),
        ({"a": entry(shape=(2.0,))}, bytes(8), None, "malformed"),
        ({"a": entry(shape=None)}, bytes(8), None, "malformed"),
        ({"a": entry(offsets=(0, 8, 9))}, bytes(8), None, "malformed"),
        ({"a": []}, bytes(8), None, "malformed"),
        ({"a": entry(), "b": entry(offsets=(4, 12))}, bytes(12), None, "overlap"),
        ({"a": entry(dtype=[])}, bytes(8), None, "malformed"),
        ({"a": entry(dtype={})}, bytes(8), None, "malformed"),
        ({"a": entry(dtype=None)}, bytes(8), None, "malformed"),
        ({"a": entry(shape=[True, 2])}, bytes(8), None, "malformed"),
        ({"a": entry(shape=[10**30])}, bytes(8), None, "malformed"),
        ({"a": entry(shape={"0": 2})}, bytes(8), None, "malformed"),
        ({"a": entry(shape=[1] * 100 + [2])}, bytes(8), None, "malformed"),
        ({"a": entry(offsets="08")}, bytes(8), None, "malformed"),
        ({"a": entry(offsets=[8, 0])}, bytes(8), None, "malformed"),
        ({"a" * 5000: entry()}, bytes(8), None, "malformed"),
        ({"a": 5}, bytes(8), None, "malformed"),
        ({"__metadata__": {"a": 5}}, b"", None, "metadata that are not texts"),
        ({"__metadata__": []}, b"", None, "metadata that are not texts"),
        (b"[" * 100_000, b"", None, "nested too deeply"),
        (b'{"a": ' * 100 + b"1" + b"}" * 100, b"", None, "nested too deeply"),
        (b'{"a": ' + b"1" * 5000 + b"}", b"", None, "integer of 5000 digits"),
        (b"\xff\xff", b"", None, "not UTF-8|not JSON"),
        ({"a": entry()}, bytes(9), None, "has .* bytes, but its tensors end at"),
        ({"a": entry(offsets=(1, 9))}, bytes(9), None, "1 bytes before a belong to no tensor"),
        ({"a": entry(), "b": entry(offsets=(16, 24))}, bytes(24), None, "8 bytes before b belong to no tensor"),
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


def test_a_header_that_lost_a_byte(tmp_path):
    """Read a byte too early, every weight would be another number."""
    text = json.dumps({"a": entry()}) + " "
    path = safetensors(tmp_path / "a", text.encode(), bytes(8), len(text) - 1)
    with pytest.raises(CheckpointError, match="its tensors end at"):
        read_header(path)


def test_unknown_dtypes_matter_only_where_they_are_used(tmp_path):
    path = safetensors(tmp_path / "a", {"a": entry("F13"), "b": entry(offsets=(8, 16))}, bytes(16))
    assert read_header(path)["b"].array().tolist() == [0, 0]
    with pytest.raises(CheckpointError, match="dtype 'F13', expected one of F64"):
        read_header(path)["a"].array()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"GGUF" + bytes(100), "is a GGUF file"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "git-LFS pointer"),
        (b"<!DOCTYPE html>\n<html>", "is a web page"),
        (b"\n <HTML lang=en>", "is a web page"),
        (b"PK\3\4" + bytes(100), "PyTorch file"),
    ],
)
def test_other_files_in_the_place_of_a_models(tmp_path, content, message):
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        read_header(path)
    if not content.startswith((b"GGUF", b"PK")):
        with pytest.raises(CheckpointError, match=message):
            read_json(path)


READERS = [read_header, read_json, fingerprint]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
@pytest.mark.parametrize("read", READERS)
def test_only_regular_files_are_read(tmp_path, read):
    """Opening a pipe waits for ever, and a device may have no end."""
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", Path("/dev/zero")):
        with pytest.raises(CheckpointError, match="not a regular file"):
            read(path)
    with pytest.raises(CheckpointError, match="directory"):
        read(tmp_path)


@pytest.mark.parametrize("read", READERS)
@pytest.mark.parametrize("name", ["a\0b", "a\ud800b", "a" * 5000])
def test_impossible_names(tmp_path, read, name):
    with pytest.raises(CheckpointError, match=r"no file can have such a name|too long"):
        read(tmp_path / name)


def test_json_too_large(tmp_path):
    with (tmp_path / "config.json").open("wb") as file:
        file.truncate(MAX_TEXT_BYTES + 1)
    with pytest.raises(CheckpointError, match="larger than 64 MB"):
        read_json(tmp_path / "config.json")


@pytest.mark.parametrize("name", ["\0", "a\ud800", "a" * 5000])
def test_impossible_model_directories(name):
    with pytest.raises(CheckpointError, match=r"no folder can have such a name|can't be read"):
        open_checkpoint(name)


def test_a_repository_for_a_directory():
    with pytest.raises(CheckpointError, match=r"`fluxonnx download black-forest-labs/FLUX\.2-klein-4B -o FLUX"):
        open_checkpoint("black-forest-labs/FLUX.2-klein-4B")


@pytest.mark.parametrize("name", ["diffusion_pytorch_model-00001-of-00002.safetensors", "diffusion_pytorch_model.bin"])
def test_weights_in_another_form(copy_of, name):
    folder = copy_of(Case("odd-heads")) / "vae"
    (folder / "diffusion_pytorch_model.safetensors").rename(folder / name)
    with pytest.raises(CheckpointError, match=rf"holds {name}, but fluxonnx reads only"):
        read_tensors(folder)


def test_a_text_encoder_without_the_prefix(copy_of):
    root = copy_of(Case("odd-heads"))
    expected = {name: tensor.array().copy() for name, tensor in open_checkpoint(root).tensors("text_encoder").items()}
    path = root / "text_encoder/model.safetensors"
    tensors = load_file(path)
    save_file({name.removeprefix("model."): tensor for name, tensor in tensors.items()}, path)
    found = open_checkpoint(root).tensors("text_encoder")
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        assert tensor.name == name
        assert np.array_equal(tensor.array(), expected[name])


@pytest.mark.parametrize(
    ("component", "name", "dtype", "message"),
    [
        ("transformer", "double_blocks.0.img_attn.qkv.weight_scale_2", "F32", "in an unknown format"),
        ("transformer", "diffusion_model.double_blocks.0.img_mlp.0.lora_A.weight", "F32", "is a LoRA"),
        ("transformer", "lora_unet_double_blocks_0_img_mlp_0.lora_down.weight", "F32", "is a LoRA"),
        ("transformer", "transformer_blocks.0.attn.to_q.weight.absmax", "F32", "by bitsandbytes"),
        ("transformer", "transformer_blocks.0.attn.to_q.weight", "U8", "to 4 bits"),
        ("text_encoder", "model.layers.0.mlp.up_proj.weight", "I8", r"is I8 \[2\], but int8_tensorwise is I8"),
        ("text_encoder", "model.layers.0.mlp.up_proj.qweight", "I32", "by AWQ or GPTQ.*unquantised"),
    ],
)
def test_foreign_formats_have_their_name(copy_of, component, name, dtype, message):
    root = copy_of(Case("odd-heads"))
    file = "model.safetensors" if component == "text_encoder" else "diffusion_pytorch_model.safetensors"
    size = {"F8_E4M3": 1, "U8": 1, "I8": 1}.get(dtype, 4)
    safetensors(root / component / file, {name: entry(dtype, [2], [0, 2 * size])}, bytes(2 * size))
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(root).tensors(component)


def test_shared_names_are_refused(copy_of):
    root = copy_of(Case("odd-heads"))
    path = root / "transformer/diffusion_pytorch_model.safetensors"
    header = {"img_in.weight": entry(), "x_embedder.weight": entry(offsets=[8, 16])}
    safetensors(path, header, bytes(16))
    with pytest.raises(CheckpointError, match=r"holds x_embedder\.weight twice"):
        open_checkpoint(root).tensors("transformer")


@pytest.mark.parametrize("scale", ["weight_scale", "scale_weight"])
@pytest.mark.parametrize("settings", [{}, {"format": "int8_tensorwise"}, None])
def test_older_forms_of_quantised_layers(tmp_path, scale, settings):
    """Scales had another name, and markers had no format while there was only one for integers."""
    layer = "double_blocks.0.img_attn.proj"
    tensors = {f"{layer}.weight": np.ones((4, 4), np.int8), f"{layer}.{scale}": np.ones((), np.float32)}
    if settings is not None:
        tensors[f"{layer}.comfy_quant"] = np.frombuffer(json.dumps(settings).encode(), np.uint8)
    save_file(tensors, tmp_path / "a.safetensors")
    found = resolve(read_header(tmp_path / "a.safetensors"))
    assert list(found) == ["transformer_blocks.0.attn.to_out.0.weight"]
    assert found["transformer_blocks.0.attn.to_out.0.weight"].quantisation.scale.array() == 1


@pytest.mark.parametrize(
    ("part", "name", "value"),
    [
        ("transformer", "in_channels", 0),
        ("transformer", "in_channels", -1),
        ("transformer", "in_channels", 10**30),
        ("transformer", "in_channels", 7),
        ("transformer", "text_dim", 7),
        ("transformer", "axes_dims", []),
        ("vae", "encoder_channels", [1] * 40),
        ("text_encoder", "out_layers", [-1]),
        ("text_encoder", "eps", float("nan")),
    ],
)
def test_impossible_sizes_in_the_manifest(checkpoints, part, name, value):
    """The runtime makes arrays of them."""
    values = read_architecture(open_checkpoint(checkpoints.get(Case("odd-heads"))), None).to_json()
    assert Architecture.from_json(values, Path("fluxonnx.json")).to_json() == values
    values[part][name] = value
    with pytest.raises(CheckpointError, match=rf"{part}\.{name}.*--force"):
        Architecture.from_json(values, Path("fluxonnx.json"))


def test_no_home(monkeypatch, tmp_path):
    """As in containers, for a user whom the system does not know."""

    def home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    for name in ("FLUXONNX_MODEL", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Path, "home", home)
    with pytest.raises(CheckpointError, match="set HOME or XDG_CACHE_HOME"):
        find_model()


@pytest.mark.parametrize("name", ["\0", "a" * 300, "\ud800", "nowhere/a.safetensors"])
def test_impossible_transformers(checkpoints, name):
    with pytest.raises(CheckpointError, match="is not a file"):
        open_checkpoint(checkpoints.get(Case("odd-heads")), name)
