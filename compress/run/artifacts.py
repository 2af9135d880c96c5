"""One maker of files: a plan in, an artifact after the other out.

    plan = ArtifactPlan(checkpoint, onnx_files(out, ["fp32", "int8"]), settings, checks, quantizing)
    for artifact in make(plan):
        print(artifact.path, artifact.summary)

Exports are compared with torch, quantized files with the float ones, engines with what they are called, each before it
gets its name. `compress run` and `compress export` are two fronts of this; with a manifest every file is a stage of the
run, made once. What could not be made is an artifact too, with the reason.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from compress.config.data import Split
from compress.config.deploy import Deploy
from compress.console import progress
from compress.export.onnx import MEASURED, export_checkpoint
from compress.manifest import STUDENT_ON_INT8_GRIDS, Manifest, RunFolder
from compress.run import engines
from compress.run.engines import EnginePlan
from compress.run.quantize import BudgetError, Quantizing, quantize_file, split_files
from compress.training.qad.export import grids_file, quantize_trained
from deploy.core.errors import UserError
from deploy.core.files import ENGINE_SUFFIX, ONNX_SUFFIX, sha256_of
from deploy.core.image_folder import spread
from deploy.core.precisions import PRECISIONS, TENSORRT, Target, file_for, sources
from deploy.core.storage import is_file
from deploy.graph.precision import compute_in
from deploy.quantize.calibrate import CalibrationImages, choose_images
from deploy.quantize.file import QuantizeReport
from deploy.quantize.guided import GuidedResult
from deploy.tensorrt.card import EngineCard, card_path, read_engine_card, this_machine
from deploy.tensorrt.network import library, load_tensorrt

NOT_THE_FILE = {"precisions", "int8", "engines", "runners"}
"""Settings of `deploy` that an exported float file does not depend on."""
MEASURING = ("providers", "max_map_drop", "benchmark")
"""Others, which version 0.1 nevertheless wrote into its record: at their defaults they are described as it did."""


@dataclass(frozen=True)
class OnnxFile:
    """A file to make. target: the format of a quantized one. engine: what to build of it; None: nothing."""

    path: Path
    precision: str
    target: Target | None = None
    engine: Path | None = None
    stage: str = ""
    """Its row in a manifest."""


@dataclass(frozen=True)
class Checks:
    """Images on which an exported file is compared with torch.

    images: files; the first 16 are used.
    input_size: (height, width) of the canvas in pixels.
    resize_short_long: (short, long) in pixels that an image is not enlarged beyond; None: as the checkpoint says.
    train: training images, on which the numbers of half precision are measured; None: on `images`.
    identity: of the contents of the images that are used, for a manifest; None: they cannot change.
    """

    images: Sequence[Path]
    input_size: tuple[int, int]
    resize_short_long: tuple[int, int] | None = None
    train: Split | None = None
    identity: str | None = None

    @cached_property
    def measured(self) -> tuple[CalibrationImages, str]:
        """Images to measure half precision on, spread evenly, and what they are in words. Training images that are
        not on this machine are not looked for: the file says which ones it was measured on."""
        if self.train is not None and is_file(self.train.annotations):
            files = split_files(self.train.annotations, self.train.images)
            if all(is_file(file, ask=False) for file in spread(files, MEASURED)):
                return choose_images(files, MEASURED), "training images"
        return choose_images(self.images, MEASURED), "of the images that it was compared on"


@dataclass(frozen=True)
class ArtifactPlan:
    """Plan of the files to make of a checkpoint.

    settings: thresholds and limits.
    quantizing: for the quantized files among `files`.
    on_grids: int8 files get the scales that quantization-aware distillation left beside the checkpoint.
    given: float files that are there already, by precision.
    manifest: records each file as a stage of a run; None: everything is made.
    """

    checkpoint: Path
    files: Sequence[OnnxFile]
    settings: Deploy
    checks: Checks | None = None
    quantizing: Quantizing | None = None
    on_grids: bool = False
    engines: EnginePlan | None = None
    given: Mapping[str, Path] = field(default_factory=dict)
    manifest: Manifest | None = None


@dataclass(frozen=True)
class Artifact:
    """A file that was made, or why there is none.

    summary: one line about it.
    gate: None; for a file that could not be made `fail`, or `not run: why`.
    search: for float layers, where there was one.
    engine: the card of an engine.
    """

    path: Path
    precision: str
    summary: str
    gate: str | None = None
    search: GuidedResult | None = None
    engine: EngineCard | None = None

    @property
    def made(self) -> bool:
        return self.gate is None

    def __str__(self) -> str:
        name = self.path.name
        return self.summary if self.summary.startswith(f"{name}:") else f"{name}, {self.summary}"


def onnx_files(
    out: Path, precisions: Sequence[str], target: Target | None = None, engines: Collection[str] = ()
) -> list[OnnxFile]:
    """The files of these precisions beside `out`, which names the first.

    Args:
        target: the format of quantized files, where a precision leaves the choice; None: its usual one.
        engines: precisions to build engines of. TensorRT takes one format alone, so a quantized file in another one
            gets a second beside it: `student.int8.onnx` and `student.int8.tensorrt.onnx`.
    """
    files = []
    for name in precisions:
        kind, path = PRECISIONS[name], file_for(out, name)
        format_ = None if not kind.quantized else target if target in kind.targets else kind.targets[0]
        stage = "export" if name == "fp32" else f"export {name}"
        engine = path.with_suffix(ENGINE_SUFFIX) if name in engines and kind.computed is None else None
        fits = format_ in (None, TENSORRT)
        files.append(OnnxFile(path, name, format_, engine if fits else None, stage))
        if engine is not None and not fits:
            path = file_for(out, name, TENSORRT)
            files.append(OnnxFile(path, name, TENSORRT, engine, f"{stage} {TENSORRT}"))
    return files


def plans_of_a_run(
    folder: RunFolder, settings: Deploy, checks: Checks, quantizing: Quantizing, manifest: Manifest
) -> list[ArtifactPlan]:
    """Plan what a run makes: the student's files; and, where it was trained on the grids of an int8 file, that one."""
    engines = None
    built: tuple[str, ...] = ()
    if settings.engines is not None:
        engines = EnginePlan(settings.engines.engine_options())
        built = settings.engines.precisions or settings.precisions
    target = settings.int8.target
    plan = ArtifactPlan(
        checkpoint=folder.weights(),
        files=onnx_files(folder.onnx(), settings.precisions, target, built),
        settings=settings,
        checks=checks,
        quantizing=quantizing,
        engines=engines,
        manifest=manifest,
    )
    if settings.int8.qad is None:
        return [plan]
    out = folder.onnx_on_trained_grids
    engine = out.with_suffix(ENGINE_SUFFIX) if target == TENSORRT and "int8" in built else None
    file = OnnxFile(out, "int8", target, engine, "export qad")
    trained = replace(plan, checkpoint=folder.weights(STUDENT_ON_INT8_GRIDS), files=[file], on_grids=True)
    return [plan, trained]


