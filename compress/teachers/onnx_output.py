"""Boxes in what a foreign network gives: `boxes_of`, from an `OnnxOutput`, as arithmetic on arrays."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from compress.config.teacher import OnnxOutput
from compress.teachers.onnx_input import Placed


def output_names(how: OnnxOutput) -> dict[str, str]:
    """Names of the file's outputs by role: `boxes`, `scores`, `labels`, `objectness`, `count`, `combined`; those of a
    list in `combined` are `combined 1`, `combined 2` and so on."""
    roles = ("boxes", "scores", "labels", "objectness", "count")
    names = {role: name for role in roles if (name := getattr(how, role)) is not None}
    if isinstance(how.combined, tuple):
        return {f"combined {number}": name for number, name in enumerate(how.combined, start=1)} | names
    return names if how.combined is None else {"combined": how.combined} | names


def boxes_of(
    outputs: Mapping[str, np.ndarray], how: OnnxOutput, num_classes: int, placed: Placed
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Turn outputs into boxes float32 [n, 4] xyxy in pixels of the image, scores float32 [n], labels int64 [n]; the
    boxes are as the file has them, neither sorted nor clipped.

    Of scores a class, every class of a box is a detection of its own, as in the usual evaluation, unless
    `how.best_class_only`.

    Args:
        outputs: arrays by their role, see `output_names`.
        num_classes: labels with and without a meaning, but without that of `how.background`.

    Raises:
        ValueError: an array is not of the shape, or labels or scores are not of the range, that `how` says.
    """
    boxes, scores, labels = _parts(outputs, how, placed.canvas)
    if labels is None:
        if num_classes == 1 and how.background == "none" and scores.size == len(boxes):
            scores = scores.reshape(-1, 1)
        if scores.ndim != 2 or len(scores) != len(boxes):
            raise ValueError(
                f"gives {len(boxes)} boxes and scores of the shape {list(scores.shape)}; one score a box needs "
                "output.labels"
            )
        if how.background != "none":
            scores = scores[:, 1:] if how.background == "first" else scores[:, :-1]
        if scores.shape[1] != num_classes:
            beside = "" if how.background == "none" else " beside the background"
            raise ValueError(f"gives scores of {scores.shape[1]} classes{beside}, class_names has {num_classes}")
        if how.best_class_only:
            labels, scores = scores.argmax(1), scores.max(1)
        else:
            labels = np.tile(np.arange(num_classes), len(boxes))
            boxes, scores = np.repeat(boxes, num_classes, 0), scores.reshape(-1)
    else:
        labels = np.rint(labels).astype(np.int64) - (how.background == "first")
        real = (labels >= 0) if how.background == "first" else np.ones(len(labels), np.bool_)
        if how.background == "last":
            real = labels != num_classes
        boxes, scores, labels = boxes[real], scores[real], labels[real]
        if len(labels) and not 0 <= labels.min() <= labels.max() < num_classes:
            wrong = labels.min() if labels.min() < 0 else labels.max()
            raise ValueError(f"gives label {wrong + (how.background == 'first')}, class_names has {num_classes}")
    return _to_image(_corners(boxes.astype(np.float32), how.box_format), how, placed), scores, labels.astype(np.int64)


def on_canvas(boxes: np.ndarray, placed: Placed) -> np.ndarray:
    """Boxes [n, 4] xyxy in pixels of the image → pixels of the network's canvas."""
    return boxes * np.array(placed.scale * 2, np.float32) + np.array(placed.offset * 2, np.float32)


# --- details --------------------------------------------------------------------------------------------


def _parts(
    outputs: Mapping[str, np.ndarray], how: OnnxOutput, canvas: tuple[int, int]
) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """boxes [n, 4], scores [n] with labels [n], or scores [n, K] and None. Scores are float32 in 0..1."""
    if isinstance(how.combined, tuple):
        levels = [outputs[role] for role in output_names(how)]
        arrays = {"combined": np.concatenate([_level(*row, how, canvas) for row in enumerate(levels)])}
    else:
        arrays = {role: _unbatched(role, array) for role, array in outputs.items() if role != "count"}
    if "count" in outputs:
        count = int(np.asarray(outputs["count"]).reshape(-1)[0])
        arrays = {role: array[:count] for role, array in arrays.items()}
    if "combined" in arrays:
        boxes, scores, labels = _of_rows(arrays["combined"], how)
    else:
        boxes, scores, labels = _of_separate(arrays, how)
    if how.strides is not None:
        boxes = _decoded(boxes, how, canvas)
    return boxes, scores, labels


