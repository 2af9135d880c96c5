"""Rows as Markdown tables and as pictures."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from benchmarks.lib import chart
from benchmarks.lib.age import OF_THIS_CODE, age
from benchmarks.lib.gains import BASELINE, ArmResult, Summary, arm_results, summary
from benchmarks.lib.results import Row, is_met

TEACHER = "teacher"
"""The variant of the teacher in a case of `prune_gain`."""


def origin(rows: Sequence[Row], fingerprint: str) -> str:
    """A sentence: how, when and on what these rows were measured, and how old they are against the code."""
    commands = dict.fromkeys(f"`{row.command}`" for row in rows)
    dates = dict.fromkeys(row.date for row in rows)
    commits = dict.fromkeys(row.commit for row in rows if row.commit)
    machines = dict.fromkeys(row.machine for row in rows)
    old = age(rows, fingerprint)
    at = f" at commit {', '.join(commits)}" if commits else ""
    mark = old if old == OF_THIS_CODE else f"**{old}**"
    return f"{', '.join(commands)}, {', '.join(dates)}{at}; {'; '.join(machines)}. Figures are {mark}."


def pivot(rows: Iterable[Row], column: Callable[[Row], str], first: str = "") -> str:
    """A line a variant, a column for each value of `column`; a value that misses its bar is bold. Where all of a line
    have one bar it stands at the end."""
    cells: dict[str, dict[str, Row]] = {}
    for row in rows:
        cells.setdefault(row.variant, {})[column(row)] = row
    columns = list(dict.fromkeys(name for line in cells.values() for name in line))
    bars = {variant: {row.bar for row in line.values()} for variant, line in cells.items()}
    with_bars = any(bar != {""} for bar in bars.values()) and all(len(bar) == 1 for bar in bars.values())
    lines = [[first, *columns, *(["bar"] if with_bars else [])]]
    for variant, line in cells.items():
        texts = [cell(line[name]) if name in line else "" for name in columns]
        lines.append([variant, *texts, *(bars[variant] if with_bars else [])])
    return markdown(lines)


def listing(rows: Iterable[Row]) -> str:
    """A line a row, with its case where there are several."""
    rows = list(rows)
    with_case = len({row.case for row in rows}) > 1
    lines = [[*(["case"] if with_case else []), "", "figure", "value", "spread", "bar"]]
    for row in rows:
        spread = (
            "" if row.low is None or row.high is None else f"{number(row.low)} to {number(row.high)} ({row.spread})"
        )
        lines.append([*([row.case] if with_case else []), row.variant, row.metric, cell(row), spread, row.bar])
    return markdown(lines)


def by_seed(rows: Sequence[Row]) -> str:
    """mAP of every variant: mean, by seed, and against the first."""
    maps = _maps_by_variant(rows)
    lines = [["", "mAP, mean", "by seed", "against the first"]]
    first = next(iter(maps.values()))
    for variant, values in maps.items():
        gain = summary(values).mean - summary(first).mean
        against = "" if values is first else f"{gain:+.2f}"
        lines.append([variant, f"{summary(values).mean:.2f}", " ".join(f"{v:.2f}" for v in values), against])
    return markdown(lines)


def arm_table(rows: Sequence[Row], wanted: Callable[[ArmResult], bool] = lambda arm: True) -> str:
    """The arms of a case of `distill_gain`, those that are wanted."""
    lines = [["arm", "mAP", "gain", "95 % interval", "settings"]]
    for arm in filter(wanted, arm_results(rows)):
        low_high = arm.gain.interval
        lines.append([
            arm.name,
            plus_minus(arm.map),
            "" if arm.is_baseline else f"{arm.gain.mean:+.2f}",
            "" if arm.is_baseline or low_high is None else f"{low_high[0]:+.2f} to {low_high[1]:+.2f}",
            " ".join(f"`{setting}`" for setting in arm.settings).replace("|", "\\|"),
        ])  # fmt: skip
    return markdown(lines, "|---|---:|---:|---|---|")


def curve_table(rows: Sequence[Row]) -> str:
    """Of the trainings that were evaluated on the way: mAP by number of steps, mean and deviation over the seeds."""
    values: dict[str, dict[str, list[float]]] = {}
    for row in rows:
        if row.seed is not None and row.metric.startswith("mAP after "):
            values.setdefault(row.variant, {}).setdefault(row.metric.removeprefix("mAP after "), []).append(row.value)
    for row in rows:
        if row.seed is not None and row.metric == "mAP" and row.variant in values:
            values[row.variant].setdefault("the end", []).append(row.value)
    columns = sorted({name for found in values.values() for name in found}, key=_steps)
    lines = [["mAP after", *columns]]
    lines += [
        [name, *(plus_minus(summary(found[column])) if column in found else "" for column in columns)]
        for name, found in values.items()
    ]
    return markdown(lines)


def _steps(column: str) -> float:
    return float(column.split()[0]) if column[0].isdigit() else float("inf")


def arm_picture(rows: Sequence[Row], name: str) -> str:
    """Gains in mAP."""
    arms = arm_results(rows)
    baselines = ", ".join(f"{arm.map.mean:.2f}" for arm in arms if arm.is_baseline)
    lines = [
        chart.Line(arm.name, list(arm.gains.values()), arm.gain.mean, arm.gain.interval)
        for arm in arms
        if not arm.is_baseline
    ]
    legend = "dot: one seed; diamond: mean; line: 95 % interval of the mean, cut at the edge"
    return chart.dots(f"{name}: gain in mAP over the baseline ({baselines})", legend, lines, signed=True)


def pruned_table(rows: Sequence[Row]) -> str:
    """A case of `prune_gain`: a line an arm; sizes stand in the first line of an architecture, the teacher is last."""
    lines = [["student", "GFLOPs", "p50 of int8, ms", "mAP as cut", "trained with", "mAP", "gain", "95 % interval"]]
    before = ""
    for arm in arm_results(rows):
        group, how = group_of(arm.name, rows)
        facts = ["", "", "", ""] if group == before else _architecture(group, rows)
        low_high = arm.gain.interval
        lines.append([
            *facts,
            how,
            plus_minus(arm.map),
            "" if arm.is_baseline else f"{arm.gain.mean:+.2f}",
            "" if arm.is_baseline or low_high is None else f"{low_high[0]:+.2f} to {low_high[1]:+.2f}",
        ])  # fmt: skip
        before = group
    teacher = [f"{row.value:.2f}" for row in rows if (row.variant, row.metric) == (TEACHER, "mAP")]
    lines.append([*_architecture(TEACHER, rows), "", *teacher, "", ""])
    return markdown(lines, "|---|---:|---:|---:|---|---:|---:|---|")


def pruned_picture(rows: Sequence[Row], name: str, metric: str, x_label: str) -> str:
    """mAP against a figure of the architectures: a line a method of the pruned ones, and the others as points."""
    x = {row.variant: row.value for row in rows if row.metric == metric}
    pruned = {row.variant for row in rows if row.metric == "mAP before training"}
    points: dict[tuple[str, bool], list[tuple[float, float, float | None]]] = {}
    for arm in arm_results(rows):
        group, how = group_of(arm.name, rows)
        key = (how, True) if group in pruned else (f"{group}, {how}", False)
        points.setdefault(key, []).append((x[group], arm.map.mean, arm.map.stdev))
    found = [chart.Curve(label, placed, joined) for (label, joined), placed in points.items()]
    found += [
        chart.Curve(f"{TEACHER}, whole", [(x[TEACHER], row.value, None)], joined=False)
        for row in rows
        if (row.variant, row.metric) == (TEACHER, "mAP")
    ]
    seeds = len(arm_results(rows)[0].maps)
    legend = f"mean of {seeds} seeds, bar: standard deviation; diamond: not pruned"
    return chart.curves(f"{name}: mAP against {x_label}", legend, x_label, found)


def group_of(name: str, rows: Iterable[Row]) -> tuple[str, str]:
    """The architecture and the method in the name of an arm of `prune_gain`."""
    group = next(row.variant for row in rows if row.metric == "GFLOPs" and name.startswith(f"{row.variant} "))
    how = name.removeprefix(f"{group} ")
    return group, "labels alone" if how == BASELINE else how


def _architecture(variant: str, rows: Sequence[Row]) -> list[str]:
    own = {row.metric: row for row in rows if row.variant == variant}
    return [
        variant,
        f"{own['GFLOPs'].value:.3f}" if "GFLOPs" in own else "",
        cell(own["int8 p50"]).replace(" ms", "") if "int8 p50" in own else "",
        cell(own["mAP before training"]) if "mAP before training" in own else "",
    ]


def student_table(rows: Sequence[Row]) -> str:
    """A case of `pseudo_gain`: mAP of each student, and how it compares."""
    lines = [["", "student", "mAP ± sd", "against", "by seed", "wanted"]]
    for variant, maps in _maps_by_variant(rows).items():
        part, _, name = variant.partition(" ")
        own = [row for row in rows if row.variant == variant and row.metric.startswith(("share of ", "gain over "))]
        against = seeds = wanted = ""
        if own:
            (of_means,) = (row for row in own if row.seed is None)
            _, relation, _, other = of_means.metric.split(" ", 3)  # share of (a) all labels
            against = f"{_compared(of_means)} {relation} *{other}*"
            seeds = ", ".join(_compared(row) for row in own if row.seed is not None)
            if of_means.bar:
                bound = f"≥ {of_means.bar[3:]} %" if of_means.unit == "%" else "more"
                wanted = f"{bound}: {'reached' if is_met(of_means) else 'missed'}"
        lines.append([part, name, plus_minus(summary(maps)), against, seeds, wanted])
    return markdown(lines)


def student_picture(rows: Sequence[Row], title: str) -> str:
    """mAP of each student."""
    lines = [chart.Line(variant, maps, summary(maps).mean) for variant, maps in _maps_by_variant(rows).items()]
    return chart.dots(f"{title}: mAP of the student", "dot: one seed; diamond: mean", lines)


def share_picture(rows: Sequence[Row], title: str) -> str:
    """Shares of the bandwidth of a copy, in percent."""
    lines = [chart.Line(row.variant, [100 * row.value]) for row in rows if row.metric == "share of copy"]
    return chart.dots(title, "share of the bandwidth of a copy", lines, unit=" %")


def markdown(lines: Sequence[Sequence[str]], rule: str | None = None) -> str:
    """A table whose first line is its head."""
    texts = [f"| {' | '.join(line)} |" for line in lines]
    return "\n".join([texts[0], rule or "|---" * len(lines[0]) + "|", *texts[1:]])


def plus_minus(found: Summary) -> str:
    return f"{found.mean:.2f}" if found.stdev is None else f"{found.mean:.2f} ± {found.stdev:.2f}"


def cell(row: Row) -> str:
    """A value with its unit, bold when it misses its bar; "busy" where other processes used the machine."""
    text = f"{row.value:.2f}" if row.metric.startswith("mAP") else number(row.value)
    if row.metric.startswith("share of "):
        text = f"{row.value:.1%}" if row.unit != "%" else f"{row.value:.1f}"
    text = f"{text} {row.unit}".strip() + (" (busy)" if "busy: " in row.notes else "")
    return f"**{text}**" if is_met(row) is False else text


def number(value: float) -> str:
    """Three significant digits, whole numbers in full."""
    if value == int(value) or abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:#.3g}".rstrip(".")


def _maps_by_variant(rows: Iterable[Row]) -> dict[str, list[float]]:
    maps: dict[str, list[float]] = {}
    for row in rows:
        if row.metric == "mAP" and row.seed is not None:
            maps.setdefault(row.variant, []).append(row.value)
    return maps


def _compared(row: Row) -> str:
    return f"{row.value:.1f} %" if row.unit == "%" else f"{row.value:+.2f}"
