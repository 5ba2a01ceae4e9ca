// The form: its fields follow what the server says about itself; what was typed is still there after a reload.

import { find, make, show } from "./dom.js";
import { loras, setLoras, startLoras } from "./loras.js";
import { fieldError } from "./notices.js";
import { offerInputSize, preset, setSize, size, sizeErrors, startSizes } from "./sizes.js";
import { restoreSources, sources, startSources, storedSources } from "./sources.js";
import { known } from "./words.js";

const STORED = "fluxonnx.form";
// Fields that are stored and sent as they are.
const TEXTS = ["prompt", "negative_prompt", "seed", "model", "precision", "sampler", "schedule"];
const NUMBERS = ["steps", "count", "guidance_scale", "strength", "mask_blur"];
const ERRORS = [...TEXTS, ...NUMBERS, "width", "height", "input", "references", "mask", "lora", "form"];
const LARGEST_SEED = 2n ** 64n - 1n;
// Seeds from the dice can be typed again.
const DICE = 2 ** 32;

let info = null;
let stored = {};

const model = () => info.models.find(({ id }) => id === find("model").value) ?? info.models[0];
const field = (name) => info.fields.find((item) => item.name === name) ?? {};

function options(select, values, chosen) {
  select.replaceChildren(...values.map((value) => make("option", { value, textContent: value })));
  if (values.includes(chosen)) select.value = chosen;
}

/** Set up the form; `onSubmit(values)` is called with values that this page finds no fault with. */
export function startForm(facts, onSubmit) {
  info = facts;
  options(find("model"), info.models.map(({ id }) => id));
  options(find("sampler"), info.samplers ?? []);
  options(find("schedule"), (info.schedules ?? []).filter((name) => name !== "custom")); // it needs a list of numbers
  show(find("model").closest(".field"), info.models.length > 1);
  startSizes(info);
  startLoras(info, store);
  startSources(info, store);
  ranges();
  restore();
  find("model").addEventListener("change", () => {
    modelDefaults();
    const { default_width: width, default_height: height } = model();
    const { input } = storedSources();
    startSizes({ ...info, defaults: { ...info.defaults, width, height } });
    offerInputSize(Boolean(input));
  });
  find("form").addEventListener("input", () => (showSeed(), store()));
  find("form").addEventListener("change", store);
  find("dice").onclick = () => {
    find("seed").value = crypto.getRandomValues(new Uint32Array(1))[0] % DICE;
    changedSeed();
  };
  find("clear-seed").onclick = () => {
    find("seed").value = "";
    changedSeed();
    find("seed").focus();
  };
  find("reset").onclick = reset;
  find("form").addEventListener("submit", (event) => {
    event.preventDefault();
    const values = checked();
    if (values) onSubmit(values);
  });
  find("make").disabled = false;
}

function changedSeed() {
  fieldError("seed", null);
  showSeed();
  store();
}

const showSeed = () => show(find("clear-seed"), find("seed").value !== "");

function ranges() {
  for (const name of ["steps", "guidance_scale", "mask_blur"]) {
    const { minimum, maximum } = field(name === "guidance_scale" ? "guidance" : name);
    if (minimum !== undefined && minimum !== null) find(name).min = minimum;
    if (maximum !== undefined && maximum !== null) find(name).max = maximum;
  }
  find("count").max = info.limits.max_count ?? 16;
}

/** The precisions that the chosen model has, and steps and guidance as it wants them. */
function modelDefaults() {
  const { default_steps: steps, default_guidance: guidance, precision, precisions = info.precisions ?? [] } = model() ?? {};
  find("steps").value = steps ?? info.defaults.steps;
  find("guidance_scale").value = guidance ?? info.defaults.guidance ?? 1;
  options(find("precision"), precisions, precision);
  show(find("precision").closest(".field"), precisions.length > 1);
  show(find("model-fields"), info.models.length > 1 || precisions.length > 1);
}

function blank() {
  for (const name of TEXTS) if (find(name).tagName !== "SELECT") find(name).value = "";
  for (const name of ["sampler", "schedule"]) find(name).selectedIndex = 0;
  find("count").value = 1;
  find("strength").value = 0.75;
  find("mask_blur").value = 4;
  setSize(info.defaults.width, info.defaults.height);
  setLoras([]);
  modelDefaults();
}

function reset() {
  blank();
  restoreSources({ mode: "edit" });
  clearErrors();
  showSeed();
  store();
  find("prompt").focus();
}

function store() {
  const fields = Object.fromEntries([...TEXTS, ...NUMBERS].map((name) => [name, find(name).value]));
  stored = {
    fields,
    size: { preset: preset(), width: find("width").value, height: find("height").value },
    loras: loras(),
    sources: storedSources(),
    more: find("more").open,
  };
  localStorage.setItem(STORED, JSON.stringify(stored));
}

