"""Latency of a detector, and how certain the figure is.

    measured = benchmark({"student": runner}, images)            closed loop: single-stream, multi-stream, offline
    measured = benchmark_server({"student": runner}, images, rates_ips=[50])            open loop: Poisson arrivals

`results` holds what comes out and how it is written and read, `scopes` what a call is, `statistics` how sure the
figures are, `compare` which artifact is faster, `show` and `picture` what people see.
"""

from __future__ import annotations

from deploy.latency.compare import compare_cells, compare_reports, slower
from deploy.latency.measure import benchmark, doubts
from deploy.latency.results import (
    BenchmarkReport,
    BoundedThroughput,
    Cell,
    Comparison,
    Estimate,
    Scenario,
    Scope,
    read_report,
    write_report,
)
from deploy.latency.scopes import SCOPES, USUAL_SCOPES
from deploy.latency.server import benchmark_server
from deploy.latency.show import bounded_lines, comparison_table, offline_lines, report_table, write_markdown
from deploy.latency.statistics import PERCENTILES

__all__ = [
    "PERCENTILES",
    "SCOPES",
    "USUAL_SCOPES",
    "BenchmarkReport",
    "BoundedThroughput",
    "Cell",
    "Comparison",
    "Estimate",
    "Scenario",
    "Scope",
    "benchmark",
    "benchmark_server",
    "bounded_lines",
    "compare_cells",
    "compare_reports",
    "comparison_table",
    "doubts",
    "offline_lines",
    "read_report",
    "report_table",
    "slower",
    "write_markdown",
    "write_report",
]
