// Short messages: for the eyes at the edge of the page, for screen readers in a live region.

import { find, make } from "./dom.js";
import { say, sayText } from "./words.js";

const SECONDS = 8;
let timer = null;

/** Read a word out, without showing it. */
export function speak(key, values) {
  say(find("said"), key, values);
}

/**
 * Show a message; `actions` are [word, function] pairs for buttons in it.
 *
 * `detail` is what the server said, in English.
 */
export function notify(key, values = {}, { detail = "", actions = [], kind = "info" } = {}) {
  const text = make("p", { word: [key, values] });
  const message = make("div", { className: "notice", data: { kind } }, text);
  if (detail) text.after(make("p", { className: "hint", lang: "en", textContent: detail }));
  const close = () => message.remove();
  const buttons = actions.map(([name, act]) =>
    make("button", { type: "button", word: name, onclick: () => (close(), act()) }),
  );
  message.append(...buttons, make("button", { type: "button", className: "icon quiet", label: "close", textContent: "✕", onclick: close }));
  message.setAttribute("role", kind === "error" ? "alert" : "status");
  find("notices").replaceChildren(message);
  clearTimeout(timer);
  if (kind !== "error") timer = setTimeout(close, SECONDS * 1000);
}

/** Tell what went wrong with a request. */
export function tell(error) {
  if (error.status === 0) notify("unreachable", {}, { kind: "error" });
  else if (error.status === 429) notify("busy", {}, { kind: "error", detail: error.message });
  else notify("wentWrong", {}, { kind: "error", detail: error.message });
}

/** Tell what went wrong with a request that the page made by itself: that the server is gone is told when it is lost. */
export function tellUnlessGone(error) {
  if (error.status !== 0) tell(error);
}

/** Ask whether to do something that can't be undone. */
export function confirmed(key) {
  const dialog = find("confirm-dialog");
  say(find("confirm-text"), key);
  dialog.showModal();
  return new Promise((resolve) => {
    const answer = (yes) => () => {
      dialog.close();
      resolve(yes);
    };
    find("confirm-no").onclick = answer(false);
    find("confirm-yes").onclick = answer(true);
    // Not "close", which may still come from the question before.
    dialog.oncancel = answer(false);
  });
}

/** Show or hide the message below a field: null, [word, values], or a text of the server's. */
export function fieldError(name, message) {
  const place = find(`error-${name}`);
  if (!place) return false;
  const field = find(name)?.matches("input, select, textarea") ? find(name) : null;
  place.hidden = !message;
  if (typeof message === "string") sayText(place, message, "en");
  else if (message) say(place, ...message);
  if (field) {
    field.setAttribute("aria-invalid", message ? "true" : "false");
    if (message) field.setAttribute("aria-describedby", place.id);
    else field.removeAttribute("aria-describedby");
  }
  return true;
}
