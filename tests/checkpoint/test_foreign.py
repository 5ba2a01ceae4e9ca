"""What people pass by mistake is named for what it is, with the way out, in one line."""

from __future__ import annotations

import gzip
import io
import json
import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from fluxonnx.contract import open_checkpoint
from fluxonnx.errors import CheckpointError
from tests.support import Case

CASE = Case("odd-heads")
BLOCK = "single_transformer_blocks.0.attn.to_out"
LAYER = "model.layers.0.mlp.up_proj"
READABLE = "can't read: use an unquantised file"


U8, I32, F32 = np.zeros((4, 4), np.uint8), np.zeros((4, 4), np.int32), np.ones(4, np.float32)
# By the names that tools give their tensors: of a linear layer of each tool.
TOOLS = {
    "bitsandbytes 4 bits": ({"weight": U8, "weight__absmax": F32, "weight__quant_map": F32}, "by bitsandbytes"),
    "bitsandbytes nf4": ({"weight": U8, "weight__quant_state__bitsandbytes__nf4": U8}, r"by bitsandbytes \(nf4\)"),
    "bitsandbytes 8 bits": ({"weight": U8.view(np.int8), "SCB": F32}, "by bitsandbytes"),
    "gptq": ({"qweight": I32, "qzeros": I32, "scales": F32, "g_idx": I32}, "by GPTQ"),
    "awq": ({"qweight": I32, "qzeros": I32, "scales": F32}, "by AWQ"),
    "nunchaku": (
        {"qweight": U8, "wscales": F32, "smooth_factor": F32, "proj_down": F32, "proj_up": F32},
        r"by nunchaku \(SVDQuant\)",
    ),
    "older nunchaku": ({"qweight": U8, "wscales": F32, "smooth": F32, "lora_down": F32, "lora_up": F32}, "by nunchaku"),
    "mlx": ({"weight": np.zeros((4, 4), np.uint32), "scales": F32, "biases": F32}, "by MLX"),
    "quanto": ({"weight___data": U8.view(np.int8), "weight___scale": F32}, "by quanto"),
    "hqq": ({"W_q": U8, "meta": F32}, "by HQQ"),
    "compressed-tensors": ({"weight_packed": I32, "weight_scale": F32, "weight_shape": I32}, "by llm-compressor"),
    "unknown 4 bits": ({"weight": U8}, "to 4 bits"),
}


def one_line(error: pytest.ExceptionInfo, path: Path) -> None:
    message = str(error.value)
    assert str(path) in message
    assert "\n" not in message
    assert len(message) < 500


@pytest.mark.parametrize("where", ["flag", "directory"])
@pytest.mark.parametrize("component", ["transformer", "text_encoder"])
@pytest.mark.parametrize("tool", TOOLS)
def test_quantisation_tools(copy_of, tmp_path, tool, component, where):
    root = copy_of(CASE)
    parts, message = TOOLS[tool]
    own = root / {"transformer": "transformer/diffusion_pytorch_model.safetensors"}.get(
        component, "text_encoder/model.safetensors"
    )
    layer = BLOCK if component == "transformer" else LAYER
    tensors = {name: array for name, array in load_file(own).items() if not name.startswith(f"{layer}.")}
    file = own if where == "directory" else tmp_path / "quantised.safetensors"
    parameters = {name.replace("___", "._").replace("__", "."): array for name, array in parts.items()}
    if "quant_state" in "".join(parameters):
        parameters = {name.replace("bitsandbytes.", "bitsandbytes__"): array for name, array in parameters.items()}
    save_file(tensors | {f"{layer}.{name}": array for name, array in parameters.items()}, file)
    checkpoint = open_checkpoint(root, **({component: file} if where == "flag" else {}))
    with pytest.raises(CheckpointError, match=f"{message}.*{READABLE}") as error:
        checkpoint.tensors(component)
    one_line(error, file)


