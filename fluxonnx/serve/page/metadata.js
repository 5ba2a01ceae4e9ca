// What a PNG of fluxonnx says about itself: also what a job can't be told, such as the file names of its LoRAs.

const SIGNATURE = [137, 80, 78, 71, 13, 10, 26, 10];
const KEY = "fluxonnx";

/** Return the parameters in a file, or null: another program made it, or it is no PNG. */
export async function parametersOf(file) {
  try {
    const bytes = new Uint8Array(await file.arrayBuffer());
    const text = SIGNATURE.every((byte, i) => bytes[i] === byte) && findText(bytes);
    return text || null;
  } catch {
    return null; // damaged, or gone from the disk
  }
}

/** The text of the iTXt chunk with our keyword (PNG specification, 11.3.3.4), where it is not compressed. */
function findText(bytes) {
  const view = new DataView(bytes.buffer);
  const latin = new TextDecoder("latin1");
  for (let at = SIGNATURE.length; at + 12 <= bytes.length; at += 12 + view.getUint32(at)) {
    const data = bytes.subarray(at + 8, at + 8 + view.getUint32(at));
    if (latin.decode(bytes.subarray(at + 4, at + 8)) !== "iTXt") continue;
    const end = data.indexOf(0);
    if (latin.decode(data.subarray(0, end)) !== KEY || data[end + 1] !== 0) continue;
    // The language and the translated keyword follow, each with a zero behind it.
    const begin = data.indexOf(0, data.indexOf(0, end + 3) + 1) + 1;
    return new TextDecoder().decode(data.subarray(begin));
  }
  return null;
}
