// node node.cjs GRAPH FOLDER: run a graph with onnxruntime-node on the arrays in FOLDER, and write its outputs there.
const fs = require("node:fs");
const path = require("node:path");

const [graph, folder] = process.argv.slice(2);
const ort = require("onnxruntime-node");
const ARRAYS = { float32: Float32Array, int64: BigInt64Array };

async function main() {
  const session = await ort.InferenceSession.create(graph, { executionProviders: ["cpu"] });
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
