"""What distillation is worth: the same student, schedule and images with and without the teacher, over seeds.

    python -m benchmarks distill_gain cpu                   # every method on the preset `cpu`, 3 seeds
    python -m benchmarks distill_gain cpu --table uet       # another table of the preset
    python -m benchmarks distill_gain cpu --table families  # other detectors, each with its own teacher and baseline
    python -m benchmarks distill_gain recipes/quickstart.yaml --seeds 0,1,2,3,4

A preset is a folder of `benchmarks/presets`: `student.yaml` (a recipe), `teacher.yaml` (how its teacher is trained,
once for all) and `arms.yaml` (tables of arms; an arm is a list of settings for the recipe). A table may have groups of
arms: `{student: [settings], teacher: [settings], arms: {...}}`, with a baseline and a teacher each. A recipe on its own
is compared with itself without its methods.

A seed changes the initial weights, the order of the images and their augmentation; all arms of one seed share all
three, so differences to the baseline are taken in pairs. Prints mean and standard deviation, and the mean paired
difference with its 95 % confidence interval (Student's t). Resumable: finished arms are kept below the recipe's `runs`.
Writes benchmarks/results/distill_gain-<preset>-<table>.json and the same as a picture (.svg).

Settings of the arms of a preset were chosen with `--tune`, which draws both training and validation images from
another seed: nothing was chosen on the images of the tables. benchmarks/results/distill_gain-cpu-tuning.json has what
was tried.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import datetime
import multiprocessing
import os
import platform
import statistics
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml
from rich.table import Table

from compress.config.recipe import Recipe, load_recipe, recipe_sha256
from compress.console import open_console
from compress.manifest import STUDENT, TEACHER_CHECK, RunFolder
from compress.versions import versions
from deploy.core.environment import environment
from deploy.core.errors import UserError
from deploy.core.files import sha256_of, write_json, write_text

ROOT = Path(__file__).parents[2]
PRESETS = ROOT / "benchmarks" / "presets"
T_95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}  # two-sided
TUNING_DATA = 5  # added to the data's seed by --tune
BASELINE = "baseline"


@dataclass(frozen=True)
class Arm:
    """One row of a table: settings on top of the recipe's; `alone` trains from the labels only and is the baseline of
    the arms of its `group`."""

    name: str
    settings: tuple[str, ...]
    alone: bool = False
    group: str = ""


@dataclass(frozen=True)
class Group:
    """Arms of one student. student, teacher: settings on top of the preset's two recipes."""

    name: str
    student: tuple[str, ...]
    teacher: tuple[str, ...]
    arms: tuple[Arm, ...]