def make(plan: ArtifactPlan) -> Iterator[Artifact]:
    """Make the files of a plan: float ones, quantized ones, engines.

    Raises UserError for a checkpoint, images or files that cannot be used, `ExportMismatchError` for a graph that
    computes something else than torch.
    """
    with tempfile.TemporaryDirectory() as scratch:
        floats = _FloatFiles(plan, Path(scratch))
        made: list[OnnxFile] = []
        for precision in sources(file.precision for file in plan.files):
            for file in plan.files:
                if file.precision == precision:
                    yield _exported(plan, file)
                    floats.made[precision] = file.path
                    made.append(file)
        for file in plan.files:
            if PRECISIONS[file.precision].quantized:
                artifact = _quantized(plan, file, floats)
                made += [file] if artifact.made else []
                yield artifact
            elif PRECISIONS[file.precision].computed is not None:
                yield _computed(plan, file, floats)
    for file in made:
        if file.engine is not None and plan.engines is not None:
            yield _built(plan, plan.engines, file, file.engine)


# --- details --------------------------------------------------------------------------------------------


class _FloatFiles:
    """The float files that quantized ones are made from; one that was not asked for is made when it is needed."""

    def __init__(self, plan: ArtifactPlan, scratch: Path) -> None:
        self.made = dict(plan.given)
        self._plan, self._scratch = plan, scratch

    def __getitem__(self, precision: str) -> Path:
        if precision not in self.made:
            path = self._scratch / file_for(Path(self._plan.checkpoint.name).with_suffix(ONNX_SUFFIX), precision)
            _export(self._plan, path, precision)
            self.made[precision] = path
        return self.made[precision]


