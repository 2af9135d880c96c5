"""Comparison of speeds: within one report, where all were measured in turn, and between two reports."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from deploy.core.errors import UserError
from deploy.latency.results import BenchmarkReport, Cell, Comparison, Estimate, Verdict
from deploy.latency.statistics import (
    SIGNIFICANCE,
    Blocks,
    calls_needed,
    compare_apart,
    compare_in_turn,
    holm,
    name_of,
    probability_slower,
)

COMPARED = (50.0, 90.0, 99.0)
"""Percentiles that are compared, if there are calls enough; a few, because Holm's correction pays for each."""

_Test = Callable[..., list[tuple[Estimate, float, float]]]


def compare_cells(cells: Sequence[Cell], *, tolerance: float = 0.0, seed: int = 0) -> list[Comparison]:
    """Each artifact of a report with the first, cell by cell. The cells were measured in turn.

    tolerance: share by which an artifact may be slower before its verdict is `slower`.
    """
    if not cells:
        return []
    first = cells[0].runner
    bases = {cell.key: cell for cell in cells if cell.runner == first}
    pairs = [(bases[cell.key], cell) for cell in cells if cell.runner != first and cell.key in bases]
    return _compare(pairs, compare_in_turn, tolerance, seed)


def compare_reports(
    old: BenchmarkReport, new: BenchmarkReport, *, tolerance: float = 0.0, seed: int = 0
) -> tuple[list[Comparison], list[str]]:
    """Every cell that both reports have, and what makes the two hard to compare.

    Artifacts are matched by name; if each report has one artifact, these two are compared whatever their names.
    Raises UserError when nothing matches.
    """
    names_old, names_new = (list(dict.fromkeys(cell.runner for cell in report.cells)) for report in (old, new))
    alone = len(names_old) == len(names_new) == 1
    pairs = []
    for cell in new.cells:
        name = names_old[0] if alone else cell.runner
        pairs += [(base, cell) for base in old.cells if base.runner == name and base.key == cell.key]
    if not pairs:
        raise UserError(
            f"the two results have nothing in common: {', '.join(names_old)} ({_kinds(old)}) "
            f"and {', '.join(names_new)} ({_kinds(new)})"
        )
    missing = len(old.cells) + len(new.cells) - 2 * len(pairs)
    differences = _differences(old, new)
    if missing:
        what = "1 measurement stands" if missing == 1 else f"{missing} measurements stand"
        differences.append(f"{what} in one of the two results only")
    return _compare(pairs, compare_apart, tolerance, seed), differences


def slower(comparisons: Sequence[Comparison]) -> list[Comparison]:
    """Return those that are significantly slower than the tolerance allows."""
    return [found for found in comparisons if found.verdict == "slower"]


# ----------------------------------------------------------------------------------------------------


def _compare(pairs: Sequence[tuple[Cell, Cell]], test: _Test, tolerance: float, seed: int) -> list[Comparison]:
    rows: list[tuple[Cell, Cell, str, tuple[Estimate, float, float], float]] = []
    chosen = [[p for p in COMPARED if p == 50.0 or min(a.calls, b.calls) >= calls_needed(p)] for a, b in pairs]
    count = sum(map(len, chosen))
    for (base, other), percents in zip(pairs, chosen, strict=True):
        blocks_base, blocks_other = _blocks(base), _blocks(other)
        found = test(blocks_base, blocks_other, percents, tolerance=tolerance, seed=seed, figures=count)
        chance = probability_slower(np.concatenate(blocks_base), np.concatenate(blocks_other))
        rows += [(base, other, name_of(p), figures, chance) for p, figures in zip(percents, found, strict=True)]
    two_sided = holm([p_value for *_, (_, p_value, _), _ in rows])
    beyond = holm([p_value for *_, (_, _, p_value), _ in rows])
    return [
        Comparison(
            base=base.runner,
            other=other.runner,
            where=other.where,
            figure=figure,
            ratio=ratio,
            probability_slower=chance,
            p_value=p_value,
            p_adjusted=adjusted,
            p_beyond_tolerance=beyond_tolerance,
            verdict=_verdict(min(base.calls, other.calls), ratio.value, adjusted, beyond_tolerance),
        )
        for (base, other, figure, (ratio, p_value, _), chance), adjusted, beyond_tolerance in zip(
            rows, two_sided, beyond, strict=True
        )
    ]


def _verdict(calls: int, ratio: float, p_adjusted: float, p_beyond_tolerance: float) -> Verdict:
    if calls < calls_needed(50.0):
        return "too few calls"
    if p_beyond_tolerance < SIGNIFICANCE:
        return "slower"
    if p_adjusted >= SIGNIFICANCE:
        return "no difference seen"
    return "faster" if ratio < 1 else "slower, within tolerance"


def _blocks(cell: Cell) -> Blocks:
    return [np.asarray(samples) for samples in cell.samples_ms]


def _kinds(report: BenchmarkReport) -> str:
    return "; ".join(dict.fromkeys(cell.where for cell in report.cells)) or "no measurement"


def _differences(old: BenchmarkReport, new: BenchmarkReport) -> list[str]:
    """Facts other than the artifact that differ between two reports and that latency depends on."""
    found = []
    for what, of in _CIRCUMSTANCES:
        before, after = of(old), of(new)
        if before != after:
            found.append(f"{what} differs: {before} against {after}")
    for report, which in ((old, "old"), (new, "new")):
        found += [f"{which} result: {warning}" for warning in report.warnings]
    return found


def _gpus(report: BenchmarkReport) -> list[str | None]:
    return [gpu.get("name") for gpu in report.environment.get("gpus") or []]


def _cpu(key: str) -> Callable[[BenchmarkReport], Any]:
    return lambda report: report.environment.get("cpu", {}).get(key)


_CIRCUMSTANCES: list[tuple[str, Callable[[BenchmarkReport], Any]]] = [
    ("the CPU", _cpu("model")),
    ("the number of usable cores", _cpu("usable_cores")),
    ("the CPU governor", _cpu("governor")),
    ("the GPU", _gpus),
    ("the packages", lambda report: report.environment.get("packages")),
    (
        "what the runtime was set to",
        lambda report: sorted({str(v) for v in report.settings.get("runtime", {}).values()}),
    ),
    ("the number of threads", lambda report: sorted({str(v) for v in report.settings.get("threads", {}).values()})),
    ("the input size", lambda report: sorted({str(v) for v in report.settings.get("input_size", {}).values()})),
    ("the set of images", lambda report: report.settings.get("images_sha256")),
    ("the backend", lambda report: sorted({cell.backend for cell in report.cells})),
]
