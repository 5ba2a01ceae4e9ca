// The server's events, and what happens when the connection is lost: it is tried again until the server is back.

import * as api from "./api.js";
import { parse } from "./exact.js";

// Milliseconds until the next try; the last one is for all that follow.
const DELAYS = [500, 1000, 2000, 3000];

/**
 * Listen for ever.
 *
 * `onOpen()` is called at each connection: what happened in between has to be asked for. `onLost()` is called when a
 * connection breaks. `on` has a function for each kind of event.
 */
export function listen({ onOpen, onLost, on }) {
  let source = null;
  let timer = null;
  let failures = 0;

  const open = async () => {
    timer = null;
    try {
      // Events can't ask for a key, and don't say with which status they failed.
      await api.info();
    } catch {
      return lost();
    }
    source = new EventSource("events");
    source.onopen = () => {
      failures = 0;
      onOpen();
    };
    source.onerror = lost;
    for (const [name, act] of Object.entries(on)) {
      source.addEventListener(name, (event) => act(parse(event.data)));
    }
    return undefined;
  };

  const lost = () => {
    source?.close();
    source = null;
    onLost();
    timer ??= setTimeout(open, DELAYS[Math.min(failures, DELAYS.length - 1)]);
    failures += 1;
  };

  // A laptop that wakes up, a network that is back: no need to wait for the next try.
  addEventListener("online", () => {
    if (timer !== null) {
      clearTimeout(timer);
      open();
    }
  });
  open();
}
