"""The files for stable-diffusion.cpp hold the checkpoint's weights, by the original's names, exact or rounded."""

from __future__ import annotations

import sys

import numpy as np
import pytest

from benchmarks import sdcpp_files
from fluxonnx.checkpoint.safetensors import read_header
from tests import comfyui, formats
from tests.support import Case

CASE = Case("odd-heads")


def written(monkeypatch, folder, *flags):
    monkeypatch.setattr(sys, "argv", ["sdcpp_files", *flags, str(folder)])
    return sdcpp_files.main()


@pytest.mark.slow
def test_what_is_written(checkpoints, tmp_path, monkeypatch):
    model = checkpoints.get(CASE)
    assert written(monkeypatch, tmp_path, "-d", str(model)) == 0
    expected = comfyui.original_names(formats.load(model / "transformer/diffusion_pytorch_model.safetensors"))
    found = formats.load(tmp_path / "transformer.safetensors")
    assert expected.keys() == found.keys()
    assert all(np.array_equal(expected[name], found[name]) for name in expected)
    encoder = read_header(tmp_path / "text_encoder.safetensors")
    assert encoder.keys() == sdcpp_files.tensors_of(model / "text_encoder").keys()


@pytest.mark.slow
def test_rounded_as_comfyui_rounds(checkpoints, tmp_path, monkeypatch):
    model = checkpoints.get(CASE)
    monkeypatch.setattr(sdcpp_files, "GROUP", 16)
    assert written(monkeypatch, tmp_path, "-d", str(model), "--int8") == 0
    exact = comfyui.original_names(formats.load(model / "transformer/diffusion_pytorch_model.safetensors"))
    found = formats.load(tmp_path / "transformer-int8-convrot.safetensors")
    rounded = [name for name, array in found.items() if array.dtype == np.int8]
    assert rounded
    assert {name.split(".")[0] for name in rounded} <= {"double_blocks", "single_blocks"}
    for name in rounded:
        integers, scale = comfyui.quantise(exact[name], comfyui.Form(group=16))
        np.testing.assert_allclose(found[name.replace(".weight", ".weight_scale")], scale, rtol=1e-6)
        assert np.abs(found[name].astype(int) - integers).max() <= 1  # halves


def test_bad_input(tmp_path, monkeypatch, capsys):
    assert written(monkeypatch, tmp_path / "out", "-d", str(tmp_path / "missing")) == 1
    assert "sdcpp_files: " in capsys.readouterr().err
