"""COCO mAP of a torch detector on a data loader; spread over processes when there are several."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch.utils.data import DataLoader

from compress.data.batch import Batch
from compress.data.coco import CocoDetection
from compress.detectors.base import Detector, gather
from deploy.core.detection_table import DetectionTable
from deploy.validate.coco import DETECTIONS, CocoMetrics, evaluate_coco, load_annotations
from deploy.validate.ground_truth import GroundTruth
from deploy.validate.operating_point import operating_point


@torch.no_grad()
def evaluate(
    detector: Detector,
    loader: DataLoader[Batch],
    dataset: CocoDetection,
    device: torch.device,
    max_detections: int = DETECTIONS,
) -> CocoMetrics:
    """mAP (percent) and operating point of `detector` on `loader`, an evaluation loader of `dataset`.

    With several processes each loader holds its own share of the images; every process gets the metrics of
    all of them. The detector is left in the mode (train or eval) in which it came. Detections of an image: 100, or
    `max_detections` if that is more.
    """
    was_training = detector.training
    detector.eval()
    settings = {"max_detections": max_detections} if max_detections > DETECTIONS else {}
    tables = detect(detector, loader, dataset.category_ids, device, **settings)
    detector.train(was_training)
    truth, table = GroundTruth.of(load_annotations(dataset.annotations)), gather(tables)
    metrics = evaluate_coco(truth, table, max_detections=max_detections)
    return replace(metrics, operating_point=operating_point(truth, table, dataset.category_ids))


@torch.no_grad()
def detect(
    detector: Detector, batches: Iterable[Batch], category_ids: Sequence[int], device: torch.device, **settings: Any
) -> list[DetectionTable]:
    """What a detector in eval mode finds in each image. settings: of `Detector.decode`."""
    tables: list[DetectionTable] = []
    for batch in batches:
        prediction = detector(batch.images.to(device))
        detections = detector.decode(prediction, batch.sizes, **settings)
        for target, found in zip(batch.targets, detections, strict=True):
            tables.append(found.to_table(target.image_id, category_ids))
    return tables
