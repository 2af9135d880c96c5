"""Cost that each distillation method adds to a training step on the CPU.

    python -m benchmarks method_cost

Random weights and images. Every case is one thread's CPU time in ms, the smallest of several calls taken in turn, so
that neighbours on the machine disturb little. `student`: forward, detection loss and backward; `teacher`: the forward
pass that all methods need once a step. A method's figure is a step with it minus a step without, both with the
teacher's pass: its forward and backward pass through its own layers, not the student's backbone, which is walked once
whatever the methods are.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from benchmarks.lib import options
from benchmarks.lib.random_batch import Setting, random_batch
from benchmarks.lib.results import Case, Row
from compress.config.methods import Methods
from compress.config.model import Model
from compress.detectors.base import freeze
from compress.detectors.build import build_detector
from compress.distill.build import METHODS, build_methods
from compress.distill.method import Outputs

HOSTS = tuple(name for name, record in METHODS.items() if record.needs_teacher)


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


def add_options(parser: argparse.ArgumentParser) -> None:
    options.repeats(parser, 7)
    parser.add_argument("--only", choices=SETTINGS, help="one of the two settings")


def run(args: argparse.Namespace) -> Iterator[Case]:
    torch.set_num_threads(1)
    for name in [args.only] if args.only else list(SETTINGS):
        setting = SETTINGS[name]
        best = least_ms(steps(setting), args.repeats)
        case = f"{setting.student.backbone} of {setting.teacher.backbone}, {setting.images} images of {setting.size}"
        yield Case(case, rows(best, args.repeats))


def wanted_methods() -> dict[str, Methods]:
    """The methods in the order of `HOSTS`, then UET around one of each kind."""
    wanted = {name: Methods.model_validate({name: {}}) for name in HOSTS}
    wanted |= {f"uet+{of}": Methods.model_validate({of: {}, "uet": {"of": of}}) for of in ("fgd", "bckd")}
    for samples in (10, 15):
        uet = {"of": "fgd", "samples": samples}
        wanted[f"uet+fgd, N={samples}"] = Methods.model_validate({"fgd": {}, "uet": uet})
    return wanted


def steps(setting: Setting) -> dict[str, Callable[[], object]]:
    """Return what is timed: the whole student, the teacher's pass, the student's head alone, and with each method."""
    student = build_detector(setting.student, setting.classes, 0).train()
    teacher = freeze(build_detector(setting.teacher, setting.classes, 1))
    batch = random_batch(setting)
    methods = {name: build_methods(m, student, teacher) for name, m in wanted_methods().items()}

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
            for weighted in methods[name].values():
                losses |= weighted.method(ours, taught, batch)
        torch.stack(list(losses.values())).sum().backward()

    def whole_student() -> None:
        prediction = student.predict(student.features(batch.images))
        losses = student.loss(prediction, student.assign(prediction, batch.targets))
        torch.stack(list(losses.values())).sum().backward()

    with torch.no_grad():
        features = student.features(batch.images)
    taught = pass_of_teacher()
    cases: dict[str, Callable[[], object]] = {"student": whole_student, "teacher": pass_of_teacher}
    return cases | {"head": partial(step, None)} | {name: partial(step, name) for name in methods}


def least_ms(cases: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """The least CPU time of each case in ms, in turn; the first call, which allocates, does not count."""
    best = dict.fromkeys(cases, float("inf"))
    for repeat in range(repeats + 1):
        for name, call in cases.items():
            start = time.thread_time()
            call()
            if repeat:
                best[name] = min(best[name], 1000 * (time.thread_time() - start))
    return best


def rows(best: dict[str, float], repeats: int) -> list[Row]:
    """Compute what each method adds, and UET's share of the whole step: student, teacher and base method."""
    added = {name: ms - best["head"] for name, ms in best.items() if name not in ("student", "teacher", "head")}
    made = [Row(name, "time", best[name], "ms", n=repeats) for name in ("student", "teacher")]
    made += [Row(name, "added time", ms, "ms", n=repeats) for name, ms in added.items()]
    for name, ms in added.items():
        if name.startswith("uet+"):
            host = added[name.removeprefix("uet+").partition(",")[0]]
            share = (ms - host) / (best["student"] + best["teacher"] + host)
            made.append(Row(name, "share of a step", share, n=repeats))
    return made
