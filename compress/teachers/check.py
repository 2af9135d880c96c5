"""Checks of a teacher before a student learns from it: its classes, what it does to images, its mAP.

`check_teacher` says all that and stops a run whose teacher is too weak. The parts are functions of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch.distributed as dist

from compress.data.batch import pad_images
from compress.data.coco import CocoDetection
from compress.detectors.base import MEAN, STD, ImageDetections, gather
from compress.manifest import Manifest
from compress.teachers.base import BoxTeacher, DetectorTeacher, Preprocessing, Sample, View, size_of_training
from deploy.core.card import SCORE_THRESHOLD
from deploy.core.detection_table import DetectionTable
from deploy.core.errors import UserError
from deploy.core.shown import some
from deploy.validate.coco import DETECTIONS, CocoMetrics, evaluate_coco, load_annotations
from deploy.validate.ground_truth import GroundTruth
from deploy.validate.operating_point import operating_point

TOLERANCE = 0.5
"""Means and deviations of pixels that differ by less are the same: people round them."""
BATCH = 8


def check_teacher(
    teacher: BoxTeacher,
    labels: Sequence[int],
    val: CocoDetection,
    manifest: Manifest,
    *,
    stage: str,
    identity: dict[str, Any],
    shown: Preprocessing,
    min_map: float,
    report: Callable[[str], object],
    write: bool,
    max_detections: int = DETECTIONS,
    canvas: tuple[int, int] | None = None,
) -> dict[str, Any] | None:
    """Report a teacher's classes and preprocessing, measure its mAP, and stop a run whose teacher is too weak.

    Args:
        labels: for each class of the teacher its label in `val`, -1 for none.
        stage: name of the manifest's row, so that a finished check is not repeated.
        identity: of the validation images, JSON-able.
        shown: how the images are prepared that the teacher is shown.
        min_map: mAP that it must reach, percent; 0: any. Where `max_detections` is above 100, the mAP that counts so
            many.
        report: prints a line.
        write: whether this process writes the manifest, as `Manifest.stage` has it.
        max_detections: of a class in an image that count; the student's files give so many.
        canvas: (height, width) on which a teacher is measured that sees what the student sees, as the student is; None:
            each image alone, padded to a multiple of 32.

    Returns:
        The metrics, as `CocoMetrics.to_dict` gives them; None for results that do not cover the validation images and
        for a teacher of other classes (whose features may be worth something).

    Raises:
        UserError: its mAP is below `min_map`, or cannot be measured and `min_map` is not 0.
    """
    for line in (*class_lines(teacher, labels, val.categories), *preprocessing_lines(teacher, shown)):
        report(line)
    try:
        if all(label < 0 for label in labels):
            raise UserError("none of its classes is one of the data's")
        coverage = teacher.covers(val.image_ids, [val.name(index) for index in range(len(val))], val.folder)
    except UserError as error:
        if min_map > 0:
            raise UserError(f"min_map is {min_map:g} and the teacher cannot be measured: {error}") from None
        report(f"teacher {teacher.file}: not measured: {error}")
        return None
    if coverage is not None:
        report(f"teacher: {coverage}")

    def work() -> dict[str, Any]:
        return {"metrics": measure(teacher, labels, val, max_detections, canvas).to_dict()}

    inputs: dict[str, Any] = {
        "data": identity,
        "sha256": teacher.sha256,
        "settings": dict(teacher.settings),
        "labels": list(labels),
    }
    inputs |= limit_input(max_detections)
    metrics: dict[str, Any] = manifest.stage(stage, inputs, [], work, write=write)["metrics"]
    known = len({label for label in labels if label >= 0})
    note = "" if known == len(val.categories) else f", over the {known} classes that it looks for"
    found = CocoMetrics.from_dict(metrics)
    report(f"teacher {teacher.file}: mAP {map_text(found)} on the validation images{note}")
    if found.best_map < min_map:
        raise UserError(
            f"min_map is {min_map:g} and the teacher {teacher.file} reaches {map_text(found)} mAP on "
            f"{val.annotations}: {_remedy(val, max_detections)}"
        )
    return metrics


def limit_input(max_detections: int) -> dict[str, int]:
    """The input of a check that more than COCO's 100 detections make."""
    return {"max_detections": max_detections} if max_detections > DETECTIONS else {}


def map_text(metrics: CocoMetrics) -> str:
    """Write the mAP, and where it was asked for that with more than 100 detections of a class in an image."""
    if metrics.map_at_max is None:
        return f"{metrics.map:.2f}"
    return f"{metrics.map:.2f} ({metrics.map_at_max:.2f} with {metrics.max_detections} detections)"


def resized_images(short: int, long: int) -> Preprocessing:
    """Preparation of images that are resized to these limits for a model of this program."""
    return Preprocessing(f"short side {short}, long side {long}", "RGB", MEAN, STD)


