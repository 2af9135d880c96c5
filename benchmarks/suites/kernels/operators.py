"""The operators on the largest map of an image size, beside their references: what a GPU is measured with."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.suites.kernels.timing import Choice, Implementations, Run
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


def implementations(choice: Choice, names: Sequence[str]) -> Iterator[Implementations]:
    """The named operators at every size, in every dtype and layout that they are made for."""
    dtypes = (torch.float32,) if choice.smoke else (torch.bfloat16, torch.float32)
    for height, width, batch in SMOKE if choice.smoke else SIZES:
        h, w = (math.ceil(side / 32) * 4 for side in (height, width))
        for dtype, channels_last in itertools.product(dtypes, (False,) if choice.smoke else (False, True)):
            label = f"{height}x{width} b{batch} {str(dtype).removeprefix('torch.')}"
            label += " channels last" if channels_last else ""
            for name in names:
                if name in ("iou", "dist_iou_truth") and channels_last:
                    continue
                if name == "iou" and dtype != torch.float32:
                    continue
                generator = torch.Generator(choice.device).manual_seed(0)
                random = Random(generator, choice.device, dtype, channels_last)
                yield from OPERATORS[name](random, label, batch, h, w, choice)


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
    fused: Callable[[Tensor], Tensor], eager: Callable[[Tensor], Tensor], leaf: Tensor, choice: Choice
) -> dict[str, Run]:
    """The fused operator, its reference, and that compiled."""

    def ours(x: Tensor) -> Tensor:
        with backend.use(choice.backend):
            return fused(x)

    runs = {"fused": _differentiated(ours, leaf), "eager": _differentiated(eager, leaf)}
    if choice.compiled:
        runs["compile"] = _differentiated(torch.compile(eager), leaf)
    return runs


def _binary_kd(r: Random, label: str, B: int, h: int, w: int, choice: Choice) -> Iterator[Implementations]:
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

    yield Implementations(f"binary_kd_loss {label}", _three(fused, eager, student, choice), moved)


def _qfl(r: Random, label: str, B: int, h: int, w: int, choice: Choice) -> Iterator[Implementations]:
    logits, weight = r.map(B, CLASSES, h, w, 2.0, -4.6).flatten(2), r.uniform(B, h * w)
    positives = min(60 * B, B * h * w)
    index = torch.randperm(B * h * w, generator=r.generator, device=r.device)[:positives]
    labels = torch.randint(CLASSES, (positives,), generator=r.generator, device=r.device)
    places = (index, labels, r.uniform(positives), weight)
    runs = _three(
        lambda z: qfl.quality_focal_loss(z, *places), lambda z: qfl.reference(z.float(), *places), logits, choice
    )
    yield Implementations(f"quality_focal_loss {label}", runs, 4 * _bytes(logits) + _bytes(weight))


def _dist_iou(r: Random, label: str, B: int, h: int, w: int, choice: Choice) -> Iterator[Implementations]:
    student, teacher = (r.map(B, 4 * BINS, h, w, 2.0).flatten(2) for _ in range(2))
    weight = r.uniform(B, h * w)
    runs = _three(
        lambda z: dist_iou.distribution_iou_kd_loss(z, teacher, weight),
        lambda z: dist_iou.kd_reference(z.float(), teacher.float(), weight),
        student,
        choice,
    )
    yield Implementations(f"distribution_iou_kd_loss {label}", runs, 5 * _bytes(student) + 2 * _bytes(weight))


def _dist_iou_truth(r: Random, label: str, B: int, h: int, w: int, choice: Choice) -> Iterator[Implementations]:
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
        loss(dist_iou.distribution_iou_loss), loss(lambda z, *x: dist_iou.reference(z.float(), *x)), logits, choice
    )
    # Forward: logits, boxes, points, weights read, gradient and quality written. Backward: gradient read and written.
    yield Implementations(f"distribution_iou_loss {label}", runs, 4 * _bytes(logits) + P * 4 * (4 + 2 + 1 + 1))


def _iou(r: Random, label: str, B: int, h: int, w: int, choice: Choice) -> Iterator[Implementations]:
    """Compare on as many pairs as the map has locations, times 8 to be more than launches on small maps."""
    N = 8 * B * h * w
    corner, size, shift = r.uniform(N, 2) * 100, r.uniform(N, 2) * 20 + 1, r.uniform(N, 2) * 5
    boxes = torch.cat((corner, corner + size), 1)
    target, weight = torch.cat((corner + shift, corner + shift + size * 1.2), 1), r.uniform(N)
    for kind in ("giou", "ciou"):
        runs = _three(
            lambda a, k=kind: iou.iou_loss(a, target, weight, kind=k),
            lambda a, k=kind: iou.reference(a, target, weight, k),
            boxes,
            choice,
        )
        runs |= _their_iou(kind, boxes, target, weight)
        yield Implementations(f"iou_loss {kind} {label}", runs, 5 * _bytes(boxes) + _bytes(weight))


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


def _mc_dropout(r: Random, label: str, B: int, h: int, w: int, choice: Choice) -> Iterator[Implementations]:
    """Forward alone for every draw; forward and backward, with a variance and without, for the second."""
    x = r.map(B, CHANNELS, h, w)
    for draw, rates, mode in DRAWS[1:] if choice.smoke else DRAWS:
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
                with backend.use(choice.backend):
                    return tuple(function(x))

            return run

        runs = {"fused": both(lambda x, d=dropout: mc_dropout(x, d)), "eager": both(stacked)}
        if choice.compiled:
            runs["compile"] = both(torch.compile(stacked))
        _check_moments(runs, x, rates, mode)
        yield Implementations(f"mc_dropout {draw} {label}", runs, 3 * _bytes(x), comparable=False)
        if draw != "N=10":
            continue
        weights = [r.map(B, CHANNELS, h, w) for _ in range(2)]
        # Forward: x read, results written. Backward: their gradients read, x for the variance, the gradient written.
        for variance, maps in ((False, 4), (True, 7)):

            def fused(x: Tensor, dropout: Dropout = dropout, variance: bool = variance) -> tuple[Tensor, ...]:
                with backend.use(choice.backend):
                    return tuple(y for y in mc_dropout(x, dropout, variance=variance) if y is not None)

            def eager(x: Tensor, rates: tuple[float, ...] = rates, variance: bool = variance) -> tuple[Tensor, ...]:
                return stacked(x, rates)[: 1 + variance]

            runs = {"fused": _backward_too(fused, x, weights), "eager": _backward_too(eager, x, weights)}
            if choice.compiled:
                runs["compile"] = _backward_too(torch.compile(eager), x, weights)
            _check_gradient(runs, x, weights[0])
            what = "mean and variance" if variance else "mean"
            yield Implementations(
                f"mc_dropout {draw}, {what}, and backward {label}", runs, maps * _bytes(x), comparable=False
            )


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
    """Check as `_check_moments` does, but of the gradient along that of the mean, and along x: that of the variance."""
    found = {}
    for name in ("fused", "eager"):
        (gradient,) = runs[name]()
        along = [(gradient.float() * t.float()).mean() / t.float().square().mean() for t in (weight, x)]
        found[name] = torch.stack(along)
    error = (found["fused"] - found["eager"]).abs().max()
    if not error < 20 / math.sqrt(x.numel()):
        raise SystemExit(f"error: mc_dropout: gradients differ from those of stacked dropouts by {float(error):.2e}")


def _feature_distance(r: Random, label: str, B: int, h: int, w: int, choice: Choice) -> Iterator[Implementations]:
    student, teacher = (r.map(B, CHANNELS, h, w) for _ in range(2))
    spatial, channel = r.uniform(B, h, w) / (h * w), r.uniform(B, CHANNELS)

    def eager(s: Tensor) -> Tensor:
        """The published composition: roots of the attention on both maps, then the squared error."""
        root = spatial.sqrt().unsqueeze(1) * channel.sqrt()[:, :, None, None]
        return torch.nn.functional.mse_loss(s.float() * root, teacher.float() * root, reduction="sum")

    runs = _three(lambda s: feature_distance(s, teacher, spatial, channel), eager, student, choice)
    # Forward reads both maps, backward reads both again and writes the gradient.
    yield Implementations(f"feature_distance {label}", runs, 5 * _bytes(student))
    dropout = Dropout((0.1,) * 10, seed=1, combine="mean")

    def stacked(s: Tensor) -> Tensor:
        drawn = torch.stack([torch.nn.functional.dropout(teacher.float(), 0.1) for _ in range(10)])
        target = (teacher.float() + drawn.mean(0)) / 2
        return ((s.float() - target).square() * spatial.unsqueeze(1) * channel[:, :, None, None]).sum()

    runs = _three(lambda s: feature_distance(s, teacher, spatial, channel, dropout=dropout), stacked, student, choice)
    yield Implementations(f"feature_distance with dropout N=10 {label}", runs, 5 * _bytes(student), comparable=False)


def _attention_stats(r: Random, label: str, B: int, h: int, w: int, choice: Choice) -> Iterator[Implementations]:
    x = r.map(B, CHANNELS, h, w)

    def both(statistics_of: Callable[[Tensor], tuple[Tensor, Tensor]]) -> Callable[[Tensor], Tensor]:
        def loss(x: Tensor) -> Tensor:
            spatial, channel = statistics_of(x)
            return spatial.square().sum() + channel.square().sum()

        return loss

    def eager(x: Tensor) -> tuple[Tensor, Tensor]:
        size = x.float().abs()
        return size.mean(1), size.mean((2, 3))

    yield Implementations(
        f"attention_stats {label}", _three(both(attention_stats), both(eager), x, choice), 3 * _bytes(x)
    )


OPERATORS = {
    "mc_dropout": _mc_dropout,
    "feature_distance": _feature_distance,
    "attention_stats": _attention_stats,
    "binary_kd": _binary_kd,
    "qfl": _qfl,
    "dist_iou": _dist_iou,
    "dist_iou_truth": _dist_iou_truth,
    "iou": _iou,
}


def _bytes(x: Tensor) -> int:
    return x.numel() * x.element_size()
