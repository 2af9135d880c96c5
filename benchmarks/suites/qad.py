"""Gain of quantization-aware distillation: how much of int8's loss of mAP it gives back, over seeds.

    python -m benchmarks qad                                    # recipes/quickstart_nano.yaml, seeds 0, 1, 2
    python -m benchmarks qad RECIPE --seeds 0,1,2 --layers outputs-float --set deploy.int8.qad.steps=300

For every seed: the recipe's student is distilled (or taken from an earlier run, those of `distill_gain`
included), exported, quantized after training (PTQ, naive: one calibration), and trained on by QAD from there. As a
control the float student is trained on by the same schedule, teacher and methods, without rounding: what QAD gains must
not be what longer training gains. All files are judged by ONNX Runtime on the validation images.

    lost = mAP(float) - mAP(PTQ);  recovered = (mAP(QAD) - mAP(PTQ)) / lost, of the means over the seeds, where more
    than 0.1 points were lost

--layers all: every layer in int8, output layers too (naive all-int8); outputs-float: the default of an export.
Resumable: trainings continue from their checkpoints, finished files are kept below the recipe's `runs`.
The case is called <recipe>-<layers>-<target>.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from lightning.fabric import Fabric

from benchmarks.lib import options
from benchmarks.lib.results import ROOT, Case, Row
from benchmarks.lib.trainings import Arm, arm_recipe
from compress.config.deploy import Qad
from compress.config.recipe import Recipe
from compress.detectors.base import freeze
from compress.detectors.checkpoints import load_teacher_checkpoint
from compress.export.onnx import export_checkpoint
from compress.manifest import STUDENT_ON_INT8_GRIDS, Manifest, RunFolder
from compress.run.data import open_data
from compress.run.pipeline import data_plan, distill, qad_plan
from compress.training.qad.export import load_grids, quantize_trained
from compress.training.qad.train import train_quantized
from compress.versions import versions
from deploy.core.files import sha256_of, write_json
from deploy.quantize.file import Quantizer
from deploy.runtimes.base import Runner
from deploy.runtimes.onnx import OnnxRunner
from deploy.validate.accuracy import validate

DEFAULT = ROOT / "recipes" / "quickstart_nano.yaml"
NOISE = 0.1
"""mAP points. A smaller loss is chance, and a share of it says nothing."""
FLOAT, CONTROL, PTQ, QAD = "float", "float, trained on", "int8 PTQ", "int8 QAD"


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", nargs="?", type=Path, default=DEFAULT)
    options.seeds(parser)
    parser.add_argument("--layers", choices=("all", "outputs-float"), default="all")
    options.settings(parser)


def run(args: argparse.Namespace) -> Iterator[Case]:
    found: dict[int, dict[str, Any]] = {}
    for seed in sorted(args.seeds):
        # The arm and the name of `distill_gain`: whichever runs first leaves the student for the other.
        recipe = with_qad(arm_recipe(args.recipe, Arm("distilled", ()), seed, tuple(args.set)))
        found[seed] = one_seed(recipe, args.layers)
        figures = ", ".join(f"{name} {row['map']:.2f}" for name, row in found[seed].items())
        print(f"seed {seed}: {figures}", flush=True)
    yield Case(f"{args.recipe.stem}-{args.layers}-{recipe.deploy.int8.target}", rows_of(found, recipe))


def rows_of(found: dict[int, dict[str, Any]], recipe: Recipe) -> list[Row]:
    """mAP of every file by seed; what calibration loses, and the share of it that QAD gives back."""
    settings = recipe.deploy.int8.model_dump_json()
    rows: list[Row] = []
    for name in (FLOAT, CONTROL, PTQ, QAD):
        for seed, figures in found.items():
            rows.append(Row(name, "mAP", figures[name]["map"], seed=seed, notes=settings if name == QAD else ""))
            rows.append(Row(name, "mAP50", figures[name]["map50"], seed=seed))
            if "seconds" in figures[name]:
                rows.append(Row(name, "training time", figures[name]["seconds"], "s", seed=seed))
    mean = {name: statistics.mean(figures[name]["map"] for figures in found.values()) for name in (FLOAT, PTQ, QAD)}
    lost = mean[FLOAT] - mean[PTQ]
    rows.append(Row(PTQ, "mAP lost", round(lost, 3), n=len(found)))
    if lost > NOISE:
        share = (mean[QAD] - mean[PTQ]) / lost
        rows.append(Row(QAD, "share of the loss that is recovered", share, n=len(found), bar=">= 0.5"))
    else:
        print(f"PTQ loses {lost:.2f} mAP points, not more than {NOISE}: there is nothing to recover")
    return rows


def with_qad(recipe: Recipe) -> Recipe:
    """The recipe with QAD's defaults when it has none."""
    int8 = recipe.deploy.int8
    if int8.qad is None:
        int8 = int8.model_copy(update={"qad": Qad()})
    return recipe.model_copy(update={"deploy": recipe.deploy.model_copy(update={"int8": int8})})


