"""A recipe: one YAML file that holds every setting of a run, checked completely before anything starts.

    recipe = load_recipe(Path("recipes/quickstart.yaml"), ["train.epochs=3"])

Public: `load_recipe`, `load_teacher_file`, `dump_recipe`, `recipe_sha256`, and the models from `Recipe` down. The
models are strict (no unknown keys, no silent conversion) and frozen. Relative paths are relative to the working
directory, as in a shell. Sizes are pixels unless the name says otherwise.

YAML is read with the scalar rules of YAML 1.2: `1e-4` is a number and `no` is a word, not false.
"""

from __future__ import annotations

import difflib
import hashlib
import itertools
import json
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    Field,
    ValidationError,
    model_validator,
)
from pydantic_core import PydanticCustomError

from compress.config.base import Count, Fraction, Positive, Seed, Settings, Weight, broken_rule
from compress.config.methods import Methods
from compress.config.pseudo import Labels, PseudoLabels
from compress.config.teacher import BOXES_ALONE, SOURCES, Source
from deploy.core.errors import UserError

# ------------------------------------------------------------------------------------------------ data


class Split(Settings):
    """One labelled set of images in COCO format."""

    annotations: Path
    """COCO instances JSON."""
    images: Path
    """Folder that the JSON's file names are relative to."""


class Synthetic(Settings):
    """The generated dataset: textured shapes on clutter, the same pixels for the same settings."""

    train: Positive
    """Training images."""
    val: Positive
    """Validation images."""
    size: Annotated[int, Field(ge=32, le=4096)] = 160
    """Height and width of every image."""
    classes: Annotated[int, Field(ge=2, le=24)] = 10
    """Object classes."""
    seed: Seed = 0
    """Seed of the generator."""
    style: Literal["plain", "night"] = "plain"
    """How the scenes look: night is dark, bluish, blurred and noisy. The objects are the same."""


def _ordered(pair: tuple[float, float]) -> tuple[float, float]:
    if pair[0] > pair[1]:
        raise PydanticCustomError("rule", "the smaller number comes first")
    return pair


class Data(Settings):
    """The images, and what happens to them before the network. Either `synthetic`, or `train` and `val`."""

    train: Split | None = None
    """Training set."""
    val: Split | None = None
    """Validation set; never trained on."""
    synthetic: Synthetic | None = None
    """Generate the data instead of reading it."""
    short: Positive | Annotated[tuple[Positive, Positive], AfterValidator(_ordered)] = 800
    """Images keep their ratio and are resized until the short side is `short` or the long side is `long`,
    whichever comes first. A pair: random in the closed range while training, its maximum otherwise."""
    long: Positive = 1333
    """Limit of the long side."""
    flip: Fraction = 0.5
    """Probability of a horizontal flip while training."""
    photometric: bool = False
    """Random brightness, contrast, saturation and hue while training."""
    scale_jitter: (
        Annotated[tuple[Annotated[float, Field(gt=0)], Annotated[float, Field(gt=0)]], AfterValidator(_ordered)] | None
    ) = None
    """Random zoom while training: a factor in this range, then crop (above 1) or pad (below 1)."""
    workers: Count = 2
    """Loader processes for each training process; 0 loads in the process itself."""
    drop_empty: bool = False
    """Do not train on images without objects or with a side below 32 pixels, as mmdet does."""
    cache: bool = False
    """Keep every decoded image in memory (uint8)."""

    @model_validator(mode="after")
    def _rules(self) -> Data:
        if self.synthetic is not None and (self.train is not None or self.val is not None):
            raise broken_rule("synthetic", "excludes data.train and data.val; keep one of the two")
        if self.synthetic is None and (self.train is None or self.val is None):
            absent = " and ".join(k for k in ("train", "val") if getattr(self, k) is None)
            raise broken_rule("", f"needs train and val, or synthetic; there is no {absent}")
        short = self.short if isinstance(self.short, int) else self.short[1]
        if short > self.long:
            raise broken_rule("short", f"{short} is more than data.long, {self.long}")
        return self

    @property
    def eval_short(self) -> int:
        """The short side used for evaluation, in pixels."""
        return self.short if isinstance(self.short, int) else self.short[1]


# ----------------------------------------------------------------------------------------------- models

