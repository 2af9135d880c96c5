"""Checkpoints as mmdet writes them: names and shapes by rule, and files of them."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

DEPTHS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3)}

Shapes = dict[str, tuple[int, ...]]


def official_shapes(depth: int, *, classes: int = 80, width: int = 256, towers: int = 4) -> Shapes:
    """Name → shape of every entry of mmdet's GFL with ResNet-`depth`, in the order of its state dict."""
    shapes: Shapes = {}

    def norm(name: str, channels: int) -> None:
        for part in ("weight", "bias", "running_mean", "running_var"):
            shapes[f"{name}.{part}"] = (channels,)
        shapes[f"{name}.num_batches_tracked"] = ()

    shapes["backbone.conv1.weight"] = (64, 3, 7, 7)
    norm("backbone.bn1", 64)
    expansion = 1 if depth < 50 else 4
    inputs = 64
    for stage, blocks in enumerate(DEPTHS[depth], start=1):
        inner = 64 * 2 ** (stage - 1)
        for block in range(blocks):
            name = f"backbone.layer{stage}.{block}"
            if expansion == 1:
                convs = [(inner, inputs, 3), (inner, inner, 3)]
            else:
                convs = [(inner, inputs, 1), (inner, inner, 3), (inner * 4, inner, 1)]
            for number, (out, into, kernel) in enumerate(convs, start=1):
                shapes[f"{name}.conv{number}.weight"] = (out, into, kernel, kernel)
                norm(f"{name}.bn{number}", out)
            if block == 0 and inputs != inner * expansion:
                shapes[f"{name}.downsample.0.weight"] = (inner * expansion, inputs, 1, 1)
                norm(f"{name}.downsample.1", inner * expansion)
            inputs = inner * expansion
    for level in range(3):
        shapes[f"neck.lateral_convs.{level}.conv.weight"] = (width, expansion * 128 * 2**level, 1, 1)
        shapes[f"neck.lateral_convs.{level}.conv.bias"] = (width,)
    for level in range(5):
        shapes[f"neck.fpn_convs.{level}.conv.weight"] = (width, width, 3, 3)
        shapes[f"neck.fpn_convs.{level}.conv.bias"] = (width,)
    for tower in ("cls_convs", "reg_convs"):
        for number in range(towers):
            shapes[f"bbox_head.{tower}.{number}.conv.weight"] = (width, width, 3, 3)
            shapes[f"bbox_head.{tower}.{number}.gn.weight"] = (width,)
            shapes[f"bbox_head.{tower}.{number}.gn.bias"] = (width,)
    for branch, outputs in (("gfl_cls", classes), ("gfl_reg", 68)):
        shapes[f"bbox_head.{branch}.weight"] = (outputs, width, 3, 3)
        shapes[f"bbox_head.{branch}.bias"] = (outputs,)
    for level in range(5):
        shapes[f"bbox_head.scales.{level}.scale"] = ()
    shapes["bbox_head.integral.project"] = (17,)
    return shapes


def blank(shapes: Shapes) -> dict[str, Tensor]:
    """Zeros that take no room in memory or on disk."""
    return {
        name: torch.zeros((), dtype=torch.int64) if "num_batches" in name else torch.zeros(()).expand(shape)
        for name, shape in shapes.items()
    }


def write_official(path: Path, state: dict[str, Tensor], **settings: bool) -> Path:
    torch.save({"meta": {"CLASSES": ("a", "b"), "epoch": 12}, "state_dict": state}, path, **settings)
    return path


SMALL = official_shapes(18, classes=3, width=256, towers=1)
