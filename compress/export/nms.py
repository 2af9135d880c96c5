"""Greedy non-maximum suppression as a fixed sequence of ordinary tensor operations.

`class_aware_nms` gives what `torchvision.ops.batched_nms` gives, for a batch, with static shapes: it exports
to ONNX without the NonMaxSuppression operator, runs in ONNX Runtime and builds in TensorRT.
`select_detections` is the whole step from dense scores and boxes to padded detections.

How it works. Box i *suppresses* box j when it has the higher score, the same class and an IoU above the
threshold. Greedy suppression keeps j exactly when no kept box suppresses j, a recursion along descending
score. The recursion is a fixed point of keep ← no kept i suppresses j, and the iteration from "all kept"
reaches it (Cluster-NMS, Zheng et al., arXiv 2005.03572). One step is a vector-matrix product.

How many iterations are exact. The best box of a group is right from the start. Call round(j) the first
iteration after which box j never changes: a kept box settles one iteration after the last of its
suppressors, a suppressed box one after the first kept box that suppresses it. So `iterations` are exact as
long as no *alternating chain* (kept, then suppressed by it, then kept because that one fell, …) has more
than `iterations + 1` boxes. A crowd of any size around one object settles in one iteration; only boxes lined
up like roof tiles, each overlapping just its neighbours, with scores falling along the line, need one each.
The IoU threshold stretches such a line: at 0.6, neighbours are shifted by less than a quarter of a box, and
second neighbours by more. The default of 32 takes a row of 33 tiles.

What happens beyond. The step reverses order, so the iterates enclose the answer: after an even number of
iterations the kept set contains every box that greedy suppression keeps, and perhaps duplicates; after an
odd number it lacks some. `iterations` must be even: a chain that is too long costs a duplicate, never a
detection.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from deploy.core.card import MAX_CANDIDATES


def class_aware_nms(
    boxes: Tensor, scores: Tensor, labels: Tensor, *, iou_threshold: float, iterations: int = 32
) -> Tensor:
    """Find the boxes that greedy per-class suppression keeps: bool [B, N].

    boxes: float32 [B, N, 4] xyxy in any unit, x1 ≤ x2 and y1 ≤ y2, IoU threshold ≥ 0. scores: float32 [B, N]
    in any order; a score ≤ 0 marks a place that holds nothing: it is not kept and suppresses nothing.
    labels: integer [B, N]. Of equal scores the lower index goes first. The IoU is float32 with the
    operations of `torchvision.ops.nms`, so the decisions are the same bit for bit.

    Exact when no alternating chain of suppression is longer than `iterations + 1` boxes, otherwise the
    result is a superset (see above). Raises ValueError when `iterations` is odd or not positive.
    """
    valid = scores > 0
    index = torch.arange(scores.shape[1], device=scores.device)
    higher = scores[:, :, None] > scores[:, None, :]
    first_of_equals = (scores[:, :, None] == scores[:, None, :]) & (index[:, None] < index[None, :])
    return _suppress(boxes, labels, valid, higher | first_of_equals, iou_threshold, iterations)


def select_detections(
    scores: Tensor,
    boxes: Tensor,
    *,
    score_threshold: float,
    iou_threshold: float | None,
    max_detections: int,
    candidates: int = 1000,
    iterations: int = 32,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Dense predictions → padded detections: boxes [B, D, 4], scores [B, D], labels [B, D] int64, count [B]
    int32.

    scores: float32 [B, A, K], probabilities. boxes: float32 [B, A, 4] xyxy in pixels, clipped as wished. The
    best `candidates` (location, class) pairs with a score above `score_threshold` (strictly) and a box of
    positive width and height go through `class_aware_nms`, unless `iou_threshold` is None; the best
    D = `max_detections` of what is left come out in descending score, with zeros past `count`.

    A limit of 1000 pairs a level, as GFL's reference has it, changes nothing here while `candidates` ≤ 1000:
    the best 1000 of all levels are among the best 1000 of each. Raises ValueError when `candidates` is
    beyond TensorRT's limit.
    """
    if not 1 <= candidates <= MAX_CANDIDATES:
        raise ValueError(f"candidates must be in 1..{MAX_CANDIDATES} (the limit of TensorRT's TopK), got {candidates}")
    locations, classes = scores.shape[1], scores.shape[2]
    count = min(candidates, locations * classes)
    top_scores, pairs = scores.flatten(1).topk(count)  # [B, N], descending: precedence is the index order
    # [B, N] location. As `//` it would be eight nodes in ONNX, among them an Equal of booleans that runtimes refuse.
    where: Tensor = torch.ops.prims.div(pairs, torch.tensor(classes))
    labels = pairs - where * classes
    top_boxes = boxes.gather(1, where[:, :, None].expand(-1, -1, 4))
    extent = top_boxes[..., 2:] - top_boxes[..., :2]
    valid = (top_scores > score_threshold) & (extent[..., 0] > 0) & (extent[..., 1] > 0)
    keep = valid
    if iou_threshold is not None:
        index = torch.arange(count, device=scores.device)
        keep = _suppress(top_boxes, labels, valid, index[:, None] < index[None, :], iou_threshold, iterations)

    kept_scores, order = torch.where(keep, top_scores, -1.0).topk(min(max_detections, count))
    real = kept_scores >= 0
    out_boxes = top_boxes.gather(1, order[:, :, None].expand(-1, -1, 4)) * real[:, :, None]
    out_labels = labels.gather(1, order) * real
    out_scores = kept_scores * real
    if max_detections > count:
        missing = max_detections - count
        out_boxes = torch.nn.functional.pad(out_boxes, (0, 0, 0, missing))
        out_scores = torch.nn.functional.pad(out_scores, (0, missing))
        out_labels = torch.nn.functional.pad(out_labels, (0, missing))
    return out_boxes, out_scores, out_labels, real.sum(1).to(torch.int32)


