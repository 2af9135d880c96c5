"""The report of a run: one self-contained HTML page, and one table for the terminal.

Public: `build_report(run_dir)` and `summary_table(report)`.
"""

from __future__ import annotations

from compress.report.page import build_report
from compress.report.terminal import summary_table

__all__ = ["build_report", "summary_table"]
