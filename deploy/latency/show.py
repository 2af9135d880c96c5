"""Results for people: tables for the terminal, and one Markdown document."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from rich.markup import escape
from rich.table import Table

from deploy.core.files import write_text
from deploy.latency.picture import latency_picture
from deploy.latency.results import BenchmarkReport, BoundedThroughput, Cell, Comparison, Estimate
from deploy.latency.statistics import PERCENTILES, name_of

METHOD = (
    "95 % intervals: block bootstrap over rounds (expanded percentile interval; rounds that resemble their "
    "neighbours are joined first). Comparisons in one run: randomisation test over rounds; of two results: Welch's t "
    "on log figures with that bootstrap's variance; p after Holm's correction, significant below 0.01."
)
TOO_FEW = "(in parentheses: too few calls for that percentile; it describes these calls only)"

Rows = list[list[str]]


def report_table(report: BenchmarkReport) -> Table:
    """Milliseconds a call (in the server scenario: a request), intervals of 95 %."""
    headings, rows = _figures(report)
    few = any(not found.supported for cell in report.cells for found in cell.latency_ms.values())
    scenario = report.cells[0].scenario if report.cells else ""
    unit = "a request, from its arrival" if scenario == "server" else "a call"
    title = f"Latency in ms {unit} [95 % confidence], {scenario}"
    return _table(title, headings, rows, TOO_FEW if few else None)


def comparison_table(comparisons: Sequence[Comparison], *, tolerance: float) -> Table:
    """Old against new, or each artifact against the first. tolerance: a share."""
    headings, rows = _comparisons(comparisons)
    return _table(f"Comparison{_tolerance(tolerance)}", headings, rows, None)


def bounded_lines(bounded: Sequence[BoundedThroughput]) -> list[str]:
    """Result of the search for the highest rate, a line an artifact."""
    return [
        f"{found.runner}: p99 stays within {found.bound_ms:g} ms up to {found.rate_ips:.4g} requests/s "
        f"({len(found.probes)} trials)"
        if found.rate_ips is not None
        else f"{found.runner}: no rate keeps p99 within {found.bound_ms:g} ms: {found.reason}"
        for found in bounded
    ]


def offline_lines(cells: Sequence[Cell]) -> list[str]:
    """The batch size with the most images a second, a line an artifact and scope."""
    lines = []
    for runner, scope in dict.fromkeys((cell.runner, cell.scope) for cell in cells if cell.scenario == "offline"):
        mine = [cell for cell in cells if (cell.runner, cell.scope) == (runner, scope)]
        best = max(mine, key=lambda cell: cell.throughput_ips.value)
        low = best.throughput_ips.low
        equal = [
            str(cell.batch_size)
            for cell in mine
            if cell is not best and low is not None and (cell.throughput_ips.high or 0.0) >= low
        ]
        also = f"; its interval meets that of batch {', '.join(equal)}" if equal else ""
        lines.append(
            f"{runner}, {scope}: most images a second at batch {best.batch_size}: "
            f"{_with_interval(best.throughput_ips)}{also}"
        )
    return lines


def write_markdown(path: Path, report: BenchmarkReport) -> None:
    """The report as Markdown at `path`, with its picture beside it as SVG of the same name."""
    path = Path(path)
    picture = path.with_suffix(".svg")
    write_text(picture, latency_picture(report.cells))
    scenario = report.settings.get("scenario", "")
    parts = [f"# Latency, {scenario}\n", _markdown(*_figures(report)), f"\n{TOO_FEW[1:-1].capitalize()}.\n"]
    parts += [f"\n- {line}" for line in [*offline_lines(report.cells), *bounded_lines(report.bounded)]]
    parts.append(f"\n\n![Latency by percentile]({picture.name})\n")
    if report.comparisons:
        tolerance = _tolerance(report.settings.get("tolerance", 0.0))
        parts += [f"\n## Against {report.comparisons[0].base}{tolerance}\n\n"]
        parts += [_markdown(*_comparisons(report.comparisons))]
    lists = {"Warnings": report.warnings, "Notes": [*report.notes, METHOD], "Machine": _machine(report)}
    for title, lines in lists.items():
        if lines:
            parts.append(f"\n## {title}\n\n" + "".join(f"- {line}\n" for line in lines))
    write_text(path, "".join(parts))


# ----------------------------------------------------------------------------------------------------


def _figures(report: BenchmarkReport) -> tuple[list[str], Rows]:
    """Headings and rows; columns that say the same in every row of a usual report are left out."""
    cells = report.cells
    names = _short_names([cell.runner for cell in cells])
    streams, server = any(cell.streams > 1 for cell in cells), any(cell.offered_ips for cell in cells)
    clocks = len({cell.clock for cell in cells}) > 1
    compared = any(report.speedup(cell) for cell in cells)
    headings = ["artifact", "backend", "scope"]
    headings += ["clock"] * clocks + ["batch"] + ["streams"] * streams + ["requests/s"] * server
    headings += [name_of(p) for p in PERCENTILES] + ["images/s"] + ["speed-up"] * compared + ["calls"]
    rows = []
    for cell in cells:
        row = [names[cell.runner], cell.backend, cell.scope]
        row += [cell.clock] * clocks + [str(cell.batch_size)] + [str(cell.streams)] * streams
        row += [f"{cell.offered_ips:.4g}" if cell.offered_ips else "-"] * server
        row += [_with_interval(cell.latency_ms["p50"])]
        row += [_figure(cell.latency_ms[name_of(p)]) for p in PERCENTILES[1:]]
        row += [_number(cell.throughput_ips.value)]
        if compared:
            speedup = report.speedup(cell)
            row.append("-" if speedup is None else _with_interval(speedup, "×"))
        rows.append([*row, str(cell.calls)])
    return headings, rows


def _comparisons(comparisons: Sequence[Comparison]) -> tuple[list[str], Rows]:
    names = _short_names([name for found in comparisons for name in (found.base, found.other)])
    headings = ["artifact", "against", "measurement", "figure", "time", "P(slower)", "p", "verdict"]
    rows = [
        [
            names[found.other],
            names[found.base],
            found.where,
            found.figure,
            _change(found.ratio),
            f"{found.probability_slower:.2f}",
            "<0.001" if found.p_adjusted < 0.001 else f"{found.p_adjusted:.3f}",
            found.verdict,
        ]
        for found in comparisons
    ]
    return headings, rows


def _tolerance(share: float) -> str:
    return f", tolerance {share:.1%}" if share else ""


def _short_names(names: Sequence[str]) -> dict[str, str]:
    """File names alone where they tell the artifacts apart."""
    short = {name: os.path.basename(name) or name for name in names}
    return short if len(set(short.values())) == len(short) else {name: name for name in names}


def _change(ratio: Estimate) -> str:
    if ratio.low is None or ratio.high is None:
        return f"{ratio.value - 1:+.1%}"
    return f"{ratio.value - 1:+.1%} [{ratio.low - 1:+.1%}, {ratio.high - 1:+.1%}]"


def _with_interval(found: Estimate, unit: str = "") -> str:
    if found.low is None or found.high is None:
        return f"({_number(found.value)}{unit})"
    return f"{_number(found.value)}{unit} [{_number(found.low)}, {_number(found.high)}]"


def _figure(found: Estimate) -> str:
    return _number(found.value) if found.supported else f"({_number(found.value)})"


def _number(value: float) -> str:
    """Two decimals, fewer for large numbers."""
    return f"{value:.{2 if abs(value) < 100 else 1 if abs(value) < 1000 else 0}f}"


def _table(title: str, headings: list[str], rows: Rows, caption: str | None) -> Table:
    table = Table(title=title, caption=caption)
    for index, heading in enumerate(headings):
        text = all(not row[index].lstrip("(+-<")[:1].isdigit() for row in rows)
        whole = any(" [" in row[index] for row in rows)  # an interval is not broken over lines
        table.add_column(heading, justify="left" if text else "right", overflow="fold", no_wrap=whole)
    for row in rows:
        table.add_row(*map(escape, row))
    return table


def _markdown(headings: list[str], rows: Rows) -> str:
    lines = [headings, ["---"] * len(headings), *rows]
    return "".join("| " + " | ".join(part.replace("|", "\\|") for part in line) + " |\n" for line in lines)


def _machine(report: BenchmarkReport) -> list[str]:
    facts, cpu = report.environment, report.environment.get("cpu", {})
    lines = [f"{cpu.get('model') or 'CPU not known'}, {cpu.get('usable_cores')} usable cores, {facts.get('system')}"]
    lines += [f"{gpu.get('name')}, driver {gpu.get('driver')}" for gpu in facts.get("gpus") or []]
    lines.append(", ".join(f"{name} {version}" for name, version in facts.get("packages", {}).items()))
    lines += _ranges(report)
    return lines


def _ranges(report: BenchmarkReport) -> list[str]:
    """Least and most of what was read while measuring."""
    lines = []
    for name, values in (
        ("CPU clock, MHz", [reading.cpu_mhz for reading in report.readings]),
        ("CPU used by others", [reading.foreign_cpu for reading in report.readings]),
    ):
        known = [value for value in values if value is not None]
        if known:
            lines.append(f"{name}: {min(known):g} to {max(known):g}")
    for index in range(max((len(reading.gpus or []) for reading in report.readings), default=0)):
        gpus = [reading.gpus[index] for reading in report.readings if reading.gpus and len(reading.gpus) > index]
        for key in ("sm_clock_mhz", "memory_clock_mhz", "power_w", "temperature_c", "memory_used_mib"):
            known = [gpu[key] for gpu in gpus if gpu.get(key) is not None]
            if known:
                lines.append(f"GPU {index} {key}: {min(known):g} to {max(known):g}")
    return lines
