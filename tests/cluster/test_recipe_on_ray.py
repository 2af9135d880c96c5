"""A recipe with the section `ray`: the labels, figures and report of the same run without it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from compress.data.synthetic import class_names
from compress.manifest import RunFolder
from compress.run import pipeline
from tests.helpers import tiny_recipe
from tests.helpers.random_teacher import teacher

pytest.importorskip("ray")
pytestmark = pytest.mark.exhaustive


def test_the_same_run(tmp_path: Path) -> None:
    random = teacher(tmp_path / "random.safetensors", tuple(class_names(3)), 1)
    settings = [
        "teacher=null", "methods={}", "labels={fraction: 0.5}", "train.steps=3", "train.schedule.warmup_steps=0",
        f"pseudo_labels={{teachers: [{{checkpoint: {random}}}], tau: 0.6, tau_ignore: 0.5, fine_tune: null}}",
    ]  # fmt: skip
    runs = []
    for name, more in (("here", []), ("ray", ["ray={actors: 2, num_cpus: 0.5}"])):
        runs.append(pipeline.run(tiny_recipe.recipe(tmp_path / name, *settings, *more)))
    labels = [(RunFolder(run).pseudo_labels / "training-images.json").read_bytes() for run in runs]
    assert labels[0] == labels[1] and labels[0].count(b"category_id") > 3
    assert proven(runs[0]) == proven(runs[1])


def proven(run: Path) -> list[dict[str, Any]]:
    """Rows of the files in the report, without what is timed."""
    rows = json.loads((run / "report.json").read_text())["artifacts"]
    timed = ("latency_ms", "throughput_ips", "latency_doubts")
    return [{key: value for key, value in row.items() if key not in timed} for row in rows]
