"""What comes after the output layers of a detector, in NumPy: from class logits and box sides to final detections.

A file of `compress export --heads-only` ends with its output layers. This is what its caller has to do; the same stands
in C++ and JavaScript in `deploy/targets/decoders`. Each rounds to float32 where that decides: what scores more than the
threshold, what has an area, and what overlaps more than the threshold.

Shape letters: A places of all levels, K classes, R bins, h × w places of a level, D `max_detections`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from deploy.core.card import Heads, ModelCard


def decode(outputs: Sequence[np.ndarray], card: ModelCard) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """outputs: of one image, float32 [1, C, h, w] in the order of the card's `Heads.names` → boxes float32 [1, D, 4]
    xyxy in pixels of the canvas, scores float32 [1, D], labels int64 [1, D], count int32 [1]; zeros past `count`."""
    assert card.form.heads is not None, "the card says what the outputs are"
    return select(*dense(outputs, card.form.heads, card.input_size), card)


def dense(outputs: Sequence[np.ndarray], heads: Heads, size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Scores float32 [A, K] in 0..1 and boxes float32 [A, 4], clipped to the canvas of `size` (height, width).

    The logits' probabilities; in FCOS their geometric mean with that of the place's centerness. A side is the mean of
    its distances 0, 1, …, R - 1, weighted by the softmax of their logits, or with one bin the distance itself; in
    strides, from the centre of the place.
    """
    each = 3 if heads.centerness else 2
    scores, boxes = [], []
    for level, stride in enumerate(heads.strides):
        logits, sides, *centerness = outputs[each * level : each * level + each]
        _, classes, h, w = logits.shape
        probability = _sigmoid(logits.reshape(classes, h * w).T)
        if centerness:
            probability = np.sqrt(probability * _sigmoid(centerness[0].reshape(h * w, 1)))
        distances = _mean_distance(sides.reshape(4, heads.bins, h * w)) * np.float32(stride)
        y, x = np.divmod(np.arange(h * w), w)
        step = (size[1] // w, size[0] // h) if heads.fitted else (stride, stride)
        centre = (np.stack([x, y]).astype(np.float32) + np.float32(heads.offset)) * np.array(step, np.float32)[:, None]
        scores.append(probability)
        boxes.append(np.concatenate([centre - distances[:2], centre + distances[2:]]).T)
    height, width = size
    return np.concatenate(scores), np.clip(np.concatenate(boxes), 0, np.array([width, height] * 2, np.float32))


def select(
    scores: np.ndarray, boxes: np.ndarray, card: ModelCard
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Final detections, as `decode` gives them, of scores float32 [A, K] and boxes float32 [A, 4].

    The best `candidates` pairs of a place and a class that score more than the threshold and whose box has an area, in
    descending order (of equal scores the earlier place, then the earlier class, goes first). Each one that is kept
    removes those behind it of its class that overlap it more than the threshold, until D are kept.
    """
    classes = scores.shape[1]
    flat = scores.ravel()
    above = np.flatnonzero(flat > np.float32(card.score_threshold))
    best = above[np.argsort(-flat[above], kind="stable")][: card.candidates]
    best = best[(boxes[best // classes, 2:] > boxes[best // classes, :2]).all(1)]
    labels, found = best % classes, boxes[best // classes]
    kept: list[int] = []
    left = np.ones(len(best), bool)
    while left.any() and len(kept) < card.max_detections:
        first = int(left.argmax())
        kept.append(first)
        left[first] = False
        left &= (labels != labels[first]) | ~(_iou(found[first], found) > np.float64(card.nms_threshold))
    count, most = len(kept), card.max_detections
    out_boxes, out_scores = np.zeros((1, most, 4), np.float32), np.zeros((1, most), np.float32)
    out_labels = np.zeros((1, most), np.int64)
    out_boxes[0, :count], out_scores[0, :count], out_labels[0, :count] = found[kept], flat[best][kept], labels[kept]
    return out_boxes, out_scores, out_labels, np.array([count], np.int32)


# --- details --------------------------------------------------------------------------------------------


def _sigmoid(logits: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):  # of a logit below -88 the probability is 0
        return 1 / (1 + np.exp(-logits))


def _mean_distance(logits: np.ndarray) -> np.ndarray:
    """[4, R, M] → [4, M], in strides."""
    if logits.shape[1] == 1:
        return logits[:, 0]
    weights = np.exp(logits - logits.max(1, keepdims=True))
    bins = np.arange(logits.shape[1], dtype=np.float32)[:, None]
    return (weights * bins).sum(1) / weights.sum(1)


def _iou(box: np.ndarray, boxes: np.ndarray) -> np.ndarray:
    """float32 [N] of a box [4] and boxes [N, 4], in the order of operations that the exported graph has."""
    area = (box[2] - box[0]) * (box[3] - box[1])
    areas = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    width = np.maximum(np.minimum(box[2], boxes[:, 2]) - np.maximum(box[0], boxes[:, 0]), 0)
    both = width * (np.minimum(box[3], boxes[:, 3]) - np.maximum(box[1], boxes[:, 1]))
    return both / (area + areas - both)
