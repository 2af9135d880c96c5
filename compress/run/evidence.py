"""What a run can show for itself: the exported file, its mAP and latency, pictures, and the report.

Everything here runs in one process, after training, on the files that training left.
"""

from __future__ import annotations

import datetime
import json
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from compress.config.recipe import Recipe
from compress.console import open_console, progress
from compress.data.coco import CocoDetection
from compress.data.transforms import eval_transform
from compress.detectors.base import Capability, Detector
from compress.detectors.build import model_size
from compress.detectors.checkpoints import checkpoint_file, load_detector, load_teacher_checkpoint
from compress.manifest import Manifest
from compress.report import build_report, summary_table
from compress.run import qad
from compress.run.data import canvas, labelled_split, splits
from compress.run.export import (
    SOURCES,
    BudgetError,
    Quantizing,
    calibration_of,
    deciding_split,
    export_checkpoint,
    file_for,
    quantize_export,
    torch_runner,
)
from compress.run.pseudo_labels import FIRST_STAGE, labelling_stages
from compress.run.samples import detection_pictures, uncertainty_pictures
from compress.versions import versions
from deploy import latency, validate
from deploy.core.card import network_precision
from deploy.core.environment import environment
from deploy.core.files import sha256_of, write_json
from deploy.runtimes.base import Runner
from deploy.runtimes.onnx import OnnxRunner
from deploy.validate.coco import load_annotations

TEACHER = "teacher (torch)"


def gather_evidence(recipe: Recipe, run_dir: Path) -> Path:
    """Export, validate, measure and report. Returns the path of report.html.

    Raises UserError for files that cannot be used and `ExportMismatchError` for a graph that computes something else
    than torch. A failed accuracy gate is recorded in report.json.
    """
    console = open_console()
    manifest = Manifest(run_dir, versions())
    _, split = splits(recipe.data, recipe.runs)
    val = CocoDetection(split.annotations, split.images, eval_transform(recipe.data.eval_short, recipe.data.long))
    input_size = recipe.deploy.input_size or canvas(val, recipe)
    files = [val.path(index) for index in range(len(val))]
    student = run_dir / "student.safetensors"
    onnx_file = run_dir / "student.onnx"
    limits = (recipe.data.eval_short, recipe.data.long)
    settings = recipe.deploy.model_dump(mode="json", exclude={"precisions", "int8"})
    settings |= {"input_size": list(input_size), "limits": list(limits)}
    inputs: dict[str, Any] = {"checkpoint": sha256_of(student), "deploy": settings}
    written = [onnx_file]
    missed: dict[str, str] = {}  # file → why there is none
    with tempfile.TemporaryDirectory() as scratch:
        half_file = file_for(
            onnx_file if "fp16" in recipe.deploy.precisions else Path(scratch) / onnx_file.name, "fp16"
        )
        halves = {"fp16", "mixed"} & set(recipe.deploy.precisions)
        for file, half in [(onnx_file, False)] + [(half_file, True)] * bool(halves):

            def export(file: Path = file, half: bool = half) -> dict[str, Any]:
                report = export_checkpoint(
                    student, file, recipe.deploy, input_size=input_size, images=files, limits=limits, half=half
                )
                return {key: value for key, value in asdict(report).items() if key != "path"}

            kept = file.parent == run_dir
            exported = manifest.stage("export fp16" if half else "export", inputs, [file], export) if kept else export()
            written += [file] if half and kept else []
            console.print(
                f"export: {file.name}, {exported['size_bytes'] / 1e6:.1f} MB; largest difference from torch: score "
                f"{exported['max_score_difference']:.1e}, box {exported['max_box_difference_px']:.1e} px",
            )
        for precision in recipe.deploy.precisions:
            if SOURCES[precision] == precision:
                continue
            source = half_file if SOURCES[precision] == "fp16" else onnx_file
            file = file_for(onnx_file, precision)
            found = _quantize(recipe, run_dir, manifest, source, file, inputs)
            if found["missed"] is None:
                written.append(file)
            else:
                missed[file.name] = found["missed"]
            console.print(f"export: {found['missed'] or found['summary']}")
    if recipe.deploy.int8.qad is not None:
        file = run_dir / f"{qad.NAME}.onnx"
        console.print(f"export: {_export_trained(recipe, run_dir, manifest, file, inputs, limits)}")
        written.append(file)

    device = _device(recipe)
    runners: dict[str, Runner] = {
        student.name: torch_runner(str(student), recipe.deploy, input_size, limits=limits, device=device),
        **{file.name: OnnxRunner(file, recipe.deploy.providers) for file in written},
    }
    inputs = {"onnx": [sha256_of(file) for file in written], "data": sha256_of(split.annotations), "deploy": settings}

    def prove() -> list[dict[str, Any]]:
        with progress("validate") as step:
            results = validate.validate(
                runners, split.annotations, split.images, reference=student.name,
                max_map_drop=recipe.deploy.max_map_drop, progress=step,
            )  # fmt: skip
        for result in results:
            if result.diagnosis is not None:
                console.print(f"{result.name}: {result.diagnosis}")
        return [result.to_dict() for result in results]

    proofs = manifest.stage("validate", inputs, [], prove)

    teacher = _teacher(recipe, run_dir, val)
    dense = teacher is not None and Capability.DENSE in load_teacher_checkpoint(teacher)[0].capabilities
    timed = dict(runners)
    if teacher is not None and not dense:
        console.print("benchmark: without the teacher: a detector in two stages has no form that could be exported")
    elif teacher is not None:
        categories = dict(zip(val.category_ids, val.categories, strict=True))
        timed = {
            TEACHER: torch_runner(
                teacher, recipe.deploy, input_size, limits=limits, categories=categories, device=device
            ),
            **timed,
        }
    measured_file = run_dir / "benchmark.json"

    def measure() -> dict[str, Any]:
        bench = recipe.deploy.benchmark
        with progress("benchmark") as step:
            report = latency.benchmark(
                timed, files, batch_sizes=bench.batch_sizes, seconds=bench.seconds,
                warm_up_seconds=2 * bench.seconds, progress=step,
            )  # fmt: skip
        latency.write_report(measured_file, report)
        return {name: _latency(report, name) for name in timed}

    latencies = manifest.stage("benchmark", {**inputs, "machine": _machine()}, [measured_file], measure)

    report = _report(recipe, run_dir, val, input_size, proofs, latencies, teacher)
    report["artifacts"] += [{"file": name, "precision": "int8", "gate": "fail"} for name in missed]
    write_json(run_dir / "report.json", report)
    page = build_report(run_dir)
    console.print(summary_table(report))
    return page


