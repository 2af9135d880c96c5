"""Optimizer, learning rate and moving average of the weights, as a recipe's `train` section says."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from compress.config.train import Optimizer, Schedule
from compress.detectors.base import in_backbone


def build_optimizer(module: nn.Module, settings: Optimizer, *, fused: bool = False) -> torch.optim.Optimizer:
    """SGD or AdamW over the parameters of `module` that train. Each group has its `factor` on the learning rate.

    fused: AdamW's arithmetic in one pass, on the CPU four times as fast. Not with fp16, whose gradients are to be
    clipped after they were scaled back.
    """
    parameters = _groups(module, settings)
    if settings.name == "sgd":
        return torch.optim.SGD(
            parameters, lr=settings.lr, momentum=settings.momentum, weight_decay=settings.weight_decay
        )
    return torch.optim.AdamW(
        parameters,
        lr=settings.lr,
        betas=(settings.momentum, 0.999),
        weight_decay=settings.weight_decay,
        fused=fused or None,
    )


def _groups(module: nn.Module, settings: Optimizer) -> list[dict[str, Any]]:
    """One group, unless settings tell parts apart; the first is not the backbone's."""
    named = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
    groups: dict[tuple[float, float], list[nn.Parameter]] = {(1.0, settings.weight_decay): []}
    for name, p in named:
        factor = settings.backbone if in_backbone(name) else 1.0
        decay = settings.weight_decay if settings.decay_norms or p.dim() > 1 else 0.0
        groups.setdefault((factor, decay), []).append(p)
    return [
        {"params": found, "factor": factor, "weight_decay": decay} for (factor, decay), found in groups.items() if found
    ]


def learning_rate(schedule: Schedule, total: int, steps_per_epoch: int) -> Callable[[int], float]:
    """Factor on the learning rate at a step (0-based): linear warm-up, times steps or a half cosine.

    Warm-up is mmdet's LinearLR: warmup_factor at step 0, 1 at step `warmup_steps`.
    """
    milestones = [epoch * steps_per_epoch for epoch in schedule.milestones]

    def factor(step: int) -> float:
        if schedule.name == "multistep":
            value = schedule.gamma ** sum(step >= milestone for milestone in milestones)
        else:
            progress = max(0, step - schedule.warmup_steps) / max(1, total - schedule.warmup_steps)
            value = 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
        if step < schedule.warmup_steps:
            start = schedule.warmup_factor
            value *= start + (1 - start) * step / schedule.warmup_steps
        return value

    return factor


def moving_average(module: nn.Module, decay: float | None) -> AveragedModel | None:
    """Exponential moving average of parameters and buffers; None where `decay` is None.

    The decay grows towards `decay` with the steps (`ramped`): at a constant one, the average of a short training would
    be its first step, nearly untrained.
    """
    if decay is None:
        return None

    def update(averages: Any, values: Any, steps: Any) -> None:
        get_ema_multi_avg_fn(ramped(decay, int(steps)))(averages, values, steps)

    return AveragedModel(module, multi_avg_fn=update, use_buffers=True)


def ramped(decay: float, steps: int) -> float:
    """Decay of a moving average after so many steps: 1 - (1 + steps)^(-2/3), at most `decay`. This is the warm-up of
    timm's ModelEmaV3 with its own settings; 0.99 is reached at 1,000 steps, 0.999 at 32,000."""
    return min(decay, 1 - (1 + steps) ** (-2 / 3))