Backbone = Literal[
    "resnet18",
    "resnet34",
    "resnet50",
    "resnet101",
    "mobilenet_v3_small",
    "mobilenet_v3_large",
    "nano",
    "nano2x",
]


def _weights_file(path: Path) -> Path:
    if path.suffix not in (".pth", ".pt", ".safetensors"):
        choices = ["imagenet", "none"]
        hint = _did_you_mean(str(path), choices) or "; use imagenet, none, or a .pth or .safetensors file"
        raise PydanticCustomError("rule", "{problem}", {"problem": f"unknown weights '{path}'{hint}"})
    return path


def _whole_unless_pretrained(pretrained: Any, untrained: Any) -> Callable[[dict[str, Any]], Any]:
    """Default of a setting that only makes sense on a backbone that comes with weights."""
    return lambda fields: untrained if fields.get("weights", "none") == "none" else pretrained


class Model(Settings):
    """A detector: backbone, feature pyramid, head."""

    detector: Literal["gfl", "fcos", "retinanet", "faster_rcnn"] = "gfl"
    """gfl: Generalized Focal Loss head on a P3-P7 pyramid. fcos, retinanet: torchvision's heads and losses on the same
    levels. faster_rcnn: torchvision's two stages on P2-P6; it trains and teaches, but is not exported."""
    backbone: Backbone
    """Feature extractor."""
    weights: Literal["imagenet", "none"] | Annotated[Path, AfterValidator(_weights_file)] = "none"
    """Start of the backbone: torchvision's ImageNet weights, random, or a file with such weights."""
    neck_channels: Annotated[int, Field(ge=32, multiple_of=32)] = 256
    """Channels of the pyramid and the head (a multiple of 32; the head's GroupNorm takes 8 channels a group)."""
    head_depth: Annotated[int, Field(ge=0)] = 4
    """3x3 convolutions in each of the head's two towers (retinanet: at most 4). faster_rcnn: before its fully connected
    layer; 0: two fully connected layers and no convolutions."""
    anchor_scale: Annotated[float, Field(gt=0)] | None = None
    """retinanet, faster_rcnn: side of the smallest anchor of a level in its strides; smaller for small objects. null:
    torchvision's, 4 and 8."""
    roi_samples: Positive | None = None
    """faster_rcnn: proposals of an image that train the second stage; fewer for small images. null: 512."""
    frozen_stages: Annotated[int, Field(ge=-1, le=4)] = Field(default_factory=_whole_unless_pretrained(1, -1))
    """Stages of the backbone that do not train: -1 none, 0 the stem, n the stem and the first n of four.
    Default: 1 with weights, -1 without."""
    norm_eval: bool = Field(default_factory=_whole_unless_pretrained(True, False))
    """Keep the backbone's BatchNorm statistics as loaded. Default: true with weights, false without."""

    @model_validator(mode="after")
    def _rules(self) -> Model:
        if self.backbone.startswith("nano") and self.weights == "imagenet":
            raise broken_rule("weights", f"{self.backbone} has no ImageNet weights; use none or a file")
        if self.detector == "retinanet" and self.head_depth > 4:
            raise broken_rule("head_depth", "torchvision's RetinaNet has at most 4 convolutions in a tower")
        if self.anchor_scale is not None and self.detector in ("gfl", "fcos"):
            raise broken_rule("anchor_scale", f"{self.detector} has no anchors to scale; leave it out")
        if self.roi_samples is not None and self.detector != "faster_rcnn":
            raise broken_rule("roi_samples", f"{self.detector} has no second stage; leave it out")
        return self


class Optimizer(Settings):
    """The optimizer; weight decay applies to every parameter."""

    name: Literal["sgd", "adamw"] = "sgd"
    """Which one."""
    lr: Annotated[float, Field(gt=0)] = 0.01
    """Learning rate for the recipe's batch size, after warm-up."""
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """Momentum of SGD; first beta of AdamW."""
    weight_decay: Weight = 1e-4
    """Weight decay."""


def _rising(values: tuple[int, ...]) -> tuple[int, ...]:
    if any(a >= b for a, b in itertools.pairwise(values)):
        raise PydanticCustomError("rule", "the numbers must rise")
    return values


