"""The model card: what serving, validating or measuring an ONNX file needs to know, inside the file.

It is one JSON object under the key `compress` of the ONNX metadata.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from deploy.core.errors import UserError, first_line
from deploy.core.files import sha256_of, write_text
from deploy.core.onnx_scan import scan_onnx
from deploy.core.storage import is_file

METADATA_KEY = "compress"
PROCESSING = "pre- and post-processing"
"""The part of `ModelCard.precision` that is not the network."""

PAD_COLOR = (124, 116, 104)
"""RGB around a picture on its canvas: the ImageNet mean, rounded, which is nearly zero after normalisation."""
SCORE_THRESHOLD = 0.05
"""Default: detections must score more."""
NMS_THRESHOLD = 0.6
"""Default: boxes of one class that overlap more (IoU) suppress each other."""
MAX_DETECTIONS = 100
"""Default: detections of a picture, as many as COCO's evaluation takes."""
SHOWN_SCORE = 0.3
"""Default: what people are shown of a file that has no operating point scores at least this."""
CANDIDATES = 1000
"""Default: highest-scoring boxes that enter the suppression."""
MAX_CANDIDATES = 3840
"""The most boxes that may enter the suppression: the limit of TensorRT's TopK."""

OUTPUTS = ("boxes", "scores", "labels", "count")
"""What a deployable file gives, in this order."""
_HASHES = "written_with"
"""Key of the hashes in a card that lies beside its file."""
_Byte = Annotated[int, Field(ge=0, le=255)]
_Pixels = Annotated[int, Field(ge=1)]
_Share = Annotated[float, Field(ge=0.0, le=1.0)]


UNCALIBRATED = ("dynamic", "weights")
"""Methods of quantization that look at no images."""


class Quantization(BaseModel):
    """Record of how an int8 file was made. `layers` counts the quantized ones; `float_layers` names the others."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    target: Literal["tensorrt", "cpu", "litert", "mnn"]
    """Whose format it is: int8 symmetric activations (`tensorrt`), uint8 activations with a zero point (`cpu`), or what
    a runtime's own converter made (`deploy.targets.own_int8`)."""
    weight_bits: Literal[7, 8] = 8
    layers: int = Field(ge=1)
    float_layers: list[str] = []
    method: str
    """How the activations' ranges were found: `minmax`, `percentile`, `entropy`; `trained`: learned after that;
    `dynamic`: of each picture, while it is computed. `weights`: these alone are int8, and computed with in float."""
    images_sha256: str = ""
    """Hash of the sorted SHA-256 of the calibration images; empty where there are none."""
    image_hashes: list[str] = []
    """The first 16 digits of the SHA-256 of each calibration image file: validation refuses these images."""
    guided_map_drop: float | None = None
    """mAP points that the search measured on its labelled split; None when there was no search."""

    @model_validator(mode="after")
    def _images(self) -> Quantization:
        if not self.image_hashes and self.method not in UNCALIBRATED:
            raise ValueError(f"image_hashes: is empty, and ranges of {self.method} come from images")
        return self


class HalfPrecision(BaseModel):
    """Record of how a network got its float16: what was measured, and what does not fit into it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    images: int = Field(ge=1)
    """Pictures on which the magnitude of every value was measured, in float32."""
    largest: float
    """The largest magnitude among the values that are float16; float16 ends at 65,504."""
    float32: dict[str, str] = {}
    """Layer, or node without weights, that computes in float32 because its numbers do not fit → what does not. Norms
    over a map always do, and are not named."""

    def in_words(self) -> str:
        """For people: the largest number in float16, and what is in float32."""
        kept = [f"{name} ({why})" for name, why in self.float32.items()]
        more = f" and {len(kept) - 3} more" if len(kept) > 3 else ""
        return f"at most {self.largest:.3g} of 65504; in float32: {', '.join(kept[:3]) or 'nothing more'}{more}"


class OperatingPoint(BaseModel):
    """Where to cut the scores: the best F1 (matches of IoU ≥ 0.5) on labelled images."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    score: _Share
    """Of all classes together: detections that score at least this are kept."""
    f1: _Share
    precision: _Share
    recall: _Share
    class_scores: list[_Share | None]
    """The best cut of each class alone, by label; None for a class without a match."""
    images: int = Field(ge=1)
    """Labelled images that it was measured on."""

    def in_words(self) -> str:
        """For people: the score, and what it gives."""
        return (
            f"best F1 {self.f1:.3f} at a score of {self.score:g} (precision {self.precision:.3f}, recall "
            f"{self.recall:.3f})"
        )


