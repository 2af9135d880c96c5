// From which of EXIF's orientations, 1 to 8, a picture file has to be turned upright: as deploy/core/image.py reads it,
// in EXIF, or in XMP where EXIF has none. JPEG, PNG and WebP; 1 for every other file.

// bytes: Uint8Array of the whole file.
export function orientationOf(bytes) {
  const { exif, xmp } = bytes[0] === 0xff ? jpegBlocks(bytes) : bytes[0] === 0x89 ? pngBlocks(bytes)
    : text(bytes, 0, 4) === "RIFF" && text(bytes, 8, 4) === "WEBP" ? webpBlocks(bytes) : {};
  const found = exif && fromExif(exif);
  if (found !== undefined) return found >= 1 && found <= 8 ? found : 1;
  const [, , digit] = (xmp && text(xmp, 0, xmp.length).match(/tiff:Orientation(="|>)([0-9])/)) || [];
  return digit >= 1 && digit <= 8 ? Number(digit) : 1;
}

// pixels: { width, height, data: RGBA }, turned upright from orientation `turn`.
export function turned({ width, height, data }, turn) {
  if (turn === 1) return { width, height, data };
  const [wide, high] = turn >= 5 ? [height, width] : [width, height];
  const from = new Uint32Array(data.buffer);
  const to = new Uint32Array(wide * high);
  const [right, down] = { 2: [-1, 1], 3: [-1, -1], 4: [1, -1], 5: [1, 1], 6: [-1, 1], 7: [-1, -1], 8: [1, -1] }[turn];
  for (let y = 0; y < high; y++) {
    const b = down > 0 ? y : high - 1 - y;
    for (let x = 0; x < wide; x++) {
      const a = right > 0 ? x : wide - 1 - x;
      to[y * wide + x] = turn >= 5 ? from[a * width + b] : from[b * width + a];
    }
  }
  return { width: wide, height: high, data: new Uint8ClampedArray(to.buffer) };
}

// ---- details

const view = (bytes) => new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
const text = (bytes, from, length) => new TextDecoder("latin1").decode(bytes.subarray(from, from + length));

// The tag 0x0112 of the first directory of a TIFF header; undefined: there is none, or the block is broken.
function fromExif(exif) {
  try {
    const data = view(exif);
    const little = data.getUint16(0) === 0x4949;
    const start = data.getUint32(4, little);
    for (let entry = 0; entry < data.getUint16(start, little); entry++) {
      const at = start + 2 + 12 * entry;
      if (data.getUint16(at, little) !== 0x0112) continue;
      const read = { 1: "getUint8", 3: "getUint16", 4: "getUint32" }[data.getUint16(at + 2, little)];
      return read && data.getUint32(at + 4, little) === 1 ? data[read](at + 8, little) : 1;
    }
  } catch (error) {
    if (!(error instanceof RangeError)) throw error;
  }
  return undefined;
}

function jpegBlocks(bytes) {
  const found = {};
  const data = view(bytes);
  for (let at = 2; at + 4 <= bytes.length && bytes[at] === 0xff;) {
    const kind = bytes[at + 1];
    if (kind === 0xff) { at += 1; continue; } // filling
    if (kind === 0xda || kind === 0xd9) break; // pixels, end
    const block = bytes.subarray(at + 4, at + 2 + data.getUint16(at + 2));
    if (kind === 0xe1 && text(block, 0, 6) === "Exif\0\0") found.exif ??= block.subarray(6);
    else if (kind === 0xe1 && text(block, 0, 29) === "http://ns.adobe.com/xap/1.0/\0") found.xmp = block.subarray(29);
    at += 2 + data.getUint16(at + 2);
  }
  return found;
}

function pngBlocks(bytes) {
  const found = {};
  const data = view(bytes);
  for (let at = 8; at + 12 <= bytes.length;) {
    const length = data.getUint32(at);
    const kind = text(bytes, at + 4, 4);
    const block = bytes.subarray(at + 8, at + 8 + length);
    if (kind === "eXIf") found.exif = block;
    else if (kind === "iTXt" && text(block, 0, 18) === "XML:com.adobe.xmp\0") found.xmp = block.subarray(18);
    at += 12 + length;
  }
  return found;
}

function webpBlocks(bytes) {
  const found = {};
  const data = view(bytes);
  for (let at = 12; at + 8 <= bytes.length;) {
    const length = data.getUint32(at + 4, true);
    const kind = text(bytes, at, 4);
    const block = bytes.subarray(at + 8, at + 8 + length);
    if (kind === "EXIF") found.exif = text(block, 0, 6) === "Exif\0\0" ? block.subarray(6) : block;
    else if (kind === "XMP ") found.xmp = block;
    at += 8 + length + (length % 2);
  }
  return found;
}
