"""`compress quantize` beside its short way, `compress export --precision int8`."""

from __future__ import annotations

import shlex
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper

from compress import cli
from compress.detectors.build import build_detector
from compress.detectors.checkpoints import ModelRecord, save_detector
from deploy.core.card import card_from_file
from tests.helpers import tiny_recipe

pytestmark = pytest.mark.usefixtures("few_rounds")


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A student with random weights in the folder of a run: its checkpoint, recipe and float files."""
    recipe = tiny_recipe.recipe(tmp_path_factory.mktemp("quantize"), "deploy.int8.images=6")
    torch.manual_seed(0)
    checkpoint = recipe.run_dir / "student.safetensors"
    checkpoint.parent.mkdir(parents=True)
    names = ("circle", "square", "triangle")
    record = ModelRecord(model=recipe.student, num_classes=3, class_names=names, category_ids=(1, 2, 3))
    save_detector(checkpoint, build_detector(recipe.student, 3, 0), metadata=record)
    from compress.config.recipe import dump_recipe

    (recipe.run_dir / "recipe.yaml").write_text(dump_recipe(recipe))
    assert run(f"export {checkpoint} --precision fp32,fp16") == 0
    return checkpoint


def run(line: str) -> int:
    with pytest.raises(SystemExit) as stop:
        cli.main(shlex.split(line))
    return int(stop.value.code or 0)


def constants(path: Path) -> dict[str, np.ndarray]:
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in onnx.load(path).graph.initializer}


def test_the_short_way_makes_the_same_file(student: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Scales and weights are the same from the checkpoint, from the float file, and by export."""
    files = {"checkpoint": student.with_name("a.onnx"), "float file": student.with_name("b.onnx")}
    assert run(f"quantize {student} --out {files['checkpoint']}") == 0
    assert run(f"quantize {student.with_suffix('.onnx')} --out {files['float file']}") == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith(f"next: compress validate {files['float file']} --data ") and "--reference" in last
    assert run(f"export {student} --precision int8") == 0
    assert "note: IREE 3.13 cannot compile" in capsys.readouterr().out  # at 64 pixels a level has one place
    expected = constants(student.with_name("student.int8.onnx"))
    for how, file in files.items():
        found = constants(file)
        assert found.keys() == expected.keys(), how
        assert all(np.array_equal(found[name], expected[name]) for name in found), how
        quantization = card_from_file(file).quantization
        assert quantization is not None and quantization.target == "cpu" and len(quantization.image_hashes) == 6


def test_a_mixed_file_comes_from_the_fp16_one(student: Path) -> None:
    half = student.with_name("student.fp16.onnx")
    assert run(f"quantize {half} --precision mixed") == 0
    measured = card_from_file(half).half
    assert measured is not None and measured.images > 1 and measured.float32 == {}
    card = card_from_file(student.with_name("student.mixed.onnx"))
    assert card.quantization is not None and card.quantization.target == "tensorrt"
    assert {kind for part in card.precision.values() for kind in part.split("+")} >= {"int8", "fp16"}
    assert card.half == measured


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("student.onnx --precision mixed", "is fp32, and mixed files are made from fp16 ones"),
        ("student.fp16.onnx", "is fp16, and int8 files are made from fp32 ones"),
        ("student.onnx --precision mixed --target cpu", "--target: mixed files are for TensorRT only"),
        ("student.onnx --precision fp16", "--precision: 'fp16' is none of int8, mixed"),
        ("student.onnx --input-size 64x64", "--input-size: "),
        ("student.onnx --images .", "--images: is only looked at with --data"),
        ("student.onnx --out x.engine", "--out: x.engine does not end in .onnx"),
        ("none.onnx", "none.onnx: no such file"),
        ("student.onnx --max-map-drop nan", "--max-map-drop"),
        ("student.onnx --calibration void", "void"),
    ],
)
def test_mistakes_are_one_line(
    student: Path, words: str, says: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(student.parent)
    assert run(f"quantize {words}") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and says in line


def test_only_onnx_files_are_built(student: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(f"build {student}") == 2
    assert f"{student}: is not an .onnx file" in capsys.readouterr().err
