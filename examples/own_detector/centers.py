"""Centers, a small anchor-free detector: an object is a peak of its class's heat map, with a size beside it.

After "Objects as Points" (Zhou et al., arXiv 1904.07850), on one map of stride 8. Differs: the size is learned by GIoU
instead of L1, and there is no offset head, because the peak's cell bounds the error to half a stride.

    heat[b, k, y, x] = exp(-(dx^2 + dy^2) / (2 r^2)),  r = max(w, h) / 6 of the object, the maximum over objects
    L_heat = -1/P sum  (1 - p)^2 log p                    where heat = 1
                       (1 - heat)^4 p^2 log(1 - p)        elsewhere
    L_size = 1/P sum_{centres} (1 - GIoU)

Everything that `compress` needs of a detector is in `Centers`: what it can give (`capabilities`), its maps, its
predictions, its loss, and how a prediction becomes boxes. In a recipe:

    student: {detector: "examples.own_detector.centers:Centers", options: {width: 32}}

Shape letters: B images, K classes, h x w the map (stride 8), G boxes of an image, P centres.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from compress.data.batch import Target
from compress.detectors.base import Capability, DensePrediction, Detector, Reduce
from kernels import iou_loss_rows

STRIDE = 8


@dataclass
class CenterTargets:
    """Ground truth of a batch on the map.

    heat: float32 [B, K, h, w] in 0..1, 1 at centres. counts: float32 [B, 1, h, w], 0 where a crowd is: no loss there.
    image, y, x: int64 [P], the cells of the centres. boxes: float32 [P, 4] xyxy, pixels.
    avg_factor: float32 scalar, P of all processes over their number, at least 1.
    """

    heat: Tensor
    counts: Tensor
    image: Tensor
    y: Tensor
    x: Tensor
    boxes: Tensor
    avg_factor: Tensor


class Centers(Detector):
    """The detector.

    Args:
        num_classes: K.
        width: channels of the map that the head reads, and of the feature map that a teacher can be compared with.
    """

    capabilities = frozenset({Capability.FEATURES, Capability.DENSE, Capability.BOXES})
    strides = (STRIDE,)

    def __init__(self, num_classes: int, *, width: int = 32) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.feature_channels = width
        self.body = nn.Sequential(
            _block(3, width // 2, 2), _block(width // 2, width, 2), _block(width, width, 2), _block(width, width, 1)
        )
        self.context = _block(width, width, 1, dilation=4)
        self.heat = nn.Sequential(_block(width, width, 1), nn.Conv2d(width, num_classes, 1))
        self.size = nn.Sequential(_block(width, width, 1), nn.Conv2d(width, 4, 1))
        nn.init.constant_(self.heat[1].bias, -4.0)  # almost nothing is an object
        self.set_normalisation((127.5,) * 3, (64.0,) * 3)

    def features(self, images: Tensor) -> list[Tensor]:
        """uint8 [B, 3, H, W] → one map [B, width, H / 8, W / 8]."""
        x = self.body(self.normalise(images))
        return [x + self.context(x)]

    def predict(self, features: list[Tensor]) -> DensePrediction:
        """logits [B, K, h, w]; sides [B, 4, h, w], logarithms of the distances to left, top, right and bottom in
        strides."""
        (x,) = features
        return DensePrediction([self.heat(x)], [], self.strides, box_deltas=[self.size(x)])

    def decode_boxes(self, prediction: DensePrediction) -> Tensor:
        """[B, h * w, 4] xyxy pixels."""
        distances = prediction.box_deltas[0].clamp(-6, 6).exp().flatten(2).transpose(1, 2)  # [B, h * w, 4]
        h, w = prediction.level_sizes[0]
        y, x = torch.meshgrid(
            torch.arange(h, device=distances.device) + 0.5,
            torch.arange(w, device=distances.device) + 0.5,
            indexing="ij",
        )
        points = torch.stack((x, y), -1).view(1, h * w, 2)
        return torch.cat((points - distances[..., :2], points + distances[..., 2:]), -1) * STRIDE

    def assign(self, prediction: DensePrediction, targets: list[Target], reduce: Reduce | None = None) -> CenterTargets:
        """Draw the heat maps. Crowds take cells out of the loss."""
        h, w = prediction.level_sizes[0]
        device = prediction.logits[0].device
        heat = torch.zeros(len(targets), self.num_classes, h, w, device=device)
        counts = torch.ones(len(targets), 1, h, w, device=device)
        cells: list[Tensor] = [torch.zeros(3, 0, dtype=torch.int64, device=device)]
        boxes: list[Tensor] = [torch.zeros(0, 4, device=device)]
        y, x = torch.meshgrid(torch.arange(h, device=device), torch.arange(w, device=device), indexing="ij")
        for image, target in enumerate(targets):
            all_boxes, crowd = target.boxes.to(device) / STRIDE, target.ignore.to(device)
            for x1, y1, x2, y2 in all_boxes[crowd].tolist():
                counts[image, 0, int(y1) : int(y2) + 1, int(x1) : int(x2) + 1] = 0
            own, labels = all_boxes[~crowd], target.labels.to(device)[~crowd]
            if not len(own):
                continue
            centre_x = ((own[:, 0] + own[:, 2]) / 2).long().clamp(0, w - 1)
            centre_y = ((own[:, 1] + own[:, 3]) / 2).long().clamp(0, h - 1)
            radius = ((own[:, 2:] - own[:, :2]).amax(1) / 6).clamp(min=0.5)
            squared = (x - centre_x[:, None, None]).square() + (y - centre_y[:, None, None]).square()
            bumps = torch.exp(-squared / (2 * radius.square()[:, None, None]))  # [G, h, w]
            for label, bump in zip(labels.tolist(), bumps, strict=True):
                heat[image, label] = torch.maximum(heat[image, label], bump)
            cells.append(torch.stack((torch.full_like(centre_x, image), centre_y, centre_x)))
            boxes.append(own * STRIDE)
        image_index, cell_y, cell_x = torch.cat(cells, 1)
        positives = torch.tensor(float(len(image_index)), device=device)
        if reduce is not None:
            positives = reduce(positives) / reduce(torch.ones_like(positives))
        return CenterTargets(heat, counts, image_index, cell_y, cell_x, torch.cat(boxes), positives.clamp(min=1))

    def loss(
        self, prediction: DensePrediction, targets: CenterTargets, reduce: Reduce | None = None
    ) -> dict[str, Tensor]:
        """`loss_heat` and `loss_size`, see above."""
        logits = prediction.logits[0]
        p = logits.sigmoid()
        centre = targets.heat == 1
        at_centre = (1 - p).square() * F.logsigmoid(logits)
        elsewhere = (1 - targets.heat).pow(4) * p.square() * F.logsigmoid(-logits)
        heat = -(torch.where(centre, at_centre, elsewhere) * targets.counts).sum()
        boxes = self.decode_boxes(prediction).unflatten(1, prediction.level_sizes[0])
        size = iou_loss_rows(boxes[targets.image, targets.y, targets.x], targets.boxes, kind="giou").sum()
        return {"loss_heat": heat / targets.avg_factor, "loss_size": size / targets.avg_factor}


def _block(inner: int, outer: int, stride: int, dilation: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inner, outer, 3, stride, padding=dilation, dilation=dilation, bias=False),
        nn.BatchNorm2d(outer),
        nn.ReLU(),
    )
