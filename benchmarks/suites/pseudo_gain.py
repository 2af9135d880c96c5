"""What pseudo labels are worth: one student, trained on people's labels, on few of them, and on what teachers add.

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
finished is kept below the recipe's `runs`. Writes benchmarks/results/pseudo_gain-<preset>.json, .svg and .md.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import statistics
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.fabric import Fabric

from benchmarks.suites.distill_gain import PRESETS, ROOT, T_95, seeds, train_teacher
from compress.config.recipe import Recipe, load_recipe, recipe_sha256
from compress.console import open_console
from compress.data import synthetic
from compress.detectors.checkpoints import checkpoint_file, load_teacher_checkpoint, save_detector
from compress.manifest import Manifest
from compress.run import trainings
from compress.run.data import open_data
from compress.run.pipeline import data_plan, student_plan
from compress.versions import versions
from deploy.core.environment import environment
from deploy.core.errors import UserError
from deploy.core.files import sha256_of, write_json, write_text
from deploy.validate.coco import read_annotations

FRACTION = 0.2
TEACHERS_SIZE = 128  # pixels, of the images that the package's teacher was trained on
MORE_SEED, TARGET_SEED, HALVES_SEED = 101, 102, 103  # of images; the preset's own have another one
HALF_IMAGES = 1000
RECIPES = {"cpu": PRESETS / "cpu" / "pseudo_gain.yaml", "bccd": PRESETS / "bccd" / "student.yaml"}


@dataclass(frozen=True)
class Arm:
    """One row. alone: no teacher. against: the row that it is compared with, in percent of its mAP or in points.
    wanted: at least so many percent, or more than so many points."""

    name: str
    part: str
    settings: tuple[str, ...]
    alone: bool = False
    against: str | None = None
    by: Literal["ratio", "difference"] = "ratio"
    wanted: float | None = None


def main() -> int:
    arguments = parse_arguments()
    console = open_console()
    base = load_recipe(RECIPES[arguments.preset], arguments.set)
    checkpoint = teacher_of(arguments, base)
    arms = plan(arguments, base, checkpoint)
    for arm in arms:  # a mistake in the last one should not show up after half an hour
        arm_recipe(arguments, arm, arguments.seeds[0])
    found: dict[str, dict[int, dict[str, Any]]] = {arm.name: {} for arm in arms}
    for seed in arguments.seeds:
        for arm in arms:
            found[arm.name][seed] = train(arguments, arm, seed)
            console.print(f"{arm.part} {arm.name}, seed {seed}: mAP {found[arm.name][seed]['map']:.2f}")
    rows = [summarise(arm, found) for arm in arms]
    out = arguments.out or ROOT / "benchmarks" / "results" / f"pseudo_gain-{arguments.preset}.json"
    machine = environment()
    write_json(
        out,
        {
            "date": datetime.date.today().isoformat(),
            "command": f"python -m benchmarks pseudo_gain {arguments.preset}",
            "recipe": base.name,
            "recipe_sha256": recipe_sha256(base),
            "versions": versions(),
            "machine": {
                "cpu": machine["cpu"]["model"],
                "cores": machine["cpu"]["usable_cores"],
                "gpu": [gpu["name"] for gpu in machine.get("gpus") or []],
                "system": platform.system(),
            },
            "teacher": {"name": Path(checkpoint).name, "sha256": sha256_of(checkpoint_file(checkpoint))},
            "labels": FRACTION,
            "steps": {"all": arguments.steps, "of them fine-tuning, in one row": arguments.fine_tune},
            "seeds": arguments.seeds,
            "arms": rows,
        },
    )
    table = markdown(rows)
    write_text(out.with_suffix(".md"), table)
    write_text(out.with_suffix(".svg"), picture(rows, f"pseudo labels, {arguments.preset}"))
    print(table)
    console.print(f"written: {out}, {out.with_suffix('.md').name}, {out.with_suffix('.svg').name}")
    return 0


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("preset", nargs="?", default="cpu", choices=list(RECIPES))
    parser.add_argument("--parts", default="abcd", metavar="abcd", help="of the table; (b) and (c) need (a)")
    parser.add_argument("--seeds", type=seeds, default=[0, 1, 2], metavar="N,N,…", help="1 to 10 different ones")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="as in `compress run`")
    parser.add_argument("--teacher", help="a checkpoint; default: the preset's")
    parser.add_argument("--steps", type=int, help="of every student; default: the preset's")
    parser.add_argument("--fine-tune", type=int, help="of these, in the row with fine-tuning (a tenth)")
    parser.add_argument(
        "--more",
        type=int,
        default=1800,
        help="images drawn to train on for (b), beside those to validate; of (d) a third",
    )
    parser.add_argument("--half-steps", type=int, default=400, help="of each teacher of part (c)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="the .json file")
    arguments = parser.parse_args()
    if not set(arguments.parts) <= set("abcd"):
        parser.error("--parts: letters a to d")
    if set(arguments.parts) & set("bc") and "a" not in arguments.parts:
        parser.error("--parts: (b) and (c) are compared with (a)")
    if arguments.preset == "bccd":
        arguments.parts = "a"  # there are no other images
    elif any(text.partition("=")[0].startswith(("data.train", "data.val", "teacher")) for text in arguments.set):
        parser.error("--set: the images of the preset cpu are drawn; set data.synthetic.train and the like")
    if arguments.steps is None:
        arguments.steps = load_recipe(RECIPES[arguments.preset], arguments.set).train.steps
    if arguments.fine_tune is None:
        arguments.fine_tune = arguments.steps // 10
    if not 0 < arguments.fine_tune < arguments.steps:
        parser.error("--fine-tune: more than 0 and less than --steps")
    return arguments


def teacher_of(arguments: argparse.Namespace, base: Recipe) -> str:
    """The checkpoint of the teacher that knows all classes."""
    if arguments.teacher is not None:
        return arguments.teacher
    if base.data.synthetic is not None:
        return "zoo:quickstart"
    return str(train_teacher(PRESETS / "bccd" / "teacher.yaml", arguments.set))


def plan(arguments: argparse.Namespace, base: Recipe, checkpoint: str) -> list[Arm]:
    """The rows of the table, a row after the one that it is compared with."""
    few = f"labels.fraction={FRACTION}"
    full, pseudo = "all labels", f"{100 * FRACTION:.0f} % of the labels, pseudo labels on the rest"
    arms = []
    if "a" in arguments.parts:
        arms += [
            Arm(full, "(a)", (), alone=True),
            Arm(f"{100 * FRACTION:.0f} % of the labels", "(a)", (few,), alone=True, against=full),
            Arm(pseudo, "(a)", (few, labelled_by(base, checkpoint)), against=full, wanted=97),
            Arm(
                "the same, fine-tuned on the labels",
                "(a)",
                (
                    f"train.steps={arguments.steps - arguments.fine_tune}",
                    few,
                    labelled_by(base, checkpoint, fine_tune=arguments.fine_tune),
                ),
                against=full,
            ),
        ]
    if "b" in arguments.parts:
        folder = drawn(base, train=arguments.more, seed=MORE_SEED) / "images"  # with those of its own validation split
        arms.append(
            Arm(
                f"the same and {len(list(folder.iterdir()))} more images",
                "(b)",
                (few, labelled_by(base, checkpoint, unlabeled=folder)),
                against=pseudo,
                by="difference",
                wanted=0,
            )
        )
    if "c" in arguments.parts:
        halves = [half_teacher(arguments, base, checkpoint, number) for number in (0, 1)]
        settings = (few, labelled_by(base, *map(str, halves)))
        arms.append(Arm("two teachers, half of the classes each", "(c)", settings, against=pseudo, wanted=95))
    if "d" in arguments.parts:
        folder = drawn(base, train=max(1, arguments.more // 3), seed=TARGET_SEED, style="night")
        source = drawn(base)
        images = (
            "data.synthetic=null",
            f"data.train={{annotations: {source / 'train.json'}, images: {source / 'images'}}}",
            f"data.val={{annotations: {folder / 'val.json'}, images: {folder / 'images'}}}",
        )
        alone = "another style: labels of the first style"
        other = labelled_by(base, checkpoint, unlabeled=folder / "images")
        arms += [
            Arm(alone, "(d)", images, alone=True),
            Arm(
                "another style: and pseudo labels of its images",
                "(d)",
                (*images, other),
                against=alone,
                by="difference",
                wanted=0,
            ),
        ]
    return arms


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


def arm_recipe(arguments: argparse.Namespace, arm: Arm, seed: int) -> Recipe:
    """The recipe of one training, a run of its own."""
    path = RECIPES[arguments.preset]
    label = "".join(c if c.isalnum() else "-" for c in f"{arm.part[1]}-{arm.name}")
    name = f"{load_recipe(path, arguments.set).name}-{label}-seed{seed}"
    labels = (f"labels.seed={seed}",) if any(text.startswith("labels.") for text in arm.settings) else ()
    steps = f"train.steps={arguments.steps}"
    return load_recipe(path, [*arguments.set, steps, *arm.settings, *labels, f"seed={seed}", f"name={name}"])


def train(arguments: argparse.Namespace, arm: Arm, seed: int) -> dict[str, Any]:
    """Train one row with one seed, or read what an earlier call measured."""
    from compress.run.pipeline import distill

    run_dir = distill(arm_recipe(arguments, arm, seed), resume=True, distillation=not arm.alone)
    stages = json.loads((run_dir / "manifest.json").read_text(encoding="utf-8"))["stages"]
    figures: dict[str, Any] = {
        key: round(stages["student"]["result"]["metrics"][key], 3) for key in ("map", "map50", "map75")
    }
    trained = [stages[name]["result"] for name in ("student.pseudo", "student") if name in stages]
    figures["seconds"] = round(sum(result["seconds"] for result in trained), 1)
    if not arm.alone:
        found = [row["result"] for name, row in stages.items() if "regions" in (row["result"] or {})]
        figures |= {key: sum(row[key] for row in found) for key in ("images", "labels", "regions")}
        checks = [row["result"]["metrics"]["map"] for name, row in stages.items() if "check of teacher" in name]
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


def half_teacher(arguments: argparse.Namespace, base: Recipe, checkpoint: str, number: int) -> Path:
    """A teacher for every second class, from class `number` on: the given one without its other classes, trained on
    images in which only these are labelled."""
    folder = drawn(base, train=min(HALF_IMAGES, 10 * arguments.more), seed=HALVES_SEED)
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
        RECIPES[arguments.preset],
        [
            *arguments.set,
            f"name={base.name}-half{number}",
            "data.synthetic=null",
            f"data.train={{annotations: {files['train']}, images: {folder / 'images'}}}",
            f"data.val={{annotations: {files['val']}, images: {folder / 'images'}}}",
            f"student={json.dumps(model)}",
            f"train.steps={arguments.half_steps}",
            f"data.short={TEACHERS_SIZE}",
            f"data.long={TEACHERS_SIZE}",
            "train.optimizer.lr=5e-4",
            f"train.schedule.warmup_steps={min(50, arguments.half_steps // 10)}",
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


# ------------------------------------------------------------------------------------------------- the table


def summarise(arm: Arm, found: dict[str, dict[int, dict[str, Any]]]) -> dict[str, Any]:
    """One row: figures by seed, mean and spread, and the comparison, seed by seed."""
    mine = found[arm.name]
    maps = [figures["map"] for figures in mine.values()]
    row: dict[str, Any] = {"part": arm.part, "arm": arm.name, "map_mean": statistics.mean(maps)}
    if len(maps) > 1:
        row["map_stdev"] = statistics.stdev(maps)
    if arm.against is not None:
        theirs = found[arm.against]
        pairs = [(mine[seed]["map"], theirs[seed]["map"]) for seed in mine]
        values = [_compared(a, b, arm.by) for a, b in pairs]
        means = tuple(statistics.mean(side) for side in zip(*pairs, strict=True))
        # Of the means, not the mean of ratios: one poor pair should not decide.
        value = _compared(means[0], means[1], arm.by)
        row |= {"against": arm.against, "by": arm.by, "value": value, "values": [round(x, 2) for x in values]}
        if len(values) > 1:
            row["value_stdev"] = statistics.stdev(values)
            row["value_half_interval"] = T_95[len(values)] * row["value_stdev"] / len(values) ** 0.5
        if arm.wanted is not None:
            row |= {"wanted": arm.wanted, "reached": value >= arm.wanted if arm.by == "ratio" else value > arm.wanted}
    rounded = {key: round(value, 3) if isinstance(value, float) else value for key, value in row.items()}
    return rounded | {"by_seed": {str(seed): mine[seed] for seed in sorted(mine)}}


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """The table as a person reads it."""
    lines = ["| | student | mAP ± sd | against | by seed | wanted |", "|---|---|---|---|---|---|"]
    for row in rows:
        spread = f" ± {row['map_stdev']:.2f}" if "map_stdev" in row else ""
        against = by_seed = wanted = ""
        if "against" in row:
            against = f"{_value(row['value'], row['by'])} of *{row['against']}*"
            if row["by"] == "difference":
                against = f"{_value(row['value'], row['by'])} over *{row['against']}*"
            by_seed = ", ".join(_value(value, row["by"]) for value in row["values"])
        if "wanted" in row:
            bound = "≥ 97 %".replace("97", f"{row['wanted']:g}") if row["by"] == "ratio" else "more"
            wanted = f"{bound}: {'reached' if row['reached'] else 'missed'}"
        lines.append(
            f"| {row['part']} | {row['arm']} | {row['map_mean']:.2f}{spread} | {against} | {by_seed} | {wanted} |"
        )
    return "\n".join(lines) + "\n"


def _compared(mine: float, theirs: float, by: str) -> float:
    """In percent of the other's mAP (0 of nothing), or in points."""
    if by == "difference":
        return mine - theirs
    return 100 * mine / theirs if theirs else 0.0


