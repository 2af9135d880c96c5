"""`--json -`: whatever a command prints for people, stdout is one JSON document."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from compress.config.model import Model
from compress.detectors.build import build_detector
from compress.detectors.checkpoints import ModelRecord, save_detector
from tests.helpers.command_line import Run


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a file, a checkpoint, images and labels that fit them."""
    from tests.helpers.cheap_exports import tiny_file
    from tests.helpers.tiny_onnx import CARD

    folder = tmp_path_factory.mktemp("json")
    shutil.copy(tiny_file(tmp_path_factory), folder / "tiny.onnx")
    height, width = CARD.input_size
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    (folder / "images").mkdir()
    Image.fromarray(pixels).save(folder / "images" / "0.png")
    names = zip(CARD.category_ids, CARD.class_names, strict=True)
    labels = {
        "images": [{"id": 1, "file_name": "0.png", "width": width, "height": height}],
        "categories": [{"id": number, "name": name} for number, name in names],
        "annotations": [{"id": 1, "image_id": 1, "category_id": 2, "bbox": [4, 4, 20, 20], "area": 400, "iscrowd": 0}],
    }
    (folder / "labels.json").write_text(json.dumps(labels))
    model = Model(backbone="nano", neck_channels=32, head_depth=1)
    record = ModelRecord(
        model=model, num_classes=1, class_names=("cat",), category_ids=(1,), resize_short_long=(64, 64)
    )
    save_detector(folder / "whole.safetensors", build_detector(model, 1, 0), metadata=record)
    return folder


@pytest.mark.parametrize(
    ("line", "code", "holds", "says"),
    [
        ("doctor", None, "python", "state"),
        ("data check labels.json --images images", 0, "fit", "fit for training"),
        ("validate tiny.onnx --data labels.json --images images", 0, "metrics", "next: compress benchmark"),
        (
            "benchmark tiny.onnx --images images --seconds 0.1 --rounds 2 --warm-up 0 --scope compute",
            0,
            "cells",
            "next: compress serve tiny.onnx",
        ),
        ("check-model tests.helpers.broken_centers:BackgroundClass", 1, "detail", "fail"),
        ("prune whole.safetensors --gflops 0.5 --input-size 64x64 --force", 0, "sizes", "parameters"),
        (
            "pseudo-label whole.safetensors --images images --out out.json --tau 0.5 --workers 0",
            0,
            "labels",
            "next: compress data check out.json",
        ),
    ],
)
@pytest.mark.usefixtures("few_rounds")
def test_stdout_is_one_document(
    run: Run, world: Path, monkeypatch: pytest.MonkeyPatch, line: str, code: int | None, holds: str, says: str
) -> None:
    monkeypatch.syspath_prepend(str(Path.cwd()))
    monkeypatch.chdir(world)
    ended, out, err = run(f"{line} --json -")
    found: Any = json.loads(out)
    assert holds in json.dumps(found) and says in err
    assert code is None or ended == code, err


def test_a_file_leaves_stdout_for_people(run: Run, world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(world)
    ended, out, err = run("data check labels.json --images images --json found.json")
    assert (ended, err) == (0, "") and "fit for training" in out
    assert json.loads(Path("found.json").read_text())["fit"] is True
