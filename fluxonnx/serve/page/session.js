// The key of a server that asks for one.

import * as api from "./api.js";
import { find, show } from "./dom.js";
import { fieldError } from "./notices.js";

let asking = null;

/** Ask for the key until the server takes one; several requests that need it wait for the same dialog. */
function ask() {
  asking ??= new Promise((resolve) => {
    const dialog = find("key-dialog");
    const input = find("key");
    dialog.oncancel = (event) => event.preventDefault(); // without a key there is nothing to see
    find("key-form").onsubmit = async (event) => {
      event.preventDefault();
      fieldError("key", null);
      try {
        await api.signIn(input.value);
      } catch (error) {
        fieldError("key", error.status === 401 || error.status === 403 ? ["keyWrong"] : error.status === 0 ? ["unreachable"] : error.message);
        input.select();
        return;
      }
      input.value = "";
      dialog.close();
      asking = null;
      resolve();
    };
    dialog.showModal();
    input.focus();
  });
  return asking;
}

export function startSession() {
  api.onKeyNeeded(ask);
  find("sign-out").onclick = async () => {
    await api.signOut().catch(() => {});
    location.reload();
  };
}

export function showSession(info) {
  show(find("sign-out"), Boolean(info.auth_required));
}
