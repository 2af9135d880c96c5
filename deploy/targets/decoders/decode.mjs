// What comes after the output layers of a detector: from class logits and box sides to final detections.
//
// For files of `compress export --heads-only`; an ES module without imports. deploy/core/heads.py is the same in Python.

/**
 * @param {Object<string, Float32Array>} outputs what the network gave for one image, by name: cls_8, box_8, ...
 * @param {Object} card the file's card: see docs/runtimes.md
 * @returns {{box: number[], score: number, label: number}[]} best first; box is [x1, y1, x2, y2] in pixels of the
 *     canvas, label an index into the card's class_names and category_ids
 */
export function decode(outputs, card) {
  const { strides, bins, offset, fitted, centerness } = card.form.heads;
  const [height, width] = card.input_size;
  const classes = card.class_names.length;
  const lowest = Math.fround(card.score_threshold);
  const best = [];
  let before = 0; // places of finer levels
  for (const stride of strides) {
    const [w, h] = [Math.ceil(width / stride), Math.ceil(height / stride)];
    const step = fitted ? [Math.floor(width / w), Math.floor(height / h)] : [stride, stride];
    const places = w * h;
    const [logits, sides, centre] = ["cls", "box", "ctr"].map((kind) => outputs[`${kind}_${stride}`]);
    for (let place = 0; place < places; place++) {
      const inside = centerness ? sigmoid(centre[place]) : 1;
      for (let label = 0; label < classes; label++) {
        let score = sigmoid(logits[label * places + place]);
        if (centerness) score = Math.fround(Math.sqrt(Math.fround(score * inside)));
        if (!(score > lowest)) continue;
        const box = [0, 1, 2, 3].map((side) => {
          const away = distance(sides, side * bins * places + place, bins, places);
          const at = ((side % 2 ? Math.floor(place / w) : place % w) + offset) * step[side % 2];
          const pixels = Math.fround(at + (side < 2 ? -away : away) * stride);
          return Math.min(Math.max(pixels, 0), side % 2 ? height : width);
        });
        // Of equal scores the lower pair of place and class goes first.
        best.push({ box, score, label, pair: (before + place) * classes + label });
      }
    }
    before += places;
  }
  best.sort((a, b) => b.score - a.score || a.pair - b.pair);

  const kept = [];
  for (const { box, score, label } of best.slice(0, card.candidates)) {
    if (kept.length === card.max_detections) break;
    if (!(box[2] > box[0] && box[3] > box[1])) continue;
    if (kept.some((other) => other.label === label && iou(other.box, box) > card.nms_threshold)) continue;
    kept.push({ box, score, label });
  }
  return kept;
}

// --- details ---------------------------------------------------------------------------------------------

function sigmoid(logit) {
  return Math.fround(1 / (1 + Math.exp(-logit)));
}

// `bins` logits from `first` on, `step` apart: their softmax's mean of 0, 1, 2, ...; of one bin the value itself.
function distance(logits, first, bins, step) {
  if (bins === 1) return logits[first];
  let [most, sum, weighted] = [-Infinity, 0, 0];
  for (let i = 0; i < bins; i++) most = Math.max(most, logits[first + i * step]);
  for (let i = 0; i < bins; i++) {
    const weight = Math.exp(logits[first + i * step] - most);
    sum += weight;
    weighted += weight * i;
  }
  return weighted / sum;
}

// In float32 after each step, as everywhere else.
function iou(a, b) {
  const round = Math.fround;
  const area = ([x1, y1, x2, y2]) => round(round(x2 - x1) * round(y2 - y1));
  const wide = Math.max(round(Math.min(a[2], b[2]) - Math.max(a[0], b[0])), 0);
  const both = round(wide * round(Math.min(a[3], b[3]) - Math.max(a[1], b[1])));
  return round(both / round(round(area(a) + area(b)) - both));
}
