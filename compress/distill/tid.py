"""TID: task integration distillation (Su et al., arXiv 2404.01699), project definition.

Feature imitation in three regions, chosen by how well teacher and student do both tasks at a location. Per image, over
its P valid locations p of all levels, for each model M in {T, S}:

    iou_M(p) = max_g IoU(predicted box of p, g),   g*(p) the maximiser (lowest index of equals)
    r_M(p)   = 2.0 if iou_M >= thr_pos;  0.4 if iou_M <= thr_neg;  1.5 between
    q_M(p)   = sigmoid(class logits of p)[label of g*];   top = the k largest q_M, k = max(1, ceil(top_share * P))
    ok_M(p)  = the best class of p is the label of g*
    c_M(p)   = 2.0 if top and ok;  1.5 if top and not ok;  0.4 otherwise
    score_M  = r_M * c_M
    key = score_T >= 3,  weak = score_T > score_S;   high = key and weak,  middle = either,  low = neither
    e(p) = mean_c (F_T - g(F_S))^2
    L = mean over images of sum_{v in high, middle, low} lambda_v * sum_{p in v} e(p) / max(|v|, 1)

g is a 1×1 convolution a level where the widths differ, else the identity. In an image without ground truth every
location is low. Crowd boxes are no ground truth.
Detached: the teacher, the scores and the regions; gradient reaches F_S and g through e alone.
Normalised by the size of each region, then by the number of images. Teacher certainty multiplies e(p).

Reported in summaries of the paper: a localization score of 2 / 1.5 / 0.4 from the IoU of the predicted box, a
classification score that compares predicted class and ground truth and counts the best 2.5 % as positive, their
product, weakness as a difference of teacher and student, and three regions of unequal value. Ours: thr_pos 0.5 and
thr_neg 0.4, the values of c, the rule and the bound 3 for `key`, the form of the loss, lambda = (4, 2, 0.5), and g.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from compress.config.methods import Tid
from compress.data.batch import Batch
from compress.detectors.base import Capability, Targets
from compress.distill.method import Adapter, BuildContext, Method, Outputs
from kernels.ops.feature_distance import feature_distance
from kernels.ops.iou_loss import paired_iou

PAIRS = 2**22  # (location, ground truth) pairs looked at together: bounds the memory, 16 MB a float32 temporary


@dataclass(frozen=True)
class Rules:
    """The constants that turn predictions into scores and scores into regions; see the module.

    iou_scores: r for good, middling and bad boxes; class_scores: c for (top and right, top and wrong, not top).
    """

    thr_pos: float
    thr_neg: float
    top_share: float
    iou_scores: tuple[float, float, float]
    class_scores: tuple[float, float, float]
    key_score: float


class TID(Method):
    """Feature imitation weighted by where the teacher is good and the student is not.

    Args:
        student_channels, teacher_channels: widths of the pyramids.
        levels: of the pyramids.
        weight: factor on the loss.
        adapter: "auto": convolutions where the widths differ; "always": also where they agree.
        thr_pos, thr_neg, top_share, iou_scores, class_scores, key_score: see `Rules`.
        lambdas: weights of the regions high, middle, low.
        compiled: run the passes over the maps through torch.compile.
    """

    needs = frozenset({Capability.FEATURES, Capability.DENSE})

    def __init__(
        self,
        student_channels: int,
        teacher_channels: int,
        *,
        levels: int,
        adapter: Literal["auto", "always"],
        thr_pos: float,
        thr_neg: float,
        top_share: float,
        iou_scores: tuple[float, float, float],
        class_scores: tuple[float, float, float],
        key_score: float,
        lambdas: tuple[float, float, float],
        weight: float = 1.0,
        compiled: bool = False,
    ) -> None:
        super().__init__()
        self.levels = levels
        self.adapter = Adapter(student_channels, teacher_channels, levels, always=adapter == "always")
        self.rules = Rules(thr_pos, thr_neg, top_share, iou_scores, class_scores, key_score)
        self.lambdas = lambdas
        self.weight = weight
        self.compiled = compiled

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> dict[str, Tensor]:
        assert student.targets is not None, "the student's targets carry the ground truth"
        locations = [h * w for h, w in student.prediction.level_sizes]
        compared = student.targets.assignment.valid.clone()
        compared[:, sum(locations[: self.levels]) :] = False
        weights = region_weights(self.regions(student, teacher), compared, self.lambdas)  # [B, A]
        loss = torch.zeros((), device=weights.device)
        maps = zip(self.adapter(student.features[: self.levels]), teacher.features[: self.levels], strict=True)
        for level, ((ours, theirs), weight) in enumerate(zip(maps, weights.split(locations, 1), strict=False)):
            if teacher.certainty is not None:
                weight = weight * teacher.certainty[level].flatten(1)
            loss = loss + weighted_difference(ours, theirs.detach().float(), weight, compiled=self.compiled)
        return {"tid": self.weight * loss / weights.shape[0]}

    @torch.no_grad()
    def regions(self, student: Outputs, teacher: Outputs) -> Tensor:
        """Region of every location, int64 [B, A]: 0 high, 1 middle, 2 low. Invalid locations have a value, too."""
        targets = student.targets
        assert targets is not None
        if targets.labels.shape[1] == 0:
            return torch.full_like(targets.assignment.gt_index, 2)
        regions = split_regions(self._score(teacher, targets), self._score(student, targets), self.rules.key_score)
        has_boxes = targets.assignment.is_box.any(1)
        return regions.where(has_boxes[:, None], 2)

    def _score(self, model: Outputs, targets: Targets) -> Tensor:
        """score_M of every location, float32 [B, A]."""
        assignment = targets.assignment
        prediction = model.prediction.float()
        boxes = model.detector.decode_boxes(prediction)  # [B, A, 4]
        iou, index = best_ground_truth(boxes, targets.boxes, assignment.is_box)
        logits = torch.cat([x.flatten(2) for x in prediction.logits], 2)  # [B, K, A]
        label = targets.labels.gather(1, index)  # [B, A]
        quality = logits.gather(1, label[:, None])[:, 0].sigmoid()
        return integrated_score(iou, quality, logits.argmax(1) == label, assignment.valid, self.rules)


def build(settings: Tid, context: BuildContext) -> TID:
    """The method of a recipe."""
    return TID(*context.channels, **settings.constants(), weight=context.weight, compiled=context.compiled)


def weighted_difference(student: Tensor, teacher: Tensor, weight: Tensor, *, compiled: bool = False) -> Tensor:
    """sum_p weight(p) e(p), float32 scalar. Maps [B, C, h, w] of any float dtype; weight [B, h * w], constant."""
    B, C, h, w = student.shape
    channel = student.new_full((B, C), 1 / C, dtype=torch.float32)
    return feature_distance(student, teacher, weight.view(B, h, w), channel, compiled=compiled)


def best_ground_truth(boxes: Tensor, ground_truth: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Find the ground truth that each box overlaps most.

    Args:
        boxes: [B, A, 4] xyxy; ground_truth: [B, G, 4] xyxy, same unit.
        mask: bool [B, G], True for what may be chosen.

    Returns:
        IoU [B, A], and index int64 [B, A], the lowest of equals; -1 and 0 for images without any.
    """
    B, A, _ = boxes.shape
    best, index = boxes.new_full((B, A), -1), torch.zeros(B, A, dtype=torch.int64, device=boxes.device)
    G = mask.shape[1]
    step = max(1, PAIRS // max(1, B * A))
    for start in range(0, G, step):
        some = slice(start, start + step)
        pairs = torch.broadcast_tensors(boxes[:, None], ground_truth[:, some, None])  # [B, g, A, 4] each
        iou = paired_iou(pairs[0], pairs[1]).masked_fill(~mask[:, some, None], -1)
        value, place = iou.max(1)
        index = torch.where(value > best, place + start, index)
        best = torch.maximum(best, value)
    return best, index


def integrated_score(iou: Tensor, quality: Tensor, correct: Tensor, valid: Tensor, rules: Rules) -> Tensor:
    """score_M = r_M * c_M of every location, [B, P]; arguments float, float, bool, bool [B, P]."""
    good, middling, bad = rules.iou_scores
    r = torch.where(iou >= rules.thr_pos, good, torch.where(iou <= rules.thr_neg, bad, middling))
    top = best_share(quality, valid, rules.top_share)
    top_right, top_wrong, rest = rules.class_scores
    c = torch.where(top, torch.where(correct, top_right, top_wrong), rest)
    return (r * c).to(iou.dtype)


def best_share(quality: Tensor, valid: Tensor, share: float) -> Tensor:
    """bool [B, P]: the max(1, ceil(share * number of valid)) best valid locations of each image."""
    largest = _share_of(torch.tensor(valid.shape[1]), share)
    count = _share_of(valid.sum(1), share)  # [B], at most `largest`
    order = quality.masked_fill(~valid, -torch.inf).topk(int(largest), dim=1).indices
    chosen = torch.arange(order.shape[1], device=order.device) < count[:, None]
    return torch.zeros_like(valid).scatter(1, order, chosen)


def split_regions(teacher: Tensor, student: Tensor, key_score: float) -> Tensor:
    """Scores [B, P] of both → region int64 [B, P]: 0 high, 1 middle, 2 low."""
    key, weak = teacher >= key_score, teacher > student
    return 2 - key.long() - weak.long()


@torch.no_grad()
def region_weights(regions: Tensor, valid: Tensor, lambdas: tuple[float, ...]) -> Tensor:
    """lambda_v / |v| for every location of region v in its image, 0 for invalid ones: float32 [B, P]."""
    weights = torch.zeros(regions.shape, device=regions.device)
    for region, factor in enumerate(lambdas):
        inside = (regions == region) & valid
        weights = weights + inside * (factor / inside.sum(1, keepdim=True).clamp(min=1))
    return weights


def _share_of(count: Tensor, share: float) -> Tensor:
    """max(1, ceil(share * count)); the tolerance keeps 0.07 * 100 at 7."""
    return (share * count.double() - 1e-6).ceil().clamp(min=1).long()
