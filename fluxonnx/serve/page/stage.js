// The large picture: empty, growing, finished or failed.

import * as api from "./api.js";
import { comparison } from "./compare.js";
import { find, make, show } from "./dom.js";
import { parameterWord } from "./form.js";
import { errorText } from "./queue.js";
import { known, say, sayText, sayTime } from "./words.js";

const PARTS = ["empty", "job", "failed", "picture"];
const FOLLOWED = "fluxonnx.jobs";
const COMPARING = "fluxonnx.compare";
// In English, which all models of the family read best.
const EXAMPLES = ["a red circle on a blue background", "a yellow star on a black background", "a green heart on a white background"];

let following = JSON.parse(sessionStorage.getItem(FOLLOWED)) ?? []; // ids of jobs, shown one after the other
let actions = {};
let shown = null; // the picture on show

export const followed = () => following[0];
export const shownPicture = () => shown;

function setFollowing(ids) {
  following = ids;
  sessionStorage.setItem(FOLLOWED, JSON.stringify(ids));
}

/** Follow a job, after those that are followed already or, with `first`, before them. */
export function follow(id, first = false) {
  const others = following.filter((other) => other !== id);
  setFollowing(first ? [id, ...others] : [...others, id]);
}

export const unfollow = (id) => setFollowing(following.filter((other) => other !== id));
export const unfollowAll = () => setFollowing([]);

/** `act` has a function for each button: again, another, edit and so on. */
export function startStage(act) {
  actions = act;
  find("cancel-job").onclick = () => actions.cancel(followed());
  find("examples").replaceChildren(
    ...EXAMPLES.map((text) =>
      make("button", { type: "button", className: "chip", lang: "en", textContent: text, onclick: () => actions.example(text) }),
    ),
  );
}

function part(name) {
  for (const other of PARTS) show(find(`stage-${other}`), other === name);
  if (name !== "picture") shown = null;
  if (name !== "job") document.title = "fluxonnx";
}

export const showEmpty = () => part("empty");

/** Frames have the shape of their pictures before these are loaded. */
function setRatio(frame, width, height) {
  frame.style.setProperty("--ratio", `${width} / ${height}`);
  frame.style.setProperty("--ratio-number", width / height);
}

/** The word for what a job does: "load transformer" and "load text encoder" are both loading. */
function phaseWord(phase) {
  const keys = [phase.replaceAll(" ", "_"), phase.split(" ")[0]].map((name) => `phase_${name}`);
  return keys.find(known) ?? "stateRunning";
}

/** Show a job that waits or runs; its preview stays until the next one comes. */
export function showJob(job) {
  if (find("stage-job").hidden || find("stage-job").dataset.id !== job.id) {
    find("stage-job").dataset.id = job.id;
    const { width, height } = job.parameters ?? {};
    setRatio(find("stage-job").querySelector(".frame"), width ?? 1, height ?? 1);
    // Between two jobs the last picture stays, pale, until there is something of the next.
    const between = !find("stage-job").hidden && !find("preview").hidden;
    find("preview").classList.toggle("stale", between);
    show(find("preview"), between);
    show(find("preview-none"), !between);
    part("job");
    if (job.progress?.step > 0) earlierPreview(job.id);
  }
  const { step = 0, steps = 0, phase = "", pictures = 0, count = 1 } = job.progress ?? {};
  const bar = find("progress");
  if (job.state === "running" && !steps) bar.removeAttribute("value");
  else bar.value = steps ? step / steps : 0;
  const text = find("progress-text");
  if (job.state === "queued") say(text, job.position > 0 ? "statePosition" : "stateQueued", { n: job.position });
  else if (step > 0 && step < steps) say(text, "stepOf", { step, steps });
  else say(text, phaseWord(phase));
  show(find("progress-count"), count > 1);
  if (count > 1) say(find("progress-count"), "pictureOf", { picture: Math.min(pictures + 1, count), count });
  find("job-prompt").textContent = job.parameters?.prompt ?? "";
  document.title = steps ? `${step}/${steps} · fluxonnx` : "… · fluxonnx";
}

/** After a reload: the newest preview that the server has. */
function earlierPreview(id) {
  const image = new Image();
  image.onload = () => find("stage-job").dataset.id === id && find("preview").hidden && showImage(image.src);
  image.src = api.previewUrl(id);
}

function showImage(url) {
  find("preview").src = url;
  find("preview").classList.remove("stale");
  show(find("preview"), true);
  show(find("preview-none"), false);
}

