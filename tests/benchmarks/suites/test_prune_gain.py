"""The benchmark of pruning: a whole table of tiny students, made again without training, and its mistakes."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from benchmarks.__main__ import main
from benchmarks.lib.gains import arm_results
from benchmarks.lib.results import read
from benchmarks.lib.trainings import PRESETS, Group
from benchmarks.suites import prune_gain
from benchmarks.suites.prune_gain import chosen
from deploy.core.errors import UserError
from tests.helpers.cheap_exports import tiny_file

ARMS = """
prune:
  keep 0.5:
    student: ["student={prune: {gflops: 0.5, round_to: 8}}"]
    teacher: []
    arms: {BCKD: ["methods={bckd: {}}"]}
  small:
    student: []
    teacher: []
    arms: {BCKD: ["methods={bckd: {}}", teacher.inherit=true]}
"""
RECIPE = """
name: {name}
data:
  synthetic: {{train: 8, val: 4, size: 64, classes: 2, seed: {seed}}}
  short: 64
  long: 64
  workers: 0
student: {{backbone: nano, weights: none, neck_channels: 32, head_depth: 0}}
train: {{steps: 2, batch_size: 4, optimizer: {{name: adamw, lr: 1e-3}}, schedule: {{name: cosine, warmup_steps: 1}}}}
deploy: {{score_threshold: 0.0, candidates: 100}}
"""


def test_from_the_command_line_and_again(
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = tmp_path / "presets" / "tiny"
    folder.mkdir(parents=True)
    (folder / "arms.yaml").write_text(ARMS)
    for seed, name in enumerate(("student", "teacher")):
        (folder / f"{name}.yaml").write_text(RECIPE.format(name=f"tiny_{name}", seed=seed))
    monkeypatch.setattr("benchmarks.lib.trainings.PRESETS", folder.parent)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(prune_gain, "latency_rows", lambda *_: [])
    out = tmp_path / "results.csv"
    words = ["prune_gain", "tiny", "--seeds", "0", "--seconds", "0.02", "--out", str(out)]
    assert main(words) == 0
    first = read(out)
    names = ["keep 0.5 baseline", "keep 0.5 BCKD", "small baseline", "small BCKD"]
    assert [arm.name for arm in arm_results(first)] == names
    assert "step 2/2" in capsys.readouterr().out
    figures = {(row.variant, row.metric): row.value for row in first if row.seed is None}
    whole = figures["teacher", "GFLOPs"]
    assert figures["small", "GFLOPs"] == whole and 0.3 * whole < figures["keep 0.5", "GFLOPs"] <= 0.5 * whole
    assert figures["keep 0.5", "parameters"] < figures["teacher", "parameters"]
    assert ("keep 0.5", "mAP before training") in figures and ("small", "mAP before training") not in figures
    monkeypatch.undo()
    monkeypatch.setattr("benchmarks.lib.trainings.PRESETS", folder.parent)
    monkeypatch.chdir(tmp_path)
    exported = tiny_file(tmp_path_factory)  # in the place of two exports; what is quantized and timed is a real file
    monkeypatch.setattr(prune_gain, "export_checkpoint", lambda _weights, out, *_, **__: shutil.copy(exported, out))
    assert main([*words, "--groups", "keep 0.5"]) == 0
    assert "step 2/2" not in capsys.readouterr().out, "finished arms are not trained again"
    again = read(out)
    assert [arm.maps for arm in arm_results(again)] == [arm.maps for arm in arm_results(first)[:2]]
    latency = {row.variant: row.value for row in again if row.metric == "int8 p50"}
    assert latency.keys() == {"keep 0.5", "teacher"} and min(latency.values()) > 0


def test_groups_are_chosen_by_name() -> None:
    groups = [Group(name, (), (), ()) for name in ("keep 0.5", "keep 0.25", "nano")]
    assert chosen(groups, None) == groups
    assert chosen(groups, "nano, keep 0.5") == [groups[2], groups[0]]
    with pytest.raises(UserError, match=r"--groups: no group none; the table has keep 0\.5, keep 0\.25, nano"):
        chosen(groups, "nano,none")


def test_a_preset_without_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["prune_gain", "gpu"]) == 2
    assert "gpu: no table prune" in capsys.readouterr().err and (PRESETS / "gpu").is_dir()
