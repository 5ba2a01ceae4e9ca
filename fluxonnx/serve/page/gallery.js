// The pictures that the server keeps, newest first.

import * as api from "./api.js";
import { find, make, show } from "./dom.js";
import { confirmed, tell } from "./notices.js";

const PAGE = 40;
const MOST = 500; // of one answer of the server
const STORED = "fluxonnx.picture";

let pictures = [];
// Ids that an answer may still list, if it is older than the deletion.
const deleted = new Set();
let chosen = sessionStorage.getItem(STORED);
let onChoose = () => {};
let older = null; // what to ask for next, or null at the end

export const picture = (id) => pictures.find((item) => item.id === id);
export const newest = () => pictures[0];
export const chosenId = () => chosen;

export function startGallery(choose) {
  onChoose = choose;
  find("gallery-more").onclick = () => more().catch(tell);
  find("pictures").addEventListener("keydown", keyboard);
}

/** Ask for the newest pictures; those that are gone on the server are gone here. */
export async function refresh() {
  const size = Math.min(MOST, Math.max(PAGE, pictures.length));
  const answer = await api.pictures(size);
  take(answer, size, []);
}

async function more() {
  take(await api.pictures(PAGE, older), PAGE, pictures);
}

function take(answer, size, before) {
  const ids = new Set(before.map(({ id }) => id));
  pictures = [...before, ...answer.pictures.filter(({ id }) => !ids.has(id) && !deleted.has(id))];
  older = answer.pictures.length < size ? null : (answer.next ?? answer.pictures.at(-1)?.id);
  draw();
}

function draw() {
  const list = find("pictures");
  const focused = list.contains(document.activeElement) ? document.activeElement.dataset.id : null;
  const there = new Map([...list.children].map((item) => [item.dataset.id, item]));
  list.replaceChildren(...pictures.map((item) => there.get(item.id) ?? entry(item)));
  show(find("gallery-empty"), pictures.length === 0);
  show(find("gallery-hint"), pictures.length > 1);
  show(find("gallery-more"), older !== null);
  mark();
  if (focused) (button(focused) ?? list.querySelector("button"))?.focus();
}

function entry(item) {
  const image = make("img", { src: api.thumbnailUrl(item.id), alt: item.parameters?.prompt ?? item.id, loading: "lazy" });
  const face = make("button", { type: "button", data: { id: item.id }, onclick: () => choose(item.id) }, image);
  face.draggable = true;
  face.ondragstart = (event) => event.dataTransfer.setData("application/x-fluxonnx-picture", item.id);
  return make("li", { data: { id: item.id } }, face);
}

const button = (id) => find("pictures").querySelector(`button[data-id="${CSS.escape(id)}"]`);

/** One picture can be reached with Tab; arrows lead to the others. */
function mark() {
  const current = picture(chosen)?.id ?? pictures[0]?.id;
  for (const face of find("pictures").querySelectorAll("button")) {
    face.tabIndex = face.dataset.id === current ? 0 : -1;
    if (face.dataset.id === chosen) face.setAttribute("aria-current", "true");
    else face.removeAttribute("aria-current");
  }
}

/** Show a picture large. */
export function choose(id) {
  setChosen(id);
  onChoose(picture(id));
}

export function setChosen(id) {
  chosen = id;
  if (id) sessionStorage.setItem(STORED, id);
  else sessionStorage.removeItem(STORED);
  mark();
}

/** The picture above or below: the one whose middle is nearest in that row. */
function vertical(faces, index, down) {
  const box = faces[index].getBoundingClientRect();
  const middle = box.left + box.width / 2;
  const boxes = faces.map((face) => face.getBoundingClientRect());
  const rows = boxes.map(({ top }) => top).filter((top) => (down ? top > box.top + 1 : top < box.top - 1));
  if (!rows.length) return index;
  const row = down ? Math.min(...rows) : Math.max(...rows);
  const distance = (i) => (Math.abs(boxes[i].top - row) < 1 ? Math.abs(boxes[i].left + boxes[i].width / 2 - middle) : Infinity);
  return faces.reduce((best, _, i) => (distance(i) < distance(best) ? i : best), faces.findIndex((_, i) => distance(i) < Infinity));
}

function keyboard(event) {
  const faces = [...find("pictures").querySelectorAll("button")];
  const index = faces.indexOf(document.activeElement);
  if (index < 0 || event.ctrlKey || event.metaKey || event.altKey) return;
  const targets = {
    ArrowLeft: () => index - 1,
    ArrowRight: () => index + 1,
    ArrowUp: () => vertical(faces, index, false),
    ArrowDown: () => vertical(faces, index, true),
    Home: () => 0,
    End: () => faces.length - 1,
  };
  if (event.key === "Delete") remove(faces[index].dataset.id);
  else if (event.key in targets) {
    const face = faces[Math.min(faces.length - 1, Math.max(0, targets[event.key]()))];
    face.focus();
    choose(face.dataset.id);
  } else return;
  event.preventDefault();
}

/** Delete a picture, after asking; its neighbour takes its place. */
export async function remove(id) {
  if (!(await confirmed("confirmDelete"))) return;
  try {
    await api.deletePicture(id);
  } catch (error) {
    if (error.status !== 404) return tell(error);
  }
  deleted.add(id);
  const index = pictures.findIndex((item) => item.id === id);
  const focused = button(id) === document.activeElement;
  pictures = pictures.filter((item) => item.id !== id);
  const next = pictures[Math.min(index, pictures.length - 1)];
  draw();
  if (chosen === id) {
    setChosen(next?.id ?? null);
    onChoose(next ?? null);
  }
  if (focused && next) button(next.id).focus();
  return undefined;
}
