"""The fused operators of `kernels/`: are they right, how fast are they, and what share of memory bandwidth is that.

    python -m benchmarks kernels                        on a GPU: every operator, six sizes, bfloat16 and float32
    python -m benchmarks kernels --step                 a training step R101 → R50 at 800 x 1333, kernels on and off
    python -m benchmarks kernels --device cpu           on a CPU: eager and compiled against what they replace
    python -m benchmarks kernels --device cpu --smoke   that everything runs, in tiny sizes

An operator is timed from its inputs to the gradients, on the largest map (stride 8) of the named image size and batch,
after its result and gradients agreed with the reference's. Peers: the reference in eager mode, the reference under
torch.compile, torchvision where it has the operator (GIoU and CIoU). mmcv has none: its focal losses take hard targets
and its overlaps have no gradient. On a GPU times are of CUDA events,
with the L2 cache overwritten before every repeat; the cases of a size take turns; the figure is the median.
`floor bytes` is what must move: every input read once and every result and gradient written once, and in the backward
pass what the forward pass left behind; `of copy` is the bandwidth that this needs in the time seen, over that of a copy
on the same machine. Writes benchmarks/results/kernels.json and .svg.
The CPU part is `benchmarks.kernels_cpu`; it writes benchmarks/results/kernels-cpu.json.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.lib import measure
from benchmarks.suites.kernels import fpn as kernels_cpu
from deploy.core.files import atomic_path, write_json
from kernels.common import backend
from kernels.common.distribution import distances_to_boxes
from kernels.common.dropout import Mode
from kernels.ops import binary_kd_loss as kd
from kernels.ops import distribution_iou_loss as dist_iou
from kernels.ops import iou_loss as iou
from kernels.ops import quality_focal_loss as qfl
from kernels.ops.attention_stats import attention_stats
from kernels.ops.feature_distance import feature_distance
from kernels.ops.mc_dropout import Dropout, mc_dropout

SIZES = ((512, 512, 2), (512, 512, 16), (800, 1333, 2), (800, 1333, 4), (800, 1333, 8), (800, 1333, 16))
SMOKE = ((64, 64, 1), (64, 96, 2))
CLASSES, CHANNELS, BINS = 80, 256, 17
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2}  # relative: of the loss, and of gradients in norm

Run = Callable[[], tuple[Tensor, ...]]
"""Forward and backward; returns the results and gradients that are compared."""


@dataclass
class Case:
    """An operator at one size: implementations by name ("fused" is ours), what must move, and whether the numbers of
    all are equal (random draws are not)."""

    name: str
    runs: dict[str, Run]
    floor_bytes: int
    comparable: bool = True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cuda", "cpu"))
    parser.add_argument("--backend", default="auto", choices=("auto", "triton", "cuda", "torch"))
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, two repeats")
    parser.add_argument("--step", action="store_true", help="a training step instead of single operators")
    parser.add_argument("--ops", nargs="+", help="only these operators")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument("--repeats", type=int, help="default: 50, on a CPU 7")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: PyTorch finds no GPU; use --device cpu --smoke to try the benchmark")
    if args.device == "cpu" and not args.smoke and not args.step:
        _on_cpu(args.repeats or 7, args.out or measure.RESULTS / "kernels-cpu.json")
        return
    args.repeats = 2 if args.smoke else args.repeats or 50
    kind = "kernels_step" if args.step else "kernels"
    out = args.out or measure.RESULTS / (f"{kind}-smoke.json" if args.smoke else f"{kind}.json")
    device = torch.device(args.device)
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    if args.step:
        report = measure.record(gpu=gpu, driver=_driver(), steps=_steps(device, args))
    else:
        copy = copy_bandwidth(device, args.smoke)
        print(f"copy: {copy / 1e9:.0f} GB/s (read and written) on {gpu or 'the CPU'}")
        rows = [row for case in _cases(device, args) for row in _measure(case, device, args, copy)]
        report = measure.record(gpu=gpu, driver=_driver(), copy_gb_s=round(copy / 1e9, 1), rows=rows)
        with atomic_path(out.with_suffix(".svg")) as path:
            path.write_text(picture(rows))
    write_json(out, report)
    print(f"written: {out}")


def _on_cpu(repeats: int, out: Path) -> None:
    """A process for every allocator and number of threads."""
    runs = []
    for threads, allocator in ((2, "reuse"), (2, "default"), (1, "reuse"), (1, "default")):
        child = subprocess.run(
            [sys.executable, "-m", "benchmarks.suites.kernels.fpn", str(threads), str(repeats), "full"],
            env=measure.environment_of_child(allocator, threads),
            stdout=subprocess.PIPE,
            text=True,
            check=False,
        )
        if child.returncode:
            raise SystemExit(child.returncode)
        runs.append({"threads": threads, "allocator": allocator, "operators": json.loads(child.stdout)})
        print(kernels_cpu.table(runs[-1]), flush=True)
        write_json(out, measure.record(runs=runs, bars=kernels_cpu.bars(runs)))
    for bar in kernels_cpu.bars(runs):
        print(f"{'met   ' if bar['met'] else 'MISSED'} {bar['seen']:8.2f}x, wanted {bar['wanted']:g}x: {bar['name']}")
    print(f"written: {out}")


# --- time ---------------------------------------------------------------------------------------------------------


def copy_bandwidth(device: torch.device, smoke: bool) -> float:
    """Bytes a second that a copy of a large tensor reads and writes."""
    source = torch.ones(2**24 if smoke or device.type == "cpu" else 2**30, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    ms = statistics.median(time_in_turn({"copy": lambda: (target.copy_(source),)}, device, 10)["copy"])
    return 2 * source.numel() / ms * 1e3


def time_in_turn(runs: dict[str, Run], device: torch.device, repeats: int) -> dict[str, list[float]]:
    """Milliseconds of every repeat, the cases in turn, each with a cold cache; two calls before do not count."""
    flush = torch.empty(2**28 if device.type == "cuda" else 2**24, dtype=torch.uint8, device=device)
    times: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        run()
        run()
    for _ in range(repeats):
        for name, run in runs.items():
            flush.zero_()
            if device.type == "cuda":
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                torch.cuda._sleep(1_000_000)  # the queue fills meanwhile: launches are not what is measured
                start.record()
                run()
                end.record()
                end.synchronize()
                times[name].append(start.elapsed_time(end))
            else:
                began = time.perf_counter()
                run()
                times[name].append(1e3 * (time.perf_counter() - began))
    return times


def _measure(case: Case, device: torch.device, args: argparse.Namespace, copy: float) -> Iterator[dict[str, Any]]:
    errors = _compare(case)
    times = time_in_turn(case.runs, device, args.repeats)
    for name, values in times.items():
        median = statistics.median(values)
        peak = None
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            case.runs[name]()
            peak = torch.cuda.max_memory_allocated() - before
        row = {
            "case": case.name,
            "implementation": name,
            "ms": median,
            "p10_ms": sorted(values)[len(values) // 10],
            "p90_ms": sorted(values)[-1 - len(values) // 10],
            "floor_bytes": case.floor_bytes,
            "of_copy": case.floor_bytes / (median * 1e-3) / copy,
            "extra_memory_bytes": peak,
            "error": errors.get(name),
            "speedup_of_fused": median / statistics.median(times["fused"]),
        }
        memory = "" if peak is None else f"  +{peak / 2**20:6.0f} MiB"
        print(
            f"{case.name:66s} {name:12s} {median:9.3f} ms  {row['of_copy']:6.1%} of copy  "
            f"fused is {row['speedup_of_fused']:6.2f}x as fast{memory}",
            flush=True,
        )
        yield row


def _compare(case: Case) -> dict[str, float]:
    """Greatest relative error (in norm) of every implementation against eager."""
    expected = case.runs["eager"]()
    errors = {}
    for name, run in case.runs.items():
        if name == "eager" or not case.comparable:
            continue
        result = run()
        errors[name] = max(
            float((a.double() - b.double()).norm() / b.double().norm().clamp(min=1e-12))
            for a, b in zip(result, expected, strict=True)
        )
        tolerance = TOLERANCE[torch.bfloat16 if torch.bfloat16 in {x.dtype for x in result} else torch.float32]
        if not errors[name] <= tolerance:
            raise SystemExit(f"error: {case.name}: {name} differs from eager by {errors[name]:.2e} > {tolerance}")
    return errors


# --- operators ----------------------------------------------------------------------------------------------------


def _cases(device: torch.device, args: argparse.Namespace) -> Iterator[Case]:
    dtypes = (torch.float32,) if args.smoke else (torch.bfloat16, torch.float32)
    for height, width, batch in SMOKE if args.smoke else SIZES:
        h, w = (math.ceil(side / 32) * 4 for side in (height, width))
        for dtype in dtypes:
            for channels_last in (False, True):
                if args.smoke and channels_last:
                    continue
                label = f"{height}x{width} b{batch} {str(dtype).removeprefix('torch.')}"
                label += " channels last" if channels_last else ""
                for make in MAKERS:
                    if args.ops and make.__name__.strip("_") not in args.ops:
                        continue
                    if make in (_iou, _dist_iou_truth) and channels_last:
                        continue
                    if make is _iou and (dtype != torch.float32):
                        continue
                    g = torch.Generator(device).manual_seed(0)
                    random = Random(g, device, dtype, channels_last)
                    yield from make(random, label, batch, h, w, args)


@dataclass
class Random:
    """Random maps of one kind."""

    generator: torch.Generator
    device: torch.device
    dtype: torch.dtype
    channels_last: bool

    def map(self, B: int, C: int, h: int, w: int, scale: float = 1.0, shift: float = 0.0) -> Tensor:
        x = torch.randn(B, C, h, w, generator=self.generator, device=self.device) * scale + shift
        layout = torch.channels_last if self.channels_last else torch.contiguous_format
        return x.to(self.dtype).contiguous(memory_format=layout)

    def uniform(self, *shape: int) -> Tensor:
        return torch.rand(shape, generator=self.generator, device=self.device)


def _differentiated(function: Callable[[Tensor], Tensor], leaf: Tensor) -> Run:
    leaf = leaf.detach().requires_grad_()

    def run() -> tuple[Tensor, ...]:
        loss = function(leaf)
        return loss.detach(), *torch.autograd.grad(loss, leaf)

    return run


def _three(
    fused: Callable[[Tensor], Tensor], eager: Callable[[Tensor], Tensor], leaf: Tensor, args: argparse.Namespace
) -> dict[str, Run]:
    """The fused operator, its reference, and that compiled."""

    def ours(x: Tensor) -> Tensor:
        with backend.use(args.backend):
            return fused(x)

    runs = {"fused": _differentiated(ours, leaf), "eager": _differentiated(eager, leaf)}
    if not (args.no_compile or args.smoke):
        runs["compile"] = _differentiated(torch.compile(eager), leaf)
    return runs


def _binary_kd(r: Random, label: str, B: int, h: int, w: int, args: argparse.Namespace) -> Iterator[Case]:
    student, teacher = (r.map(B, CLASSES, h, w, 2.0, -4.6).flatten(2) for _ in range(2))
    weight = r.uniform(B, h * w)
    # Forward: both read, gradient, disagreement written. Backward: gradient read and written.
    moved = 5 * _bytes(student) + 2 * _bytes(weight)

    def fused(z: Tensor) -> Tensor:
        loss, disagreement = kd.binary_kd_loss(z, teacher, weight)
        return loss + 0 * disagreement[0, 0]

    def eager(z: Tensor) -> Tensor:
        loss, disagreement = kd.reference(z.float(), teacher.float(), weight)
        return loss + 0 * disagreement[0, 0]

    yield Case(f"binary_kd_loss {label}", _three(fused, eager, student, args), moved)


def _qfl(r: Random, label: str, B: int, h: int, w: int, args: argparse.Namespace) -> Iterator[Case]:
    logits, weight = r.map(B, CLASSES, h, w, 2.0, -4.6).flatten(2), r.uniform(B, h * w)
    positives = min(60 * B, B * h * w)
    index = torch.randperm(B * h * w, generator=r.generator, device=r.device)[:positives]
    labels = torch.randint(CLASSES, (positives,), generator=r.generator, device=r.device)
    places = (index, labels, r.uniform(positives), weight)
    runs = _three(
        lambda z: qfl.quality_focal_loss(z, *places), lambda z: qfl.reference(z.float(), *places), logits, args
    )
    yield Case(f"quality_focal_loss {label}", runs, 4 * _bytes(logits) + _bytes(weight))


def _dist_iou(r: Random, label: str, B: int, h: int, w: int, args: argparse.Namespace) -> Iterator[Case]:
    student, teacher = (r.map(B, 4 * BINS, h, w, 2.0).flatten(2) for _ in range(2))
    weight = r.uniform(B, h * w)
    runs = _three(
        lambda z: dist_iou.distribution_iou_kd_loss(z, teacher, weight),
        lambda z: dist_iou.kd_reference(z.float(), teacher.float(), weight),
        student,
        args,
    )
    yield Case(f"distribution_iou_kd_loss {label}", runs, 5 * _bytes(student) + 2 * _bytes(weight))


def _dist_iou_truth(r: Random, label: str, B: int, h: int, w: int, args: argparse.Namespace) -> Iterator[Case]:
    """Against ground truth, as many rows as all locations of the map: on the positives only launches would count."""
    P = B * h * w
    logits, points, weight = r.map(P, 4 * BINS, 1, 1, 2.0).view(P, 4, BINS), r.uniform(P, 2) * 100, r.uniform(P)
    boxes = distances_to_boxes(points, r.uniform(P, 4) * BINS)

    def loss(function: Callable[..., tuple[Tensor, Tensor]]) -> Callable[[Tensor], Tensor]:
        def run(z: Tensor) -> Tensor:
            summed, quality = function(z, points, boxes, weight)
            return summed + 0 * quality[0]

        return run

    runs = _three(
        loss(dist_iou.distribution_iou_loss), loss(lambda z, *x: dist_iou.reference(z.float(), *x)), logits, args
    )
    # Forward: logits, boxes, points, weights read, gradient and quality written. Backward: gradient read and written.
    yield Case(f"distribution_iou_loss {label}", runs, 4 * _bytes(logits) + P * 4 * (4 + 2 + 1 + 1))


def _iou(r: Random, label: str, B: int, h: int, w: int, args: argparse.Namespace) -> Iterator[Case]:
    """As many pairs as all locations of the map, times 8 to be more than launches on small maps."""
    N = 8 * B * h * w
    corner, size, shift = r.uniform(N, 2) * 100, r.uniform(N, 2) * 20 + 1, r.uniform(N, 2) * 5
    boxes = torch.cat((corner, corner + size), 1)
    target, weight = torch.cat((corner + shift, corner + shift + size * 1.2), 1), r.uniform(N)
    for kind in ("giou", "ciou"):
        runs = _three(
            lambda a, k=kind: iou.iou_loss(a, target, weight, kind=k),
            lambda a, k=kind: iou.reference(a, target, weight, k),
            boxes,
            args,
        )
        runs |= _their_iou(kind, boxes, target, weight)
        yield Case(f"iou_loss {kind} {label}", runs, 5 * _bytes(boxes) + _bytes(weight))


def _their_iou(kind: str, boxes: Tensor, target: Tensor, weight: Tensor) -> dict[str, Run]:
    try:
        from torchvision.ops import complete_box_iou_loss, generalized_box_iou_loss
    except ImportError:
        return {}
    theirs = generalized_box_iou_loss if kind == "giou" else complete_box_iou_loss
    return {"torchvision": _differentiated(lambda a: (theirs(a, target) * weight).sum(), boxes)}


RATES = tuple(0.05 * k for k in range(1, 11))  # different ones
DRAWS: tuple[tuple[str, tuple[float, ...], Mode], ...] = (
    ("N=5", (0.1,) * 5, "elementwise"),
    ("N=10", (0.1,) * 10, "elementwise"),
    ("N=50", (0.1,) * 50, "elementwise"),
    ("N=10 rates", RATES, "elementwise"),
    ("N=10 channels", (0.1,) * 10, "channel"),
)


def _mc_dropout(r: Random, label: str, B: int, h: int, w: int, args: argparse.Namespace) -> Iterator[Case]:
    """Forward alone for every draw; forward and backward, with a variance and without, for the second."""
    x = r.map(B, CHANNELS, h, w)
    for draw, rates, mode in DRAWS[1:] if args.smoke else DRAWS:
        dropout = Dropout(rates, seed=1, combine="mean", mode=mode)
        drop = torch.nn.functional.dropout if mode == "elementwise" else torch.nn.functional.dropout2d

        def stacked(
            x: Tensor, rates: tuple[float, ...] = rates, drop: Callable[..., Tensor] = drop
        ) -> tuple[Tensor, Tensor]:
            drawn = torch.stack([drop(x, rate) for rate in rates])
            return (x + drawn.mean(0)) / 2, drawn.var(0, unbiased=False)

        def both(function: Callable[[Tensor], Any]) -> Run:
            @torch.no_grad()
            def run() -> tuple[Tensor, ...]:
                with backend.use(args.backend):
                    return tuple(function(x))

            return run

        runs = {"fused": both(lambda x, d=dropout: mc_dropout(x, d)), "eager": both(stacked)}
        if not (args.no_compile or args.smoke):
            runs["compile"] = both(torch.compile(stacked))
        _check_moments(runs, x, rates, mode)
        yield Case(f"mc_dropout {draw} {label}", runs, 3 * _bytes(x), comparable=False)
        if draw != "N=10":
            continue
        weights = [r.map(B, CHANNELS, h, w) for _ in range(2)]
        # Forward: x read, results written. Backward: their gradients read, x for the variance, the gradient written.
        for variance, maps in ((False, 4), (True, 7)):

            def fused(x: Tensor, dropout: Dropout = dropout, variance: bool = variance) -> tuple[Tensor, ...]:
                with backend.use(args.backend):
                    return tuple(y for y in mc_dropout(x, dropout, variance=variance) if y is not None)

            def eager(x: Tensor, rates: tuple[float, ...] = rates, variance: bool = variance) -> tuple[Tensor, ...]:
                return stacked(x, rates)[: 1 + variance]

            runs = {"fused": _backward_too(fused, x, weights), "eager": _backward_too(eager, x, weights)}
            if not (args.no_compile or args.smoke):
                runs["compile"] = _backward_too(torch.compile(eager), x, weights)
            _check_gradient(runs, x, weights[0])
            what = "mean and variance" if variance else "mean"
            yield Case(f"mc_dropout {draw}, {what}, and backward {label}", runs, maps * _bytes(x), comparable=False)


def _backward_too(function: Callable[[Tensor], tuple[Tensor, ...]], x: Tensor, weights: list[Tensor]) -> Run:
    """Forward and backward with given gradients of the results: no loss, so nothing else is timed."""
    leaf = x.detach().requires_grad_()

    def run() -> tuple[Tensor, ...]:
        results = function(leaf)
        return torch.autograd.grad(results, leaf, weights[: len(results)])

    return run


def _check_moments(runs: dict[str, Run], x: Tensor, rates: tuple[float, ...], mode: Mode) -> None:
    """Random draws cannot be compared one by one; sums over x can: of out / x and of var / x^2.

    Tolerance: five standard deviations of the difference of two draws, of independent planes in mode `channel`.
    """
    sums = {}
    for name in ("fused", "eager"):
        out, var = (t.float() for t in runs[name]())
        sums[name] = torch.stack(((out * x.float()).mean(), var.mean())) / x.float().square().mean()
    error = (sums["fused"] - sums["eager"]).abs().max()
    draws = x.numel() if mode == "elementwise" else x.shape[0] * x.shape[1]
    spread = max(1.0, *(rate / (1 - rate) for rate in rates))
    if not error < 5 * spread * math.sqrt(2 / draws):
        raise SystemExit(f"error: mc_dropout: moments differ from those of stacked dropouts by {float(error):.2e}")


def _check_gradient(runs: dict[str, Run], x: Tensor, weight: Tensor) -> None:
    """As `_check_moments`, of the gradient along that of the mean, and along x: that of the variance."""
    found = {}
    for name in ("fused", "eager"):
        (gradient,) = runs[name]()
        along = [(gradient.float() * t.float()).mean() / t.float().square().mean() for t in (weight, x)]
        found[name] = torch.stack(along)
    error = (found["fused"] - found["eager"]).abs().max()
    if not error < 20 / math.sqrt(x.numel()):
        raise SystemExit(f"error: mc_dropout: gradients differ from those of stacked dropouts by {float(error):.2e}")


def _feature_distance(r: Random, label: str, B: int, h: int, w: int, args: argparse.Namespace) -> Iterator[Case]:
    student, teacher = (r.map(B, CHANNELS, h, w) for _ in range(2))
    spatial, channel = r.uniform(B, h, w) / (h * w), r.uniform(B, CHANNELS)

    def eager(s: Tensor) -> Tensor:
        """The published composition: roots of the attention on both maps, then the squared error."""
        root = spatial.sqrt().unsqueeze(1) * channel.sqrt()[:, :, None, None]
        return torch.nn.functional.mse_loss(s.float() * root, teacher.float() * root, reduction="sum")

    runs = _three(lambda s: feature_distance(s, teacher, spatial, channel), eager, student, args)
    # Forward reads both maps, backward reads both again and writes the gradient.
    yield Case(f"feature_distance {label}", runs, 5 * _bytes(student))
    dropout = Dropout((0.1,) * 10, seed=1, combine="mean")

    def stacked(s: Tensor) -> Tensor:
        drawn = torch.stack([torch.nn.functional.dropout(teacher.float(), 0.1) for _ in range(10)])
        target = (teacher.float() + drawn.mean(0)) / 2
        return ((s.float() - target).square() * spatial.unsqueeze(1) * channel[:, :, None, None]).sum()

    runs = _three(lambda s: feature_distance(s, teacher, spatial, channel, dropout=dropout), stacked, student, args)
    yield Case(f"feature_distance with dropout N=10 {label}", runs, 5 * _bytes(student), comparable=False)


def _attention_stats(r: Random, label: str, B: int, h: int, w: int, args: argparse.Namespace) -> Iterator[Case]:
    x = r.map(B, CHANNELS, h, w)

    def both(statistics_of: Callable[[Tensor], tuple[Tensor, Tensor]]) -> Callable[[Tensor], Tensor]:
        def loss(x: Tensor) -> Tensor:
            spatial, channel = statistics_of(x)
            return spatial.square().sum() + channel.square().sum()

        return loss

    def eager(x: Tensor) -> tuple[Tensor, Tensor]:
        size = x.float().abs()
        return size.mean(1), size.mean((2, 3))

    yield Case(f"attention_stats {label}", _three(both(attention_stats), both(eager), x, args), 3 * _bytes(x))


MAKERS = (_mc_dropout, _feature_distance, _attention_stats, _binary_kd, _qfl, _dist_iou, _dist_iou_truth, _iou)


def _bytes(x: Tensor) -> int:
    return x.numel() * x.element_size()


# --- a training step ------------------------------------------------------------------------------------------------


def _steps(device: torch.device, args: argparse.Namespace) -> list[dict[str, Any]]:
    """R101 teacher, R50 student, BCKD and FGD, forward, backward and SGD; with fused operators and without."""
    from compress.config.methods import Bckd, Fgd
    from compress.data.batch import Batch, Target
    from compress.detectors.backbones import build_backbone
    from compress.detectors.gfl import GFL
    from compress.distill.bckd import BCKD
    from compress.distill.fgd import FGD
    from compress.distill.method import Outputs

    (height, width), batch_size = ((96, 128), 1) if args.smoke else ((800, 1344), 8)
    names = ("resnet18", "resnet18") if args.smoke else ("resnet101", "resnet50")
    rows = []
    for chosen in ("torch", args.backend):
        torch.manual_seed(0)
        teacher, student = (GFL(CLASSES, build_backbone(name, weights="none")).to(device) for name in names)
        teacher.eval().requires_grad_(False)
        methods = torch.nn.ModuleList((BCKD(**Bckd().constants()), FGD(256, 256, **Fgd().constants()))).to(device)
        for model in (teacher, student):
            model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        learned = [p for p in (*student.parameters(), *methods.parameters()) if p.requires_grad]
        optimizer = torch.optim.SGD(learned, lr=1e-5, momentum=0.9)
        corner = torch.rand(batch_size, 20, 2, device=device) * torch.tensor([width, height], device=device) * 0.7
        boxes = torch.cat((corner, corner * 1.2 + 20), 2)
        labels = torch.randint(CLASSES, (batch_size, 20), device=device)
        no = torch.zeros(20, dtype=torch.bool, device=device)
        size = (height, width)
        targets = [Target(b, c, no, None, i, size, size) for i, (b, c) in enumerate(zip(boxes, labels, strict=True))]
        images = torch.randint(256, (batch_size, 3, height, width), dtype=torch.uint8, device=device)
        batch = Batch(images, targets)

        def step(
            teacher: GFL = teacher,
            student: GFL = student,
            methods: torch.nn.ModuleList = methods,
            optimizer: torch.optim.Optimizer = optimizer,
            batch: Batch = batch,
        ) -> tuple[Tensor, ...]:
            with torch.autocast(device.type, dtype=torch.bfloat16):
                with torch.no_grad():
                    taught_features = teacher.features(batch.images)
                    taught = Outputs(taught_features, teacher.predict(taught_features), teacher)
                features = student.features(batch.images)
                prediction = student.predict(features)
            assigned = student.assign(prediction, batch.targets)
            losses = list(student.loss(prediction, assigned).values())
            for method in methods:
                losses += method(Outputs(features, prediction, student, assigned), taught, batch).values()
            loss = torch.stack(losses).sum()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            return (loss.detach(),)

        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        with backend.use(chosen):
            times = time_in_turn({"step": step}, device, args.repeats)["step"]
        peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else None
        rows.append(
            {
                "backend": chosen,
                "ms": statistics.median(times),
                "peak_memory_bytes": peak,
                "image": [height, width],
                "batch": batch_size,
                "models": names,
            }
        )
        memory = "not measured (no GPU)" if peak is None else f"{peak / 2**30:.2f} GiB"
        print(f"training step, backend {chosen:7s} {rows[-1]['ms']:9.1f} ms, peak memory {memory}", flush=True)
    return rows


# --- the record -----------------------------------------------------------------------------------------------------


def _driver() -> str | None:
    try:
        command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split("\n")[0]
    except (OSError, subprocess.CalledProcessError):
        return None


def picture(rows: list[dict[str, Any]]) -> str:
    """A bar a row, its length the share of copy bandwidth, as SVG."""
    colours = {"fused": "#2563eb", "eager": "#9ca3af", "compile": "#f59e0b", "torchvision": "#10b981"}
    line, left, wide = 16, 470, 400
    height = line * len(rows) + 40
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{left + wide + 130}" height="{height}" '
        'font-family="sans-serif" font-size="11">',
        '<rect width="100%" height="100%" fill="white"/>',
        f'<text x="{left}" y="16">share of the bandwidth of a copy (full width: 100 %)</text>',
    ]
    for i, row in enumerate(rows):
        y = 28 + i * line
        bar = wide * min(row["of_copy"], 1.0)
        parts.append(
            f'<text x="{left - 6}" y="{y + 11}" text-anchor="end">{row["case"]}, {row["implementation"]}</text>'
        )
        fill = colours.get(row["implementation"], "#6b7280")
        parts.append(f'<rect x="{left}" y="{y + 2}" width="{bar:.1f}" height="{line - 4}" fill="{fill}"/>')
        parts.append(f'<text x="{left + bar + 4:.1f}" y="{y + 11}">{row["of_copy"]:.0%}, {row["ms"]:.3f} ms</text>')
    return "\n".join((*parts, "</svg>\n"))


if __name__ == "__main__":
    main()
