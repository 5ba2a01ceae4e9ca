"""Noise equals torch's bit for bit, or flux2.c's."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest

import fluxonnx
from fluxonnx.errors import UsageError
from fluxonnx.runtime.noise import _fma, _scalar_normals, check_seed, flux2c_randn, randn
from fluxonnx.runtime.request import Request
from tests.support import Case

CASE = Case("odd-heads")
PHOTO = np.arange(96 * 64 * 3, dtype=np.uint32).astype(np.uint8).reshape(96, 64, 3)
HERE = Path(__file__).parent.parent / "golden"
GOLDEN = np.load(HERE / "noise.npz")
# What flux_init_noise of antirez/flux2.c (at b9cbbea, built with gcc -O3 -ffast-math) gave
FLUX2C = json.loads((HERE / "flux2c_noise.json").read_text())
# Its last bits depend on the C library and the compiler.
FLUX2C_TOLERANCE = 1e-6
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


@pytest.mark.parametrize("known", FLUX2C, ids=lambda known: f"{known['seed']}-{known['rows']}x{known['columns']}")
def test_noise_equals_that_of_flux2c(known):
    noise = flux2c_randn(known["seed"], (1, known["channels"], known["rows"], known["columns"]))
    assert noise.dtype == np.float32
    assert noise.shape == (1, known["channels"], known["rows"], known["columns"])
    close = {"rtol": 0, "atol": FLUX2C_TOLERANCE}
    np.testing.assert_allclose(noise.ravel()[:8], known["first_8"], **close)
    np.testing.assert_allclose(noise.ravel()[-4:], known["last_4"], **close)
    np.testing.assert_allclose(noise.mean(dtype=np.float64), known["mean"], **close)
    np.testing.assert_allclose(noise.std(dtype=np.float64), known["std"], **close)


def one_by_one(seed: int) -> Iterator[float]:
    """Draw as flux2.c does, a word after the other (flux_rng_seed, xoshiro256ss, flux_random_normal)."""
    mask, state = 2**64 - 1, []
    for _ in range(4):
        seed = seed + 0x9E3779B97F4A7C15 & mask
        z = (seed ^ seed >> 30) * 0xBF58476D1CE4E5B9 & mask
        z = (z ^ z >> 27) * 0x94D049BB133111EB & mask
        state.append(z ^ z >> 31)

    def rotate(word: int, bits: int) -> int:
        return (word << bits | word >> 64 - bits) & mask

    def uniform() -> float:
        a, b, c, d = state
        word = rotate(b * 5 & mask, 7) * 9 & mask
        c, d = c ^ a, d ^ b
        state[:] = a ^ d, b ^ c, c ^ (b << 17 & mask), rotate(d, 45)
        return (word >> 11) * 2.0**-53

    while True:
        first, second = uniform(), uniform()
        yield math.sqrt(-2 * math.log(first)) * math.cos(2 * math.pi * second)


@pytest.mark.parametrize("seed", [0, 1, 2**63, 2**64 - 1])
def test_many_lanes_draw_what_one_generator_draws(seed):
    """20,000 words: some 20 lanes, the last one not used up."""
    expected = list(islice(one_by_one(seed), 10_000))
    got = flux2c_randn(seed, (1, 1, 112, 112)).ravel()[:10_000]
    np.testing.assert_allclose(got, expected, rtol=0, atol=2e-6)  # float32 against double


def test_flux2c_noise_keeps_its_composition_below_112_tokens_a_side():
    """Nearest neighbours of the largest draw, also where one side is longer; beyond that a draw of its own."""
    large = flux2c_randn(7, (1, 2, 112, 112))
    assert np.array_equal(flux2c_randn(7, (1, 2, 56, 16)), large[:, :, ::2, ::7])
    assert np.array_equal(flux2c_randn(7, (1, 2, 16, 224)), large[:, :, ::7].repeat(2, axis=3))
    wide = flux2c_randn(7, (1, 2, 112, 113))
    assert np.array_equal(wide.ravel()[: 112 * 112], large.ravel()[: 112 * 112])
    assert wide.shape == (1, 2, 112, 113)


def test_flux2c_noise_of_a_batch_is_one_draw():
    whole = flux2c_randn(3, (2, 4, 8, 8))
    assert np.array_equal(whole.reshape(1, 8, 8, 8), flux2c_randn(3, (1, 8, 8, 8)))
    assert flux2c_randn(3, (1, 0, 8, 8)).shape == (1, 0, 8, 8)


@pytest.mark.slow
def test_every_mode_starts_from_flux2c_noise(checkpoints):
    """Each picture of a batch is that of its own seed, and none is that of torch's noise."""
    with fluxonnx.load(checkpoints.exported(CASE)) as flux:
        for inputs in ({}, {"image": PHOTO, "strength": 0.6}, {"references": [PHOTO]}):
            request = Request(prompt="a", width=64, height=96, steps=2, noise="flux2c", max_sequence_length=8, **inputs)
            many = [image.tobytes() for image in flux.run(request, seeds=[5, 6])]
            alone = flux.run(request, seeds=[6])[0].tobytes()
            other = flux.run(replace(request, noise="torch"), seeds=[5])[0].tobytes()
            assert many[1] == alone
            assert len({*many, other}) == 3


@pytest.mark.parametrize("seed", [-1, 2**64])
def test_flux2c_noise_of_a_seed_out_of_range(seed):
    with pytest.raises(UsageError, match="out of range"):
        flux2c_randn(seed, (1, 1, 4, 4))
