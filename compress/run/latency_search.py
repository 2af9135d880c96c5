"""Latency of exported files as a budget of pruning: each detector that is looked at is exported, opened by the runner
that will run it, and timed beside the whole detector's file.

    with latency_search(detector, record, plan, print) as search:
        search.ms(detector)

The machine is never the same twice, so what counts is the ratio to the whole detector's file, in rounds that go through
both in random order, and what it is multiplied by is that file's median over the whole search. Two sessions of one file
differ, too, by some percent: each is opened several times, twice at once, and the ratio of these two says what noise
alone does.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from compress.config.deploy import Deploy
from compress.detectors.base import Detector
from compress.detectors.build import exportable_families, model_of
from compress.detectors.checkpoints import NATIVE_SUFFIX, ModelRecord, save_detector
from compress.export.onnx import export_checkpoint
from compress.prune.latency import LatencySearch, Timing
from deploy.core.errors import UserError
from deploy.core.files import ONNX_SUFFIX
from deploy.core.image_folder import spread
from deploy.core.precisions import PRECISIONS
from deploy.latency.clock import HOST_CLOCK, Clock
from deploy.latency.measure import make_tasks, quiet_collector, run_slice, warm_up
from deploy.latency.results import Estimate, Reading, Scope
from deploy.latency.scopes import read_pool
from deploy.latency.statistics import ratio_in_turn
from deploy.latency.telemetry import Telemetry, troubles
from deploy.quantize.calibrate import choose_images
from deploy.quantize.file import Quantizer
from deploy.runtimes.base import Runner
from deploy.runtimes.open import open_runner
from deploy.runtimes.providers import openings

SCOPE: Scope = "h2d+compute+d2h"
"""The figure that a report calls a file's latency."""
CHECKED, IMAGES = 2, 8  # images that files are checked on; that they are calibrated and timed on
CERTAIN = 0.01
"""Timing goes on until the ratio's interval reaches no further than this share to each side."""
_ROUNDS, _SECONDS, _WARM_UP = 10, 1.0, 2.0  # of a session, the last in seconds at most
_FEWEST, _MOST, _LONGEST = 2, 6, 30.0  # sessions after one another, and seconds after which there is no other


@dataclass(frozen=True)
class LatencyPlan:
    """Plan of the files whose latency counts.

    size: (height, width) of the canvas.
    resize_short_long: limits of pictures on it.
    images: files of training images, on which files are checked, calibrated and timed; none: on noise, and int8 files
        cannot be made.
    deploy: settings of the files, and where they run.
    """

    size: tuple[int, int]
    resize_short_long: tuple[int, int]
    images: Sequence[Path]
    deploy: Deploy
    precision: str = "fp32"
    seed: int = 0


def timed_settings(deploy: Deploy, precision: str) -> dict[str, Any]:
    """The settings of `deploy` that a timed file depends on, and where it runs; as JSON."""
    others = {"precisions", "engines", "runners", "max_map_drop", "benchmark", "max_batch"}
    return deploy.model_dump(mode="json", exclude=others if PRECISIONS[precision].quantized else others | {"int8"})


@contextmanager
def latency_search(
    detector: Detector, record: ModelRecord, plan: LatencyPlan, say: Callable[[str], None]
) -> Iterator[LatencySearch]:
    """The search for detectors that are as fast as asked.

    Args:
        record: of the detector's checkpoint.
        say: takes a line about each file.

    Raises UserError for detectors that cannot be exported, and int8 files without training images.
    """
    if detector.exportable is not None:
        raise UserError(
            f"prune.latency_ms: {detector.family} cannot be exported: {detector.exportable}; take gflops or params, or "
            f"a {exportable_families()} detector"
        )
    if len(openings(plan.deploy.providers)) > 1:
        raise UserError(
            "prune.latency_ms: is measured in one runtime, and deploy.providers names several: "
            f"{', '.join(plan.deploy.providers)}; leave one"
        )
    if PRECISIONS[plan.precision].quantized and not plan.images:
        raise UserError(
            f"prune.precision: {plan.precision} is calibrated on training images, and there are none; give some, or "
            "take fp32"
        )
    with tempfile.TemporaryDirectory() as folder:
        images = spread(plan.images, IMAGES) or _noise(Path(folder), plan.size)
        stopwatch = FileStopwatch(
            partial(_write, record=record, plan=plan, images=images),
            partial(open_runner, providers=plan.deploy.providers),
            images,
            Path(folder),
            seed=plan.seed,
            clock=HOST_CLOCK,
        )
        yield LatencySearch(stopwatch, say)


def latency_result(search: LatencySearch, found: Detector, asked: float, plan: LatencyPlan) -> dict[str, Any]:
    """What was measured, JSON-able, times in milliseconds: `asked`; `whole_ms`, the whole detector's file; `median_ms`
    and `interval_ms` (95 %) of the file of `found`; `aa_ratio`, the interval of this file's time over its own;
    `trials`, pairs of GFLOPs and milliseconds; `multiple` that widths are of; `precision`, `providers`; `note` and
    `warnings`, lines on what did not go as it should."""
    watch = search.stopwatch
    timing, whole = watch.timing(found), watch.whole_ms
    return {
        "asked": asked,
        "whole_ms": round(whole, 4),
        "median_ms": round(timing.ratio.value * whole, 4),
        "interval_ms": _interval(timing.ratio, whole),
        "aa_ratio": _interval(timing.again, 1.0),
        "trials": [[trial.gflops, round(trial.timing.ratio.value * whole, 4)] for trial in search.trials],
        "multiple": search.multiple,
        "precision": plan.precision,
        "providers": list(plan.deploy.providers),
        "note": search.note,
        "warnings": troubles(watch.readings) if isinstance(watch, FileStopwatch) else [],
    }


