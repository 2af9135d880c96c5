"""Evaluation of a run's files: mAP with a gate, and latency. A row of report.json for each.

The student in PyTorch, on the deployment path, is the reference of all, and is itself compared with what training
measured. What cannot run here is a row with the reason.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from compress.config.data import Split
from compress.config.deploy import Deploy
from compress.console import open_console, progress
from compress.data.coco import CocoDetection
from compress.detectors.checkpoints import checkpoint_file, load_detector, load_teacher_checkpoint
from compress.export.deployable import TorchRunner
from compress.export.onnx import torch_runner
from compress.manifest import QAD, STUDENT, TEACHER_CHECK, Manifest, RunFolder
from compress.report.document import TEACHER_IN_TORCH
from compress.run.artifacts import Artifact, Checks, exported_settings
from compress.run.gate import TrainedStudent, judge, step_by_step
from deploy import latency, validate
from deploy.core import cuda_driver
from deploy.core.card import network_precision
from deploy.core.environment import environment
from deploy.core.errors import UserError
from deploy.core.files import sha256_of
from deploy.core.on_ray import Cluster
from deploy.core.precisions import PRECISIONS
from deploy.runtimes.base import Runner
from deploy.runtimes.open import open_runner, runner_kind
from deploy.runtimes.providers import ALONE, openings
from deploy.validate.coco import POINT
from deploy.validate.detect import Detect, detect_all, detect_on
from deploy.validate.kept import detections_file, keep_detections

MAP_FIGURES = ("map", "map_small", "map_medium", "map_large", "max_detections", "map_at_max", "mar_at_max", POINT)


@dataclass(frozen=True)
class EvaluationPlan:
    """Plan of what files are measured on, and how.

    settings: the gate, providers, benchmark and runners of the user's own.
    split: labelled images that decide; `checks.images` are their files. val: they, as training's evaluation reads them.
    pictures: identifies their contents; None: they cannot change.
    teacher: a checkpoint whose latency stands beside the student's; None: no teacher is timed.
    categories: id → name, for a teacher that does not say which classes it knows.
    device: where torch runs. cluster: whose actors validate; None: this process does.
    """

    folder: RunFolder
    manifest: Manifest
    settings: Deploy
    checks: Checks
    split: Split
    val: CocoDetection
    pictures: str | None = None
    teacher: str | None = None
    categories: Mapping[int, str] = field(default_factory=dict)
    device: str = "cpu"
    cluster: Cluster | None = None


def evaluate(plan: EvaluationPlan, artifacts: Sequence[Artifact]) -> list[dict[str, Any]]:
    """Validate and measure the files; the rows of `artifacts` in report.json, the teacher's first, those of files that
    are not there or cannot run last."""
    opened = _open(plan, artifacts)
    inputs = {
        "onnx": [sha256_of(file) for name, file in opened.files.items() if name in opened.shipped],
        "data": sha256_of(plan.split.annotations),
        "deploy": exported_settings(plan.settings, plan.checks),
        "trained": {stage: _measured(plan, stage) for stage in (STUDENT, QAD) if stage in plan.folder.stages()},
    }
    if plan.pictures is not None:
        inputs["pictures"] = plan.pictures
    inputs["providers"] = list(plan.settings.providers)
    if plan.settings.runners is not None:
        inputs["runners"] = list(plan.settings.runners)
    gate = {"max_map_drop": plan.settings.max_map_drop}
    found = [detections_file(plan.folder.evaluation, name) for name in opened.runners]
    proofs = plan.manifest.stage(
        "validate", inputs | gate, found, lambda: validate_files(plan, opened.runners, _where(plan, opened))
    )
    timed = {**_teacher(plan), **opened.runners}
    inputs |= {"machine": machine(), "benchmark": plan.settings.benchmark.model_dump(mode="json")}
    if plan.teacher is not None:
        inputs["teacher"] = sha256_of(checkpoint_file(plan.teacher))
    latencies = plan.manifest.stage("benchmark", inputs, [plan.folder.benchmark], lambda: _benchmark(plan, timed))
    rows = [_teacher_row(plan, latencies)] if plan.teacher is not None else []
    for proof in proofs:
        name = proof["name"]
        rows.append({**_row(proof, opened.files[name]), **latencies.get(name, {}), **opened.facts.get(name, {})})
    return [*rows, *opened.idle]


def validate_files(
    plan: EvaluationPlan, runners: Mapping[str, Runner], detect: Detect = detect_all
) -> list[dict[str, Any]]:
    """Measure runners, the student in torch among them by the name of its checkpoint and first, and put each to the
    gate. Returns `ArtifactResult.to_dict` of each."""
    reference = plan.folder.weights().name
    deployed, student = runners[reference], _trained(plan)
    assert isinstance(deployed, TorchRunner), "the reference runs in torch"
    step = step_by_step(student, deployed)
    try:
        with progress("validate") as done:
            results = validate.validate(
                runners,
                plan.split.annotations,
                plan.split.images,
                reference=reference,
                expected=_expected(plan, runners),
                max_map_drop=plan.settings.max_map_drop,
                progress=done,
                keep=lambda name, table: keep_detections(plan.folder.evaluation, name, table),
                detect=detect,
            )
    except UserError as error:
        if step is None:
            raise
        raise UserError(f"{reference}: first step that differs from training: {step}; {error}") from None
    own, others = results[0], results[1:]
    verdict = judge(student, deployed, plan.settings, step, lost=own.gate == "fail")
    if verdict.reason is not None:
        own = replace(_failed(own, verdict.reason), pictures=verdict.pictures)
    if verdict.step is not None:
        others = [
            _failed(result, f"first step that differs: {verdict.step.step}; see {reference}") for result in others
        ]
    return [result.to_dict() for result in (own, *others)]


def machine() -> dict[str, Any]:
    """Describe the machine that a latency belongs to."""
    found = environment()
    return {"cpu": found["cpu"]["model"], "gpus": [gpu.get("name") for gpu in found["gpus"] or []]}


# --- details --------------------------------------------------------------------------------------------


@dataclass
class _Opened:
    """Runners by name, the reference first. files: what each runs. open: what opens it again. shipped: names of the
    files that the run made. facts: more about a file for its row. idle: rows of what cannot run."""

    runners: dict[str, Runner] = field(default_factory=dict)
    files: dict[str, Path] = field(default_factory=dict)
    open: dict[str, Callable[[], Runner]] = field(default_factory=dict)
    shipped: set[str] = field(default_factory=set)
    facts: dict[str, dict[str, Any]] = field(default_factory=dict)
    idle: list[dict[str, Any]] = field(default_factory=list)

    def add(self, name: str, file: Path, open: Callable[[], Runner]) -> None:
        self.runners[name], self.files[name], self.open[name] = open(), file, open


def _open(plan: EvaluationPlan, artifacts: Sequence[Artifact]) -> _Opened:
    student = plan.folder.weights()
    opened = _Opened()
    opened.add(student.name, student, _torch(plan, str(student)))
    for artifact in artifacts:
        name, facts = artifact.path.name, _facts(artifact)
        gate = artifact.gate
        if gate is None and artifact.engine is not None and cuda_driver.gpu() is None:
            gate = "not run: no GPU"
        if gate is not None:
            opened.idle.append({"file": name, "precision": artifact.precision, **facts, "gate": gate})
            continue
        for place, providers in enumerate(_places(artifact, plan.settings.providers)):
            called = name if place == 0 else f"{name} ({providers[0]})"
            try:
                opened.add(called, artifact.path, partial(open_runner, artifact.path, providers))
            except UserError as error:
                if artifact.engine is None and providers[0] not in ALONE:
                    raise
                opened.idle.append(
                    {"file": called, "precision": artifact.precision, **facts, "gate": f"not run: {error}"}
                )
                continue
            opened.shipped.add(called)
            if facts:
                opened.facts[called] = facts
    exported = plan.folder.onnx()
    for path in plan.settings.runners or ():
        name = f"{exported.name} ({path.rpartition(':')[2]})"
        opened.add(name, exported, partial(open_runner, exported, runner=path))
    return opened


def _places(artifact: Artifact, providers: Sequence[str]) -> list[tuple[str, ...]]:
    """The providers that an artifact is opened with, each time it is."""
    if not runner_kind(artifact.path).has_providers:
        return [tuple(providers)]
    able = PRECISIONS[artifact.precision].providers
    return [names for names in openings(providers) if not able or names[0] in able]


def _facts(artifact: Artifact) -> dict[str, Any]:
    """Pick the facts of an engine's card that the report shows."""
    if artifact.engine is None:
        return {}
    card = artifact.engine
    described = card.model_dump(mode="json", exclude={"model", "weights_sha256", "refittable_weights"})
    return {"size_mb": round(card.engine_bytes / 1e6, 2), "engine": described}


