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

import torch
from lightning.fabric import Fabric

from compress.config.deploy import Deploy
from compress.data.coco import CocoDetection
from compress.data.loader import eval_loader, train_loader
from compress.detectors.base import Detector
from compress.distill.weighting import TrainingPosition
from compress.manifest import fingerprint
from compress.run.trainings import EVAL_BATCH, TrainingPlan
from compress.training.distributed import sum_over_processes
from compress.training.learner import Learner, total_loss
from compress.training.loop import steps_of
from compress.training.optimizer import build_optimizer
from compress.training.time_left import in_words
from deploy.core.environment import usable_cores
from deploy.core.image import load_image
from deploy.latency.results import Reading
from deploy.latency.telemetry import troubles

TRIAL = 2  # images of the first steps; one where they are large
LARGE_PX = 640 * 640
QUICK_S = 1.0  # steps of a trial that are faster are timed once more with all of a batch's images
COPIES = 4  # of a weight that trains: itself, gradient, two moments
EXPORT_S = 25.0
"""Seconds that a file takes to be exported and compared with torch, as seen for small detectors on two cores; it is not
timed beforehand."""
WARM_UP = 2.0  # a measurement of latency takes so many times its seconds, with warm-up


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
    measured = (runs + teacher) * len(benchmark.batch_sizes) * benchmark.seconds * WARM_UP
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
    learner = Learner(detector, methods, plan.teacher, sum_over_processes(fabric))
    optimizer = build_optimizer(learner, settings.optimizer, fused=fabric.device.type == "cpu")
    weights = sum(p.numel() * p.element_size() for p in learner.parameters() if p.requires_grad)
    fixed = weights * (COPIES + (settings.ema is not None))
    model, fabric_optimizer = fabric.setup(learner, optimizer)
    learner.train()
    trial = min(share, 1 if sets.canvas[0] * sets.canvas[1] > LARGE_PX else TRIAL, len(sets.train))
    before = _resident(fabric.device)
    seconds, loading, peak = _timed(fabric, model, fabric_optimizer, plan, sets, trial)
    done = trial
    if seconds < QUICK_S and share > trial and len(sets.train) >= share:
        seconds, loading, peak = _timed(fabric, model, fabric_optimizer, plan, sets, share)
        done = share
    if peak is not None and before is not None and done < share:
        peak = before + fixed + max(0, peak - before - fixed) * share // done
    parts = settings.accumulate * share / done
    return StepCost(_together(seconds * parts, loading * parts, plan.workers, fabric.device), peak)


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
    fabric: Fabric, model: torch.nn.Module, optimizer: torch.optim.Optimizer, plan: TrainingPlan, sets: Sets, count: int
) -> tuple[float, float, int | None]:
    """Seconds of a step with so many images, seconds of loading them, and the highest memory."""
    batches = iter(train_loader(sets.train, batch_size=count * fabric.world_size, seed=plan.seed, workers=0,
                                rank=fabric.global_rank, world_size=fabric.world_size))  # fmt: skip
    decoding = _decoding(sets.train, count) if sets.cached else 0.0
    _forget_peak(fabric.device)
    computing, loading = [], []
    for step in range(3):
        started = time.perf_counter()
        batch = next(batches)
        loaded = time.perf_counter()
        batch = batch.to(fabric.device)
        losses = model(batch, TrainingPosition(step, 1000, 100))
        fabric.backward(total_loss(losses))
        fabric.clip_gradients(model, optimizer, max_norm=plan.settings.clip_norm or 1e9, error_if_nonfinite=False)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        _wait(fabric.device)
        computing.append(time.perf_counter() - loaded)
        loading.append(loaded - started)
        if computing[-1] > 10 and step:  # enough is known
            break
    return mean(computing[1:]), max(0.0, mean(loading) - decoding), _peak(fabric.device)


def _decoding(images: CocoDetection, count: int) -> float:
    """Seconds to decode so many pictures."""
    looked = min(count, len(images))
    started = time.perf_counter()
    for index in range(looked):
        load_image(images.path(index))
    return (time.perf_counter() - started) * count / looked


def _together(computing: float, loading: float, workers: int, device: torch.device) -> float:
    """Seconds of a step whose images are loaded by so many processes beside it, which share a CPU with it."""
    if workers == 0:
        return computing + loading
    cores = usable_cores()
    busy = (computing * min(torch.get_num_threads(), cores) if device.type == "cpu" else 0.0) + loading
    return max(computing, loading / workers, busy / cores)


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
