// The brush for masks. What is painted is drawn anew; the rest of the picture stays.
//
// A mask is a list of operations, drawn again after each undo. Without a pointer, arrows move a cursor and space paints.

import { clamp, find, loadImage, show } from "./dom.js";
import { word } from "./words.js";

// In shares of the cursor's diameter.
const MOVE = 0.5;
const FINE_PIXELS = 1;
const SIZE_STEP = 4;
const COLOUR = "#fff";

let width = 0;
let height = 0;
let operations = [];
let undone = [];
let erasing = false;
let cursor = { x: 0, y: 0 };
let stroke = null;
let settle = null;

/**
 * Let a person paint a mask over a picture.
 *
 * Resolves with a PNG of the picture's size, white where it is painted and black elsewhere, or null if the person
 * cancelled. Rejects if the picture can't be loaded.
 */
export async function paintMask(pictureUrl, maskUrl) {
  const picture = await loadImage(pictureUrl);
  const mask = maskUrl ? await loadImage(maskUrl).catch(() => null) : null;
  width = picture.naturalWidth;
  height = picture.naturalHeight;
  operations = mask ? [{ kind: "mask", image: mask }] : [];
  undone = [];
  cursor = { x: width / 2, y: height / 2 };
  find("mask-picture").src = pictureUrl;
  Object.assign(find("mask-canvas"), { width, height });
  find("mask-sheet").style.setProperty("--ratio", `${width} / ${height}`);
  find("mask-sheet").style.setProperty("--width-over-height", width / height);
  setErasing(false);
  show(find("mask-cursor"), false);
  draw();
  const done = new Promise((resolve) => (settle = resolve));
  find("mask-dialog").returnValue = "";
  find("mask-dialog").showModal();
  find("mask-sheet").focus();
  return done;
}

const context = () => find("mask-canvas").getContext("2d");
const diameter = () => Math.max(1, (Number(find("mask-size").value) / 100) * Math.min(width, height));

function apply(surface, operation) {
  surface.globalCompositeOperation = "source-over";
  if (operation.kind === "clear") surface.clearRect(0, 0, width, height);
  else if (operation.kind === "invert") {
    surface.globalCompositeOperation = "xor";
    surface.fillStyle = COLOUR;
    surface.fillRect(0, 0, width, height);
  } else if (operation.kind === "mask") drawMask(surface, operation.image);
  else {
    surface.globalCompositeOperation = operation.erase ? "destination-out" : "source-over";
    Object.assign(surface, { lineWidth: operation.size, lineCap: "round", lineJoin: "round" });
    surface.strokeStyle = surface.fillStyle = COLOUR;
    surface.beginPath();
    surface.moveTo(...operation.points[0]);
    for (const point of operation.points) surface.lineTo(...point);
    surface.stroke();
    // A line to where it began has no length, and is not drawn.
    surface.beginPath();
    surface.arc(...operation.points[0], operation.size / 2, 0, 2 * Math.PI);
    surface.fill();
  }
}

/** Draw a black and white picture as a mask: its brightness becomes what is painted. */
function drawMask(surface, image) {
  surface.drawImage(image, 0, 0, width, height);
  const pixels = surface.getImageData(0, 0, width, height);
  for (let i = 0; i < pixels.data.length; i += 4) {
    pixels.data[i + 3] = pixels.data[i];
    pixels.data.fill(255, i, i + 3);
  }
  surface.putImageData(pixels, 0, 0);
}

function draw() {
  context().clearRect(0, 0, width, height);
  for (const operation of operations) apply(context(), operation);
  find("mask-undo").disabled = operations.length === 0;
  find("mask-redo").disabled = undone.length === 0;
  report();
}

/** The painted share of the picture, in percent, from a smaller copy. */
function painted() {
  const small = new OffscreenCanvas(64, 64).getContext("2d", { willReadFrequently: true });
  small.drawImage(find("mask-canvas"), 0, 0, 64, 64);
  const { data } = small.getImageData(0, 0, 64, 64);
  let sum = 0;
  for (let i = 3; i < data.length; i += 4) sum += data[i];
  return sum / (255 * 64 * 64);
}

function report(withCursor = false) {
  const share = painted();
  const percent = share > 0 && share < 0.01 ? "< 1" : Math.round(100 * share);
  const place = { x: Math.round((100 * cursor.x) / width), y: Math.round((100 * cursor.y) / height) };
  find("mask-said").textContent = word(withCursor ? "maskAt" : "maskPainted", { percent, ...place });
  find("mask-done").disabled = share === 0;
}

