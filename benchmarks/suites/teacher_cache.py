"""Time of a distillation step with the teacher's outputs from disk, beside one with the teacher and one without.

    python -m benchmarks teacher_cache
    python -m benchmarks teacher_cache --methods "{bckd: {}}"

The models, methods and training of a recipe (the quickstart's, unless another is named) on a few of its pictures. A
step is what training does: the batch from the loader, forward and backward pass of the whole loss, clipping, the
optimizer; a block of 20 steps has one in which the gradient norms of `weight: auto` are measured. `plain` has no
teacher, `teacher` runs it in every step, `cache` reads what was kept. Blocks of the three are taken in turn; a ratio is
the median over the rounds of the blocks of one round, of the process's CPU time and of wall time. A pruned student has
random weights here, and channels that left at random.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import torch
from lightning.fabric import Fabric

from benchmarks.lib import blocks, options
from benchmarks.lib.results import Case
from compress.config.recipe import Recipe, load_recipe
from compress.data.loader import train_loader
from compress.data.views import Views
from compress.detectors.base import freeze
from compress.detectors.build import build_detector
from compress.detectors.checkpoints import load_teacher_checkpoint
from compress.distill.weighting import MEASURE_EVERY, TrainingPosition
from compress.run.data import Datasets, open_data
from compress.run.plans import data_plan, distillation_plan, with_whole_student
from compress.run.pruned import rehearse_cut
from compress.training.learner import Learner, total_loss
from compress.training.optimizer import build_optimizer
from deploy.core.errors import UserError

PICTURES, VIEWS = 64, 2
BAR = "<= 1.15"  # of the time of a plain step


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", nargs="?", type=Path, default=Path("recipes/quickstart.yaml"))
    parser.add_argument("--methods", metavar="YAML", help="in the place of the recipe's")
    options.repeats(parser, 9)
    options.threads(parser, 1)
    options.settings(parser)


def run(args: argparse.Namespace) -> Iterator[Case]:
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as folder:
        recipe = small(args.recipe, Path(folder), [*args.set, *([f"methods={args.methods}"] if args.methods else [])])
        found = blocks.in_turn(cases(recipe), args.repeats, MEASURE_EVERY)
    methods = "+".join(recipe.methods.enabled())
    uet = "" if recipe.methods.uet is None else ", uet"
    yield Case(f"{args.recipe.stem}, {methods}{uet}", blocks.rows(found, "plain", {"cache": BAR}))


def small(path: Path, folder: Path, settings: list[str]) -> Recipe:
    """The recipe on a few pictures, with views and a cache below `folder`."""
    recipe = load_recipe(path, [f"runs={folder / 'runs'}", *settings, f"train.views={VIEWS}"])
    if recipe.data.synthetic is None or recipe.teacher is None or recipe.teacher.checkpoint is None:
        raise UserError(f"{path}: needs data.synthetic and teacher.checkpoint")
    synthetic = recipe.data.synthetic.model_copy(update={"train": PICTURES, "val": 8})
    teacher = recipe.teacher.model_copy(update={"cache": folder / "cache"})
    return with_whole_student(
        recipe.model_copy(update={"data": recipe.data.model_copy(update={"synthetic": synthetic}), "teacher": teacher})
    )


def cases(recipe: Recipe) -> dict[str, Callable[[], None]]:
    """A step of each case; those with a teacher have seen all views."""
    data = open_data(data_plan(recipe), Fabric(accelerator="cpu", devices=1))
    made = {name: training_step(recipe, data, name) for name in ("plain", "teacher", "cache")}
    for _ in range(VIEWS * PICTURES // recipe.train.batch_size):
        made["cache"]()
    return made


def training_step(recipe: Recipe, data: Datasets, case: str) -> Callable[[], None]:
    """A function that trains one step more."""
    classes, learns = len(data.train.categories), distillation_plan(recipe)
    model = recipe.student.built()
    if recipe.student.prune is not None:
        model = rehearse_cut(recipe.student, classes, data.canvas, recipe.seed)
    student = build_detector(model, classes, recipe.seed).train()
    assert recipe.teacher is not None and recipe.teacher.checkpoint is not None
    teacher = freeze(load_teacher_checkpoint(recipe.teacher.checkpoint)[0])
    methods = {} if case == "plain" else learns.build(student, teacher, seed=recipe.seed)
    cache = learns.open_cache(teacher, recipe.train.precision) if case == "cache" else None
    learner = Learner(student, methods, teacher, None, cache).train()
    optimizer = build_optimizer(learner, recipe.train.optimizer)
    batches = iter(
        train_loader(
            data.train,
            batch_size=recipe.train.batch_size,
            seed=recipe.seed,
            workers=0,
            views=Views(VIEWS, recipe.seed),
            keys=cache is not None,
        )
    )
    position = TrainingPosition(0, 10**6, PICTURES // recipe.train.batch_size)

    def step() -> None:
        nonlocal position
        total_loss(learner(next(batches).to("cpu"), position)).backward()
        torch.nn.utils.clip_grad_norm_(learner.parameters(), recipe.train.clip_norm or float("inf"))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        position = replace(position, step=position.step + 1)

    return step
