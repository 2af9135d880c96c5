"""ATSS target assignment (Zhang et al., CVPR 2020), for a whole batch and all levels at once.

One square anchor a location, side 8 * stride, centred at (x * stride, y * stride). For every ground truth:
candidates are the 9 nearest anchors of each level; the threshold is mean + standard deviation (n - 1) of the
candidates' IoU; positive are candidates at or above it whose centre lies inside the box. An anchor that
several boxes claim goes to the one with the highest IoU.

Anchors stand on a grid, so the 9 nearest lie within the 9 nearest columns and the 9 nearest rows: a location
that is chosen implies that all nearer ones in its row (column) are chosen too. Each ground truth therefore looks
at 81 locations a level, and neither the distance nor the IoU matrix of all anchors with all boxes is built.

Shape letters: B images, G boxes an image (padded), L levels, A locations of an image, C = 9 * L candidates.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from compress.data.batch import Target

ANCHOR_SCALE = 8  # side of an anchor in strides
TOPK = 9  # candidates a level
PAD_MULTIPLE = 32  # an image's valid area is its size rounded up to this
INSIDE_PX = 0.01  # a centre lies inside a box when its smallest distance to a side exceeds this


@dataclass
class Assignment:
    """Targets of a batch.

    gt_index: int64 [B, A], the ground truth of a positive location, -1 for a negative one.
    valid: bool [B, A], False for locations in the padding beyond an image's valid area.
    thresholds: float [B, G], the IoU threshold of every ground truth (NaN in padding).
    num_positives: int64 [B].
    """

    gt_index: Tensor
    valid: Tensor
    thresholds: Tensor
    num_positives: Tensor

    @property
    def is_box(self) -> Tensor:
        """bool [B, G], True for real ground truth: neither padding nor a crowd box."""
        return ~self.thresholds.isnan()


def anchors(level_sizes: list[tuple[int, int]], strides: tuple[int, ...], device: torch.device) -> Tensor:
    """The anchors of all levels: float32 [A, 4] xyxy in pixels, levels concatenated, row-major."""
    points = location_points(level_sizes, strides, device)
    half = torch.cat(
        [torch.full((h * w, 1), ANCHOR_SCALE * s / 2) for (h, w), s in zip(level_sizes, strides, strict=True)]
    ).to(device)
    return torch.cat((points - half, points + half), -1)


def location_points(level_sizes: list[tuple[int, int]], strides: tuple[int, ...], device: torch.device) -> Tensor:
    """The points (x * stride, y * stride) of all levels: float32 [A, 2] in pixels, in the order of `anchors`."""
    levels = []
    for (h, w), stride in zip(level_sizes, strides, strict=True):
        y, x = torch.meshgrid(torch.arange(h, device=device), torch.arange(w, device=device), indexing="ij")
        levels.append(torch.stack((x, y), -1).flatten(0, 1).float() * stride)
    return torch.cat(levels)


def unknown_classes(
    targets: list[Target], num_classes: int, positive: Tensor, match: Callable[[Tensor, Tensor], Tensor]
) -> Tensor | None:
    """Find what labels say nothing about: bool [B, K, A], True where a class has no loss at a location; None: nowhere.

    A class that no teacher looked for, anywhere in its image. The class of an uncertain region of pseudo labels, where
    it would be no background were the region a label; but a location that is positive for some label is known.

    Args:
        positive: bool [B, A], locations that belong to a label.
        match: boxes [n, 4] and the images that they are in, int64 [n], → int64 [n, A] with -1 where a location would be
            background if that box were the only label.
    """
    if all(target.unlabeled_classes is None and target.uncertain is None for target in targets):
        return None
    device = positive.device
    unknown = torch.zeros(len(targets), num_classes, positive.shape[1], dtype=torch.bool, device=device)
    for row, target in zip(unknown, targets, strict=True):
        if target.unlabeled_classes is not None:
            row[target.unlabeled_classes.to(device)] = True
    uncertain = [
        (image, target, target.uncertain) for image, target in enumerate(targets) if target.uncertain is not None
    ]
    if uncertain:
        boxes = torch.cat([target.boxes[regions] for _, target, regions in uncertain]).to(device)
        labels = torch.cat([target.labels[regions] for _, target, regions in uncertain]).to(device)
        images = torch.cat([torch.full_like(target.labels[regions], image) for image, target, regions in uncertain])
        images = images.to(device)
        near = (match(boxes, images) != -1) & ~positive[images]
        where, place = near.nonzero(as_tuple=True)
        unknown[images[where], labels[where], place] = True
    return unknown


def valid_locations(image_sizes: Tensor, level_sizes: Sequence[tuple[int, int]], strides: Sequence[int]) -> Tensor:
    """Which locations lie in an image and not in the padding beyond its valid area: bool [B, A].

    Arguments as those of `atss`.
    """
    grid, stride = (torch.tensor(values, device=image_sizes.device) for values in (level_sizes, strides))
    extent = _extent(image_sizes, grid, stride)
    levels = []
    for level, (h, w) in enumerate(level_sizes):
        in_rows = torch.arange(h, device=extent.device) < extent[:, level, 0, None]  # [B, h]
        in_columns = torch.arange(w, device=extent.device) < extent[:, level, 1, None]  # [B, w]
        levels.append((in_rows[:, :, None] & in_columns[:, None, :]).flatten(1))
    return torch.cat(levels, 1)


def atss(
    boxes: Tensor,
    mask: Tensor,
    image_sizes: Tensor,
    level_sizes: list[tuple[int, int]],
    strides: tuple[int, ...],
) -> Assignment:
    """Assign ground truth to locations.

    Args:
        boxes: float [B, G, 4] xyxy in pixels of the padded network image; anything where `mask` is False.
        mask: bool [B, G], True for real boxes (crowd boxes and padding are False).
        image_sizes: int64 [B, 2], (height, width) of each image's area before padding, pixels.
        level_sizes: (h, w) of every level.
        strides: stride of every level, pixels.
    """
    B, G = mask.shape
    device = boxes.device
    stride = torch.tensor(strides, device=device)  # [L]
    grid = torch.tensor(level_sizes, device=device)  # [L, 2] (h, w)
    counts = grid[:, 0] * grid[:, 1]
    offset = counts.cumsum(0) - counts  # [L]
    A = int(sum(h * w for h, w in level_sizes))

    extent = _extent(image_sizes, grid, stride)
    valid = valid_locations(image_sizes, level_sizes, strides)
    if G == 0:
        none = torch.full((B, A), -1, dtype=torch.int64, device=device)
        return Assignment(none, valid, boxes.new_zeros(B, 0), torch.zeros(B, dtype=torch.int64, device=device))

    center = (boxes[..., :2] + boxes[..., 2:]) / 2  # [B, G, 2] (x, y)
    columns, column_exists = _nearest(center[..., 0], stride, extent[..., 1])  # [B, G, L, 9]
    rows, row_exists = _nearest(center[..., 1], stride, extent[..., 0])
    dx = columns * stride[:, None] - center[..., 0, None, None]
    dy = rows * stride[:, None] - center[..., 1, None, None]
    distance = dx.square()[..., None, :] + dy.square()[..., :, None]  # [B, G, L, 9 rows, 9 columns]
    distance.masked_fill_(~(row_exists[..., :, None] & column_exists[..., None, :]), torch.inf)
    distance, place = distance.flatten(3).topk(TOPK, largest=False)  # [B, G, L, 9]
    x = columns.gather(3, place % TOPK)
    y = rows.gather(3, place // TOPK)

    candidate = distance.isfinite().flatten(2)  # [B, G, C]
    location = (offset[:, None] + y * grid[:, 1, None] + x).flatten(2)  # [B, G, C]
    location = location.where(candidate, 0)  # a small level has fewer than 9; the rest must not point outside
    px, py = (x * stride[:, None]).flatten(2), (y * stride[:, None]).flatten(2)  # anchor centres, pixels
    half = (ANCHOR_SCALE * stride / 2)[:, None].expand(-1, TOPK).flatten()  # [C]
    iou = _anchor_iou(px, py, half, boxes)

    n = candidate.sum(-1)  # [B, G]
    mean = (iou * candidate).sum(-1) / n
    deviation = (((iou - mean[..., None]).square() * candidate).sum(-1) / (n - 1)).sqrt()
    threshold = mean + deviation
    inside = torch.minimum(
        torch.minimum(px - boxes[..., 0, None], boxes[..., 2, None] - px),
        torch.minimum(py - boxes[..., 1, None], boxes[..., 3, None] - py),
    )
    positive = candidate & (iou >= threshold[..., None]) & (inside > INSIDE_PX) & mask[..., None]

    # Conflicts: per location the highest IoU wins, then the first box.
    key = location + A * torch.arange(B, device=device)[:, None, None]
    iou_positive = torch.where(positive, iou, iou.new_full((), -1))
    best = iou.new_full((B * A,), -1).scatter_reduce_(0, key.flatten(), iou_positive.flatten(), "amax")
    winner = positive & (iou == best[key])
    box_index = torch.arange(G, device=device)[:, None].expand(G, key.shape[2])
    claim = torch.where(winner, box_index, G)
    gt_index = torch.full((B * A,), G, dtype=torch.int64, device=device)
    gt_index.scatter_reduce_(0, key.flatten(), claim.flatten(), "amin")
    gt_index = torch.where(gt_index == G, -1, gt_index).view(B, A)
    threshold = torch.where(mask, threshold, torch.nan)
    return Assignment(gt_index, valid, threshold, (gt_index >= 0).sum(1))


def _extent(image_sizes: Tensor, grid: Tensor, stride: Tensor) -> Tensor:
    """The part of each level's grid [L, 2] that lies in an image: [B, L, 2] (h, w)."""
    padded = (image_sizes + PAD_MULTIPLE - 1) // PAD_MULTIPLE * PAD_MULTIPLE
    return torch.minimum((padded[:, None] + stride[:, None] - 1) // stride[:, None], grid)


def _nearest(center: Tensor, stride: Tensor, extent: Tensor) -> tuple[Tensor, Tensor]:
    """The TOPK grid lines nearest to `center` [B, G] (pixels) among the first `extent` [B, L] of each level.

    Returns their indices [B, G, L, TOPK] and whether each exists (False beyond `extent`).
    """
    nearest = (center[..., None] / stride).round().long() - TOPK // 2  # [B, G, L]
    last = (extent - TOPK).clamp(min=0)[:, None]  # [B, 1, L]
    lines = nearest.clamp(min=0).minimum(last)[..., None] + torch.arange(TOPK, device=center.device)
    return lines, lines < extent[:, None, :, None]


def _anchor_iou(px: Tensor, py: Tensor, half: Tensor, boxes: Tensor) -> Tensor:
    """IoU of square anchors (centres px, py [B, G, C]; half side [C]) with boxes [B, G, 4] → [B, G, C]."""
    x1, y1, x2, y2 = boxes[..., None, :].unbind(-1)  # [B, G, 1]
    w = (torch.minimum(px + half, x2) - torch.maximum(px - half, x1)).clamp(min=0)
    h = (torch.minimum(py + half, y2) - torch.maximum(py - half, y1)).clamp(min=0)
    overlap = w * h
    union = (2 * half).square() + (x2 - x1) * (y2 - y1) - overlap
    return overlap / union.clamp(min=1e-6)
