"""The folder of a run: names of its files and stages, and manifest.json, which says what each stage was made from, so
that a finished stage is not done twice.

    folder = RunFolder(Path("runs/first"))
    folder.weights()            # runs/first/student.safetensors
    folder.result("student")    # what the stage recorded
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deploy.core.errors import UserError
from deploy.core.files import ENGINE_SUFFIX, sha256_of, write_json
from deploy.core.storage import push

TEACHER = "teacher"
BASELINE = "baseline"
FINE_TUNED = "baseline.pruned"
"""A pruned student trained from the labels alone, from the weights that the cut left."""
STUDENT = "student"
STUDENT_ON_PSEUDO_LABELS = "student.pseudo"
"""The student's training on pseudo labels, if it is fine-tuned afterwards."""
STUDENT_ON_INT8_GRIDS = "student.qad"
"""The student trained once more, rounded as in its int8 file."""
TRAININGS = (TEACHER, BASELINE, FINE_TUNED, STUDENT_ON_PSEUDO_LABELS, STUDENT, STUDENT_ON_INT8_GRIDS)
"""Trainings that a run may hold, in their order. Each has a folder and a checkpoint of its name."""
PRUNED = "pruned"
"""The student as it was cut from a larger detector, before any training: a checkpoint of this name."""
PRUNE = "prune"
"""Stage in which it is cut."""
TEACHER_CHECK = "teacher_check"
"""Stage in which the teacher is measured on the validation images."""
QAD = "qad"
"""Stage in which the student is trained on the grids of its int8 file."""

REPORT = "report"
"""Stage in which the report is written, from all others."""


@dataclass(frozen=True)
class RunFolder:
    """Names of the files of a run. Whether a file is there is not looked at."""

    path: Path

    @property
    def recipe(self) -> Path:
        """The resolved recipe, every key written out."""
        return self.path / "recipe.yaml"

    @property
    def manifest(self) -> Path:
        return self.path / "manifest.json"

    @property
    def report(self) -> Path:
        return self.path / "report.json"

    @property
    def page(self) -> Path:
        """The report for readers."""
        return self.path / "report.html"

    @property
    def benchmark(self) -> Path:
        return self.path / "benchmark.json"

    @property
    def evaluation(self) -> Path:
        """Folder of the validation labels and of what each model and file found (`deploy.validate.kept`)."""
        return self.path / "evaluation"

    @property
    def labelled(self) -> Path:
        """COCO file of the training images that keep their labels, where the recipe has `labels`."""
        return self.path / "labelled.json"

    @property
    def unlabelled(self) -> Path:
        """COCO file of the others, without annotations."""
        return self.path / "unlabelled.json"

    @property
    def search_split(self) -> Path:
        """COCO file of the images that the search for float layers is scored on."""
        return self.path / "deciding.json"

    @property
    def pseudo_labels(self) -> Path:
        """Folder of a COCO file for each list of images that teachers label."""
        return self.path / "pseudo"

    def training(self, name: str) -> TrainingFolder:
        """The folder of one of `TRAININGS`."""
        return TrainingFolder(self.path / name)

    def again(self, name: str) -> TrainingFolder:
        """The folder of a training that will replace a finished one of this name, until it is whole."""
        return TrainingFolder(self.path / f"{name}.new")

    @property
    def lock(self) -> Path:
        """Held by the process that works in the folder."""
        return self.path / "run.lock"

    @property
    def loggers(self) -> Path:
        """Identifiers of the run at loggers of other tools, where the recipe names some."""
        return self.path / "loggers.json"

    def weights(self, name: str = STUDENT) -> Path:
        """The checkpoint that a training leaves: `student.safetensors`."""
        return self.path / f"{name}.safetensors"

    @property
    def sensitivities(self) -> Path:
        """How much mAP each layer of the whole student costs when channels leave it; the name that `compress prune`
        gives it beside the teacher's checkpoint, so that each takes what the other measured."""
        return self.path / f"{TEACHER}.sensitivities.json"

    def grids(self, name: str = STUDENT_ON_INT8_GRIDS) -> Path:
        """The trained grids beside a checkpoint for int8: `student.qad.json`."""
        return self.path / f"{name}.json"

    def onnx(self, precision: str = "fp32") -> Path:
        """The exported student: `student.onnx`, for other precisions `student.int8.onnx`."""
        return self.path / (f"{STUDENT}.onnx" if precision == "fp32" else f"{STUDENT}.{precision}.onnx")

    @property
    def onnx_on_trained_grids(self) -> Path:
        """The int8 file of quantization-aware distillation."""
        return self.path / f"{STUDENT_ON_INT8_GRIDS}.onnx"

    def engine(self, precision: str = "fp32") -> Path:
        """The TensorRT engine of an exported file: `student.engine`, `student.fp16.engine`."""
        return self.onnx(precision).with_suffix(ENGINE_SUFFIX)

    def unfinished(self) -> list[str]:
        """Folders, by name, of trainings that began and are not whole yet."""
        begun = [self.training(name) for name in TRAININGS if not self.weights(name).is_file()]
        begun += [self.again(name) for name in TRAININGS]
        return [training.path.name for training in begun if training.last.is_file()]

    def stages(self) -> dict[str, dict[str, Any]]:
        """Records of manifest.json by stage; a damaged record counts as absent."""
        return read_stages(self.manifest)

    def result(self, stage: str) -> Any:
        """Return the result that a stage recorded. Raises KeyError where it did not run."""
        return self.stages()[stage]["result"]


