"""COCO mAP of a torch detector on a data loader; spread over processes when there are several."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch.utils.data import DataLoader

from compress.data.batch import Batch
from compress.data.coco import CocoDetection
from compress.detectors.base import Detector
from deploy.validate.coco import CocoMetrics, evaluate_coco


@torch.no_grad()
def evaluate(
    detector: Detector, loader: DataLoader[Batch], dataset: CocoDetection, device: torch.device
) -> CocoMetrics:
    """mAP (percent) of `detector` on `loader`, an evaluation loader of `dataset`.

    With several processes each loader holds its own share of the images; every process gets the metrics of
    all of them. The detector is left in the mode (train or eval) in which it came.
    """
    was_training = detector.training
    detector.eval()
    rows: list[dict[str, Any]] = []
    for batch in loader:
        prediction = detector(batch.images.to(device))
        detections = detector.decode(prediction, batch.sizes)
        for target, found in zip(batch.targets, detections, strict=True):
            rows.extend(found.to_coco(target.image_id, dataset.category_ids))
    detector.train(was_training)
    if dist.is_available() and dist.is_initialized():
        shares: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(shares, rows)
        rows = [row for share in shares for row in share]
    return evaluate_coco(dataset.annotations, rows)
