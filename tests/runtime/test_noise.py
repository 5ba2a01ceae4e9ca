"""Noise equals torch's bit for bit."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest

from fluxonnx.errors import UsageError
from fluxonnx.runtime.noise import _fma, _scalar_normals, check_seed, randn

GOLDEN = np.load(Path(__file__).parent.parent / "golden" / "noise.npz")
# What torch's seeding truncates, wraps or takes for a sign
UNUSUAL_SEEDS = (-1, -5, -(2**63), 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**32 + 5, 2**63 - 1, 2**63, 2**64 - 1)
# A word of twister state whose output puts the first uniform value just past 1/2: cosine and sine are both negative
PAST_PI = 2**20


@pytest.mark.parametrize("key", [key for key in GOLDEN.files if not key.endswith("sha256")])
def test_small_sizes_equal_torch_golden(key):
    """Below 16 values torch takes another path, and a ragged end rewrites earlier values."""
    seed, size = map(int, key.split("/"))
    assert np.array_equal(randn(seed, (size,)).view(np.int32), GOLDEN[key].view(np.int32))


@pytest.mark.parametrize("key", [key for key in GOLDEN.files if key.endswith("sha256")])
def test_large_sizes_equal_torch_golden(key):
    seed, size, _ = key.split("/")
    digest = hashlib.sha256(randn(int(seed), (int(size),)).tobytes()).digest()
    assert np.array_equal(np.frombuffer(digest, np.uint8), GOLDEN[key])


def test_shape_is_filled_in_order():
    assert np.array_equal(randn(3, (2, 3, 4)).ravel(), randn(3, (24,)))
    assert randn(3, (0,)).shape == (0,)


@pytest.mark.parametrize(("seed", "same"), [(-1, 2**64 - 1), (-(2**63), 2**63), (np.int32(-1), -1), (2**32 + 5, 5)])
def test_seeds_that_mean_the_same(seed, same):
    """Negative seeds count modulo 2**64, and only the lower 32 bits matter, as in torch."""
    assert np.array_equal(randn(seed, (20,)), randn(same, (20,)))


@pytest.mark.parametrize("seed", [-(2**63) - 1, 2**64])
def test_seed_out_of_torch_range(seed):
    with pytest.raises(UsageError, match="out of range"):
        randn(seed, (4,))


@pytest.mark.parametrize("seed", [-1, 2**64])
def test_seed_of_a_picture_out_of_range(seed):
    with pytest.raises(UsageError, match="out of range"):
        check_seed(seed)


def test_scalar_radius_of_zero_gives_positive_zero():
    """A second uniform of 0 and an angle just past pi: torch adds the mean, 0, to the product, minus 0."""
    bits = np.random.RandomState(0)
    bits.set_state(("MT19937", np.array([PAST_PI, *[0] * 623], np.uint32), 0))
    assert _scalar_normals(bits, 2).tobytes() == bytes(8)


def test_fma_rounds_once():
    """A tie in float32 that only a bit beyond float64 breaks: rounding twice would end on the even side."""
    a, b = np.float32([1 + 2**-12]), np.float32([1 + 2**-12])  # product 1 + 2**-11 + 2**-24: a tie in float32
    assert _fma(a, b, np.float32([2**-60]))[0] == np.float32(1 + 2**-11 + 2**-23)
    assert _fma(a, b, np.float32([-(2**-60)]))[0] == np.float32(1 + 2**-11)


@pytest.mark.parity
def test_many_seeds_equal_torch_live():
    torch = pytest.importorskip("torch")
    if "AVX" not in torch.backends.cpu.get_cpu_capability():
        pytest.skip("torch draws other values on machines without AVX2")
    for i, seed in enumerate([*range(300), *UNUSUAL_SEEDS]):
        for size in (i % 60, (300, 4096, 4099)[i % 3]):
            expected = torch.randn(size, generator=torch.Generator("cpu").manual_seed(seed)).numpy()
            assert np.array_equal(randn(seed, (size,)).view(np.int32), expected.view(np.int32)), (seed, size)


@pytest.mark.parity
@pytest.mark.parametrize("seed", [-(2**63) - 1, 2**64])
def test_torch_refuses_the_same_seeds_live(seed):
    torch = pytest.importorskip("torch")
    with pytest.raises((ValueError, RuntimeError)):
        torch.Generator("cpu").manual_seed(seed)
