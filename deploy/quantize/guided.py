"""Accuracy-guided quantization: keep the fewest layers in float that hold the loss of mAP within a budget.

1. All layers but the output layers in int8, the mAP on a labelled split. Within the budget: on to 4.
2. *Proxy*, cheap: every layer quantized alone; the error of the dense scores and boxes on calibration images ranks
   the layers by sensitivity.
3. *mAP*, dear: binary search over how many of the most sensitive layers stay in float. It assumes that fewer int8
   layers lose less, which noise can break, so the last step is measured, not concluded.
4. Refinement: the kept layers are offered back one at a time, least sensitive first and the output layers last, and
   stay in int8 when the budget still holds.

Every finished measurement is in a JSON file, under a key of everything that shaped it: an interrupted search goes on
where it stopped, and an equal one measures nothing. The labelled split should be held out: neither the images that the
result is judged on (the search would fit them) nor calibration images (refused). A part of the training set will do.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import onnx

from deploy.core.errors import UserError
from deploy.core.files import sha256_of, write_json
from deploy.core.progress import Progress
from deploy.quantize.file import Quantizer, dense_outputs, output_error
from deploy.runtimes.onnx import OnnxRunner
from deploy.validate.accuracy import validate
from deploy.validate.coco import load_annotations

PROXY_IMAGES = 8


@dataclass(frozen=True)
class Sensitivity:
    """Effect of a layer on the output when it alone is quantized: errors as in `output_error`."""

    layer: str
    score_error: float
    box_error: float

    @property
    def error(self) -> float:
        """The key of the ranking: the larger of the two would hide one of them, so their sum."""
        return self.score_error + self.box_error


@dataclass(frozen=True)
class Trial:
    """A measured choice: these layers in float, this mAP and the loss against the float file, in points."""

    float_layers: tuple[str, ...]
    map: float
    map_drop: float


@dataclass
class GuidedResult:
    """The search's outcome; `chosen` is None when the budget cannot be met with a single layer in int8."""

    budget: float
    float_map: float
    layers: int
    sensitivities: list[Sensitivity] = field(default_factory=list)
    """Most sensitive first; empty when the first trial met the budget and no layer had to be looked at."""
    trials: list[Trial] = field(default_factory=list)
    chosen: Trial | None = None

    def to_dict(self) -> dict[str, Any]:
        """Fields as JSON types."""
        return {
            "budget": self.budget,
            "float_map": self.float_map,
            "layers": self.layers,
            "sensitivities": [vars(row) | {"error": row.error} for row in self.sensitivities],
            "trials": [_row(trial) for trial in self.trials],
            "chosen": None if self.chosen is None else _row(self.chosen),
        }


def search(
    quantizer: Quantizer,
    annotations: Path,
    images: Path,
    record: Path,
    *,
    max_map_drop: float,
    progress: Progress | None = None,
) -> GuidedResult:
    """Find the layers to keep in float. The output layers are the first to be kept and the last to be given up.

    annotations, images: the labelled split that decides. record: JSON file of finished measurements. max_map_drop: the
    budget in mAP points. progress(done, total) is called after every measurement; `total` is an estimate.

    Raises UserError for unreadable data, when a calibration image is in the split, and for a float file that gives
    values that are not finite.
    """
    measure = _Measurements(quantizer, annotations, images, record, progress)
    start = tuple(quantizer.structure.output_names)
    inner = [layer.name for layer in quantizer.structure.layers if layer.name not in start]
    steps = max(len(inner), 1).bit_length() + 1
    measure.expect(2 + len(start))
    result = GuidedResult(max_map_drop, measure.float_map(), len(quantizer.structure.layers))

    def trial(kept: Sequence[str]) -> Trial:
        found = measure.map(frozenset(kept))
        done = Trial(tuple(sorted(kept)), found, result.float_map - found)
        if done not in result.trials:
            result.trials.append(done)
        return done

    def meets(done: Trial) -> bool:
        return done.map_drop <= max_map_drop + 1e-9

    def refine(best: Trial, order: Sequence[str]) -> GuidedResult:
        for name in order:
            fewer = trial([other for other in best.float_layers if other != name])
            best = fewer if meets(fewer) else best
        result.chosen = best
        return measure.finish(result)

    whole = trial(start)
    if meets(whole):
        return refine(whole, start)
    measure.expect(len(inner) + steps)
    result.sensitivities = sorted((measure.sensitivity(name) for name in inner), key=lambda row: -row.error)
    ranked = [row.layer for row in result.sensitivities]

    low, high, best = 0, len(ranked), None  # `low` in float is too few; `high`, everything, would be no int8 file
    while high - low > 1:
        middle = (low + high) // 2
        done = trial([*start, *ranked[:middle]])
        low, high, best = (low, middle, done) if meets(done) else (middle, high, best)
    if best is None:
        return measure.finish(result)
    measure.expect(high + len(start))
    return refine(best, [*reversed(ranked[:high]), *start])