class Heads(BaseModel):
    """What the output layers of a file give that ends with them, and what decoding needs besides the card: see
    `deploy.core.heads`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    strides: list[_Pixels] = Field(min_length=1)
    """Unit of the distances of each level, in pixels of the canvas, finest level first. A level has
    ceil(height / stride) by ceil(width / stride) places."""
    bins: int = Field(ge=1)
    """Values of each of a box's four sides, logits of its distances 0, 1, 2, … in strides; 1: the distance itself."""
    offset: float = 0.0
    """Centre of the first place in x and in y, as a share of the way to the next one."""
    fitted: bool = False
    """Places lie floor(height / h) and floor(width / w) pixels apart, as torchvision's do, where a level has h by w
    places; a stride otherwise."""
    centerness: bool = False
    """Each place has a logit of its own, whose probability the scores are the geometric mean with."""

    @property
    def names(self) -> list[str]:
        """The outputs in their order: `cls_8`, `box_8`, `cls_16`, …, with `ctr_8` behind the boxes of each level."""
        kinds = ("cls", "box", "ctr") if self.centerness else ("cls", "box")
        return [f"{kind}_{stride}" for stride in self.strides for kind in kinds]


class Form(BaseModel):
    """What a file takes and gives where that is not what `compress export` writes at first: see `deploy.graph.form`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    batch: int | None = Field(default=None, ge=1)
    """The one batch size that the file takes; None: any."""
    labels: Literal["int64", "int32"] = "int64"
    images: Literal["uint8", "float32"] = "uint8"
    """Type of the pixels, whose values are 0 to 255 in both."""
    heads: Heads | None = None
    """The file gives what its output layers do, and the caller decodes that; None: it gives detections."""

    def in_words(self) -> str:
        """For people: what is not as usual."""
        said = [] if self.batch is None else [f"a fixed batch of {self.batch}"]
        said += [] if self.labels == "int64" else [f"{self.labels} labels"]
        said += [] if self.images == "uint8" else [f"{self.images} pixels"]
        return ", ".join(said + ([] if self.heads is None else ["outputs to be decoded"])) or "the usual form"


class ModelCard(BaseModel):
    """Facts of a deployable file, which it carries itself. `input_size` is (height, width) in pixels."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    schema_version: Literal[1] = 1
    name: str
    class_names: list[str] = Field(min_length=1)
    category_ids: list[int]
    """The dataset's category id of each label; `labels` of a detection index this list."""
    input_size: tuple[_Pixels, _Pixels]
    resize: Literal["fit"] = "fit"
    """`fit`: keep the ratio, fill the canvas at the right and at the bottom with `pad_color`."""
    short: _Pixels | None = None
    """Images are not made larger than this on the short side (nor `long` on the long side), however large the
    canvas: the scale that the model was trained and evaluated at. None: the canvas alone decides."""
    long: _Pixels | None = None
    pad_color: tuple[_Byte, _Byte, _Byte] = PAD_COLOR
    score_threshold: _Share = SCORE_THRESHOLD
    nms_threshold: _Share = NMS_THRESHOLD
    max_detections: int = Field(default=MAX_DETECTIONS, ge=1)
    candidates: int = Field(default=CANDIDATES, ge=1)
    precision: dict[str, str] = {}
    """Number format of each part as the graph has it, for example `{"backbone": "int8", "head": "fp32+int8"}`; `bf16`
    of all parts: the graph is in float32, and computed in bfloat16 by a runtime that can."""
    quantization: Quantization | None = None
    """None for a file without int8 layers."""
    half: HalfPrecision | None = None
    """None for a file without float16, and for one made before it was measured."""
    form: Form = Form()
    checkpoint_sha256: str = ""
    recipe_sha256: str = ""
    operating_point: OperatingPoint | None = None
    """None for a file that was not measured on labelled images."""
    val_map: float | None = None
    """COCO mAP in percent of the checkpoint on its validation set; None when it was not measured."""
    versions: dict[str, str] = {}
    created: str = ""
    """UTC, ISO 8601."""

    @property
    def shown_score(self) -> float:
        """The score from which detections are shown to people: that of the operating point, where there is one."""
        return SHOWN_SCORE if self.operating_point is None else self.operating_point.score

    @model_validator(mode="after")
    def _fits_the_classes(self) -> ModelCard:
        if len(self.category_ids) != len(self.class_names):
            raise ValueError(f"{len(self.class_names)} class_names but {len(self.category_ids)} category_ids")
        if len(set(self.category_ids)) != len(self.category_ids):
            raise ValueError("category_ids are not unique")
        if self.operating_point is not None and len(self.operating_point.class_scores) != len(self.class_names):
            raise ValueError(f"operating_point: class_scores must be {len(self.class_names)}, one a class")
        return self