def _value(value: float, by: str) -> str:
    return f"{value:.1f} %" if by == "ratio" else f"{value:+.2f}"


def picture(rows: Sequence[dict[str, Any]], title: str) -> str:
    """mAP as SVG: a dot a seed, a diamond for the mean."""
    left, right, top, row_height = 330, 660, 56, 26
    points = [[figures["map"] for figures in row["by_seed"].values()] for row in rows]
    high = max(max(values) for values in points) * 1.05 or 1.0
    height = top + row_height * len(rows) + 40

    def x_of(value: float) -> float:
        return left + value / high * (right - left)

    def body() -> Iterator[str]:
        yield f'<text x="16" y="22" font-size="14" font-weight="bold">{title}: mAP of the student</text>'
        yield '<text x="16" y="40" fill="#555">dot: one seed; diamond: mean</text>'
        step = next(s for s in (0.5, 1, 2, 5, 10, 20, 50) if high / s <= 8)
        for index in range(int(high / step) + 1):
            x = x_of(index * step)
            yield f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{top - 8}" y2="{height - 34}" stroke="#ddd"/>'
            yield f'<text x="{x:.1f}" y="{height - 16}" text-anchor="middle" fill="#555">{index * step:g}</text>'
        for index, (row, values) in enumerate(zip(rows, points, strict=True)):
            y = top + row_height * index + 8
            yield f'<text x="{left - 14}" y="{y + 4}" text-anchor="end">{row["part"]} {row["arm"]}</text>'
            for value in values:
                yield f'<circle cx="{x_of(value):.1f}" cy="{y}" r="3.5" fill="#1f6f8b" opacity="0.6"/>'
            yield f'<path d="M{x_of(row["map_mean"]):.1f} {y - 7}l6 7l-6 7l-6 -7z" fill="#c2410c"/>'

    start = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 700 {height}" font-family="sans-serif" font-size="12">'
    )
    return "\n".join([start, f'<rect width="700" height="{height}" fill="#fff"/>', *body(), "</svg>\n"])


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UserError as error:
        sys.exit(f"error: {error}")