def one_seed(recipe: Recipe, layers: str) -> dict[str, Any]:
    """mAP of the four files of one seed."""
    plain = recipe.deploy.int8.model_copy(update={"qad": None})  # QAD is done below, with these layers
    student_recipe = recipe.model_copy(update={"deploy": recipe.deploy.model_copy(update={"int8": plain})})
    run_dir = distill(student_recipe, resume=True)
    fabric = Fabric(accelerator=recipe.train.accelerator, devices=1)
    data = open_data(data_plan(recipe), fabric)
    plan = qad_plan(recipe, data)
    images = plan.quantizing.images
    folder = run_dir / f"qad-{layers}-{recipe.deploy.int8.target}"
    folder.mkdir(exist_ok=True)
    plan = replace(plan, folder=RunFolder(folder))
    student, start_file = run_dir / "student.safetensors", folder / "start.json"
    keep_float = () if layers == "all" else None
    settings = recipe.deploy.int8
    files = {FLOAT: folder / "float.onnx", PTQ: folder / "ptq.onnx"}
    trained_files = {CONTROL: folder / "control.onnx", QAD: folder / f"{STUDENT_ON_INT8_GRIDS}.onnx"}
    manifest = Manifest(folder, versions())
    inputs: dict[str, Any] = {
        "student": sha256_of(student),
        "data": data.identity,
        "int8": settings.model_dump(mode="json"),
        "methods": recipe.methods.model_dump(mode="json"),
        "seed": recipe.seed,
    }

    def export(checkpoint: Path, out: Path) -> None:
        export_checkpoint(
            checkpoint,
            out,
            plan.deploy,
            input_size=plan.input_size,
            images=images.files,
            resize_short_long=plan.resize_short_long,
        )

    def calibrate() -> None:
        export(student, files[FLOAT])
        quantizer = Quantizer(
            files[FLOAT], images, settings.target, method=settings.method, reduce_range=settings.reduce_range
        )
        quantizer.save(files[PTQ], keep_float)
        write_json(start_file, quantizer.grids(keep_float).model_dump(mode="json"))

    manifest.stage("calibrate", inputs, [*files.values(), start_file], calibrate)
    start = load_grids(start_file)
    teacher = None
    if recipe.teacher is not None and recipe.methods.enabled():
        checkpoint = recipe.teacher.checkpoint or str(run_dir / "teacher.safetensors")
        teacher = freeze(load_teacher_checkpoint(checkpoint)[0]).to(fabric.device)
    inputs |= {"start": sha256_of(start_file), "train": recipe.train.model_dump(mode="json")}
    seconds = {}
    for name, label in ((STUDENT_ON_INT8_GRIDS, QAD), ("control", CONTROL)):

        def train(name: str = name, quantized: bool = label == QAD) -> dict[str, Any]:
            training = plan.training(fabric, data, start if quantized else None, inputs, name)
            return train_quantized(fabric, training, teacher=teacher, resume=True)

        outputs = [folder / f"{name}.safetensors"] + [folder / f"{name}.json"] * (label == QAD)
        seconds[label] = manifest.stage(name, inputs, outputs, train)["seconds"]

    def judge() -> dict[str, Any]:
        export(folder / "control.safetensors", trained_files[CONTROL])
        trained, source = folder / f"{STUDENT_ON_INT8_GRIDS}.safetensors", folder / "trained.onnx"
        export(trained, source)
        quantize_trained(trained, source, trained_files[QAD], plan.deploy, images)
        paths = {**files, **trained_files}
        runners: dict[str, Runner] = {name: OnnxRunner(paths[name]) for name in (FLOAT, CONTROL, PTQ, QAD)}
        rows = validate(runners, data.val_split.annotations, data.val_split.images, reference=FLOAT)
        return {
            row.name: {"map": round(row.metrics.map, 3), "map50": round(row.metrics.map50, 3)}
            | ({"seconds": seconds[row.name]} if row.name in seconds else {})
            for row in rows
        }

    weights = [sha256_of(folder / f"{name}.safetensors") for name in (STUDENT_ON_INT8_GRIDS, "control")]
    figures: dict[str, Any] = manifest.stage("judge", {**inputs, "weights": weights}, [*trained_files.values()], judge)
    return figures
