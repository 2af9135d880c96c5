"""Results of one `compress run`: mAP, size and latency of every model and file, from its report.

    python -m benchmarks recipe recipes/quickstart_nano.yaml
    python -m benchmarks recipe recipes/bccd.yaml --set train.steps=500

Runs the recipe, or resumes it: a finished run is only read.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.lib import options
from benchmarks.lib.results import Case, Row
from compress.config.recipe import load_recipe
from compress.manifest import RunFolder
from compress.run.pipeline import run as run_recipe


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", type=Path)
    options.settings(parser)


def run(args: argparse.Namespace) -> Iterator[Case]:
    recipe = load_recipe(args.recipe, args.set)
    folder = RunFolder(run_recipe(recipe, resume=True))
    report = json.loads(folder.report.read_text(encoding="utf-8"))
    seconds = sum(stage["seconds"] for stage in folder.stages().values())
    yield Case(recipe.name, [*rows_of(report), Row("run", "wall time", round(seconds, 2), "s")])


def rows_of(report: dict[str, Any]) -> list[Row]:
    """Rows of a report.json: the models, then the files."""
    rows: list[Row] = []
    for name, model in report["models"].items():
        for key, (metric, unit) in MODEL_METRICS.items():
            if model.get(key) is not None:
                rows.append(Row(name, metric, model[key], unit))
        rows += [Row(name, f"AP of {label}", value) for label, value in model.get("per_class", {}).items()]
    for file in report["artifacts"]:
        variant = f"{file['file']}, {file['backend']}" if file.get("backend") else file["file"]
        for key, (metric, unit) in FILE_METRICS.items():
            if file.get(key) is not None:
                notes = f"gate: {file['gate']}" if key == "map" else ""
                rows.append(Row(variant, metric, file[key], unit, notes=notes))
        rows += [Row(variant, name, ms, "ms") for name, ms in (file.get("latency_ms") or {}).items()]
    return rows


MODEL_METRICS = {
    "map": ("mAP", ""), "map50": ("mAP50", ""), "map75": ("mAP75", ""), "map_small": ("mAP, small", ""),
    "map_medium": ("mAP, medium", ""), "map_large": ("mAP, large", ""), "mar100": ("mAR100", ""),
    "params_m": ("parameters", "M"), "gflops": ("GFLOPs", ""), "train_seconds": ("training time", "s"),
}  # fmt: skip
FILE_METRICS = {
    "map": ("mAP", ""), "map_drop": ("mAP drop", ""), "agreement": ("agreement", ""), "size_mb": ("size", "MB"),
    "throughput_ips": ("throughput", "images/s"),
}  # fmt: skip