@dataclass(frozen=True)
class TrainingFolder:
    """Names of the files of one training of a run."""

    path: Path

    @property
    def metrics(self) -> Path:
        """Losses, learning rate, mAP by step."""
        return self.path / "metrics.csv"

    @property
    def tensorboard(self) -> Path:
        return self.path / "tensorboard"

    @property
    def last(self) -> Path:
        """Everything that resuming needs."""
        return self.path / "checkpoints" / "last.ckpt"

    def best(self, step: int) -> Path:
        """Weights of the best evaluation, which was at `step`."""
        return self.path / "checkpoints" / f"best-{step}.ckpt"

    def bests(self) -> list[Path]:
        """The weights of best evaluations that are there: one, or two after a kill."""
        return sorted((self.path / "checkpoints").glob("best-*.ckpt"))


class Manifest:
    """The stages of a run, a row each: inputs (hash), outputs (path and hash), seconds, versions, result."""

    def __init__(self, run_dir: Path, versions: Mapping[str, str]) -> None:
        self._path = RunFolder(run_dir).manifest
        self._run_dir = run_dir
        self._versions = dict(versions)
        self._rows = read_stages(self._path)
        self.worked: list[str] = []
        """Stages that this process did; the others were done."""

    def stage(
        self,
        name: str,
        inputs: Mapping[str, Any],
        outputs: Sequence[Path],
        run: Callable[[], Any],
        *,
        write: bool = True,
    ) -> Any:
        """Run a stage, or return its recorded result when inputs and outputs are as it left them.

        Args:
            inputs: JSON-able description of everything that shapes the result (hashes of files included).
            outputs: files that the stage writes.
            run: does the work; its return value must be JSON-able.
            write: False in processes that only help: they run along and record nothing.
        """
        digest = fingerprint(inputs)
        row = self._rows.get(name)
        if row is not None and row["inputs"] == digest and self._intact(row, outputs):
            return row["result"]
        started = time.perf_counter()
        self.worked.append(name)
        result = run()
        if write:
            self._rows[name] = {
                "inputs": digest,
                "outputs": {self._relative(path): sha256_of(path) for path in outputs},
                "seconds": round(time.perf_counter() - started, 2),
                "versions": self._versions,
                "result": result,
            }
            write_json(self._path, {"stages": self._rows})
            push(self._run_dir, must=False)
        return result

    def identity(self) -> dict[str, Any]:
        """What all stages but the report were made from, and what they left (JSON-able)."""
        return {name: [row["inputs"], row["outputs"]] for name, row in self._rows.items() if name != REPORT}

    def _intact(self, row: dict[str, Any], outputs: Sequence[Path]) -> bool:
        recorded = row["outputs"]
        return set(recorded) == {self._relative(path) for path in outputs} and all(
            path.is_file() and sha256_of(path) == recorded[self._relative(path)] for path in outputs
        )

    def _relative(self, path: Path) -> str:
        return path.relative_to(self._run_dir).as_posix()


def read_stages(path: Path) -> dict[str, dict[str, Any]]:
    """Read the stages that a manifest.json records. What is damaged in it counts as absent and only costs time: those
    stages run again. Raises UserError when a folder stands in its place."""
    if path.is_dir():
        raise UserError(f"{path}: is a folder; a run keeps its record in a file of this name, so remove the folder")
    try:
        stages = json.loads(path.read_text(encoding="utf-8"))["stages"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return {}
    if not isinstance(stages, dict):
        return {}
    return {name: row for name, row in stages.items() if _is_row(row)}


def _is_row(row: Any) -> bool:
    return (
        isinstance(row, dict)
        and isinstance(row.get("inputs"), str)
        and isinstance(row.get("outputs"), dict)
        and "result" in row
    )


def fingerprint(value: Mapping[str, Any]) -> str:
    """SHA-256 of a JSON-able mapping, independent of the order of its keys."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.sha256(text.encode()).hexdigest()
