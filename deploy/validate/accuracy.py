"""Does an exported file still detect what the checkpoint detected? COCO mAP, agreement and a gate.

`validate(runners, annotations, images, reference=…)` runs every runner over the same images in one pass.
Detections are compared in pixels of the original image.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from deploy.core.card import HalfPrecision, ModelCard, card_from_file
from deploy.core.detection_table import DetectionTable
from deploy.core.errors import UserError
from deploy.core.files import write_json
from deploy.core.image import load_image, read_image_bytes
from deploy.core.progress import Progress
from deploy.runtimes.base import Runner
from deploy.runtimes.open import readable_file
from deploy.runtimes.pictures import fit_pictures
from deploy.validate.agreement import Agreement, agreement_of
from deploy.validate.analysis import CONFUSED_SCORE, Analysis, analyse, image_slices
from deploy.validate.coco import CocoMetrics, evaluate_coco, load_annotations, sizes_of
from deploy.validate.detect import Detect, Outcome, detect_all
from deploy.validate.differences import most_different
from deploy.validate.ground_truth import GroundTruth
from deploy.validate.operating_point import score_curves
from deploy.validate.score_calibration import detection_ece

DIAGNOSED_IMAGES = 2
NO_REFERENCE = "not run: no reference"


@dataclass(frozen=True)
class ArtifactResult:
    """One runner's outcome. `map_drop` and `agreement` are against the reference, None without one; `training_drop` is
    against what training measured, None where that is not known."""

    name: str
    backend: str
    precision: dict[str, str]
    metrics: CocoMetrics
    """With the operating point of this file on these images."""
    d_ece: float
    """Detection expected calibration error in 0..1 (`score_calibration`); NaN without confident detections."""
    map_drop: float | None
    """mAP of the reference minus this one's, in points."""
    agreement: Agreement | None
    gate: str
    """`pass`, `fail` or `not run: why`."""
    images: int
    seconds: float
    """Time spent in the runner, all images."""
    diagnosis: str | None = None
    """Why a file fails and where it starts to compute something else, or why that was not found; None when the gate
    passes."""
    training_drop: float | None = None
    """mAP that training measured for these weights, minus this one's, in points."""
    pictures: list[dict[str, int | str | float]] = field(default_factory=list)
    """Of a file that fails: those on which it differs most from the reference, as `most_different` gives them."""
    half: HalfPrecision | None = None
    """What the file's card says about its float16."""
    note: str | None = None
    """What this machine cannot see of the file; None: nothing."""
    analysis: Analysis | None = None
    """Errors by kind, mAP on slices of the images, confused classes, and precision and recall by score."""

    def to_dict(self) -> dict[str, Any]:
        """Fields as JSON types: NaN becomes None."""
        agreement = None if self.agreement is None else _without_nan(asdict(self.agreement))
        half = None if self.half is None else self.half.model_dump(mode="json")
        analysis = None if self.analysis is None else self.analysis.to_dict()
        rest = {"metrics": self.metrics.to_dict(), "agreement": agreement, "half": half, "analysis": analysis}
        return {**_without_nan(asdict(self)), **rest}


def validate(
    runners: Mapping[str, Runner],
    annotations: Path,
    images: Path,
    *,
    reference: str | None = None,
    expected: Mapping[str, float] | None = None,
    max_map_drop: float = 0.5,
    batch_size: int = 8,
    limit: int | None = None,
    progress: Progress | None = None,
    keep: Callable[[str, DetectionTable], None] = lambda name, table: None,
    detect: Detect = detect_all,
) -> list[ArtifactResult]:
    """Run `runners` over all images of `annotations` (a COCO file; the files lie in `images`) and compare.

    reference: the name of the runner that the others are measured against. Its own gate passes, unless it is expected
        to reach something itself.
    expected: by name of a runner, the mAP that training measured for its weights on these images.
    max_map_drop: largest allowed loss of mAP in points. limit: only the first images (by id), ground truth
    likewise. progress(done, total) is called after every batch of images. keep(name, detections) is called with all
    that a runner found. detect: runs them, here or elsewhere (`deploy.validate.detect`).

    Raises UserError for unreadable data, a reference that is not among the runners, a card whose categories
    are not those of the annotations, a file that was calibrated on one of the images, or a runner whose outputs cannot
    be what they are called. Detections that are not finite count as none, and the runner that gives one fails the gate.
    """
    content = load_annotations(annotations)
    if reference is not None and reference not in runners:
        raise UserError(f"reference '{reference}' is not among the artifacts: {', '.join(runners)}")
    if not content["annotations"]:
        raise UserError(f"{annotations}: no boxes to validate against")
    for name, runner in runners.items():
        _check_categories(name, runner.card, content, str(annotations))
    rows = sorted(content["images"], key=lambda row: row["id"])[:limit]
    _check_calibration(runners, [Path(images) / row["file_name"] for row in rows])
    truth = GroundTruth.of({**content, "images": rows})

    files = {row["id"]: Path(images) / row["file_name"] for row in rows}
    outcomes = detect(runners, files, batch_size, progress, sizes=sizes_of(rows))
    slices = image_slices(truth, rows)
    measured = {}
    for name, runner in runners.items():
        table = outcomes[name].detections.table()
        keep(name, table)
        metrics = evaluate_coco(truth, table, max_detections=runner.card.max_detections)
        scored = score_curves(truth, table, runner.card.category_ids)
        point = scored.point()
        looked_at = analyse(truth, table, slices, CONFUSED_SCORE if point is None else point.score)
        measured[name] = _Measured(
            replace(metrics, operating_point=point),
            detection_ece(truth, table),
            replace(looked_at, curve=scored.of_all.samples()),
        )
    bars = _Bars(reference, expected or {}, max_map_drop)
    return _compared(runners, files, outcomes, measured, bars)


