"""Gain of pseudo labels: one student, trained on people's labels, on few of them, and on what teachers add.

    python -m benchmarks pseudo_gain cpu          # synthetic images, all parts, 3 seeds; 40 minutes of one core
    python -m benchmarks pseudo_gain bccd --set data.train.annotations=… --set data.train.images=… \\
        --set data.val.annotations=… --set data.val.images=…                           # part (a) on blood cells

Parts of the table, with what each is compared with:

    (a) a fifth of the labels, pseudo labels on the rest of the images    all labels; also: that fifth alone, and the
                                                                          last tenth of the steps as fine-tuning
    (b) the same and 2,200 more images without labels                     (a)
    (c) as (a), with two teachers that know one half of the classes each  (a)
    (d) labels of one style of images, pseudo labels of another one       the labels alone; on images of the other

All students see the same number of images: who is fine-tuned on the labelled images trains that much shorter before.
Thresholds have the best F1 on the labelled fifth. The package's teacher sees images at the size of its own training.
A seed changes the initial weights, the order of the images and which images keep their labels; the images and the
teachers are the same for all. On synthetic images the teacher is the package's, which has seen none of these images;
those of (c) begin with its weights and learn on images in which only their half is labelled. On BCCD it is trained
here, on all labels of the training images (`benchmarks/presets/bccd/teacher.yaml`), unless --teacher names one.

Prints and writes mean and standard deviation, and the ratio or difference of pairs of one seed. Resumable: what is
finished is kept below the recipe's `runs`.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.fabric import Fabric

from benchmarks.lib import options
from benchmarks.lib.gains import summary
from benchmarks.lib.results import Case, Row
from benchmarks.lib.tables import student_table
from benchmarks.lib.trainings import PRESETS, rows_of_training, train_teacher
from compress.config.recipe import Recipe, load_recipe
from compress.data import synthetic
from compress.detectors.checkpoints import checkpoint_file, load_teacher_checkpoint, save_detector
from compress.manifest import STUDENT, STUDENT_ON_PSEUDO_LABELS, Manifest, RunFolder
from compress.run import trainings
from compress.run.data import open_data
from compress.run.pipeline import data_plan, student_plan
from compress.versions import versions
from deploy.core.errors import UserError
from deploy.core.files import sha256_of, write_json
from deploy.validate.coco import read_annotations

FRACTION = 0.2
TEACHERS_SIZE = 128  # pixels, of the images that the package's teacher was trained on
MORE_SEED, TARGET_SEED, HALVES_SEED = 101, 102, 103  # of images; the preset's own have another one
HALF_IMAGES = 1000
RECIPES = {"cpu": PRESETS / "cpu" / "pseudo_gain.yaml", "bccd": PRESETS / "bccd" / "student.yaml"}


@dataclass(frozen=True)
class Student:
    """One row of the table. alone: no teacher. against: the one that it is compared with, by share of its mAP in
    percent or difference in points; bar: of that."""

    name: str
    part: str
    settings: tuple[str, ...]
    alone: bool = False
    against: str | None = None
    by: Literal["ratio", "difference"] = "ratio"
    bar: str = ""

    @property
    def variant(self) -> str:
        return f"{self.part} {self.name}"


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("preset", nargs="?", default="cpu", choices=list(RECIPES))
    parser.add_argument("--parts", default="abcd", metavar="abcd", help="of the table; (b) and (c) need (a)")
    options.seeds(parser)
    options.settings(parser)
    parser.add_argument("--teacher", help="a checkpoint; default: the preset's")
    parser.add_argument("--steps", type=int, help="of every student; default: the preset's")
    parser.add_argument("--fine-tune", type=int, help="of these, in the row with fine-tuning (a tenth)")
    parser.add_argument(
        "--more", type=int, default=1800, metavar="N",
        help="images drawn to train on for (b), beside those to validate; of (d) a third",
    )  # fmt: skip
    parser.add_argument("--half-steps", type=int, default=400, help="of each teacher of part (c)")


def run(args: argparse.Namespace) -> Iterator[Case]:
    complete(args)
    base = load_recipe(RECIPES[args.preset], args.set)
    checkpoint = teacher_of(args, base)
    students = plan(args, base, checkpoint)
    for student in students:  # a mistake in the last one should not show up after half an hour
        student_recipe(args, student, args.seeds[0])
    found: dict[str, dict[int, dict[str, Any]]] = {student.name: {} for student in students}
    for seed in sorted(args.seeds):
        for student in students:
            found[student.name][seed] = train(args, student, seed)
            print(f"{student.variant}, seed {seed}: mAP {found[student.name][seed]['map']:.2f}", flush=True)
    parts = {student.name: student.part for student in students}
    rows = [row for student in students for row in rows_of(student, found, parts)]
    teacher = f"{Path(checkpoint).name}, sha256 {sha256_of(checkpoint_file(checkpoint))}"
    maps = [
        m for by_seed in found.values() for figures in by_seed.values() for m in figures.get("teachers_map", [])[:1]
    ]
    rows += [Row("teacher", "mAP", maps[0], notes=teacher)] if maps else []
    print(student_table(rows))
    yield Case(args.preset, rows)


def complete(args: argparse.Namespace) -> None:
    """Fill in what depends on the preset. Raises UserError for options that do not go together."""
    if not set(args.parts) <= set("abcd"):
        raise UserError("--parts: letters a to d")
    if set(args.parts) & set("bc") and "a" not in args.parts:
        raise UserError("--parts: (b) and (c) are compared with (a)")
    if args.preset == "bccd":
        args.parts = "a"  # there are no other images
    elif any(text.partition("=")[0].startswith(("data.train", "data.val", "teacher")) for text in args.set):
        raise UserError("--set: the images of the preset cpu are drawn; set data.synthetic.train and the like")
    if args.steps is None:
        args.steps = load_recipe(RECIPES[args.preset], args.set).train.steps
    if args.fine_tune is None:
        args.fine_tune = args.steps // 10
    if not 0 < args.fine_tune < args.steps:
        raise UserError("--fine-tune: more than 0 and less than --steps")


def teacher_of(args: argparse.Namespace, base: Recipe) -> str:
    """The checkpoint of the teacher that knows all classes."""
    if args.teacher is not None:
        return args.teacher
    if base.data.synthetic is not None:
        return "zoo:quickstart"
    return str(train_teacher(PRESETS / "bccd" / "teacher.yaml", args.set))


def plan(args: argparse.Namespace, base: Recipe, checkpoint: str) -> list[Student]:
    """The students of the table, each after the one that it is compared with."""
    few = f"labels.fraction={FRACTION}"
    full, pseudo = "all labels", f"{100 * FRACTION:.0f} % of the labels, pseudo labels on the rest"
    students = []
    if "a" in args.parts:
        students += [
            Student(full, "(a)", (), alone=True),
            Student(f"{100 * FRACTION:.0f} % of the labels", "(a)", (few,), alone=True, against=full),
            Student(pseudo, "(a)", (few, labelled_by(base, checkpoint)), against=full, bar=">= 97"),
            Student(
                "the same, fine-tuned on the labels",
                "(a)",
                (
                    f"train.steps={args.steps - args.fine_tune}",
                    few,
                    labelled_by(base, checkpoint, fine_tune=args.fine_tune),
                ),
                against=full,
            ),
        ]
    if "b" in args.parts:
        folder = drawn(base, train=args.more, seed=MORE_SEED) / "images"  # with those of its own validation split
        students.append(
            Student(
                f"the same and {len(list(folder.iterdir()))} more images",
                "(b)",
                (few, labelled_by(base, checkpoint, unlabeled=folder)),
                against=pseudo,
                by="difference",
                bar="> 0",
            )
        )
    if "c" in args.parts:
        halves = [half_teacher(args, base, checkpoint, number) for number in (0, 1)]
        settings = (few, labelled_by(base, *map(str, halves)))
        students.append(Student("two teachers, half of the classes each", "(c)", settings, against=pseudo, bar=">= 95"))
    if "d" in args.parts:
        folder = drawn(base, train=max(1, args.more // 3), seed=TARGET_SEED, style="night")
        source = drawn(base)
        images = (
            "data.synthetic=null",
            f"data.train={{annotations: {source / 'train.json'}, images: {source / 'images'}}}",
            f"data.val={{annotations: {folder / 'val.json'}, images: {folder / 'images'}}}",
        )
        alone = "another style: labels of the first style"
        other = labelled_by(base, checkpoint, unlabeled=folder / "images")
        students += [
            Student(alone, "(d)", images, alone=True),
            Student(
                "another style: and pseudo labels of its images",
                "(d)",
                (*images, other),
                against=alone,
                by="difference",
                bar="> 0",
            ),
        ]
    return students


def labelled_by(base: Recipe, *teachers: str, unlabeled: Path | None = None, fine_tune: int | None = None) -> str:
    """The setting `pseudo_labels`. fine_tune: steps."""
    value: dict[str, Any] = {
        "teachers": [{"checkpoint": teacher} for teacher in teachers],
        "class_map": {"*": None},
        "unlabeled": [str(unlabeled)] if unlabeled is not None else [],
        "thresholds": "best_f1",
        "fine_tune": None if fine_tune is None else {"steps": fine_tune},
    }
    if base.data.synthetic is not None:
        value |= {"short": TEACHERS_SIZE, "long": TEACHERS_SIZE}
    return f"pseudo_labels={json.dumps(value)}"


def student_recipe(args: argparse.Namespace, student: Student, seed: int) -> Recipe:
    """The recipe of one training, a run of its own."""
    path = RECIPES[args.preset]
    label = "".join(c if c.isalnum() else "-" for c in f"{student.part[1]}-{student.name}")
    name = f"{load_recipe(path, args.set).name}-{label}-seed{seed}"
    labels = (f"labels.seed={seed}",) if any(text.startswith("labels.") for text in student.settings) else ()
    steps = f"train.steps={args.steps}"
    return load_recipe(path, [*args.set, steps, *student.settings, *labels, f"seed={seed}", f"name={name}"])


def train(args: argparse.Namespace, student: Student, seed: int) -> dict[str, Any]:
    """Train one row with one seed, or read what an earlier call measured."""
    from compress.run.pipeline import distill

    run_dir = distill(student_recipe(args, student, seed), resume=True, distillation=not student.alone)
    stages = RunFolder(run_dir).stages()
    figures: dict[str, Any] = {key: stages[STUDENT]["result"]["metrics"][key] for key in ("map", "map50", "map75")}
    trained = [stages[name]["result"] for name in (STUDENT_ON_PSEUDO_LABELS, STUDENT) if name in stages]
    figures["seconds"] = round(sum(result["seconds"] for result in trained), 1)
    if not student.alone:
        labelled = [stage["result"] for stage in stages.values() if "regions" in (stage["result"] or {})]
        figures |= {key: sum(result[key] for result in labelled) for key in ("images", "labels", "regions")}
        checks = [stage["result"]["metrics"]["map"] for name, stage in stages.items() if "check of teacher" in name]
        figures["teachers_map"] = [round(value, 2) for value in checks]
    return figures


# ------------------------------------------------------------------------------------------ images and teachers


def drawn(base: Recipe, *, train: int | None = None, seed: int | None = None, style: synthetic.Style = "plain") -> Path:
    """The folder of synthetic images like the preset's, with other numbers."""
    settings = base.data.synthetic
    assert settings is not None, "parts b to d are of the preset cpu"
    values = settings.model_dump() | {"style": style}
    values |= {key: value for key, value in (("train", train), ("seed", seed)) if value is not None}
    name = "-".join(f"{key}{value}" for key, value in values.items() if (key, value) != ("style", "plain"))
    folder = base.runs / "data" / f"synthetic-{name}-v{synthetic.VERSION}"
    synthetic.generate(folder, **values)
    return folder


