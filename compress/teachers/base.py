"""The contract of a teacher: at the least, something that finds boxes in images (`BoxTeacher`).

Teachers differ in what they look at. A detector of this project takes the images that the student sees, resized and in
batches. A foreign model prepares the image of the file by its own rules. A file of results looks the image up.
`BoxTeacher.view` says which, so that nothing is decoded or resized in vain.

`DetectorTeacher` is any `compress.detectors.base.Detector` as a BoxTeacher. What feature and logit methods learn from
is a teacher's `detector`; one that gives boxes alone has none, and `capabilities` says so.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol

import torch
from torch import Tensor

from compress.data.batch import STRIDE, ImageSize, pad_images
from compress.detectors.base import Capability, Detector, ImageDetections
from deploy.core.card import OperatingPoint


class View(enum.Enum):
    """Part of an image that a teacher looks at."""

    RESIZED = "resized"  # as the student sees it
    ORIGINAL = "original"  # as the file has it
    NAME = "name"  # no pixels: its id or name


@dataclass(frozen=True)
class Sample:
    """One image. Both pictures are uint8 [3, h, w] RGB; None where no teacher looks at them.

    image: after the keep-ratio resize, of `size.network`. original: as in the file, of `size.original`.
    image_id: in the COCO file that lists it, or in the folder.
    name: the file's, relative to the image folder, with `/`.
    """

    image: Tensor | None
    image_id: int
    size: ImageSize
    name: str
    original: Tensor | None = None


@dataclass(frozen=True)
class Preprocessing:
    """Preparation of an image before a teacher's network; for people and for comparison, not for computing.

    mean, std: of RGB pixels 0..255, in the order of the channels that the network gets; None where unknown.
    order: of the channels that the network gets. size: in words, for example `letterbox to 640 x 640`.
    """

    size: str
    order: str = "RGB"
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None


class BoxTeacher(Protocol):
    """Frozen, in eval mode, on its device. A subclass gets the defaults of what gives boxes alone, and has to set
    `sha256`, `class_names` and `view` and to implement `detect`."""

    file: str
    """Its name in messages and provenance: a file name without folder, or `zoo:NAME`."""
    sha256: str
    """Digits of what defines it: file, folder or weights. Same digits, same teacher (given `settings`)."""
    settings: Mapping[str, Any] = MappingProxyType({})
    """Settings that decide its boxes besides (JSON-able, without paths); empty where the file says everything."""
    class_names: tuple[str, ...] | None
    """Names in the order of its labels; None where nothing says."""
    capabilities: frozenset[Capability] = frozenset({Capability.BOXES})
    """Capabilities of `detector`; BOXES alone where there is none."""
    detector: Detector | None = None
    """Model that feature and logit methods learn from, on the same device, frozen; its labels are those of
    `class_names`. None: boxes are all that it gives."""
    view: View
    preprocessing: Preprocessing | None = None
    """None: it looks at no pixels."""

    def covers(self, ids: Sequence[int] | None, names: Sequence[str], folder: Path) -> str | None:
        """Check that it can say something about these images. Asked once for each list, before long work.

        Args:
            ids: image ids of the COCO file that lists the images; None for a folder, whose images have no ids.
            names: their file names, relative to `folder`.
            folder: where they lie.

        Returns:
            A line worth telling the user, or None.

        Raises:
            UserError: it knows nothing about one of them, or cannot tell it from an image of a list of before.
        """
        return None

    def detect(self, samples: Sequence[Sample], *, score_threshold: float) -> list[ImageDetections]:
        """Detections of each image in pixels of its file (`original_size`), best first, with scores at or above the
        threshold, on any device; `labels` index `class_names`. What it finds in an image does not depend on the other
        images of the call.
        """


def size_of_training(teacher: BoxTeacher) -> tuple[int, int] | None:
    """(short, long), limits in pixels of the images that the teacher was trained on: what its attribute
    `resize_short_long` says. None where it has no such attribute, or its file does not say."""
    return getattr(teacher, "resize_short_long", None)


def operating_point_of(teacher: BoxTeacher) -> OperatingPoint | None:
    """Where its scores are best cut: what its attribute `operating_point` says. None where it has no such attribute, or
    its file does not say."""
    return getattr(teacher, "operating_point", None)


class DetectorTeacher:
    """A detector of this project (or one with its contract) as a BoxTeacher. It sees what the student sees.

    Args:
        detector: gets frozen and in eval mode.
        device: where to run; the detector is moved there.
        resize_short_long: see `size_of_training`. operating_point: see `operating_point_of`.
    """

    view = View.RESIZED
    preprocessing: Preprocessing | None

    def __init__(
        self,
        detector: Detector,
        *,
        file: str,
        sha256: str,
        class_names: tuple[str, ...] | None,
        device: torch.device,
        settings: Mapping[str, Any] | None = None,
        resize_short_long: tuple[int, int] | None = None,
        operating_point: OperatingPoint | None = None,
    ) -> None:
        self.resize_short_long, self.operating_point = resize_short_long, operating_point
        self.detector: Detector | None = detector.requires_grad_(False).eval().to(device)
        self._network = self.detector
        self.file, self.sha256, self.class_names = file, sha256, class_names
        self.settings: Mapping[str, Any] = settings or {}
        self.capabilities = detector.capabilities
        mean, std = (tuple(values.flatten().tolist()) for values in (detector.mean, detector.std))
        self.preprocessing = Preprocessing("as the student's images", "RGB", mean, std)
        self._device = device

    def covers(self, ids: Sequence[int] | None, names: Sequence[str], folder: Path) -> str | None:
        return None

    @torch.inference_mode()
    def detect(
        self, samples: Sequence[Sample], *, score_threshold: float, max_detections: int | None = None
    ) -> list[ImageDetections]:
        """Images share a batch only if they need no padding for it: each is seen as alone. max_detections: of one;
        None: as many as the detector gives by itself."""
        settings = {} if max_detections is None else {"max_detections": max_detections}
        groups: dict[tuple[int, int], list[int]] = {}
        for index, sample in enumerate(samples):
            height, width = sample.size.network
            groups.setdefault((-(-height // STRIDE), -(-width // STRIDE)), []).append(index)
        found: dict[int, ImageDetections] = {}
        for group in groups.values():
            images = pad_images([resized(samples[index]) for index in group]).to(self._device).contiguous()
            prediction = self._network(images)
            sizes = [samples[index].size for index in group]
            # decode wants scores above its threshold, ours are at or above
            decoded = self._network.decode(prediction, sizes, score_threshold=score_threshold * (1 - 1e-6), **settings)
            found |= zip(group, decoded, strict=True)
        return [found[index] for index in range(len(samples))]


def resized(sample: Sample) -> Tensor:
    """The picture that a teacher with `View.RESIZED` gets."""
    assert sample.image is not None, "the reader was told that a teacher looks at resized images"
    return sample.image


def original(sample: Sample) -> Tensor:
    """The picture that a teacher with `View.ORIGINAL` gets."""
    assert sample.original is not None, "the reader was told that a teacher looks at original images"
    return sample.original


def final(
    boxes: Tensor, scores: Tensor, labels: Tensor, *, size: tuple[int, int], score_threshold: float
) -> ImageDetections:
    """Detections as `BoxTeacher.detect` gives them: clipped to the image, those with an area and a score at or above
    the threshold, best first.

    Args:
        boxes: [n, 4] xyxy pixels of the file. scores: [n]. labels: [n].
        size: (height, width) of the file.
    """
    height, width = size
    boxes = torch.stack((boxes[:, 0::2].clamp(0, width), boxes[:, 1::2].clamp(0, height)), -1).flatten(1)
    kept = (scores >= score_threshold) & (boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1])
    order = torch.argsort(scores[kept], descending=True, stable=True)
    return ImageDetections(boxes[kept][order], scores[kept][order], labels[kept][order].long())
