"""GI imitation: features where teacher and student disagree most (Dai et al., CVPR 2021, arXiv 2103.02340).

This is the form of the LD and BCKD authors, not the original with pooled regions and a relation term. For each level,
with class scores t, s = sigmoid(logits) [B, K, M] and the boxes of both models:

    GI score_i = max_c |t_ic - s_ic|,   GI box_i = the teacher's if t >= s at that class, else the student's
    R = the `topk` locations left of greedy NMS (IoU `nms_threshold`) over (GI box, GI score)
    L = loss_weight * mean_{i in R, channel} (S_i - T_i)^2,  summed over levels

S is the adapted student map, T the teacher's, [B, C, h, w]. The mean is over the kept locations of a level and the
channels. Detached: the teacher, and the whole selection.

Published settings: loss_weight 2, topk 10, nms_threshold 0.3. Confirmed against the authors' code, but for three
accidents of it. It pools the images of a batch, so that `topk` locations are kept in all and boxes of different images
suppress each other; and it decodes the boxes of padding around the point (0, 0) (`pool_batch` does both). Ours selects
for each image, among the locations that are not padding. It also leaves out levels without positives; ours never does.
Certainty weighs the squared differences, not the selection.

Of a detector with queries, scores and boxes are those by which its decoder chooses places to begin at.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torchvision.ops import batched_nms

from compress.config.methods import Gi
from compress.data.batch import Batch
from compress.detectors.base import Capability
from compress.distill.method import Adapter, BuildContext, Method, Outputs, boxes_in_strides

CANDIDATES = 512  # locations that NMS looks at first; it looks further only where these leave less than `topk`


class GI(Method):
    """General instance imitation of pyramid maps.

    Args:
        student_channels, teacher_channels: widths of the two pyramids.
        levels: pyramid levels that take part, the finest first.
        weight: factor on the loss.
        adapter: 1×1 convolutions on the student's maps; auto: only where the widths differ.
        loss_weight: the published constant.
        topk: locations kept a level, of each image or of the batch.
        nms_threshold: IoU above which the lower score falls.
        pool_batch: select as the authors' code does, from the whole batch as if it were one image, padding included.
    """

    needs = frozenset({Capability.FEATURES, Capability.LOCATIONS})

    def __init__(
        self,
        student_channels: int,
        teacher_channels: int,
        *,
        levels: int,
        adapter: Literal["auto", "always"],
        loss_weight: float,
        topk: int,
        nms_threshold: float,
        pool_batch: bool,
        weight: float = 1.0,
    ) -> None:
        super().__init__()
        self.levels = levels
        self.weight = weight * loss_weight
        self.topk = topk
        self.nms_threshold = nms_threshold
        self.pool_batch = pool_batch
        self.adapter = Adapter(student_channels, teacher_channels, levels, always=adapter == "always")

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> dict[str, Tensor]:
        student_maps = self.adapter(student.features[: self.levels])
        total = student_maps[0].new_zeros(())
        chosen = self.select(student, teacher)
        for level, (s, t, index) in enumerate(zip(student_maps, teacher.features[: self.levels], chosen, strict=True)):
            certainty = None if teacher.certainty is None else teacher.certainty[level]
            total = total + imitation(s, t.detach().float(), index, certainty)
        return {"gi": self.weight * total}

    @torch.no_grad()
    def select(self, student: Outputs, teacher: Outputs) -> list[Tensor]:
        """Kept locations of each level, int64 [n] in descending GI score: (image * h + y) * w + x."""
        assert student.targets is not None, "the student's targets tell padding from locations"
        z_s, z_t = (m.detector.at_locations(m.features, m.prediction).float() for m in (student, teacher))
        valid_levels = student.targets.assignment.valid.split(z_s.counts, 1)
        student_boxes, teacher_boxes = boxes_in_strides(student, z_s), boxes_in_strides(teacher, z_t)
        kept = []
        for level, (h, w) in enumerate(z_s.level_sizes[: self.levels]):
            valid = valid_levels[level]  # [B, M]
            scores, boxes = general_instances(
                z_s.class_logits(level), z_t.class_logits(level), student_boxes[level], teacher_boxes[level]
            )
            if z_s.anchors > 1:
                scores, boxes, valid = best_of_location(scores, boxes, valid, z_s.anchors)
            if self.pool_batch:
                m = torch.arange(h * w, device=boxes.device)
                point = torch.stack((m % w, m // w), 1).repeat(1, 2)  # [M, 4]
                boxes = torch.where(valid[..., None], boxes, boxes - point)
                scores, boxes = scores.view(1, -1), boxes.view(1, -1, 4)
            else:
                scores = scores.where(valid, -1.0)
            kept.append(best_apart(scores, boxes, self.topk, self.nms_threshold))
        return kept


def build(settings: Gi, context: BuildContext) -> GI:
    """The method of a recipe."""
    return GI(*context.channels, **settings.constants(), weight=context.weight)


def general_instances(
    student_logits: Tensor, teacher_logits: Tensor, student_boxes: Tensor, teacher_boxes: Tensor
) -> tuple[Tensor, Tensor]:
    """GI scores [B, M] and boxes [B, M, 4] of one level, from logits [B, K, M] and boxes [B, M, 4] of both models."""
    difference = teacher_logits.sigmoid() - student_logits.sigmoid()
    scores, best = difference.abs().max(1)
    teacher_leads = difference.gather(1, best[:, None])[:, 0] >= 0  # [B, M]
    return scores, torch.where(teacher_leads[..., None], teacher_boxes, student_boxes)


def best_of_location(scores: Tensor, boxes: Tensor, valid: Tensor, anchors: int) -> tuple[Tensor, Tensor, Tensor]:
    """Pick the valid anchor with the best score at every location: [B, M], [B, M, 4] and bool [B, M] with M = h·w·N →
    the same with h·w."""
    shape = (scores.shape[0], -1, anchors)
    scores, best = scores.where(valid, -1.0).view(shape).max(2)
    boxes = boxes.view(*shape, 4).gather(2, best[..., None, None].expand(-1, -1, 1, 4))[:, :, 0]
    return scores, boxes, valid.view(shape).any(2)


def best_apart(scores: Tensor, boxes: Tensor, topk: int, iou_threshold: float) -> Tensor:
    """Boxes that greedy NMS leaves of each group, at most its `topk` best: indices [n] into the flattened [G * N].

    scores: [G, N]; a negative one is never kept. boxes: [G, N, 4] xyxy. Descending score over all groups. The
    decisions are those of NMS over all N boxes: what it keeps of the best n does not depend on the others.
    """
    G, N = scores.shape
    groups = torch.arange(G, device=scores.device)
    order = scores.sort(dim=1, descending=True, stable=True).indices + N * groups[:, None]  # flat
    flat_scores = scores.flatten()
    # batched_nms keeps groups apart by an offset in x and y, which is right only where no coordinate is negative
    flat_boxes = boxes.flatten(0, 1) - boxes.amin()
    limit = min(CANDIDATES, N)
    while True:
        candidates = order[:, :limit].flatten()
        group = candidates // N
        kept = candidates[batched_nms(flat_boxes[candidates], flat_scores[candidates], group, iou_threshold)]
        kept = kept[flat_scores[kept] >= 0]
        count = (kept[:, None] // N == groups).cumsum(0)  # [n, G] kept so far
        if limit == N or (len(kept) and bool((count[-1] >= topk).all())):
            rank = count.gather(1, (kept // N)[:, None])[:, 0]
            return kept[rank <= topk]
        limit = min(4 * limit, N)


def imitation(student: Tensor, teacher: Tensor, index: Tensor, certainty: Tensor | None = None) -> Tensor:
    """Mean squared difference of maps [B, C, h, w] at flat locations `index` [n], zero if there are none: a scalar."""
    assert student.shape == teacher.shape, f"maps differ in shape: {tuple(student.shape)}, {tuple(teacher.shape)}"
    C, M = student.shape[1], student.shape[2] * student.shape[3]
    image, location = index // M, index % M
    rows = (student.flatten(2)[image, :, location] - teacher.flatten(2)[image, :, location]).square().sum(1)  # [n]
    if certainty is not None:
        rows = rows * certainty.flatten()[index]
    return rows.sum() / (max(len(index), 1) * C)
