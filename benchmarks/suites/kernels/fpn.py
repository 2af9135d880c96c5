"""The operators on a CPU, eager and compiled, against what they replace.

On the maps of an 800 x 1333 image, batch 2 (256 channels, 80 classes, 5 levels, 22,400 locations an image):

    mc_dropout       mean and variance of 10 copies; peer: ten dropouts stacked, then mean and var
    fgd              focal, background and attention term of FGD to the student's gradients; peer: the published
                     composition, which multiplies both maps by the roots of masks and attention
    iou_loss         GIoU of 4,096 pairs, weighted sum, to the gradient; peer: torchvision's loss of rows times weights
                     (without torchvision ours, which is the same PyTorch and shows what the operator itself costs)
    binary_kd_loss   BCKD's classification term of all levels and the disagreement max_c |t - s|, to the student's
                     gradient; peer: the published composition of sigmoids and binary_cross_entropy_with_logits

The operators on maps are there twice, for contiguous maps and for maps with channels last, which the detectors make and
the trainer therefore gives them; the peer's maps lie the same way.

All cases of an operator take turns (`benchmarks.lib.measure`), values are compared before anything is timed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.lib import child
from benchmarks.lib.measure import MIN_REPEAT_S, Call, Timing, environment_of_child, interleave
from benchmarks.lib.results import Case, Row
from kernels.ops.attention_stats import attention_stats
from kernels.ops.binary_kd_loss import binary_kd_loss
from kernels.ops.feature_distance import feature_distance_and_means
from kernels.ops.iou_loss import iou_loss, iou_loss_rows
from kernels.ops.mc_dropout import Dropout, mc_dropout

LEVELS = ((100, 168), (50, 84), (25, 42), (13, 21), (7, 11))
SMALL = ((8, 12), (4, 6))
BATCH, CHANNELS, CLASSES, COPIES, RATE = 2, 256, 80, 10, 0.1
PAIRS = 4096
ELEMENT_VARIANCE = 0.03  # at least that of a mean and of a variance over COPIES dropouts of N(0, 1); 0.011 and 0.027
TEMPERATURE = 0.5
LAYOUTS = {"": torch.contiguous_format, ", channels last": torch.channels_last}  # by the end of the operator's name
BARS = {  # (operator, implementation): times as fast as the peer
    **{(f"mc_dropout{layout}", "eager"): ">= 8" for layout in LAYOUTS},
    **{(f"mc_dropout{layout}", "compiled"): ">= 40" for layout in LAYOUTS},
    **{(f"fgd{layout}", "eager"): ">= 2" for layout in LAYOUTS},
    **{(f"fgd{layout}", "compiled"): ">= 6" for layout in LAYOUTS},
    ("iou_loss", "eager"): ">= 1",
    ("binary_kd_loss", "eager"): ">= 1",
}

Result = tuple[Tensor, ...]


@dataclass
class Operator:
    """peer: what it replaces. Results of all but random operators are compared with the peer's, up to `tolerance`
    (relative, of norms)."""

    peer: str
    runs: dict[str, Callable[[], Result]]
    random: bool = False
    tolerance: float = 1e-4


def cases(repeats: int) -> Iterator[Case]:
    """A process for every number of threads and allocator."""
    for threads in (2, 1):
        for allocator in ("reuse", "default"):
            environment = environment_of_child(allocator, threads)
            found = child.call("benchmarks.suites.kernels.fpn:measure", threads, repeats, environment=environment)
            timings = {name: {key: Timing(**row) for key, row in rows.items()} for name, rows in found.items()}
            yield Case(f"cpu, {threads} thread{'s' * (threads > 1)}, allocator {allocator}", rows(timings))


def measure(threads: int, repeats: int, small: bool = False) -> dict[str, dict[str, Any]]:
    """Timings by operator and implementation, the peer first. small: tiny maps, no compiler, no least time."""
    torch.set_num_threads(threads)
    found: dict[str, dict[str, Any]] = {}
    for name, operator in operators(SMALL if small else LEVELS, compiled=not small).items():
        _compare(name, operator)
        calls = {
            key: _forget(operator.runs[key]) for key in sorted(operator.runs, key=lambda key: key != operator.peer)
        }
        timed = interleave(calls, repeats=repeats, min_repeat_s=0.0 if small else MIN_REPEAT_S)
        found[name] = {key: asdict(timing) for key, timing in timed.items()}
    return found


def rows(found: dict[str, dict[str, Timing]]) -> list[Row]:
    """Times of every implementation, and how many times as fast as the peer it is."""
    made = []
    for operator, timings in found.items():
        peer, *_ = timings.values()
        for name, timing in timings.items():
            variant = f"{operator}: {name}"
            made.append(timing.row(variant))
            if timing is not peer:
                bar = BARS.get((operator, name), "")
                made.append(Row(variant, "times as fast", peer.ms / timing.ms, "×", n=timing.repeats, bar=bar))
    return made


def operators(levels: tuple[tuple[int, int], ...], *, compiled: bool) -> dict[str, Operator]:
    g = torch.Generator().manual_seed(0)
    return {
        **{f"mc_dropout{end}": _mc_dropout(levels, g, compiled, layout) for end, layout in LAYOUTS.items()},
        **{f"fgd{end}": _fgd(levels, g, compiled, layout) for end, layout in LAYOUTS.items()},
        "iou_loss": _iou_loss(g),
        "binary_kd_loss": _binary_kd_loss(levels, g, compiled),
    }


def _forget(run: Callable[[], Result]) -> Call:
    def case() -> None:
        run()

    return case


def _compare(name: str, operator: Operator) -> None:
    wanted = operator.runs[operator.peer]()
    for key, run in operator.runs.items():
        found = run()
        if operator.random:  # means over all elements have the same expectation; in standard deviations of theirs
            error = max(
                float((a.double().mean() - b.double().mean()).abs() / (2 * ELEMENT_VARIANCE / a.numel()) ** 0.5)
                for a, b in zip(found, wanted, strict=True)
            )
            tolerance = 5.0
        else:
            error = max(
                float((a.double() - b.double()).norm() / b.double().norm().clamp(min=1e-12))
                for a, b in zip(found, wanted, strict=True)
            )
            tolerance = operator.tolerance
        if not error <= tolerance:
            raise SystemExit(f"error: {name}: {key} differs from {operator.peer} by {error:.1e} > {tolerance:.1e}")


# --- operators ----------------------------------------------------------------------------------------------------


def _maps(levels: tuple[tuple[int, int], ...], g: torch.Generator, layout: torch.memory_format) -> list[Tensor]:
    return [torch.randn(BATCH, CHANNELS, *size, generator=g).to(memory_format=layout) for size in levels]


def _mc_dropout(
    levels: tuple[tuple[int, int], ...], g: torch.Generator, compiled: bool, layout: torch.memory_format
) -> Operator:
    maps = _maps(levels, g, layout)
    drop = Dropout((RATE,) * COPIES, seed=1)

    def stack() -> Result:
        copies = [torch.stack([F.dropout(x, RATE, True) for _ in range(COPIES)]) for x in maps]
        return tuple(t for c in copies for t in (c.mean(0), c.var(0, unbiased=False)))

    def ours(with_compiler: bool) -> Callable[[], Result]:
        def run() -> Result:
            results = [mc_dropout(x, drop, compiled=with_compiler) for x in maps]
            return tuple(t for result in results for t in result if t is not None)

        return run

    runs = {"stack_eager": torch.no_grad()(stack), "eager": torch.no_grad()(ours(False))}
    if compiled:
        runs["compiled"] = torch.no_grad()(ours(True))
    return Operator("stack_eager", runs, random=True)


def _fgd(
    levels: tuple[tuple[int, int], ...], g: torch.Generator, compiled: bool, layout: torch.memory_format
) -> Operator:
    students = [x.requires_grad_() for x in _maps(levels, g, layout)]
    teachers = _maps(levels, g, layout)
    fgs = [torch.rand(BATCH, *size, generator=g).sub(0.8).relu() for size in levels]
    bgs = [(fg == 0).float() / (fg == 0).sum((1, 2), keepdim=True) for fg in fgs]

    def differentiated(loss: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]) -> Callable[[], Result]:
        def run() -> Result:
            terms = [loss(*level) for level in zip(students, teachers, fgs, bgs, strict=True)]
            total = torch.stack(terms).sum()
            return total.detach(), *torch.autograd.grad(total, students)

        return run

    def published(s: Tensor, t: Tensor, fg: Tensor, bg: Tensor) -> Tensor:
        def attention(x: Tensor) -> tuple[Tensor, Tensor]:
            size = x.abs()
            B, C, h, w = x.shape
            spatial = (h * w * F.softmax((size.mean(1, keepdim=True) / TEMPERATURE).view(B, -1), 1)).view(B, h, w)
            channel = C * F.softmax(size.mean(2).mean(2) / TEMPERATURE, 1)
            return spatial, channel

        spatial, channel = attention(t)
        spatial_s, channel_s = attention(s)

        def masked(mask: Tensor) -> Tensor:
            def root(x: Tensor) -> Tensor:
                by_position = x * torch.sqrt(spatial.unsqueeze(1))
                return by_position * torch.sqrt(channel[:, :, None, None]) * torch.sqrt(mask.unsqueeze(1))

            return F.mse_loss(root(s), root(t), reduction="sum") / len(s)

        of_attention = ((channel_s - channel).abs().sum() + (spatial_s - spatial).abs().sum()) / len(s)
        return 1e-3 * masked(fg) + 5e-4 * masked(bg) + 5e-4 * of_attention

    def ours(with_compiler: bool) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
        def attention(by_position: Tensor, by_channel: Tensor) -> tuple[Tensor, Tensor]:
            B, h, w = by_position.shape
            spatial = h * w * F.softmax(by_position.flatten(1) / TEMPERATURE, 1).view(B, h, w)
            return spatial, by_channel.shape[1] * F.softmax(by_channel / TEMPERATURE, 1)

        def loss(s: Tensor, t: Tensor, fg: Tensor, bg: Tensor) -> Tensor:
            spatial, channel = attention(*attention_stats(t, compiled=with_compiler))
            sums, *means = feature_distance_and_means(
                s, t, torch.stack((fg, bg)) * spatial, channel, compiled=with_compiler
            )
            sums = sums / len(s)
            spatial_s, channel_s = attention(*means)
            of_attention = ((channel_s - channel).abs().sum() + (spatial_s - spatial).abs().sum()) / len(s)
            return 1e-3 * sums[0] + 5e-4 * sums[1] + 5e-4 * of_attention

        return loss

    runs = {"published": differentiated(published), "eager": differentiated(ours(False))}
    if compiled:
        runs["compiled"] = differentiated(ours(True))
    # The gradient of |A(S) - A(T)| has a sign, which rounding turns where the two are equal.
    return Operator("published", runs, tolerance=1e-3)


def _iou_loss(g: torch.Generator) -> Operator:
    corner, side, shift = (torch.rand(PAIRS, 2, generator=g) * scale for scale in (100.0, 20.0, 5.0))
    boxes = torch.cat((corner, corner + side + 1), 1).requires_grad_()
    target = torch.cat((corner + shift, corner + shift + 1.2 * (side + 1)), 1)
    weight = torch.rand(PAIRS, generator=g)

    def differentiated(loss: Callable[[], Tensor]) -> Callable[[], Result]:
        def run() -> Result:
            value = loss()
            return value.detach(), *torch.autograd.grad(value, boxes)

        return run

    runs = {
        "rows": differentiated(lambda: (iou_loss_rows(boxes, target) * weight).sum()),
        "eager": differentiated(lambda: iou_loss(boxes, target, weight)),
    }
    try:
        from torchvision.ops import generalized_box_iou_loss
    except ImportError:
        return Operator("rows", runs)
    runs["torchvision"] = differentiated(lambda: (generalized_box_iou_loss(boxes, target) * weight).sum())
    return Operator("torchvision", runs)


def _binary_kd_loss(levels: tuple[tuple[int, int], ...], g: torch.Generator, compiled: bool) -> Operator:
    students = [(torch.randn(BATCH, CLASSES, h * w, generator=g) * 2 - 4.6).requires_grad_() for h, w in levels]
    teachers = [torch.randn(BATCH, CLASSES, h * w, generator=g) * 2 - 4.6 for h, w in levels]
    weights = [torch.ones(BATCH, h * w) for h, w in levels]

    def differentiated(term: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]) -> Callable[[], Result]:
        def run() -> Result:
            terms = [term(*level) for level in zip(students, teachers, weights, strict=True)]
            total = torch.stack([loss for loss, _ in terms]).sum()
            return total.detach(), *(d for _, d in terms), *torch.autograd.grad(total, students)

        return run

    def published(z: Tensor, teacher: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        t, s = teacher.sigmoid(), z.sigmoid()
        difference = (t - s).abs()
        rows = F.binary_cross_entropy_with_logits(z, t, reduction="none") * difference.pow(1.0)
        return (rows.sum(1) * weight).sum(), difference.detach().amax(1)

    def ours(with_compiler: bool) -> Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]:
        return lambda z, teacher, weight: binary_kd_loss(z, teacher, weight, compiled=with_compiler)

    runs = {"published": differentiated(published), "eager": differentiated(ours(False))}
    if compiled:
        runs["compiled"] = differentiated(ours(True))
    return Operator("published", runs)
