// Elements: found, made, shown. What they say comes from words.js.

import { say, sayAttribute } from "./words.js";

export const find = (id) => document.getElementById(id);

/**
 * Make an element.
 *
 * `word` and `label` are keys of words (see words.js), or [key, values]; every other entry is a property of the
 * element, such as `onclick` or `className`.
 */
export function make(tag, { word, label, data, ...properties } = {}, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  Object.assign(element.dataset, data);
  if (word) say(element, ...[word].flat());
  if (label) sayAttribute(element, "label", ...[label].flat());
  element.append(...children.filter((child) => child !== null && child !== undefined && child !== false));
  return element;
}

export function show(element, visible = true) {
  element.hidden = !visible;
}

/** Keep a value between two others. */
export const clamp = (value, low, high) => Math.min(high, Math.max(low, value));

/** Load a picture; rejects if it can't be loaded. */
export function loadImage(url) {
  return new Promise((resolve, reject) => {
    const image = new Image();
    image.onload = () => resolve(image);
    image.onerror = () => reject(new Error(`${url} can't be loaded`));
    image.src = url;
  });
}
