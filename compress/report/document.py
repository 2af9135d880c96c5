"""report.json as models.

Every figure may be absent (None): the page and the table then say so in words. A figure that is present must have the
right type.
"""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator

from compress.manifest import BASELINE, FINE_TUNED, PRUNED, STUDENT, TEACHER
from compress.report.text import signed
from deploy.core.card import SHOWN_SCORE, OperatingPoint
from deploy.validate.analysis import CONFUSED_SCORE

ROLES = (TEACHER, PRUNED, BASELINE, FINE_TUNED, STUDENT)
"""Models that a report may hold, in the order that they are shown in."""
TITLES = {role: role.capitalize() for role in (TEACHER, BASELINE, STUDENT)}
"""What a run without pruning compares."""
TITLES_OF_PRUNED = {
    TEACHER: "Teacher",
    PRUNED: "Pruned, not trained",
    BASELINE: "From scratch",
    FINE_TUNED: "Pruned, labels alone",
    STUDENT: "Student",
}
"""What a run compares whose student is a pruned detector."""
TEACHER_IN_TORCH = "teacher (torch)"
"""`file` of the artifact row with the teacher's latency."""
STUDENT_IN_TORCH = f"{STUDENT}.safetensors"
"""`file` of the artifact row of the student in PyTorch, which the files are compared with."""
IN_TORCH = {TEACHER: TEACHER_IN_TORCH, STUDENT: STUDENT_IN_TORCH}
"""Role → `file` of the artifact row that is the model itself, and no file that ships."""


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


Number = Annotated[float | None, BeforeValidator(_finite)]
"""A finite figure, or None where it was not measured (JSON null, NaN and infinity)."""


class _Part(BaseModel):
    """Keys that this page does not show are allowed: report.json may hold more than is drawn."""

    model_config = ConfigDict(extra="ignore", frozen=True, populate_by_name=True)


class Figures(_Part):
    """One trained model. AP figures are in percent, 0 to 100; `map_at_max` counts `max_detections` of a class in an
    image, where that is more than COCO's 100."""

    map: Number = None
    map_at_max: Number = None
    max_detections: int | None = None
    map50: Number = None
    map75: Number = None
    per_class: dict[str, Number] = {}
    operating_point: OperatingPoint | None = None
    params_m: Number = None
    gflops: Number = None


class Models(_Part):
    """pruned: the student as it was cut, before any training. baseline: the student's architecture from random weights,
    labels alone. fine_tuned: the cut detector, labels alone."""

    teacher: Figures | None = None
    pruned: Figures | None = None
    baseline: Figures | None = None
    fine_tuned: Annotated[Figures | None, Field(alias=FINE_TUNED)] = None
    student: Figures | None = None

    def of(self, role: str) -> Figures | None:
        """Figures of one of `ROLES`; None: it is not in this run."""
        found: Figures | None = getattr(self, "fine_tuned" if role == FINE_TUNED else role)
        return found

    @property
    def is_pruned(self) -> bool:
        """Whether the student is a pruned detector."""
        return self.pruned is not None

    @property
    def titles(self) -> dict[str, str]:
        """Role → what it is called, for the models that this run compares. A pruned student that learns from labels
        alone has no second one of its kind, so that row stands only where there is one."""
        if not self.is_pruned:
            return TITLES
        return {role: title for role, title in TITLES_OF_PRUNED.items() if role != FINE_TUNED or self.fine_tuned}


class Latency(_Part):
    """Percentiles in milliseconds."""

    p50: Number = None
    p90: Number = None
    p95: Number = None
    p99: Number = None


class Layers(_Part):
    """Number of layers, and the share of each number format among them, 0 to 1."""

    count: int = 0
    share: dict[str, float] = {}


class Machine(_Part):
    """Versions that an engine was built with, and the GPU it was built for."""

    library: str = "TensorRT"
    version: str = ""
    gpu: str | None = None


class EngineOptions(_Part):
    """batches: smallest, best and largest."""

    batches: tuple[int, int, int] = (1, 1, 1)


class Engine(_Part):
    """An engine's card, as much of it as is shown.

    network: convolutions and matrix products as they were typed. layers: of the built engine; None: `layers_missing`
        says why they are not known.
    """

    machine: Machine = Machine()
    options: EngineOptions = EngineOptions()
    network: Layers = Layers()
    layers: Layers | None = None
    layers_missing: str = ""
    build_seconds: Number = None


class Different(_Part):
    """A picture in which a file differs from its reference: id in the data, name, and how much, in sums of scores."""

    id: int
    file: str
    difference: Number = None


class Half(_Part):
    """Numbers of a file's float16, as its card has them: how many images they were measured on, the largest one, and
    the layers that stay in float32 with the reason."""

    images: int = 0
    largest: Number = None
    float32: dict[str, str] = {}


class ErrorCost(_Part):
    """points: of AP50 that mending a kind of error gains. count: detections or objects."""

    points: Number = None
    count: int = 0


