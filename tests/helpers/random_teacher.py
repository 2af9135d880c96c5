"""Small detectors with random weights as teachers of pseudo labels, and what two of them label."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from compress.config.model import Model
from compress.detectors.build import assemble
from compress.detectors.checkpoints import ModelRecord, save_detector
from compress.pseudo import parts
from compress.pseudo.images import images_in
from compress.pseudo.label import pseudo_label
from compress.pseudo.settings import Settings

SMALL = Settings(tau=0.6, tau_ignore=0.5, short=64, long=96, batch_size=2)


def teacher(path: Path, names: tuple[str, ...], seed: int, **said: Any) -> str:
    """Random, with scores all over 0..1 and small boxes that do not all suppress each other. said: what its
    record says besides."""
    model = Model(backbone="nano", neck_channels=32, head_depth=0)
    record = ModelRecord(model=model, num_classes=len(names), class_names=names, **said)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        detector = assemble(model, len(names))
        with torch.no_grad():
            detector.head.gfl_cls.weight.normal_(std=0.2)
            detector.head.gfl_cls.bias.zero_()  # type: ignore[union-attr]
            detector.head.gfl_reg.bias.view(4, -1)[:, 1] = 6  # type: ignore[union-attr]  # boxes of two strides
    save_detector(path, detector, metadata=record)
    return str(path)


def make(world: Path, out: Path, **options: Any) -> parts.Summary | None:
    """Label the folder with both teachers, unless given others."""
    chosen: dict[str, Any] = {"table": {"kitten": "cat"}, "quiet": True, "device": torch.device("cpu")} | options
    checkpoints = chosen.pop("teachers", [str(world / "a.safetensors"), str(world / "b.safetensors")])
    images = chosen.pop("images", None) or images_in(world / "images")
    settings = chosen.pop("settings", SMALL)
    return pseudo_label(checkpoints, images, out, settings, **chosen)


def interrupt_after(monkeypatch: pytest.MonkeyPatch, chunks: int) -> None:
    """End labelling as Ctrl-C does, after so many chunks."""
    done = 0

    def append(*arguments: Any) -> None:
        nonlocal done
        if done == chunks:
            raise KeyboardInterrupt
        done += 1
        original(*arguments)

    original = parts.append
    monkeypatch.setattr(parts, "append", append)
