"""DDF: D-FINE's decoupled distillation of box distributions (Peng et al., ICLR 2025, arXiv 2410.13842), from a teacher.

D-FINE says each edge of a box as a distribution over N bins, and its loss lets the last layer teach those before it.
Here the last layer of a larger D-FINE teaches all layers of the student, which are asked about the teacher's queries
(`Outputs.at`), so that both speak of the same objects. Of an edge e of query q, for each layer l of the student:

    d[l, q, e] = v[l, q] * T^2 * KL(p_t[q, e] || softmax(c_s[l, q, e] / T)),   p_t = softmax(c_t[q, e] / T), moved
    ddf = loss_weight * sum_l (sqrt(n_m) * mean_matched d[l] + sqrt(n_o) * mean_others d[l]) / (sqrt(n_m) + sqrt(n_o))

A query is matched if the library's matching gives the teacher's prediction of it an object; then v is the IoU of the
student's box with the object, otherwise the teacher's largest score; v is constant. n_m and n_o count the edges of
matched and of other queries. Means and counts are those of all processes.

Bins count from the box of the first layer, and the student's first box is not the teacher's. So the teacher's
probabilities are moved: each bin's edge, in the image, is looked up between the student's bins and shared by the two
around it, as categorical distributions are projected in reinforcement learning (Bellemare et al. 2017). The mean edge
stays where it was, as far as the student's bins reach. With equal first boxes nothing moves, and the term is the
library's `loss_ddf`, T = 5 and the weight 1.5 included.

The authors describe self-distillation alone; a teacher of its own and the move are our definition.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torchvision.ops import box_convert

from compress.config.methods import Ddf
from compress.data.batch import Batch, Target
from compress.detectors.base import Capability
from compress.detectors.queries import EdgeDistributions, QueryPrediction
from compress.distill.kd_detr import EPS, certainty_at, scores, softmax_kl
from compress.distill.method import BuildContext, Method, Outputs, processes, sum_over_processes
from kernels.ops.iou_loss import paired_iou


class DDF(Method):
    """The teacher's distributions of edges.

    Args:
        loss_weight, temperature: see above.
        weight: factor on the term.
    """

    needs = frozenset({Capability.QUERIES, Capability.QUERY_DISTRIBUTIONS})

    def __init__(self, *, loss_weight: float, temperature: float, weight: float = 1.0) -> None:
        super().__init__()
        self.weight = weight * loss_weight
        self.temperature = temperature

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> dict[str, Tensor]:
        asked = teacher.queries.float().detach()
        matched, objects = matches(student, asked, batch.targets)
        certainty = certainty_at(teacher, asked.queries)
        total = torch.zeros((), device=objects.device)
        for layer in student.at(teacher.queries.queries):
            if layer.edges is not None:
                total = total + self.of_layer(layer.float(), asked, matched, objects, certainty)
        return {"ddf": self.weight * total}

    def of_layer(
        self,
        student: QueryPrediction,
        teacher: QueryPrediction,
        matched: Tensor,
        objects: Tensor,
        certainty: Tensor | float = 1.0,
    ) -> Tensor:
        """The term of one layer, without its weight.

        matched: bool [B, Q]. objects: [B, Q, 4], boxes of the matched. certainty: [B, Q], see `Outputs`.
        """
        assert student.edges is not None and teacher.edges is not None, (
            "both models have Capability.QUERY_DISTRIBUTIONS"
        )
        target = moved(teacher.edges, student.edges, self.temperature)
        rows = softmax_kl(student.edges.logits, target.logits, self.temperature).sum(-1)  # [B, Q], over four edges
        with torch.no_grad():
            ious = paired_iou(box_convert(student.boxes, "cxcywh", "xyxy"), box_convert(objects, "cxcywh", "xyxy"))
            value = torch.where(matched, ious, scores(teacher))
            counts = 4 * sum_over_processes(torch.stack((matched.sum(), (~matched).sum())).float())
            shares = counts.sqrt() / counts.sqrt().sum() * processes() / counts.clamp(min=1)
        rows = rows * value * certainty
        return shares[0] * rows.where(matched, 0).sum() + shares[1] * rows.where(~matched, 0).sum()


def build(settings: Ddf, context: BuildContext) -> DDF:
    """The method of a recipe."""
    return DDF(**settings.constants(), weight=context.weight)


def matches(student: Outputs, teacher: QueryPrediction, targets: list[Target]) -> tuple[Tensor, Tensor]:
    """Whether an object belongs to the teacher's query, bool [B, Q], and its box, [B, Q, 4] as `QueryPrediction.boxes`
    (zeros where there is none). The student's kind says how they are matched."""
    matched = torch.zeros(teacher.boxes.shape[:2], dtype=torch.bool, device=teacher.boxes.device)
    objects = torch.zeros_like(teacher.boxes)
    height, width = teacher.canvas
    found = student.detector.match_queries(teacher, targets)
    for image, (target, (query, index)) in enumerate(zip(targets, found, strict=True)):
        boxes = box_convert(target.boxes[~target.ignore].to(objects.device).float(), "xyxy", "cxcywh")
        matched[image, query] = True
        objects[image, query] = (boxes / boxes.new_tensor([width, height, width, height]))[index.to(boxes.device)]
    return matched, objects


def moved(teacher: EdgeDistributions, student: EdgeDistributions, temperature: float) -> EdgeDistributions:
    """The teacher's distributions on the student's bins: logits whose softmax at `temperature` they are."""
    bins = len(student.offsets)
    share = (teacher.logits / temperature).softmax(-1)  # [B, Q, 4, N]
    signs = share.new_tensor([-1.0, -1.0, 1.0, 1.0])[:, None]
    edges = _centres(teacher) + signs * _units(teacher) * (teacher.scale / 2 + teacher.offsets)  # of bins, in the image
    places = signs * (edges - _centres(student)) / _units(student).clamp(min=EPS) - student.scale / 2
    low, high = student.offsets[0], student.offsets[-1]
    places = torch.maximum(torch.minimum(places, high), low)
    above = torch.searchsorted(student.offsets, places.contiguous()).clamp(1, bins - 1)
    left, right = student.offsets[above - 1], student.offsets[above]
    part = (places - left) / (right - left)
    found = share.new_zeros(*share.shape[:-1], bins)
    found = found.scatter_add(-1, above - 1, share * (1 - part)).scatter_add(-1, above, share * part)
    logits = temperature * found.clamp(min=torch.finfo(found.dtype).tiny).log()
    return EdgeDistributions(logits, student.around, student.offsets, student.scale)


# --- details --------------------------------------------------------------------------------------------


def _centres(edges: EdgeDistributions) -> Tensor:
    """What each edge is away from, [B, Q, 4, 1]: x, y, x, y of the first box's centre."""
    return edges.around[..., [0, 1, 0, 1], None]


def _units(edges: EdgeDistributions) -> Tensor:
    """Unit of an edge's distance in shares of the image, [B, Q, 4, 1]."""
    return edges.around[..., [2, 3, 2, 3], None] / edges.scale
