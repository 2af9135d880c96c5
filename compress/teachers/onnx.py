"""Detectors in ONNX files as teachers: `CardTeacher` for files of this project, `ForeignTeacher` for all others, with a
description of what they take and give (`compress.config.teacher.OnnxInput`, `OnnxOutput`).

The two halves of such a description are `onnx_input.prepare` and `onnx_output.boxes_of`, as arithmetic on arrays.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from torchvision.ops import nms

from compress.config.teacher import Onnx, OnnxInput, is_class
from compress.detectors.base import MEAN, STD, Capability, Detector, ImageDetections
from compress.teachers.base import Preprocessing, Sample, View, final, original
from compress.teachers.first_look import FirstLook
from compress.teachers.onnx_input import Placed, described, prepare
from compress.teachers.onnx_output import boxes_of, on_canvas, output_names
from deploy.core.canvas import fit_canvas, to_original
from deploy.core.errors import UserError, first_line
from deploy.core.files import sha256_of
from deploy.core.storage import fetch
from deploy.runtimes.onnx import OnnxRunner

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
        self.operating_point = card.operating_point
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
        self._outputs = output_names(self._output)
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
        self._batched, self._size = _declared(source.file, declared, self._input)
        self.file, self.sha256 = source.file.name, sha256_of(source.file)
        places = [place for place, name in enumerate(source.class_names) if is_class(name)]
        self.class_names: tuple[str, ...] | None = tuple(str(source.class_names[place]) for place in places)
        self._ours = np.full(len(source.class_names), -1, np.int64)
        self._ours[places] = np.arange(len(places))
        described_by = source.model_dump(mode="json", exclude={"file", "check_boxes"}, exclude_defaults=True)
        self.settings: Mapping[str, Any] = described_by | {"size": list(self._size)}
        self.preprocessing: Preprocessing | None = described(self._input, self._size)
        remedy = (
            "check output.box_format, box_units and columns, and whether the file leaves its grid to be decoded "
            "(output.strides, output.anchors); onnx.check_boxes: false goes on"
        )
        self._first = FirstLook(str(source.file), remedy) if source.check_boxes else None

    def covers(self, ids: Sequence[int] | None, names: Sequence[str], folder: Path) -> str | None:
        return None

    def detect(self, samples: Sequence[Sample], *, score_threshold: float) -> list[ImageDetections]:
        return [self._one(_hwc(sample), score_threshold) for sample in samples]

    def _one(self, image: np.ndarray, score_threshold: float) -> ImageDetections:
        pixels, placed = prepare(image, self._input, self._size)
        outputs = self._run(pixels, placed)
        try:
            boxes, scores, labels = boxes_of(outputs, self._output, len(self._ours), placed)
        except ValueError as error:
            raise UserError(f"{self._path}: {error}") from None
        labels = self._ours[labels]
        kept = (labels >= 0) & (scores >= score_threshold)
        boxes, scores, labels = boxes[kept], scores[kept], labels[kept]
        if self._first is not None:
            self._first.look(on_canvas(boxes, placed), placed.canvas)
        found = torch.from_numpy(boxes), torch.from_numpy(scores), torch.from_numpy(labels)
        if self._output.nms_threshold is not None:
            kept = suppressed(*found, self._output.nms_threshold)
            found = found[0][kept], found[1][kept], found[2][kept]
        best = final(*found, size=(image.shape[0], image.shape[1]), score_threshold=score_threshold)
        limit = self._output.max_detections
        return ImageDetections(best.boxes[:limit], best.scores[:limit], best.labels[:limit])

    def _run(self, pixels: np.ndarray, placed: Placed) -> dict[str, np.ndarray]:
        """What the file gives, by role."""
        pixels = np.rint(pixels) if self._dtype is np.uint8 else pixels
        feed = {self._name: (pixels if self._batched else pixels[0]).astype(self._dtype)}
        height, width = placed.canvas
        if self._input.size_name is not None:
            feed[self._input.size_name] = np.array([[width, height]], np.int64)
        try:
            values = self._session.run(list(self._outputs.values()), feed)
        except Exception as error:  # onnxruntime raises a dozen unrelated types
            raise UserError(
                f"{self._path}: cannot be run on {feed[self._name].dtype} {list(feed[self._name].shape)}: "
                f"{first_line(error)}"
            ) from error
        return dict(zip(self._outputs, values, strict=True))


def suppressed(boxes: torch.Tensor, scores: torch.Tensor, labels: torch.Tensor, iou_threshold: float) -> torch.Tensor:
    """Indices of the boxes [n, 4] that stay when, class by class, a box removes those of lower scores that overlap it
    by more than the threshold; boxes without an area go first.

    The boxes are not clipped: two that look alike inside the image may be two objects that reach out of it. Each class
    is suppressed alone; an offset a class, as `torchvision.ops.batched_nms` adds, lets classes meet where coordinates
    are negative, and rounds them.
    """
    real = ((boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1])).nonzero()[:, 0]
    kept = [torch.empty(0, dtype=torch.int64)]
    for label in labels[real].unique():
        places = real[labels[real] == label]
        kept.append(places[nms(boxes[places], scores[places], iou_threshold)])
    return torch.cat(kept).sort().values


# --- details --------------------------------------------------------------------------------------------


def _providers(device: torch.device) -> tuple[str, ...]:
    return ("cuda", "cpu") if device.type == "cuda" else ("cpu",)


def _hwc(sample: Sample) -> np.ndarray:
    return np.ascontiguousarray(original(sample).permute(1, 2, 0).numpy())


def _open(path: Path, device: torch.device) -> onnxruntime.InferenceSession:
    if not fetch(path).is_file():
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


def _need(path: Path, what: str, names: Sequence[str], known: Sequence[str]) -> None:
    for name in names:
        if name not in known:
            raise UserError(f"{path}: has no {what} {name!r}; it has {', '.join(known)}")


def _only(path: Path, names: Sequence[str]) -> str:
    if len(names) != 1:
        raise UserError(f"{path}: has {len(names)} inputs ({', '.join(names)}); name that of the image in input.name")
    return names[0]


def _declared(path: Path, declared: Any, how: OnnxInput) -> tuple[bool, tuple[int, int]]:
    """Whether the image's input has a batch axis; and height and width, of the description or as the file has them."""
    shape = list(declared.shape)
    if shape and len(shape) not in (3, 4):
        raise UserError(
            f"{path}: input {declared.name!r} has {len(shape)} axes, {shape}; an image has three, and a fourth for a "
            "batch"
        )
    batched = len(shape) != 3
    axes = shape[1:] if batched else shape
    if batched and shape and isinstance(shape[0], int) and shape[0] > 1:
        raise UserError(
            f"{path}: input {declared.name!r} takes {shape[0]} images at once, {shape}; export it for one image, or "
            "with a batch that may have any size"
        )
    place = 0 if how.layout == "nchw" else 2
    if axes and isinstance(axes[place], int) and axes[place] != 3:
        other = "nhwc" if how.layout == "nchw" else "nchw"
        hint = f"; set input.layout: {other}" if axes[2 - place] == 3 else "; an RGB image has 3"
        raise UserError(f"{path}: input {declared.name!r} of {shape} has {axes[place]} channels as {how.layout}{hint}")
    if how.size is not None:
        return batched, how.size
    sides = axes[1:] if how.layout == "nchw" else axes[:2]
    if not axes or not all(isinstance(side, int) and side > 0 for side in sides):
        raise UserError(f"{path}: input {declared.name!r} of {shape} does not fix height and width; give input.size")
    return batched, (sides[0], sides[1])
