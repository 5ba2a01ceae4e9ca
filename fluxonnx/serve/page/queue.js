// The jobs that wait or run, and those that failed while the page was open.

import * as api from "./api.js";
import { find, make, show } from "./dom.js";
import { tell } from "./notices.js";
import { say, sayText } from "./words.js";

const ACTIVE = ["queued", "running"];
const PAGE = 100;

let jobs = new Map();
// Jobs that have ended. An answer may be older than an event that came before it, and tell of them as running.
const over = new Map();
let onShow = () => {};

export const active = (job) => ACTIVE.includes(job.state);
export const all = () => [...jobs.values()];
export const get = (id) => jobs.get(id);

/** What is known of a job, which may be newer than an answer about it. */
export const latest = (job) => over.get(job.id) ?? job;

/** The job that Escape cancels: the one that runs, else the first that waits. */
export const current = () => all().find(({ state }) => state === "running") ?? waiting()[0];

const waiting = () => all().filter(({ state }) => state === "queued").sort((a, b) => a.position - b.position);

export const anyWaits = () => waiting().length > 0;

export function startQueue(shown) {
  onShow = shown;
}

/** Ask for all jobs. */
export async function refresh() {
  const answer = await api.jobs(PAGE);
  const told = answer.jobs.map(latest);
  jobs = new Map(told.filter((job) => active(job) || (job.state === "failed" && jobs.has(job.id))).map((job) => [job.id, job]));
  draw();
}

/** Take a job's new state. */
export function put(job) {
  if (!active(job)) over.set(job.id, job);
  if (active(job) || job.state === "failed") jobs.set(job.id, job);
  else jobs.delete(job.id);
  draw();
}

export async function cancel(id) {
  try {
    await api.cancelJob(id);
  } catch (error) {
    if (![404, 409].includes(error.status)) tell(error);
  }
}

function draw() {
  const shown = [...all().filter(({ state }) => state === "running"), ...waiting(), ...all().filter(({ state }) => state === "failed")];
  const list = find("queue-list");
  const there = new Map([...list.children].map((item) => [item.dataset.id, item]));
  const entries = shown.map((job) => update(there.get(job.id) ?? entry(job), job));
  // Where nothing moved, nothing is put in again: that would take the focus away.
  if (entries.length !== list.children.length || entries.some((item, i) => item !== list.children[i])) list.replaceChildren(...entries);
  show(find("queue"), shown.length > 0);
}

function entry(job) {
  const prompt = job.parameters?.prompt ?? job.id;
  const state = make("span", { className: "state" });
  const text = make("button", { type: "button", className: "link prompt-text", textContent: prompt, onclick: () => onShow(jobs.get(job.id)) });
  const stop = make("button", { type: "button", className: "quiet stop", onclick: () => act(job.id) });
  const bar = make("progress", { max: 1, value: 0, label: "progress" });
  return make("li", { data: { id: job.id } }, state, text, bar, stop);
}

function act(id) {
  if (active(jobs.get(id))) return cancel(id);
  jobs.delete(id);
  return draw();
}

function update(item, job) {
  const { step = 0, steps = 0 } = job.progress ?? {};
  item.dataset.state = job.state;
  const state = item.querySelector(".state");
  if (job.state === "running") say(state, "stateRunning");
  else if (job.state === "queued") say(state, job.position > 0 ? "statePosition" : "stateQueued", { n: job.position });
  else say(state, "stateFailed");
  const bar = item.querySelector("progress");
  show(bar, job.state === "running");
  bar.value = steps ? step / steps : 0;
  const stop = item.querySelector(".stop");
  const key = active(job) ? "cancel" : "dismiss";
  if (stop.dataset.word !== key) say(stop, key);
  if (job.state === "failed" && !item.querySelector(".error")) {
    const message = make("p", { className: "error" });
    sayText(message, errorText(job), "en");
    item.append(message);
  }
  return item;
}

/** What a failed job says, in the server's words. */
export const errorText = ({ error }) => (typeof error === "string" ? error : (error?.message ?? ""));
