"""Settings of a teacher: exactly one of several sources, each with what it takes to use it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field, model_validator
from pydantic_core import PydanticCustomError

from compress.config.base import (
    Fraction,
    ImportPath,
    Location,
    Options,
    Positive,
    Settings,
    added_later,
    broken_rule,
    checkpoint_name,
)
from compress.config.model import Model
from compress.config.train import Train

NO_CLASS = ("", "n/a", "background", "__background__")
"""What files call a label that stands for nothing, in small letters."""


def is_class(name: str | None) -> bool:
    """Whether a label of this name stands for something: not null, `N/A`, `background` or nothing at all."""
    return name is not None and name.strip().lower() not in NO_CLASS


def _all_different(names: tuple[str | None, ...]) -> tuple[str | None, ...]:
    for index, name in enumerate(names):
        if is_class(name) and name in names[:index]:
            raise PydanticCustomError("rule", "{problem}", {"problem": f"{name!r} is listed twice"})
    if not any(map(is_class, names)):
        raise PydanticCustomError("rule", "{problem}", {"problem": "none of the labels has a name"})
    return names


Names = Annotated[tuple[str | None, ...], Field(min_length=1), AfterValidator(_all_different)]
"""Names of labels in their order; several may stand for nothing, see `is_class`."""
Above = Annotated[float, Field(gt=0)]


class Torchvision(Settings):
    """A detector of torchvision."""

    model: Literal[
        "retinanet_resnet50_fpn",
        "retinanet_resnet50_fpn_v2",
        "fcos_resnet50_fpn",
        "fasterrcnn_resnet50_fpn",
        "fasterrcnn_resnet50_fpn_v2",
        "fasterrcnn_mobilenet_v3_large_fpn",
        "fasterrcnn_mobilenet_v3_large_320_fpn",
        "ssd300_vgg16",
        "ssdlite320_mobilenet_v3_large",
    ]
    """Name of the function in torchvision.models.detection that builds it."""
    weights: Literal["coco", "none"] | Location
    """coco: torchvision's own, downloaded; none: random; or a file with a state dict."""
    class_names: Names | None = None
    """Its classes in the order of its labels, without background; null: COCO's. A label that is not used is called
    null or N/A."""
    short: Positive | None = None
    """Short side of the resize that its boxes are found with; null: torchvision's. Not for SSD, which has one size."""
    long: Positive | None = None
    """Limit of the long side."""

    @model_validator(mode="after")
    def _rules(self) -> Self:
        for key in ("short", "long"):
            if getattr(self, key) is not None and self.model.startswith("ssd"):
                raise broken_rule(key, f"{self.model} sees images of one size only; leave it out")
        return self


class Mmdet(Settings):
    """A detector of mmdet (extra `mmdet`)."""

    config: Location
    """Config file."""
    checkpoint: Location
    """Weights."""


class Transformers(Settings):
    """An object detector of transformers (extra `transformers`)."""

    model: Path
    """Folder with config.json, preprocessor_config.json and weights, as `save_pretrained` writes it; or its name on the
    Hub (owner/name), which is downloaded once and kept where transformers keeps its files."""


class OnnxInput(Settings):
    """Input of a foreign ONNX file: one image at a time, as float32, float16 or uint8, with a batch axis or without, as
    the file declares."""

    name: str | None = None
    """Its input; null: the only one."""
    size: tuple[Positive, Positive] | None = None
    """Height and width of the network input; for keep_ratio the limits of the short and the long side. null: as the
    file declares."""
    resize: Literal["letterbox", "letterbox_center", "stretch", "keep_ratio"] = "letterbox"
    """letterbox: keep the ratio, pad right and below; letterbox_center: pad on both sides; stretch: fill the size;
    keep_ratio: as data.short and data.long, padded to a multiple of 32."""
    pad_color: Annotated[int, Field(ge=0, le=255)] = 114
    """Value of the padding in all channels, before the normalisation."""
    color: Literal["rgb", "bgr"] = "rgb"
    """Order of the channels."""
    layout: Literal["nchw", "nhwc"] = "nchw"
    """Order of the axes."""
    divide_by: Above = 1.0
    """Pixels 0..255 are divided by this (255: then they are 0..1), then `mean` is subtracted, then divided by `std`."""
    mean: tuple[float, float, float] = (0.0, 0.0, 0.0)
    """In the order of the channels."""
    std: tuple[Above, Above, Above] = (1.0, 1.0, 1.0)
    """In the order of the channels."""
    size_name: str | None = None
    """A second input, int64 [1, 2], that gets width and height of the network input (as RT-DETR's files have one)."""
    filter: Literal["pillow", "opencv", "torch"] = added_later("pillow")
    """How pixels are mixed in the resize: pillow: bilinear, all pixels count when an image gets smaller; opencv: as
    cv2's INTER_LINEAR, four pixels count; torch: the same in floats, without rounding (antialias=False)."""
    rounding: Literal["nearest", "even", "down"] = added_later("nearest")
    """Sides of the image inside a letterbox: nearest: int(side + 0.5); even: halves to the even number (as
    Ultralytics); down: int(side) (as YOLOX)."""

    @model_validator(mode="after")
    def _rules(self) -> Self:
        if self.resize == "keep_ratio" and self.size is None:
            raise broken_rule("size", "missing; keep_ratio needs the limits of the short and the long side")
        if self.rounding != "nearest" and not self.resize.startswith("letterbox"):
            raise broken_rule("rounding", f"belongs to a letterbox; with {self.resize} leave it out")
        return self