def half_teacher(args: argparse.Namespace, base: Recipe, checkpoint: str, number: int) -> Path:
    """A teacher for every second class, from class `number` on: the given one without its other classes, trained on
    images in which only these are labelled."""
    folder = drawn(base, train=min(HALF_IMAGES, 10 * args.more), seed=HALVES_SEED)
    kept = None
    files = {}
    for split in ("train", "val"):
        content = read_annotations(folder / f"{split}.json")
        kept = content["categories"][number::2]
        ids = {row["id"] for row in kept}
        files[split] = base.runs / "data" / f"half{number}-{folder.name}-{split}.json"
        rows = [row for row in content["annotations"] if row["category_id"] in ids]
        write_json(files[split], {"images": content["images"], "categories": kept, "annotations": rows})
    assert kept is not None
    detector, record = load_teacher_checkpoint(checkpoint)
    assert record.class_names is not None, "the package's teacher names its classes"
    names = tuple(row["name"] for row in kept)
    wanted = torch.tensor([record.class_names.index(name) for name in names])
    ours = record.model_copy(
        update={"num_classes": len(names), "class_names": names, "category_ids": tuple(row["id"] for row in kept)}
    )
    smaller = ours.build()
    weights = detector.state_dict()
    weights |= {key: value[wanted] for key, value in weights.items() if key.startswith("head.gfl_cls.")}
    smaller.load_state_dict(weights)
    model = {key: getattr(record.model, key) for key in ("backbone", "neck_channels", "head_depth")}
    recipe = load_recipe(
        RECIPES[args.preset],
        [
            *args.set,
            f"name={base.name}-half{number}",
            "data.synthetic=null",
            f"data.train={{annotations: {files['train']}, images: {folder / 'images'}}}",
            f"data.val={{annotations: {files['val']}, images: {folder / 'images'}}}",
            f"student={json.dumps(model)}",
            f"train.steps={args.half_steps}",
            f"data.short={TEACHERS_SIZE}",
            f"data.long={TEACHERS_SIZE}",
            "train.optimizer.lr=5e-4",
            f"train.schedule.warmup_steps={min(50, args.half_steps // 10)}",
        ],
    )
    recipe.run_dir.mkdir(parents=True, exist_ok=True)
    start = recipe.run_dir / "start.safetensors"
    save_detector(start, smaller, metadata=ours)
    fabric = Fabric(accelerator="cpu", devices=1)
    data = open_data(data_plan(recipe), fabric)
    inputs = {"data": data.identity, "train": recipe.train.model_dump(mode="json"), "start": sha256_of(start)}

    def work() -> dict[str, Any]:
        return trainings.train(fabric, replace(student_plan(recipe), start=start, identity=inputs), data, resume=True)

    out = recipe.run_dir / "student.safetensors"
    Manifest(recipe.run_dir, versions()).stage("student", inputs, [out], work)
    return out


