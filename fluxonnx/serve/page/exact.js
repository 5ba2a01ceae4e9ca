// JSON with whole numbers of any length. Seeds go up to 2^64 - 1, and a number of JavaScript is exact up to 2^53 only.

const TOKENS = /"[^"\\]*(?:\\.[^"\\]*)*"|-?\d+(?:\.\d+)?(?:[eE][+-]?\d+)?/g;

/** Parse JSON; whole numbers that are not exact in JavaScript become strings of digits. */
export function parse(text) {
  const exact = text.replace(TOKENS, (token) =>
    /^-?\d{16,}$/.test(token) && !Number.isSafeInteger(Number(token)) ? `"${token}"` : token,
  );
  return JSON.parse(exact);
}

/** Write JSON in which `seed` is a number, also where it is held as digits. */
export function write(value) {
  // Inside of a string the quotes of such a text would have backslashes.
  return JSON.stringify(value).replace(/"seed":"(\d+)"/g, '"seed":$1');
}
