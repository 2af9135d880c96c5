"""Settings of the exported files: precisions, thresholds, the gate, how latency is measured."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from compress.config.base import Fraction, ImportPath, Location, Positive, Settings, Weight, added_later, broken_rule
from deploy.core.card import CANDIDATES, MAX_CANDIDATES, MAX_DETECTIONS, NMS_THRESHOLD, SCORE_THRESHOLD
from deploy.core.precisions import PRECISIONS, PrecisionName, Target
from deploy.runtimes.providers import Provider
from deploy.tensorrt.card import EngineOptions


class Benchmark(Settings):
    """Settings of the latency measurement."""

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
    """Settings of int8 files."""

    target: Target = "cpu"
    """Whose format: cpu is ONNX Runtime's, tensorrt TensorRT's. Each runs the other's, slowly; OpenVINO runs both."""
    calibration: Location | None = None
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


_ENGINE = EngineOptions()


class Engines(Settings):
    """TensorRT engines, built where TensorRT is installed."""

    precisions: Annotated[tuple[PrecisionName, ...], Field(min_length=1)] | None = None
    """Files that engines are built from; null: all of deploy.precisions."""
    batch: tuple[Positive, Positive, Positive] = _ENGINE.batches
    """Smallest batch, the one that the engine is tuned for, largest batch."""
    workspace_gb: Annotated[float, Field(gt=0, le=1e4)] | None = _ENGINE.workspace_gb
    """Most device memory that a layer may use for scratch, in 1e9 bytes; null: all there is."""
    optimization_level: Annotated[int, Field(ge=0, le=5)] = _ENGINE.optimization_level
    """0 builds fastest, 5 searches longest for the fastest engine."""
    version_compatible: bool = _ENGINE.version_compatible
    """The engine runs with later TensorRT versions of the same major version as well."""
    hardware_compatible: Literal["ampere+", "same"] | None = _ENGINE.hardware_compatible
    """The engine runs on every GPU from Ampere on, or on every GPU of the same compute capability."""
    refit: Literal["all", "individual"] | None = _ENGINE.refit
    """Weights can be replaced later: all of them, or each that the network names."""

    def engine_options(self) -> EngineOptions:
        """The options of the builder."""
        return EngineOptions(batches=self.batch, **self.model_dump(exclude={"precisions", "batch"}))

    @model_validator(mode="after")
    def _rules(self) -> Engines:
        if not self.batch[0] <= self.batch[1] <= self.batch[2]:
            raise broken_rule("batch", f"{list(self.batch)} does not increase; write [smallest, best, largest]")
        if self.precisions is not None and len(set(self.precisions)) < len(self.precisions):
            raise broken_rule("precisions", "names a precision twice")
        return self


class Deploy(Settings):
    """The exported files and the gate that they must pass."""

    precisions: Annotated[tuple[PrecisionName, ...], Field(min_length=1)] = ("fp32",)
    """Files to write: student.onnx, student.fp16.onnx, student.bf16.onnx (fp32, computed in bfloat16 by OpenVINO),
    student.int8.onnx, student.mixed.onnx (int8 layers, the rest fp16, for TensorRT)."""
    int8: Int8 = Int8()
    """How int8 and mixed files are made."""

    input_size: (
        tuple[
            Annotated[int, Field(ge=32, le=8192, multiple_of=32)],
            Annotated[int, Field(ge=32, le=8192, multiple_of=32)],
        ]
        | None
    ) = None
    """Height and width of the network input, which training's evaluation uses as well; null: the smallest that holds
    every validation image at its size in the recipe. Padding costs time and changes detections (docs/deployment.md)."""
    score_threshold: Fraction = SCORE_THRESHOLD
    """Detections must score more than this."""
    nms_threshold: Fraction = NMS_THRESHOLD
    """Boxes of one class that overlap more than this IoU suppress each other."""
    max_detections: Positive = MAX_DETECTIONS
    """Detections for each image. mAP counts 100 of a class; above that, mAP with so many is a figure of its own."""
    candidates: Annotated[int, Field(ge=1, le=MAX_CANDIDATES)] = CANDIDATES
    """Highest-scoring boxes that enter the suppression."""
    max_batch: Positive = 8
    """Largest batch that the file is checked with."""
    providers: Annotated[tuple[Provider, ...], Field(min_length=1)] = ("cpu",)
    """Where the files run for validation and benchmark: the first of ONNX Runtime's that comes up, and each other
    runtime, so that [cpu, openvino] measures every file in both."""
    max_map_drop: Weight = 0.5
    """The gate: largest loss of mAP (points) against the student in PyTorch, and against what training measured."""
    benchmark: Benchmark = Benchmark()
    """Settings of the latency measurement."""
    engines: Engines | None = added_later()
    """Also build TensorRT engines of the files; null: none. {} for the defaults."""
    runners: Annotated[tuple[ImportPath, ...], Field(min_length=1)] | None = added_later()
    """Import paths of runners of your own; each opens student.onnx and is validated and measured beside ours."""

    @model_validator(mode="after")
    def _rules(self) -> Deploy:
        if "fp32" not in self.precisions or len(set(self.precisions)) < len(self.precisions):
            raise broken_rule("precisions", "each once, and fp32 among them: the others are compared with it")
        if self.score_threshold == 1:
            raise broken_rule("score_threshold", "detections must score more than this, and none scores more than 1")
        if self.candidates < self.max_detections:
            raise broken_rule("candidates", f"{self.candidates} is less than max_detections, {self.max_detections}")
        for precision in (self.engines.precisions or ()) if self.engines is not None else ():
            if precision not in self.precisions:
                raise broken_rule("engines.precisions", f"{precision} is not in deploy.precisions; add it there")
            if PRECISIONS[precision].computed is not None:
                raise broken_rule("engines.precisions", f"{precision} is no format of TensorRT; leave it out")
        for precision in self.precisions:
            places = PRECISIONS[precision].providers
            if places and not set(places) & set(self.providers):
                raise broken_rule("precisions", f"{precision} runs on {', '.join(places)}; add one to deploy.providers")
        if len(set(self.providers)) < len(self.providers):
            raise broken_rule("providers", "names one twice")
        if self.runners is not None and len(set(self.runners)) < len(self.runners):
            raise broken_rule("runners", "names a runner twice")
        return self
