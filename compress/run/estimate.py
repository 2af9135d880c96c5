"""What a run will take on this machine: a few steps of each training are timed here, and counted out.

Steps are timed on the run's own images at their real size, as the training does them. Large ones are done with fewer
images and scaled up. Nothing is kept. Figures are good to about a half, on a machine that does nothing else. Memory is
that of the trainings.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean

import numpy as np
import torch
from lightning.fabric import Fabric

from compress.config.deploy import Deploy
from compress.data.coco import CocoDetection
from compress.data.loader import eval_loader, train_loader
from compress.detectors.base import Detector
from compress.distill.weighting import TrainingPosition
from compress.manifest import fingerprint
from compress.run.trainings import EVAL_BATCH, TrainingPlan
from compress.training.loop import batches_from, steps_of
from compress.training.step import NotFiniteError, Stepper
from compress.training.time_left import in_words
from deploy.core.errors import UserError
from deploy.latency.results import Reading
from deploy.latency.telemetry import troubles

TRIAL = 2  # images of the first steps; one where they are large
LARGE_PX = 640 * 640
QUICK_S = 1.0  # steps of a trial that are faster are timed once more with all of a batch's images
TIMED_S, TIMED_STEPS = 2.0, 12  # for so long, or so many
COPIES = 4  # of a weight that trains: itself, gradient, two moments
EXPORT_S = 25.0
"""Seconds that a file takes to be exported and compared with torch, as seen for small detectors on two cores; it is not
timed beforehand."""
WARM_UP_S = 5.0
"""Seconds until latencies settle, as seen on two cores of a shared machine; at most 10, under one on a quiet one."""


@dataclass(frozen=True)
class StepCost:
    """Cost of one optimizer step. memory: bytes at the highest, of the process or on the GPU; None: not known here."""

    seconds: float
    memory: int | None


@dataclass(frozen=True)
class Stage:
    """A stage of a run. what: in words. seconds, memory: see `StepCost`."""

    name: str
    what: str
    seconds: float
    memory: int | None = None


@dataclass(frozen=True)
class Sets:
    """The run's images. train, val: opened, maybe fewer than there will be; images, val_images: how many there will be.

    cached: they are decoded once and kept. canvas: (height, width) of the validation images.
    """

    train: CocoDetection
    val: CocoDetection
    images: int
    val_images: int
    cached: bool
    canvas: tuple[int, int]


def stages_of_run(
    fabric: Fabric,
    plans: Sequence[TrainingPlan],
    sets: Sets,
    *,
    given: Detector | None = None,
    unlabelled: int = 0,
    labelled: str | None = None,
    deploy: Deploy | None = None,
) -> list[Stage]:
    """The stages of a run in their order.

    Args:
        plans: its trainings.
        given: a teacher that is there already, which is measured on the validation images.
        unlabelled: pictures that teachers label. labelled: name of the training that sees them as well.
        deploy: of the recipe, where files are made and measured.
    """
    stages = []
    if given is not None:
        look = seconds_an_image(given, sets, fabric.device)
        stages.append(Stage("teacher", f"measured on {sets.val_images} images", look * sets.val_images))
        if unlabelled:
            stages.append(Stage("pseudo labels", f"of {unlabelled} images", look * unlabelled))
    known: dict[str, StepCost] = {}
    for plan in plans:
        more = unlabelled if plan.name == labelled else 0
        stages.append(training_stage(fabric, plan, replace(sets, images=sets.images + more), known))
    if deploy is not None:
        student = plans[-1].detector(len(sets.train.categories)).to(fabric.device)
        stages.append(_files(deploy, sets, seconds_an_image(student, sets, fabric.device), teacher=len(plans) > 1))
    return stages


def _files(deploy: Deploy, sets: Sets, look: float, *, teacher: bool) -> Stage:
    """Export, validation, latency. look: seconds an image of the student in torch."""
    files, benchmark = len(deploy.precisions), deploy.benchmark
    runs = files * len(deploy.providers) + 1
    measured = (runs + teacher) * len(benchmark.batch_sizes) * (benchmark.seconds + WARM_UP_S)
    what = f"{files} exported, validated and measured"
    return Stage("files", what, files * EXPORT_S + runs * sets.val_images * look + measured)


def training_stage(fabric: Fabric, plan: TrainingPlan, sets: Sets, known: dict[str, StepCost]) -> Stage:
    """A training with its evaluations. known: of steps that were timed before, by what they are; grows."""
    settings = plan.settings
    detector = plan.detector(len(sets.train.categories)).to(fabric.device)
    described = plan.model.model_dump(mode="json")
    kind = fingerprint({"model": described, "batch": settings.batch_size, "methods": plan.distillation.names})
    if kind not in known:
        known[kind] = step_cost(fabric, detector, plan, sets)
    step = known[kind]
    look = seconds_an_image(detector, sets, fabric.device) / fabric.world_size
    epoch, steps = steps_of(settings, sets.images // (settings.batch_size // settings.accumulate))
    every = epoch * (settings.eval_every or 0)
    evaluations = (steps // every + (steps % every > 0)) if every else 1
    what = f"{steps} steps x {step.seconds:.2g} s, {_times(evaluations)} {sets.val_images} validation images"
    return Stage(plan.name, what, steps * step.seconds + evaluations * sets.val_images * look, step.memory)


def step_cost(fabric: Fabric, detector: Detector, plan: TrainingPlan, sets: Sets) -> StepCost:
    """Time an optimizer step of `detector`, which changes, with the teacher and the methods of `plan`."""
    settings = plan.settings
    share = settings.batch_size // settings.accumulate // fabric.world_size
    methods = plan.distillation.build(detector, plan.teacher)
    stepper = Stepper(fabric, detector, settings, teacher=plan.teacher, methods=methods)
    weights = sum(p.numel() * p.element_size() for p in stepper.learner.parameters() if p.requires_grad)
    fixed = weights * (COPIES + (settings.ema is not None))
    done = min(share, 1 if sets.canvas[0] * sets.canvas[1] > LARGE_PX else TRIAL, len(sets.train))
    before = _resident(fabric.device)
    seconds, peak = _timed(fabric, stepper, plan, sets, done, enough_s=0)
    if seconds < QUICK_S and len(sets.train) >= share:
        done = share
        seconds, peak = _timed(fabric, stepper, plan, sets, done, enough_s=TIMED_S)
    if peak is not None and before is not None and done < share:
        peak = before + fixed + max(0, peak - before - fixed) * share // done
    return StepCost(seconds * share / done, peak)


@torch.no_grad()
def seconds_an_image(detector: Detector, sets: Sets, device: torch.device) -> float:
    """Time to find the objects of a validation image, loading included."""
    count = min(len(sets.val), 1 if sets.canvas[0] * sets.canvas[1] > LARGE_PX else EVAL_BATCH)
    batches = iter(eval_loader(sets.val, batch_size=count, workers=0, canvas=sets.canvas))
    was_training = detector.training
    detector.eval()
    times = []
    for _ in range(2):  # the first is slower
        started = time.perf_counter()
        batch = next(batches, None)
        if batch is None:
            break
        detector.decode(detector(batch.images.to(device)), batch.sizes)
        _wait(device)
        times.append((time.perf_counter() - started) / len(batch.targets))
    detector.train(was_training)
    return min(times)


def lines(
    stages: Sequence[Stage], device: torch.device, *, left_out: Sequence[str] = (), readings: Sequence[Reading] = ()
) -> list[str]:
    """The estimate as lines for people.

    Args:
        left_out: what takes time and is not in it.
        readings: of the machine while it was made.
    """
    rows = [(s.name, s.what, in_words(s.seconds), _memory(s.memory)) for s in stages]
    highest = max((s.memory for s in stages if s.memory is not None), default=None)
    rows.append(("in all", "", in_words(sum(s.seconds for s in stages)), _memory(highest)))
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    cores = f", {torch.get_num_threads()} threads" if device.type == "cpu" else ""
    missing = f"; without {', '.join(left_out)}" if left_out else ""
    head = f"estimate, from steps timed here on {device.type}{cores}{missing}:"
    table = ["  " + "  ".join((*map(str.ljust, row, widths), row[3])).rstrip() for row in rows]
    return [head, *table, *(f"  {trouble}: alone it would be faster" for trouble in troubles(readings))]


# --- details --------------------------------------------------------------------------------------------


def _timed(
    fabric: Fabric, stepper: Stepper, plan: TrainingPlan, sets: Sets, count: int, *, enough_s: float
) -> tuple[float, int | None]:
    """Seconds of a step with so many images, which the training's own loader reads, and the highest memory."""
    together = count * fabric.world_size
    few = np.linspace(0, len(sets.train) - 1, min(len(sets.train), 2 * together)).astype(int).tolist()
    loader = train_loader(sets.train.subset(few, cache=sets.cached), batch_size=together, seed=plan.seed,
                          workers=plan.workers, rank=fabric.global_rank, world_size=fabric.world_size)  # fmt: skip
    _forget_peak(fabric.device)
    batches = batches_from(loader, 0)
    times: list[float] = []
    while len(times) < 2 or (sum(times[1:]) < enough_s and len(times) <= TIMED_STEPS):  # the first is slower
        started = time.perf_counter()
        try:
            stepper.take(batches, TrainingPosition(len(times), 1000, 100), plan.settings.optimizer.lr * 1e-3)
        except NotFiniteError as error:
            raise UserError(f"{plan.name}: {error} at the first steps, on the run's own images") from None
        _wait(fabric.device)
        times.append(time.perf_counter() - started)
    return mean(times[1:]), _peak(fabric.device)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


STATUS = Path("/proc/self/status")  # of Linux


def _resident(device: torch.device) -> int | None:
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    return _status("VmRSS")


def _peak(device: torch.device) -> int | None:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return _status("VmHWM")


def _forget_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    with suppress(OSError):  # the peak is then that of the process so far
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins anew


def _status(key: str) -> int | None:
    """A line of /proc/self/status in bytes; None on systems without it."""
    try:
        found = [line for line in STATUS.read_text().splitlines() if line.startswith(f"{key}:")]
    except OSError:
        return None
    return int(found[0].split()[1]) * 1024 if found else None


def _memory(size: int | None) -> str:
    return "" if size is None else f"{size / 1e9:.1f} GB"


def _times(count: int) -> str:
    return "once" if count == 1 else f"{count} times"
