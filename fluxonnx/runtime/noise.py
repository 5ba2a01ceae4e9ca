"""Noise from seeds: torch's bit for bit, so that a seed means the same picture here as in diffusers, or flux2.c's."""

from __future__ import annotations

import math
import operator

import numpy as np

from fluxonnx.errors import UsageError

F = np.float32

# Coefficients of the Cephes library in single precision, which torch's vector code uses (avx_mathfun.h).
LOG_COEFFICIENTS = (
    7.0376836292e-2,
    -1.1514610310e-1,
    1.1676998740e-1,
    -1.2420140846e-1,
    1.4249322787e-1,
    -1.6668057665e-1,
    2.0000714765e-1,
    -2.4999993993e-1,
    3.3333331174e-1,
)
LOG_Q1, LOG_Q2 = F(-2.12194440e-4), F(0.693359375)
COS_COEFFICIENTS = (2.443315711809948e-5, -1.388731625493765e-3, 4.166664568298827e-2)
SIN_COEFFICIENTS = (-1.9515295891e-4, 8.3321608736e-3, -1.6666654611e-1)
# minus pi/4 in three parts, so that its multiples can be subtracted without loss
QUARTER_PI = (F(-0.78515625), F(-2.4187564849853515625e-4), F(-3.77489497744594108e-8))

FLUX2C_SIDE = 112  # latent tokens along each side of the square that flux2.c draws (NOISE_MAX_LATENT_DIM)
LANE_BITS = 10  # words that a lane draws, as a power of two: 3136 lanes make the noise of that square


def randn(seed: int, shape: tuple[int, ...]) -> np.ndarray:
    """Draw standard normal values.

    Equal bit for bit to `torch.randn(shape, generator=torch.Generator("cpu").manual_seed(seed))` in float32, on
    x86-64 machines with AVX2. Those with AVX512 run the same kernel, as torch registers no other for them. Elsewhere
    torch calls the C library's log, cos and sin, and the last bits of sixteen or more values differ (on x86-64
    without AVX2 in two values of five, by up to 2.3e-6). The sources are ATen's CPUGeneratorImpl.cpp,
    DistributionTemplates.h (normal_fill) and avx_mathfun.h.

    Args:
        seed: From -(2**63) to 2**64 - 1, as torch allows; its generator uses the lower 32 bits.
        shape: Any shape.

    Returns:
        float32 of `shape`.

    Raises:
        UsageError: The seed is out of range.
    """
    seed = operator.index(seed)  # a numpy integer may be too narrow for the mask below
    if not -(2**63) <= seed < 2**64:
        raise UsageError(f"seed {seed} is out of range: it must be from -(2**63) to 2**64 - 1")
    size = math.prod(shape)
    # RandomState seeds by init_genrand, as torch does; the Generator API would hash the seed first.
    bits = np.random.RandomState(seed & 0xFFFFFFFF)
    values = _normal_fill(bits, size) if size >= 16 else _scalar_normals(bits, size)
    return values.reshape(shape)


def check_seed(seed: int) -> None:
    """Check that a number can be a picture's seed.

    torch also takes negative ones, modulo 2**64. A picture's seed should have one name, not two.

    Raises:
        UsageError: The seed is out of range.
    """
    if not 0 <= seed < 2**64:
        raise UsageError(f"seed {seed} is out of range: it must be from 0 to 2**64 - 1 ({2**64 - 1})")


def size_independent_randn(seed: int, shape: tuple[int, ...], side: int) -> np.ndarray:
    """Draw noise that looks the same at all sizes, so that a seed keeps its composition.

    Noise for the largest picture is drawn and sampled at evenly spaced places (flux_init_noise, antirez/flux2.c).

    Args:
        seed: As for `randn`.
        shape: (batch, channels, rows, columns).
        side: Rows and columns of the largest picture.

    Returns:
        float32 of `shape`.
    """
    batch, channels, rows, columns = shape
    return _sample_evenly(randn(seed, (batch, channels, side, side)), rows, columns)


def flux2c_randn(seed: int, shape: tuple[int, int, int, int]) -> np.ndarray:
    """Draw the noise of flux2.c, so that a seed means the same picture here as there.

    Noise for 112 x 112 latent tokens is drawn in the order of `shape` and sampled at evenly spaced places, unless both
    sides have at least as many tokens. Each value takes two words of xoshiro256**, and is within 1e-6 of what flux2.c
    computes: its last bits depend on the C library and the compiler. The sources are flux_init_noise in flux_sample.c
    and flux_random_normal in flux_kernels.c (antirez/flux2.c).

    Args:
        seed: From 0 to 2**64 - 1; the command line of flux2.c takes those below 2**63.
        shape: (batch, channels, rows, columns). A batch is one long draw; pictures with seeds of their own need a
            call each.

    Returns:
        float32 of `shape`.

    Raises:
        UsageError: The seed is out of range.
    """
    seed = operator.index(seed)
    check_seed(seed)
    batch, channels, rows, columns = shape
    if min(rows, columns) >= FLUX2C_SIDE:
        return _flux2c_normals(seed, math.prod(shape)).reshape(shape)
    large = _flux2c_normals(seed, batch * channels * FLUX2C_SIDE**2).reshape(batch, channels, FLUX2C_SIDE, FLUX2C_SIDE)
    return _sample_evenly(large, rows, columns)


