"""Damaged model files: whatever is in them, reading succeeds or raises an error of ours."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import safetensors
from hypothesis import given
from hypothesis import strategies as st

from fluxonnx.checkpoint.config import read_json
from fluxonnx.checkpoint.formats import NAMING, resolve
from fluxonnx.checkpoint.manifest import FILE_NAME, is_current, is_usable, read_manifest
from fluxonnx.checkpoint.safetensors import DTYPES, fingerprint, read_header, read_metadata
from fluxonnx.contract import GRAPH_FORMAT, Architecture, open_checkpoint
from fluxonnx.export import export
from fluxonnx.export.components import read_architecture
from fluxonnx.ports import graph_ports
from fluxonnx.runtime.text import Tokenizer
from tests.fuzz.support import ODD, damaged_bytes, damaged_json, fuzzed, only_our_errors
from tests.support import Case

pytestmark = pytest.mark.slow

CASE = Case("odd-heads")
CONFIGS = ["model_index.json", *(f"{part}/config.json" for part in ("transformer", "text_encoder", "vae"))]
SHIPPED = Path(__file__).parent.parent.parent / "models/tiny-klein"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


@pytest.fixture(scope="module")
def model(checkpoints, folder) -> Path:
    """A model with a build, in which files are damaged and mended."""
    root = folder / "model"
    shutil.copytree(checkpoints.get(CASE), root)
    export(root, components=["conditioning"])
    return root


LAYER = "double_blocks.0.img_attn.qkv"
QUANTISED = {
    "__metadata__": {"format": "pt", "_quantization_metadata": json.dumps({"layers": {"img_in": "x", LAYER: {}}})},
    f"{LAYER}.weight": {"dtype": "I8", "shape": [6, 4], "data_offsets": [0, 24]},
    f"{LAYER}.weight_scale": {"dtype": "F32", "shape": [6, 1], "data_offsets": [24, 48]},
    f"{LAYER}.comfy_quant": {"dtype": "U8", "shape": [2], "data_offsets": [48, 50]},
    "final_layer.adaLN_modulation.1.weight": {"dtype": "BF16", "shape": [2, 1], "data_offsets": [50, 54]},
}
SETTINGS = st.one_of(
    st.sampled_from([b"{}", b"[]", b"\xff", b'{"format": "int8_tensorwise", "convrot": true}', b"[" * 100_000]),
    st.builds(
        lambda value, other, key: json.dumps({"format": value, key: other, "convrot": True}).encode(),
        ODD,
        ODD,
        st.sampled_from(["params", "convrot_groupsize"]),
    ),
)


def check_weights(path: Path) -> None:
    with only_our_errors():
        fingerprint(path)
    with only_our_errors():
        tensors = read_header(path)
        # what we read, the library reads, with the same result
        if all(tensor.dtype in DTYPES for tensor in tensors.values()):
            expected = dict(safetensors.deserialize(path.read_bytes()))
            for name, tensor in tensors.items():
                assert tensor.array().tobytes() == expected[name]["data"]
        for component in NAMING:
            with only_our_errors():
                for tensor in resolve(tensors, [read_metadata(path)], component).values():
                    with only_our_errors():
                        tensor.array()


@fuzzed(250)
@given(
    header=damaged_json(QUANTISED), settings=SETTINGS, tail=st.integers(-2, 2), shift=st.sampled_from([0, 0, 0, -1, 1])
)
def test_safetensors_headers(folder, header, settings, tail, shift):
    data = np.ones(54 - 2, np.uint8).tobytes()
    data = data[:48] + settings + data[48:]
    try:
        values = json.loads(header)
        values[f"{LAYER}.comfy_quant"] |= {"shape": [len(settings)], "data_offsets": [48, 48 + len(settings)]}
        values["final_layer.adaLN_modulation.1.weight"]["data_offsets"] = [len(data) - 4, len(data)]
        header = json.dumps(values).encode()
    except (ValueError, TypeError, KeyError, RecursionError, AttributeError):
        pass  # damaged where the settings would go
    data = data[:tail] if tail < 0 else data + bytes(tail)
    path = folder / "a.safetensors"
    path.write_bytes(max(0, len(header) + shift).to_bytes(8, "little") + header + data)
    check_weights(path)


def whole_file() -> bytes:
    header = json.dumps(QUANTISED).encode()
    return len(header).to_bytes(8, "little") + header + bytes(48) + b"{}" + bytes(4)


@fuzzed(250)
@given(content=damaged_bytes(whole_file()))
def test_safetensors_bytes(folder, content):
    path = folder / "b.safetensors"
    path.write_bytes(content)
    check_weights(path)


@pytest.mark.parametrize("name", CONFIGS)
def test_configs(model, name):
    path = model / name
    original = path.read_bytes()

    @fuzzed(100)
    @given(content=damaged_json(json.loads(original)), out_layers=st.sampled_from([None, (1, 2), (0,), (99,), ()]))
    def run(content, out_layers):
        path.write_bytes(content)
        with only_our_errors():
            checkpoint = open_checkpoint(model)
            with only_our_errors():
                _ = checkpoint.is_distilled
            sizes = read_architecture(checkpoint, out_layers)
            graph_ports("vae_decoder", sizes)

    try:
        run()
    finally:
        path.write_bytes(original)


INDEX = {"metadata": {"total_size": 5}, "weight_map": {"a": "model-00001-of-00002.safetensors", "b": "x.safetensors"}}


@fuzzed(100)
@given(content=damaged_json(INDEX))
def test_indices(folder, content):
    root = folder / "sharded/transformer"
    root.mkdir(parents=True, exist_ok=True)
    (root.parent / "model_index.json").write_text('{"_class_name": "Flux2KleinPipeline"}')
    (root / "diffusion_pytorch_model.safetensors.index.json").write_bytes(content)
    with only_our_errors():
        open_checkpoint(root.parent).tensors("transformer")


def test_manifests(model):
    path = model / FILE_NAME
    original = path.read_bytes()
    document = json.loads(original)
    document |= {"defaults": {"width": 256, "height": 256}, "text_encoder_out_layers": [1, 2, 3]}
    for build in document["builds"].values():
        build["settings"] = {"keep": "x", "block": "32", "rotate": "true", "products": "pairs", "transformer": "f 0123"}

    @fuzzed(300)
    @given(content=damaged_json(document))
    def run(content):
        path.write_bytes(content)
        with only_our_errors():
            manifest = read_manifest(model)
            assert manifest is not None
            for build in manifest.builds.values():
                _ = build.parsed_settings
                for component in build.components.values():
                    with only_our_errors():
                        is_usable(model, component)
                        is_current(model, component, GRAPH_FORMAT)
            Architecture.from_json(manifest.architecture, path)

    try:
        run()
    finally:
        path.write_bytes(original)


TOKENIZER = json.loads((SHIPPED / "tokenizer/tokenizer.json").read_text("utf-8"))
# the mutations should hit the structure, not one of a thousand words
TOKENIZER["model"]["vocab"] = dict(list(TOKENIZER["model"]["vocab"].items())[:300])
TOKENIZER["model"]["merges"] = TOKENIZER["model"]["merges"][:3]


@fuzzed(150)
@given(content=damaged_json(TOKENIZER), config=damaged_json({"pad_token": {"content": "<|endoftext|>"}}))
def test_tokenizers(folder, content, config):
    check_tokenizer(folder, content, config)


@fuzzed(100)
@given(content=damaged_bytes((SHIPPED / "tokenizer/tokenizer.json").read_bytes()))
def test_tokenizer_bytes(folder, content):
    check_tokenizer(folder, content, b"{}")


def check_tokenizer(folder: Path, content: bytes, config: bytes) -> None:
    (folder / "tokenizer.json").write_bytes(content)
    (folder / "tokenizer_config.json").write_bytes(config)
    with only_our_errors():
        tokens = Tokenizer(folder).encode("a red circle, 猫 \u2028", 64)
        assert tokens.input_ids.shape == (1, 64)


@fuzzed(150)
@given(content=st.binary(max_size=40) | damaged_bytes(b'{"a": [1, 2.5, true, null, "x"], "b": {}}'))
def test_json(folder, content):
    (folder / "a.json").write_bytes(content)
    with only_our_errors():
        assert isinstance(read_json(folder / "a.json"), dict)