/** Set a field; a choice that this server does not offer is not made. */
function put(name, value) {
  const element = find(name);
  if (!element || value === undefined || value === null) return;
  if (element.tagName !== "SELECT" || [...element.options].some((option) => option.value === value)) element.value = value;
}

function restore() {
  blank();
  try {
    stored = JSON.parse(localStorage.getItem(STORED)) ?? {};
  } catch {
    stored = {};
  }
  put("model", stored.fields?.model);
  modelDefaults();
  for (const [name, value] of Object.entries(stored.fields ?? {})) put(name, value);
  const { size: sides, loras: wanted = [], sources: pictures = {}, more = false } = stored;
  if (sides?.width) setSize(sides.width, sides.height);
  setLoras(wanted);
  restoreSources(pictures);
  if (sides?.preset === "input" && pictures.input) offerInputSize(true);
  find("more").open = more;
  find("more").ontoggle = store;
  showSeed();
}

function clearErrors() {
  for (const name of ERRORS) fieldError(name, null);
}

function whole(name, low, high) {
  const value = find(name).valueAsNumber;
  return Number.isInteger(value) && value >= low && value <= high ? null : ["badNumber", { low, high }];
}

/** Return the values of a request, or null after showing what is wrong with the form. */
function checked() {
  clearErrors();
  const sides = size();
  const seed = find("seed").value.trim();
  const errors = sizeErrors(sides, info.limits);
  if (!find("prompt").value.trim()) errors.prompt = ["emptyPrompt"];
  if (seed && !(/^\d+$/.test(seed) && BigInt(seed) <= LARGEST_SEED)) errors.seed = ["badSeed"];
  errors.steps ??= whole("steps", field("steps").minimum ?? 1, field("steps").maximum ?? 1000);
  errors.count ??= whole("count", 1, info.limits.max_count ?? 16);
  const guidance = find("guidance_scale").valueAsNumber;
  const { minimum: low = 1, maximum: high = 100 } = field("guidance");
  if (!(guidance >= low && guidance <= high)) errors.guidance_scale = ["badNumberAny", { low, high }];
  if (showErrors(errors)) return null;
  return values(sides, seed);
}

/** Show errors by field; returns whether there are any. */
function showErrors(errors) {
  const wrong = Object.entries(errors).filter(([, error]) => error);
  for (const [name, error] of wrong) fieldError(name, error);
  const first = ERRORS.find((name) => errors[name]);
  if (first) {
    find(first)?.closest("details")?.setAttribute("open", "");
    find(first)?.focus();
  }
  return wrong.length > 0;
}

function values(sides, seed) {
  const request = { prompt: find("prompt").value.trim(), ...sides, ...sources() };
  if (seed) request.seed = seed;
  request.guidance = find("guidance_scale").valueAsNumber;
  for (const name of ["steps", "count"]) request[name] = find(name).valueAsNumber;
  for (const name of ["model", "precision", "sampler", "schedule", "negative_prompt"]) {
    if (find(name).value) request[name] = find(name).value;
  }
  if (loras().length) request.lora = loras();
  return request;
}

/** Show the server's complaint at the field that it is about. */
export function refuse(error) {
  const name = error.field === "guidance" ? "guidance_scale" : (error.field ?? "");
  if (!ERRORS.includes(name) || !fieldError(name, error.message)) fieldError("form", error.message);
  else {
    find(name)?.closest("details")?.setAttribute("open", "");
    find(name)?.focus();
  }
}

/**
 * Fill in the parameters of a picture or a job, as the server lists them or as they lie in a file.
 *
 * Returns the names of LoRAs that this server lacks.
 */
export function fill(parameters) {
  clearErrors();
  put("model", parameters.model);
  modelDefaults();
  find("negative_prompt").value = "";
  const given = { ...parameters, guidance_scale: parameters.guidance_scale ?? parameters.guidance };
  for (const name of [...TEXTS, "steps", "guidance_scale", "strength", "mask_blur"]) put(name, given[name]);
  find("count").value = 1;
  if (parameters.width && parameters.height) setSize(parameters.width, parameters.height);
  const lacking = setLoras(parameters.lora ?? filedLoras(parameters));
  showSeed();
  store();
  return lacking;
}

/** The LoRAs of a picture's metadata: its file names lack folders, the server's names may lack the ending. */
function filedLoras({ lora_files: files, lora_scales: scales }) {
  if (!Array.isArray(files) || !Array.isArray(scales)) return [];
  const bare = (name) => name.replace(/\.safetensors$/, "");
  const names = info.loras ?? [];
  return files.map(String).map((file, i) => {
    const name = names.find((other) => bare(other) === bare(file)) ?? file;
    return { name, scale: Number(scales[i] ?? 1) };
  });
}

/** The word for a parameter's name; its name itself where there is none. */
export const parameterWord = (name) => (known(`parameter_${name}`) ? `parameter_${name}` : null);