def _unbatched(role: str, array: np.ndarray) -> np.ndarray:
    """Drop a leading axis of 1, where there is one axis more than needed."""
    most = 1 if role == "labels" else 2
    while array.ndim > most and array.shape[0] == 1:
        array = array[0]
    if array.ndim > most or array.ndim == 0:
        raise ValueError(f"output {role} has the shape {list(array.shape)}, which is not one of boxes of one image")
    return array


def _of_rows(rows: np.ndarray, how: OnnxOutput) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    if how.transposed and not isinstance(how.combined, tuple):
        rows = rows.T
    one_score = how.columns in ("box_score_label", "box_label_score")
    if rows.ndim != 2 or rows.shape[1] < 5 or (one_score and rows.shape[1] != 6):
        raise ValueError(f"output combined has the shape {list(rows.shape)}, which does not fit {how.columns}")
    boxes, rest = rows[:, :4], rows[:, 4:]
    match how.columns:
        case "box_score_label":
            return boxes, _activated(rest[:, 0], how.activation), rest[:, 1]
        case "box_label_score":
            return boxes, _activated(rest[:, 1], how.activation), rest[:, 0]
        case "box_classes":
            return boxes, _activated(rest, how.activation), None
        case _:
            scores = _activated(rest, how.activation)
            return boxes, scores[:, :1] * scores[:, 1:], None


def _of_separate(arrays: Mapping[str, np.ndarray], how: OnnxOutput) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    boxes, labels = arrays["boxes"], arrays.get("labels")
    columns = 4 if "scores" in arrays else 5
    if boxes.ndim != 2 or boxes.shape[1] != columns:
        raise ValueError(f"output boxes has the shape {list(boxes.shape)}, not [n, {columns}]")
    scores = _activated(arrays["scores"] if "scores" in arrays else boxes[:, 4], how.activation)
    if "objectness" in arrays:
        objectness = arrays["objectness"].reshape(-1)
        if not len(objectness) == len(scores) == len(boxes):
            raise ValueError(f"gives {len(boxes)} boxes, {len(scores)} rows of scores and {len(objectness)} objectness")
        scores = scores * _activated(objectness, how.activation).reshape(-1, *(1,) * (scores.ndim - 1))
    if labels is not None:
        scores = scores.reshape(-1)
        if not len(scores) == len(labels) == len(boxes):
            raise ValueError(f"gives {len(boxes)} boxes, {len(scores)} scores and {len(labels)} labels")
    return boxes[:, :4], scores, labels


def _activated(scores: np.ndarray, activation: str) -> np.ndarray:
    scores = np.ascontiguousarray(scores, np.float32)
    if np.isnan(scores).any():
        raise ValueError("gives scores that are no numbers (NaN)")
    if activation == "sigmoid":
        return torch.from_numpy(scores).sigmoid().numpy()
    if activation == "softmax":
        return torch.from_numpy(scores).softmax(-1).numpy()
    if scores.size and not (scores.min() >= 0 and scores.max() <= 1):
        raise ValueError(
            f"gives scores from {scores.min():g} to {scores.max():g}, outside 0..1; set output.activation to sigmoid "
            "or softmax"
        )
    return scores


def _corners(boxes: np.ndarray, box_format: str) -> np.ndarray:
    a, b, c, d = boxes.T
    match box_format:
        case "cxcywh":
            corners = (a - c / 2, b - d / 2, a + c / 2, b + d / 2)
        case "xywh":
            corners = (a, b, a + c, b + d)
        case "yxyx":
            corners = (b, a, d, c)
        case _:
            corners = (a, b, c, d)
    return np.stack(corners, 1)


