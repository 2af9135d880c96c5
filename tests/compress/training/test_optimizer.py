"""Groups of parameters with learning rates and weight decay of their own."""

from __future__ import annotations

import torch
from torch import nn

from compress.config.train import Optimizer
from compress.training.optimizer import build_optimizer


def model() -> nn.Module:
    parts = {"backbone": nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)), "head": nn.Linear(4, 2)}
    return nn.ModuleDict({"student": nn.ModuleDict(parts)})


def test_one_group_by_default() -> None:
    (group,) = build_optimizer(model(), Optimizer(lr=0.1, weight_decay=0.2)).param_groups
    assert len(group["params"]) == 6 and group["weight_decay"] == 0.2 and group["factor"] == 1.0


def test_backbone_and_norms_apart() -> None:
    module = model()
    optimizer = build_optimizer(
        module, Optimizer(name="adamw", lr=0.1, weight_decay=0.2, backbone=0.5, decay_norms=False)
    )
    names = {id(p): name for name, p in module.named_parameters()}
    found = {
        (group["factor"], group["weight_decay"]): sorted(names[id(p)] for p in group["params"])
        for group in optimizer.param_groups
    }
    assert found == {
        (1.0, 0.2): ["student.head.weight"],
        (1.0, 0.0): ["student.head.bias"],
        (0.5, 0.2): ["student.backbone.0.weight"],
        (0.5, 0.0): ["student.backbone.0.bias", "student.backbone.1.bias", "student.backbone.1.weight"],
    }
    assert optimizer.param_groups[0]["factor"] == 1.0, "the log shows the first group's learning rate"


def test_frozen_parameters_take_no_part() -> None:
    module = model()
    module.requires_grad_(False)
    module.get_submodule("student.head").requires_grad_(True)
    assert sum(len(g["params"]) for g in build_optimizer(module, Optimizer(backbone=0.1)).param_groups) == 2
    assert isinstance(build_optimizer(module, Optimizer()), torch.optim.SGD)
