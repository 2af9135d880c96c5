"""The benchmark of pseudo labels: its plan, and figures that are right."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from benchmarks.lib.results import is_met
from benchmarks.suites import pseudo_gain
from benchmarks.suites.pseudo_gain import Student, complete, drawn, plan, rows_of, student_recipe
from compress.config.recipe import load_recipe
from deploy.core.errors import UserError

SMALL = ("--set", "data.synthetic.train=4", "--set", "data.synthetic.val=2", "--more", "3", "--steps", "100")


def parsed(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    pseudo_gain.add_options(parser)
    arguments = parser.parse_args(words)
    complete(arguments)
    return arguments


def test_the_plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pseudo_gain, "half_teacher", lambda *_: tmp_path / "half.safetensors")
    arguments = parsed("cpu", *SMALL, "--set", f"runs={tmp_path}")
    base = load_recipe(pseudo_gain.RECIPES["cpu"], arguments.set)
    students = plan(arguments, base, "zoo:quickstart")
    assert [student.part for student in students] == ["(a)", "(a)", "(a)", "(a)", "(b)", "(c)", "(d)", "(d)"]
    recipes = [student_recipe(arguments, student, 2) for student in students]
    assert len({recipe.name for recipe in recipes}) == 8
    for student, recipe in zip(students, recipes, strict=True):
        assert recipe.seed == 2 and student.alone == (recipe.pseudo_labels is None)
        tuned = recipe.pseudo_labels.fine_tune if recipe.pseudo_labels else None
        assert (recipe.train.steps or 0) + (tuned.steps or 0 if tuned else 0) == 100
        assert recipe.labels is None or (recipe.labels.fraction, recipe.labels.seed) == (0.2, 2)
        assert student.against is None or student.against in [other.name for other in students]
    tuned, more, two, source, target = recipes[3:]
    assert tuned.pseudo_labels is not None and tuned.pseudo_labels.fine_tune is not None
    assert all(r.pseudo_labels is None or r.pseudo_labels.fine_tune is None for r in recipes if r is not tuned)
    assert more.pseudo_labels is not None and len(list(more.pseudo_labels.unlabeled[0].iterdir())) == 3 + 2
    assert two.pseudo_labels is not None and two.pseudo_labels.teachers is not None
    assert len(two.pseudo_labels.teachers) == 2
    assert source.data == target.data and source.data.val is not None
    assert "night" in str(source.data.val.images) and "night" not in str(source.data.train)
    assert drawn(base) == base.runs / "data" / "synthetic-train4-val2-size96-classes4-seed0-v1"


def test_figures_are_paired() -> None:
    found = {
        name: {seed: {"map": value, "map50": 1.0, "map75": 1.0, "seconds": 2.0} for seed, value in enumerate(values)}
        for name, values in {"all": [20.0, 10.0], "few": [15.0, 15.0], "more": [16.0, 17.0]}.items()
    }
    parts = {"all": "(a)", "few": "(a)", "more": "(b)"}

    def compared(student: Student) -> list[tuple[int | None, float]]:
        rows = rows_of(student, found, parts)
        assert [row.value for row in rows if row.metric == "mAP"] == [f["map"] for f in found[student.name].values()]
        return [(row.seed, row.value) for row in rows if row.metric.startswith(("share of (a) ", "gain over (a) "))]

    ratio = Student("few", "(a)", (), against="all", bar=">= 97")
    assert compared(ratio) == [(0, 75.0), (1, 150.0), (None, 100.0)], "of the means, not the mean of ratios"
    points = Student("more", "(b)", (), against="few", by="difference", bar="> 0")
    assert compared(points) == [(0, 1.0), (1, 2.0), (None, 1.5)]
    assert is_met(rows_of(ratio, found, parts)[-1]) and is_met(rows_of(points, found, parts)[-1])
    same = rows_of(Student("few", "(b)", (), against="few", by="difference", bar="> 0"), found, parts)[-1]
    assert same.value == 0 and not is_met(same), "no better is not better"
    last = rows_of(points, found, parts)[-1]
    assert last.low is not None and last.value - last.low == pytest.approx(12.706 * 0.7071 / 2**0.5, abs=2e-3)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--parts", "ax"), "--parts: letters a to d"),
        (("--parts", "b"), r"--parts: \(b\) and \(c\) are compared with \(a\)"),
        (("--set", "data.train.images=x"), "--set: the images of the preset cpu are drawn"),
        (("--fine-tune", "0"), "--fine-tune: more than 0"),
        (("--steps", "10", "--fine-tune", "10"), "--fine-tune: more than 0 and less than --steps"),
    ],
)
def test_options_that_do_not_go_together(words: tuple[str, ...], message: str) -> None:
    with pytest.raises(UserError, match=message):
        parsed("cpu", *words)