def results_table(results: list[ArtifactResult]) -> Table:
    """The results for a terminal, a row an artifact."""
    table = Table(title=f"COCO mAP on {results[0].images} images" if results else None)
    table.add_column("artifact")
    table.add_column("backend")
    limits = sorted({row.metrics.max_detections for row in results if row.metrics.max_detections is not None})
    more = [f"mAP at {limit}" for limit in limits]
    for heading in ("mAP", "AP50", "AP75", *more, "drop", "agreement", "D-ECE", "gate"):
        table.add_column(heading, justify="right")
    style = {"pass": "green", "fail": "red"}
    for row in results:
        table.add_row(
            row.name,
            row.backend,
            *(f"{value:.2f}" for value in (row.metrics.map, row.metrics.map50, row.metrics.map75)),
            *(_map_at(row.metrics, limit) for limit in limits),
            "-" if row.map_drop is None else f"{row.map_drop:+.2f}",
            "-" if row.agreement is None or not row.agreement.detections else f"{row.agreement.share:.1%}",
            "-" if math.isnan(row.d_ece) else f"{row.d_ece:.3f}",
            f"[{style.get(row.gate, 'yellow')}]{row.gate}[/]",
        )
    notes = [f"{row.name}: {row.note}" for row in results if row.note is not None]
    table.caption, table.caption_justify = Text("\n".join(notes)) if notes else None, "left"
    return table


def write_results(path: Path, results: list[ArtifactResult]) -> None:
    """All results as one JSON list."""
    write_json(path, [row.to_dict() for row in results])


# ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Bars:
    """What `validate` measures its runners against."""

    reference: str | None
    expected: Mapping[str, float]
    max_map_drop: float


@dataclass(frozen=True)
class _Measured:
    """What the detections of a runner are worth."""

    metrics: CocoMetrics
    d_ece: float
    analysis: Analysis


def _compared(
    runners: Mapping[str, Runner],
    files: Mapping[int, Path],
    outcomes: Mapping[str, Outcome],
    measured: Mapping[str, _Measured],
    bars: _Bars,
) -> list[ArtifactResult]:
    """The results of `validate` with their gates, and for those that fail the reasons."""
    reference = bars.reference
    base = None if reference is None else outcomes[reference]
    results: list[ArtifactResult] = []
    sound: list[str] = []  # what loses no more than allowed against the reference
    for name, runner in runners.items():
        outcome = outcomes[name]
        metrics = measured[name].metrics
        drop = None if reference is None else measured[reference].metrics.map - metrics.map
        gate = "fail" if outcome.spoiled else _gate(drop, bars.max_map_drop, bool(base and base.spoiled))
        if gate == "pass":
            sound.append(name)
        trained = bars.expected.get(name)
        training_drop = None if trained is None else trained - metrics.map
        against_training = "not run" if training_drop is None else _gate(training_drop, bars.max_map_drop)
        if against_training == "fail" or (gate == NO_REFERENCE and training_drop is not None):
            gate = against_training
        results.append(
            ArtifactResult(
                name=name,
                backend=runner.backend,
                precision=dict(runner.card.precision),
                metrics=metrics,
                d_ece=measured[name].d_ece,
                map_drop=drop,
                agreement=None if base is None else agreement_of(base.detections, outcome.detections),
                gate=gate,
                images=len(files),
                seconds=outcome.seconds,
                training_drop=training_drop,
                half=runner.card.half,
                note=_unseen(runner),
                analysis=measured[name].analysis,
            )
        )
    trusted = _graph_to_trust(runners, sound, reference)
    for index, row in enumerate(results):
        if row.gate != "fail":
            continue
        outcome, why = outcomes[row.name], _against_training(row)
        if row.name not in sound:
            why = "; ".join(filter(None, (_diagnosis(runners[row.name], trusted, files, outcome.spoiled), why)))
        pictures = [] if base is None else most_different(base.detections, outcome.detections, files)
        results[index] = replace(row, diagnosis=why, pictures=pictures)
    return results


