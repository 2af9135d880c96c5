"""The report of a run: one self-contained HTML page, and one table for the terminal.

Public: `build_report(run_dir)`, `compare_runs(run_dirs, out)`, `summary_table(report)` and
`doubt_lines(report, run_dir)`.
"""

from __future__ import annotations

from compress.report.compare import compare_runs
from compress.report.page import build_report
from compress.report.terminal import doubt_lines, summary_table

__all__ = ["build_report", "compare_runs", "doubt_lines", "summary_table"]
