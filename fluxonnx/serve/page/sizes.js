// The sizes of pictures: presets by ratio, a free one, or that of the input picture.

import { find, make, show } from "./dom.js";

const RATIOS = ["1:1", "4:3", "3:2", "16:9", "3:4", "2:3", "9:16"];
const FREE = "free";
const INPUT = "input";

let presets = new Map();
let multiple = 16;

/** The size of a ratio that has about as many pixels as the model's own size. */
function sized(ratio, { width, height }, low) {
  const [across, down] = ratio.split(":").map(Number);
  const scale = Math.sqrt((width * height) / (across * down));
  return [across, down].map((side) => Math.max(low, Math.round((side * scale) / multiple) * multiple));
}

function chip(value, { word, text, across = 1, down = 1 }) {
  const shape = make("span", { className: "ratio" });
  shape.setAttribute("aria-hidden", "true");
  shape.style.setProperty("--across", across / Math.max(across, down));
  shape.style.setProperty("--down", down / Math.max(across, down));
  const name = word ? make("span", { word }) : make("span", { textContent: text });
  const radio = make("input", { type: "radio", name: "preset", value });
  return make("label", { className: "chip", data: { preset: value } }, radio, shape, name);
}

const radio = (value) => find("presets").querySelector(`input[value="${value}"]`);

/** Choose the preset that has the size in the two fields. */
function match() {
  const size = `${find("width").value}x${find("height").value}`;
  const found = [...presets].find(([, sides]) => sides.join("x") === size);
  radio(found ? found[0] : FREE).checked = true;
  apply();
}

function apply() {
  const chosen = preset();
  if (presets.has(chosen)) [find("width").value, find("height").value] = presets.get(chosen);
  show(find("sides"), chosen !== INPUT);
}

export const preset = () => find("presets").querySelector("input:checked")?.value ?? FREE;

export function startSizes(info) {
  multiple = info.limits.multiple ?? 16;
  const low = info.limits.min_side;
  presets = new Map(RATIOS.map((ratio) => [ratio, sized(ratio, info.defaults, low)]));
  // Ratios of a small model may round to the same size.
  for (const [ratio, sides] of presets) {
    if ([...presets.values()].find((other) => other.join() === sides.join()) !== sides) presets.delete(ratio);
  }
  find("presets").replaceChildren(
    chip(INPUT, { word: "sizeInput" }),
    ...[...presets.keys()].map((ratio) => {
      const [across, down] = ratio.split(":").map(Number);
      return chip(ratio, { text: ratio, across, down });
    }),
    chip(FREE, { word: "sizeFree" }),
  );
  for (const name of ["width", "height"]) {
    Object.assign(find(name), { min: low, max: info.limits.max_side, step: multiple });
    find(name).oninput = match;
  }
  find("presets").onchange = apply;
  find("swap").onclick = () => {
    [find("width").value, find("height").value] = [find("height").value, find("width").value];
    match();
    find("width").dispatchEvent(new Event("input", { bubbles: true }));
  };
  setSize(info.defaults.width, info.defaults.height);
  offerInputSize(false);
}

export function setSize(width, height) {
  find("width").value = width;
  find("height").value = height;
  match();
}

/** Offer the size of the input picture while there is one, and choose it when there is a new one. */
export function offerInputSize(offered, chosen = offered) {
  const label = radio(INPUT).closest("label");
  show(label, offered);
  if (offered && chosen) radio(INPUT).checked = true;
  else if (preset() === INPUT) match();
  apply();
}

/** Return { width, height }, or nothing where the size is the input picture's. */
export function size() {
  return preset() === INPUT ? {} : { width: find("width").valueAsNumber, height: find("height").valueAsNumber };
}

/** Return what is wrong with a size, by field. */
export function sizeErrors({ width, height }, limits) {
  const errors = {};
  if (width === undefined) return errors;
  for (const [name, value] of Object.entries({ width, height })) {
    if (!Number.isInteger(value) || value % multiple || value < limits.min_side || value > limits.max_side) {
      errors[name] = [name === "width" ? "badWidth" : "badHeight", { multiple, low: limits.min_side, high: limits.max_side }];
    }
  }
  if (!errors.width && !errors.height && width * height > limits.max_pixels) {
    errors.width = ["tooManyPixels", { megapixels: Math.round(limits.max_pixels / 1e5) / 10 }];
  }
  return errors;
}