def _to_image(boxes: np.ndarray, how: OnnxOutput, placed: Placed) -> np.ndarray:
    """Corners on the canvas (in pixels, or shares of its sides) → pixels of the image; not clipped."""
    height, width = placed.canvas
    if how.box_units == "normalised":
        boxes = boxes * np.array([width, height, width, height], np.float32)
    (left, top), (sx, sy) = placed.offset, placed.scale
    moved = boxes - np.array([left, top, left, top], np.float32)
    return (moved / np.array([sx, sy, sx, sy], np.float32)).astype(np.float32)


# --- grids that the file does not decode ------------------------------------------------------------------


def _level(number: int, array: np.ndarray, how: OnnxOutput, canvas: tuple[int, int]) -> np.ndarray:
    """The output of a stride (from 0) as rows [A * H * W, C], anchor by anchor, then line by line. It may be so, with
    or without a batch axis of 1; or [1, A, H, W, C]; or [1, A * C, H, W]. With `transposed`, [C, A * H * W]."""
    name, (height, width), cells = f"combined {number + 1}", _sides(how, canvas)[number], _cells(how)
    shape = list(array.shape)
    if array.ndim == 5 and shape[:4] == [1, cells, height, width]:
        return array.reshape(-1, shape[4])
    if array.ndim == 4 and shape[0] == 1 and shape[2:] == [height, width] and shape[1] % cells == 0:
        return array.reshape(cells, -1, height * width).transpose(0, 2, 1).reshape(-1, shape[1] // cells)
    if array.ndim in (2, 3):
        rows = _unbatched(name, array)
        rows = rows.T if how.transposed else rows
        if len(rows) == cells * height * width:
            return rows
    raise ValueError(
        f"output {name} has the shape {shape}; its stride makes a grid of {height} x {width} with {cells} a cell: "
        f"[1, {cells * height * width}, C], [1, {cells}, {height}, {width}, C] or [1, {cells} * C, {height}, {width}]"
    )


def _decoded(boxes: np.ndarray, how: OnnxOutput, canvas: tuple[int, int]) -> np.ndarray:
    """Numbers of cells [n, 4] → centre and size in pixels of the canvas, float64.

    After the published arithmetic: YOLOX's `decode_outputs` without anchors, YOLOv5's `Detect.forward` with them.
    """
    assert how.strides is not None
    corner, size = [], []
    for (height, width), stride, anchors in zip(
        _sides(how, canvas), how.strides, how.anchors or [((1.0, 1.0),)] * len(how.strides), strict=True
    ):
        y, x = np.meshgrid(np.arange(height), np.arange(width), indexing="ij")
        cells = np.stack([x.reshape(-1), y.reshape(-1), np.full(x.size, stride)], 1)
        corner.append(np.tile(cells, (len(anchors), 1)))
        size.append(np.repeat(np.array(anchors, np.float64), x.size, 0))
    grid, sides = np.concatenate(corner), np.concatenate(size)
    if len(grid) != len(boxes):
        raise ValueError(
            f"gives {len(boxes)} boxes, and strides {list(how.strides)} with {_cells(how)} a cell on {canvas[1]} x "
            f"{canvas[0]} pixels make {len(grid)}"
        )
    boxes, of_cell = boxes.astype(np.float64), grid[:, 2:]
    if how.anchors is None:
        with np.errstate(over="ignore"):  # far below any threshold, or the first look refuses it
            return np.concatenate([(boxes[:, :2] + grid[:, :2]) * of_cell, np.exp(boxes[:, 2:]) * of_cell], 1)
    shares = torch.from_numpy(boxes).sigmoid().numpy()
    centres = (2 * shares[:, :2] - 0.5 + grid[:, :2]) * of_cell
    return np.concatenate([centres, (2 * shares[:, 2:]) ** 2 * sides], 1)


def _cells(how: OnnxOutput) -> int:
    """Boxes of a cell."""
    return 1 if how.anchors is None else len(how.anchors[0])


def _sides(how: OnnxOutput, canvas: tuple[int, int]) -> Sequence[tuple[int, int]]:
    """Height and width of the grid of each stride."""
    assert how.strides is not None
    for stride in how.strides:
        if canvas[0] % stride or canvas[1] % stride:
            raise ValueError(f"stride {stride} does not divide the input of {canvas[1]} x {canvas[0]} pixels")
    return [(canvas[0] // stride, canvas[1] // stride) for stride in how.strides]