# ----------------------------------------------------------------------------------------------------


class _Measurements:
    """Measures, or reads what an earlier search measured."""

    def __init__(
        self, quantizer: Quantizer, annotations: Path, images: Path, record: Path, progress: Progress | None
    ) -> None:
        self._quantizer, self._annotations, self._images, self._record = quantizer, annotations, images, record
        self._progress, self._done, self._expected = progress, 0, 0
        rows = load_annotations(annotations)["images"]
        shaped_by = [
            sha256_of(quantizer.source), quantizer.images.sha256, quantizer.target, quantizer.method,
            str(quantizer.reduce_range), sha256_of(annotations),
            *(sha256_of(images / row["file_name"]) for row in rows), *_versions(),
        ]  # fmt: skip
        self._key = hashlib.sha256(" ".join(shaped_by).encode()).hexdigest()
        self._values = _read(record, self._key)
        self._reference: Any = None

    def expect(self, more: int) -> None:
        self._expected = self._done + more

    def float_map(self) -> float:
        return self._once("map float", lambda: self._map_of(self._quantizer.source))

    def map(self, float_layers: frozenset[str]) -> float:
        def work() -> float:
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder) / "trial.onnx"
                onnx.save(self._quantizer.graph(float_layers), str(path))
                return self._map_of(path)

        return self._once(f"map {_digest(float_layers)}", work)

    def sensitivity(self, layer: str) -> Sensitivity:
        def work() -> list[float]:
            images = self._quantizer.canvases[:PROXY_IMAGES]
            if self._reference is None:
                self._reference = dense_outputs(self._quantizer.model, images)
            others = {other.name for other in self._quantizer.structure.layers} - {layer}
            found = dense_outputs(self._quantizer.graph(others), images)
            return list(output_error(self._reference, found, chosen=self._quantizer.structure.chooses))

        return Sensitivity(layer, *self._once(f"alone {layer}", work))

    def finish(self, result: GuidedResult) -> GuidedResult:
        """Put the outcome beside the measurements, for people."""
        write_json(self._record, {"key": self._key, "values": self._values, "result": result.to_dict()})
        return result

    def _map_of(self, path: Path) -> float:
        result = validate({"trial": OnnxRunner(path)}, self._annotations, self._images)[0]
        if result.gate != "fail":  # without a reference the gate only asks for finite detections
            return result.metrics.map
        if path == self._quantizer.source:
            raise UserError(f"{path}: {result.diagnosis}")
        return 0.0  # not a choice, however good its other detections are

    def _once(self, name: str, work: Callable[[], Any]) -> Any:
        if name not in self._values:
            self._values[name] = work()
            write_json(self._record, {"key": self._key, "values": self._values})
        self._done += 1
        if self._progress is not None:
            self._progress(self._done, max(self._expected, self._done))
        return self._values[name]


def _versions() -> list[str]:
    """Versions of the programs that quantize and run a trial: this one and ONNX Runtime."""
    from onnxruntime import __version__ as runtime

    try:
        own = version("compress-detectors")
    except PackageNotFoundError:  # run from a folder of sources
        own = "unknown"
    return [f"compress {own}", f"onnxruntime {runtime}"]


def _read(record: Path, key: str) -> dict[str, Any]:
    """The measurements of an equal search. Those of another one, or a damaged file, count as none."""
    try:
        content = json.loads(record.read_text(encoding="utf-8"))
        return dict(content["values"]) if content["key"] == key else {}
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return {}


def _digest(names: frozenset[str]) -> str:
    return hashlib.sha256("\n".join(sorted(names)).encode()).hexdigest()[:16]


def _row(trial: Trial) -> dict[str, Any]:
    return {"float_layers": list(trial.float_layers), "map": trial.map, "map_drop": trial.map_drop}