def need_plain(card: ModelCard, path: Path, what: str) -> None:
    """Raise UserError for a file of a form of its own. what: is done with the usual one, as in "engines are built"."""
    if card.form != Form():
        raise UserError(f"{path}: has {card.form.in_words()}; {what} from the file that compress export writes first")


def network_precision(precision: Mapping[str, str]) -> str:
    """The number formats of the network in short, narrowest first: `fp16`, `int8+fp32`."""
    kinds = {kind for part, formats in precision.items() if part != PROCESSING for kind in formats.split("+")}
    return "+".join(sorted(kinds, key=lambda kind: ("int8", "fp16", "bf16", "fp32").index(kind)))


def card_from_file(path: Path) -> ModelCard:
    """The card of the ONNX file at `path`. Raises UserError."""
    import onnxruntime  # reads the metadata without the `onnx` package, which a serving machine does not have

    path = Path(path)
    if not is_file(path):
        raise UserError(f"{path}: no such file")
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    try:
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime raises a dozen unrelated types
        raise UserError(f"{path}: not a readable ONNX file: {first_line(error)}") from error
    return card_from_session(session, str(path))


def scanned_card(path: Path) -> ModelCard:
    """The card of the ONNX file at `path`, read from its bytes: no session is opened. Raises UserError as `scan_onnx`
    does, and for a file without a card."""
    return parse_card(scan_onnx(path).metadata.get(METADATA_KEY), str(path))


def card_from_session(session: Any, where: str = "model") -> ModelCard:
    """The card of an open `onnxruntime.InferenceSession`. Raises UserError, naming `where`."""
    return parse_card(session.get_modelmeta().custom_metadata_map.get(METADATA_KEY), where)


def card_beside(path: Path, *parts: Path) -> ModelCard:
    """The card of a file that cannot carry it: `student.mnn` has `student.mnn.json`.

    parts: other files of it, such as its weights. Raises UserError where there is no card, and for one that was written
    for other files.
    """
    file = _beside(path)
    if not is_file(file):
        raise UserError(f"{file}: no such file; it is the card of {path.name}, made with it: keep both together")
    try:
        text = file.read_text(encoding="utf-8")
        content = json.loads(text)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file}: cannot be read: {first_line(error)}") from None
    except ValueError:
        return parse_card(text, str(file))  # which says what is wrong
    if isinstance(content, dict) and isinstance(hashes := content.pop(_HASHES, None), list):
        for part, wanted in zip((path, *parts), hashes, strict=False):
            if sha256_of(part) != wanted:
                raise UserError(f"{part}: is not the file that {file} was written with; bring both from one place")
        text = json.dumps(content)
    return parse_card(text, str(file))


def write_card_beside(card: ModelCard, path: Path, *parts: Path) -> None:
    """Write what `card_beside` reads, once the files are there."""
    hashes = [sha256_of(part) for part in (path, *parts)]
    write_text(_beside(path), json.dumps({**card.model_dump(mode="json"), _HASHES: hashes}, indent=1))


def _beside(path: Path) -> Path:
    return path.with_name(path.name + ".json")


def parse_card(text: str | None, where: str) -> ModelCard:
    """The card in a metadata string. Raises UserError, naming `where`."""
    if not text:
        raise UserError(f"{where}: no model card (metadata key '{METADATA_KEY}'): export it with `compress export`")
    try:
        content = json.loads(text)
        if isinstance(content, dict) and content.get("schema_version", 1) != 1:
            found = content["schema_version"]
            raise UserError(f"{where}: model card of schema {found}, this program reads 1: export again")
        return ModelCard.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"]) or "card"
        raise UserError(f"{where}: bad model card: {key}: {first['msg']}") from error
    except json.JSONDecodeError as error:
        raise UserError(f"{where}: bad model card: not JSON: {error}") from error
