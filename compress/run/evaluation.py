"""Evaluation of a run's files: mAP with a gate, and latency. A row of report.json for each.

The student in PyTorch is the reference of all. What cannot run here is a row with the reason.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from compress.config.data import Split
from compress.config.deploy import Deploy
from compress.console import open_console, progress
from compress.detectors.checkpoints import checkpoint_file, load_teacher_checkpoint
from compress.export.onnx import torch_runner
from compress.manifest import TEACHER_CHECK, Manifest, RunFolder
from compress.run.artifacts import Artifact, Checks, exported_settings
from deploy import latency, validate
from deploy.core import cuda_driver
from deploy.core.card import network_precision
from deploy.core.environment import environment
from deploy.core.errors import UserError
from deploy.core.files import sha256_of
from deploy.runtimes.base import Runner
from deploy.runtimes.open import open_runner

TEACHER = "teacher (torch)"
MAP_FIGURES = ("map", "max_detections", "map_at_max", "mar_at_max")


@dataclass(frozen=True)
class EvaluationPlan:
    """Plan of what files are measured on, and how.

    settings: the gate, providers, benchmark and runners of the user's own.
    split: labelled images that decide; `checks.images` are their files.
    teacher: a checkpoint whose latency stands beside the student's; None: no teacher is timed.
    categories: id → name, for a teacher that does not say which classes it knows.
    device: where torch runs.
    """

    folder: RunFolder
    manifest: Manifest
    settings: Deploy
    checks: Checks
    split: Split
    teacher: str | None = None
    categories: Mapping[int, str] = field(default_factory=dict)
    device: str = "cpu"


def evaluate(plan: EvaluationPlan, artifacts: Sequence[Artifact]) -> list[dict[str, Any]]:
    """Validate and measure the files; the rows of `artifacts` in report.json, the teacher's first, those of files that
    are not there or cannot run last."""
    opened = _open(plan, artifacts)
    inputs = {
        "onnx": [sha256_of(file) for name, file in opened.files.items() if name in opened.shipped],
        "data": sha256_of(plan.split.annotations),
        "deploy": exported_settings(plan.settings, plan.checks),
    }
    if plan.settings.runners is not None:
        inputs["runners"] = list(plan.settings.runners)
    proofs = plan.manifest.stage("validate", inputs, [], lambda: _validate(plan, opened.runners))
    timed = {**_teacher(plan), **opened.runners}
    latencies = plan.manifest.stage(
        "benchmark", {**inputs, "machine": _machine()}, [plan.folder.benchmark], lambda: _benchmark(plan, timed)
    )
    rows = [_teacher_row(plan, latencies)] if plan.teacher is not None else []
    for proof in proofs:
        name = proof["name"]
        rows.append({**_row(proof, opened.files[name]), **latencies.get(name, {}), **opened.facts.get(name, {})})
    return [*rows, *opened.idle]


# --- details --------------------------------------------------------------------------------------------


@dataclass
class _Opened:
    """Runners by name, the reference first. files: what each runs. shipped: names of the files that the run made.
    facts: more about a file for its row. idle: rows of what cannot run."""

    runners: dict[str, Runner]
    files: dict[str, Path]
    shipped: set[str] = field(default_factory=set)
    facts: dict[str, dict[str, Any]] = field(default_factory=dict)
    idle: list[dict[str, Any]] = field(default_factory=list)


def _open(plan: EvaluationPlan, artifacts: Sequence[Artifact]) -> _Opened:
    student = plan.folder.weights()
    opened = _Opened({student.name: _torch(plan, str(student))}, {student.name: student})
    for artifact in artifacts:
        name, facts = artifact.path.name, _facts(artifact)
        gate = artifact.gate
        if gate is None and artifact.engine is not None and cuda_driver.gpu() is None:
            gate = "not run: no GPU"
        if gate is None:
            try:
                runner = open_runner(artifact.path, plan.settings.providers)
            except UserError as error:
                if artifact.engine is None:
                    raise
                gate = f"not run: {error}"
        if gate is not None:
            opened.idle.append({"file": name, "precision": artifact.precision, **facts, "gate": gate})
            continue
        opened.runners[name], opened.files[name] = runner, artifact.path
        opened.shipped.add(name)
        if facts:
            opened.facts[name] = facts
    exported = plan.folder.onnx()
    for path in plan.settings.runners or ():
        name = f"{exported.name} ({path.rpartition(':')[2]})"
        opened.runners[name] = open_runner(exported, runner=path)
        opened.files[name] = exported
    return opened


def _facts(artifact: Artifact) -> dict[str, Any]:
    """Pick the facts of an engine's card that the report shows."""
    if artifact.engine is None:
        return {}
    card = artifact.engine
    described = card.model_dump(mode="json", exclude={"model", "weights_sha256", "refittable_weights"})
    return {"size_mb": round(card.engine_bytes / 1e6, 2), "engine": described}