class Schedule(Settings):
    """The learning rate over time: linear warm-up, then steps or a half cosine down to zero."""

    name: Literal["multistep", "cosine"] = "multistep"
    """Shape after the warm-up."""
    milestones: Annotated[tuple[Positive, ...], AfterValidator(_rising)] = (8, 11)
    """multistep: epochs after which the rate is multiplied by `gamma`."""
    gamma: Annotated[float, Field(gt=0, le=1)] = 0.1
    """multistep: the factor."""
    warmup_steps: Count = 500
    """Optimizer steps of linear warm-up."""
    warmup_factor: Annotated[float, Field(gt=0, le=1)] = 0.001
    """Share of the rate at the first step."""


class Train(Settings):
    """One training run. Exactly one of `epochs` and `steps`."""

    epochs: Positive | None = None
    """Length in passes over the data."""
    steps: Positive | None = None
    """Length in optimizer steps."""
    batch_size: Positive = 16
    """Images in one optimizer step over all devices."""
    optimizer: Optimizer = Optimizer()
    """Optimizer."""
    schedule: Schedule = Schedule()
    """Learning-rate schedule."""
    ema: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Decay of the moving average of the weights, which is then what is evaluated and kept; null: none."""
    precision: Annotated[
        Literal["32", "bf16", "fp16"], BeforeValidator(lambda value: "32" if value == 32 else value)
    ] = "32"
    """Mixed precision of the network; losses are always float32."""
    accumulate: Positive = 1
    """Parts that a batch is split into to save memory. Gradients add up; each part has its own normaliser."""
    clip_norm: Annotated[float, Field(gt=0)] | None = None
    """Largest gradient norm; null: no clipping."""
    eval_every: Positive | None = None
    """Epochs between evaluations; null: only at the end."""
    checkpoint_every: Positive | None = None
    """Optimizer steps between checkpoints; null: after every epoch."""
    compile: bool = False
    """Compile the dense passes of the losses with torch.compile (the first step then takes longer)."""
    kernels: Literal["auto", "triton", "cuda", "torch"] = "auto"
    """What computes losses and dropout; auto: Triton on CUDA, CUDA C++ where there is no Triton, PyTorch on CPUs."""
    devices: Positive = 1
    """Processes, one for each device."""
    accelerator: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to train; auto takes CUDA when there is a device."""
    select: Literal["best", "last"] = "best"
    """Which weights become the result: of the best evaluation, or the last."""

    @model_validator(mode="after")
    def _rules(self) -> Train:
        if self.epochs is None and self.steps is None:
            raise broken_rule("", "no length; give epochs or steps")
        if self.epochs is not None and self.steps is not None:
            raise broken_rule("steps", "excludes epochs; keep one of the two")
        parts = self.devices * self.accumulate
        if self.batch_size % parts:
            raise broken_rule("batch_size", f"{self.batch_size} is not a multiple of devices x accumulate = {parts}")
        warmup = self.schedule.warmup_steps
        if self.steps is not None and warmup >= self.steps:
            raise broken_rule(
                "schedule.warmup_steps",
                f"{warmup} warm-up steps leave nothing of {self.steps} steps; set it to {self.steps // 10}",
            )
        if self.precision == "fp16" and self.accelerator == "cpu":
            raise broken_rule("precision", "fp16 needs accelerator cuda; on the CPU use bf16 or 32")
        return self


# ----------------------------------------------------------------------------------------- distillation


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
        if self.inherit and self.given and self.checkpoint is None:
            raise broken_rule("inherit", f"needs a teacher of this project, not teacher.{self.given[0]}")
        return self


# ----------------------------------------------------------------------------------------------- deploy


class Benchmark(Settings):
    """How latency is measured."""

    batch_sizes: Annotated[tuple[Positive, ...], Field(min_length=1)] = (1,)
    """Batch sizes to measure."""
    seconds: Annotated[float, Field(gt=0)] = 5.0
    """Measuring time for each file and batch size, after the warm-up."""


class Qad(Settings):
    """Quantization-aware distillation: how the student goes on learning on the grids of its int8 file."""

    steps: Positive = 300
    """Optimizer steps, with the recipe's data, teacher, methods and batch size."""
    lr: Annotated[float, Field(gt=0)] = 1e-4
    """Learning rate (AdamW, a half cosine down to zero after a tenth of warm-up). Scales of activations move by 20
    times this, relatively."""


