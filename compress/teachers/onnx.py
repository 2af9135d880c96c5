"""Detectors in ONNX files as teachers: `CardTeacher` for files of this project, `ForeignTeacher` for all others, with a
description of what they take and give (`compress.config.teacher.OnnxInput`, `OnnxOutput`).

`prepare` and `boxes_of` are the two halves of such a description, as arithmetic on arrays.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from torchvision.ops import batched_nms

from compress.config.teacher import Onnx, OnnxInput, OnnxOutput
from compress.detectors.base import MEAN, STD, Capability, Detector, ImageDetections
from compress.teachers.base import Preprocessing, Sample, View, final, original
from deploy.core.canvas import fit_canvas, fit_size, letterbox, resize, to_original
from deploy.core.errors import UserError, first_line
from deploy.core.files import sha256_of
from deploy.runtimes.onnx import OnnxRunner

KEEP_RATIO_MULTIPLE = 32
ELEMENTS = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(uint8)": np.uint8}


def open_onnx(source: Onnx, device: torch.device) -> CardTeacher | ForeignTeacher:
    """Open an ONNX file. Raises UserError if ONNX Runtime cannot load it, or it is not as described."""
    if source.output is None:
        return CardTeacher(source.file, device)
    return ForeignTeacher(source, device)


class CardTeacher:
    """A file that this project exported. It sees the image as its card says. Boxes below the card's score threshold are
    not in what the file gives."""

    capabilities = frozenset({Capability.BOXES})
    detector: Detector | None = None
    view = View.ORIGINAL

    def __init__(self, path: Path, device: torch.device) -> None:
        try:
            self._run = OnnxRunner(path, _providers(device), device=device.index or 0)
        except UserError as error:
            if "no model card" in str(error):
                raise UserError(
                    f"{path}: not exported by this program; say what it takes and gives in a teacher section "
                    "(teacher.onnx.output, teacher.onnx.class_names)"
                ) from None
            raise
        card = self._run.card
        self.file, self.sha256 = path.name, sha256_of(path)
        self.settings: Mapping[str, Any] = {}
        self.class_names: tuple[str, ...] | None = tuple(card.class_names)
        height, width = card.input_size
        limits = "" if card.short is None else f", at most {card.short} and {card.long} pixels"
        self.preprocessing: Preprocessing | None = Preprocessing(
            f"letterbox to {width} x {height}{limits}", "RGB", MEAN, STD
        )
        self._told = f"{path}: has no boxes with a score below {card.score_threshold:g}"

    def covers(self, ids: Sequence[int] | None, names: Sequence[str], folder: Path) -> str | None:
        return self._told

    def detect(self, samples: Sequence[Sample], *, score_threshold: float) -> list[ImageDetections]:
        pictures = [_hwc(sample) for sample in samples]
        canvases, scales = zip(*(fit_canvas(picture, self._run.card) for picture in pictures), strict=True)
        output = self._run(np.stack(canvases))
        found = []
        for index, (picture, scale) in enumerate(zip(pictures, scales, strict=True)):
            count, size = int(output.count[index]), (picture.shape[0], picture.shape[1])
            boxes = to_original(output.boxes[index, :count], scale, size)
            found.append(
                final(
                    torch.from_numpy(boxes),
                    torch.from_numpy(output.scores[index, :count]),
                    torch.from_numpy(output.labels[index, :count]),
                    size=size,
                    score_threshold=score_threshold,
                )
            )
        return found


class ForeignTeacher:
    """Teacher in any other file. Images go through it one by one."""

    capabilities = frozenset({Capability.BOXES})
    detector: Detector | None = None
    view = View.ORIGINAL

    def __init__(self, source: Onnx, device: torch.device) -> None:
        assert source.output is not None and source.class_names is not None, "the section was validated"
        self._path, self._input, self._output = source.file, source.input or OnnxInput(), source.output
        self._session = _open(source.file, device)
        inputs = {value.name: value for value in self._session.get_inputs()}
        self._outputs = _wanted(self._output)
        _need(source.file, "output", list(self._outputs.values()), [v.name for v in self._session.get_outputs()])
        self._name = self._input.name or _only(source.file, [name for name in inputs if name != self._input.size_name])
        names = [self._name] if self._input.size_name is None else [self._name, self._input.size_name]
        _need(source.file, "input", names, list(inputs))
        left = [name for name in inputs if name not in names]
        if left:
            raise UserError(
                f"{source.file}: needs input {left[0]!r} as well, and the teacher section does not say what"
            )
        declared = inputs[self._name]
        if declared.type not in ELEMENTS:
            raise UserError(
                f"{source.file}: input {self._name!r} is {declared.type}; supported are {', '.join(ELEMENTS)}"
            )
        self._dtype = ELEMENTS[declared.type]
        self._size = self._input.size or _declared_size(source.file, declared, self._input)
        self.file, self.sha256 = source.file.name, sha256_of(source.file)
        self.class_names: tuple[str, ...] | None = source.class_names
        described = source.model_dump(mode="json", exclude={"file"}, exclude_defaults=True)
        self.settings: Mapping[str, Any] = described | {"size": list(self._size)}
        self.preprocessing: Preprocessing | None = _described(self._input, self._size)

    def covers(self, ids: Sequence[int] | None, names: Sequence[str], folder: Path) -> str | None:
        return None

    def detect(self, samples: Sequence[Sample], *, score_threshold: float) -> list[ImageDetections]:
        return [self._one(_hwc(sample), score_threshold) for sample in samples]

    def _one(self, image: np.ndarray, score_threshold: float) -> ImageDetections:
        assert self.class_names is not None
        pixels, placed = prepare(image, self._input, self._size)
        feed = {self._name: pixels.astype(self._dtype)}
        height, width = placed.canvas
        if self._input.size_name is not None:
            feed[self._input.size_name] = np.array([[width, height]], np.int64)
        try:
            values = self._session.run(list(self._outputs.values()), feed)
        except Exception as error:  # onnxruntime raises a dozen unrelated types
            raise UserError(
                f"{self._path}: cannot be run on {pixels.dtype} {list(pixels.shape)}: {first_line(error)}"
            ) from error
        outputs = dict(zip(self._outputs, values, strict=True))
        try:
            boxes, scores, labels = boxes_of(outputs, self._output, len(self.class_names), placed)
        except ValueError as error:
            raise UserError(f"{self._path}: {error}") from None
        found = final(
            torch.from_numpy(boxes),
            torch.from_numpy(scores),
            torch.from_numpy(labels),
            size=(image.shape[0], image.shape[1]),
            score_threshold=score_threshold,
        )
        if self._output.nms_threshold is not None:
            kept = batched_nms(found.boxes, found.scores, found.labels, self._output.nms_threshold)
            found = ImageDetections(found.boxes[kept], found.scores[kept], found.labels[kept])
        limit = self._output.max_detections
        return ImageDetections(found.boxes[:limit], found.scores[:limit], found.labels[:limit])


@dataclass(frozen=True)
class Placed:
    """Place of an image on the network's canvas.

    canvas: (height, width). scale: canvas pixels per image pixel, (x, y). offset: of the image's corner, (x, y).
    """

    canvas: tuple[int, int]
    scale: tuple[float, float]
    offset: tuple[int, int] = (0, 0)


def prepare(image: np.ndarray, how: OnnxInput, size: tuple[int, int]) -> tuple[np.ndarray, Placed]:
    """An RGB image uint8 [h, w, 3] as a network takes it: float32 [1, 3, H, W], or [1, H, W, 3] for nhwc.

    The resize is Pillow's bilinear one, which averages when it makes an image smaller.
    """
    height, width = image.shape[:2]
    color = (how.pad_color,) * 3
    if how.resize == "stretch":
        canvas = resize(image, size)
        placed = Placed(size, (size[1] / width, size[0] / height))
    elif how.resize == "keep_ratio":
        small = fit_size(height, width, short=size[0], long=size[1])
        rounded = tuple(-(-side // KEEP_RATIO_MULTIPLE) * KEEP_RATIO_MULTIPLE for side in small)
        frame = np.full((*rounded, 3), how.pad_color, np.uint8)
        frame[: small[0], : small[1]] = resize(image, small)
        canvas, placed = frame, Placed((rounded[0], rounded[1]), (small[1] / width, small[0] / height))
    else:
        planes, scale = letterbox(image, size, color)
        canvas, offset = planes.transpose(1, 2, 0), (0, 0)
        if how.resize == "letterbox_center":
            inside = round(scale[0] * width), round(scale[1] * height)
            offset = ((size[1] - inside[0]) // 2, (size[0] - inside[1]) // 2)
            canvas = np.roll(canvas, (offset[1], offset[0]), (0, 1))  # what goes round the edge is padding
        placed = Placed(size, scale, offset)
    pixels = canvas.astype(np.float32)
    if how.color == "bgr":
        pixels = pixels[..., ::-1]
    normalised = (pixels / how.divide_by - np.asarray(how.mean, np.float32)) / np.asarray(how.std, np.float32)
    axes = (0, 1, 2) if how.layout == "nhwc" else (2, 0, 1)
    return np.ascontiguousarray(normalised.transpose(axes)[None], np.float32), placed


def boxes_of(
    outputs: Mapping[str, np.ndarray], how: OnnxOutput, num_classes: int, placed: Placed
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Turn outputs into boxes float32 [n, 4] xyxy in pixels of the image, scores float32 [n], labels int64 [n].

    Of scores a class, every class of a box is a detection of its own, as in the usual evaluation.

    Args:
        outputs: arrays by their role: `combined`, or `boxes`, `scores`, `labels`; `count`.

    Raises:
        ValueError: an array is not of the shape, or labels are not of the range, that `how` says.
    """
    arrays = {role: _unbatched(role, array) for role, array in outputs.items() if role != "count"}
    if "count" in outputs:
        count = int(np.asarray(outputs["count"]).reshape(-1)[0])
        arrays = {role: array[:count] for role, array in arrays.items()}
    boxes, scores, labels = _parts(arrays, how)
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


