// Noise from a seed: the values of torch.randn(shape, generator=torch.Generator("cpu").manual_seed(seed)), bit for bit,
// as `fluxonnx generate` draws them. The sources are ATen's CPUGeneratorImpl.cpp, DistributionTemplates.h (normal_fill)
// and avx_mathfun.h, whose coefficients are those of the Cephes library in single precision.

const f32 = Math.fround;
const LOG = [
  7.0376836292e-2, -1.1514610310e-1, 1.1676998740e-1, -1.2420140846e-1, 1.4249322787e-1, -1.6668057665e-1,
  2.0000714765e-1, -2.4999993993e-1, 3.3333331174e-1,
].map(f32);
const COS = [2.443315711809948e-5, -1.388731625493765e-3, 4.166664568298827e-2].map(f32);
const SIN = [-1.9515295891e-4, 8.3321608736e-3, -1.6666654611e-1].map(f32);
// minus pi/4 in three parts, so that its multiples can be subtracted without loss
const QUARTER_PI = [-0.78515625, -2.4187564849853515625e-4, -3.77489497744594108e-8].map(f32);
const [LOG_Q1, LOG_Q2] = [f32(-2.1219444e-4), f32(0.693359375)];

// The Mersenne twister, seeded by init_genrand with the lower 32 bits of the seed: a function that returns 32 bits.
function twister(seed) {
  const state = new Uint32Array(624);
  state[0] = Number(BigInt.asUintN(32, BigInt(seed)));
  for (let i = 1; i < 624; i++) state[i] = Math.imul(1812433253, state[i - 1] ^ (state[i - 1] >>> 30)) + i;
  let next = 624;
  return () => {
    if (next === 624) {
      for (let i = 0; i < 624; i++) {
        const y = (state[i] & 0x80000000) | (state[(i + 1) % 624] & 0x7fffffff);
        state[i] = state[(i + 397) % 624] ^ (y >>> 1) ^ (y & 1 ? 0x9908b0df : 0);
      }
      next = 0;
    }
    let y = state[next++];
    y ^= y >>> 11;
    y ^= (y << 7) & 0x9d2c5680;
    y ^= (y << 15) & 0xefc60000;
    return (y ^ (y >>> 18)) >>> 0;
  };
}

const double = new Float64Array(1);
const words = new Uint32Array(double.buffer); // little-endian, as all machines that run browsers are

// a * b + c, rounded once to float32. The product of two float32 is exact in float64. The sum is rounded to odd before
// it is rounded to float32, since rounding to nearest twice can end on the wrong side of a tie (Boldo and Melquiond).
function fma(a, b, c) {
  const product = a * b;
  const total = product + c;
  const virtual = total - product;
  const error = product - (total - virtual) + (c - virtual); // TwoSum: total + error == product + c exactly
  double[0] = total;
  if (error !== 0 && (words[0] & 1) === 0) {
    if (error > 0 === total > 0) words[0] += 1;
    else if (words[0] === 0) (words[0] = 0xffffffff), (words[1] -= 1);
    else words[0] -= 1;
  }
  return f32(double[0]);
}

const polynomial = (x, coefficients) => coefficients.reduce((value, coefficient) => fma(value, x, coefficient));

// Natural logarithm of a float32 in (0, 1] (log256_ps).
function log(x) {
  let exponent = 0;
  for (; x < 0.5; x *= 2) exponent--;
  if (x === 1) (x = 0.5), (exponent = 1);
  const small = x < f32(0.707106781186547524);
  const e = exponent - (small ? 1 : 0);
  const m = f32(f32(x - 1) + (small ? x : 0));
  const z = f32(m * m);
  let y = f32(polynomial(m, LOG) * m);
  y = f32(fma(y, z, f32(e * LOG_Q1)) - f32(z * 0.5));
  return fma(e, LOG_Q2, f32(m + y));
}

// Sine and cosine of a float32 in [0, 2 pi] (sincos256_ps).
function sincos(x) {
  const octant = (Math.trunc(f32(x * f32(1.27323954473516))) + 1) & ~1;
  for (const part of QUARTER_PI) x = fma(octant, part, x);
  const z = f32(x * x);
  const cosine = f32(fma(f32(polynomial(z, COS) * z), z, f32(-z * 0.5)) + 1);
  const sine = fma(f32(polynomial(z, SIN) * z), x, x);
  const swapped = (octant & 2) !== 0;
  const sinSign = octant & 4 ? -1 : 1;
  const cosSign = (octant - 2) & 4 ? 1 : -1;
  return [sinSign * (swapped ? cosine : sine), cosSign * (swapped ? sine : cosine)];
}

// Standard normal values, Float32Array of `size`, at least 16. `seed`: a BigInt, or an integer below 2 ** 53.
export function randn(seed, size) {
  if (size < 16) throw new RangeError(`${size} values: torch draws fewer than 16 in another way`);
  const draw = twister(seed);
  const uniform = () => f32((draw() & 0xffffff) * 2 ** -24);
  const values = Float32Array.from({ length: size }, uniform);
  const boxMuller = (start, source) => {
    for (let i = 0; i < 8; i++) {
      const radius = f32(Math.sqrt(f32(-2 * log(f32(1 - source[i])))));
      const [sine, cosine] = sincos(f32(f32(2 * Math.PI) * source[i + 8]));
      values[start + i] = f32(radius * cosine) + 0; // + 0 turns a negative zero into a positive one
      values[start + i + 8] = f32(radius * sine) + 0;
    }
  };
  for (let start = 0; start + 16 <= size; start += 16) boxMuller(start, values.slice(start, start + 16));
  if (size % 16) boxMuller(size - 16, Float32Array.from({ length: 16 }, uniform)); // the remainder redraws the last 16
  return values;
}
