// Called by browser.py: load([provider, folder, file, locations]) opens a graph and returns its number, and
// run([number, feeds, outputs]) runs it. Arrays travel as base64.
const ARRAYS = { float32: Float32Array, int64: BigInt64Array };
const BUNDLES = { wasm: "ort.wasm.bundle.min.mjs", webgpu: "ort.webgpu.bundle.min.mjs" };
const graphs = [];

const toBytes = (text) => Uint8Array.from(atob(text), (character) => character.charCodeAt(0));

function toBase64(array) {
  let text = "";
  for (const byte of new Uint8Array(array.buffer, array.byteOffset, array.byteLength)) text += String.fromCharCode(byte);
  return btoa(text);
}

window.run = async ([number, feeds, outputs]) => {
  const { ort, session } = graphs[number];
  const inputs = {};
  for (const [name, [type, dims, data]] of Object.entries(feeds)) {
    inputs[name] = new ort.Tensor(type, new ARRAYS[type](toBytes(data).buffer), dims);
  }
  const results = await session.run(inputs);
  return outputs.map((name) => [results[name].dims, toBase64(results[name].data)]);
};

window.load = async ([provider, folder, file, locations]) => {
  const ort = await import(`/onnxruntime-web/dist/${BUNDLES[provider]}`);
  ort.env.wasm.numThreads = 1;
  const session = await ort.InferenceSession.create(`/${folder}/${file}`, {
    executionProviders: [provider],
    externalData: locations.map((path) => ({ path, data: `/${folder}/${path}` })),
  });
  return graphs.push({ ort, session }) - 1;
};
