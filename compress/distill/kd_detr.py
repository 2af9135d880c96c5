"""Query distillation in the form of KD-DETR (Wang et al., CVPR 2024, arXiv 2211.08071).

Two decoders find the same objects with different queries, so their predictions do not pair. Here the student's decoder
runs once more, on queries that begin at the teacher's boxes: what both say of query q then belongs together. For each
layer l of the student, against the teacher's last, with w_q the teacher's largest score and W = sum_q w_q over the
batch (mean over processes):

    kd_detr_cls  = cls_weight * sum_{l,q} w_q * T^2 * KL(softmax(z_t[q] / T) || softmax(z_s[l,q] / T)) / K / W
    kd_detr_l1   = l1_weight * sum_{l,q} w_q * sum |b_s[l,q] - b_t[q]| / W
    kd_detr_giou = giou_weight * sum_{l,q} w_q * (1 - GIoU(b_s[l,q], b_t[q])) / W

K is the number of classes: the KL divergence is a mean over them. b are centre, width and height in shares of the
network image. With `classes: sigmoid`, our addition, the first term is sum_c KL of the two Bernoulli distributions of
class c, T = 1. Of a single class the softmax is always 1, so that is refused.

The queries are the teacher's own, which it chose by its own features. `random_queries` adds boxes that both decoders
are asked about: centres uniform, sides log-uniform between 3 % and all of the image, the same for all images of a step.
A query takes along the features of its place, each model's own (`Detector.predict_at`).

Constants and form are those of an unofficial implementation; the authors' code is not public, so this is a form of
KD-DETR, not the paper. Theirs shares content embeddings of queries; these detectors take them from the encoder.
Detached: the teacher, and the student's features of the place, as in its own training.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import box_convert

from compress.config.methods import KdDetr
from compress.data.batch import Batch
from compress.detectors.base import Capability
from compress.detectors.queries import Queries, QueryPrediction, nearest_rows
from compress.distill.method import BuildContext, Method, Outputs, processes, sum_over_processes
from deploy.core.errors import UserError
from kernels.ops.iou_loss import giou_loss

SMALLEST = 0.03
"""Side of a random box at the least, in shares of the image."""
FIRST_ANCHOR = 0.05
"""Side of the boxes that a real-time DETR's finest level begins with, in shares of the image; doubled a level."""
EPS = 1e-9


class KDDETR(Method):
    """What student and teacher say of the teacher's queries.

    Args:
        cls_weight, l1_weight, giou_weight, classes, temperature, random_queries: see above; a term of weight 0 is left
            out.
        weight: factor on all terms.
        seed: of the random boxes.
    """

    needs = frozenset({Capability.QUERIES})

    def __init__(
        self,
        *,
        cls_weight: float,
        l1_weight: float,
        giou_weight: float,
        classes: Literal["softmax", "sigmoid"],
        temperature: float,
        random_queries: int,
        weight: float = 1.0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        wanted = {"kd_detr_cls": cls_weight, "kd_detr_l1": l1_weight, "kd_detr_giou": giou_weight}
        self.weights = {name: weight * value for name, value in wanted.items() if value}
        self.classes = classes
        self.temperature = temperature
        self.random_queries = random_queries
        self.seed = seed
        self.passes = 0
        self.needs = needs_of(random_queries)

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> dict[str, Tensor]:
        said = [teacher.queries]
        if self.random_queries:
            said.append(teacher.at(self._draw(teacher))[-1])
            self.passes += 1
        total = sum_over_processes(torch.stack([scores(asked).sum() for asked in said]).sum())
        total = (total / processes()).clamp(min=EPS)
        terms = dict.fromkeys(self.weights, torch.zeros((), device=total.device))
        for asked in said:
            weights = scores(asked) * certainty_at(teacher, asked.queries)
            for layer in student.at(asked.queries):
                rows = self.rows(layer.float(), asked.float().detach())
                terms = {name: terms[name] + (weights * rows[name]).sum() for name in terms}
        return {name: self.weights[name] * value / total for name, value in terms.items()}

    def rows(self, student: QueryPrediction, teacher: QueryPrediction) -> dict[str, Tensor]:
        """The three distances of each query, [B, Q]."""
        if self.classes == "softmax":
            divergence = softmax_kl(student.logits, teacher.logits, self.temperature) / student.logits.shape[-1]
        else:
            divergence = sigmoid_kl(student.logits, teacher.logits)
        ours, theirs = student.boxes_on(teacher.canvas), teacher.boxes
        corners = (box_convert(x, "cxcywh", "xyxy") for x in (ours, theirs))
        return {
            "kd_detr_cls": divergence,
            "kd_detr_l1": (ours - theirs).abs().sum(-1),
            "kd_detr_giou": giou_loss(*corners, eps=EPS),
        }

    def _draw(self, teacher: Outputs) -> Queries:
        """Random boxes; the same in all processes, and in a resumed training those of the interrupted one."""
        device, images = teacher.queries.boxes.device, len(teacher.queries.boxes)
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.passes)
        centres, sides = torch.rand(2, self.random_queries, 2, generator=generator)
        sides = SMALLEST ** (1 - sides)
        stride = teacher.detector.strides[0] * sides.prod(-1, keepdim=True).sqrt() / FIRST_ANCHOR
        boxes, places = (torch.cat((centres, x), -1).to(device).expand(images, -1, -1) for x in (sides, stride))
        return Queries(boxes, places, teacher.queries.canvas)

    def get_extra_state(self) -> dict[str, Any]:
        return {"passes": self.passes}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        self.passes = state["passes"]


def needs_of(random_queries: int) -> frozenset[Capability]:
    """What the method asks of both models: the teacher's maps only where its decoder runs again."""
    return KDDETR.needs | ({Capability.FEATURES} if random_queries else set())


def build(settings: KdDetr, context: BuildContext) -> KDDETR:
    """The method of a recipe. Raises UserError for a softmax over one class."""
    if settings.classes == "softmax" and settings.cls_weight and context.student.num_classes == 1:
        raise UserError("methods.kd_detr.classes: a softmax over one class says nothing; set it to sigmoid")
    return KDDETR(**settings.constants(), weight=context.weight, seed=context.seed)


def scores(teacher: QueryPrediction) -> Tensor:
    """w: the teacher's largest score of each query, float32 [B, Q], constant."""
    return teacher.logits.detach().float().sigmoid().amax(-1)


def certainty_at(teacher: Outputs, queries: Queries) -> Tensor | float:
    """The teacher's certainty (`Outputs.certainty`) at the places of queries, [B, Q]; 1 where nothing says."""
    if teacher.certainty is None:
        return 1.0
    shapes = [(int(x.shape[1]), int(x.shape[2])) for x in teacher.certainty]
    rows = nearest_rows(queries.places, shapes, teacher.detector.strides)
    return torch.cat([x.flatten(1) for x in teacher.certainty], 1).gather(1, rows)


def softmax_kl(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """T^2 * KL(teacher || student) of logits [..., N] over the last axis → [...]."""
    log_s, log_t = (F.log_softmax(x / temperature, -1) for x in (student, teacher))
    return temperature**2 * F.kl_div(log_s, log_t, reduction="none", log_target=True).sum(-1)


def sigmoid_kl(student: Tensor, teacher: Tensor) -> Tensor:
    """Sum over classes of the KL divergence of Bernoulli distributions: logits [..., K] → [...]."""
    positive = teacher.sigmoid() * (F.logsigmoid(teacher) - F.logsigmoid(student))
    negative = (-teacher).sigmoid() * (F.logsigmoid(-teacher) - F.logsigmoid(-student))
    return (positive + negative).sum(-1)