def _where(plan: EvaluationPlan, opened: _Opened) -> Detect:
    """What runs the runners over the images."""
    if plan.cluster is None:
        return detect_all
    return detect_on(plan.cluster, partial(_open_all, opened.open))


def _open_all(open: Mapping[str, Callable[[], Runner]]) -> dict[str, Runner]:
    return {name: make() for name, make in open.items()}


def _torch(plan: EvaluationPlan, checkpoint: str) -> Callable[[], Runner]:
    return partial(
        torch_runner,
        checkpoint,
        plan.settings,
        plan.checks.input_size,
        resize_short_long=plan.checks.resize_short_long,
        categories=plan.categories,
        device=plan.device,
    )


def _failed(result: validate.ArtifactResult, reason: str) -> validate.ArtifactResult:
    """The result, failed for one more reason."""
    return replace(result, gate="fail", diagnosis="; ".join(filter(None, (result.diagnosis, reason))))


def _measured(plan: EvaluationPlan, stage: str) -> dict[str, Any]:
    """What training measured: `map`, and the `canvas` that the images lay on (None: recorded by an earlier build,
    which padded each batch as it needed)."""
    found = plan.folder.result(stage)
    return {"map": found["metrics"]["map"], "canvas": found.get("canvas")}


def _expected(plan: EvaluationPlan, runners: Mapping[str, Runner]) -> dict[str, float]:
    """By runner, the mAP that training measured for its weights."""
    on_grids = plan.folder.onnx_on_trained_grids.stem
    trained = {name: _measured(plan, QAD if Path(name).stem == on_grids else STUDENT)["map"] for name in runners}
    return {name: value for name, value in trained.items() if value is not None}