class FileStopwatch:
    """Measures files of detectors, the first one's beside each.

    write: makes the file of a detector at a path. open_file: gives its runner. images: that are run on, in turn.
    """

    def __init__(
        self,
        write: Callable[[Detector, Path], None],
        open_file: Callable[[Path], Runner],
        images: Sequence[Path],
        folder: Path,
        *,
        seed: int,
        clock: Clock,
    ) -> None:
        self.readings: list[Reading] = []
        self._write, self._open, self._folder, self._clock = write, open_file, folder, clock
        self._encoded = read_pool(images)
        self._rng, self._seed = np.random.default_rng(seed), seed
        self._whole: Path | None = None
        self._whole_ms: list[float] = []
        self._timings: dict[str, Timing] = {}

    @property
    def whole_ms(self) -> float:
        """Median milliseconds of the whole detector's file: of all sessions, between which minutes may lie."""
        return float(np.median(self._whole_ms))

    def timing(self, detector: Detector) -> Timing:
        """Of a detector's file; that of the first, and whole, one against itself."""
        key = json.dumps(model_of(detector).widths, sort_keys=True)
        if key not in self._timings:
            path = self._folder / f"{len(self._timings)}{ONNX_SUFFIX}"
            self._write(detector, path)
            self._timings[key] = self._measure(path)
            self._whole = self._whole or path
        return self._timings[key]

    def _measure(self, path: Path) -> Timing:
        files = {"first": path, "second": path} | ({} if self._whole is None else {"whole": self._whole})
        times: dict[str, list[np.ndarray]] = {name: [] for name in files}
        begun, sessions = self._clock.now(), 0
        with Telemetry() as telemetry, quiet_collector():
            while True:
                self._session(files, times, telemetry)
                sessions += 1
                timing = self._timing(times)
                certain = _reach(timing.ratio if self._whole else timing.again) <= CERTAIN
                late = sessions == _MOST or self._clock.now() - begun > _LONGEST
                if sessions >= _FEWEST and (certain or late):
                    self.readings += telemetry.readings
                    return timing

    def _session(self, files: Mapping[str, Path], times: dict[str, list[np.ndarray]], telemetry: Telemetry) -> None:
        """Open all, and go through them in rounds."""
        tasks = {  # opened in random order, too: a session that is opened later can be faster
            name: make_tasks([self._open(files[name])], SCOPE, self._encoded, 1, self._clock)[0]
            for name in self._rng.permutation(list(files)).tolist()
        }
        for task in tasks.values():
            warm_up([task], 1, _WARM_UP, self._clock)
        for _ in range(_ROUNDS):
            for name in self._rng.permutation(list(tasks)).tolist():
                found = run_slice([tasks[name]], 1, _SECONDS / _ROUNDS, self._clock)
                times[name].append(np.asarray(found.samples_ms))
            telemetry.read()
        whole = "first" if self._whole is None else "whole"
        self._whole_ms.append(float(np.median(np.concatenate(times[whole][-_ROUNDS:]))))

    def _timing(self, times: Mapping[str, Sequence[np.ndarray]]) -> Timing:
        again = ratio_in_turn(times["first"], times["second"], [50.0], seed=self._seed)[0]
        if self._whole is None:
            return Timing(Estimate(value=1.0), again)
        both = [np.concatenate(parts) for parts in zip(times["first"], times["second"], strict=True)]
        return Timing(ratio_in_turn(times["whole"], both, [50.0], seed=self._seed)[0], again)


# --- details --------------------------------------------------------------------------------------------


def _write(detector: Detector, path: Path, *, record: ModelRecord, plan: LatencyPlan, images: Sequence[Path]) -> None:
    """The file of a detector as it would ship, of the plan's precision, but checked at batch 1 and 2 alone; an int8 one
    is calibrated on few images and has no layers that a guided search would leave in float."""
    checkpoint = path.with_suffix(NATIVE_SUFFIX)
    names = record.class_names or tuple(map(str, range(record.num_classes)))
    ids = record.category_ids or tuple(range(record.num_classes))
    described = {"model": model_of(detector), "class_names": names, "category_ids": ids}
    save_detector(checkpoint, detector, metadata=record.model_copy(update=described))
    kind, int8 = PRECISIONS[plan.precision], plan.deploy.int8
    source = path.with_suffix(f".float{ONNX_SUFFIX}") if kind.quantized else path
    export_checkpoint(
        checkpoint,
        source,
        plan.deploy.model_copy(update={"max_batch": CHECKED}),
        input_size=plan.size,
        images=images[:CHECKED],
        resize_short_long=plan.resize_short_long,
        precision=kind.source,
        measured=images,
    )
    if kind.quantized:
        chosen = choose_images(images, IMAGES)
        quantizer = Quantizer(source, chosen, int8.target, method=int8.method, reduce_range=int8.reduce_range)
        quantizer.save(path, max_batch=CHECKED)


def _noise(folder: Path, size: tuple[int, int]) -> list[Path]:
    """A picture where there is none."""
    path = folder / "noise.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)).save(path)
    return [path]


def _reach(estimate: Estimate) -> float:
    """How far the interval reaches to a side, as a share."""
    if estimate.low is None or estimate.high is None:
        return float("inf")
    return max(estimate.high / estimate.value - 1, 1 - estimate.low / estimate.value)


def _interval(estimate: Estimate, factor: float) -> list[float] | None:
    if estimate.low is None or estimate.high is None:
        return None
    return [round(estimate.low * factor, 4), round(estimate.high * factor, 4)]