# --- details --------------------------------------------------------------------------------------------


def _providers(device: torch.device) -> tuple[str, ...]:
    return ("cuda", "cpu") if device.type == "cuda" else ("cpu",)


def _hwc(sample: Sample) -> np.ndarray:
    return np.ascontiguousarray(original(sample).permute(1, 2, 0).numpy())


def _open(path: Path, device: torch.device) -> onnxruntime.InferenceSession:
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    wanted: list[Any] = ["CPUExecutionProvider"]
    if device.type == "cuda":
        wanted.insert(0, ("CUDAExecutionProvider", {"device_id": str(device.index or 0)}))
    try:
        session = onnxruntime.InferenceSession(str(path), options, providers=wanted)
    except Exception as error:  # onnxruntime raises a dozen unrelated types
        raise UserError(f"{path}: ONNX Runtime cannot load it: {first_line(error)}") from error
    if device.type == "cuda" and "CUDAExecutionProvider" not in session.get_providers():
        raise UserError(
            f"{path}: ONNX Runtime does not come up on the GPU: install its CUDA libraries (extra gpu), or hide the "
            "GPU with CUDA_VISIBLE_DEVICES="
        )
    return session


def _wanted(how: OnnxOutput) -> dict[str, str]:
    """Output names by role."""
    roles = ("combined", "boxes", "scores", "labels", "count")
    return {role: name for role in roles if (name := getattr(how, role)) is not None}


