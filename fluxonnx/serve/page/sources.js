// The pictures that a picture starts from: the input, its mask, and references.

import * as api from "./api.js";
import { find, make, show } from "./dom.js";
import { paintMask } from "./mask.js";
import { fieldError, tell } from "./notices.js";
import { offerInputSize } from "./sizes.js";
import { say } from "./words.js";

let input = null; // { id, url }
let mask = null; // { id, url }
let references = []; // [{ id, url }]
let most = 16;
let mostBytes = Infinity;
let changed = () => {};

export function startSources(info, onChange) {
  most = info.limits.max_references ?? most;
  mostBytes = info.limits.max_body ?? mostBytes;
  changed = onChange;
  find("input-file").onchange = async (event) => {
    event.stopPropagation();
    const [file] = event.target.files;
    event.target.value = "";
    if (file) await uploadInput(file);
  };
  find("reference-file").onchange = async (event) => {
    event.stopPropagation();
    const files = [...event.target.files];
    event.target.value = "";
    for (const file of files) await uploadReference(file);
  };
  find("paint-mask").onclick = editMask;
  find("remove-mask").onclick = () => {
    mask = null;
    draw();
  };
  for (const radio of document.querySelectorAll("input[name=mode]")) radio.addEventListener("change", showMode);
  find("strength").addEventListener("input", showStrength);
}

/** Upload a file; what is wrong with it is shown below the field. Returns the upload, or null. */
export async function uploaded(file, field) {
  fieldError(field, null);
  if (file.size > mostBytes) {
    fieldError(field, ["tooLarge", { megabytes: Math.floor(mostBytes / 2 ** 20) }]);
    return null;
  }
  try {
    return await api.upload(file);
  } catch (error) {
    if (error.status === 0) tell(error);
    else fieldError(field, error.message);
    return null;
  }
}

async function uploadInput(file) {
  const upload = await uploaded(file, "input");
  if (upload) setInput(upload.id, api.uploadUrl(upload.id));
}

async function uploadReference(file) {
  const upload = await uploaded(file, "references");
  if (upload) addReference(upload.id, api.uploadUrl(upload.id));
}

export function setInput(id, url) {
  input = { id, url };
  mask = null;
  fieldError("input", null);
  offerInputSize(true);
  draw();
}

/** The address of an upload or of a picture: ids of uploads begin with a letter that ids of pictures never have. */
export const sourceUrl = (id) => (id.startsWith("u") ? api.uploadUrl(id) : api.pictureUrl(id));

export function addReference(id, url) {
  if (references.length >= most) return fieldError("references", ["tooManyReferences", { n: most }]);
  fieldError("references", null);
  if (!references.some((other) => other.id === id)) references.push({ id, url });
  draw();
  return true;
}

function removeInput() {
  input = mask = null;
  fieldError("input", null);
  offerInputSize(false);
  draw();
  find("input-file").focus();
}

async function editMask() {
  const blob = await paintMask(input.url, mask?.url).catch((error) => (fieldError("mask", error.message), null));
  if (!blob) return;
  const upload = await uploaded(blob, "mask");
  if (upload) mask = { id: upload.id, url: api.uploadUrl(upload.id) };
  draw();
}

const mode = () => document.querySelector("input[name=mode]:checked").value;

function showStrength() {
  find("strength-value").textContent = Number(find("strength").value).toFixed(2);
}

function showMode() {
  const paint = mode() === "paint";
  say(find("mode-hint"), mask ? (paint ? "modeMaskPaintHint" : "modeMaskHint") : paint ? "modePaintHint" : "modeEditHint");
  show(find("strength-field"), paint);
  showStrength();
}

/** A small picture with a button that takes it away; one that the server no longer has takes itself away. */
function thumb({ url }, key, remove) {
  const image = make("img", { src: url, alt: "", draggable: false, onerror: remove });
  const button = make("button", { type: "button", className: "icon", label: key, textContent: "✕", onclick: remove });
  return [image, button];
}

function draw() {
  find("input-holder").replaceChildren(
    ...(input ? [make("div", { className: "thumb" }, ...thumb(input, "removeInput", removeInput), mask && maskOver())] : []),
  );
  show(find("input-add"), !input);
  show(find("input-options"), Boolean(input));
  find("references").replaceChildren(
    ...references.map((reference) =>
      make(
        "li",
        { className: "thumb" },
        ...thumb(reference, "removeReference", () => {
          references = references.filter((other) => other !== reference);
          draw();
        }),
      ),
    ),
  );
  show(find("references"), references.length > 0);
  show(find("reference-add"), references.length < most);
  say(find("paint-mask"), mask ? "changeMask" : "paintMask");
  show(find("remove-mask"), Boolean(mask));
  show(find("mask-blur-field"), Boolean(mask));
  showMode();
  changed();
}

function maskOver() {
  return make("img", { className: "mask-over", src: mask.url, alt: "", draggable: false, onerror: () => ((mask = null), draw()) });
}

/** Return what a request says about its pictures. */
export function sources() {
  const values = {};
  if (input) values.input = input.id;
  if (input && mode() === "paint") values.strength = find("strength").valueAsNumber;
  if (input && mask) Object.assign(values, { mask: mask.id, mask_blur: find("mask_blur").valueAsNumber || 0 });
  if (references.length) values.references = references.map(({ id }) => id);
  return values;
}

/** Show the pictures that the parameters of a job name. */
export function fillSources({ input: from, mask: over, references: seen = [], strength }) {
  const of = (id) => (id ? { id, url: sourceUrl(id) } : null);
  restoreSources({ input: of(from), mask: of(over), references: (seen ?? []).map(of), mode: (strength ?? null) === null ? "edit" : "paint" });
}

/** Return everything that has to be there after the page is loaded again. */
export const storedSources = () => ({ input, mask, references, mode: mode() });

export function restoreSources(stored = {}) {
  ({ input = null, mask = null, references = [] } = stored);
  const radio = document.querySelector(`input[name=mode][value="${stored.mode}"]`);
  if (radio) radio.checked = true;
  offerInputSize(Boolean(input), false);
  draw();
}
