"""A training step of a real-time DETR beside a plain loop around the library's own model.

    python -m benchmarks detr_step

The same random weights and the same batch of 320 x 320 pixels on both sides. Ours is what the training loop does with a
batch: the learner's forward pass with the losses, backward, clipping of the gradients, AdamW. The plain loop gives
transformers' model (`DFineForObjectDetection`, `RTDetrV2ForObjectDetection`) the images in 0..1 and the labels, and
does the same to its loss with torch's AdamW. First the losses must agree to 1e-4 (relative), else the suite fails; then
blocks of steps are timed in turn, in CPU time and wall time of one process. A ratio is the median over the rounds of
the blocks of one round.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import nn
from torchvision.ops import box_convert

from benchmarks.lib import blocks, options
from benchmarks.lib.library_model import library_model
from benchmarks.lib.random_batch import Setting, random_batch
from benchmarks.lib.results import Case
from compress.config.model import Model
from compress.config.train import Optimizer
from compress.data.batch import Batch
from compress.detectors.build import build_detector
from compress.distill.weighting import TrainingPosition
from compress.training.learner import Learner, total_loss
from compress.training.optimizer import build_optimizer

SIZES = {"d_fine": "s", "rt_detr_v2": "r18"}
IMAGES, SIDE, CLASSES = 4, 320, 80
RATE, DECAY, CLIP = 1e-4, 1e-4, 0.1
BAR = "<= 1.05"


def add_options(parser: argparse.ArgumentParser) -> None:
    options.repeats(parser, 7)
    options.threads(parser, 1)
    parser.add_argument("--only", choices=SIZES, help="one of the families")


def run(args: argparse.Namespace) -> Iterator[Case]:
    torch.set_num_threads(args.threads)
    for family in [args.only] if args.only else list(SIZES):
        found = blocks.in_turn(steps(family), args.repeats, 1)
        name = f"{family} {SIZES[family]}, {IMAGES} images of {SIDE}, {args.threads} thread(s)"
        yield Case(name, blocks.rows(found, "plain loop", {"ours": BAR}))


def steps(family: str) -> dict[str, Callable[[], None]]:
    """A function a side that trains one step more."""
    model = Model(detector=family, size=SIZES[family])
    detector = build_detector(model, CLASSES, 0).train()
    theirs = library_model(detector)
    batch = random_batch(Setting(model, model, IMAGES, SIDE, CLASSES))
    learner, position = Learner(detector, {}, None, None).train(), TrainingPosition(0, 10**6, 10**6)
    settings = Optimizer(name="adamw", lr=RATE, momentum=0.9, weight_decay=DECAY)
    pixels, labels = batch.images, library_labels(batch)

    def step(parameters: list[nn.Parameter], optimizer: torch.optim.Optimizer, loss: Callable[[], Any]) -> None:
        loss().backward()
        nn.utils.clip_grad_norm_(parameters, CLIP)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    losses: dict[str, Callable[[], Any]] = {
        "ours": lambda: total_loss(learner(batch, position)),
        "plain loop": lambda: theirs(pixels / 255, labels=labels).loss,
    }
    weights = {
        name: [p for p in part.parameters() if p.requires_grad]
        for name, part in (("ours", detector), ("plain loop", theirs))
    }
    optimizers = {
        "ours": build_optimizer(learner, settings, fused=True),  # as the training loop does on the CPU
        "plain loop": torch.optim.AdamW(weights["plain loop"], lr=RATE, weight_decay=DECAY),
    }
    first = []
    for loss in losses.values():
        torch.manual_seed(0)  # of the noise on the labels
        first.append(float(loss().detach()))
    if abs(first[0] - first[1]) > 1e-4 * abs(first[1]):
        raise AssertionError(f"{family}: our loss is {first[0]}, the library's {first[1]}")
    return {name: partial(step, weights[name], optimizers[name], loss) for name, loss in losses.items()}


def library_labels(batch: Batch) -> list[dict[str, torch.Tensor]]:
    """`class_labels` and `boxes`, centre, width and height in shares of the image."""
    return [{"class_labels": t.labels, "boxes": box_convert(t.boxes, "xyxy", "cxcywh") / SIDE} for t in batch.targets]