# ------------------------------------------------------------------------------------------------- the rows


def rows_of(student: Student, found: dict[str, dict[int, dict[str, Any]]], parts: dict[str, str]) -> list[Row]:
    """Figures of one student by seed, and its comparison, seed by seed and of the means."""
    own, variant = found[student.name], student.variant
    rows: list[Row] = []
    for seed, figures in own.items():
        rows += rows_of_training(variant, seed, figures)
        labels = [(key, figures[key]) for key in ("images", "labels", "regions") if key in figures]
        rows += [Row(variant, f"pseudo-labelled {key}", value, seed=seed) for key, value in labels]
    if student.against is None:
        return rows
    other = f"{parts[student.against]} {student.against}"
    metric, unit = (f"share of {other}", "%") if student.by == "ratio" else (f"gain over {other}", "points")
    pairs = {seed: (figures["map"], found[student.against][seed]["map"]) for seed, figures in own.items()}
    values = {seed: compared(a, b, student.by) for seed, (a, b) in pairs.items()}
    rows += [Row(variant, metric, round(value, 2), unit, seed=seed) for seed, value in values.items()]
    # Of the means, not the mean of ratios: one poor pair should not decide.
    means = [sum(side) / len(pairs) for side in zip(*pairs.values(), strict=True)]
    value, interval = round(compared(means[0], means[1], student.by), 3), None
    if (half := summary(list(values.values())).interval) is not None:
        width = round((half[1] - half[0]) / 2, 3)
        interval = (value - width, value + width)
    low, high = interval or (None, None)
    spread = "95 %" if interval else ""
    return [*rows, Row(variant, metric, value, unit, low, high, spread, len(pairs), bar=student.bar)]


def compared(own: float, other: float, by: str) -> float:
    """Compare in percent of the other's mAP (0 of nothing), or in points."""
    if by == "difference":
        return own - other
    return 100 * own / other if other else 0.0
