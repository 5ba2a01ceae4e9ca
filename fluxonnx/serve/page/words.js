// What the page says, in the language of the person.
//
// An element with data-word="key" shows that word; data-word-label, -title and -placeholder set its attributes. Values
// for {placeholders} lie beside the key, in data-values, so that a change of language can say everything again.

import de from "./words-de.js";
import en from "./words-en.js";
import zh from "./words-zh.js";

export const LANGUAGES = { en, de, zh };
const TAGS = { en: "en", de: "de", zh: "zh-Hans" };
const ATTRIBUTES = { label: "aria-label", title: "title", placeholder: "placeholder" };
const STORED = "fluxonnx.language";

let current = "en";

/** Return a word; a word with forms takes the one of the language's plural rule for `values.n`. */
export function word(key, values = {}, language = current) {
  let text = LANGUAGES[language][key] ?? LANGUAGES.en[key] ?? key;
  if (typeof text === "object") text = text[new Intl.PluralRules(TAGS[language]).select(values.n)] ?? text.other;
  return text.replace(/\{(\w+)\}/g, (whole, name) => (name in values ? String(values[name]) : whole));
}

/** Whether there is a word of this key. */
export const known = (key) => key in LANGUAGES.en;

/** Show a word in an element, also after a change of language. */
export function say(element, key, values = {}) {
  element.dataset.word = key;
  element.dataset.values = JSON.stringify(values);
  element.removeAttribute("lang");
  element.textContent = word(key, values);
}

/** Show a text that has no translation: a prompt, or what the server said (in English). */
export function sayText(element, text, language = "") {
  delete element.dataset.word;
  if (language) element.lang = language;
  else element.removeAttribute("lang");
  element.textContent = text;
}

/** Set the label, the title or the placeholder of an element to a word. */
export function sayAttribute(element, name, key, values = {}) {
  element.setAttribute(`data-word-${name}`, key);
  element.dataset.values = JSON.stringify({ ...JSON.parse(element.dataset.values ?? "{}"), ...values });
  element.setAttribute(ATTRIBUTES[name], word(key, values));
}

/** Show a moment, in the way of the language. */
export function sayTime(element, moment) {
  element.dateTime = moment.toISOString();
  element.textContent = new Intl.DateTimeFormat(TAGS[current], { dateStyle: "medium", timeStyle: "short" }).format(moment);
}

function sayAll() {
  document.documentElement.lang = TAGS[current];
  const values = (element) => JSON.parse(element.dataset.values ?? "{}");
  for (const element of document.querySelectorAll("[data-word]")) {
    element.textContent = word(element.dataset.word, values(element));
  }
  for (const [name, attribute] of Object.entries(ATTRIBUTES)) {
    for (const element of document.querySelectorAll(`[data-word-${name}]`)) {
      element.setAttribute(attribute, word(element.getAttribute(`data-word-${name}`), values(element)));
    }
  }
  for (const element of document.querySelectorAll("time[datetime]")) sayTime(element, new Date(element.dateTime));
}

function setLanguage(language) {
  current = language;
  sayAll();
}

/** Say everything in the language that was chosen before, or that the browser asks for. */
export function startWords(select) {
  const wanted = [localStorage.getItem(STORED), ...navigator.languages.map((tag) => tag.slice(0, 2))];
  setLanguage(wanted.find((language) => language in LANGUAGES) ?? "en");
  select.value = current;
  select.addEventListener("change", () => {
    localStorage.setItem(STORED, select.value);
    setLanguage(select.value);
  });
}
