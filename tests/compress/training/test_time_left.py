"""How long a run still takes: with a clock of the test's own."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from compress.run.parts import Parts
from compress.run.plans import outlook
from compress.training import time_left
from compress.training.time_left import NOTHING_LATER, Later, TimeLeft, in_words
from tests.helpers import tiny_recipe


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(time_left, "time", clock)
    return clock


def minutes(text: object) -> float:
    found = re.match(r"about (\d+) min left", str(text))
    assert found is not None, str(text)
    return float(found[1])


def test_a_machine_that_is_busy_for_a_while_does_not_make_it_jump(clock: Clock) -> None:
    """1,000 steps of a second, every third of the first 300 takes ten; the mean would say 55 min after 100."""
    left, said = TimeLeft(1000, 4, NOTHING_LATER), []
    for step in range(1, 501):
        clock.now += 10.0 if step <= 300 and step % 3 == 0 else 1.0
        left.step()
        if step % 50 == 0:
            said.append((step, minutes(left)))
    assert all(abs(found - (1000 - step) / 60) <= 1 for step, found in said), said


def test_evaluations_count_with_the_steps_that_they_come_after(clock: Clock) -> None:
    left = TimeLeft(1000, 4, NOTHING_LATER)
    for step in range(1, 501):
        clock.now += 1.0
        left.step()
        if step % 100 == 0:
            clock.now += 100.0
            left.pause()
    assert minutes(left) == pytest.approx(500 * 2 / 60, abs=1)


def test_later_trainings_count_at_the_same_pace_a_picture(clock: Clock) -> None:
    left = TimeLeft(100, 4, Later(pictures=800, stages=("export", "benchmark")))
    assert str(left) == "time left not known yet"
    for _ in range(10):
        clock.now += 2.0
        left.step()
    assert str(left) == "about 3 min left, 10 min in all at this pace, then export, benchmark"


def test_words() -> None:
    assert [in_words(s) for s in (0, 1, 12, 55, 56, 89, 5369, 5370, 12_600, 200_000)] == [
        "0 s", "5 s", "15 s", "55 s", "1 min", "1 min", "89 min", "1.5 h", "3.5 h", "2.3 days"
    ]  # fmt: skip


def test_a_run_knows_what_comes_after_each_training(tmp_path: Path) -> None:
    """24 pictures in batches of 4: the teacher takes 3 steps, baseline and student 6."""
    recipe = tiny_recipe.recipe(tmp_path, "baseline=true")
    files = ("export", "validate", "benchmark")
    whole = outlook(recipe, Parts(), 24, distillation=True, ships=True)
    assert whole["teacher"] == Later(48, files) and whole["baseline"] == Later(24, files)
    assert whole["student"] == Later(0, files)
    assert outlook(recipe, Parts(), 24, distillation=False, ships=False)["student"] == NOTHING_LATER


def test_a_run_that_prunes_trains_what_the_cut_left_as_well(tmp_path: Path) -> None:
    """Baseline, the pruned weights on labels alone, student: 24 pictures each."""
    prune = "student={prune: {of: teacher, gflops: 0.5}}"
    recipe = tiny_recipe.recipe(tmp_path, "baseline=true", prune)
    whole = outlook(recipe, Parts(), 24, distillation=True, ships=False)
    assert whole["teacher"] == Later(72, ("cut",)) and whole["baseline"] == Later(48)
    assert whole["baseline.pruned"] == Later(24) and whole["student"] == NOTHING_LATER
