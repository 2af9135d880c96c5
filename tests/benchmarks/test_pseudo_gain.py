"""The benchmark of pseudo labels: its plan, and figures that are right."""

from __future__ import annotations

import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from benchmarks.suites import pseudo_gain
from benchmarks.suites.pseudo_gain import Arm, arm_recipe, drawn, markdown, parse_arguments, picture, plan, summarise
from compress.config.recipe import load_recipe

SMALL = ("--set", "data.synthetic.train=4", "--set", "data.synthetic.val=2", "--more", "3", "--steps", "100")


def test_the_plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["x", "cpu", *SMALL, "--set", f"runs={tmp_path}"])
    monkeypatch.setattr(pseudo_gain, "half_teacher", lambda *_: tmp_path / "half.safetensors")
    arguments = parse_arguments()
    base = load_recipe(pseudo_gain.RECIPES["cpu"], arguments.set)
    arms = plan(arguments, base, "zoo:quickstart")
    assert [arm.part for arm in arms] == ["(a)", "(a)", "(a)", "(a)", "(b)", "(c)", "(d)", "(d)"]
    recipes = [arm_recipe(arguments, arm, 2) for arm in arms]
    assert len({recipe.name for recipe in recipes}) == 8
    for arm, recipe in zip(arms, recipes, strict=True):
        assert recipe.seed == 2 and arm.alone == (recipe.pseudo_labels is None)
        tuned = recipe.pseudo_labels.fine_tune if recipe.pseudo_labels else None
        assert (recipe.train.steps or 0) + (tuned.steps or 0 if tuned else 0) == 100
        assert recipe.labels is None or (recipe.labels.fraction, recipe.labels.seed) == (0.2, 2)
        assert arm.against is None or arm.against in [other.name for other in arms]
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
        name: {seed: {"map": value} for seed, value in enumerate(values)}
        for name, values in {"all": [20.0, 10.0], "few": [15.0, 15.0], "more": [16.0, 17.0]}.items()
    }
    ratio = summarise(Arm("few", "(a)", (), against="all", wanted=97), found)
    assert ratio["value"] == 100.0 and ratio["values"] == [75.0, 150.0] and ratio["reached"]
    points = summarise(Arm("more", "(b)", (), against="few", by="difference", wanted=0), found)
    assert points["value"] == 1.5 and points["values"] == [1.0, 2.0] and points["reached"]
    same = summarise(Arm("few", "(b)", (), against="few", by="difference", wanted=0), found)
    assert not same["reached"], "no better is not better"
    rows = [summarise(Arm("all", "(a)", ()), found), ratio, points]
    assert "| (a) | few | 15.00 ± 0.00 | 100.0 % of *all* | 75.0 %, 150.0 % | ≥ 97 %: reached |" in markdown(rows)
    ElementTree.fromstring(picture(rows, "title"))