def _need(path: Path, what: str, names: Sequence[str], known: Sequence[str]) -> None:
    for name in names:
        if name not in known:
            raise UserError(f"{path}: has no {what} {name!r}; it has {', '.join(known)}")


def _only(path: Path, names: Sequence[str]) -> str:
    if len(names) != 1:
        raise UserError(f"{path}: has {len(names)} inputs ({', '.join(names)}); name that of the image in input.name")
    return names[0]


def _declared_size(path: Path, declared: Any, how: OnnxInput) -> tuple[int, int]:
    shape = list(declared.shape)
    sides = shape[2:4] if how.layout == "nchw" else shape[1:3]
    if len(shape) != 4 or not all(isinstance(side, int) and side > 0 for side in sides):
        raise UserError(f"{path}: input {declared.name!r} of {shape} does not fix height and width; give input.size")
    return sides[0], sides[1]


def _described(how: OnnxInput, size: tuple[int, int]) -> Preprocessing:
    height, width = size
    words = {
        "letterbox": f"letterbox to {width} x {height}",
        "letterbox_center": f"letterbox to {width} x {height}, centred",
        "stretch": f"stretched to {width} x {height}",
        "keep_ratio": f"short side {height}, long side {width}",
    }
    mean, std = (tuple(value * how.divide_by for value in values) for values in (how.mean, how.std))
    return Preprocessing(words[how.resize], how.color.upper(), mean, std)


def _unbatched(role: str, array: np.ndarray) -> np.ndarray:
    """Drop a leading axis of 1, where there is one axis more than needed."""
    axes = {"combined": 2, "boxes": 2, "labels": 1}
    most = axes.get(role, 2)
    while array.ndim > most and array.shape[0] == 1:
        array = array[0]
    if array.ndim > most or array.ndim == 0:
        raise ValueError(f"output {role} has the shape {list(array.shape)}, which is not one of boxes of one image")
    return array


def _parts(arrays: Mapping[str, np.ndarray], how: OnnxOutput) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """boxes [n, 4], scores [n] with labels [n], or scores [n, K] and None. Scores are float32 in 0..1."""
    if "combined" in arrays:
        rows = arrays["combined"].T if how.transposed else arrays["combined"]
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
    boxes, labels = arrays["boxes"], arrays.get("labels")
    columns = 4 if "scores" in arrays else 5
    if boxes.ndim != 2 or boxes.shape[1] != columns:
        raise ValueError(f"output boxes has the shape {list(boxes.shape)}, not [n, {columns}]")
    scores = _activated(arrays["scores"] if "scores" in arrays else boxes[:, 4], how.activation)
    if labels is not None:
        scores = scores.reshape(-1)
        if not len(scores) == len(labels) == len(boxes):
            raise ValueError(f"gives {len(boxes)} boxes, {len(scores)} scores and {len(labels)} labels")
    return boxes[:, :4], scores, labels


def _activated(scores: np.ndarray, activation: str) -> np.ndarray:
    scores = np.ascontiguousarray(scores, np.float32)
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
