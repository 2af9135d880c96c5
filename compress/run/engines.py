"""Engines of exported files, with neither torch nor onnx: machines that build them need no more than TensorRT."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from compress.console import progress
from deploy.tensorrt.build import TIMING_CACHES, build_engine
from deploy.tensorrt.card import EngineCard, EngineOptions


@dataclass(frozen=True)
class EnginePlan:
    """Plan of engine builds. timing_caches: folder of the times that TensorRT measured before."""

    options: EngineOptions = field(default_factory=EngineOptions)
    timing_caches: Path = TIMING_CACHES


def build(onnx: Path, engine: Path, plan: EnginePlan) -> EngineCard:
    """Build an ONNX file for this machine, and show how far it is. Raises UserError."""
    with progress(f"building {engine.name}") as step:
        return build_engine(onnx, engine, plan.options, timing_caches=plan.timing_caches, progress=step)


def in_words(card: EngineCard) -> str:
    """The facts of an engine's card in one line."""
    share = ", ".join(f"{part:.0%} {name}" for name, part in card.network.share.items())
    layers = f"{card.layers.count} layers" if card.layers is not None else f"layers not known ({card.layers_missing})"
    smallest, best, largest = card.options.batches
    return (
        f"{card.engine_bytes / 1e6:.1f} MB in {card.build_seconds:.0f} s with {card.machine.library} "
        f"{card.machine.version} for {card.machine.gpu or 'no GPU'}; batch {smallest} to {largest}, best at {best}; "
        f"convolutions and matrix products {share}; {layers}"
    )
