// LoRA files with their scales.

import { find, make, show } from "./dom.js";

const FIRST_SCALE = 1;
let names = [];
let changed = () => {};

export function startLoras(info, onChange) {
  names = info.loras ?? [];
  changed = onChange;
  show(find("lora-field"), names.length > 0);
  find("lora-add").replaceChildren(
    make("option", { value: "", word: "addLora" }),
    ...names.map((name) => make("option", { value: name, textContent: name })),
  );
  find("lora-add").onchange = (event) => {
    event.stopPropagation();
    add(find("lora-add").value, FIRST_SCALE);
    find("lora-add").value = "";
    changed();
  };
}

function add(name, scale) {
  if (!names.includes(name)) return false;
  const value = make("output", { textContent: scale });
  const slider = make("input", {
    type: "range",
    min: Math.min(-2, scale),
    max: Math.max(2, scale),
    step: 0.05,
    value: scale,
    label: ["loraScale", { name }],
    oninput: () => (value.textContent = slider.value),
  });
  const remove = make("button", {
    type: "button",
    className: "icon quiet",
    label: ["removeLora", { name }],
    textContent: "✕",
    onclick: () => {
      row.remove();
      changed();
    },
  });
  const row = make("li", { data: { name } }, make("span", { className: "name", textContent: name }), slider, value, remove);
  find("loras").append(row);
  return true;
}

/** Return [{ name, scale }]. */
export function loras() {
  return [...find("loras").children].map((row) => ({ name: row.dataset.name, scale: row.querySelector("input").valueAsNumber }));
}

/** Show these LoRAs; returns the names of those that the server lacks. */
export function setLoras(wanted) {
  find("loras").replaceChildren();
  return wanted.filter(({ name, scale }) => !add(name, scale)).map(({ name }) => name);
}
