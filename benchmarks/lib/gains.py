"""Trainings over seeds, from rows: means, spreads and gains that are paired by seed; without torch.

A case is a table of arms, in order; an arm whose name ends with "baseline" is that of the arms after it. Each arm has a
row "mAP" a seed, whose notes are its settings.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from benchmarks.lib.results import Row

BASELINE = "baseline"
T_95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}  # two-sided
SEPARATOR = " ; "
"""Between the settings in the notes."""


@dataclass(frozen=True)
class Summary:
    """Mean, standard deviation and 95 % interval of the mean (Student's t); of a single value the last two are None.
    Rounded to three digits, as the figures are."""

    mean: float
    stdev: float | None
    interval: tuple[float, float] | None


@dataclass(frozen=True)
class ArmResult:
    """One arm over its seeds. gains: paired with its baseline, whose own are zero."""

    name: str
    settings: tuple[str, ...]
    maps: dict[int, float]
    gains: dict[int, float]

    @property
    def is_baseline(self) -> bool:
        return self.name.endswith(BASELINE)

    @property
    def map(self) -> Summary:
        return summary(list(self.maps.values()))

    @property
    def gain(self) -> Summary:
        return summary(list(self.gains.values()))


def summary(values: Sequence[float]) -> Summary:
    mean = statistics.mean(values)
    if len(values) < 2:
        return Summary(round(mean, 3), None, None)
    stdev = statistics.stdev(values)
    half = T_95[len(values)] * stdev / len(values) ** 0.5
    return Summary(round(mean, 3), round(stdev, 3), (round(mean - half, 3), round(mean + half, 3)))


def arm_results(rows: Iterable[Row]) -> list[ArmResult]:
    """The arms of a case in its order. Raises ValueError for an arm before any baseline or without one of its seeds."""
    maps: dict[str, dict[int, float]] = {}
    settings: dict[str, tuple[str, ...]] = {}
    for row in rows:
        if row.metric == "mAP" and row.seed is not None:
            maps.setdefault(row.variant, {})[row.seed] = row.value
            settings[row.variant] = tuple(filter(None, row.notes.split(SEPARATOR)))
    found: list[ArmResult] = []
    baseline: dict[int, float] = {}
    for name, by_seed in maps.items():
        baseline = by_seed if name.endswith(BASELINE) else baseline
        if missing := by_seed.keys() - baseline.keys():
            raise ValueError(f"{name}: the baseline has no seed {', '.join(map(str, sorted(missing)))}")
        found.append(
            ArmResult(name, settings[name], by_seed, {seed: by_seed[seed] - baseline[seed] for seed in by_seed})
        )
    return found