class Slice(_Part):
    """mAP on some of the images, in percent."""

    name: str
    images: int
    map: Number = None


class ShapeMap(_Part):
    """mAP on the objects of a shape, in percent."""

    name: str
    objects: int
    map: Number = None


class Analysis(_Part):
    """errors: by kind. confusion: class of an object (None: no object), class of the detection (None: not found) and
    how often, of detections with a score of at least `confusion_score`. curve: score, precision and recall of what
    scores at least as much, highest score first."""

    errors: dict[str, ErrorCost] | None = None
    slices: list[Slice] = []
    shapes: list[ShapeMap] = []
    confusion_score: float = CONFUSED_SCORE
    confusion: list[tuple[str | None, str | None, int]] = []
    curve: list[tuple[float, float, float]] = []


class Artifact(_Part):
    """One exported file. `map` in percent, `map_drop` in points of it below the reference, `training_drop` below what
    training measured for these weights; `agreement` a share, 0 to 1; `map_at_max` as of a model; `engine` of a file
    that TensorRT built. `latency_doubts`: why latency and throughput were not measured well. `reason`: why the gate
    fails; `differs_most`: the pictures that show it. `map_small` and so on: of objects of a size; `analysis`: what an
    mAP does not say; `recall`: share of the objects of each class that are found at `Report.recall_score`."""

    file: str
    backend: str = ""
    precision: str = ""
    size_mb: Number = None
    map: Number = None
    map_at_max: Number = None
    max_detections: int | None = None
    map_drop: Number = None
    training_drop: Number = None
    agreement: Number = None
    latency_ms: Latency | None = None
    throughput_ips: Number = None
    latency_doubts: list[str] = []
    engine: Engine | None = None
    gate: str = "not run"
    reason: str | None = None
    differs_most: list[Different] = []
    half: Half | None = None
    note: str | None = None
    map_small: Number = None
    map_medium: Number = None
    map_large: Number = None
    operating_point: OperatingPoint | None = None
    analysis: Analysis | None = None
    recall: dict[str, Number] = {}

    @field_validator("gate")
    @classmethod
    def _known_gate(cls, value: str) -> str:
        if value not in ("pass", "fail") and not value.startswith("not run"):
            raise ValueError(f"{value!r} is none of 'pass', 'fail' and 'not run: why'")
        return value

    @property
    def p50(self) -> float | None:
        return self.latency_ms.p50 if self.latency_ms else None

    @property
    def label(self) -> str:
        """What it is called beside models: the file, or a model in PyTorch."""
        return f"{STUDENT} (torch)" if self.file == STUDENT_IN_TORCH else self.file

    @property
    def well_timed(self) -> float | None:
        """p50, where it was measured well."""
        return None if self.latency_doubts else self.p50

    @property
    def p99(self) -> float | None:
        return self.latency_ms.p99 if self.latency_ms else None


class Box(_Part):
    """`box` is xyxy in pixels of the image file; `label` a class name or a 0-based index into the classes."""

    box: tuple[float, float, float, float]
    label: str | int
    score: Number = None


class Picture(_Part):
    """Boxes on an image of the validation set. kind, why: it was chosen (`gallery`). files: boxes of exported files."""

    image: str
    kind: str = ""
    why: str = ""
    files: dict[str, list[Box]] = {}
    ground_truth: list[Box] | None = None
    teacher: list[Box] | None = None
    baseline: list[Box] | None = None
    student: list[Box] | None = None


class Uncertainty(_Part):
    """Spread of the teacher's scores on one picture under Monte Carlo dropout (`compress.distill.uncertainty`).

    samples, rate: of the dropout on the teacher's pyramid maps.
    teacher: its detections without dropout.
    stride: pixels of the image file between neighbouring values, (x, y).
    rows: one string a row, standard deviations separated by spaces; value j of row i is that of pixel
        (j * stride x, i * stride y).
    variance: of the dropout copies by pyramid level, mean over channels and locations.
    """

    image: str
    samples: int
    rate: float
    teacher: list[Box] = []
    stride: tuple[Annotated[float, Field(gt=0)], Annotated[float, Field(gt=0)]]
    rows: Annotated[list[str], Field(min_length=1)]
    variance: dict[str, Number] = {}

    @field_validator("rows")
    @classmethod
    def _a_rectangle_of_deviations(cls, rows: list[str]) -> list[str]:
        for index, row in enumerate(rows):
            try:
                values = [float(word) for word in row.split()]
            except ValueError:
                raise ValueError(f"row {index} is not numbers separated by spaces") from None
            if not values or len(values) != len(rows[0].split()):
                raise ValueError(f"row {index} has {len(values)} values, row 0 has {len(rows[0].split())}")
            if not all(0 <= value < math.inf for value in values):
                raise ValueError(f"row {index} holds a value that is not a standard deviation")
        return rows

    @property
    def values(self) -> list[list[float]]:
        return [[float(word) for word in row.split()] for row in self.rows]