class Int8(Settings):
    """How int8 files are made."""

    target: Literal["cpu", "tensorrt"] = "cpu"
    """Whose format: cpu is ONNX Runtime's, tensorrt TensorRT's. Each runs the other's, slowly."""
    calibration: Path | None = None
    """Folder of images, or COCO JSON beside its images, that the ranges come from; null: the training images."""
    images: Positive = 128
    """Calibration images, spread evenly over what there is."""
    method: Literal["minmax", "percentile", "entropy"] = "minmax"
    """How a range is chosen: the extremes, 99.99 % of the values, or least loss of information."""
    reduce_range: bool | None = None
    """Weights of cpu files in 7 bits, for processors without VNNI; null: what this machine needs."""
    guided: bool = False
    """Keep the fewest layers in float that hold the loss within max_map_drop."""
    deciding_images: Positive = 300
    """Labelled training images, none of them for calibration, that guided decides on."""
    qad: Qad | None = None
    """Also make student.qad.onnx: calibrated like the int8 file, then trained on with the teacher. {} for the
    defaults."""


class Deploy(Settings):
    """The exported files and the gate that they must pass."""

    precisions: Annotated[tuple[Literal["fp32", "fp16", "int8", "mixed"], ...], Field(min_length=1)] = ("fp32",)
    """Files to write: student.onnx, student.fp16.onnx, student.int8.onnx, student.mixed.onnx (int8 layers, the rest
    fp16, for TensorRT)."""
    int8: Int8 = Int8()
    """How int8 and mixed files are made."""

    input_size: (
        tuple[
            Annotated[int, Field(ge=32, le=8192, multiple_of=32)],
            Annotated[int, Field(ge=32, le=8192, multiple_of=32)],
        ]
        | None
    ) = None
    """Height and width of the network input; null: the evaluation canvas, rounded up to 32."""
    score_threshold: Fraction = 0.05
    """Detections must score more than this."""
    nms_threshold: Fraction = 0.6
    """Boxes of one class that overlap more than this IoU suppress each other."""
    max_detections: Positive = 100
    """Detections for each image."""
    candidates: Annotated[int, Field(ge=1, le=3840)] = 1000  # the limit of TensorRT's TopK
    """Highest-scoring boxes that enter the suppression."""
    max_batch: Positive = 8
    """Largest batch that the file is checked with."""
    providers: Annotated[tuple[Literal["cpu", "cuda", "tensorrt"], ...], Field(min_length=1)] = ("cpu",)
    """Where ONNX Runtime runs the file for validation and benchmark."""
    max_map_drop: Weight = 0.5
    """The gate: largest loss of mAP (points) against the student in PyTorch."""
    benchmark: Benchmark = Benchmark()
    """How latency is measured."""

    @model_validator(mode="after")
    def _rules(self) -> Deploy:
        if "fp32" not in self.precisions or len(set(self.precisions)) < len(self.precisions):
            raise broken_rule("precisions", "each once, and fp32 among them: the others are compared with it")
        if self.candidates < self.max_detections:
            raise broken_rule("candidates", f"{self.candidates} is less than max_detections, {self.max_detections}")
        return self


