"""The examples go the whole way: one detector teaches another of its class by an own method, on images that an own
teacher has labelled, and the student is exported, proven and served."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import compress
from compress.config.recipe import load_recipe
from compress.detectors.base import ImageSize
from compress.detectors.checkpoints import load_detector
from compress.run import pipeline
from compress.teachers.base import Sample
from deploy.serve.client import Client
from examples.own_detector.centers import Centers
from examples.own_method.attention_transfer import AttentionTransfer
from examples.own_teacher.colours import Colours
from tests.helpers.server_process import server

pytestmark = pytest.mark.usefixtures("few_rounds")

CENTERS = "examples.own_detector.centers:Centers"
METHOD = "examples.own_method.attention_transfer:AttentionTransfer"
RED, BLUE = [220, 30, 30], [30, 60, 220]


def draw(folder: Path, images: int, seed: int) -> Path:
    """Red and blue squares on grey noise with their labels, as COCO JSON; returns its path."""
    random = np.random.default_rng(seed)
    (folder / "images").mkdir(parents=True)
    document: dict[str, list[dict[str, Any]]] = {
        "images": [],
        "annotations": [],
        "categories": [{"id": 1, "name": "red square"}, {"id": 2, "name": "blue square"}],
    }
    for image_id in range(1, images + 1):
        pixels = random.integers(90, 130, (96, 128, 3), dtype=np.uint8)
        for category, colour in ((1, RED), (2, BLUE)):
            side = int(random.integers(20, 40))
            x, y = int(random.integers(0, 64 - side)) + 64 * (category - 1), int(random.integers(0, 96 - side))
            pixels[y : y + side, x : x + side] = colour
            box = {"bbox": [x, y, side, side], "area": side * side, "iscrowd": 0}
            document["annotations"].append(
                {"id": len(document["annotations"]) + 1, "image_id": image_id, "category_id": category, **box}
            )
        Image.fromarray(pixels).save(folder / "images" / f"{image_id}.png")
        document["images"].append({"id": image_id, "file_name": f"{image_id}.png", "width": 128, "height": 96})
    file = folder / "labels.json"
    file.write_text(json.dumps(document))
    return file


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("own")
    train, val = (draw(folder / name, n, seed) for name, n, seed in (("train", 16, 0), ("val", 6, 1)))
    schedule = {"name": "cosine", "warmup_steps": 5}
    fit = {"batch_size": 4, "optimizer": {"name": "adamw", "lr": 2e-3}, "schedule": schedule}
    return {
        "name": "own",
        "runs": folder / "runs",
        "data": {
            "train": {"annotations": train, "images": train.parent / "images"},
            "val": {"annotations": val, "images": val.parent / "images"},
            "short": 96,
            "long": 128,
            "workers": 0,
            "cache": True,
        },
        "labels": {"fraction": 0.5},
        "pseudo_labels": {
            "teachers": [
                {
                    "custom": {
                        "factory": "examples.own_teacher.colours:Colours",
                        "options": {"classes": {"red square": RED, "blue square": BLUE}},
                    }
                }
            ],
            "tau": 0.4,
            "tau_ignore": 0.4,  # this detector does not leave regions out of its loss
            "fine_tune": None,
        },
        "teacher": {
            "model": {"detector": CENTERS, "options": {"width": 32}},
            "train": {"steps": 120, **fit},
        },
        "student": {"detector": CENTERS, "options": {"width": 16}},
        "methods": {METHOD: {"weight": 1.0, "options": {"beta": 5.0}}},
        "train": {"steps": 120, **fit},
        "deploy": {"benchmark": {"seconds": 0.2}, "max_batch": 2},
    }


@pytest.fixture(scope="module")
def run(recipe: dict[str, Any]) -> Path:
    """The finished run."""
    return pipeline.run(load_recipe(recipe))


def test_it_learns_and_ships(run: Path) -> None:
    report = json.loads((run / "report.json").read_text())
    assert report["models"]["student"]["map50"] > 50 and report["models"]["teacher"]["map50"] > 50
    assert report["pseudo_labels"]["labels"] == 16, "two squares on each of the eight images without labels"
    file = next(artifact for artifact in report["artifacts"] if artifact["file"] == "student.onnx")
    assert file["gate"] == "pass" and file["map"] > 30
    with open(run / "student" / "metrics.csv", newline="") as rows:
        assert float(next(csv.DictReader(rows))["attention"]) > 0


def test_the_checkpoint_names_the_class(run: Path) -> None:
    detector, record = load_detector(run / "student.safetensors")
    assert isinstance(detector, Centers) and detector.feature_channels == 16
    assert record.model.detector == CENTERS and record.model.options == {"width": 16}


def test_the_file_is_served(run: Path, recipe: dict[str, Any]) -> None:
    picture = Path(recipe["data"]["val"]["images"]) / "1.png"
    alone = compress.open(run / "student.onnx").detect(picture, min_score=0.3)
    assert {alone.class_names[label] for label in alone.labels} == {"red square", "blue square"}
    with server(run / "student.onnx") as running:
        served = Client(running.url).detect(picture, min_score=0.3)
    assert len(served) == len(alone)
    np.testing.assert_allclose(served.boxes, alone.boxes, atol=0.01)


def test_a_method_is_handed_over_as_an_object(recipe: dict[str, Any], run: Path) -> None:
    changed = {**recipe, "name": "object", "methods": {}, "labels": None, "pseudo_labels": None}
    changed["teacher"] = {"checkpoint": str(run / "teacher.safetensors")}
    changed["train"] = {**recipe["train"], "steps": 8}
    made = compress.distill(changed, methods={"mine": AttentionTransfer(beta=5.0)})
    with open(made.folder / "student" / "metrics.csv", newline="") as rows:
        assert float(next(csv.DictReader(rows))["attention"]) > 0


def test_colours_find_each_thing_once() -> None:
    picture = torch.full((3, 40, 60), 100, dtype=torch.uint8)
    picture[:, 5:25, 10:30] = torch.tensor(RED, dtype=torch.uint8)[:, None, None]
    picture[:, 30:32, 50:52] = torch.tensor(RED, dtype=torch.uint8)[:, None, None]  # a spot
    sample = Sample(None, 1, ImageSize((40, 60), (40, 60)), "a.png", original=picture)
    (found,) = Colours(classes={"red": RED}).detect([sample], score_threshold=0.5)
    assert found.boxes.tolist() == [[10, 5, 30, 25]] and found.scores.tolist() == [1.0] and found.labels.tolist() == [0]
