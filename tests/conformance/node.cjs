// node node.cjs PACKAGE GRAPH FOLDER: run a graph on the arrays in FOLDER, and write its outputs there.
const fs = require("node:fs");
const path = require("node:path");

const [name, graph, folder] = process.argv.slice(2);
const ort = require(name);
const ARRAYS = { float32: Float32Array, int64: BigInt64Array };

async function main() {
  if (name === "onnxruntime-web") ort.env.wasm.numThreads = 1;
  const model = name === "onnxruntime-web" ? new Uint8Array(fs.readFileSync(graph)) : graph;
  const provider = name === "onnxruntime-web" ? "wasm" : "cpu";
  const session = await ort.InferenceSession.create(model, { executionProviders: [provider] });
  const feeds = {};
  for (const [port, { type, dims }] of Object.entries(JSON.parse(fs.readFileSync(path.join(folder, "job.json"))))) {
    const bytes = new Uint8Array(fs.readFileSync(path.join(folder, port))).buffer;
    feeds[port] = new ort.Tensor(type, new ARRAYS[type](bytes), dims);
  }
  const results = await session.run(feeds);
  const outputs = session.outputNames.map((port) => {
    fs.writeFileSync(path.join(folder, port), results[port].data);
    return [port, results[port].dims];
  });
  fs.writeFileSync(path.join(folder, "outputs.json"), JSON.stringify(outputs));
}

main().catch((error) => {
  console.error(`Error: ${error.message}`);
  process.exit(1);
});
