"""What was found of each file in each runtime, and the table of it."""

from __future__ import annotations

from dataclasses import dataclass

from deploy.targets.table import TARGETS

PRECISIONS = ("fp32", "fp16", "int8")
MOST = {"fp32": 0.1, "fp16": 0.1, "int8": 0.5}
"""Points of mAP that a file may be away from the same file in ONNX Runtime."""
RUNTIMES = [name for name, target in TARGETS.items() if target.runs]
"""Those that Python can call, so that `validate` and `benchmark` run them."""


@dataclass(frozen=True)
class Row:
    """runtime, precision: of the file. drop: mAP points below the same file in ONNX Runtime; agreement: share of its
    detections that are found again; times: of its p50 on one image. refused: why there is no such file."""

    runtime: str
    precision: str
    map: float | None = None
    drop: float | None = None
    agreement: float | None = None
    times: float | None = None
    refused: str | None = None


ROWS: list[Row] = []


def table() -> list[str]:
    """Lines of Markdown."""
    lines = ["| runtime | file | mAP | drop | same detections | time |", "|---|---|---|---|---|---|"]
    for row in ROWS:
        if row.refused is not None:
            lines.append(f"| {row.runtime} | {row.precision} | refused: {row.refused} | | | |")
            continue
        assert row.map is not None and row.drop is not None and row.agreement is not None and row.times is not None
        drop = round(row.drop, 2) + 0.0
        found = f"{row.map:.2f} | {drop:.2f} | {row.agreement:.1%} | {row.times:.1f} ×"
        lines.append(f"| {row.runtime} | {row.precision} | {found} |")
    return lines
