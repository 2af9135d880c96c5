"""Apache TVM: ONNX with a fixed batch. Its importer knows no open batch where maps are enlarged (seen with 0.27).

Whoever ships it compiles it for the device, with `tvm.relax.frontend.onnx.from_onnx`; here `deploy.runtimes.tvm` does
for this machine."""

from __future__ import annotations

from pathlib import Path

from deploy.core.card import Form
from deploy.graph.form import reform


def make(source: Path, place: Path) -> str:
    """See `deploy.targets.table.Target`."""
    card = reform(source, place, Form(batch=1))
    return f"{place.stat().st_size / 1e6:.1f} MB; {card.form.in_words()}; for tvm.relax.frontend.onnx.from_onnx"
