"""The report as one table on the terminal. Public: `summary_table(report)`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from compress.manifest import STUDENT
from compress.report.document import parse_report
from compress.report.text import figure, lower


def summary_table(report: Mapping[str, Any]) -> Table:
    """Teacher, baseline, student, what else a pruned student is compared with, and every artifact of a report.json, a
    row each.

    A dash is a figure that was not measured or does not apply. Raises UserError for a malformed report.
    """
    document = parse_report(report)
    table = Table(
        title=Text(document.name),
        caption="mAP in percent · drop in points of mAP, below the reference and below training · – not measured",
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
        figures = document.models.of(role)
        if figures is None:
            table.add_row(Text(lower(title)), *["–"] * 7, Text("not in this run", style="dim"))
        else:
            table.add_row(
                Text(lower(title), style="bold" if role == STUDENT else ""),
                figure(figures.map, 1),
                "–",
                "–",
                figure(figures.params_m, 2),
                figure(figures.gflops, 2),
                "–",
                "–",
                "",
            )
    if not document.artifacts:
        table.add_row(Text("artifacts"), *["–"] * 7, Text("none exported", style="dim"))
    for index, a in enumerate(document.artifacts):
        style = {"pass": "bold green", "fail": "bold red"}.get(a.gate, "yellow")
        if index == 0:
            table.add_section()
        table.add_row(
            Text(a.file),
            figure(a.map, 1),
            figure(a.map_drop, 2),
            figure(a.training_drop, 2),
            "–",
            "–",
            figure(a.p50, 2),
            figure(a.p99, 2),
            Text(a.gate, style=style),
        )
    return table