def class_lines(teacher: BoxTeacher, labels: Sequence[int], categories: Sequence[str]) -> list[str]:
    """Lines that say which class of the teacher is which of the data, and what has no counterpart."""
    names = teacher.class_names or ()
    start = f"teacher {teacher.file}: "
    if list(names) == list(categories) and list(labels) == list(range(len(categories))):
        return [f"{start}all {len(categories)} classes, in the same order"]
    pairs = [(name, categories[label]) for name, label in zip(names, labels, strict=True) if label >= 0]
    same = [category for name, category in pairs if name == category]
    lines = [f"{start}{len(same)} classes matched by name: {some(same)}"] if same else []
    renamed = [f"{name} → {category}" for name, category in pairs if name != category]
    if renamed:
        lines.append(f"{start}classes by the class map: {some(renamed)}")
    dropped = [name for name, label in zip(names, labels, strict=True) if label < 0]
    if dropped:
        lines.append(f"{start}left out: {some(dropped)}")
    unknown = [name for label, name in enumerate(categories) if label not in labels]
    if unknown:
        lines.append(f"{start}it does not look for: {some(unknown)}")
    return lines


def preprocessing_lines(teacher: BoxTeacher, shown: Preprocessing) -> list[str]:
    """Lines that say what the teacher does to images; a warning where those that it gets are prepared otherwise."""
    own = teacher.preprocessing
    if own is None:
        return []
    if teacher.view is View.RESIZED:
        own = replace(own, size=shown.size)
    differences = [
        name
        for name, differs in (
            ("size", own.size != shown.size),
            ("order of channels", own.order != shown.order),
            ("mean", _differ(own, shown, "mean")),
            ("deviation", _differ(own, shown, "std")),
        )
        if differs
    ]
    lines = [f"teacher {teacher.file} sees images: {described(own)}"]
    trained = size_of_training(teacher)
    if trained is not None and (at := resized_images(*trained).size) != shown.size:
        lines.append(
            f"warning: teacher {teacher.file} was trained on images of another size ({at}) than it is shown here "
            f"({shown.size}); it finds most at its own"
        )
    if differences:
        lines.append(
            f"warning: that differs in {', '.join(differences)} from what it is shown here ({described(shown)}): "
            "right only if the teacher was trained so"
        )
    return lines


def measure(
    teacher: BoxTeacher,
    labels: Sequence[int],
    val: CocoDetection,
    max_detections: int = DETECTIONS,
    canvas: tuple[int, int] | None = None,
) -> CocoMetrics:
    """COCO metrics (percent) on the classes that the teacher looks for. With several processes each takes its share of
    the images, and all get the metrics. canvas: see `check_teacher`."""
    several = dist.is_available() and dist.is_initialized()
    rank, world = (dist.get_rank(), dist.get_world_size()) if several else (0, 1)
    share = range(rank, len(val), world)
    tables: list[DetectionTable] = []
    for first in range(0, len(share), BATCH):
        samples = [_sample(val, index, teacher.view, canvas) for index in share[first : first + BATCH]]
        for sample, found in zip(samples, _detect(teacher, samples, max_detections), strict=True):
            found.labels = found.labels.new_tensor(labels)[found.labels]
            found.boxes, found.scores, found.labels = (
                values[found.labels >= 0] for values in (found.boxes, found.scores, found.labels)
            )
            tables.append(found.to_table(sample.image_id, val.category_ids))
    table = gather(tables)
    category_ids = {val.category_ids[label] for label in labels if label >= 0}
    content = load_annotations(val.annotations)
    document = {
        "images": content["images"],
        "categories": [row for row in content["categories"] if row["id"] in category_ids],
        "annotations": [row for row in content["annotations"] if row["category_id"] in category_ids],
    }
    truth = GroundTruth.of(document)
    point = operating_point(truth, table, sorted(category_ids))
    return replace(evaluate_coco(truth, table, max_detections=max_detections), operating_point=point)


def described(preprocessing: Preprocessing) -> str:
    """Write a preprocessing in one line."""
    parts = [preprocessing.size, preprocessing.order]
    for name, values in (("mean", preprocessing.mean), ("deviation", preprocessing.std)):
        if values is not None:
            parts.append(f"{name} {' '.join(f'{value:.4g}' for value in values)}")
    return ", ".join(parts)


# --- details --------------------------------------------------------------------------------------------


def _sample(val: CocoDetection, index: int, view: View, canvas: tuple[int, int] | None) -> Sample:
    image, target = val[index]
    if canvas is not None:
        image = pad_images([image], canvas)[0]
    return Sample(
        image if view is View.RESIZED else None,
        target.image_id,
        target.image_size,
        val.name(index),
        val.image(index) if view is View.ORIGINAL else None,
    )


def _detect(teacher: BoxTeacher, samples: Sequence[Sample], max_detections: int) -> list[ImageDetections]:
    if isinstance(teacher, DetectorTeacher) and max_detections > DETECTIONS:
        return teacher.detect(samples, score_threshold=SCORE_THRESHOLD, max_detections=max_detections)
    return teacher.detect(samples, score_threshold=SCORE_THRESHOLD)


def _remedy(val: CocoDetection, max_detections: int) -> str:
    """Say what to do about a teacher that is too weak."""
    most = GroundTruth.of(load_annotations(val.annotations)).most_of_a_class()
    if most > max(max_detections, DETECTIONS):
        return (
            f"an image there holds {most} objects of a class, more than count: raise deploy.max_detections, or take "
            "another one"
        )
    return "take another one, or check that its classes and images are these"


def _differ(own: Preprocessing, shown: Preprocessing, name: str) -> bool:
    shown_values, own_values = getattr(shown, name), getattr(own, name)
    if shown_values is None or own_values is None:
        return False
    if own.order != shown.order:
        own_values = own_values[::-1]
    return any(abs(a - b) > TOLERANCE for a, b in zip(shown_values, own_values, strict=True))