def _quantize(
    recipe: Recipe, run_dir: Path, manifest: Manifest, source: Path, out: Path, inputs: dict[str, Any]
) -> dict[str, Any]:
    """A quantized file, and one line about it; `missed` says why there is none when the search found no choice."""
    settings = recipe.deploy.int8

    def work() -> dict[str, Any]:
        images = calibration_of(recipe, settings)
        chosen = None
        if settings.guided:
            chosen = deciding_split(labelled_split(recipe), images, settings.deciding_images, run_dir / "deciding.json")
        how = Quantizing(settings, images, chosen, recipe.deploy.max_map_drop)
        with progress("quantize") as step:
            report, _ = quantize_export(source, out, how, max_batch=recipe.deploy.max_batch, progress=step)
        return {
            "missed": None,
            "summary": f"{out.name}, {report.size_bytes / 1e6:.1f} MB, for {report.target}; {report.layers} layers in "
            f"int8, {len(report.float_layers)} in float",
        }

    shaped_by = {
        **inputs,
        "int8": settings.model_dump(mode="json", exclude={"qad"}),
        "guided": recipe.deploy.max_map_drop,
    }
    if settings.calibration is not None:
        shaped_by["calibration"] = calibration_of(recipe, settings).sha256
    precision = out.suffixes[-2].lstrip(".")
    try:
        result: dict[str, Any] = manifest.stage(f"export {precision}", shaped_by, [out], work)
    except BudgetError as error:
        out.unlink(missing_ok=True)  # of an earlier run
        return {"missed": str(error), "summary": None}
    return result


def _export_trained(
    recipe: Recipe, run_dir: Path, manifest: Manifest, out: Path, inputs: dict[str, Any], limits: tuple[int, int]
) -> str:
    """The int8 file of quantization-aware distillation, and one line about it."""
    checkpoint = run_dir / f"{qad.NAME}.safetensors"
    height, width = inputs["deploy"]["input_size"]

    def work() -> str:
        images = calibration_of(recipe, recipe.deploy.int8)
        report = qad.export_quantized(checkpoint, out, recipe, images, input_size=(height, width), limits=limits)
        return (
            f"{out.name}, {report.size_bytes / 1e6:.1f} MB, for {report.target}; {report.layers} layers in int8 on "
            f"trained grids, {len(report.float_layers)} in float"
        )

    trained = {"checkpoint": sha256_of(checkpoint), "grids": sha256_of(checkpoint.with_suffix(".json"))}
    shaped_by = {**inputs, **trained, "int8": recipe.deploy.int8.model_dump(mode="json")}
    summary: str = manifest.stage("export qad", shaped_by, [out], work)
    return summary


def _device(recipe: Recipe) -> str:
    """Where torch runs after training."""
    return "cuda" if recipe.train.accelerator != "cpu" and torch.cuda.is_available() else "cpu"


def _machine() -> dict[str, Any]:
    """What a latency belongs to."""
    found = environment()
    return {"cpu": found["cpu"]["model"], "gpus": [gpu.get("name") for gpu in found["gpus"] or []]}