def _trained(plan: EvaluationPlan) -> TrainedStudent:
    found = _measured(plan, STUDENT)
    detector = load_detector(plan.folder.weights())[0].eval().to(plan.device)
    canvas = None if found["canvas"] is None else (found["canvas"][0], found["canvas"][1])
    return TrainedStudent(detector, plan.val, plan.checks.input_size, found["map"], canvas)


def _teacher(plan: EvaluationPlan) -> dict[str, Runner]:
    if plan.teacher is None:
        return {}
    reason = load_teacher_checkpoint(plan.teacher)[0].exportable
    if reason is not None:
        open_console().print(f"benchmark: without the teacher, which cannot be exported: {reason}")
        return {}
    return {TEACHER_IN_TORCH: _torch(plan, plan.teacher)()}


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
    """p50..p99 of one image (scope `h2d+compute+d2h`), the best throughput over the batch sizes, and why not to believe
    them."""
    cells = [cell for cell in report.cells if cell.runner == name and cell.scope == "h2d+compute+d2h"]
    single = min(cells, key=lambda cell: cell.batch_size)
    return {
        "backend": single.backend,
        "latency_ms": {name: round(single.latency_ms[name].value, 3) for name in ("p50", "p90", "p95", "p99")},
        "latency_batch": single.batch_size,
        "throughput_ips": round(max(cell.throughput_ips.value for cell in cells), 1),
        "latency_doubts": latency.doubts(report, cells),
    }


def _teacher_row(plan: EvaluationPlan, latencies: Mapping[str, Any]) -> dict[str, Any]:
    assert plan.teacher is not None
    return {
        "file": TEACHER_IN_TORCH,
        "precision": "fp32",
        "size_mb": round(checkpoint_file(plan.teacher).stat().st_size / 1e6, 2),
        "map": plan.folder.result(TEACHER_CHECK)["metrics"]["map"],
        "gate": "not run: the teacher does not ship",
        **latencies.get(TEACHER_IN_TORCH, {}),
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
        "training_drop": proof["training_drop"],
        "agreement": agreement["share"] if agreement else None,
        "gate": proof["gate"],
        "reason": proof["diagnosis"],
        "differs_most": proof["pictures"],
        **{key: proof[key] for key in ("half", "note", "analysis") if proof.get(key) is not None},
    }