Anchor = tuple[Above, Above]


class OnnxOutput(Settings):
    """Output of a foreign ONNX file: `combined`, or `boxes` and `scores` (and `labels`, if a box has one score). A
    leading batch axis of 1 may be there or not."""

    combined: str | Annotated[tuple[str, ...], Field(min_length=1)] | None = None
    """An output with rows of `columns`; with `strides` also a list of outputs, one a stride."""
    columns: Literal["box_score_label", "box_label_score", "box_classes", "box_objectness_classes"] = "box_score_label"
    """What a row of `combined` holds: four numbers for the box, then score and label [n, 6] in this order, or a score a
    class [n, 4 + K], or one for any object and one a class [n, 5 + K]; they are multiplied."""
    transposed: bool = False
    """`combined` has the boxes along its last axis: [4 + K, n], as YOLOv8 exports it."""
    boxes: str | None = None
    """An output [n, 4]; of [n, 5] the last column is the score, and `scores` is not given."""
    scores: str | None = None
    """An output [n], a score a box, or [n, K], a score a class."""
    labels: str | None = None
    """An output [n], with one score a box."""
    objectness: str | None = added_later()
    """An output [n] or [n, 1], a score for any object, that `scores` are multiplied by."""
    count: str | None = None
    """An output with the number of rows that hold something; null: all."""
    strides: Annotated[tuple[Positive, ...], Field(min_length=1)] | None = added_later()
    """The file gives a grid that is not decoded, with these strides, in this order, row by row: centre (x + column) *
    stride and (y + row) * stride, size exp(w) * stride and exp(h) * stride (as YOLOX)."""
    anchors: Annotated[tuple[tuple[Anchor, ...], ...], Field(min_length=1)] | None = added_later()
    """Of each stride the width and height of its anchors in pixels. Then with s = sigmoid: centre (2 s(x) - 0.5 +
    column) * stride, size (2 s(w))² * width of the anchor (as YOLOv5 and YOLOv7); rows: anchor by anchor."""
    box_format: Literal["xyxy", "cxcywh", "xywh", "yxyx"] = "xyxy"
    """Corners; centre and size; first corner and size; corners with y first."""
    box_units: Literal["pixels", "normalised"] = "pixels"
    """Pixels of the network input (its canvas), or shares of its sides."""
    activation: Literal["none", "sigmoid", "softmax"] = "none"
    """What makes scores in 0..1 of the numbers in the file."""
    background: Literal["none", "first", "last"] = "none"
    """A class that means nothing: first: labels begin with 1, of scores the first column is not a class; last: the last
    column, or the label after the last class. More such classes: `class_names`."""
    best_class_only: bool = added_later(False)
    """Of scores a class, only the best of a box counts (as YOLOX and Ultralytics' predict); false: each counts, as in
    the usual evaluation."""
    nms_threshold: Fraction | None = None
    """Suppress boxes of one class that overlap more than this IoU; null: the file has done it, or needs none."""
    max_detections: Positive = 300
    """Best detections of an image to keep."""

    @model_validator(mode="after")
    def _rules(self) -> Self:
        separate = [name for name in ("boxes", "scores", "labels", "objectness") if getattr(self, name) is not None]
        if self.combined is not None and separate:
            raise broken_rule(separate[0], "excludes combined; keep one of the two")
        if self.combined is None and self.boxes is None:
            raise broken_rule("", "needs combined, or boxes and scores")
        if self.combined is None:
            for key in ("columns", "transposed"):
                if key in self.model_fields_set and getattr(self, key) != type(self).model_fields[key].default:
                    raise broken_rule(key, "belongs to combined, which is not given")
        by_class = self.labels is None if self.combined is None else self.columns == "box_classes"
        if self.activation == "softmax" and not by_class:
            raise broken_rule("activation", "softmax needs one score a class, and nothing between")
        if self.objectness is not None and self.scores is None:
            raise broken_rule("objectness", "needs scores, which it is multiplied with")
        if self.best_class_only and not by_class and self.columns != "box_objectness_classes":
            raise broken_rule("best_class_only", "needs a score a class; here a box has one score")
        self._grid_rules()
        return self

    def _grid_rules(self) -> None:
        if self.strides is None:
            if self.anchors is not None:
                raise broken_rule("anchors", "needs strides, one for each list of anchors")
            if isinstance(self.combined, tuple):
                raise broken_rule("combined", "a list of outputs needs strides; name one output")
            return
        if (self.box_format, self.box_units) != ("cxcywh", "pixels"):
            raise broken_rule("strides", "give centre and size in pixels: set box_format: cxcywh, box_units: pixels")
        if self.count is not None or self.labels is not None:
            raise broken_rule("strides", "excludes count and labels: a grid has all its rows, and scores a class")
        if self.combined is not None and self.columns not in ("box_classes", "box_objectness_classes"):
            raise broken_rule("columns", "a grid has a score a class: box_classes or box_objectness_classes")
        if self.anchors is not None and (
            len(self.anchors) != len(self.strides) or len({len(of_stride) for of_stride in self.anchors}) > 1
        ):
            raise broken_rule("anchors", f"must be {len(self.strides)} lists, one a stride, of equal length")
        if isinstance(self.combined, tuple) and len(self.combined) != len(self.strides):
            raise broken_rule("combined", f"must be one output, or {len(self.strides)}, one a stride")


