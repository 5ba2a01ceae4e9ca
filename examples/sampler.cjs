// Draw a picture from a folder of portable graphs: node sampler.cjs FOLDER PROMPT OUTPUT.ppm [NOISE.f32 HEIGHT WIDTH]
//
// npm install --ignore-scripts onnxruntime-node @huggingface/tokenizers
// NOISE.f32 holds the noise, float32 [1, channels, HEIGHT / 16, WIDTH / 16], without a header.
const fs = require("node:fs");
const path = require("node:path");
const ort = require("onnxruntime-node");
const { Tokenizer } = require("@huggingface/tokenizers");

const STEPS = 4;
const f32 = Math.fround;
const int64 = (values, ...dims) => new ort.Tensor("int64", BigInt64Array.from(values, BigInt), dims);
const float32 = (values, ...dims) => new ort.Tensor("float32", Float32Array.from(values), dims);
const count = (n, f) => Array.from({ length: n }, (_, i) => f(i));

async function main([folder, prompt, output, noiseFile, height = 128, width = 128]) {
  const json = (file) => JSON.parse(fs.readFileSync(path.join(folder, file), "utf8"));
  const manifest = json("fluxonnx.json");
  const { components } = manifest.builds[Object.keys(manifest.builds).find((name) => name.endsWith("portable"))];
  // Each graph is opened when it is needed and released afterwards; bf16 weights are not widened ahead of time.
  const open = (name) =>
    ort.InferenceSession.create(path.join(folder, components[name].graph), { enableMemPattern: false });

  // The prompt, in the chat template, cut and padded on the right.
  const length = manifest.defaults.max_sequence_length ?? 512;
  const tokenizer = new Tokenizer(json("tokenizer/tokenizer.json"), json("tokenizer/tokenizer_config.json"));
  const chat = `<|im_start|>user\n${prompt}<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n`;
  const ids = tokenizer.encode(chat, { add_special_tokens: false }).ids.slice(0, length);
  const padding = tokenizer.token_to_id("<|endoftext|>");
  const encoder = await open("text_encoder");
  const { prompt_embeds } = await encoder.run({
    input_ids: int64(count(length, (i) => ids[i] ?? padding), 1, length),
    attention_mask: int64(count(length, (i) => (i < ids.length ? 1 : 0)), 1, length),
  });
  await encoder.release();

  // Noise [1, channels, rows, columns] becomes tokens [1, rows * columns, channels].
  const [rows, columns] = [height / 16, width / 16];
  const tokens = rows * columns;
  const decoder = await open("vae_decoder");
  const channels = decoder.inputMetadata[0].shape[1];
  const normal = () => Math.sqrt(-2 * Math.log(1 - Math.random())) * Math.cos(2 * Math.PI * Math.random());
  const noise = noiseFile
    ? new Float32Array(new Uint8Array(fs.readFileSync(noiseFile)).buffer)
    : count(channels * tokens, normal);
  let latents = Float32Array.from({ length: channels * tokens }, (_, i) => {
    return noise[(i % channels) * tokens + Math.floor(i / channels)];
  });

  // Noise levels from 1 down to 0.
  const [at10, at200] = [8.73809524e-5 * tokens + 1.89833333, 0.00016927 * tokens + 0.45666666];
  const shift = Math.exp(tokens > 4300 ? at200 : at200 + ((at200 - at10) / 190) * (STEPS - 200));
  const linear = count(STEPS, (i) => f32(1 - (i * (1 - 1 / STEPS)) / Math.max(STEPS - 1, 1)));
  const sigmas = [...linear.map((s) => f32(shift / (shift + 1 / s - 1))), 0];

  const [conditioning, transformer] = [await open("conditioning"), await open("transformer")];
  const txt_ids = int64(count(length, (i) => [0, 0, 0, i]).flat(), length, 4);
  const img_ids = int64(count(tokens, (i) => [0, Math.floor(i / columns), i % columns, 0]).flat(), tokens, 4);
  for (let i = 0; i < STEPS; i++) {
    const conditions = await conditioning.run({ timestep: float32([sigmas[i]], 1), txt_ids, img_ids });
    const hidden_states = float32(latents, 1, tokens, channels);
    const inputs = { ...conditions, hidden_states, encoder_hidden_states: prompt_embeds };
    const { velocity } = await transformer.run(inputs);
    const step = f32(sigmas[i + 1] - sigmas[i]);
    latents = latents.map((x, j) => x + step * velocity.data[j]);
  }

  const grid = count(channels * tokens, (i) => latents[(i % tokens) * channels + Math.floor(i / tokens)]);
  const { sample } = await decoder.run({ latents: float32(grid, 1, channels, rows, columns) });
  const area = height * width;
  const pixels = Buffer.alloc(3 * area);
  for (let i = 0; i < pixels.length; i++) {
    const value = sample.data[(i % 3) * area + Math.floor(i / 3)] / 2 + 0.5;
    pixels[i] = Math.round(Math.min(Math.max(value, 0), 1) * 255);
  }
  fs.writeFileSync(output, Buffer.concat([Buffer.from(`P6 ${width} ${height} 255\n`), pixels]));
}

if (![5, 8].includes(process.argv.length)) {
  console.error("usage: node sampler.cjs FOLDER PROMPT OUTPUT.ppm [NOISE.f32 HEIGHT WIDTH]");
  process.exit(2);
}
main(process.argv.slice(2)).catch((error) => {
  console.error(`sampler.cjs: ${error.message}`);
  process.exit(1);
});