function add(operation) {
  operations.push(operation);
  undone = [];
  draw();
}

function undo() {
  if (operations.length) undone.push(operations.pop());
  draw();
}

function redo() {
  if (undone.length) operations.push(undone.pop());
  draw();
}

function setErasing(value) {
  erasing = value;
  find("mask-brush").setAttribute("aria-pressed", String(!erasing));
  find("mask-eraser").setAttribute("aria-pressed", String(erasing));
}

/** Move the ring that shows the brush. */
function showCursor() {
  const ring = find("mask-cursor");
  show(ring);
  ring.dataset.erasing = String(erasing);
  ring.style.setProperty("--x", `${(100 * cursor.x) / width}%`);
  ring.style.setProperty("--y", `${(100 * cursor.y) / height}%`);
  ring.style.setProperty("--size", `${(100 * diameter()) / width}%`);
}

/** Where the pointer is, in pixels of the picture. */
function place(event) {
  const box = find("mask-canvas").getBoundingClientRect();
  return [((event.clientX - box.left) / box.width) * width, ((event.clientY - box.top) / box.height) * height];
}

function pointer(event) {
  [cursor.x, cursor.y] = place(event);
  showCursor();
  if (event.type === "pointerdown" && event.button === 0) {
    find("mask-sheet").setPointerCapture(event.pointerId);
    stroke = { kind: "stroke", erase: erasing, size: diameter(), points: [place(event)] };
    apply(context(), stroke);
  } else if (event.type === "pointermove" && stroke) {
    // The browser joins moves between two frames; a fast stroke needs all of them.
    const moves = event.getCoalescedEvents?.() ?? [];
    stroke.points.push(...(moves.length ? moves : [event]).map(place));
    apply(context(), { ...stroke, points: stroke.points.slice(-moves.length - 2) });
  } else if (["pointerup", "pointercancel"].includes(event.type) && stroke) {
    add(stroke);
    stroke = null;
  }
}

function keyboard(event) {
  const moves = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
  const control = event.ctrlKey || event.metaKey;
  const key = event.key.toLowerCase();
  if (control && key === "z") (event.shiftKey ? redo : undo)();
  else if (control && key === "y") redo();
  else if (control || event.target !== find("mask-sheet")) return;
  else if (event.key in moves) {
    const far = event.altKey ? FINE_PIXELS : diameter() * MOVE;
    const from = [cursor.x, cursor.y];
    cursor.x = clamp(cursor.x + far * moves[event.key][0], 0, width);
    cursor.y = clamp(cursor.y + far * moves[event.key][1], 0, height);
    if (event.shiftKey) add({ kind: "stroke", erase: erasing, size: diameter(), points: [from, [cursor.x, cursor.y]] });
    report(true);
  } else if (key === " ") add({ kind: "stroke", erase: erasing, size: diameter(), points: [[cursor.x, cursor.y]] });
  else if (key === "b" || key === "e") setErasing(key === "e");
  else if (key === "[" || key === "]") {
    find("mask-size").value = Number(find("mask-size").value) + (key === "[" ? -SIZE_STEP : SIZE_STEP);
  } else return;
  showCursor();
  event.preventDefault();
}

/** The mask in black and white. */
function exported() {
  const sheet = new OffscreenCanvas(width, height);
  const surface = sheet.getContext("2d");
  surface.fillStyle = "#000";
  surface.fillRect(0, 0, width, height);
  surface.drawImage(find("mask-canvas"), 0, 0);
  return sheet.convertToBlob({ type: "image/png" });
}

export function startMask() {
  const dialog = find("mask-dialog");
  const sheet = find("mask-sheet");
  for (const name of ["pointerdown", "pointermove", "pointerup", "pointercancel"]) sheet.addEventListener(name, pointer);
  sheet.addEventListener("pointerleave", () => stroke || show(find("mask-cursor"), false));
  sheet.addEventListener("focus", () => sheet.matches(":focus-visible") && showCursor());
  dialog.addEventListener("keydown", keyboard);
  find("mask-brush").onclick = () => setErasing(false);
  find("mask-eraser").onclick = () => setErasing(true);
  find("mask-undo").onclick = undo;
  find("mask-redo").onclick = redo;
  find("mask-invert").onclick = () => add({ kind: "invert" });
  find("mask-clear").onclick = () => add({ kind: "clear" });
  find("mask-cancel").onclick = () => dialog.close("");
  find("mask-done").onclick = () => dialog.close("done");
  dialog.addEventListener("close", async () => settle?.(dialog.returnValue === "done" ? await exported() : null));
}