def _torch(plan: EvaluationPlan, checkpoint: str) -> Runner:
    return torch_runner(
        checkpoint,
        plan.settings,
        plan.checks.input_size,
        resize_short_long=plan.checks.resize_short_long,
        categories=plan.categories,
        device=plan.device,
    )


def _validate(plan: EvaluationPlan, runners: dict[str, Runner]) -> list[dict[str, Any]]:
    with progress("validate") as step:
        results = validate.validate(
            runners,
            plan.split.annotations,
            plan.split.images,
            reference=plan.folder.weights().name,
            max_map_drop=plan.settings.max_map_drop,
            progress=step,
        )
    for result in results:
        if result.diagnosis is not None:
            open_console().print(f"{result.name}: {result.diagnosis}", markup=False)
    return [result.to_dict() for result in results]


def _teacher(plan: EvaluationPlan) -> dict[str, Runner]:
    if plan.teacher is None:
        return {}
    reason = load_teacher_checkpoint(plan.teacher)[0].exportable
    if reason is not None:
        open_console().print(f"benchmark: without the teacher, which cannot be exported: {reason}")
        return {}
    return {TEACHER: _torch(plan, plan.teacher)}


def _benchmark(plan: EvaluationPlan, timed: dict[str, Runner]) -> dict[str, Any]:
    bench = plan.settings.benchmark
    with progress("benchmark") as step:
        report = latency.benchmark(
            timed,
            plan.checks.images,
            batch_sizes=bench.batch_sizes,
            seconds=bench.seconds,
            warm_up_seconds=2 * bench.seconds,
            progress=step,
        )
    latency.write_report(plan.folder.benchmark, report)
    return {name: _latency(report, name) for name in timed}


def _latency(report: latency.BenchmarkReport, name: str) -> dict[str, Any]:
    """p50..p99 of one image (scope `h2d+compute+d2h`), and the best throughput over the batch sizes."""
    cells = [cell for cell in report.cells if cell.runner == name and cell.scope == "h2d+compute+d2h"]
    single = min(cells, key=lambda cell: cell.batch_size)
    return {
        "backend": single.backend,
        "latency_ms": {name: round(single.latency_ms[name].value, 3) for name in ("p50", "p90", "p95", "p99")},
        "latency_batch": single.batch_size,
        "throughput_ips": round(max(cell.throughput_ips.value for cell in cells), 1),
    }


def _machine() -> dict[str, Any]:
    """Describe the machine that a latency belongs to."""
    found = environment()
    return {"cpu": found["cpu"]["model"], "gpus": [gpu.get("name") for gpu in found["gpus"] or []]}


def _teacher_row(plan: EvaluationPlan, latencies: Mapping[str, Any]) -> dict[str, Any]:
    assert plan.teacher is not None
    return {
        "file": TEACHER,
        "precision": "fp32",
        "size_mb": round(checkpoint_file(plan.teacher).stat().st_size / 1e6, 2),
        "map": plan.folder.result(TEACHER_CHECK)["metrics"]["map"],
        "gate": "not run: the teacher does not ship",
        **latencies.get(TEACHER, {}),
    }


def _row(proof: Mapping[str, Any], file: Path) -> dict[str, Any]:
    agreement = proof["agreement"]
    return {
        "file": proof["name"],
        "backend": proof["backend"],
        "precision": network_precision(proof["precision"]),
        "size_mb": round(file.stat().st_size / 1e6, 2),
        **{key: value for key, value in proof["metrics"].items() if key in MAP_FIGURES},
        "map_drop": proof["map_drop"],
        "agreement": agreement["share"] if agreement else None,
        "gate": proof["gate"],
        **{key: proof[key] for key in ("half", "note") if proof.get(key) is not None},
    }