def _unseen(runner: Runner) -> str | None:
    """What a CPU hides of a file with float16 in it."""
    if not any("fp16" in kinds.split("+") for kinds in runner.card.precision.values()) or not runner.on_cpu:
        return None
    half = runner.card.half
    known = "they were not measured when this file was made: export it again"
    if half is not None:
        known = f"they were measured at export, on {half.images} images: {half.in_words()}"
    return (
        "float16 runs in float32 here, as CPU runtimes do it, so numbers that a GPU would overflow or round are not "
        f"seen; {known}"
    )


def _check_categories(name: str, card: ModelCard, content: Mapping[str, Any], where: str) -> None:
    names = {category["id"]: category["name"] for category in content["categories"]}
    for category, class_name in zip(card.category_ids, card.class_names, strict=True):
        if category not in names:
            raise UserError(f"{name}: its class '{class_name}' is category {category}, which {where} does not have")
        if names[category] != class_name:
            raise UserError(
                f"{name}: category {category} is '{class_name}' to the model, '{names[category]}' in {where}"
            )


def _check_calibration(runners: Mapping[str, Runner], files: list[Path]) -> None:
    """An int8 file must not be judged on the images that its ranges come from."""
    calibrated = {
        digest: name
        for name, runner in runners.items()
        if runner.card.quantization is not None
        for digest in runner.card.quantization.image_hashes
    }
    for file in files if calibrated else []:
        name = calibrated.get(hashlib.sha256(read_image_bytes(file)).hexdigest()[:16])
        if name is not None:
            raise UserError(
                f"{name}: was calibrated on {file}, which is one of the validation images: "
                "export it again with training or unlabelled images (--calibration)"
            )


def _graph_to_trust(runners: Mapping[str, Runner], sound: Collection[str], reference: str | None) -> Path | None:
    """The ONNX file that failing ones are compared with: the reference, or else a float file that agrees with it."""
    for name in sorted(sound, key=lambda name: name != reference):
        path = readable_file(runners[name])
        if path is not None and runners[name].card.quantization is None:
            return path
    return None


def _against_training(row: ArtifactResult) -> str | None:
    if row.training_drop is None:
        return None
    trained = row.metrics.map + row.training_drop
    return f"{row.metrics.map:.2f} mAP, and training measured {trained:.2f} for these weights"


def _diagnosis(runner: Runner, trusted: Path | None, files: Mapping[int, Path], spoiled: Sequence[int]) -> str:
    """Why a file fails, and where it starts to compute something else, on the images that show it."""
    images = spoiled or list(files)
    where = _first_divergence(runner, trusted, [files[image_id] for image_id in images[:DIAGNOSED_IMAGES]])
    if not spoiled:
        return where
    return (
        f"{len(spoiled)} of {len(files)} images have values that are not finite, from image {spoiled[0]} on; "
        f"such detections count as none; {where}"
    )


def _first_divergence(runner: Runner, trusted: Path | None, images: list[Path]) -> str:
    file = readable_file(runner)
    if file is None:
        return "not run: only ONNX files in ONNX Runtime can be compared value by value"
    if trusted is None:
        return "not run: no float ONNX file of the same network passed; add one, as the reference or an artifact"
    try:
        from deploy.graph.diagnose import first_divergence
    except ModuleNotFoundError as error:
        return f"not run: pip install {error.name}, which reads the values inside ONNX files"
    here, there = runner.card.input_size, card_from_file(trusted).input_size
    if here != there:
        return f"canvas: {here[0]}x{here[1]} (height x width), that of {trusted.name} is {there[0]}x{there[1]}"
    canvases = fit_pictures([load_image(image) for image in images], runner.card).images
    try:
        return str(first_divergence(trusted, file, canvases))
    except UserError as error:
        return f"not found: {error}"


def _map_at(metrics: CocoMetrics, limit: int) -> str:
    return f"{metrics.map_at_max:.2f}" if metrics.max_detections == limit else "-"


def _gate(drop: float | None, max_map_drop: float, reference_spoiled: bool = False) -> str:
    if drop is None:
        return NO_REFERENCE
    if reference_spoiled:
        return "not run: the reference gives values that are not finite"
    if math.isnan(drop):
        return "not run: no ground truth"
    return "pass" if drop <= max_map_drop + 1e-9 else "fail"


def _without_nan(values: dict[str, Any]) -> dict[str, Any]:
    return {key: None if isinstance(value, float) and math.isnan(value) else value for key, value in values.items()}
