"""Integers and scales, checked against what they stand for."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from fluxonnx.checkpoint.safetensors import Tensor, read_header
from fluxonnx.export.precisions import rounding
from tests.support import int8_matrix, relative_error

SHAPE = (300, 256)  # more rows than are converted at a time, and not a multiple


@pytest.fixture(params=[np.float32, np.float16, ml_dtypes.bfloat16], ids=["fp32", "fp16", "bf16"])
def tensor(request, tmp_path: Path) -> Tensor:
    values = np.random.default_rng(0).standard_normal(SHAPE).astype(request.param)
    values[5] = 0
    values[7, :32] = 0
    save_file({"w": values}, tmp_path / "w.safetensors")
    return read_header(tmp_path / "w.safetensors")["w"]


def test_floats(tensor):
    np.testing.assert_array_equal(rounding.float_rows(tensor), tensor.array().astype(np.float32))
    np.testing.assert_array_equal(rounding.float_rows(tensor, 3, 9), tensor.array()[3:9].astype(np.float32))


def test_int8_rows_are_within_half_a_step(tensor):
    integers, scales = rounding.int8_rows(tensor)
    values = rounding.float_rows(tensor)
    assert integers.dtype == np.int8
    assert np.abs(integers.astype(int)).max() == 127
    assert (np.abs(integers * scales[:, None] - values) <= 0.5001 * scales[:, None]).all()
    np.testing.assert_allclose(scales[values.any(1)], np.abs(values[values.any(1)]).max(1) / 127, rtol=1e-6)
    assert not integers[5].any()
    assert np.isfinite(scales).all()


def test_int8_columns_are_the_rows_transposed(tensor):
    columns, scales = int8_matrix(tensor, None)
    integers, expected = rounding.int8_rows(tensor)
    assert columns.dtype == np.int8
    np.testing.assert_array_equal(columns, integers.T)
    np.testing.assert_array_equal(scales, expected)


@pytest.mark.parametrize("rotation", [0, 16])
@pytest.mark.parametrize("sizes", [[7, 3, 1, 289], [256, 44], [300]])
def test_panels_are_columns_of_the_matrix(tensor, sizes, rotation):
    values, scales = rounding.int8_panels(tensor, sizes, 146, rotation)
    columns, expected = int8_matrix(tensor, 146, rotation)
    panels = [panel.reshape(SHAPE[1], -1) for panel in np.split(values, np.cumsum(sizes)[:-1] * SHAPE[1])]
    np.testing.assert_array_equal(np.concatenate(panels, axis=1), columns)
    np.testing.assert_array_equal(scales, expected)


def test_int8_pairs_stay_within_a_limit(tensor):
    columns, scales = int8_matrix(tensor, 146)
    pairs = columns.astype(int)[0::2] + columns.astype(int)[1::2]
    assert 130 < np.abs(pairs).max() <= 146
    values = rounding.float_rows(tensor)
    assert (np.abs(columns.T * scales[:, None] - values) <= 0.5001 * scales[:, None]).all()
    # never more than a step and a half of the unlimited one
    assert (scales <= 1.76 * rounding.int8_rows(tensor)[1]).all()


@pytest.mark.parametrize("block", [32, 64, 128])
def test_int4_blocks(tensor, block):
    integers, scales = rounding.int4_blocks(tensor, block)
    values = rounding.float_rows(tensor)
    assert integers.min() >= -8
    assert integers.max() <= 7
    restored = (integers.reshape(SHAPE[0], -1, block) * scales[..., None]).reshape(SHAPE)
    largest = np.abs(values.reshape(SHAPE[0], -1, block)).max(-1).repeat(block, -1).reshape(SHAPE)
    # a step is an eighth of the largest weight; the other end of the range is a step short, and the scale is refitted
    assert (np.abs(restored - values) <= largest * 0.2).all()
    assert relative_error(restored, values) < {32: 0.09, 64: 0.1, 128: 0.115}[block]
    assert not restored[5].any()
    assert np.isfinite(scales).all()


def test_int4_is_exact_where_it_can_be(tmp_path):
    steps = np.random.default_rng(1).integers(-8, 8, (8, 64))
    steps[:, ::32] = -8
    values = (steps * np.float32(0.25)).astype(np.float32)
    save_file({"w": values}, tmp_path / "w.safetensors")
    integers, scales = rounding.int4_blocks(read_header(tmp_path / "w.safetensors")["w"], 32)
    np.testing.assert_array_equal(integers, steps)
    np.testing.assert_array_equal(scales, np.full((8, 2), 0.25, np.float32))


def test_packing():
    """The first of two integers is the low half, as both MatMulNBits and ONNX's int4 want it."""
    values = np.array([[-8, 7, 0, -1]], np.int8)
    assert rounding.pack_int4(values, 8).tolist() == [[0xF0, 0x78]]
    assert rounding.pack_int4(values, 0).tolist() == [[0x78, 0xF0]]


def test_rotation(tensor):
    matrix = rounding.hadamard(64)
    np.testing.assert_allclose(matrix @ matrix, np.eye(64), atol=1e-6)
    np.testing.assert_array_equal(matrix, matrix.T)
    np.testing.assert_allclose(np.abs(matrix), 1 / 8)
    columns, scales = int8_matrix(tensor, None, 64)
    restored = ((columns.T * scales[:, None]).reshape(-1, 64) @ matrix).reshape(SHAPE)
    values = rounding.float_rows(tensor)
    assert relative_error(restored, values) < 0.01