class Recipe(Settings):
    """Everything about one run."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    """Name of the run and of its folder."""
    seed: Seed = 0
    """Seed of everything random in training."""
    runs: Path = Path("runs")
    """Folder of run folders."""
    data: Data
    """The images."""
    labels: Labels | None = None
    """Which training images have labels; null: all."""
    student: Model
    """The detector that ships."""
    teacher: Teacher | None = None
    """The detector to learn from."""
    methods: Methods = Methods()
    """How to learn from it."""
    pseudo_labels: PseudoLabels | None = None
    """Let teachers label the images that have no labels, and train on these as well; null: no."""
    train: Train
    """How the student trains."""
    baseline: bool = False
    """Also train the same student from the labels alone, to show what distillation and pseudo labels are worth."""
    deploy: Deploy = Deploy()
    """The exported file."""

    @property
    def run_dir(self) -> Path:
        """Where this run keeps its files: `<runs>/<name>`."""
        return self.runs / self.name

    @model_validator(mode="after")
    def _rules(self) -> Recipe:
        methods = self.methods.enabled()
        if methods and self.teacher is None:
            raise broken_rule(f"methods.{next(iter(methods))}", "needs a teacher; add the section teacher")
        if methods and self.teacher is not None and set(self.teacher.given) & set(BOXES_ALONE):
            raise broken_rule(
                f"methods.{next(iter(methods))}",
                f"learns from features or logits, and teacher.{self.teacher.given[0]} gives boxes alone; use "
                "pseudo_labels, or another teacher",
            )
        if self.baseline and not methods and self.pseudo_labels is None:
            raise broken_rule("baseline", "needs something to compare with; add a method under methods")
        self._label_rules()
        if self.deploy.int8.qad is not None and self.student.detector != "gfl":
            raise broken_rule("deploy.int8.qad", f"is for gfl students, not {self.student.detector}; leave it out")
        trained = {"student": self.student}
        if self.teacher is not None and self.teacher.train is not None and self.teacher.model is not None:
            trained["teacher.model"] = self.teacher.model
        for key, model in trained.items():
            if model.weights == "none" and model.frozen_stages >= 0:
                raise broken_rule(f"{key}.frozen_stages", "would freeze random weights; set it to -1")
            if model.weights == "none" and model.norm_eval:
                raise broken_rule(f"{key}.norm_eval", "would freeze unset statistics; set it to false")
        return self

    def _label_rules(self) -> None:
        pseudo = self.pseudo_labels
        if pseudo is not None:
            if pseudo.teachers is None and self.teacher is None:
                raise broken_rule("pseudo_labels", "nobody labels; give pseudo_labels.teachers, or the section teacher")
            if not pseudo.unlabeled and (self.labels is None or self.labels.fraction == 1):
                raise broken_rule(
                    "pseudo_labels", "every image has labels; give folders in unlabeled, or labels.fraction below 1"
                )
            if pseudo.teachers and self.teacher is not None and not self.methods.enabled() and not self.teacher.inherit:
                raise broken_rule(
                    "teacher",
                    "nobody learns from it: pseudo_labels.teachers label, and there are no methods; remove it",
                )
            family = self.student.detector
            if pseudo.weighting == "score" and family != "gfl":
                raise broken_rule(
                    "pseudo_labels.weighting", f"score is for gfl students; a {family} student needs hard"
                )
            if pseudo.tau_ignore < pseudo.tau and family == "faster_rcnn":
                raise broken_rule(
                    "pseudo_labels.tau_ignore",
                    f"a faster_rcnn student cannot learn from unsure regions; set tau_ignore to {pseudo.tau:g}, equal "
                    "to tau, and there are none",
                )
            parts = self.train.devices * self.train.accumulate
            if pseudo.fine_tune is not None and (pseudo.fine_tune.batch_size or 0) % parts:
                raise broken_rule(
                    "pseudo_labels.fine_tune.batch_size",
                    f"{pseudo.fine_tune.batch_size} is not a multiple of train.devices x train.accumulate = {parts}",
                )
        if self.labels is not None and self.labels.fraction == 0:
            needs_labels = {
                "pseudo_labels.fine_tune": pseudo is not None and pseudo.fine_tune is not None,
                "pseudo_labels.thresholds": pseudo is not None and pseudo.thresholds == "best_f1",
                "teacher.train": self.teacher is not None and self.teacher.train is not None,
                "baseline": self.baseline,
                "deploy.int8.qad": self.deploy.int8.qad is not None,
                "deploy.int8.guided": self.deploy.int8.guided,
            }
            if pseudo is None:
                raise broken_rule("labels.fraction", "0 leaves nothing to train on; add pseudo_labels")
            if any(needs_labels.values()):
                key = next(key for key, wanted in needs_labels.items() if wanted)
                raise broken_rule(key, "needs labelled training images, and labels.fraction is 0")


# ------------------------------------------------------------------------------------------ load and dump


def load_recipe(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read and check a recipe; `overrides` are texts like `train.epochs=3`, values in YAML.

    Raises UserError with one line for each problem: `file:line: key: problem`, or `--set key: problem`.
    """
    return _load(path, Recipe, overrides)


def load_teacher_file(path: Path) -> Source:
    """The teacher in a YAML file that has a section `teacher` as recipes have it, with a source and nothing else.

    Raises UserError as `load_recipe` does.
    """
    return _load(path, TeacherFile).teacher


class TeacherFile(Settings):
    """A YAML file that describes a teacher."""

    teacher: Source
    """The teacher."""


