"""nvfp4, mxfp8 and fp8 as comfy-kitchen writes and reads them: the same weights, bit for bit."""

from __future__ import annotations

import numpy as np
import pytest

from fluxonnx.checkpoint.formats import resolve
from fluxonnx.checkpoint.safetensors import read_header, read_metadata
from tests.support import optional

pytestmark = [pytest.mark.parity, optional("torch", "comfy_kitchen")]

LAYER = "double_blocks.0.img_mlp.0"
NAME = "transformer_blocks.0.ff.linear_in.weight"
# whole tiles of scales; and fewer rows and columns than a tile has
SHAPES = [(256, 512), (160, 96), (32, 64)]


def marker(form: str):
    import torch

    return torch.frombuffer(bytearray(f'{{"format": "{form}"}}'.encode()), dtype=torch.uint8)


def stored(form: str, weight):
    """The tensors of a layer as ComfyUI's tools store them, and the reference's weights in float32."""
    import torch
    from comfy_kitchen.backends.eager import quantization as eager

    if form == "nvfp4":
        second = (weight.abs().max() / (448 * 6)).float()
        packed, scales = eager.quantize_nvfp4(weight, second)
        values = eager.dequantize_nvfp4(packed, second, scales, torch.float32)
        return {"weight": packed, "weight_scale": scales, "weight_scale_2": second}, values
    if form == "mxfp8":
        data, scales = eager.quantize_mxfp8(weight)
        values = eager.dequantize_mxfp8(data, scales, torch.float32)
        return {"weight": data, "weight_scale": scales}, values
    dtype = {"float8_e4m3fn": torch.float8_e4m3fn, "float8_e5m2": torch.float8_e5m2}[form]
    scale = (weight.abs().max() / torch.finfo(dtype).max).float()
    data = eager.quantize_per_tensor_fp8(weight, scale, dtype)
    return {"weight": data, "weight_scale": scale}, eager.dequantize_per_tensor_fp8(data, scale, torch.float32)


@pytest.mark.parametrize("bytes_only", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("form", ["nvfp4", "mxfp8", "float8_e4m3fn", "float8_e5m2"])
def test_weights(tmp_path, form, shape, bytes_only):
    """Scales may be stored as bytes, as older files have them."""
    import torch
    from safetensors.torch import save_file

    torch.set_num_threads(1)
    weight = torch.randn(*shape, generator=torch.Generator().manual_seed(0))
    tensors, expected = stored(form, weight)
    if bytes_only and form in ("nvfp4", "mxfp8"):
        tensors["weight_scale"] = tensors["weight_scale"].view(torch.uint8)
    file = tmp_path / "w.safetensors"
    save_file({f"{LAYER}.{end}": part for end, part in {**tensors, "comfy_quant": marker(form)}.items()}, file)
    found = resolve(read_header(file), [read_metadata(file)])
    assert list(found) == [NAME]
    tensor = found[NAME]
    assert tensor.shape == shape
    np.testing.assert_array_equal(tensor.array(), expected.numpy())
    third = shape[0] // 4
    for part, rows in zip(
        tensor.split([third, shape[0] - third]), expected.split([third, shape[0] - third]), strict=True
    ):
        np.testing.assert_array_equal(part.array(), rows.numpy())
        np.testing.assert_array_equal(part.rows(3, 11), rows.numpy()[3:11])


def test_blocks_of_qwen(tmp_path):
    """Scales of 128 x 128 weights, as transformers multiplies them."""
    import torch
    from safetensors.torch import save_file

    random = torch.Generator().manual_seed(0)
    weight = torch.randn(256, 384, generator=random).to(torch.float8_e4m3fn)
    scale = torch.rand(2, 3, generator=random)
    name = "model.layers.0.mlp.up_proj.weight"
    save_file({name: weight, f"{name}_scale_inv": scale}, tmp_path / "w.safetensors")
    tensor = resolve(read_header(tmp_path / "w.safetensors"), component="text_encoder")[name]
    expected = weight.float() * scale.repeat_interleave(128, 0).repeat_interleave(128, 1)
    np.testing.assert_array_equal(tensor.array(), expected.numpy())