def _export(plan: ArtifactPlan, path: Path, precision: str) -> dict[str, Any]:
    assert plan.checks is not None, "an export is checked"
    measured, words = plan.checks.measured if PRECISIONS[precision].half else (None, "")
    report = export_checkpoint(
        plan.checkpoint,
        path,
        plan.settings,
        input_size=plan.checks.input_size,
        images=plan.checks.images,
        resize_short_long=plan.checks.resize_short_long,
        precision=precision,
        measured=None if measured is None else measured.files,
    )
    found = {key: value for key, value in asdict(report).items() if key not in ("path", "half")}
    if report.half is not None:
        found["half"] = f"; float16 measured on {report.half.images} {words}: {report.half.in_words()}"
    return found


def _exported(plan: ArtifactPlan, file: OnnxFile) -> Artifact:
    found = _stage(
        plan,
        file.stage,
        lambda: {**_inputs(plan), **_measured(plan, file.precision)},
        [file.path],
        lambda: _export(plan, file.path, file.precision),
    )
    summary = (
        f"{found['size_bytes'] / 1e6:.1f} MB; largest difference from torch: score "
        f"{found['max_score_difference']:.1e}, box {found['max_box_difference_px']:.1e} px{found.get('half', '')}"
    )
    return Artifact(file.path, file.precision, summary)


def _quantized(plan: ArtifactPlan, file: OnnxFile, floats: _FloatFiles) -> Artifact:
    how = plan.quantizing
    assert how is not None and file.target is not None, "a quantized file has a plan"
    target, searches = file.target, []

    def work() -> dict[str, Any]:
        source = floats[PRECISIONS[file.precision].source]
        if plan.on_grids:
            report = quantize_trained(plan.checkpoint, source, file.path, plan.settings, how.images)
            scales = f" on the trained scales of {grids_file(plan.checkpoint)}"
            return {"missed": None, "summary": f"{file.path.name}, {_in_words(report, scales)}"}
        with progress("quantize") as step:
            report, search = quantize_file(
                source, file.path, how, target, max_batch=plan.settings.max_batch, progress=step
            )
        searches.append(search)
        return {"missed": None, "summary": f"{file.path.name}, {_in_words(report)}"}

    try:
        found = _stage(plan, file.stage, lambda: _quantized_inputs(plan, file, how), [file.path], work)
    except BudgetError as error:
        return Artifact(file.path, file.precision, str(error), gate="fail", search=error.result)
    text = found if isinstance(found, str) else found["summary"]  # a text: recorded by version 0.1
    return Artifact(
        file.path,
        file.precision,
        text.removeprefix(f"{file.path.name}, "),
        search=searches[0] if searches else None,
    )


def _computed(plan: ArtifactPlan, file: OnnxFile, floats: _FloatFiles) -> Artifact:
    """A float file that a runtime computes in another format than its graph has. It is not compared with torch: its
    source was, and what the format costs depends on the machine that runs it."""
    kind = PRECISIONS[file.precision]
    assert kind.computed is not None, "make asks for no other"
    number_format = kind.computed

    def work() -> dict[str, Any]:
        compute_in(number_format, floats[kind.source], file.path)
        return {}

    _stage(plan, file.stage, lambda: _inputs(plan), [file.path], work)
    size = file.path.stat().st_size / 1e6
    return Artifact(file.path, file.precision, f"{size:.1f} MB; {kind.what}: compress validate says what that costs")


