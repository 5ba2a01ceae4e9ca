// A picture beside what it was made from: a line that is moved over both.

import { make } from "./dom.js";

/** Return the elements that show a picture, with a line between it and `before` if that is given. */
export function comparison({ url, before, text }) {
  const after = make("img", { className: "whole", src: url, alt: text });
  if (!before) return [after];
  const old = make("img", { className: "whole before", src: before, alt: "", draggable: false });
  const line = make("div", { className: "line" });
  const slider = make("input", {
    type: "range",
    min: 0,
    max: 100,
    value: 50,
    className: "over",
    label: "compareSlider",
    oninput: place,
  });
  function place() {
    for (const element of [old, line]) element.style.setProperty("--cut", `${slider.value}%`);
  }
  place();
  const tags = [make("span", { className: "tag left", word: "before" }), make("span", { className: "tag right", word: "after" })];
  // An input that the server no longer has can't be compared with.
  old.onerror = () => [old, line, slider, ...tags].forEach((element) => element.remove());
  return [after, old, line, ...tags, slider];
}
