"""The record of a run: what is unchanged is not done twice, and damage to it only costs time."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from compress.manifest import Manifest, RunFolder, fingerprint
from deploy.core.errors import UserError


def stage(folder: Path, inputs: dict[str, Any], result: Any = "made") -> tuple[Any, int]:
    """The result of stage `student`, which writes out.txt, and how often its work ran."""
    runs = 0

    def work() -> Any:
        nonlocal runs
        runs += 1
        (folder / "out.txt").write_text("content")
        return result

    return Manifest(folder, {"compress": "1"}).stage("student", inputs, [folder / "out.txt"], work), runs


def test_a_stage_runs_again_only_when_something_changed(tmp_path: Path) -> None:
    assert stage(tmp_path, {"seed": 0}) == ("made", 1)
    assert stage(tmp_path, {"seed": 0}, "not asked") == ("made", 0)
    (tmp_path / "out.txt").write_text("spoiled")
    assert stage(tmp_path, {"seed": 0}) == ("made", 1)
    (tmp_path / "out.txt").unlink()
    assert stage(tmp_path, {"seed": 0}) == ("made", 1)
    assert stage(tmp_path, {"seed": 1}, "other") == ("other", 1)


@pytest.mark.parametrize(
    "text",
    [
        "", "{", "[]", "3", "{}", "\xff", "[" * 100_000, '{"stages": []}', '{"stages": null}',
        '{"stages": {"student": 3}}',
        '{"stages": {"student": {}}}', '{"stages": {"student": {"inputs": 1, "outputs": {}, "result": 0}}}',
        '{"stages": {"student": {"inputs": "INPUTS", "outputs": [], "result": 0}}}',
        '{"stages": {"student": {"inputs": "INPUTS", "outputs": {"out.txt": 5}, "result": 0}}}',
        '{"stages": {"student": {"inputs": "INPUTS", "outputs": {}}}}',
    ],
)  # fmt: skip
def test_a_damaged_record_counts_as_absent(tmp_path: Path, text: str) -> None:
    (tmp_path / "out.txt").write_text("old")
    file = tmp_path / "manifest.json"
    file.write_bytes(text.replace("INPUTS", fingerprint({"seed": 0})).encode("latin-1"))
    assert stage(tmp_path, {"seed": 0}) == ("made", 1)
    assert json.loads(file.read_text())["stages"]["student"]["result"] == "made"


def test_a_damaged_row_leaves_the_others(tmp_path: Path) -> None:
    stage(tmp_path, {"seed": 0})
    file = tmp_path / "manifest.json"
    record = json.loads(file.read_text())
    file.write_text(json.dumps({"stages": {**record["stages"], "teacher": 3}}))
    assert stage(tmp_path, {"seed": 0}) == ("made", 0)


def test_a_folder_in_its_place_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").mkdir()
    with pytest.raises(UserError, match=r"manifest\.json: is a folder") as error:
        stage(tmp_path, {})
    assert "\n" not in str(error.value)


def test_names_of_a_run_folder(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    names = [
        folder.weights(), folder.weights("teacher"), folder.onnx(), folder.onnx("int8"),
        folder.grids(), folder.onnx_on_trained_grids, folder.training("baseline").last,
        folder.training("student").metrics,
    ]  # fmt: skip
    assert [path.relative_to(tmp_path).as_posix() for path in names] == [
        "student.safetensors", "teacher.safetensors", "student.onnx", "student.int8.onnx",
        "student.qad.json", "student.qad.onnx", "baseline/checkpoints/last.ckpt", "student/metrics.csv",
    ]  # fmt: skip


def test_a_training_without_its_checkpoint_is_unfinished(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    for name in ("student", "teacher"):
        folder.training(name).last.parent.mkdir(parents=True)
        folder.training(name).last.touch()
    folder.weights("teacher").touch()
    assert folder.unfinished() == ["student"]


def test_the_record_of_a_stage_is_read_back(tmp_path: Path) -> None:
    Manifest(tmp_path, {}).stage("student", {}, [], lambda: {"map": 12.5})
    assert RunFolder(tmp_path).result("student") == {"map": 12.5}
    with pytest.raises(KeyError):
        RunFolder(tmp_path).result("teacher")