def _teacher(recipe: Recipe, run_dir: Path, val: CocoDetection) -> str | None:
    """The checkpoint of the teacher that the student learned from; None for one of another library or of other classes,
    which is measured before the training and then neither timed nor drawn."""
    if recipe.teacher is None or not recipe.methods.enabled():
        return None
    if recipe.teacher.train is not None:
        return str(run_dir / "teacher.safetensors")
    if recipe.teacher.checkpoint is None:
        return None
    record = load_teacher_checkpoint(recipe.teacher.checkpoint)[1]
    same = record.num_classes == len(val.categories) and record.class_names in (None, val.categories)
    return recipe.teacher.checkpoint if same else None


def _report(
    recipe: Recipe,
    run_dir: Path,
    val: CocoDetection,
    input_size: tuple[int, int],
    proofs: list[dict[str, Any]],
    latencies: dict[str, Any],
    teacher: str | None,
) -> dict[str, Any]:
    stages = json.loads((run_dir / "manifest.json").read_text(encoding="utf-8"))["stages"]
    detectors: dict[str, Detector] = {}
    if teacher is not None:
        detectors["teacher"] = load_teacher_checkpoint(teacher)[0]
    for arm in ("baseline", "student"):
        if (run_dir / f"{arm}.safetensors").is_file() and arm in stages:
            detectors[arm] = load_detector(run_dir / f"{arm}.safetensors")[0]
    models = {}
    if teacher is None and recipe.teacher is not None and recipe.methods.enabled() and "teacher_check" in stages:
        models["teacher"] = dict(stages["teacher_check"]["result"]["metrics"])
    for name, detector in detectors.items():
        stage = stages["teacher_check" if name == "teacher" else name]
        models[name] = {**stage["result"]["metrics"], **model_size(detector, input_size)}
        if "seconds" in stage["result"]:
            models[name]["train_seconds"] = stage["result"]["seconds"]

    if FIRST_STAGE in stages and "student" in models:
        models["student"]["train_seconds"] += stages[FIRST_STAGE]["result"]["seconds"]
    artifacts = []
    if teacher is not None:
        artifacts.append(
            {
                "file": TEACHER,
                "precision": "fp32",
                "size_mb": round(checkpoint_file(teacher).stat().st_size / 1e6, 2),
                "map": models["teacher"]["map"],
                "gate": "not run: the teacher does not ship",
                **latencies.get(TEACHER, {}),
            }
        )
    for proof in proofs:
        agreement = proof["agreement"]
        artifacts.append(
            {
                "file": proof["name"],
                "backend": proof["backend"],
                "precision": network_precision(proof["precision"]),
                "size_mb": round((run_dir / proof["name"]).stat().st_size / 1e6, 2),
                "map": proof["metrics"]["map"],
                "map_drop": proof["map_drop"],
                "agreement": agreement["share"] if agreement else None,
                "gate": proof["gate"],
                **latencies.get(proof["name"], {}),
            }
        )
    pictures = detection_pictures(val, detectors)
    uncertainty = []
    if teacher is not None and Capability.DENSE in detectors["teacher"].capabilities:
        with progress("uncertainty") as step:
            uncertainty = uncertainty_pictures(val, detectors["teacher"].to(_device(recipe)), progress=step)
    return {
        "name": recipe.name,
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "classes": list(val.categories),
        "models": models,
        "artifacts": artifacts,
        "pseudo_labels": _pseudo_labels(recipe, stages),
        "environment": environment(),
        "commands": _commands(recipe, run_dir),
        "pictures": pictures,
        "uncertainty": uncertainty,
    }


def _pseudo_labels(recipe: Recipe, stages: dict[str, Any]) -> dict[str, Any] | None:
    """What the teachers labelled; None where they did not."""
    settings = recipe.pseudo_labels
    if settings is None:
        return None
    rows = [stages[name]["result"] for name in labelling_stages(recipe, stages)]
    first = stages.get(FIRST_STAGE) if settings.fine_tune is not None else None
    return {
        **{key: sum(row[key] for row in rows) for key in ("images", "labels", "regions", "skipped")},
        "labelled_images": len(load_annotations(labelled_split(recipe).annotations)["images"])
        if recipe.labels is None or recipe.labels.fraction > 0
        else 0,
        "teachers": rows[0]["teachers"] if rows else [],
        "first_stage_map": None if first is None else first["result"]["metrics"]["map"],
    }


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


def _commands(recipe: Recipe, run_dir: Path) -> list[str]:
    _, split = splits(recipe.data, recipe.runs, write=False)
    recipe_file, onnx_file = run_dir / "recipe.yaml", run_dir / "student.onnx"
    return [
        f"compress run {recipe_file}",
        f"compress export {run_dir / 'student.safetensors'}",
        f"compress validate {onnx_file} --data {split.annotations} --images {split.images}",
        f"compress benchmark {onnx_file} --images {split.images} --batch 1,8",
        f"compress report {run_dir}",
    ]
