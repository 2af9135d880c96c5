"""The benchmark of distillation: presets that load, figures that are right, a table that can be made again."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from benchmarks.__main__ import main
from benchmarks.lib.gains import BASELINE
from benchmarks.lib.results import read
from benchmarks.lib.trainings import PRESETS, Arm, arm_recipe, last_of_groups, read_table
from compress.config.recipe import load_recipe
from tests.helpers import tiny_recipe


@pytest.mark.parametrize("preset", sorted(path.name for path in PRESETS.iterdir()))
def test_every_arm_of_a_preset_is_a_valid_recipe_and_a_run_of_its_own(preset: str) -> None:
    folder = PRESETS / preset
    teacher = load_recipe(folder / "teacher.yaml")
    common = ("teacher.checkpoint=teacher.safetensors",)
    runs: dict[str, tuple[str, ...]] = {}
    for arms in yaml.safe_load((folder / "arms.yaml").read_text(encoding="utf-8")).values():
        for group in read_table(arms):
            load_recipe(folder / "student.yaml", (*group.student, *common))
            for arm in group.arms:
                own = load_recipe(folder / "teacher.yaml", group.teacher if arm.teacher is None else arm.teacher)
                settings = (*group.student, *arm.settings)
                recipe = arm_recipe(folder / "student.yaml", Arm(arm.name, settings), 3, common)
                assert recipe.seed == 3 and recipe.methods.enabled()
                assert runs.setdefault(recipe.name, settings) == settings, f"two arms share {recipe.name}"
                same = recipe.student.detector == own.student.detector
                assert same or not recipe.teacher.inherit, "inheriting asks for one family"
    student = load_recipe(folder / "student.yaml")
    if student.data.synthetic is not None and teacher.data.synthetic is not None:
        assert student.data.synthetic.seed != teacher.data.synthetic.seed, "the teacher would know the images"


def test_every_group_has_its_own_baseline() -> None:
    groups = read_table({
        name: {"student": [f"a={name}"], "teacher": [], "arms": {"FGD": ["x=1"]}} for name in ("one", "two")
    })  # fmt: skip
    assert [(g.name, g.student, g.arms) for g in groups] == [
        (name, (f"a={name}",), (Arm(f"{name} FGD", ("x=1",), group=name),)) for name in ("one", "two")
    ]


def test_an_arm_may_have_another_teacher() -> None:
    (group,) = read_table({
        "one": {
            "student": [],
            "teacher": ["name=t"],
            "arms": {"own": ["x=1"], "other": {"teacher": [], "settings": ["x=2"]}},
        }
    })  # fmt: skip
    assert [(arm.name, arm.settings, arm.teacher) for arm in group.arms] == [
        ("one own", ("x=1",), None),
        ("one other", ("x=2",), ()),
    ]
    assert last_of_groups(group.arms) == [group.arms[0]], "the teacher's mAP is read from it"


def test_from_the_command_line_and_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = tiny_recipe.recipe_file(tmp_path, "train.steps=2")
    out = tmp_path / "results.csv"
    shorter = ["train.steps=3", "data.synthetic.train=8", "train.eval_every=1"]  # an epoch has two steps
    words = ["distill_gain", str(recipe), "--seeds", "0,1", "--out", str(out), *(f"--set={x}" for x in shorter)]
    assert main(words) == 0
    first = read(out)
    on_the_way = {(row.variant, row.seed) for row in first if row.metric == "mAP after 2 steps"}
    assert on_the_way == {(arm, seed) for arm in (BASELINE, "distilled") for seed in (0, 1)}
    assert list(dict.fromkeys(row.variant for row in first)) == [BASELINE, "distilled", "teacher"]
    assert {row.seed for row in first if row.variant == "distilled"} == {0, 1}
    assert "step 3/3" in capsys.readouterr().out
    assert main(words) == 0
    shown = capsys.readouterr().out
    assert "step 3/3" not in shown, "finished arms are not trained again"
    assert "| distilled |" in shown
    assert [(row.variant, row.metric, row.value) for row in read(out)] == [
        (row.variant, row.metric, row.value) for row in first
    ]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nonsense"], "neither a preset"),
        (["cpu", "--table", "none"], "no table none; it has methods, uet"),
        (["cpu", "--arms", "XYZ", "--label", "x"], "no arm XYZ"),
        (["."], "neither a preset"),
        (["cpu", "--jobs", "0"], "--jobs: give 1 or more"),
        (["cpu", "--arms", "FGD"], "--arms and --set make another table than the preset's; name it with --label"),
        (["cpu", "--set", "methods.fgd.weight=3", "--label", "x"], "--set: methods and teacher of a preset"),
        (["recipe.yaml", "--tune"], "--tune, --table and --arms are for presets"),
    ],
)
def test_mistakes_are_one_line(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["distill_gain", *words]) == 2
    shown = capsys.readouterr().err
    assert shown.startswith("error: ") and message in shown and shown.count("\n") == 1


@pytest.mark.parametrize("seeds", ["a", "1,1", ""])
def test_seeds_are_different_numbers(seeds: str) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["distill_gain", "cpu", "--seeds", seeds])
    assert caught.value.code == 2
