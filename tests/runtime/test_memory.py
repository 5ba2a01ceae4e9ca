"""Estimates of memory against the measurements that they were made from, and the decisions that follow from them."""

from __future__ import annotations

import pytest

from fluxonnx.contract import PRECISIONS_IN_BANDS
from fluxonnx.export.precisions import PRECISIONS
from fluxonnx.runtime.memory import (
    BYTES_PER_TOKEN_AND_WIDTH,
    MOST_AT_ONCE,
    batch_size,
    fits,
    whole_bytes,
)


@pytest.mark.parametrize(("side", "measured"), [(512, 1.7e9), (1024, 4.7e9)])
def test_whole_pictures(side, measured):
    """The decoder of the 4B model, whose widest layer at full resolution has 256 channels."""
    assert whole_bytes(side * side, 256) == pytest.approx(measured, rel=0.15)


@pytest.mark.parametrize(("side", "measured"), [(512, 0.72e9), (1024, 2.05e9)])
def test_pictures_in_bands(side, measured):
    """The same decoder, as it is exported for processors."""
    assert whole_bytes(side * side, 256, in_bands=True) == pytest.approx(measured, rel=0.1)


def test_which_builds_compute_bands():
    """The runtime's estimate and the exporter agree on the precisions."""
    assert {name for name, kind in PRECISIONS.items() if kind.bands} == set(PRECISIONS_IN_BANDS)


def test_batches_take_half_of_the_memory():
    tokens, width = 512 + 1024, 3072
    each = tokens * width * BYTES_PER_TOKEN_AND_WIDTH
    assert [batch_size(tokens, width, free) for free in (0, 2 * each - 1, 2 * each, 6 * each)] == [1, 1, 1, 3]
    assert batch_size(tokens, width, 1 << 50) == MOST_AT_ONCE
    assert batch_size(2 * tokens, width, 12 * each) == 3


def test_files_fit_up_to_the_last_byte():
    assert fits(1000, 1000)
    assert not fits(1001, 1000)