def _sample_evenly(large: np.ndarray, rows: int, columns: int) -> np.ndarray:
    """[batch, channels, any, any] -> [batch, channels, rows, columns], by nearest neighbours."""
    y, x = (np.arange(n) * side // n for n, side in zip((rows, columns), large.shape[2:], strict=True))
    return np.ascontiguousarray(large[:, :, y[:, None], x])


def _flux2c_normals(seed: int, size: int) -> np.ndarray:
    """float32 [size]: one normal value by Box-Muller for each pair of 53-bit uniforms.

    The functions are computed in double precision and rounded, as a good C library's logf and cosf come out.
    """
    # flux2.c draws the first of a pair again if it is 0. No seed is known for which that happens (its chance is
    # 2**-53 a pair), and later lanes would have to move by a word, so that the smallest uniform takes its place.
    words = np.maximum(_xoshiro256(seed, 2 * size) >> np.uint64(11), np.uint64(1))
    first, second = (words.reshape(-1, 2).T * 2.0**-53).astype(np.float32)
    radius = np.sqrt(F(-2) * np.log(first, dtype=np.float64).astype(np.float32))
    angle = F(2 * math.pi) * second
    return radius * np.cos(angle, dtype=np.float64).astype(np.float32)


def _xoshiro256(seed: int, size: int) -> np.ndarray:
    """Return the first outputs of xoshiro256** seeded by SplitMix64 (prng.di.unimi.it): uint64 [size].

    A step is linear over the 256 bits of the state. So it is known where 2, 4, 8, ... steps take any state once that
    is known for the 256 states of a single bit. Many lanes start at states far ahead and then step together.
    """
    mask, state = 2**64 - 1, []
    for i in range(1, 5):
        z = seed + i * 0x9E3779B97F4A7C15 & mask
        z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 & mask
        z = (z ^ z >> 27) * 0x94D049BB133111EB & mask
        state.append(z ^ z >> 31)
    jump = np.zeros((4, 256), np.uint64)
    bit = np.arange(256)
    jump[bit // 64, bit] = np.uint64(1) << (bit % 64).astype(np.uint64)
    jump = _step(jump).T
    for _ in range(LANE_BITS):
        jump = _jumped(jump, jump)
    starts = np.array([state], np.uint64)
    while len(starts) << LANE_BITS < size:
        starts = np.concatenate([starts, _jumped(starts, jump)])
        jump = _jumped(jump, jump)
    lanes = starts[: -(-size >> LANE_BITS)].T.copy()  # [4, lanes]
    words = np.empty((1 << LANE_BITS, lanes.shape[1]), np.uint64)
    for row in words:
        row[:] = lanes[1]
        _step(lanes)
    words = _rotated(words * np.uint64(5), 7) * np.uint64(9)
    return words.T.reshape(-1)[:size]


def _step(lanes: np.ndarray) -> np.ndarray:
    """uint64 [4, lanes] -> the same array, one step on."""
    a, b, c, d = lanes
    shifted = b << np.uint64(17)
    c ^= a
    d ^= b
    b ^= c
    a ^= d
    c ^= shifted
    d[:] = _rotated(d, 45)
    return lanes


def _rotated(words: np.ndarray, bits: int) -> np.ndarray:
    return words << np.uint64(bits) | words >> np.uint64(64 - bits)


def _jumped(states: np.ndarray, jump: np.ndarray) -> np.ndarray:
    """uint64 [n, 4] -> the states further on, where `jump`, uint64 [256, 4], takes the states of a single bit."""
    tables = np.zeros((32, 1, 4), np.uint64)  # for each octet of a state and each of its values: [32, 256, 4]
    for bit in range(8):
        tables = np.concatenate([tables, tables ^ jump.reshape(32, 8, 1, 4)[:, bit]], axis=1)
    octets = np.ascontiguousarray(states, "<u8").view(np.uint8)
    return np.bitwise_xor.reduce(tables[np.arange(32), octets], axis=1)


def _random(bits: np.random.RandomState, size: int) -> np.ndarray:
    """Return raw 32-bit outputs of the Mersenne twister, as uint64."""
    return bits.randint(0, 2**32, size, np.uint32).astype(np.uint64)


def _scalar_normals(bits: np.random.RandomState, size: int) -> np.ndarray:
    """Fewer than 16 values: Box-Muller in double precision, two values for each pair of 53-bit uniforms."""
    values: list[float] = []
    while len(values) < size:
        words = _random(bits, 4)
        u1, u2 = (((words[i] << np.uint64(32)) | words[i + 1]) & np.uint64(2**53 - 1) for i in (0, 2))
        radius = math.sqrt(-2.0 * math.log1p(-float(u2) * 2.0**-53))
        theta = 2.0 * math.pi * (float(u1) * 2.0**-53)
        values += [radius * math.cos(theta), radius * math.sin(theta)]
    return np.array(values[:size], np.float32) + F(0)  # the mean: see _box_muller


def _normal_fill(bits: np.random.RandomState, size: int) -> np.ndarray:
    """Sixteen or more values: single-precision Box-Muller over blocks of 8 + 8; a remainder redraws the last 16."""
    whole = size // 16 * 16
    uniform = _uniform(bits, size)
    values = np.empty(size, np.float32)
    values[:whole] = _box_muller(uniform[:whole].reshape(-1, 2, 8)).reshape(-1)
    if whole < size:
        values[-16:] = _box_muller(_uniform(bits, 16).reshape(1, 2, 8)).reshape(-1)
    return values


def _uniform(bits: np.random.RandomState, size: int) -> np.ndarray:
    """float32 [size] in [0, 1): 24 bits each."""
    return (_random(bits, size) & np.uint64(0xFFFFFF)).astype(np.float32) * F(2.0**-24)


def _box_muller(uniform: np.ndarray) -> np.ndarray:
    """float32 [blocks, 2, 8] uniform -> same, normal."""
    radius = np.sqrt(F(-2) * _log(F(1) - uniform[:, 0]))
    sine, cosine = _sincos(F(2 * math.pi) * uniform[:, 1])
    # Adding the mean, 0, turns a negative zero into a positive one.
    return np.stack([radius * cosine, radius * sine], axis=1) + F(0)


def _fma(a: np.ndarray, b: np.ndarray | np.float32, c: np.ndarray | np.float32) -> np.ndarray:
    """Return a * b + c rounded once to float32.

    The product of two float32 is exact in float64. The sum is rounded to odd before it is rounded to float32, since
    rounding to nearest twice can end on the wrong side of a tie (Boldo and Melquiond, "Emulation of FMA and correctly
    rounded sums: proved algorithms using rounding to odd", 2008).
    """
    product = np.multiply(a, b, dtype=np.float64)
    addend = np.asarray(c, np.float64)
    total = product + addend
    # TwoSum: total + error == product + addend exactly
    virtual = total - product
    error = (product - (total - virtual)) + (addend - virtual)
    even = (total.view(np.int64) & 1) == 0
    odd = np.where(even & (error != 0), np.nextafter(total, np.where(error > 0, np.inf, -np.inf)), total)
    return odd.astype(np.float32)


def _polynomial(x: np.ndarray, coefficients: tuple[float, ...]) -> np.ndarray:
    value = np.full_like(x, coefficients[0])
    for coefficient in coefficients[1:]:
        value = _fma(value, x, F(coefficient))
    return value


def _log(x: np.ndarray) -> np.ndarray:
    """Natural logarithm of float32 in (0, 1] (log256_ps)."""
    mantissa, exponent = np.frexp(x)  # mantissa in [0.5, 1)
    small = mantissa < F(0.707106781186547524)
    e = (exponent - small).astype(np.float32)
    # The order of these two additions matters for rounding: 2 * mantissa - 1 is formed as (mantissa - 1) + mantissa.
    m = (mantissa - F(1)) + np.where(small, mantissa, F(0))
    z = m * m
    y = _polynomial(m, LOG_COEFFICIENTS) * m
    # The compiler contracted this product into the addition, not the other one.
    y = _fma(y, z, e * LOG_Q1) - z * F(0.5)
    return _fma(e, LOG_Q2, m + y)


def _sincos(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Sine and cosine of float32 in [0, 2 pi] (sincos256_ps)."""
    octant = ((x * F(1.27323954473516)).astype(np.int32) + 1) & ~1
    y = octant.astype(np.float32)
    for part in QUARTER_PI:
        x = _fma(y, part, x)
    z = x * x
    cosine = _polynomial(z, COS_COEFFICIENTS) * z
    cosine = _fma(cosine, z, -z * F(0.5)) + F(1)
    sine = _polynomial(z, SIN_COEFFICIENTS) * z
    sine = _fma(sine, x, x)
    swapped = (octant & 2) != 0
    sin_sign = np.where(octant & 4, F(-1), F(1))
    cos_sign = np.where((octant - 2) & 4, F(1), F(-1))
    return sin_sign * np.where(swapped, cosine, sine), cos_sign * np.where(swapped, sine, cosine)
