// What the page asks the server. Addresses are relative, so that the page works behind a proxy with a prefix.

import { parse, write } from "./exact.js";

/** What went wrong with a request: status 0 if the server can't be reached; `field` names the value at fault. */
export class ApiError extends Error {
  constructor(status, message, field = null) {
    super(message);
    this.status = status;
    this.field = field;
  }
}

const TRIES = 3;
const PAUSE = 1000; // milliseconds

let askKey = async () => {};

/** `ask()` lets the person sign in and resolves when that worked. */
export function onKeyNeeded(ask) {
  askKey = ask;
}

async function send(path, options) {
  try {
    return await fetch(path, { credentials: "same-origin", ...options });
  } catch {
    throw new ApiError(0, "the server can't be reached");
  }
}

async function failure(response) {
  const text = await response.text().catch(() => "");
  try {
    const { message, param } = parse(text).error;
    return new ApiError(response.status, message, param ?? null);
  } catch {
    return new ApiError(response.status, text.slice(0, 300) || response.statusText || `HTTP ${response.status}`);
  }
}

async function request(path, options = {}) {
  let response = await send(path, options);
  while (response.status === 401) {
    await askKey();
    response = await send(path, options);
  }
  if (!response.ok) throw await failure(response);
  return response;
}

async function json(path, options) {
  const text = await (await request(path, options)).text();
  return text ? parse(text) : null;
}

const query = (values) => {
  const given = Object.entries(values).filter(([, value]) => value !== undefined && value !== null);
  return given.length ? `?${new URLSearchParams(given)}` : "";
};

/** What the server can do. Without a key it tells only that it needs one. */
export async function info() {
  let answer = await json("info");
  while (!answer.models) {
    await askKey();
    answer = await json("info");
  }
  return answer;
}

export const jobs = (limit, before) => json(`jobs${query({ limit, before })}`);
export const job = (id) => json(`jobs/${id}`);

/** Make a job. Where no answer comes it is sent again: by its key the server knows one that it has already. */
export async function makeJob(values) {
  const headers = { "Content-Type": "application/json", "Idempotency-Key": randomKey() };
  for (let tries = 1; ; tries += 1) {
    try {
      return await json("jobs", { method: "POST", headers, body: write(values) });
    } catch (error) {
      if (error.status !== 0 || tries === TRIES) throw error;
      await new Promise((resolve) => setTimeout(resolve, PAUSE));
    }
  }
}

// `crypto.randomUUID` is there on https and localhost only.
const randomKey = () => Array.from(crypto.getRandomValues(new Uint32Array(4)), (part) => part.toString(16)).join("-");

export const cancelJob = (id) => request(`jobs/${id}`, { method: "DELETE" });
export const pictures = (limit, before) => json(`pictures${query({ limit, before })}`);
export const deletePicture = (id) => request(`pictures/${id}`, { method: "DELETE" });
export const upload = (blob) =>
  json("uploads", { method: "POST", headers: { "Content-Type": blob.type || "application/octet-stream" }, body: blob });

export const pictureUrl = (id) => `pictures/${id}`;
export const thumbnailUrl = (id) => `pictures/${id}/thumbnail`;
export const uploadUrl = (id) => `uploads/${id}`;
export const previewUrl = (id) => `jobs/${id}/preview`;

/** Sign in: the server answers with a cookie, which also goes with pictures and events. */
export async function signIn(key) {
  const response = await send("session", {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify({ key }),
  });
  if (!response.ok) throw await failure(response);
}

export const signOut = () => request("session", { method: "DELETE" });