def _in_words(report: QuantizeReport, scales: str = "") -> str:
    return (
        f"{report.size_bytes / 1e6:.1f} MB, for {report.target}; {report.layers} layers in int8{scales}, "
        f"{len(report.float_layers)} in float; output error on {report.images} calibration images: scores "
        f"{report.score_error:.1%}, boxes {report.box_error:.1%}"
    )


def _built(plan: ArtifactPlan, how: EnginePlan, file: OnnxFile, engine: Path) -> Artifact:
    """An engine; where none can be built, the reason."""
    try:
        machine = this_machine(*library(load_tensorrt()))
    except UserError as error:
        return Artifact(engine, file.precision, str(error), gate=f"not run: {error}")

    def work() -> dict[str, Any]:
        engines.build(file.path, engine, how)
        return {}

    def inputs() -> dict[str, Any]:
        return {
            "onnx": sha256_of(file.path),
            "options": how.options.model_dump(mode="json"),
            "machine": machine.model_dump(mode="json"),
        }

    stage = f"build {file.stage.removeprefix('export').strip() or 'fp32'}"
    try:
        _stage(plan, stage, inputs, [engine, card_path(engine)], work)
    except UserError as error:
        return Artifact(engine, file.precision, str(error), gate=f"not run: {error}")
    card = read_engine_card(engine)
    return Artifact(engine, file.precision, engines.in_words(card), engine=card)


def _stage(
    plan: ArtifactPlan,
    name: str,
    inputs: Callable[[], Mapping[str, Any]],
    outputs: Sequence[Path],
    work: Callable[[], Any],
) -> Any:
    """Return what `work` returns; in a run, what it returned when it was last done with these inputs."""
    return work() if plan.manifest is None else plan.manifest.stage(name, inputs(), outputs, work)


def _inputs(plan: ArtifactPlan) -> dict[str, Any]:
    """Everything that shapes a float file of a run."""
    inputs = {"checkpoint": sha256_of(plan.checkpoint), "deploy": exported_settings(plan.settings, plan.checks)}
    if plan.checks is not None and plan.checks.identity is not None:
        inputs["pictures"] = plan.checks.identity
    return inputs


def _measured(plan: ArtifactPlan, precision: str) -> dict[str, Any]:
    """The images that shape a float file with float16 in it."""
    if plan.checks is None or not PRECISIONS[precision].half:
        return {}
    return {"measured": plan.checks.measured[0].sha256}


def exported_settings(settings: Deploy, checks: Checks | None) -> dict[str, Any]:
    """The settings behind a float file, as the manifest of a run has them."""
    assert checks is not None, "a run checks its files"
    settings = settings.model_copy(update={key: Deploy.model_fields[key].default for key in MEASURING})
    described = settings.model_dump(mode="json", exclude=NOT_THE_FILE)
    return described | {"input_size": list(checks.input_size), "limits": list(checks.resize_short_long or ())}


def _quantized_inputs(plan: ArtifactPlan, file: OnnxFile, how: Quantizing) -> dict[str, Any]:
    settings = how.settings
    if plan.on_grids:
        grids = {"grids": sha256_of(grids_file(plan.checkpoint)), "int8": settings.model_dump(mode="json")}
        return {**_inputs(plan), **grids, **how.identity(searched=False)}
    described = {
        **_inputs(plan),
        **_measured(plan, PRECISIONS[file.precision].source),
        "int8": settings.model_dump(mode="json", exclude={"qad"}),
        "guided": plan.settings.max_map_drop,
        **how.identity(searched=True),
    }
    if file.stage.endswith(TENSORRT):  # the second of two formats
        described["target"] = TENSORRT
    return described
