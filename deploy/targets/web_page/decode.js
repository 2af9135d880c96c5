// A picture file as pixels { width, height, data: RGBA bytes }, upright, as deploy/core/image.py reads it: the bytes of
// the file without a colour profile, and of transparent pixels the colours that the file holds under them.

import { orientationOf, turned } from "./orientation.js";
import { storedPixels } from "./view.js";

const STRIP = 2 ** 22; // pixels; phones leave a larger canvas than 2^24 empty, without an error

// Raises Error with a line for people.
export async function decode(file) {
  const bytes = await file.arrayBuffer();
  let bitmap;
  try {
    bitmap = await storedPixels(bytes, { premultiplyAlpha: "none", colorSpaceConversion: "none" });
  } catch {
    throw new Error(`${file.name || "This"}: cannot be read as a picture by this browser`);
  }
  try {
    const pixels = { width: bitmap.width, height: bitmap.height, data: readPixels(bitmap) };
    return turned(pixels, orientationOf(new Uint8Array(bytes)));
  } finally {
    bitmap.close();
  }
}

// RGBA bytes of an ImageBitmap or of the frame that a video shows; all are opaque.
export function readPixels(image, width = image.width, height = image.height) {
  const rows = Math.max(1, Math.min(height, Math.floor(STRIP / width)));
  const canvas = Object.assign(document.createElement("canvas"), { width, height: rows });
  const context = canvas.getContext("2d", { willReadFrequently: true }); // it stays in memory, not on a GPU
  const data = new Uint8ClampedArray(width * height * 4);
  for (let top = 0; top < height; top += rows) {
    const many = Math.min(rows, height - top);
    context.clearRect(0, 0, width, rows);
    context.drawImage(image, 0, -top);
    data.set(context.getImageData(0, 0, width, many).data, top * width * 4);
  }
  for (let at = 3; at < data.length; at += 4) {
    if (data[at] < 255) return straightPixels(image, width, height);
  }
  return data;
}

// ---- details

// A 2D canvas keeps colours multiplied by their opacity, and so loses those of transparent pixels; a texture does not.
function straightPixels(image, width, height) {
  const gl = document.createElement("canvas").getContext("webgl2");
  if (!gl || Math.max(width, height) > gl.getParameter(gl.MAX_TEXTURE_SIZE)) {
    throw new Error("A picture with transparency, whose colours this browser cannot read: save it without");
  }
  gl.pixelStorei(gl.UNPACK_PREMULTIPLY_ALPHA_WEBGL, false);
  gl.pixelStorei(gl.UNPACK_COLORSPACE_CONVERSION_WEBGL, gl.NONE);
  gl.bindTexture(gl.TEXTURE_2D, gl.createTexture());
  gl.texImage2D(gl.TEXTURE_2D, 0, gl.RGBA, gl.RGBA, gl.UNSIGNED_BYTE, image);
  gl.bindFramebuffer(gl.FRAMEBUFFER, gl.createFramebuffer());
  gl.framebufferTexture2D(gl.FRAMEBUFFER, gl.COLOR_ATTACHMENT0, gl.TEXTURE_2D, gl.getParameter(gl.TEXTURE_BINDING_2D), 0);
  const data = new Uint8ClampedArray(width * height * 4);
  gl.readPixels(0, 0, width, height, gl.RGBA, gl.UNSIGNED_BYTE, new Uint8Array(data.buffer));
  gl.getExtension("WEBGL_lose_context")?.loseContext(); // browsers keep few
  for (let at = 3; at < data.length; at += 4) data[at] = 255;
  return data;
}
