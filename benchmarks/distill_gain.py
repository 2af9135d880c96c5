"""What distillation is worth: the same student, schedule and images with and without the teacher, over seeds.

    python benchmarks/distill_gain.py                       # the quickstart recipe, 3 seeds
    python benchmarks/distill_gain.py recipes/bccd.yaml --seeds 0,1,2 --set train.steps=300

A seed changes the initial weights, the order of the images and their augmentation; baseline and student of one seed
share all three. Prints each pair, mean and standard deviation, and the mean paired difference with its 95 %
confidence interval (Student's t). Resumable: finished arms are kept below the recipe's `runs`. Writes
benchmarks/results/distill_gain-<recipe>.json.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import statistics
import sys
from pathlib import Path
from typing import Any

from rich.table import Table

from compress.console import open_console
from compress.pipeline import distill
from compress.recipe import load_recipe, recipe_sha256
from compress.versions import versions
from deploy.environment import environment
from deploy.errors import UserError
from deploy.files import write_json

ROOT = Path(__file__).parents[1]
T_95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}  # two-sided


def main() -> int:
    arguments = parse_arguments()
    pairs = []
    for seed in arguments.seeds:
        baseline, student = train_pair(arguments.recipe, seed, arguments.set)
        pairs.append({"seed": seed, "baseline": baseline, "student": student})
    console = open_console()
    console.print(table(pairs))
    summary = summarise(pairs)
    console.print(
        f"distilled minus baseline: {summary['gain_mean']:+.2f} mAP, standard deviation {summary['gain_stdev']:.2f}, "
        f"95 % interval [{summary['gain_low']:+.2f}, {summary['gain_high']:+.2f}], {len(pairs)} seeds",
    )
    recipe = load_recipe(arguments.recipe, arguments.set)
    out = arguments.out or ROOT / "benchmarks" / "results" / f"distill_gain-{recipe.name}.json"
    machine = environment()
    write_json(
        out,
        {
            "date": datetime.date.today().isoformat(),
            "command": " ".join(["python", "benchmarks/distill_gain.py", *sys.argv[1:]]),
            "recipe": recipe.name,
            "recipe_sha256": recipe_sha256(recipe),
            "versions": versions(),
            "machine": {
                "cpu": machine["cpu"]["model"],
                "cores": machine["cpu"]["usable_cores"],
                "system": platform.system(),
            },
            "summary": summary,
            "pairs": pairs,
        },
    )
    console.print(f"written: {out}")
    return 0


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", nargs="?", type=Path, default=ROOT / "recipes" / "quickstart.yaml")
    parser.add_argument("--seeds", type=lambda text: [int(x) for x in text.split(",")], default=[0, 1, 2])
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="as in `compress run`")
    parser.add_argument("--out", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    if not 2 <= len(arguments.seeds) <= 10:
        parser.error("--seeds: give 2 to 10, a single pair has no spread")
    return arguments


def train_pair(path: Path, seed: int, settings: list[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Figures of baseline and student of one seed: mAP, AP50, AP75 and seconds of training."""
    name = load_recipe(path, settings).name
    recipe = load_recipe(path, [*settings, f"seed={seed}", f"name={name}-gain-seed{seed}", "baseline=true"])
    run_dir = distill(recipe, resume=True)
    stages = json.loads((run_dir / "manifest.json").read_text(encoding="utf-8"))["stages"]
    baseline, student = (stages[arm]["result"] for arm in ("baseline", "student"))
    return figures(baseline), figures(student)


def figures(result: dict[str, Any]) -> dict[str, Any]:
    return {key: round(result["metrics"][key], 3) for key in ("map", "map50", "map75")} | {
        "seconds": result["seconds"],
        "steps": result["steps"],
    }


def summarise(pairs: list[dict[str, Any]]) -> dict[str, float]:
    gains = [pair["student"]["map"] - pair["baseline"]["map"] for pair in pairs]
    mean, stdev = statistics.mean(gains), statistics.stdev(gains)
    half = T_95[len(gains)] * stdev / len(gains) ** 0.5
    values: dict[str, float] = {
        "gain_mean": mean,
        "gain_stdev": stdev,
        "gain_low": mean - half,
        "gain_high": mean + half,
    }
    for arm in ("baseline", "student"):
        maps = [pair[arm]["map"] for pair in pairs]
        values |= {f"{arm}_mean": statistics.mean(maps), f"{arm}_stdev": statistics.stdev(maps)}
        seconds = [pair[arm]["seconds"] for pair in pairs]
        values[f"{arm}_seconds"] = statistics.mean(seconds)
    return {key: round(value, 3) for key, value in values.items()}


def table(pairs: list[dict[str, Any]]) -> Table:
    result = Table("seed", "baseline mAP", "distilled mAP", "difference", "AP50", "training s")
    for pair in pairs:
        baseline, student = pair["baseline"], pair["student"]
        result.add_row(
            str(pair["seed"]),
            f"{baseline['map']:.2f}",
            f"{student['map']:.2f}",
            f"{student['map'] - baseline['map']:+.2f}",
            f"{baseline['map50']:.1f} → {student['map50']:.1f}",
            f"{baseline['seconds']:.0f} → {student['seconds']:.0f}",
        )
    return result


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UserError as error:
        sys.exit(f"error: {error}")
