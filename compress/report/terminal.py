"""The report as one table on the terminal. Public: `summary_table(report)`, `doubt_lines(report, run_dir)`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from compress.manifest import STUDENT
from compress.report.document import Artifact
from compress.report.reading import parse_report
from compress.report.text import figure, lower


def summary_table(report: Mapping[str, Any]) -> Table:
    """Teacher, baseline, student, what else a pruned student is compared with, and every file of a report.json, a row
    each. A model's latency is that in PyTorch.

    A dash is a figure that was not measured or does not apply. Raises UserError for a malformed report.
    """
    document = parse_report(report)
    doubtful = any(a.latency_doubts for a in document.artifacts)
    table = Table(
        title=Text(document.name),
        caption="mAP in percent · drop in points of mAP, below the reference and below training · – not measured"
        + " · ? not measured well" * doubtful,
        box=SIMPLE_HEAD,
        padding=(0, 1, 0, 0),  # so that it fits into 80 columns
        pad_edge=False,
        show_edge=False,
        title_style="bold",
        title_justify="left",
        caption_justify="left",
    )
    table.add_column("", no_wrap=True, overflow="fold")
    for name in ("mAP", "drop", "drop,\ntrain", "params\nM", "GFLOPs", "p50\nms", "p99\nms"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("gate", min_width=7)
    for role, title in document.models.titles.items():
        figures, row = document.models.of(role), document.in_torch(role)
        if figures is None:
            table.add_row(Text(lower(title)), *["–"] * 7, Text("not in this run", style="dim"))
            continue
        table.add_row(
            Text(lower(title), style="bold" if role == STUDENT else ""),
            figure(figures.map, 1),
            "–",
            figure(row.training_drop if row else None, 2),
            figure(figures.params_m, 2),
            figure(figures.gflops, 2),
            *_times(row),
            _reference(row) if role == STUDENT else "",
        )
    if not document.files:
        table.add_row(Text("artifacts"), *["–"] * 7, Text("none exported", style="dim"))
    for index, a in enumerate(document.files):
        if index == 0:
            table.add_section()
        table.add_row(
            Text(a.file),
            figure(a.map, 1),
            figure(a.map_drop, 2),
            figure(a.training_drop, 2),
            "–",
            "–",
            *_times(a),
            _gate(a),
        )
    return table


def doubt_lines(report: Mapping[str, Any], run_dir: Path) -> list[str]:
    """Say which latencies were not measured well, why, and how to repeat them; empty where all were."""
    document = parse_report(report)
    found: dict[str, list[Artifact]] = {}
    for a in document.artifacts:
        if a.latency_doubts:
            found.setdefault("; ".join(a.latency_doubts), []).append(a)
    lines = [f"latency not measured well ({', '.join(a.label for a in rows)}): {why}" for why, rows in found.items()]
    files = dict.fromkeys(a.file.partition(" ")[0] for rows in found.values() for a in rows if a in document.files)
    if files:
        lines.append(f"when the machine is quiet: compress benchmark {' '.join(str(run_dir / file) for file in files)}")
    return lines


# --- details --------------------------------------------------------------------------------------------


def _times(a: Artifact | None) -> tuple[str, str]:
    """Median and p99, the median with a mark where it was not measured well."""
    if a is None:
        return "–", "–"
    return figure(a.p50, 2) + "?" * bool(a.latency_doubts), figure(a.p99, 2)


def _gate(a: Artifact) -> Text:
    return Text(a.gate, style={"pass": "bold green", "fail": "bold red"}.get(a.gate, "yellow"))


def _reference(row: Artifact | None) -> Text | str:
    """The student is what its files are compared with; its own gate is the one against training."""
    return "" if row is None else Text("reference", style="dim") if row.gate == "pass" else _gate(row)
