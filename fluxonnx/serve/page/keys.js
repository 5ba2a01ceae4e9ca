// Keys that work everywhere on the page. Those of the gallery and of the mask are in gallery.js and mask.js.

import { find } from "./dom.js";
import { say } from "./words.js";

/** Ctrl+Enter (on a Mac also Command+Enter) makes a picture, Escape calls `cancel()`. */
export function startKeys(cancel) {
  if (/Mac|iPhone|iPad/.test(navigator.platform)) say(find("make").querySelector("kbd"), "makeKeysMac");
  addEventListener("keydown", (event) => {
    if (document.querySelector("dialog[open]") || event.defaultPrevented || event.isComposing) return;
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
      event.preventDefault();
      if (!event.repeat) find("form").requestSubmit();
    } else if (event.key === "Escape" && event.target.tagName !== "SELECT") cancel();
  });
}
