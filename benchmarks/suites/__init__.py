"""The suites: a module a question.

A suite has `add_options(parser)` for options of its own and `run(options)`, which yields `benchmarks.lib.results.Case`s
as they are measured; its docstring is its help. It is entered here, with what it measures.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Suite:
    """question, takes: for the list. measures: files and patterns, relative to the repository, whose change makes the
    figures old (`benchmarks.lib.age`)."""

    question: str
    takes: str
    measures: tuple[str, ...]


_TRAINING = ("compress/data/*.py", "compress/detectors/**/*.py", "compress/distill/*.py", "compress/training/*.py")
_PICTURES = ("deploy/core/image.py", "deploy/core/canvas.py")
_RUNNING = (*_PICTURES, "deploy/graph/*.py", "deploy/runtimes/*.py", "compress/export/*.py")

SUITES = {
    "startup": Suite(
        "how long `compress --help` and `import compress` take",
        "1 min",
        ("compress/__init__.py", "compress/__main__.py", "compress/cli/*.py"),
    ),
    "vs_mmdet": Suite(
        "assignment, losses and backward against mmdet's GFL head",
        "10 min",
        ("compress/detectors/assign.py", "compress/detectors/base.py", "compress/detectors/gfl.py", "kernels/**/*.py"),
    ),
    "data_path": Suite(
        "the training loader against mmdet's pipeline",
        "10 min",
        ("compress/data/coco.py", "compress/data/loader.py", "compress/data/transforms.py", "deploy/core/image.py"),
    ),
    "label_index": Suite(
        "opening annotation files of the size of COCO's and of Objects365's",
        "15 min",
        (
            "compress/data/coco.py",
            "compress/data/index.py",
            "compress/data/label_tables.py",
            "compress/data/quick_tables.py",
            "deploy/validate/coco.py",
        ),
    ),
    "pictures": Suite(
        "what another decoder or resize filter would cost in mAP",
        "5 min",
        (*_PICTURES, "compress/detectors/gfl.py"),
    ),
    "latency": Suite("an ONNX file against PyTorch eager, end to end", "3 min", (*_RUNNING, "deploy/latency/*.py")),
    "quantized": Suite(
        "what FP16 and INT8 cost in mAP and bring in speed",
        "15 min a part",
        (*_RUNNING, "deploy/quantize/*.py", "deploy/validate/*.py"),
    ),
    "int8_head": Suite(
        "what BatchNorm in the head and the form for the CPU bring to int8 files in speed",
        "10 min",
        (*_RUNNING, "compress/detectors/level_norm.py", "deploy/quantize/*.py"),
    ),
    "openvino": Suite(
        "OpenVINO against ONNX Runtime and PyTorch eager",
        "15 min",
        (*_RUNNING, "deploy/core/precisions.py", "deploy/quantize/*.py"),
    ),
    "evaluation": Suite(
        "COCO mAP of many detections and classes: time and memory, beside other evaluators",
        "6 min",
        ("deploy/core/detection_table.py", "deploy/validate/average_precision.py", "deploy/validate/ground_truth.py"),
    ),
    "serve": Suite(
        "`compress serve` under load against the raw runtime",
        "25 min (--quick: 2)",
        (*_PICTURES, "deploy/runtimes/*.py", "deploy/serve/*.py"),
    ),
    "overhead": Suite(
        "what validation adds to the runtime in time, and three commands in memory",
        "4 min",
        (*_RUNNING, "deploy/latency/*.py", "deploy/serve/*.py", "deploy/validate/*.py"),
    ),
    "kernels": Suite(
        "fused operators against eager and compiled PyTorch", "30 min on a CPU", ("kernels/**/*.py", "kernels/csrc/*")
    ),
    "method_cost": Suite(
        "what each method adds to a training step",
        "10 min",
        ("compress/detectors/gfl.py", "compress/distill/*.py", "kernels/**/*.py"),
    ),
    "teacher_cache": Suite("a step with the teacher's outputs from disk, beside a plain one", "5 min", _TRAINING),
    "detr_step": Suite(
        "a training step of a real-time DETR against a plain loop around the library's model",
        "4 min",
        (
            "compress/detectors/transformers/*.py",
            "compress/detectors/base.py",
            "compress/training/learner.py",
            "compress/training/optimizer.py",
        ),
    ),
    "distill_gain": Suite(
        "what distillation gains over plain training, over seeds", "2 h on two cores (preset cpu)", _TRAINING
    ),
    "prune_gain": Suite(
        "what distillation gives back to a pruned detector, over seeds",
        "1 h of one core (preset cpu)",
        (*_TRAINING, "compress/prune/*.py"),
    ),
    "view_gain": Suite("what a fixed number of augmentations costs, over seeds", "1 h of one core", _TRAINING),
    "pseudo_gain": Suite(
        "what pseudo labels are worth, over seeds", "40 min (preset cpu)", (*_TRAINING, "compress/pseudo/*.py")
    ),
    "pseudo_memory": Suite(
        "memory of pseudo-labelling many images", "5 min", ("compress/pseudo/*.py", "compress/data/*.py")
    ),
    "ray_engine": Suite(
        "labelling by Ray against local processes: time, and memory of the driver",
        "20 min",
        ("compress/pseudo/*.py", "deploy/core/on_ray.py"),
    ),
    "qad": Suite(
        "mAP that quantization-aware distillation gives back, over seeds",
        "20 min",
        (*_TRAINING, "compress/training/qad/*.py", "deploy/quantize/*.py"),
    ),
    "recipe": Suite(
        "what one `compress run` makes: mAP, size and latency of every model and file",
        "as long as the recipe",
        (*_TRAINING, *_RUNNING),
    ),
}
"""By the name on the command line, which is that of the module."""
