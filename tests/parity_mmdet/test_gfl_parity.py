"""Our GFL against mmdet's: the same random weights, images and ground truth give the same numbers."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from mmdet.structures import DetDataSample
from mmengine.structures import InstanceData
from torch import Tensor

from compress.data.batch import Batch, Target, collate
from compress.detectors.base import DensePrediction
from compress.detectors.checkpoints import load_mmdet_gfl
from compress.detectors.gfl import GFL
from tests.parity_mmdet import models
from tests.parity_mmdet.compare import same
from tests.parity_mmdet.samples import CLASSES, sample

SIZES = ((200, 310), (256, 300), (97, 160), (224, 224))
"""(height, width) of the images; the batch is 256 × 320, so three of them have invalid locations."""


@dataclass
class Pair:
    name: str
    ours: GFL
    theirs: Any
    batch: Batch
    normalised: Tensor


@pytest.fixture(scope="module", params=[18, 50], ids=["r18", "r50"])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    settings = models.config("gfl", classes=CLASSES, depth=request.param, width=256, convs=4)
    theirs = models.build(settings, seed=request.param)
    folder = tmp_path_factory.mktemp("gfl")
    _, checkpoint = models.save(folder, settings, theirs, tuple(f"class{i}" for i in range(CLASSES)))
    ours, record = load_mmdet_gfl(Path(checkpoint))
    assert record.model.backbone == f"resnet{request.param}" and record.class_names is not None
    assert record.class_names[79] == "class79"
    batch = collate([sample(i, size) for i, size in enumerate(SIZES)])
    assert batch.images.shape == (4, 3, 256, 320)
    normalised = theirs.data_preprocessor({"inputs": list(batch.images.flip(1)), "data_samples": None})["inputs"]
    return Pair(f"gfl-r{request.param}", ours, theirs, batch, normalised)


def metas(targets: list[Target]) -> list[dict[str, Any]]:
    """What mmdet's pipeline knows about the images."""
    return [
        {
            "img_shape": target.size,
            "pad_shape": tuple(-(-side // 32) * 32 for side in target.size),
            "ori_shape": target.original_size,
            "scale_factor": (
                target.size[1] / target.original_size[1],
                target.size[0] / target.original_size[0],
            ),
        }
        for target in targets
    ]


def test_normalised_images(pair: Pair) -> None:
    ours = (pair.batch.images - pair.ours.mean) / pair.ours.std
    same(pair.name, "normalised image", ours, pair.normalised)
    # mmdet pads after normalisation: padding differs by the rounding of the mean colour, images do not.
    images = [image[:, :h, :w].flip(0) for image, (h, w) in zip(pair.batch.images, SIZES, strict=True)]
    samples = [DetDataSample(metainfo=meta) for meta in metas(pair.batch.targets)]
    padded = pair.theirs.data_preprocessor({"inputs": images, "data_samples": samples})["inputs"]
    for i, (h, w) in enumerate(SIZES):
        same(pair.name, "normalised image", ours[i, :, :h, :w], padded[i, :, :h, :w])
    same(pair.name, "padding", ours, padded, tolerance=0.0083)


@torch.no_grad()
def test_features_and_head(pair: Pair) -> None:
    ours = pair.ours.features(pair.batch.images)
    theirs = pair.theirs.extract_feat(pair.normalised)
    assert len(ours) == len(theirs) == 5
    for level, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        assert 0.1 < float(b.std()) < 10, "activations of ordinary size"
        same(pair.name, f"features P{level + 3}", a, b)
    prediction = pair.ours.predict(ours)
    logits, distribution = pair.theirs.bbox_head(theirs)
    for ours_level, theirs_level in zip(prediction.logits, logits, strict=True):
        same(pair.name, "logits", ours_level, theirs_level)
    for ours_level, theirs_level in zip(prediction.distribution, distribution, strict=True):
        same(pair.name, "distribution logits", ours_level, theirs_level)


@torch.no_grad()
def test_detections(pair: Pair) -> None:
    """Decoding, the selection of 1000 pairs a level, clipping, rescaling and NMS; each from its own activations."""
    targets = pair.batch.targets
    ours = pair.ours.decode(pair.ours(pair.batch.images), pair.batch.sizes)
    features = pair.theirs.extract_feat(pair.normalised)
    samples = [DetDataSample(metainfo=meta) for meta in metas(targets)]
    theirs = pair.theirs.bbox_head.predict(features, samples, rescale=True)
    scores = pair.theirs.bbox_head(features)[0][0].sigmoid()
    assert int((scores[0] > 0.05).sum()) > 1000, "the limit of pairs a level takes part"
    for found, expected, target in zip(ours, theirs, targets, strict=True):
        assert len(found.scores) == 100
        assert found.labels.tolist() == expected.labels.tolist()
        same(pair.name, "scores", found.scores, expected.scores)
        # A side is up to 16 strides of 128 pixels away, so 1e-5 of a logit is worth more than 1e-4 of a pixel.
        sides = torch.tensor(target.original_size).flip(0).repeat(2)
        same(pair.name, "boxes, shares of the image's sides", found.boxes / sides, expected.bboxes / sides)


@torch.no_grad()
def test_detections_of_the_same_logits(pair: Pair) -> None:
    """Compare without the rounding of the network: pixels."""
    targets = pair.batch.targets
    features = pair.theirs.extract_feat(pair.normalised)
    logits, distribution = pair.theirs.bbox_head(features)
    prediction = DensePrediction(list(logits), list(distribution), pair.ours.strides)
    ours = pair.ours.decode(prediction, pair.batch.sizes)
    theirs = pair.theirs.bbox_head.predict_by_feat(logits, distribution, batch_img_metas=metas(targets), rescale=True)
    for found, expected in zip(ours, theirs, strict=True):
        assert found.labels.tolist() == expected.labels.tolist()
        same(pair.name, "scores of the same logits", found.scores, expected.scores)
        same(pair.name, "boxes of the same logits, pixels of the file", found.boxes, expected.bboxes)


def test_losses_and_gradients(pair: Pair) -> None:
    """Compare from the pixels on, each with its own activations."""
    with torch.no_grad():
        prediction = pair.ours(pair.batch.images)
        theirs = pair.theirs.bbox_head(pair.theirs.extract_feat(pair.normalised))
    positives = compare_losses(pair, prediction, theirs, pair.batch.targets)
    assert (positives[:3] > 5).all()


def test_losses_on_every_level(pair: Pair) -> None:
    """Objects as large as P7's anchors need larger images; random outputs of the head stand for the network."""
    targets = [sample(i, size)[1] for i, size in enumerate([(1024, 1211), (900, 1280), (64, 64)])]
    for target, box in zip(targets, [(8.2, 5.4, 1203.1, 1017.8), (3.3, 40.9, 1271.6, 897.5)], strict=False):
        target.boxes[0], target.ignore[0] = torch.tensor(box), False
    generator = torch.Generator().manual_seed(0)
    grids = [(1024 // s, 1280 // s) for s in models.STRIDES]
    logits = [torch.randn(3, CLASSES, h, w, generator=generator) - 4 for h, w in grids]
    distribution = [torch.randn(3, 68, h, w, generator=generator) * 2 for h, w in grids]
    prediction = DensePrediction(logits, distribution, pair.ours.strides)
    positives = compare_losses(pair, prediction, (logits, distribution), targets)
    assert (positives > 0).all(), "every level has positives"


def compare_losses(
    pair: Pair, prediction: DensePrediction, theirs: tuple[list[Tensor], list[Tensor]], targets: list[Target]
) -> Tensor:
    """Losses of every level and their gradients. Crowd boxes are `gt_instances_ignore` there. Returns the positives of
    the levels."""
    theirs_in = [x.detach().clone().requires_grad_() for x in (*theirs[0], *theirs[1])]
    instances, crowds = ground_truth(targets)
    expected = pair.theirs.bbox_head.loss_by_feat(theirs_in[:5], theirs_in[5:], instances, metas(targets), crowds)
    ours_in = [x.detach().clone().requires_grad_() for x in (*prediction.logits, *prediction.distribution)]
    prediction = DensePrediction(ours_in[:5], ours_in[5:], prediction.strides)
    assigned = pair.ours.assign(prediction, targets)
    ours = pair.ours.loss_by_level(prediction, assigned)
    assert set(ours) == set(expected) == {"loss_cls", "loss_bbox", "loss_dfl"}
    for name, values in expected.items():
        same(pair.name, name, ours[name], torch.stack([torch.as_tensor(value) for value in values]))
    sum(value.sum() for value in ours.values()).backward()
    sum(sum(values) for values in expected.values()).backward()
    for mine, their in zip(ours_in, theirs_in, strict=True):
        largest = their.grad.abs().max().clamp(min=1e-12)
        same(pair.name, "gradients, shares of the largest", mine.grad / largest, their.grad / largest)
    return assigned.level_positives


def ground_truth(targets: list[Target]) -> tuple[list[InstanceData], list[InstanceData]]:
    """Ground truth as mmdet has it: objects, and crowd boxes."""
    return (
        [InstanceData(bboxes=t.boxes[~t.ignore], labels=t.labels[~t.ignore]) for t in targets],
        [InstanceData(bboxes=t.boxes[t.ignore]) for t in targets],
    )


@torch.no_grad()
def test_assignment(pair: Pair) -> None:
    """ATSS: the same labels, weights and boxes at every location; the empty image is all negative."""
    targets = pair.batch.targets
    head, sizes = pair.theirs.bbox_head, [(256 // s, -(-320 // s)) for s in models.STRIDES]
    anchors, flags = head.get_anchors(sizes, metas(targets), device="cpu")
    instances, _ = ground_truth(targets)
    _, labels, weights, boxes, _, positives = head.get_targets(anchors, flags, instances, metas(targets))
    ours = pair.ours.assign(pair.ours(pair.batch.images), targets)
    index = ours.assignment.gt_index
    image = torch.arange(len(targets))[:, None].expand_as(index)
    positive = index >= 0
    ours_labels = torch.where(positive, ours.labels[image, index.clamp(min=0)], CLASSES)
    assert torch.equal(ours_labels, torch.cat(labels, 1))
    assert torch.equal(ours.assignment.valid.float(), torch.cat(weights, 1))
    same(
        pair.name,
        "assigned boxes",
        ours.boxes[image, index.clamp(min=0)][positive],
        torch.cat(boxes, 1)[positive],
        tolerance=0,
    )
    assert float(ours.avg_factor) == positives
    assert not positive[2].any() and positive.sum() > 100