class Onnx(Settings):
    """A detector in an ONNX file: one that this project exported, or any other with a description of what it takes and
    gives."""

    file: Location
    """The file."""
    input: OnnxInput | None = None
    """What it takes; null: its defaults, or for a file of this project what its card says."""
    output: OnnxOutput | None = None
    """What it gives; null: a file of this project."""
    class_names: Names | None = None
    """Its classes in the order of its labels, without that of `output.background`; null: a file of this project. A
    label that is not used (COCO has such ids) is called null, N/A or background, as often as it takes."""
    check_boxes: bool = added_later(True)
    """Stop when nearly all boxes of the first images can be no objects: outside the image, smaller than a pixel, in a
    corner, or turned over. Then the description is wrong."""

    @model_validator(mode="after")
    def _rules(self) -> Self:
        if self.output is None:
            for key in ("input", "class_names"):
                if getattr(self, key) is not None:
                    raise broken_rule(key, "needs output as well: a file of this project describes itself")
        elif self.class_names is None:
            raise broken_rule("class_names", "missing; a foreign file does not name its classes")
        return self


class Custom(Settings):
    """A teacher of your own."""

    factory: ImportPath
    """Import path of a class or function that makes it."""
    options: Options | None = None
    """Arguments of the factory, besides `device` and `categories`."""


class Source(Settings):
    """Source of a teacher: exactly one of the keys."""

    checkpoint: Annotated[str, AfterValidator(checkpoint_name)] | None = None
    """A .safetensors file of this project, an official mmdet GFL .pth file, or zoo:<name>."""
    torchvision: Torchvision | None = None
    """A detector of torchvision."""
    mmdet: Mmdet | None = None
    """A detector of mmdet."""
    transformers: Transformers | None = None
    """A detector of transformers."""
    onnx: Onnx | None = None
    """A detector in an ONNX file."""
    results: Location | None = None
    """COCO JSON with what a detector found: a list of results, or a whole document with images and categories."""
    custom: Custom | None = added_later()
    """A teacher of your own: a detector, or anything that gives boxes."""

    @property
    def given(self) -> tuple[str, ...]:
        """The sources that are given, by key."""
        return tuple(name for name in SOURCES if getattr(self, name) is not None)

    @model_validator(mode="after")
    def _rules(self) -> Self:
        if not self.given:
            raise broken_rule("", f"no source; give one of {', '.join(SOURCES)}")
        if len(self.given) > 1:
            raise broken_rule(self.given[1], f"excludes {self.given[0]}; keep one of the two")
        return self


SOURCES = tuple(Source.model_fields)
BOXES_ALONE = ("onnx", "results")
"""Sources that give final boxes and nothing else. Of torchvision, mmdet and transformers it depends on the model."""


class Teacher(Source):
    """The detector to learn from: exactly one source, or `train`."""

    model: Model | None = None
    """What to build when the teacher is trained here."""
    train: Train | None = None
    """Train the teacher first, on the same data."""
    min_map: Annotated[float, Field(ge=0, le=100)] = 0.0
    """Stop before distilling when the teacher's validation mAP (percent) is lower."""
    inherit: bool = False
    """Start the student's neck and head from the teacher's, where the shapes agree (as published for FGD and MGD)."""

    cache: Path | None = added_later()
    """Keep what the methods look at of the teacher's outputs in this folder, in half precision: it then runs once for
    each view of a picture, in all runs. null: it runs in every step. Needs `train.views`."""
    cache_classes: Positive | None = added_later()
    """Class logits that the cache keeps of each place, the largest so many; the others share one value. null: all."""

    @model_validator(mode="after")
    def _rules(self) -> Teacher:
        if not self.given and self.train is None:
            raise broken_rule("", f"no source; give one of {', '.join(SOURCES)}, or model and train")
        if len(self.given) > 1:
            raise broken_rule(self.given[1], f"excludes teacher.{self.given[0]}; keep one of the two")
        if self.given and self.train is not None:
            raise broken_rule("train", f"excludes teacher.{self.given[0]}; keep one of the two")
        if self.train is not None and self.model is None:
            raise broken_rule("train", "needs teacher.model, the detector to train")
        if self.inherit and self.given and self.checkpoint is None and self.custom is None:
            raise broken_rule("inherit", f"needs a teacher of this project, not teacher.{self.given[0]}")
        if self.cache_classes is not None and self.cache is None:
            raise broken_rule("cache_classes", "belongs to cache, which is not given")
        return self
