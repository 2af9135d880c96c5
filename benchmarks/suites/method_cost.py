"""What each distillation method adds to a training step on the CPU.

    python -m benchmarks method_cost

Random weights and images. Every case is one thread's CPU time in ms, the smallest of several calls taken in turn, so
that neighbours on the machine disturb little. `student`: forward, detection loss and backward; `teacher`: the forward
pass that all methods need once a step. A method's figure is a step with it minus a step without, both with the
teacher's pass: its forward and backward pass through its own layers, not the student's backbone, which is walked once
whatever the methods are. Writes benchmarks/results/method_cost.json.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import Tensor

from benchmarks.lib.measure import RESULTS, record
from compress.config.methods import Methods
from compress.config.model import Model
from compress.console import open_console
from compress.data.batch import Batch, Target
from compress.detectors.base import freeze
from compress.detectors.build import build_detector
from compress.distill.build import build_methods
from compress.distill.method import Outputs
from deploy.core.files import write_json

BOXES = 6  # an image
HOSTS = ("bckd", "fgd", "pkd", "cwd", "mgd", "gi", "tid", "ld", "crosskd", "dkd")


@dataclass(frozen=True)
class Setting:
    """Models and batch of a column."""

    student: Model
    teacher: Model
    images: int
    size: int  # pixels, height and width
    classes: int


SETTINGS = {
    "resnet18": Setting(
        Model(backbone="resnet18", frozen_stages=-1, norm_eval=False),
        Model(backbone="resnet50", frozen_stages=-1, norm_eval=False),
        images=2,
        size=320,
        classes=80,
    ),
    "nano": Setting(
        Model(backbone="nano", neck_channels=64, head_depth=1),
        Model(backbone="nano2x", neck_channels=64, head_depth=1),
        images=8,
        size=96,
        classes=8,
    ),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--only", choices=SETTINGS, help="one column")
    parser.add_argument("--out", type=Path, default=RESULTS / "method_cost.json")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    wanted = [arguments.only] if arguments.only else list(SETTINGS)
    columns = {name: measure(SETTINGS[name], arguments.repeats) for name in wanted}
    write_json(arguments.out, record(settings=columns))
    shown = Table("", *columns)
    for case in next(iter(columns.values()))["ms"]:
        shown.add_row(case, *(f"{column['ms'][case]:.1f} ms" for column in columns.values()))
    console = open_console()
    for name in next(iter(columns.values()))["uet_share_of_a_step"]:
        shown.add_row(f"{name}, share of a step", *(f"{c['uet_share_of_a_step'][name]:.1%}" for c in columns.values()))
    console.print(shown)
    console.print(f"written: {arguments.out}")
    return 0


def measure(setting: Setting, repeats: int) -> dict[str, Any]:
    """Description and `ms` of one column: the methods in the order of `HOSTS`, then UET around one of each kind."""
    student = build_detector(setting.student, setting.classes, 0).train()
    teacher = freeze(build_detector(setting.teacher, setting.classes, 1))
    batch = random_batch(setting)
    wanted = {name: Methods.model_validate({name: {}}) for name in HOSTS}
    wanted |= {f"uet+{of}": Methods.model_validate({of: {}, "uet": {"of": of}}) for of in ("fgd", "bckd")}
    for samples in (10, 15):
        uet = {"of": "fgd", "samples": samples}
        wanted[f"uet+fgd, N={samples}"] = Methods.model_validate({"fgd": {}, "uet": uet})
    methods = {name: build_methods(m, student, teacher) for name, m in wanted.items()}

    def pass_of_teacher() -> Outputs:
        with torch.no_grad():
            features = teacher.features(batch.images)
            return Outputs(features, teacher.predict(features), teacher)

    def step(name: str | None) -> None:
        maps = [x.detach().requires_grad_() for x in features]  # the backbone's share is the same for all
        prediction = student.predict(maps)
        targets = student.assign(prediction, batch.targets)
        losses: dict[str, Tensor] = dict(student.loss(prediction, targets))
        if name is not None:
            ours = Outputs(maps, prediction, student, targets)
            for balanced in methods[name].values():
                losses |= balanced.method(ours, taught, batch)
        torch.stack(list(losses.values())).sum().backward()

    def whole_student() -> None:
        prediction = student.predict(student.features(batch.images))
        losses = student.loss(prediction, student.assign(prediction, batch.targets))
        torch.stack(list(losses.values())).sum().backward()

    with torch.no_grad():
        features = student.features(batch.images)
    taught = pass_of_teacher()
    cases = {"student": whole_student, "teacher": pass_of_teacher, "head": lambda: step(None)}
    cases |= {name: lambda name=name: step(name) for name in methods}
    best = dict.fromkeys(cases, float("inf"))
    for repeat in range(repeats + 1):
        for name, run in cases.items():
            start = time.thread_time()
            run()
            if repeat:  # the first call allocates
                best[name] = min(best[name], 1000 * (time.thread_time() - start))
    ms = {name: round(best[name], 2) for name in ("student", "teacher")}
    ms |= {name: round(best[name] - best["head"], 2) for name in methods}
    return {
        "student": setting.student.backbone,
        "teacher": setting.teacher.backbone,
        "channels": setting.student.neck_channels,
        "images": setting.images,
        "size": setting.size,
        "classes": setting.classes,
        "ms": ms,
        "uet_share_of_a_step": {  # of the whole step of its host: student, teacher and host
            name: round((best[name] - best[host]) / (ms["student"] + ms["teacher"] + ms[host]), 4)
            for name in methods
            if name.startswith("uet+") and (host := name.removeprefix("uet+").partition(",")[0])
        },
    }


def random_batch(setting: Setting) -> Batch:
    """Noise with `BOXES` boxes an image."""
    generator = torch.Generator().manual_seed(0)
    size = setting.size
    images = torch.randint(0, 256, (setting.images, 3, size, size), generator=generator, dtype=torch.uint8)
    targets = []
    for i in range(setting.images):
        corner = torch.rand(BOXES, 2, generator=generator) * size * 0.6
        side = torch.rand(BOXES, 2, generator=generator) * size * 0.3 + size * 0.08
        targets.append(
            Target(
                boxes=torch.cat((corner, corner + side), 1),
                labels=torch.randint(0, setting.classes, (BOXES,), generator=generator),
                ignore=torch.zeros(BOXES, dtype=torch.bool),
                scores=None,
                image_id=i,
                size=(size, size),
                original_size=(size, size),
            )
        )
    return Batch(images, targets)


if __name__ == "__main__":
    sys.exit(main())
