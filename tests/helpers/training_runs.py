"""Parts of a run of the tiny recipe: training the student, its last checkpoint, equality of what they hold."""

from __future__ import annotations

from dataclasses import replace

import torch
from lightning.fabric import Fabric

from compress.config.recipe import Recipe
from compress.run import plans, trainings
from compress.run.data import open_data


def fabric() -> Fabric:
    return Fabric(accelerator="cpu", devices=1)


def train(recipe: Recipe, *, max_steps: int | None = None, resume: bool = False, identity: str = "a") -> None:
    f = fabric()
    plan = replace(plans.student_plan(recipe), identity={"of": identity})
    trainings.train(f, plan, open_data(plans.data_plan(recipe), f), resume=resume, max_steps=max_steps)


def last_checkpoint(recipe: Recipe) -> dict:
    return torch.load(recipe.run_dir / "student" / "checkpoints" / "last.ckpt", weights_only=True)


def assert_same(a: object, b: object) -> None:
    """Bit for bit, through dicts and lists; training time is not compared."""
    if isinstance(a, torch.Tensor):
        assert isinstance(b, torch.Tensor) and torch.equal(a, b)
    elif isinstance(a, dict):
        assert isinstance(b, dict) and a.keys() == b.keys()
        for key in a:
            if key != "seconds":
                assert_same(a[key], b[key])
    elif isinstance(a, (list, tuple)):
        assert isinstance(b, (list, tuple)) and len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_same(x, y)
    else:
        assert a == b or (a != a and b != b)