# ----------------------------------------------------------------------------------------------------


def _suppress(
    boxes: Tensor, labels: Tensor, valid: Tensor, precedes: Tensor, iou_threshold: float, iterations: int
) -> Tensor:
    """The iteration. precedes: bool, broadcasts to [B, N, N]: row i goes before column j."""
    if iterations < 2 or iterations % 2:
        raise ValueError(f"iterations must be even and positive, got {iterations}: an odd count can lose detections")
    kind = labels.to(boxes.dtype)  # exact up to 2^24 classes, and half the memory of int64 to compare
    same_class = kind[:, :, None] == kind[:, None, :]
    overlaps = _pairwise_iou(boxes) > _round_down(iou_threshold)
    suppresses = (overlaps & same_class & precedes).to(boxes.dtype)  # [B, N, N] of 0 and 1
    start = valid.to(boxes.dtype)[:, None, :]  # [B, 1, N]; the others are never in `keep`, so suppress nothing
    keep = start
    for _ in range(iterations):
        keep = start * (torch.matmul(keep, suppresses) == 0).to(boxes.dtype)
    return keep[:, 0] > 0


def _pairwise_iou(boxes: Tensor) -> Tensor:
    """[B, N, 4] → [B, N, N]: intersection / (area + area - intersection), in this order.

    Boxes apart in y give a negative number instead of 0: it saves one pass over the matrix and decides the
    same. 0/0 is NaN, which is above nothing.
    """
    x1, y1, x2, y2 = boxes.unbind(-1)  # each [B, N]
    area = (x2 - x1) * (y2 - y1)
    width = (torch.minimum(x2[:, :, None], x2[:, None]) - torch.maximum(x1[:, :, None], x1[:, None])).clamp(min=0)
    height = torch.minimum(y2[:, :, None], y2[:, None]) - torch.maximum(y1[:, :, None], y1[:, None])
    intersection = width * height
    return intersection / (area[:, :, None] + area[:, None] - intersection)


def _round_down(threshold: float) -> float:
    """The largest float32 ≤ threshold. torchvision compares a float32 IoU with a float64 threshold; for
    float32 x, x > threshold and x > _round_down(threshold) are the same question."""
    rounded = np.float32(threshold)
    return float(np.nextafter(rounded, np.float32(-np.inf)) if float(rounded) > threshold else rounded)
