"""What quantization-aware distillation gives back of the mAP that int8 costs, over seeds.

    python -m benchmarks qad                                    # recipes/quickstart.yaml, seeds 0, 1, 2
    python -m benchmarks qad RECIPE --seeds 0,1,2 --layers outputs-float --set deploy.int8.qad.steps=300

For every seed: the recipe's student is distilled (or taken from an earlier run, those of `distill_gain`
included), exported, quantized after training (PTQ, naive: one calibration), and trained on by QAD from there. As a
control the float student is trained on by the same schedule, teacher and methods, without rounding: what QAD gains must
not be what longer training gains. All files are judged by ONNX Runtime on the validation images.

    lost = mAP(float) - mAP(PTQ);  recovered = (mAP(QAD) - mAP(PTQ)) / lost, of the means over the seeds, where more
    than 0.1 points were lost

--layers all: every layer in int8, output layers too (naive all-int8); outputs-float: the default of an export.
Resumable: trainings continue from their checkpoints, finished files are kept below the recipe's `runs`.
Writes benchmarks/results/qad-<recipe>-<layers>-<target>.json.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from lightning.fabric import Fabric
from rich.table import Table

from benchmarks.lib import measure
from benchmarks.suites.distill_gain import Arm, arm_recipe
from compress.config.deploy import Qad
from compress.config.recipe import Recipe
from compress.console import open_console
from compress.distill.teacher import load_teacher
from compress.export.onnx import export_checkpoint
from compress.manifest import STUDENT_ON_INT8_GRIDS, Manifest, RunFolder
from compress.run.data import open_data
from compress.run.pipeline import data_plan, distill, qad_plan
from compress.training.qad.export import load_grids, quantize_trained
from compress.training.qad.train import train_quantized
from compress.versions import versions
from deploy.core.errors import UserError
from deploy.core.files import sha256_of, write_json
from deploy.quantize.file import Quantizer
from deploy.runtimes.base import Runner
from deploy.runtimes.onnx import OnnxRunner
from deploy.validate.accuracy import validate

DEFAULT = measure.ROOT / "recipes" / "quickstart.yaml"
NOISE = 0.1
"""mAP points. A smaller loss is chance, and a share of it says nothing."""
FLOAT, CONTROL, PTQ, QAD = "float", "float, trained on", "int8 PTQ", "int8 QAD"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", nargs="?", type=Path, default=DEFAULT)
    parser.add_argument("--seeds", type=lambda text: [int(x) for x in text.split(",")], default=[0, 1, 2])
    parser.add_argument("--layers", choices=("all", "outputs-float"), default="all")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="as in `compress run`")
    parser.add_argument("--out", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    if not arguments.seeds or len(set(arguments.seeds)) < len(arguments.seeds):
        parser.error("--seeds: give different ones")
    console = open_console()
    by_seed: dict[int, dict[str, Any]] = {}
    for seed in arguments.seeds:
        # The arm and the name of `distill_gain`: whichever runs first leaves the student for the other.
        recipe = arm_recipe(arguments.recipe, Arm("distilled", ()), seed, tuple(arguments.set))
        by_seed[seed] = one_seed(with_qad(recipe), arguments.layers)
        figures = ", ".join(f"{name} {row['map']:.2f}" for name, row in by_seed[seed].items())
        console.print(f"seed {seed}: {figures}")
    means = {
        name: statistics.mean(rows[name]["map"] for rows in by_seed.values()) for name in (FLOAT, CONTROL, PTQ, QAD)
    }
    lost = means[FLOAT] - means[PTQ]
    recovered = (means[QAD] - means[PTQ]) / lost if lost > NOISE else None
    console.print(table(means, by_seed))
    if recovered is None:
        console.print(f"PTQ loses {lost:.2f} mAP points, not more than {NOISE}: there is nothing to recover")
    else:
        console.print(f"PTQ loses {lost:.2f} mAP points; QAD recovers {recovered:.0%} of them")
    target = recipe.deploy.int8.target
    out = arguments.out or measure.RESULTS / f"qad-{arguments.recipe.stem}-{arguments.layers}-{target}.json"
    bars = [] if recovered is None else [measure.bar("share of the loss that QAD recovers", 0.5, recovered)]
    settings = with_qad(recipe).deploy.int8.model_dump(mode="json")
    result = measure.record(
        layers=arguments.layers, int8=settings, means={k: round(v, 3) for k, v in means.items()}, lost=round(lost, 3),
        recovered=None if recovered is None else round(recovered, 3), seeds=by_seed, bars=bars,
    )  # fmt: skip
    write_json(out, result)
    console.print(f"written: {out}")
    return 0 if all(bar["met"] for bar in bars) else 1


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
            checkpoint, out, plan.deploy, input_size=plan.input_size, images=images.files, limits=plan.limits
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
        teacher = load_teacher(checkpoint, data.train.categories)[0].to(fabric.device)
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


def table(means: dict[str, float], by_seed: dict[int, dict[str, Any]]) -> Table:
    result = Table("file", "mAP, mean", "by seed", "against float")
    for name, mean in means.items():
        seeds = " ".join(f"{rows[name]['map']:.2f}" for rows in by_seed.values())
        result.add_row(name, f"{mean:.2f}", seeds, "" if name == FLOAT else f"{mean - means[FLOAT]:+.2f}")
    return result


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UserError as error:
        sys.exit(f"error: {error}")