export function showPreview({ job, image }) {
  if (job === followed() && !find("stage-job").hidden) showImage(image);
}

export const showsFailure = () => !find("stage-failed").hidden;

export function showFailed(job) {
  part("failed");
  sayText(find("failed-text"), errorText(job), "en");
  find("failed-retry").onclick = () => actions.retry(job);
}

/** Show a picture of the gallery; what it was made from follows when the server has told it. */
export async function showPicture(picture) {
  part("picture");
  shown = picture;
  find("stage-picture").dataset.id = picture.id;
  let recipe = picture.parameters ?? {};
  drawPicture(recipe);
  find("picture-prompt").textContent = recipe.prompt ?? "";
  const { seed, width, height } = picture;
  say(find("picture-facts"), "facts", { width, height, seed, n: recipe.steps ?? 0 });
  show(find("picture-warnings"), false);
  const [told, warnings] = await actions.recipe(picture);
  if (shown !== picture) return;
  recipe = told;
  find("picture-warnings").textContent = warnings.join("\n");
  show(find("picture-warnings"), warnings.length > 0);
  if (recipe.input) drawPicture(recipe);
  else drawButtons(recipe);
  find("picture-parameters").replaceChildren(...facts(picture, recipe));
}

function drawPicture(recipe) {
  const { id, width, height } = shown;
  const frame = find("compare");
  const compare = recipe.input && localStorage.getItem(COMPARING) !== "no";
  setRatio(frame, width, height);
  const before = compare ? actions.sourceUrl(recipe.input) : null;
  frame.replaceChildren(...comparison({ url: api.pictureUrl(id), before, text: recipe.prompt ?? "" }));
  drawButtons(recipe);
}

function drawButtons(recipe) {
  const picture = shown;
  const button = (word, act, className = "") => make("button", { type: "button", word, className, onclick: () => act(picture) });
  const toggle = make("button", {
    type: "button",
    word: "compare",
    onclick: () => {
      localStorage.setItem(COMPARING, localStorage.getItem(COMPARING) === "no" ? "yes" : "no");
      drawPicture(recipe);
      find("picture-actions").querySelector("[aria-pressed]").focus();
    },
  });
  toggle.setAttribute("aria-pressed", String(localStorage.getItem(COMPARING) !== "no"));
  const download = make("a", { className: "button", word: "download", href: api.pictureUrl(picture.id), download: `${picture.id}.png` });
  const row = find("picture-actions");
  const focused = row.contains(document.activeElement) ? document.activeElement.dataset.word : null;
  row.replaceChildren(
    button("again", actions.again),
    button("anotherSeed", actions.another),
    button("editThis", actions.edit),
    button("asReference", actions.reference),
    button("useParameters", actions.fill),
    ...(recipe.input ? [toggle] : []),
    download,
    button("delete", actions.remove, "quiet"),
  );
  if (focused) row.querySelector(`[data-word="${focused}"]`)?.focus();
}

// Parameters that are pictures; what a file says about them by names and digests is not shown as well.
const PICTURES = ["input", "mask", "references"];
const HIDDEN = /^prompt$|^count$|_sha256$|^(image|mask)_file$|^reference_files$|^lora_(files|scales)$|^guidance$/;

function facts({ parameters = {}, seed, width, height, created }, recipe) {
  const rows = { ...parameters, ...recipe, guidance_scale: parameters.guidance_scale ?? recipe.guidance, seed, width, height };
  const listed = Object.entries(rows)
    .filter(([name, value]) => !HIDDEN.test(name) && value !== undefined && value !== null && value !== "" && String(value) !== "")
    .flatMap(([name, value]) => [
      make("dt", parameterWord(name) ? { word: parameterWord(name) } : { textContent: name, lang: "en" }),
      PICTURES.includes(name) ? small([value].flat()) : make("dd", { textContent: text(value) }),
    ]);
  if (!created) return listed;
  const moment = make("time");
  sayTime(moment, new Date(created * 1000));
  return [...listed, make("dt", { word: "parameter_created" }), make("dd", {}, moment)];
}

function small(ids) {
  const images = ids.map((id) => make("img", { src: actions.sourceUrl(id), alt: id, onerror: ({ target }) => target.replaceWith(id) }));
  return make("dd", {}, ...images);
}

function text(value) {
  if (Array.isArray(value)) return value.map(text).join(", ");
  if (value && typeof value === "object") return "name" in value ? `${value.name} × ${value.scale ?? 1}` : JSON.stringify(value);
  return String(value);
}