def main() -> int:
    arguments = parse_arguments()
    console = open_console()
    recipe_path, arms, common = read_plan(arguments)
    baselines = {arm.group: arm.name for arm in arms if arm.alone}
    jobs = [(recipe_path, arm, seed, common) for seed in arguments.seeds for arm in arms]
    results: dict[str, dict[int, dict[str, Any]]] = {arm.name: {} for arm in arms}
    for arm, seed, figures in run_all(jobs, arguments.jobs):
        results[arm][seed] = figures
        console.print(f"{arm}, seed {seed}: mAP {figures['map']:.2f} ({figures['seconds']:.0f} s of training)")
    rows = [summarise(arm, results[arm.name], results[baselines[arm.group]]) for arm in arms]
    console.print(table(rows))

    recipe = load_recipe(recipe_path, common)
    name = recipe.name if arguments.preset.suffix else f"{arguments.preset}-{arguments.table}"
    name += "-tune" if arguments.tune else ""
    out = arguments.out or ROOT / "benchmarks" / "results" / f"distill_gain-{name}.json"
    machine = environment()
    write_json(
        out,
        {
            "date": datetime.date.today().isoformat(),
            "command": " ".join(["python", "-m", "benchmarks", "distill_gain", *sys.argv[1:]]),
            "recipe": recipe.name,
            "recipe_sha256": recipe_sha256(recipe),
            "versions": versions(),
            "machine": {
                "cpu": machine["cpu"]["model"],
                "cores": machine["cpu"]["usable_cores"],
                "gpu": [gpu["name"] for gpu in machine.get("gpus") or []],
                "system": platform.system(),
            },
            "teacher": {
                arm.group: taught_by(arm_recipe(recipe_path, arm, arguments.seeds[0], common))
                for arm in arms
                if not arm.alone
            }
            if "" not in baselines
            else taught_by(arm_recipe(recipe_path, arms[-1], arguments.seeds[0], common)),
            "seeds": arguments.seeds,
            "arms": rows,
        },
    )
    write_text(out.with_suffix(".svg"), picture(rows, name))
    console.print(f"written: {out} and {out.with_suffix('.svg').name}")
    return 0


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("preset", nargs="?", type=Path, default=Path("cpu"), metavar="PRESET|RECIPE")
    parser.add_argument("--table", default="methods", help="of the preset's arms.yaml")
    parser.add_argument("--arms", metavar="A,B", help="only these arms (the baseline always runs)")
    parser.add_argument("--seeds", type=seeds, default=[0, 1, 2], metavar="N,N,…", help="1 to 10 different ones")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="as in `compress run`")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="trainings at a time; threads are shared out")
    parser.add_argument("--tune", action="store_true", help="on other images: to choose settings, not to report")
    parser.add_argument("--out", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    if arguments.jobs < 1:
        parser.error("--jobs: give 1 or more")
    if arguments.preset.suffix:
        if arguments.tune or arguments.arms or arguments.table != "methods":
            parser.error("--tune, --table and --arms are for presets; a recipe has one arm and its own images")
    elif any(setting.partition("=")[0].startswith(("methods", "teacher")) for setting in arguments.set):
        parser.error("--set: methods and teacher of a preset are those of its arms; edit arms.yaml")
    elif (arguments.arms or arguments.set) and arguments.out is None and not arguments.tune:
        parser.error("--arms and --set make another table than the preset's; name a file for it with --out")
    return arguments


def seeds(text: str) -> list[int]:
    try:
        values = [int(x) for x in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no list of whole numbers like 0,1,2") from None
    if not 1 <= len(values) <= 10 or len(set(values)) < len(values):
        raise argparse.ArgumentTypeError("give 1 to 10 different ones")
    return values


def read_plan(arguments: argparse.Namespace) -> tuple[Path, list[Arm], tuple[str, ...]]:
    """The recipe, the arms (the baseline first) and the settings that they share."""
    common = tuple(arguments.set)
    if arguments.preset.suffix:
        return arguments.preset, [Arm(BASELINE, (), alone=True), Arm("distilled", ())], common
    folder = PRESETS / arguments.preset
    if not (folder / "arms.yaml").is_file():
        names = ", ".join(sorted(path.name for path in PRESETS.iterdir()))
        raise UserError(f"{arguments.preset}: neither a preset ({names}) nor a .yaml recipe")
    recipe_path = folder / "student.yaml"
    tables = yaml.safe_load((folder / "arms.yaml").read_text(encoding="utf-8"))
    if arguments.table not in tables:
        raise UserError(f"{folder.name}: no table {arguments.table}; it has {', '.join(tables)}")
    groups = read_table(tables[arguments.table])
    if arguments.arms:
        wanted = arguments.arms.split(",")
        if unknown := set(wanted) - {arm.name for group in groups for arm in group.arms}:
            raise UserError(f"no arm {', '.join(sorted(unknown))} in table {arguments.table}")
        groups = [replace(g, arms=tuple(arm for arm in g.arms if arm.name in wanted)) for g in groups]
        groups = [group for group in groups if group.arms]
    if arguments.tune:
        recipe = load_recipe(recipe_path, common)
        if recipe.data.synthetic is None:
            raise UserError(f"{folder.name}: --tune needs synthetic data, which can be drawn anew")
        common = (
            *common,
            f"data.synthetic.seed={recipe.data.synthetic.seed + TUNING_DATA}",
            f"name={recipe.name}-tune",
        )
    for group in groups:  # a mistake in the last one should not show up after an hour
        for arm in group.arms:
            load_recipe(recipe_path, [*common, *group.student, "teacher.checkpoint=t.safetensors", *arm.settings])
    arms = []
    for group in groups:
        own = group.student
        if (folder / "teacher.yaml").is_file():
            teacher = train_teacher(folder / "teacher.yaml", arguments.set, group.teacher)
            own = (*own, f"teacher.checkpoint={teacher}")
        arms.append(Arm(f"{group.name} {BASELINE}".strip(), own, alone=True, group=group.name))
        arms += [replace(arm, settings=(*own, *arm.settings)) for arm in group.arms]
    return recipe_path, arms, common


def read_table(table: dict[str, Any]) -> list[Group]:
    """The groups of a table of arms.yaml; one without a name where it has only arms."""
    if all(isinstance(settings, list) for settings in table.values()):
        return [Group("", (), (), tuple(Arm(name, tuple(settings)) for name, settings in table.items()))]
    return [
        Group(
            name,
            tuple(group["student"]),
            tuple(group["teacher"]),
            tuple(Arm(f"{name} {arm}", tuple(settings), group=name) for arm, settings in group["arms"].items()),
        )
        for name, group in table.items()
    ]


def train_teacher(path: Path, settings: list[str], own: tuple[str, ...]) -> Path:
    """The teacher of a preset or of a group (`own`: its settings), trained once below `runs`, where `settings` say that
    the images are."""
    from compress.run.pipeline import distill

    shared = [setting for setting in settings if setting.startswith(("runs=", "data."))]
    recipe = load_recipe(path, [*shared, *own])
    weights = RunFolder(recipe.run_dir).weights()
    distill(recipe, resume=True, distillation=False)
    return weights


def run_all(jobs: list[tuple[Path, Arm, int, tuple[str, ...]]], at_a_time: int) -> Any:
    """Yield (arm, seed, figures) as they come."""
    if at_a_time == 1:
        for job in jobs:
            yield train(*job)
        return
    threads = max(1, (os.cpu_count() or 1) // at_a_time)
    os.environ["OMP_NUM_THREADS"] = str(threads)  # of the processes that start now
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(at_a_time, mp_context=context) as pool:
        first = pool.submit(train, *jobs[0])  # draws the images: the others must not do it at the same time
        yield first.result()
        for future in concurrent.futures.as_completed([pool.submit(train, *job) for job in jobs[1:]]):
            yield future.result()


def train(path: Path, arm: Arm, seed: int, common: tuple[str, ...]) -> tuple[str, int, dict[str, Any]]:
    """Train one arm with one seed, or read what an earlier call measured."""
    from compress.run.pipeline import distill

    recipe = arm_recipe(path, arm, seed, common)
    run_dir = distill(recipe, resume=True, distillation=not arm.alone)
    result = RunFolder(run_dir).result(STUDENT)
    figures = {key: round(result["metrics"][key], 3) for key in ("map", "map50", "map75")}
    return arm.name, seed, figures | {"seconds": result["seconds"], "steps": result["steps"]}


def arm_recipe(path: Path, arm: Arm, seed: int, common: tuple[str, ...]) -> Recipe:
    """The recipe of one training: baseline and distilled arm are runs of their own."""
    name = load_recipe(path, common).name
    label = "".join(c if c.isalnum() or c in "._" else "-" for c in arm.name)
    own = (f"seed={seed}", f"name={name}-gain-{label}-seed{seed}", "baseline=false")
    return load_recipe(path, [*common, *arm.settings, *own])


def taught_by(recipe: Recipe) -> dict[str, Any]:
    """mAP of the teacher on the students' validation images, and which file it is (None: trained in each run)."""
    checkpoint = recipe.teacher.checkpoint if recipe.teacher is not None else None
    file = Path(checkpoint) if checkpoint is not None else None
    return {
        "map": round(RunFolder(recipe.run_dir).result(TEACHER_CHECK)["metrics"]["map"], 3),
        "sha256": sha256_of(file) if file is not None and file.is_file() else None,
    }


def summarise(arm: Arm, figures: dict[int, dict[str, Any]], baseline: dict[int, dict[str, Any]]) -> dict[str, Any]:
    """One row: figures by seed, mean and spread, and paired differences to the baseline."""
    maps = [figures[seed]["map"] for seed in figures]
    gains = [figures[seed]["map"] - baseline[seed]["map"] for seed in figures]
    row: dict[str, Any] = {
        "arm": arm.name,
        "settings": list(arm.settings),
        "map_mean": statistics.mean(maps),
        "gain_mean": statistics.mean(gains),
        "seconds_mean": statistics.mean(figures[seed]["seconds"] for seed in figures),
    }
    if len(gains) > 1:
        half = T_95[len(gains)] * statistics.stdev(gains) / len(gains) ** 0.5
        row |= {
            "map_stdev": statistics.stdev(maps),
            "gain_stdev": statistics.stdev(gains),
            "gain_low": row["gain_mean"] - half,
            "gain_high": row["gain_mean"] + half,
        }
    rounded = {key: round(value, 3) if isinstance(value, float) else value for key, value in row.items()}
    return rounded | {"by_seed": {str(seed): figures[seed] for seed in sorted(figures)}}


def table(rows: list[dict[str, Any]]) -> Table:
    result = Table("arm", "mAP", "± sd", "gain", "by seed", "95 % interval", "training s")
    seeds: dict[str, Any] = {}
    for row in rows:
        is_baseline = row["arm"].endswith(BASELINE)
        seeds = row["by_seed"] if is_baseline else seeds  # a baseline stands before its arms
        gains = [f"{row['by_seed'][s]['map'] - seeds[s]['map']:+.2f}" for s in row["by_seed"]]
        result.add_row(
            row["arm"],
            f"{row['map_mean']:.2f}",
            f"{row['map_stdev']:.2f}" if "map_stdev" in row else "",
            "" if is_baseline else f"{row['gain_mean']:+.2f}",
            "" if is_baseline else " ".join(gains),
            "" if is_baseline or "gain_low" not in row else f"[{row['gain_low']:+.2f}, {row['gain_high']:+.2f}]",
            f"{row['seconds_mean']:.0f}",
        )
    return result


def baseline_of(row: dict[str, Any], rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The last baseline before `row`."""
    return [other for other in rows[: rows.index(row)] if other["arm"].endswith(BASELINE)][-1]


def picture(rows: list[dict[str, Any]], name: str) -> str:
    """Gains in mAP as SVG: a dot a seed, a diamond for the mean, a line for the 95 % interval."""
    baselines = [row for row in rows if row["arm"].endswith(BASELINE)]
    arms = [row for row in rows if row not in baselines]
    left, right, row_height, top = 230, 660, 26, 56
    gains = {
        row["arm"]: [row["by_seed"][s]["map"] - baseline_of(row, rows)["by_seed"][s]["map"] for s in row["by_seed"]]
        for row in arms
    }
    ends = [x for row in arms for x in (*gains[row["arm"]], row["gain_mean"])]
    low, high = min(0.0, *ends) - 0.5, max(0.0, *ends) + 0.5
    step = next(s for s in (0.5, 1, 2, 5, 10, 20, 50) if (high - low) / s <= 10)

    def x_of(value: float) -> float:
        return left + (min(max(value, low), high) - low) / (high - low) * (right - left)

    height = top + row_height * len(arms) + 40
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 700 {height}" font-family="sans-serif" font-size="12">',
        f'<rect width="700" height="{height}" fill="#fff"/>',
        f'<text x="16" y="22" font-size="14" font-weight="bold">{name}: gain in mAP over the baseline '
        f"({', '.join(format(row['map_mean'], '.2f') for row in baselines)})</text>",
        '<text x="16" y="40" fill="#555">dot: one seed; diamond: mean; line: 95 % interval of the mean, cut at the '
        "edge</text>",
    ]
    tick = -(-low // step) * step
    while tick <= high:
        x = x_of(tick)
        colour, label = ("#333", "0") if abs(tick) < 1e-9 else ("#ddd", f"{tick:+g}")
        parts.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{top - 8}" y2="{height - 34}" stroke="{colour}"/>')
        parts.append(f'<text x="{x:.1f}" y="{height - 16}" text-anchor="middle" fill="#555">{label}</text>')
        tick += step
    for index, row in enumerate(arms):
        y = top + row_height * index + 8
        label = row["arm"].replace("&", "&amp;").replace("<", "&lt;")
        parts.append(f'<text x="{left - 14}" y="{y + 4}" text-anchor="end">{label}</text>')
        if "gain_low" in row:
            ends_at = x_of(row["gain_low"]), x_of(row["gain_high"])
            parts.append(
                f'<line x1="{ends_at[0]:.1f}" x2="{ends_at[1]:.1f}" y1="{y}" y2="{y}" stroke="#1f6f8b" '
                'stroke-width="2" opacity="0.45"/>'
            )
        parts += [
            f'<circle cx="{x_of(gain):.1f}" cy="{y}" r="3.5" fill="#1f6f8b" opacity="0.6"/>'
            for gain in gains[row["arm"]]
        ]
        x = x_of(row["gain_mean"])
        parts.append(f'<path d="M{x:.1f} {y - 7}l6 7l-6 7l-6 -7z" fill="#c2410c"/>')
    return "\n".join([*parts, "</svg>\n"])


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UserError as error:
        sys.exit(f"error: {error}")
