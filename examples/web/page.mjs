// The form, the progress and the picture. The work is done in worker.mjs.

import { readModel, sizeOf } from "./model.mjs";

const byId = (id) => document.getElementById(id);
const form = byId("form");
const parameters = new URLSearchParams(location.search);
const folder = new URL(`${(parameters.get("model") ?? "model").replace(/\/+$/, "")}/`, location.href).href;
let worker = null;
let halves = false; // whether the WebGPU adapter computes with float16

function say(text, kind = "") {
  byId("status").textContent = text;
  byId("status").className = `wide ${kind}`;
}

function stop(text, kind) {
  worker?.terminate();
  worker = null;
  byId("generate").disabled = false;
  byId("stop").disabled = true;
  byId("progress").hidden = true;
  say(text, kind);
}

// What is wrong with the form, or null.
function fault({ prompt, seed, steps, width, height, build, provider }) {
  if (prompt.length === 0) return "The prompt is empty.";
  if (!/^\d+$/.test(seed) || BigInt(seed) >= 2n ** 64n) return "The seed must be a whole number from 0 to 2^64 - 1.";
  if (!Number.isInteger(steps) || steps < 1 || steps > 100) return "Steps must be a whole number from 1 to 100.";
  for (const [name, side] of Object.entries({ Width: width, Height: height })) {
    if (!(side >= 16 && side <= 1024 && side % 16 === 0)) return `${name} must be a multiple of 16, from 16 to 1024.`;
  }
  const precision = build.split(".")[0];
  if (provider === "webgpu" && (precision === "bf16" || (["fp16", "int8"].includes(precision) && !halves))) {
    return `This WebGPU adapter can't compute ${precision}: choose another precision, or the CPU.`;
  }
  return null;
}

function show({ pixels, width, height, seconds }, seed) {
  const canvas = byId("picture");
  [canvas.width, canvas.height] = [width, height];
  canvas.getContext("2d").putImageData(new ImageData(pixels, width, height), 0, 0);
  canvas.hidden = false;
  byId("placeholder").hidden = true;
  canvas.toBlob((blob) => {
    const link = byId("download");
    URL.revokeObjectURL(link.href);
    Object.assign(link, { href: URL.createObjectURL(blob), download: `${seed}.png`, hidden: false });
    stop(`${width}x${height} pixels in ${seconds.toFixed(1)} s`, "done");
  });
}

function generate(event) {
  event.preventDefault();
  const request = {
    folder,
    provider: form.provider.value,
    build: form.build.value,
    prompt: form.prompt.value,
    seed: form.seed.value.trim(),
    steps: Number(form.steps.value),
    width: Number(form.width.value),
    height: Number(form.height.value),
  };
  const wrong = fault(request);
  if (wrong) return say(wrong, "error");
  say("Starting ...");
  byId("generate").disabled = true;
  byId("stop").disabled = false;
  byId("notice").textContent = "";
  const bar = byId("progress");
  Object.assign(bar, { hidden: false, max: request.steps + 4, value: 0 });
  worker = new Worker("worker.mjs", { type: "module" });
  worker.onerror = () => stop("The libraries can't be loaded: run npm install in the folder of this page.", "error");
  worker.onmessage = ({ data }) => {
    if (data.error) return stop(data.error, "error");
    if (data.notice) return void (byId("notice").textContent = data.notice);
    if (data.pixels) return show(data, request.seed);
    bar.value += 1;
    say(`${data.progress} (${data.seconds.toFixed(1)} s)`);
  };
  worker.postMessage(request);
}

async function describe(model) {
  const size = await sizeOf(model, form.build.value);
  byId("size").textContent = `${(size / 1e6).toFixed(1)} MB of weights`;
}

async function start() {
  const model = await readModel(folder);
  // Float32 builds first: every provider knows their types.
  const names = Object.keys(model.builds).sort((a, b) => b.startsWith("fp32") - a.startsWith("fp32"));
  for (const name of names) form.build.add(new Option(name.split(".")[0], name));
  for (const name of ["width", "height"]) form[name].value = model.defaults[name] ?? 256;
  const adapter = await navigator.gpu?.requestAdapter().catch(() => null);
  halves = adapter?.features.has("shader-f16") ?? false;
  if (adapter) form.provider.add(new Option(adapter.info?.isFallbackAdapter ? "WebGPU (software)" : "WebGPU", "webgpu"));
  form.build.onchange = () => describe(model).catch((error) => say(error.message, "error"));
  form.onsubmit = generate;
  byId("stop").onclick = () => stop("Stopped.");
  byId("generate").disabled = false;
  if (!self.crossOriginIsolated) byId("notice").textContent = "One thread only: this server sends no isolation headers.";
  await describe(model);
  say("Ready.");
}

start().catch((error) => say(error.message, "error"));