Root = TypeVar("Root", bound=Settings)


def _load(path: Path, root: type[Root], overrides: Sequence[str] = ()) -> Root:
    path = Path(path)
    what = "recipe" if root is Recipe else "teacher"
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"{path}: no such {what} file") from None
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise UserError(f"{path}: cannot read the {what}: {reason}") from None
    document = _Document(str(path))
    data = document.read(text)
    for override in overrides:
        document.override(data, override)
    if document.problems:
        raise UserError("\n".join(document.problems))
    try:
        # Through JSON, because strict mode then means what YAML means: lists fill tuples, text fills
        # paths, whole numbers fill floats; and nothing else is converted.
        return root.model_validate_json(json.dumps(data))
    except RecursionError:  # a --set of thousands of keys in each other
        raise UserError(f"{path}: not a recipe: nested too deeply") from None
    except ValidationError as error:
        raise UserError("\n".join(_problems(error, data, document, root))) from None


def dump_recipe(recipe: Recipe) -> str:
    """The whole recipe, defaults included, as YAML that `load_recipe` reads back to an equal recipe."""
    return yaml.dump(recipe.model_dump(mode="json"), Dumper=_Dumper, sort_keys=False, width=110)


def recipe_sha256(recipe: Recipe) -> str:
    """SHA-256 of the settings, 64 hexadecimal digits; formatting, comments and written-out defaults do
    not change it."""
    canonical = json.dumps(recipe.model_dump(mode="json"), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()


# --------------------------------------------------------------------------------- YAML with line numbers

_SCALARS = (  # YAML 1.2 core schema, in the form PyYAML wants: tag, pattern, possible first characters
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?[0-9]+", list("-+0123456789")),
    ("float", r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?", list("-+.0123456789")),
    ("float", r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)", list("-+.")),
)


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012  PyYAML's own way to declare them


class _Dumper(yaml.SafeDumper):
    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012

    def ignore_aliases(self, data: Any) -> bool:
        return True


for _tag, _pattern, _first in _SCALARS:
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_pattern})$"), _first)


_Key = tuple[str | int, ...]
MAX_DIGITS = 100  # of a whole number; Python itself refuses to read thousands


