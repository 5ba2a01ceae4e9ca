// From a prompt and noise to a picture, with five graphs. What this computes is described in docs/graphs.md.

const f32 = Math.fround;
const count = (n, f) => Array.from({ length: n }, (_, i) => f(i));

// The prompt in the chat template, cut to `length` tokens and padded on the right.
export function tokenise(tokenizer, prompt, length) {
  const chat = `<|im_start|>user\n${prompt}<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n`;
  const all = tokenizer.encode(chat, { add_special_tokens: false }).ids;
  const padding = tokenizer.token_to_id("<|endoftext|>");
  return {
    ids: count(length, (i) => all[i] ?? padding),
    mask: count(length, (i) => (i < all.length ? 1 : 0)),
    cut: Math.max(all.length - length, 0),
  };
}

// Noise levels from 1 down to 0 for a number of image tokens: an array of steps + 1.
export function schedule(tokens, steps) {
  const [at10, at200] = [8.73809524e-5 * tokens + 1.89833333, 0.00016927 * tokens + 0.45666666];
  const shift = Math.exp(tokens > 4300 ? at200 : at200 + ((at200 - at10) / 190) * (steps - 200));
  const linear = count(steps, (i) => f32(1 - (i * (1 - 1 / steps)) / Math.max(steps - 1, 1)));
  return [...linear.map((s) => f32(shift / (shift + 1 / s - 1))), 0];
}

// Draw a picture. `open(component)` gives a graph: {run(feeds), release()}. `noise`: Float32Array [channels, rows,
// columns]. `progress(text)` is called before each part of the work. Returns RGBA, Uint8ClampedArray [rows * 16,
// columns * 16, 4].
export async function draw({ Tensor, open, tokens: { ids, mask }, noise, rows, columns, steps, progress }) {
  const int64 = (values, ...dims) => new Tensor("int64", BigInt64Array.from(values, BigInt), dims);
  const float32 = (values, ...dims) => new Tensor("float32", Float32Array.from(values), dims);
  const [length, tokens] = [ids.length, rows * columns];
  const channels = noise.length / tokens;

  const run = async (name, feeds) => {
    const graph = await open(name);
    const results = await graph.run(feeds);
    await graph.release();
    return results;
  };

  await progress("text encoder");
  const { prompt_embeds } = await run("text_encoder", {
    input_ids: int64(ids, 1, length),
    attention_mask: int64(mask, 1, length),
  });

  await progress("transformer: loading");
  const [conditioning, transformer] = [await open("conditioning"), await open("transformer")];
  const txt_ids = int64(count(length, (i) => [0, 0, 0, i]).flat(), length, 4);
  const img_ids = int64(count(tokens, (i) => [0, Math.floor(i / columns), i % columns, 0]).flat(), tokens, 4);
  const sigmas = schedule(tokens, steps);
  // [channels, rows, columns] -> [tokens, channels]
  let latents = Float32Array.from(noise, (_, i) => noise[(i % channels) * tokens + Math.floor(i / channels)]);
  for (let i = 0; i < steps; i++) {
    await progress(`step ${i + 1} of ${steps}`);
    const conditions = await conditioning.run({ timestep: float32([sigmas[i]], 1), txt_ids, img_ids });
    const hidden_states = float32(latents, 1, tokens, channels);
    const { velocity } = await transformer.run({ ...conditions, hidden_states, encoder_hidden_states: prompt_embeds });
    const change = f32(sigmas[i + 1] - sigmas[i]);
    latents = latents.map((x, j) => x + f32(change * velocity.data[j]));
  }
  await transformer.release();
  await conditioning.release();

  await progress("decoder");
  const grid = latents.map((_, i) => latents[(i % tokens) * channels + Math.floor(i / tokens)]);
  const { sample } = await run("vae_decoder", { latents: float32(grid, 1, channels, rows, columns) });
  const area = tokens * 256;
  // A clamped array clips to 0 and 255, and rounds half to even.
  return Uint8ClampedArray.from({ length: 4 * area }, (_, i) => {
    return i % 4 === 3 ? 255 : f32(f32(sample.data[(i % 4) * area + (i >> 2)] / 2) + 0.5) * 255;
  });
}
