"""LD: localization distillation (Zheng et al., CVPR 2022), with the valuable localization region.

    KL_T(z_s, z_t) = T^2 * mean_j p_t[j] * (log p_t[j] - log p_s[j]),   p = softmax(z / T)

    main LD:  sum_{i positive} w_i * sum_{4 sides} KL_10(side i) / 4,    w_i = max_c sigmoid(z_s[i, c])
    VLR LD:   sum_i u_i * sum_{4 sides} KL_10(side i) / 16,              u_i = weight of the region, see `vlr_region`
    class KD: per level sum_{i positive} KL_2(class logits of i) / number of positives of the level

The mean over the 17 bins (or K classes) is a mean, not a sum. Detached: the teacher, w and u. With one class the
softmax is constant and class KD is 0.

Normalised by constants only, as published: main and VLR LD grow with the positives of a process and its batch.
The authors trained with 3 (R18) and 2 (R50, inferred from its learning rate) images a process. `normalise: positives`
(our addition) divides all three sums by the number of positives of the batch instead (main and VLR LD on top of their
constants), so that neither the batch nor the number of processes changes the balance with the detection loss.
Published settings: main 0.25 and VLR 0.25 at T = 10, class KD 10 at T = 2. mmdet's LD has the main term alone.
Confirmed against the authors' code, and so is the region. Its optional feature imitation is a method of its own here.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from compress.config.methods import Ld
from compress.data.batch import Batch
from compress.detectors.assign import anchors
from compress.detectors.base import Capability, DensePrediction, Targets
from compress.distill.method import BuildContext, Method, Outputs, weigh

Overlap = Literal["iof", "diou"]

PAIRS = 2**23  # (anchor, box) pairs looked at together: bounds the memory, 32 MB a float32 temporary


class LD(Method):
    """Localization distillation. A term whose own weight is 0 is left out.

    Args:
        weight: factor on all terms.
        main: weight of main LD.
        vlr: weight of VLR LD.
        classification: weight of class KD.
        temperature: T of the distributions.
        classification_temperature: T of the classes.
        vlr_overlap, vlr_floor: see `vlr_region`.
        normalise: "official", or "positives" (ours), see above.
    """

    needs = frozenset({Capability.DENSE, Capability.DISTRIBUTIONS})

    def __init__(
        self,
        *,
        main: float,
        vlr: float,
        classification: float,
        temperature: float,
        classification_temperature: float,
        vlr_overlap: Overlap,
        vlr_floor: float,
        normalise: Literal["official", "positives"],
        weight: float = 1.0,
    ) -> None:
        super().__init__()
        self.weight = weight
        self.main = main
        self.vlr = vlr
        self.classification = classification
        self.temperature = temperature
        self.classification_temperature = classification_temperature
        self.vlr_overlap: Overlap = vlr_overlap
        self.vlr_floor = vlr_floor
        self.by_positives = normalise == "positives"

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> dict[str, Tensor]:
        return {name: value.sum() for name, value in self.by_level(student, teacher).items()}

    def by_level(self, student: Outputs, teacher: Outputs) -> dict[str, Tensor]:
        """The terms as [L] tensors: `ld_main`, `ld_vlr` and `ld_cls`."""
        assert student.targets is not None, "the student's targets carry the assignment"
        targets = student.targets
        z_s, z_t = student.prediction.float(), teacher.prediction.float().detach()
        locations = [h * w for h, w in z_s.level_sizes]
        regions = None
        if self.vlr != 0:
            regions = self._region(z_s, targets).split(locations, 1)
        sums: dict[str, list[Tensor]] = {"ld_main": [], "ld_vlr": [], "ld_cls": []}
        for level, gt in enumerate(targets.assignment.gt_index.split(locations, 1)):  # [B, M]
            certainty = None if teacher.certainty is None else teacher.certainty[level].flatten(1)
            positive = weigh((gt >= 0).float(), certainty)
            logits = z_s.logits[level].flatten(2)  # [B, K, M]
            if self.main != 0 or self.vlr != 0:
                rows = side_rows(z_s.distribution[level], z_t.distribution[level], self.temperature)
                if self.main != 0:
                    score = logits.detach().amax(1).sigmoid()
                    sums["ld_main"].append((rows * score * positive).sum() / 4)
                if regions is not None:
                    sums["ld_vlr"].append((rows * weigh(regions[level], certainty)).sum() / 16)
            if self.classification != 0:
                b, m = (gt >= 0).nonzero(as_tuple=True)  # [P]
                pair = logits[b, :, m], z_t.logits[level].flatten(2)[b, :, m]  # [P, K] each
                kl = softened_kl(*pair, self.classification_temperature)
                sums["ld_cls"].append((kl * positive[b, m]).sum())
        batch_positives = targets.avg_factor if self.by_positives else targets.avg_factor.new_ones(())
        # Without a positive the sum is 0; the mean over processes as for all normalisers of the project.
        level_positives = targets.level_positives.clamp(min=1) / targets.world_size
        factors = {
            "ld_main": self.main / batch_positives,
            "ld_vlr": self.vlr / batch_positives,
            "ld_cls": self.classification / (batch_positives if self.by_positives else level_positives),
        }
        return {name: self.weight * factors[name] * torch.stack(terms) for name, terms in sums.items() if terms}

    def _region(self, prediction: DensePrediction, targets: Targets) -> Tensor:
        boxes, assignment = targets.boxes, targets.assignment
        every = anchors(prediction.level_sizes, prediction.strides, boxes.device)
        region = vlr_region(every, boxes, assignment.thresholds, overlap=self.vlr_overlap, floor=self.vlr_floor)
        return region * assignment.valid


def build(settings: Ld, context: BuildContext) -> LD:
    """The method of a recipe."""
    return LD(**settings.constants(), weight=context.weight)


def softened_kl(student: Tensor, teacher: Tensor, temperature: float, *, dim: int = -1) -> Tensor:
    """T^2 * mean over `dim` of p_t * (log p_t - log p_s): logits of equal shape → that shape without `dim`."""
    log_s = F.log_softmax(student / temperature, dim)
    log_t = F.log_softmax(teacher / temperature, dim)
    return F.kl_div(log_s, log_t, reduction="none", log_target=True).mean(dim) * temperature**2


def side_rows(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """`softened_kl` summed over the sides of a location: distributions [B, 4 * R, h, w] → [B, M]."""
    B, channels, h, w = student.shape
    shape = (B, 4, channels // 4, h * w)
    return softened_kl(student.reshape(shape), teacher.reshape(shape), temperature, dim=2).sum(1)


@torch.no_grad()
def vlr_region(anchors: Tensor, boxes: Tensor, thresholds: Tensor, *, overlap: Overlap, floor: float) -> Tensor:
    """Weight of every anchor in the valuable localization region, [B, A]; 0 outside of it.

    An anchor is in the region of box g where floor * t_g <= D < t_g, t_g the box's ATSS threshold; positives are not
    taken out. Its weight is the largest plain IoU with the boxes whose region it is in.

        D = q - (distance of the centres)^2 / (diagonal of the enclosing box)^2

    Args:
        anchors: [A, 4] xyxy pixels.
        boxes: [B, G, 4] xyxy pixels.
        thresholds: [B, G]; a box with NaN (padding, crowd) has no region.
        overlap: "diou" is the paper's q = IoU; "iof" what the authors' code does, q = overlap / area of the anchor.
        floor: lower bound as a share of the threshold.
    """
    weights = boxes.new_zeros(boxes.shape[0], anchors.shape[0])
    if boxes.shape[1] == 0:
        return weights
    step = max(1, PAIRS // max(1, weights.numel()))  # boxes at a time
    ax1, ay1, ax2, ay2 = anchors.unbind(-1)  # [A]
    anchor_area = (ax2 - ax1) * (ay2 - ay1)
    for some, threshold in zip(boxes.split(step, 1), thresholds[..., None].split(step, 1), strict=True):
        x1, y1, x2, y2 = some[..., None, :].unbind(-1)  # [B, g, 1]
        width = (torch.minimum(ax2, x2) - torch.maximum(ax1, x1)).clamp(min=0)
        height = (torch.minimum(ay2, y2) - torch.maximum(ay1, y1)).clamp(min=0)
        shared = width * height  # [B, g, A]
        iou = shared / (anchor_area + (x2 - x1) * (y2 - y1) - shared).clamp(min=1e-6)
        distance = ((ax1 + ax2) - (x1 + x2)).square() / 4 + ((ay1 + ay2) - (y1 + y2)).square() / 4
        diagonal = (torch.maximum(ax2, x2) - torch.minimum(ax1, x1)).square() + (
            torch.maximum(ay2, y2) - torch.minimum(ay1, y1)
        ).square()
        ratio = shared / anchor_area if overlap == "iof" else iou
        closeness = ratio - distance / diagonal.clamp(min=1e-6)
        inside = (closeness >= floor * threshold) & (closeness < threshold)
        weights = torch.maximum(weights, (iou * inside).amax(1))
    return weights
