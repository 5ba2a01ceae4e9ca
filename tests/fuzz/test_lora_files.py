"""Damaged LoRA files: whatever is in them, reading succeeds or raises an error of ours."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fluxonnx.lora.file import read_lora
from fluxonnx.runtime.lora_files import parse
from tests.fuzz.support import damaged_bytes, damaged_json, fuzzed, only_our_errors
from tests.lora.making import CASE, layers_of

pytestmark = pytest.mark.slow

PATH = "transformer_blocks.0.attn.to_q"
SHAPES = {
    f"{PATH}.lora_A.weight": [2, 64],
    f"{PATH}.lora_B.weight": [64, 2],
    f"{PATH}.dora_scale": [64, 1],
    f"{PATH}.alpha": [],
    "lora_unet_double_blocks_0_img_attn_proj.hada_w1_a": [64, 2],
    "lora_unet_double_blocks_0_img_attn_proj.hada_w1_b": [2, 64],
    "lora_unet_double_blocks_0_img_attn_proj.hada_w2_a": [64, 2],
    "lora_unet_double_blocks_0_img_attn_proj.hada_w2_b": [2, 64],
    "lycoris_x_embedder.lokr_w1": [2, 2],
    "lycoris_x_embedder.lokr_w2_a": [32, 2],
    "lycoris_x_embedder.lokr_w2_b": [2, 16],
}
SETTINGS = {"transformer.lora_alpha": 4, "transformer.use_rslora": True, "transformer.alpha_pattern": {"to_q": 2}}


def document() -> tuple[dict, int]:
    """The header of a small file, and how many bytes its tensors have."""
    header: dict = {"__metadata__": {"lora_adapter_metadata": json.dumps(SETTINGS)}}
    end = 0
    for name, shape in SHAPES.items():
        start, end = end, end + 4 * int(np.prod(shape))
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [start, end]}
    return header, end


HEADER, SIZE = document()


def whole(header: bytes) -> bytes:
    return len(header).to_bytes(8, "little") + header + np.full(SIZE // 4, 0.01, np.float32).tobytes()


@pytest.fixture(scope="module")
def layers(checkpoints):
    return layers_of(checkpoints.get(CASE))


@fuzzed(80)
@given(
    content=st.one_of(
        damaged_json(HEADER).map(whole),
        damaged_bytes(whole(json.dumps(HEADER).encode())),
        damaged_json(SETTINGS).map(
            lambda text: whole(
                json.dumps({**HEADER, "__metadata__": {"lora_adapter_metadata": text.decode("latin-1")}}).encode()
            )
        ),
    )
)
def test_files(tmp_path_factory, layers, content):
    path = tmp_path_factory.getbasetemp() / "lora.safetensors"
    path.write_bytes(content)
    with only_our_errors():
        read_lora(path, layers, "model", lambda component, name: np.ones(layers.shapes[component][name], np.float32))


def test_the_whole_file_is_read(tmp_path, layers):
    path = tmp_path / "lora.safetensors"
    path.write_bytes(whole(json.dumps(HEADER).encode()))
    dim = layers.shapes["transformer"][PATH][0]
    assert dim == 64, "the sizes above are those of this checkpoint"
    lora = read_lora(path, layers, "model", lambda component, name: np.ones((dim, dim), np.float32))
    assert len(lora.changes["transformer"]) == 3


@fuzzed(50)
@given(name=st.text(max_size=60))
def test_names(layers, name):
    layers.find(name)


@fuzzed(50)
@given(text=st.text(max_size=20))
def test_flags(text):
    with only_our_errors():
        parse(text)
