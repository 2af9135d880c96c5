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
pass what the forward pass left behind; `share of copy` is the bandwidth that this needs in the time seen, over that of
a copy on the same machine. The part on a CPU (`fpn`) works on the maps of all levels of an 800 x 1333 image.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator

import torch

from benchmarks.lib import options
from benchmarks.lib.results import Case, Row
from benchmarks.suites.kernels import fpn, operators, step
from benchmarks.suites.kernels.timing import Choice, copy_bandwidth, measure
from deploy.core.errors import UserError


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cuda", "cpu"))
    parser.add_argument("--backend", default="auto", choices=("auto", "triton", "cuda", "torch"))
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, two repeats")
    parser.add_argument("--step", action="store_true", help="a training step instead of single operators")
    parser.add_argument("--ops", nargs="+", choices=list(operators.OPERATORS), default=list(operators.OPERATORS))
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    options.repeats(parser, None)


def run(args: argparse.Namespace) -> Iterator[Case]:
    if args.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: PyTorch finds no GPU; use --device cpu --smoke to try the benchmark")
    if args.device == "cpu" and not args.smoke and not args.step:
        yield from fpn.cases(args.repeats or 7)
        return
    compiled = not (args.no_compile or args.smoke)
    choice = Choice(
        torch.device(args.device), args.backend, args.smoke, compiled, args.repeats or (2 if args.smoke else 50)
    )
    name = f"{args.device}{', smoke' if args.smoke else ''}"
    if args.step:
        yield Case(f"{name}, training step", step.rows(choice))
        return
    copy = copy_bandwidth(choice)
    rows = [Row("copy", "bandwidth", copy / 1e9, "GB/s")]
    for implementations in operators.implementations(choice, args.ops):
        rows += measure(implementations, choice, copy)
    yield Case(name, rows)
