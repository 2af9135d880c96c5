"""Selection of final detections from dense scores and boxes, image by image: threshold, best of a level, suppression.

For students while they train and for teachers. Exported files do the same with static shapes: `compress.export.nms`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from compress.data.batch import ImageSize

PRE_NMS = 1000  # (location, class) pairs kept a level


def select(
    levels: Sequence[tuple[Tensor, Tensor]],
    size: ImageSize,
    *,
    score_threshold: float,
    nms_threshold: float | None,
    max_detections: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Boxes [n, 4] xyxy in pixels of the image's file, scores [n] and labels int64 [n], best first (as mmdet selects).

    Args:
        levels: of each level scores [M, K] in 0..1 and boxes [M, 4] xyxy in pixels of the network image.
        size: boxes are clipped to `size.network` and scaled to `size.original`.
        score_threshold: scores must be above it.
        nms_threshold: IoU above which boxes of one class suppress each other; None: they do not.
        max_detections: limit of n.
    """
    from torchvision.ops import batched_nms  # here: assignment and losses need only torch

    level_scores, level_labels, level_boxes = [], [], []
    for scores, boxes in levels:
        K = scores.shape[1]
        flat = scores.flatten()
        pairs = (flat > score_threshold).nonzero().squeeze(1)
        values, order = flat[pairs].sort(descending=True, stable=True)
        pairs = pairs[order[:PRE_NMS]]
        level_scores.append(values[:PRE_NMS])
        level_labels.append(pairs % K)
        level_boxes.append(boxes[pairs // K])
    scores, labels, boxes = torch.cat(level_scores), torch.cat(level_labels), torch.cat(level_boxes)
    height, width = size.network
    boxes = torch.stack(
        (
            boxes[:, 0].clamp(0, width),
            boxes[:, 1].clamp(0, height),
            boxes[:, 2].clamp(0, width),
            boxes[:, 3].clamp(0, height),
        ),
        -1,
    )
    scale_x, scale_y = size.original[1] / width, size.original[0] / height
    boxes = boxes * boxes.new_tensor([scale_x, scale_y, scale_x, scale_y])
    real = (boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1])
    boxes, scores, labels = boxes[real], scores[real], labels[real]
    if nms_threshold is None:
        keep = scores.argsort(descending=True, stable=True)[:max_detections]
    else:
        keep = batched_nms(boxes, scores, labels, nms_threshold)[:max_detections]
    return boxes[keep], scores[keep], labels[keep]
