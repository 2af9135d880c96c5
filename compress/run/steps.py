"""Every step from a picture's file to its boxes, taken twice: as training measures a student, and as its files do.

Steps, in their order:

    pixels        the file decoded, upright, RGB
    canvas        the picture resized and laid on the network's input
    network       scores and boxes of all places, before any is chosen
    suppression   what is chosen of them, in pixels of the file

The first one that differs is where a deployed model stops being the one that was trained. Both sides read pictures with
one function, so pixels and canvases are equal to the bit; network and suppression within a tolerance.

    found = first_difference(detector, val, (128, 128), runner, varied_pictures(val))
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from compress.data.batch import ImageSize, collate
from compress.data.coco import CocoDetection
from compress.detectors.base import Detector
from compress.export.deployable import TorchRunner
from deploy.core.boxes import pairwise_iou
from deploy.core.card import ModelCard
from deploy.core.precisions import PRECISIONS
from deploy.runtimes.base import DetectionBatch
from deploy.validate import detect

Step = Literal["pixels", "canvas", "network", "suppression"]
STEPS: tuple[Step, ...] = ("pixels", "canvas", "network", "suppression")
PICTURES = 16
"""Pictures that are compared step by step, at most."""
SUPPRESSION_TOLERANCE = 0.02
"""Share of the detections of a picture, weighted by score, that may lack a partner: overlaps within rounding of the
threshold may fall on either side, because training suppresses in pixels of the file, a file in those of its canvas."""
PARTNER_IOU = 0.9
SLIVER = 0.1
"""Pixels; thinner boxes, of models that have hardly learned, are empty or not by rounding, and are not compared."""


@dataclass(frozen=True)
class Difference:
    """What differs first. images: ids and files of the pictures where this step does. what: of the first, in words."""

    step: Step
    what: str
    images: list[tuple[int, str]]

    def __str__(self) -> str:
        identifier, file = self.images[0]
        more = f", and {len(self.images) - 1} more" if len(self.images) > 1 else ""
        return f"{self.step}: {self.what} (image {identifier}, {file}{more})"


@dataclass(frozen=True)
class Found:
    """Detections of a picture that are no slivers. boxes: float [n, 4] xyxy pixels of the file; scores [n];
    category_ids: int [n]."""

    boxes: np.ndarray
    scores: np.ndarray
    category_ids: np.ndarray

    @classmethod
    def of(cls, boxes: np.ndarray, scores: np.ndarray, category_ids: np.ndarray, least: float = SLIVER) -> Found:
        """Keep those of which width and height are above `least` pixels."""
        kept = (boxes[:, 2:] - boxes[:, :2] > least).all(1)
        return cls(boxes[kept], scores[kept], category_ids[kept])


@dataclass(frozen=True)
class Trace:
    """A picture after every step.

    pixels: uint8 [h, w, 3]. canvas: uint8 [3, H, W]. area: (height, width) of the picture on it.
    scores: float [A, K]; boxes: float [A, 4] xyxy pixels of the canvas.
    """

    pixels: np.ndarray
    canvas: np.ndarray
    area: tuple[int, int]
    scores: np.ndarray
    boxes: np.ndarray
    found: Found


def varied_pictures(val: CocoDetection, most: int = PICTURES) -> list[int]:
    """Indices of the pictures that differ most in size and kind of file: one after the other the farthest from those
    that were chosen, by the logarithms of its sides; of equal sizes spread over the set."""
    sides = np.log(np.asarray(val.sizes, dtype=float))  # [n, 2]
    kinds = np.unique([val.name(index).rpartition(".")[2].lower() for index in range(len(val))], return_inverse=True)[1]
    order = np.random.default_rng(0).permutation(len(val))
    chosen: list[int] = [int(order[0])]
    distance = np.full(len(val), np.inf)
    while len(chosen) < min(most, len(val)):
        last = chosen[-1]
        distance = np.minimum(distance, np.abs(sides - sides[last]).sum(1) + (kinds != kinds[last]))
        distance[chosen] = -1
        chosen.append(int(order[np.argmax(distance[order])]))
    return chosen


def first_difference(
    detector: Detector, val: CocoDetection, canvas: tuple[int, int], runner: TorchRunner, indices: Sequence[int]
) -> Difference | None:
    """Compare the two paths on some pictures; None where they agree.

    Args:
        detector: the student as training has it, in eval mode, on the runner's device.
        val: validation images, as training's evaluation reads them. canvas: (height, width) that it lays them on.
        runner: the same student as it is deployed; its thresholds hold on both sides.
        indices: of pictures in `val`.
    """
    differing: dict[Step, list[tuple[int, str]]] = {step: [] for step in STEPS}
    words: dict[Step, str] = {}
    image_ids = val.image_ids
    for index in indices:
        compared = compare(
            in_training(detector, val, index, canvas, runner.card), in_deployment(runner, val, index), runner.card
        )
        if compared is not None:
            step, what = compared
            words.setdefault(step, what)
            differing[step].append((image_ids[index], val.name(index)))
    for step in STEPS:
        if differing[step]:
            return Difference(step, words[step], differing[step])
    return None


@torch.no_grad()
def in_training(detector: Detector, val: CocoDetection, index: int, canvas: tuple[int, int], card: ModelCard) -> Trace:
    """Take the steps of training's evaluation, with the thresholds of `card`, of which a recipe may have its own.

    One known difference is taken out: before the suppression training clips boxes to the picture, a file to its canvas,
    which is all that it knows.
    """
    batch = collate([val[index]], canvas)
    prediction = detector(batch.images.to(detector.mean.device))
    dense = prediction.float()
    scores = dense.scores()[0]
    top = scores.flatten().topk(min(card.candidates + 1, scores.numel())).values
    beyond = float(top[-1]) if len(top) > card.candidates else 0.0
    target = batch.targets[0]
    decoded = detector.decode(
        prediction,
        [_clipped_to_canvas(target.image_size, canvas)],
        score_threshold=max(card.score_threshold, beyond),
        nms_threshold=card.nms_threshold,
        max_detections=card.candidates,  # of which those without an area leave, and the best stay
    )[0]
    height, width = target.original_size
    ids = np.asarray(val.category_ids)[decoded.labels.cpu().numpy()]
    there = Found.of(decoded.boxes.cpu().numpy(), decoded.scores.cpu().numpy(), ids, least=0.0)
    boxes = np.clip(there.boxes, 0, (width, height, width, height))[: card.max_detections]
    return Trace(
        pixels=val.image(index).permute(1, 2, 0).numpy(),
        canvas=batch.images[0].numpy(),
        area=target.size,
        scores=scores.cpu().numpy(),
        boxes=detector.decode_boxes(dense)[0].float().cpu().numpy(),
        found=Found.of(boxes, there.scores[: card.max_detections], there.category_ids[: card.max_detections]),
    )


@torch.no_grad()
def in_deployment(runner: TorchRunner, val: CocoDetection, index: int) -> Trace:
    """Take the steps of `deploy.validate`: what it hands to a runner is recorded, not done again."""
    path, recorder = val.path(index), _Recorder(runner)
    outcome = detect.detect_all({runner.card.name: recorder}, {index: path}, 1)[runner.card.name]
    canvas, (pixels, fitted) = recorder.canvas, detect.prepare(path, runner.card)
    scale = fitted.scales[0]
    scores, boxes = runner.module.dense(torch.from_numpy(canvas[None]).to(runner.device))
    found = outcome.detections[index]
    ids = np.asarray(found.category_ids)[found.labels]
    return Trace(
        pixels=pixels,
        canvas=canvas,
        area=(round(pixels.shape[0] * scale[1]), round(pixels.shape[1] * scale[0])),
        scores=scores[0].cpu().numpy(),
        boxes=boxes[0].cpu().numpy(),
        found=Found.of(found.boxes, found.scores, ids),
    )


def compare(training: Trace, deployment: Trace, card: ModelCard) -> tuple[Step, str] | None:
    """Name the first step after which the two differ, and say how."""
    differences: tuple[tuple[Step, str | None], ...] = (
        ("pixels", _of_pixels(training.pixels, deployment.pixels)),
        ("canvas", _of_canvases(training, deployment)),
        ("network", _of_networks(training, deployment, card)),
        ("suppression", _of_detections(training.found, deployment.found)),
    )
    return next(((step, what) for step, what in differences if what is not None), None)


def unmatched_share(left: Found, right: Found) -> float:
    """Share of the detections of both sides, weighted by score, without a partner of the same category, with an IoU of
    0.9 or more and nearly the same score: 0 where the sides agree, 1 where they have nothing in common."""
    total = float(left.scores.sum() + right.scores.sum())
    if not total:
        return 0.0
    possible = pairwise_iou(left.boxes, right.boxes) >= PARTNER_IOU
    possible &= left.category_ids[:, None] == right.category_ids[None]
    possible &= np.abs(left.scores[:, None] - right.scores[None]) <= PRECISIONS["fp32"].score_tolerance
    return float(left.scores[~possible.any(1)].sum() + right.scores[~possible.any(0)].sum()) / total


# --- details --------------------------------------------------------------------------------------------


class _Recorder:
    """A runner that keeps the canvas of the one picture that it is given."""

    def __init__(self, runner: TorchRunner) -> None:
        self._runner = runner
        self.card, self.backend, self.on_cpu = runner.card, runner.backend, runner.on_cpu
        self.canvas = np.empty(0, np.uint8)

    def __call__(self, images: np.ndarray) -> DetectionBatch:
        self.canvas = images[0].copy()
        return self._runner(images)


def _clipped_to_canvas(size: ImageSize, canvas: tuple[int, int]) -> ImageSize:
    """The same scale from network to file, with an area as large as the canvas."""
    scales = (original / side for original, side in zip(size.original, size.network, strict=True))
    height, width = (scale * side for scale, side in zip(scales, canvas, strict=True))
    return ImageSize(canvas, (height, width))  # type: ignore[arg-type]  # of which only the ratio counts


def _of_pixels(training: np.ndarray, deployment: np.ndarray) -> str | None:
    if np.array_equal(training, deployment):
        return None
    if training.shape == deployment.shape and np.array_equal(training, deployment[..., ::-1]):
        return "the channels are in another order"
    for flipped, word in ((deployment, "turned"), (deployment[:, ::-1], "mirrored")):
        for turns in range(4):
            turned = np.rot90(flipped, turns)
            if turned.shape == training.shape and np.array_equal(training, turned):
                return f"the picture is {word}, {_size(deployment)} instead of {_size(training)} pixels"
    if training.shape != deployment.shape:
        return f"{_size(deployment)} instead of {_size(training)} pixels"
    return _levels(training, deployment)


def _of_canvases(training: Trace, deployment: Trace) -> str | None:
    a, b = training.canvas, deployment.canvas
    if np.array_equal(a, b):
        return None
    if a.shape != b.shape:
        return f"its size is {b.shape[1]}x{b.shape[2]} (height x width), in training {a.shape[1]}x{a.shape[2]}"
    (height, width), other = training.area, deployment.area
    if training.area != other:
        return f"the picture is resized to {other[0]}x{other[1]} (height x width), in training to {height}x{width}"
    inside, found = a[:, :height, :width], b[:, :height, :width]
    if np.array_equal(inside, found):
        return f"the padding differs: {_levels(a, b)}"
    for down, across in ((y, x) for y in range(-2, 3) for x in range(-2, 3) if (y, x) != (0, 0)):
        shifted = np.roll(b, (-down, -across), (1, 2))[:, 2 : height - 2, 2 : width - 2]
        if shifted.size and np.array_equal(a[:, 2 : height - 2, 2 : width - 2], shifted):
            return f"the place of the picture: {across} pixels to the right and {down} down of that in training"
    if np.array_equal(inside, found[::-1]):
        return "the channels are in another order"
    return f"the resized picture, by another filter or in another place: {_levels(inside, found)}"


def _of_networks(training: Trace, deployment: Trace, card: ModelCard) -> str | None:
    if training.scores.shape != deployment.scores.shape:
        return f"{list(deployment.scores.shape)} places and classes instead of {list(training.scores.shape)}"
    kind = PRECISIONS["fp32"]
    score = float(np.abs(training.scores - deployment.scores).max())
    if not score <= kind.score_tolerance:
        return f"scores of places differ by up to {score:.2g}"
    height, width = card.input_size
    seen = np.maximum(training.scores, deployment.scores).max(1) > card.score_threshold
    clipped = np.clip(training.boxes, 0, (width, height, width, height))
    box = float(np.abs(clipped - deployment.boxes)[seen].max(initial=0))
    if not box <= kind.box_tolerance_on(card.input_size):
        return f"boxes of places differ by up to {box:.2g} pixels"
    return None


def _of_detections(training: Found, deployment: Found) -> str | None:
    share = unmatched_share(training, deployment)
    if share <= SUPPRESSION_TOLERANCE:
        return None
    return f"of {len(training.scores)} detections in training and {len(deployment.scores)} here, {share:.0%} differ"


def _levels(a: np.ndarray, b: np.ndarray) -> str:
    apart = np.abs(a.astype(np.int16) - b)
    return f"{(apart > 0).mean():.1%} of the values differ, by up to {apart.max()} of 255 levels"


def _size(pixels: np.ndarray) -> str:
    return f"{pixels.shape[1]}x{pixels.shape[0]}"
