"""A run folder with what a student, its teacher and files found on a few pictures, one for each reason to show it."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from deploy.core.detection_table import DetectionTable
from deploy.validate.kept import Kept, keep_detections, keep_labels
from tests.helpers.coco_sets import A, B, C, row, truth

IMAGES = 8


def keep_run(run: Path) -> Kept:
    """Image 0 is all wrong, 1 half right, 2 right with two objects, 3 right; the teacher alone sees more on 4, the file
    on 5; nothing is on 6 and 7."""
    boxes = [{"bbox": A, "image_id": i, "category_id": i % 2} for i in range(6)]
    boxes += [{"bbox": B, "image_id": i} for i in (0, 1, 2)]
    document = truth(*boxes, images=range(IMAGES), categories=range(2))
    right = [row(A, 0.9, i, i % 2) for i in range(1, 6)] + [row(B, 0.8, 2)]
    student = [*right, row(C, 0.7, 0), row(C, 0.1, 3)]  # the last is below the operating point
    folder = run / "evaluation"
    keep_labels(folder, document, run)
    tables = {
        "student": student,
        "student.safetensors": student,
        "teacher": [*student, row(C, 0.9, 4), row(B, 0.4, 5)],
        "student.int8.onnx": [*student, row(C, 0.6, 5)],
        "student.onnx": student,
    }
    for name, rows in tables.items():
        keep_detections(folder, name, DetectionTable.from_rows(rows))
    for i in range(IMAGES):
        Image.linear_gradient("L").resize((80, 60)).rotate(45 * i).convert("RGB").save(run / f"{i}.png")
    return Kept(folder)


FILES = ("student.safetensors", "student.onnx", "student.int8.onnx")
SHOWN = {"student": 0.5, "teacher": 0.5}
