"""A detector cut to a budget: what pruning needs to know of images, files and machine, and what is kept of it.

smaller, result = prune_detector(detector, record, PruningPlan(...), print)
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from compress.config.deploy import Deploy
from compress.config.prune import Cut
from compress.console import progress
from compress.data.batch import collate
from compress.data.coco import CocoDetection
from compress.data.transforms import eval_transform
from compress.detectors.base import Detector
from compress.detectors.checkpoints import ModelRecord
from compress.detectors.weights import state_sha256
from compress.prune.graph import PruningGraph, pruning_graph
from compress.prune.importance import importances
from compress.prune.order import Drops
from compress.prune.search import Means, Pruned, check_whole, prune
from compress.prune.sensitivity import Sensitivity, sensitivity
from compress.run.latency_search import LatencyPlan, latency_result, latency_search
from compress.training.evaluate import detect
from compress.training.learner import total_loss
from compress.versions import versions
from deploy.core.detection_table import DetectionTable
from deploy.core.errors import UserError, first_line
from deploy.core.image_folder import spread
from deploy.core.shown import some
from deploy.validate.coco import evaluate_coco, load_annotations
from deploy.validate.ground_truth import GroundTruth

BATCH = 8
INSTEAD = {"importance": "group_norm", "shares": "uniform or global", "max_map_drop": "gflops or params"}
"""What does without labelled images."""


@dataclass(frozen=True)
class PruningPlan:
    """What a detector is cut to, and by what.

    settings: how much leaves it, and which channels.
    size: (height, width) of the canvas: GFLOPs, latency and mAP are of it.
    resize_short_long: limits of pictures on it, as in training's evaluation.
    images: labelled training images, whatever their transform; None: there are none.
    deploy: settings of the exported file whose latency counts.
    sensitivities: JSON file of what was measured so far, written after every layer, so that an interrupted measurement
        goes on.
    """

    settings: Cut
    size: tuple[int, int]
    resize_short_long: tuple[int, int]
    images: CocoDetection | None
    deploy: Deploy
    sensitivities: Path
    seed: int = 0
    device: str = "cpu"


def prune_detector(
    detector: Detector, record: ModelRecord, plan: PruningPlan, say: Callable[[str], None]
) -> tuple[Detector, dict[str, Any]]:
    """Cut a detector, which is not changed, to the budget of the plan.

    Args:
        record: of the detector's checkpoint.
        say: takes lines about what is being done.

    Returns the smaller detector, in eval mode on the CPU, its weights inherited, and JSON-able figures: `budget`,
    `asked`, `whole` and `found` (what was asked for, and its figure before and after: GFLOPs, millions of parameters,
    milliseconds or mAP), `rows` (`name`, `width` and what is `left` of each group of channels), `sensitivity` (`map`,
    `images` and `rows` of `name` and `points`, pairs of the share that stays and the mAP; None where it was not asked
    for), `latency` (what was measured for latency_ms; else None), `note` (a line, where much less is left than asked
    for; else None), `whole_layers` (names of groups that keep all channels, since without some of them the detector
    would compute something else).

    Raises UserError as `compress.prune.search.prune`, and for settings that need images without any.
    """
    settings = plan.settings
    check_whole(detector)
    _check_images(settings, plan.images, detector.num_classes, record.class_names)
    detector = _copied(detector).to(plan.device).eval()
    images = Images(plan) if settings.needs_images is not None else None
    measured: list[Sensitivity] = []

    def drops(graph: PruningGraph, scores: Mapping[str, Tensor]) -> Drops:
        assert images is not None
        measured.append(_sensitivity(detector, graph, scores, plan, images, say))
        return measured[0].drops

    means = Means(
        plan.size,
        losses=() if images is None else images,
        mean_ap=None if images is None else images.mean_ap,
        drops=drops,
    )
    found, latency = _prune(detector, record, plan, means, say)
    result = {
        "budget": settings.budget,
        "asked": getattr(settings, settings.budget),
        "whole": found.whole,
        "found": found.found,
        "rows": found.rows,
        "sensitivity": _figures(measured[0], images) if images is not None and measured else None,
        "latency": latency,
        "note": found.note,
        "whole_layers": list(found.whole_layers),
    }
    if found.whole_layers:
        say(
            f"note: {some(found.whole_layers)} keep all channels: without some of them the detector would compute "
            "something else"
        )
    if found.note is not None:
        say(f"note: {found.note}")
    return found.detector.cpu(), result


def measure_sensitivity(
    detector: Detector, record: ModelRecord, plan: PruningPlan, say: Callable[[str], None]
) -> dict[str, Any]:
    """Measure what each group of channels costs alone, and cut nothing: `sensitivity` of `prune_detector`, for a plan
    with `shares: sensitivity`. Arguments and errors as there."""
    settings = plan.settings
    check_whole(detector)
    _check_images(settings, plan.images, detector.num_classes, record.class_names)
    images = Images(plan)
    detector = _copied(detector).to(plan.device).eval()
    graph = pruning_graph(detector, settings.keep)
    scores = importances(graph, settings.importance, losses=images, seed=plan.seed)
    return _figures(_sensitivity(detector, graph, scores, plan, images, say), images)


class Images:
    """Training images, as many as the settings say, spread over all; kept in memory as the network sees them.

    Iterating gives a function from a detector to its scalar loss for each of them: what it trains on, in training mode,
    but for norms, which use their statistics and do not move them. What a loss draws by chance depends on the seed
    alone.
    """

    def __init__(self, plan: PruningPlan) -> None:
        assert plan.images is not None, "the caller checks"
        images = copy.copy(plan.images)
        images.transform = eval_transform(*plan.resize_short_long, plan.size)
        self._samples = [images[index] for index in spread(range(len(images)), plan.settings.images)]
        self._file, self._category_ids = images.annotations, images.category_ids
        self._truth = _truth(images.annotations, {target.image_id for _, target in self._samples})
        self._size, self._seed, self._device = plan.size, plan.seed, torch.device(plan.device)

    def __len__(self) -> int:
        return len(self._samples)

    def __iter__(self) -> Iterator[Callable[[Detector], Tensor]]:
        with progress("importances") as step:
            for number in range(len(self)):
                yield lambda detector, number=number: self._loss(detector, number)  # type: ignore[misc]
                step(number + 1, len(self))

    def need_objects(self) -> None:
        """Raise UserError where the images show no objects, so that there is no mAP on them."""
        if not self._truth.counts.any():
            raise UserError(
                f"prune.images: {len(self)} of {self._file} are looked at, and no box is on them; take more"
            )

    def mean_ap(self, detector: Detector) -> float:
        """mAP (percent) of a detector in eval mode on these images. Raises UserError where they show no objects."""
        self.need_objects()
        batches = (collate(self._samples[first : first + BATCH], self._size) for first in range(0, len(self), BATCH))
        found = DetectionTable.join(detect(detector, batches, self._category_ids, self._device))
        return evaluate_coco(self._truth, found).map

    def identity(self) -> dict[str, Any]:
        """What a mAP depends on besides the detector."""
        digest = hashlib.sha256()
        for image, target in self._samples:
            digest.update(f"{target.image_id} {tuple(image.shape)}".encode() + image.contiguous().numpy().tobytes())
        for column in (self._truth.images, self._truth.categories, self._truth.boxes, self._truth.crowd):
            digest.update(column.tobytes())
        return {"images": digest.hexdigest(), "size": self._size, "device": self._device.type}

    def _loss(self, detector: Detector, number: int) -> Tensor:
        batch = collate([self._samples[number]], self._size).to(self._device)
        on_gpu = self._device.type == "cuda"
        with _training(detector), torch.random.fork_rng(devices=[self._device] if on_gpu else []):
            torch.default_generator.manual_seed(self._seed)
            if on_gpu:
                torch.cuda.manual_seed(self._seed)
            prediction = detector(batch.images).float()
            return total_loss(detector.loss(prediction, detector.assign(prediction, batch.targets)))


# --- details --------------------------------------------------------------------------------------------


def _copied(detector: Detector) -> Detector:
    try:
        return copy.deepcopy(detector)
    except Exception as error:  # whatever a model of somebody's own holds: a lock, a file, a generator
        raise UserError(
            f"prune: {detector.family} cannot be copied ({first_line(error)}), so it cannot be pruned; give it what "
            "copy.deepcopy takes"
        ) from error


def _check_images(
    settings: Cut, images: CocoDetection | None, num_classes: int, class_names: tuple[str, ...] | None
) -> None:
    """Refuse settings that look at labels, where there are none or only those of other classes."""
    key = settings.needs_images
    if key is None:
        return
    value, instead = getattr(settings, key), INSTEAD[key]
    if images is None:
        raise UserError(
            f"prune.{key}: {value} needs labelled training images, and there are none; give some, or take {instead}"
        )
    if len(images.categories) != num_classes or class_names not in (None, images.categories):
        own = str(num_classes) if class_names is None else some(class_names)
        raise UserError(
            f"prune.{key}: {value} looks at labels, and the classes of {images.annotations} "
            f"({some(images.categories)}) are not the detector's ({own}); give the images that it was trained on, or "
            f"take {instead}"
        )


def _sensitivity(
    detector: Detector,
    graph: PruningGraph,
    scores: Mapping[str, Tensor],
    plan: PruningPlan,
    images: Images,
    say: Callable[[str], None],
) -> Sensitivity:
    say(f"sensitivity: mAP of {len(graph.groups)} groups of layers, each cut alone, on {len(images)} training images")
    with progress("sensitivity") as step:
        return sensitivity(
            graph,
            scores,
            detector,
            images.mean_ap,
            store=plan.sensitivities,
            identity=images.identity() | {"weights": state_sha256(detector), "versions": versions()},
            round_to=plan.settings.round_to,
            progress=step,
            say=say,
        )


def _figures(found: Sensitivity, images: Images) -> dict[str, Any]:
    return {"images": len(images), **found.to_dict()}


def _prune(
    detector: Detector, record: ModelRecord, plan: PruningPlan, means: Means, say: Callable[[str], None]
) -> tuple[Pruned, dict[str, Any] | None]:
    """The pruned detector, and for latency_ms what was measured."""
    settings = plan.settings
    if settings.latency_ms is None:
        return prune(detector, settings, means, seed=plan.seed), None
    files = [] if plan.images is None else [plan.images.path(index) for index in range(len(plan.images))]
    how = LatencyPlan(plan.size, plan.resize_short_long, files, plan.deploy, settings.precision, plan.seed)
    with latency_search(detector, record, how, say) as search:
        found = prune(detector, settings, replace(means, latency=search), seed=plan.seed)
        return found, latency_result(search, found.detector, settings.latency_ms, how)


def _truth(annotations: Path, image_ids: set[int]) -> GroundTruth:
    """The labels of some images of a COCO file."""
    document = dict(load_annotations(annotations))
    document["images"] = [row for row in document["images"] if row["id"] in image_ids]
    return GroundTruth.of(document)


@contextmanager
def _training(detector: Detector) -> Iterator[None]:
    """Training mode, without norms that look at the batch."""
    before = {module: module.training for module in detector.modules()}
    detector.train()
    for module in before:
        if isinstance(module, _BatchNorm):
            module.eval()
    try:
        yield
    finally:
        for module, training in before.items():
            module.training = training