class _Document:
    """Plain data from YAML, remembering where each key was written."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.places: dict[_Key, str] = {(): f"{name}:1"}
        self.problems: list[str] = []

    def read(self, text: str) -> dict[str, Any]:
        try:
            node = yaml.compose(text, Loader=_Loader)
        except yaml.MarkedYAMLError as error:
            mark = error.problem_mark or error.context_mark
            where = f"{self.name}:{mark.line + 1}" if mark else self.name
            raise UserError(f"{where}: not valid YAML: {_one_line(error.problem or error.context)}") from None
        except (yaml.YAMLError, ValueError, OverflowError) as error:  # PyYAML lets "\\UFFFFFFFF" become a ValueError
            raise UserError(f"{self.name}: not valid YAML: {_one_line(str(error))}") from None
        except RecursionError:
            raise UserError(f"{self.name}: not a recipe: nested too deeply") from None
        if node is None:
            raise UserError(f"{self.name}: the recipe is empty")
        if not isinstance(node, yaml.MappingNode):
            raise UserError(f"{self.name}:{node.start_mark.line + 1}: a recipe is a list of `key: value`")
        try:
            return self._value(node, (), None, ())
        except RecursionError:
            raise UserError(f"{self.name}: not a recipe: nested too deeply") from None

    def override(self, data: dict[str, Any], text: str) -> None:
        dotted, equals, written = text.partition("=")
        keys = tuple(part.strip() for part in dotted.split("."))
        place = f"--set {dotted.strip()}"
        if not equals or not all(keys):
            self.problems.append(f"--set {text}: write it as key=value, for example train.epochs=3")
            return
        try:
            node = yaml.compose(written, Loader=_Loader)
        except (yaml.YAMLError, ValueError, OverflowError, RecursionError):
            self.problems.append(f"{place}: '{written[:60]}' is not valid YAML")
            return
        if node is None:
            self.problems.append(f"{place}: no value; write null to unset it")
            return
        section: Any = data
        for depth, key in enumerate(keys[:-1]):
            child = section.get(key)
            if child is None:
                child = section[key] = {}
                self.places[keys[: depth + 1]] = place
            if not isinstance(child, dict):
                parent = ".".join(keys[: depth + 1])
                self.problems.append(f"{place}: {parent} is a value, not a section; set {parent} as a whole")
                return
            section = child
        for known in [k for k in self.places if k[: len(keys)] == keys]:
            del self.places[known]
        self.places[keys] = place
        section[keys[-1]] = self._value(node, keys, place, ())

    def where(self, key: _Key) -> str:
        """Place of the key, or of the nearest section around it."""
        while key not in self.places:
            key = key[:-1]
        return self.places[key]

    def report(self, key: _Key, problem: str) -> str:
        place, dotted = self.where(key), ".".join(map(str, key))
        if not key or place == f"--set {dotted}":
            return f"{place}: {problem}"
        return f"{place}: {dotted}: {problem}"

    def _value(self, node: yaml.Node, key: _Key, place: str | None, around: tuple[yaml.Node, ...]) -> Any:
        """Data of a node. `place` stands in for line numbers below a --set."""
        if node in around:
            self.problems.append(self.report(key, "an alias may not contain itself"))
            return None
        if isinstance(node, yaml.MappingNode):
            mapping: dict[str, Any] = {}
            for name_node, value_node in node.value:
                here = place or f"{self.name}:{name_node.start_mark.line + 1}"
                if not isinstance(name_node, yaml.ScalarNode):
                    self.problems.append(f"{here}: a key must be a word")
                    continue
                child = (*key, name_node.value)
                if name_node.value in mapping:
                    first = "" if place else f" (line {self.places[child].rpartition(':')[2]})"
                    self.problems.append(f"{here}: {'.'.join(map(str, child))}: given twice{first}")
                    continue
                self.places[child] = here
                mapping[name_node.value] = self._value(value_node, child, place, (*around, node))
            return mapping
        if isinstance(node, yaml.SequenceNode):
            items = []
            for index, item in enumerate(node.value):
                self.places[(*key, index)] = place or f"{self.name}:{item.start_mark.line + 1}"
                items.append(self._value(item, (*key, index), place, (*around, node)))
            return items
        assert isinstance(node, yaml.ScalarNode)
        if node.value == "" and node.style is None:  # `bckd:` looks like "on" and would mean "off"
            self.problems.append(self.report(key, "no value; write {} for a section of defaults, null for none"))
            return None
        match node.tag.rpartition(":")[2]:
            case "null":
                return None
            case "bool":
                return node.value.lower() == "true"
            case "int":
                if len(node.value) > MAX_DIGITS:
                    self.problems.append(self.report(key, f"a number of more than {MAX_DIGITS} digits"))
                    return None
                return int(node.value)
            case "float":
                return float(node.value.lower().replace(".inf", "inf").replace(".nan", "nan"))
            case "str":
                return node.value
        self.problems.append(self.report(key, f"the tag {node.tag} has no meaning here"))
        return None


# ------------------------------------------------------------------------------------------------ messages


def _problems(error: ValidationError, data: dict[str, Any], document: _Document, root: type[BaseModel]) -> list[str]:
    """One line for each problem, in the order of the file's sections."""
    found: dict[_Key, list[tuple[str, str]]] = {}
    alternatives: set[_Key] = set()
    for item in error.errors(include_url=False):
        kind = item["type"]
        key, is_alternative = _data_key(item, data)
        if kind == "default_factory_not_called":  # follows from another field's error
            continue
        if kind == "missing" and isinstance(key[-1], int):  # too few elements
            key, kind = key[:-1], "rule"
        if is_alternative:
            alternatives.add(key)
        if kind == "rule" and item.get("ctx", {}).get("key"):
            key = (*key, *item["ctx"]["key"].split("."))
        found.setdefault(key, []).append((kind, _message(item, key, root)))
        if kind == "extra_forbidden" and (meant := _closest(key, root)):  # a typing error is one problem, not two
            right = (*key[:-1], meant)
            if found.get(right, [("", "")])[0][0] == "missing":
                del found[right]
    # Of a value that may have several forms, speak of the form that fitted best: the one that failed deepest.
    for key in alternatives:
        if any(other != key and other[: len(key)] == key for other in alternatives):
            found.pop(key, None)
    return [document.report(key, _joined(messages)) for key, messages in found.items()]


