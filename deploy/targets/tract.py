"""tract, the runtime of Rust: ONNX with a fixed batch and int32 labels. It knows neither a batch that is open where
maps are enlarged, nor 64-bit integers as an output."""

from __future__ import annotations

from pathlib import Path

from deploy.core.card import Form
from deploy.graph.form import reform


def make(source: Path, place: Path) -> str:
    """See `deploy.targets.table.Target`."""
    card = reform(source, place, Form(batch=1, labels="int32"))
    return f"{place.stat().st_size / 1e6:.1f} MB; {card.form.in_words()}"
