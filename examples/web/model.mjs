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

// The fields of a protobuf message: pairs of a field's number and its bytes, of those that have bytes.
function* fields(bytes) {
  let at = 0;
  const varint = () => {
    let value = 0;
    for (let scale = 1; ; scale *= 128) {
      const byte = bytes[at++];
      value += (byte & 127) * scale;
      if (byte < 128) return value;
    }
  };
  while (at < bytes.length) {
    const tag = varint();
    const kind = tag % 8;
    if (kind === 0) varint();
    else if (kind === 2) {
      const length = varint();
      yield [Math.floor(tag / 8), bytes.subarray(at, (at += length))];
    } else at += kind === 1 ? 8 : 4;
  }
}

const inside = (bytes, number) => [...fields(bytes)].filter(([n]) => n === number).map(([, value]) => value);

// The weight files that a graph names: ModelProto.graph, GraphProto.initializer, TensorProto.external_data, and of its
// entries the one with the key "location" (onnx.proto).
function locations(graph) {
  const text = (bytes) => new TextDecoder().decode(bytes);
  const tensors = inside(graph, 7).flatMap((body) => inside(body, 5));
  const entries = tensors.flatMap((tensor) => inside(tensor, 13)).map((e) => [...inside(e, 1), ...inside(e, 2)].map(text));
  return [...new Set(entries.filter(([key]) => key === "location").map(([, value]) => value))];
}

// One graph of a build, as onnxruntime-web wants it: its bytes, and each weight file under the path by which the graph
// names it.
export async function readGraph({ folder, builds }, build, component) {
  const { graph: name } = builds[build].components[component];
  const answer = await fetch(new URL(name, folder));
  if (!answer.ok) throw new Error(`${name} can't be loaded (${answer.status} ${answer.statusText}): ${NEXT}`);
  const graph = new Uint8Array(await answer.arrayBuffer());
  const externalData = locations(graph).map((path) => ({ path, data: new URL(path, folder).href }));
  return { graph, externalData };
}

// Bytes of all weight files of a build that a picture from a prompt needs.
export async function sizeOf(model, build) {
  const names = ["text_encoder", "transformer", "vae_decoder"];
  const graphs = await Promise.all(names.map((name) => readGraph(model, build, name)));
  const urls = new Set(graphs.flatMap(({ externalData }) => externalData.map(({ data }) => data)));
  const sizes = [...urls].map(async (url) => {
    const answer = await fetch(url, { method: "HEAD" });
    if (!answer.ok) throw new Error(`${url.slice(model.folder.length)} is missing (${answer.status}): ${NEXT}`);
    return Number(answer.headers.get("Content-Length"));
  });
  return (await Promise.all(sizes)).reduce((total, size) => total + size, 0);
}
