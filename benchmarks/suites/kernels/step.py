"""A training step with the fused operators and without."""

from __future__ import annotations

import statistics
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.lib.results import Row
from benchmarks.suites.kernels.operators import CLASSES
from benchmarks.suites.kernels.timing import Choice, time_in_turn
from compress.config.methods import Bckd, Fgd
from compress.data.batch import Batch, Target
from compress.detectors.backbones import build_backbone
from compress.detectors.gfl import GFL
from compress.distill.bckd import BCKD
from compress.distill.fgd import FGD
from compress.distill.method import Outputs
from kernels.common import backend

BOXES = 20  # an image


def rows(choice: Choice) -> list[Row]:
    """R101 teacher, R50 student, BCKD and FGD, forward, backward and SGD; with fused operators and without."""
    made = []
    for chosen in ("torch", choice.backend):
        torch.manual_seed(0)
        step = training_step(choice)
        if choice.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        with backend.use(chosen):
            times = time_in_turn({"step": step}, choice.device, choice.repeats)["step"]
        made.append(Row(f"backend {chosen}", "time", statistics.median(times), "ms", n=len(times)))
        if choice.device.type == "cuda":
            made.append(Row(f"backend {chosen}", "peak memory", torch.cuda.max_memory_allocated(), "bytes"))
    return made


def training_step(choice: Choice) -> Callable[[], tuple[Tensor, ...]]:
    """One step on a random batch: 8 images of 800 x 1344, or one of 96 x 128 with ResNet-18s to try it."""
    size, batch_size = ((96, 128), 1) if choice.smoke else ((800, 1344), 8)
    names = ("resnet18", "resnet18") if choice.smoke else ("resnet101", "resnet50")
    device = choice.device
    teacher, student = (GFL(CLASSES, build_backbone(name, weights="none")).to(device) for name in names)
    teacher.eval().requires_grad_(False)
    methods = torch.nn.ModuleList((BCKD(**Bckd().constants()), FGD(256, 256, **Fgd().constants()))).to(device)
    for model in (teacher, student):
        model.to(memory_format=torch.channels_last)
    learned = [p for p in (*student.parameters(), *methods.parameters()) if p.requires_grad]
    optimizer = torch.optim.SGD(learned, lr=1e-5, momentum=0.9)
    batch = random_batch(size, batch_size, device)

    def step() -> tuple[Tensor, ...]:
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

    return step


def random_batch(size: tuple[int, int], count: int, device: torch.device) -> Batch:
    """Noise with `BOXES` boxes an image. size: height and width."""
    height, width = size
    corner = torch.rand(count, BOXES, 2, device=device) * torch.tensor([width, height], device=device) * 0.7
    boxes = torch.cat((corner, corner * 1.2 + 20), 2)
    labels = torch.randint(CLASSES, (count, BOXES), device=device)
    no = torch.zeros(BOXES, dtype=torch.bool, device=device)
    targets = [Target(b, c, no, None, i, size, size) for i, (b, c) in enumerate(zip(boxes, labels, strict=True))]
    return Batch(torch.randint(256, (count, 3, height, width), dtype=torch.uint8, device=device), targets)
