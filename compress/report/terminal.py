"""The report as one table on the terminal. Public: `summary_table(report)`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.table import Table
from rich.text import Text

from compress.report.document import ROLES, parse_report
from compress.report.text import figure


def summary_table(report: Mapping[str, Any]) -> Table:
    """Teacher, baseline, student and every artifact of a report.json, a row each.

    A dash is a figure that was not measured or does not apply. Raises UserError for a malformed report.
    """
    document = parse_report(report)
    table = Table(
        title=Text(document.name),
        caption="mAP in percent · drop in points of mAP, below the reference and below training · – not measured",
        title_style="bold",
        title_justify="left",
        caption_justify="left",
    )
    table.add_column("", no_wrap=True, overflow="fold")
    for name in ("mAP", "drop", "training", "params M", "GFLOPs", "p50 ms", "p99 ms"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("gate")
    for role in ROLES:
        figures = getattr(document.models, role)
        if figures is None:
            table.add_row(Text(role), *["–"] * 7, Text("not in this run", style="dim"))
        else:
            table.add_row(
                Text(role, style="bold" if role == "student" else ""),
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
