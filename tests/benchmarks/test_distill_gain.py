"""The benchmark of distillation: presets that load, figures that are right, a table that can be made again."""

from __future__ import annotations

import json
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
import yaml

from benchmarks.suites import distill_gain
from benchmarks.suites.distill_gain import BASELINE, PRESETS, Arm, arm_recipe, picture, read_table, summarise, table
from compress.config.recipe import load_recipe
from deploy.core.errors import UserError
from tests.helpers import tiny_recipe


@pytest.mark.parametrize("preset", sorted(path.name for path in PRESETS.iterdir()))
def test_every_arm_of_a_preset_is_a_valid_recipe_and_a_run_of_its_own(preset: str) -> None:
    folder = PRESETS / preset
    teacher = load_recipe(folder / "teacher.yaml")
    common = ("teacher.checkpoint=teacher.safetensors",)
    runs: dict[str, tuple[str, ...]] = {}
    for arms in yaml.safe_load((folder / "arms.yaml").read_text(encoding="utf-8")).values():
        for group in read_table(arms):
            own = load_recipe(folder / "teacher.yaml", group.teacher)
            for arm in group.arms:
                settings = (*group.student, *arm.settings)
                recipe = arm_recipe(folder / "student.yaml", Arm(arm.name, settings), 3, common)
                assert recipe.seed == 3 and recipe.methods.enabled()
                assert runs.setdefault(recipe.name, settings) == settings, f"two arms share {recipe.name}"
                assert recipe.student.detector == own.student.detector, "inheriting asks for one family"
    student = load_recipe(folder / "student.yaml")
    if student.data.synthetic is not None and teacher.data.synthetic is not None:
        assert student.data.synthetic.seed != teacher.data.synthetic.seed, "the teacher would know the images"


def figures(value: float) -> dict[str, float]:
    return {"map": value, "map50": 2 * value, "map75": value / 2, "seconds": 10.0, "steps": 5}


def rows() -> list[dict]:
    baseline = {0: figures(10.0), 1: figures(12.0), 2: figures(11.0)}
    taught = {0: figures(13.0), 1: figures(14.0), 2: figures(15.0)}
    arms = [(Arm(BASELINE, (), alone=True), baseline), (Arm("A & B", ("x=1",)), taught)]
    return [summarise(arm, values, baseline) for arm, values in arms]


def test_figures_are_paired() -> None:
    baseline, taught = rows()
    assert baseline["gain_mean"] == 0
    assert taught["map_mean"] == 14.0 and taught["gain_mean"] == 3.0  # differences 3, 2, 4
    assert taught["gain_stdev"] == 1.0
    assert taught["gain_high"] - 3 == pytest.approx(4.303 / 3**0.5, abs=1e-3)  # Student's t, 2 degrees of freedom
    assert taught["by_seed"]["1"]["map"] == 14.0


def test_every_group_has_its_own_baseline() -> None:
    groups = read_table({
        name: {"student": [f"a={name}"], "teacher": [], "arms": {"FGD": ["x=1"]}} for name in ("one", "two")
    })  # fmt: skip
    assert [(g.name, g.student, g.arms) for g in groups] == [
        (name, (f"a={name}",), (Arm(f"{name} FGD", ("x=1",), group=name),)) for name in ("one", "two")
    ]
    low, high = ({seed: figures(level) for seed in range(2)} for level in (10.0, 20.0))
    arms = [Arm(f"{g} {n}", (), alone=n == BASELINE, group=g) for g in ("one", "two") for n in (BASELINE, "FGD")]
    both = [
        summarise(arm, v, b) for arm, v, b in zip(arms, (low, high, high, low), (low, low, high, high), strict=True)
    ]
    assert [row["gain_mean"] for row in both] == [0, 10, 0, -10]
    drawn = picture(both, "cpu-families")
    assert "(10.00, 20.00)" in drawn and drawn.count("<circle") == 4
    assert list(table(both).columns[4].cells) == ["", "+10.00 +10.00", "", "-10.00 -10.00"]


def test_picture_and_table() -> None:
    document = ElementTree.fromstring(picture(rows(), "cpu-methods"))
    assert len(document.findall(".//{*}circle")) == 3
    assert any("A & B" in (text.text or "") for text in document.iter("{http://www.w3.org/2000/svg}text"))
    assert table(rows()).row_count == 2


def test_from_the_command_line_and_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tiny_recipe.recipe_file(tmp_path, "train.steps=2")
    out = tmp_path / "result.json"
    arguments = ["distill_gain", str(recipe), "--seeds", "0,1", "--set", "train.steps=3", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", arguments)
    assert distill_gain.main() == 0
    result = json.loads(out.read_text())
    assert [row["arm"] for row in result["arms"]] == [BASELINE, "distilled"]
    assert set(result["arms"][1]["by_seed"]) == {"0", "1"} and out.with_suffix(".svg").is_file()
    assert "step 3/3" in capsys.readouterr().out
    assert distill_gain.main() == 0
    assert "step 3/3" not in capsys.readouterr().out, "finished arms are not trained again"
    assert json.loads(out.read_text())["arms"] == result["arms"]


def test_mistakes_are_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for arguments, message in (
        (["nonsense"], "neither a preset"),
        (["cpu", "--table", "none"], "no table none; it has methods, uet"),
        (["cpu", "--arms", "XYZ", "--out", "x.json"], "no arm XYZ"),
        (["."], "neither a preset"),
    ):
        monkeypatch.setattr(sys, "argv", ["distill_gain", *arguments])
        with pytest.raises(UserError, match=message):
            distill_gain.main()
    for arguments in (
        ["cpu", "--jobs", "0"],
        ["cpu", "--seeds", "a"],
        ["cpu", "--seeds", "1,1"],
        ["cpu", "--arms", "FGD"],
        ["cpu", "--set", "methods.fgd.weight=3", "--out", "x.json"],
        ["recipe.yaml", "--tune"],
    ):
        monkeypatch.setattr(sys, "argv", ["distill_gain", *arguments])
        with pytest.raises(SystemExit) as caught:
            distill_gain.parse_arguments()
        assert caught.value.code == 2
