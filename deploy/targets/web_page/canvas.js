// A picture on the network's canvas, and boxes back to pixels of the picture: deploy/core/canvas.py again, bit for bit.
//
// A browser's own scaling gives other pixels, and so other detections. The filter here is Pillow's bilinear one, which
// averages where it makes smaller: weights in float64, rounded to integers of 22 bits behind the point.

const BITS = 22;
const HALF = 1 << (BITS - 1);

// The largest [height, width] of the same ratio within the limits that are given (pixels).
export function fitSize(height, width, { short, long, canvas }) {
  const factors = [canvas[0] / height, canvas[1] / width];
  if (short !== null) factors.push(short / Math.min(height, width));
  if (long !== null) factors.push(long / Math.max(height, width));
  const factor = Math.min(...factors);
  const side = (length, most) => Math.min(Math.max(Math.trunc(length * factor + 0.5), 1), most);
  return [side(height, canvas[0]), side(width, canvas[1])];
}

// What each output pixel of one axis is made of: `first[i]` is its first input pixel, `count[i]` how many there are, and
// `weights[i * size + k]` the share of the k-th, times 2^22.
export function filter(inputs, outputs) {
  const scale = inputs / outputs;
  const reach = Math.max(scale, 1); // of the triangle, to each side; made larger, it interpolates between two pixels
  const size = Math.ceil(reach) * 2 + 1;
  const first = new Int32Array(outputs);
  const count = new Int32Array(outputs);
  const weights = new Int32Array(outputs * size);
  const share = new Float64Array(size);
  for (let out = 0; out < outputs; out++) {
    const center = (out + 0.5) * scale;
    const begin = Math.max(Math.trunc(center - reach + 0.5), 0);
    const many = Math.min(Math.trunc(center + reach + 0.5), inputs) - begin;
    let sum = 0;
    for (let k = 0; k < many; k++) {
      share[k] = Math.max(1 - Math.abs((k + begin - center + 0.5) * (1 / reach)), 0);
      sum += share[k];
    }
    for (let k = 0; k < many; k++) weights[out * size + k] = Math.trunc(0.5 + (share[k] / sum) * (1 << BITS));
    first[out] = begin;
    count[out] = many;
  }
  return { first, count, weights, size };
}

// RGBA bytes [height, width, 4] → [newHeight, newWidth, 4], whose A means nothing. The second pass works on bytes again,
// so that the order matters: as in Pillow since version 13.
export function resize(rgba, height, width, newHeight, newWidth) {
  const rows = (pixels, high) => (newWidth === width ? pixels : shrinkRows(pixels, high, width, newWidth));
  const columns = (pixels, wide) => (newHeight === height ? pixels : shrinkColumns(pixels, height, wide, newHeight));
  const columnsFirst = height > newHeight && height - newHeight > 2 * (width - newWidth);
  return columnsFirst ? rows(columns(rgba, width), newHeight) : columns(rows(rgba, height), newWidth);
}

// pixels: { width, height, data: RGBA bytes }. Returns the canvas, bytes [3, H, W], and its scale: canvas pixels per
// pixel of the picture, [x, y].
export function fitCanvas({ width, height, data }, card) {
  const [high, wide] = card.input_size;
  const [newHeight, newWidth] = fitSize(height, width, { short: card.short, long: card.long, canvas: [high, wide] });
  const small = resize(data, height, width, newHeight, newWidth);
  const canvas = new Uint8Array(3 * high * wide);
  for (let channel = 0; channel < 3; channel++) {
    const plane = canvas.subarray(channel * high * wide, (channel + 1) * high * wide).fill(card.pad_color[channel]);
    for (let y = 0; y < newHeight; y++) {
      for (let x = 0; x < newWidth; x++) plane[y * wide + x] = small[(y * newWidth + x) * 4 + channel];
    }
  }
  return { canvas, scale: [newWidth / width, newHeight / height] };
}

// A box of the canvas, xyxy, in pixels of the picture, clipped to it; float32 as in Python.
export function toOriginal(box, [sx, sy], { width, height }) {
  const back = (side, scale, most) => Math.min(Math.max(Math.fround(side / Math.fround(scale)), 0), most);
  return [back(box[0], sx, width), back(box[1], sy, height), back(box[2], sx, width), back(box[3], sy, height)];
}

// ---- details

function shrinkRows(rgba, height, width, newWidth) {
  const { first, count, weights, size } = filter(width, newWidth);
  const out = new Uint8ClampedArray(height * newWidth * 4);
  for (let y = 0, to = 0; y < height; y++) {
    for (let x = 0; x < newWidth; x++, to += 4) {
      let [red, green, blue] = [HALF, HALF, HALF];
      let from = (y * width + first[x]) * 4;
      const end = x * size + count[x];
      for (let k = x * size; k < end; k++, from += 4) {
        const weight = weights[k];
        red += rgba[from] * weight;
        green += rgba[from + 1] * weight;
        blue += rgba[from + 2] * weight;
      }
      out[to] = red >> BITS;
      out[to + 1] = green >> BITS;
      out[to + 2] = blue >> BITS;
    }
  }
  return out;
}

function shrinkColumns(rgba, height, width, newHeight) {
  const { first, count, weights, size } = filter(height, newHeight);
  const row = width * 4;
  const out = new Uint8ClampedArray(newHeight * row);
  const sums = new Int32Array(row);
  for (let y = 0; y < newHeight; y++) {
    sums.fill(HALF);
    for (let k = 0; k < count[y]; k++) {
      const weight = weights[y * size + k];
      const from = (first[y] + k) * row;
      for (let x = 0; x < row; x++) sums[x] += rgba[from + x] * weight;
    }
    for (let x = 0; x < row; x++) out[y * row + x] = sums[x] >> BITS;
  }
  return out;
}
