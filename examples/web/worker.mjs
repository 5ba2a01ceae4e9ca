// Draws pictures in a thread of its own, so that the page stays responsive. Messages in: {folder, provider, build,
// prompt, seed, steps, width, height}. Messages out: {progress}, {notice}, {pixels, width, height} or {error}.

import { Tokenizer } from "./node_modules/@huggingface/tokenizers/dist/tokenizers.min.mjs";
import { readGraph, readModel, readTokenizer } from "./model.mjs";
import { randn } from "./noise.mjs";
import { draw, tokenise } from "./sampler.mjs";

const BUNDLES = { wasm: "ort.wasm.bundle.min.mjs", webgpu: "ort.webgpu.bundle.min.mjs" };

async function handle({ folder, provider, build, prompt, seed, steps, width, height }) {
  const started = performance.now();
  const progress = (text) => postMessage({ progress: text, seconds: (performance.now() - started) / 1000 });
  progress("onnxruntime-web");
  const ort = await import(`./node_modules/onnxruntime-web/dist/${BUNDLES[provider]}`);
  // Threads need memory that is shared, which a server must allow: see serve.py.
  ort.env.wasm.numThreads = self.crossOriginIsolated ? Math.min(navigator.hardwareConcurrency, 8) : 1;

  const model = await readModel(folder);
  const open = async (component) => {
    const { graph, externalData } = await readGraph(model, build, component);
    // Sines of shaders are inexact, and `conditioning` is small.
    const executionProviders = [component === "conditioning" ? "wasm" : provider];
    return ort.InferenceSession.create(graph, { executionProviders, externalData, enableMemPattern: false });
  };

  const tokens = tokenise(new Tokenizer(...(await readTokenizer(model))), prompt, model.defaults.max_sequence_length ?? 512);
  if (tokens.cut) postMessage({ notice: `The prompt is too long: its last ${tokens.cut} tokens are cut off.` });
  const [rows, columns] = [height / 16, width / 16];
  const noise = randn(BigInt(seed), model.channels * rows * columns);
  const pixels = await draw({ Tensor: ort.Tensor, open, tokens, noise, rows, columns, steps, progress });
  postMessage({ pixels, width, height, seconds: (performance.now() - started) / 1000 });
}

self.onmessage = ({ data }) => handle(data).catch((error) => postMessage({ error: error?.message ?? String(error) }));