class PseudoLabels(_Part):
    """Figures on what teachers labelled for the student. labelled_images: with people's labels. images: that the
    teachers labelled, with `labels` boxes and `regions` too uncertain for one. skipped: images that could not be read.
    first_stage_map: of the student before it was fine-tuned, percent; None where it was not."""

    labelled_images: int
    images: int
    labels: int
    regions: int
    skipped: int = 0
    teachers: list[str] = []
    first_stage_map: Number = None


class PrunedLayer(_Part):
    """Channels that leave together, by the layer that makes them: their number, and how many are left."""

    name: str
    width: Annotated[int, Field(ge=1)]
    left: Annotated[int, Field(ge=0)]


class LayerSensitivity(_Part):
    """points: share of the channels that stays, 0 to 1, and the mAP then, percent, with all other layers whole."""

    name: str
    points: list[tuple[float, float]]


class Sensitivity(_Part):
    """mAP (percent, on so many training images) of the whole detector, and with fewer channels in one layer."""

    map: float
    images: int
    rows: list[LayerSensitivity]


class PruningLatency(_Part):
    """Files of detectors that were timed, in milliseconds.

    whole_ms, median_ms: of the whole detector and of the one that was found, interval_ms: 95 % of the latter.
    aa_ratio: 95 % interval of its time divided by its own, which is what noise alone does.
    trials: GFLOPs and milliseconds of each detector that was looked at.
    note, warnings: what did not go as it should.
    """

    asked: float
    whole_ms: float
    median_ms: float
    interval_ms: tuple[float, float]
    aa_ratio: tuple[float, float]
    trials: list[tuple[float, float]] = []
    precision: str = "fp32"
    providers: list[str] = []
    note: str | None = None
    warnings: list[str] = []


class Pruning(_Part):
    """How the student was cut, from `of`: the teacher, or a checkpoint.

    budget: the key of the recipe; asked: its value; whole, found: what it limits, before and after (GFLOPs, millions of
    parameters, milliseconds, mAP in percent on training images). importance, shares, schedule: as in the recipe.
    note: where much less is left than asked for.
    """

    of: str = TEACHER
    importance: str = ""
    shares: str = ""
    schedule: str = ""
    budget: Literal["gflops", "params", "latency_ms", "max_map_drop"]
    asked: float
    whole: float
    found: float
    rows: list[PrunedLayer] = []
    note: str | None = None
    sensitivity: Sensitivity | None = None
    latency: PruningLatency | None = None


class Comparison(_Part):
    """points: of mAP that a model or file has more than another on the same images; low, high: its 95 % interval over
    draws of them."""

    of: str
    against: str
    points: float
    low: float
    high: float

    @property
    def is_noise(self) -> bool:
        """The difference cannot be told from none."""
        return self.low <= 0 <= self.high

    def in_words(self) -> str:
        """`95 % interval −0.4 to +2.1`, and whether that is noise."""
        noise = ", cannot be told from noise" if self.is_noise else ""
        return f"95\N{NO-BREAK SPACE}% interval {signed(self.low, 1)} to {signed(self.high, 1)}{noise}"


class Report(_Part):
    """report.json; name and models make it one, the rest may be absent. validation_images: that all mAP are of.
    comparisons: of models and files whose detections were kept. recall_score: that the recall of files is of.
    methods: of distillation; None: an earlier build did not say."""

    name: Annotated[str, Field(min_length=1)]
    models: Models
    created: str = ""
    classes: list[str] = []
    validation_images: int | None = None
    comparisons: list[Comparison] = []
    recall_score: Number = None
    pruning: Pruning | None = None
    artifacts: list[Artifact] = []
    methods: list[str] | None = None
    pseudo_labels: PseudoLabels | None = None
    environment: dict[str, Any] = {}
    commands: list[str] = []
    pictures: list[Picture] = []
    uncertainty: list[Uncertainty] = []

    def compared(self, of: str, against: str) -> Comparison | None:
        """How sure a difference is; None: it was not looked at."""
        return next((row for row in self.comparisons if (row.of, row.against) == (of, against)), None)

    def in_torch(self, role: str) -> Artifact | None:
        """The row of a model in PyTorch: its latency, and of the student the gate against training."""
        return next((a for a in self.artifacts if a.file == IN_TORCH.get(role)), None)

    @property
    def files(self) -> list[Artifact]:
        """Files that ship: the rows that are not a model in PyTorch which `models` has."""
        models = [IN_TORCH[role] for role in IN_TORCH if self.models.of(role) is not None]
        return [a for a in self.artifacts if a.file not in models]

    def shown_score(self, role: str) -> float:
        """The score from which detections of one of `ROLES` are in `pictures`."""
        figures = self.models.of(role)
        return SHOWN_SCORE if figures is None or figures.operating_point is None else figures.operating_point.score

    def class_name(self, label: str | int) -> str:
        if isinstance(label, int) and 0 <= label < len(self.classes):
            return self.classes[label]
        return str(label)
