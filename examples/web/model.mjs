// What a folder of graphs holds, read over HTTP.

const NEXT = "export a model into this folder: fluxonnx export --flavour portable --precision fp32 -o FOLDER";

async function json(url, what) {
  const answer = await fetch(url);
  if (!answer.ok) throw new Error(`${what} can't be loaded (${answer.status} ${answer.statusText}): ${NEXT}`);
  return answer.json().catch(() => Promise.reject(new Error(`${what} is no JSON: ${NEXT}`)));
}

// The manifest of a folder, and its builds for runtimes other than onnxruntime itself: {name: build}.
export async function readModel(folder) {
  const manifest = await json(new URL("fluxonnx.json", folder), "fluxonnx.json");
  const index = await json(new URL("model_index.json", folder), "model_index.json");
  if (!index.is_distilled) throw new Error("This page has no guidance: choose a distilled model.");
  const needed = ["text_encoder", "conditioning", "transformer", "vae_decoder"];
  const complete = ([, build]) => build.flavour === "portable" && needed.every((name) => name in build.components);
  const builds = Object.fromEntries(Object.entries(manifest.builds ?? {}).filter(complete));
  if (Object.keys(builds).length === 0) throw new Error(`The folder has no portable build: ${NEXT}`);
  return { folder, builds, defaults: manifest.defaults ?? {}, channels: manifest.architecture.transformer.in_channels };
}

// The tokenizer's two files.
export const readTokenizer = ({ folder }) =>
  Promise.all(["tokenizer/tokenizer.json", "tokenizer/tokenizer_config.json"].map((n) => json(new URL(n, folder), n)));

// Where the files of one graph of a build are. onnxruntime-web wants each weight file under the path by which the
// graph names it, which is its path in the folder.
export function filesOf({ folder, builds }, build, component) {
  const { graph, weights } = builds[build].components[component];
  const externalData = weights.map((path) => ({ path, data: new URL(path, folder).href }));
  return { graph: new URL(graph, folder).href, externalData };
}

// Bytes of all weight files of a build that a picture from a prompt needs.
export async function sizeOf(model, build) {
  const graphs = ["text_encoder", "transformer", "vae_decoder"].map((name) => filesOf(model, build, name).externalData);
  const urls = new Set(graphs.flat().map(({ data }) => data));
  const lengths = await Promise.all(
    [...urls].map(async (url) => Number((await fetch(url, { method: "HEAD" })).headers.get("Content-Length"))),
  );
  return lengths.reduce((total, length) => total + length, 0);
}
