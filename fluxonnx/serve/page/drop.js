// Pictures that are dropped or pasted. A dropped picture can be the input, a reference, or give its parameters.

import { find, show } from "./dom.js";

const OURS = "application/x-fluxonnx-picture";

/** What a drag carries: a file from outside or a picture of the gallery; null for anything else, such as text. */
function carried(transfer) {
  const types = [...transfer.types];
  return types.includes(OURS) ? "picture" : types.includes("Files") ? "files" : null;
}

/**
 * Take what is dropped anywhere on the page.
 *
 * `take(zone, { files, picture })` gets the zone, which is null outside of the three.
 */
export function startDrop(take) {
  const zones = find("drop-zones");
  let depth = 0;

  const leave = () => {
    depth = 0;
    show(zones, false);
    light(null);
  };
  const light = (zone) => {
    for (const other of zones.children) other.classList.toggle("over", other === zone);
  };
  const zoneAt = (event) => event.target.closest?.("[data-zone]") ?? null;

  addEventListener("dragenter", (event) => {
    if (!carried(event.dataTransfer) || document.querySelector("dialog[open]")) return;
    event.preventDefault();
    depth += 1;
    show(zones);
  });
  addEventListener("dragover", (event) => {
    if (!carried(event.dataTransfer)) return;
    event.preventDefault();
    event.dataTransfer.dropEffect = document.querySelector("dialog[open]") ? "none" : "copy";
    light(zoneAt(event));
  });
  addEventListener("dragleave", (event) => {
    if (!carried(event.dataTransfer)) return;
    depth -= 1;
    if (depth <= 0) leave();
  });
  addEventListener("dragend", leave);
  addEventListener("drop", (event) => {
    const kind = carried(event.dataTransfer);
    if (!kind) return;
    event.preventDefault();
    const zone = zoneAt(event)?.dataset.zone ?? null;
    leave();
    if (document.querySelector("dialog[open]")) return;
    if (kind === "picture") take(zone, { files: [], picture: event.dataTransfer.getData(OURS) });
    else take(zone, { files: [...event.dataTransfer.files], picture: null });
  });
  addEventListener("paste", (event) => {
    const files = [...(event.clipboardData?.files ?? [])].filter((file) => file.type.startsWith("image/"));
    if (!files.length || document.querySelector("dialog[open]")) return;
    event.preventDefault();
    take(null, { files, picture: null });
  });
}