LORAS = {
    "diffusers": "transformer.single_transformer_blocks.0.attn.to_out.lora_A.weight",
    "peft": "base_model.model.single_transformer_blocks.0.attn.to_out.lora_B.default.weight",
    "ai-toolkit": "diffusion_model.single_blocks.0.linear2.lora_A.weight",
    "kohya": "lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight",
    "lokr": "lycoris_single_blocks_0_linear1.lokr_w1",
    "loha": "lycoris_single_blocks_0_linear1.hada_w1_a",
    "dora": "transformer.single_transformer_blocks.0.attn.to_out.lora_magnitude_vector",
}


@pytest.mark.parametrize("component", ["transformer", "text_encoder", "vae"])
@pytest.mark.parametrize("kind", LORAS)
def test_loras(checkpoints, tmp_path, kind, component):
    file = tmp_path / "style.safetensors"
    save_file({LORAS[kind]: F32}, file)
    with pytest.raises(CheckpointError, match=r"is a LoRA, not a whole .*: pass it with --lora") as error:
        open_checkpoint(checkpoints.get(CASE), **{component: file}).tensors(component)
    one_line(error, file)


def archive() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        file.writestr("archive/data.pkl", b"")
    return buffer.getvalue()


REFUSED = "an answer that the download was refused"
FILES = {
    "git-lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 7\n", "git-LFS pointer.*git lfs pull"),
    "xet": (b"# xet version 0\nfilesize = 7\n", "Xet pointer.*hf download"),
    "page": (b"<!doctype html><html>Sign in" + bytes(100), "a web page.*logged in"),
    "page with a mark": (b"\xef\xbb\xbf\n<HTML>" + bytes(100), "a web page"),
    "gated": (b"Access to model black-forest-labs/FLUX.2-klein-9B is restricted.", REFUSED),
    "password": (b"Invalid username or password.", REFUSED),
    "error": (b'{"error":"Repository not found"}' + bytes(64), REFUSED),
    "not found": (b"Entry not found", REFUSED),
    "torch": (archive(), "a zip or PyTorch file"),
    **{
        f"pickle {protocol}": (
            pickle.dumps({"a": list(range(100))}, protocol),
            "a PyTorch file, which can run programs",
        )
        for protocol in (2, 3, 4, 5)
    },
    "gzip": (gzip.compress(bytes(10000)) + bytes(100), "an archive: unpack it"),
    "zstd": (b"\x28\xb5\x2f\xfd" + bytes(100), "an archive: unpack it"),
    "hdf5": (b"\x89HDF\r\n\x1a\n" + bytes(100), "HDF5"),
    "png": (b"\x89PNG\r\n\x1a\n" + bytes(100), "a picture"),
    "allocated": (bytes(5000), "begins with zeros: its download has not finished"),
    "empty": (b"", "0 bytes"),
}


@pytest.mark.parametrize("component", ["transformer", "text_encoder", "vae"])
@pytest.mark.parametrize("kind", FILES)
def test_files(checkpoints, tmp_path, kind, component):
    content, message = FILES[kind]
    file = tmp_path / "part.safetensors"
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match=message) as error:
        open_checkpoint(checkpoints.get(CASE), **{component: file}).tensors(component)
    one_line(error, file)


@pytest.mark.parametrize("share", [0.001, 0.1, 0.5, 0.999])
def test_downloads_that_were_cut(checkpoints, tmp_path, share):
    root = checkpoints.get(CASE)
    content = (root / "vae/diffusion_pytorch_model.safetensors").read_bytes()
    file = tmp_path / "vae.safetensors"
    file.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(CheckpointError, match="download it again") as error:
        open_checkpoint(root, vae=file).tensors("vae")
    one_line(error, file)


def test_a_config_for_weights(checkpoints):
    """JSON is taken for an index of files, and says that it is none."""
    root = checkpoints.get(CASE)
    with pytest.raises(CheckpointError, match='has no "weight_map"'):
        open_checkpoint(root, vae=root / "vae/config.json").tensors("vae")
    assert json.loads((root / "vae/config.json").read_text())