def _joined(messages: list[tuple[str, str]]) -> str:
    """One message about one key: the rule that the value broke, else the forms that it may have."""
    rules = [text for kind, text in messages if kind == "rule"]
    if rules:
        return rules[-1]
    needs = [text.removeprefix("needs ") for kind, text in messages if kind in _NEEDED]
    if len(needs) > 1:
        return "needs " + " or ".join([*(text.partition(", got ")[0] for text in needs[:-1]), needs[-1]])
    return f"needs {needs[0]}" if needs else messages[0][1]


def _data_key(item: Any, data: Any) -> tuple[_Key, bool]:
    """The error's key in the data: pydantic's location without the names it gives to a union's members."""
    key: list[str | int] = []
    dropped = False
    for part in item["loc"]:
        here = isinstance(data, dict) and (part in data or item["type"] == "missing")
        here = here or (isinstance(data, list) and isinstance(part, int))
        if not here:
            dropped = True
            continue
        key.append(part)
        data = data.get(part) if isinstance(data, dict) else data[part] if part < len(data) else None
    return tuple(key), dropped


_NEEDED = {
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "bool_type": "true or false",
    "string_type": "text",
    "path_type": "a path",
    "tuple_type": "a list",
    "dict_type": "a section of keys",
    "model_type": "a section of keys",
    "model_attributes_type": "a section of keys",
    "finite_number": "a finite number",
}


_BOUNDS = {
    "greater_than": "more than",
    "greater_than_equal": "at least",
    "less_than": "less than",
    "less_than_equal": "at most",
    "multiple_of": "a multiple of",
}


def _message(item: Any, key: _Key, root: type[BaseModel]) -> str:
    kind, value, context = item["type"], item["input"], item.get("ctx", {})
    if kind == "json_invalid":
        return "not a recipe: nested too deeply, or text that is not Unicode"
    if kind == "missing":
        return f"needs {item['loc'][-1] + 1} numbers" if isinstance(item["loc"][-1], int) else "missing"
    if kind == "extra_forbidden":
        meant = _closest(key, root)
        known = ", ".join(_model_at(key[:-1], root).model_fields)
        hint = f"did you mean {meant}?" if meant else f"known here: {known}"
        return f"unknown key; {hint}"
    if kind == "literal_error":
        choices = re.findall(r"'([^']*)'", context["expected"])
        hint = _did_you_mean(str(value), choices) or ""
        return f"{value!r} is not one of {', '.join(choices)}{hint}"
    if kind in _NEEDED:
        return f"needs {_NEEDED[kind]}, got {value!r}"
    if kind == "rule":
        return context.get("problem") or item["msg"]
    if kind == "string_pattern_mismatch":
        return f"{value!r} is not a plain name (letters, digits, . _ -)"
    if kind == "too_long":
        return f"needs at most {context['max_length']} items, got {value!r}"
    if kind == "too_short":
        return f"needs at least {context['min_length']} items, got {value!r}"
    if kind in _BOUNDS:
        bound = next(iter(context.values()))
        return f"must be {_BOUNDS[kind]} {bound if isinstance(bound, int) else f'{bound:g}'}, got {value!r}"
    return f"{item['msg'].removeprefix('Input ')}, got {value!r}"


def _model_at(key: _Key, root: type[BaseModel]) -> type[BaseModel]:
    """The settings class of the section at `key`; a number in the key is a place in a list of sections."""
    model = root
    for part in key:
        if isinstance(part, str):
            model = next(_models_in(model.model_fields[part].annotation))
    return model


def _models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    """The settings classes that an annotation names, however deep."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for inner in get_args(annotation):
        yield from _models_in(inner)


def _closest(key: _Key, root: type[BaseModel]) -> str | None:
    """The setting that a misspelt key probably means."""
    fields = list(_model_at(key[:-1], root).model_fields)
    return next(iter(difflib.get_close_matches(str(key[-1]).lower(), fields, n=1, cutoff=0.5)), None)


def _did_you_mean(word: str, choices: Sequence[str]) -> str | None:
    close = difflib.get_close_matches(word.lower(), choices, n=1, cutoff=0.5)
    return f"; did you mean {close[0]}?" if close else None


def _one_line(text: str | None) -> str:
    return " ".join((text or "unreadable").split())
