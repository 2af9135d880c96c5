"""Teachers of transformers with random weights, against that library used by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from compress.config.teacher import Source, Transformers
from compress.detectors.base import Capability
from compress.teachers.load import open_teacher
from deploy.core.errors import UserError
from tests.helpers.teacher_files import CPU, noise, sample, transformers_model

NAMES = ("a", "b", "c")
PICTURES = [noise(60, 80), noise(60, 80, 1), noise(90, 50, 2)]
SAMPLES = [sample(picture, index) for index, picture in enumerate(PICTURES)]
tf = pytest.importorskip("transformers", reason="transformers is not installed: pip install -e '.[transformers]'")
KINDS = ["detr", "rt_detr_v2", "d_fine"]


@pytest.mark.parametrize("kind", KINDS)
def test_transformers_give_what_they_give(tmp_path: Path, kind: Any) -> None:
    """Labels with a gap among them, as COCO models have; each image alone through processor and model."""
    nothing = "N/A" if kind == "detr" else "background"
    folder = transformers_model(tmp_path / kind, kind, {0: nothing, 1: "a", 2: "b", 3: "c"})
    teacher = open_teacher(Source(transformers=Transformers(model=folder)), CPU)
    assert teacher.class_names == NAMES and teacher.file == kind
    queries = teacher.capabilities & {Capability.QUERIES, Capability.QUERY_DISTRIBUTIONS}
    assert not queries, "a label that is no class shifts the logits"
    assert (teacher.detector is None) == (kind == "detr")
    processor = tf.AutoImageProcessor.from_pretrained(folder)
    model = tf.AutoModelForObjectDetection.from_pretrained(folder).eval()
    counts = 0
    for picture, found in zip(PICTURES, teacher.detect(SAMPLES, score_threshold=0.15), strict=True):
        inputs = processor(images=[picture], return_tensors="pt")
        with torch.no_grad():
            output = model(**inputs)
        size = torch.tensor([picture.shape[:2]])
        (alone,) = processor.post_process_object_detection(output, threshold=0.15, target_sizes=size)
        height, width = picture.shape[:2]
        boxes = alone["boxes"].clamp(min=0)
        boxes = torch.stack((boxes[:, 0::2].clamp(max=width), boxes[:, 1::2].clamp(max=height)), -1).flatten(1)
        kept = (alone["labels"] > 0) & (boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1])
        wanted = sorted(
            [round(s, 3), label - 1, *(round(side, 1) for side in box)]
            for s, label, box in zip(
                alone["scores"][kept].tolist(), alone["labels"][kept].tolist(), boxes[kept].tolist(), strict=True
            )
        )
        mine = sorted(
            [round(s, 3), label, *(round(side, 1) for side in box)]
            for s, label, box in zip(found.scores.tolist(), found.labels.tolist(), found.boxes.tolist(), strict=True)
        )
        np.testing.assert_allclose(mine, wanted, atol=0.11)
        assert found.scores.tolist() == sorted(found.scores.tolist(), reverse=True)
        counts += len(mine)
    assert counts > 5


@pytest.mark.parametrize("kind", ["rt_detr_v2", "d_fine", "rf_detr"])
def test_a_family_that_trains_here_gives_maps_and_queries(tmp_path: Path, kind: Any) -> None:
    """The library's own, of the images that the student sees, normalised as its processor does."""
    folder = transformers_model(tmp_path / kind, kind, dict(enumerate(NAMES)))
    processor = tf.AutoImageProcessor.from_pretrained(folder)
    processor.do_normalize = True
    processor.save_pretrained(folder)
    teacher = open_teacher(Source(transformers=Transformers(model=folder)), CPU)
    detector = teacher.detector
    assert detector is not None and not detector.training and teacher.class_names == NAMES
    assert teacher.capabilities == detector.capabilities >= {Capability.FEATURES, Capability.QUERIES}
    assert not any(p.requires_grad for p in detector.parameters())
    picture = torch.from_numpy(noise(64, 96)).permute(2, 0, 1)[None]
    model = tf.AutoModelForObjectDetection.from_pretrained(folder).eval()
    prepared = processor(images=picture[0], do_resize=False, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        wanted = model(prepared)
        features = detector.features(picture)
        found = detector.predict(features)
    maps = [wanted.backbone_features] if kind == "rf_detr" else wanted.encoder_last_hidden_state
    for ours, theirs in zip(features, maps, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.logits, wanted.logits, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.boxes, wanted.pred_boxes, rtol=1e-4, atol=1e-4)


def test_transformers_identity_and_preprocessing(tmp_path: Path) -> None:
    names = {0: "a", 1: "b"}
    detr = open_teacher(Source(transformers=Transformers(model=transformers_model(tmp_path / "x", "detr", names))), CPU)
    assert detr.preprocessing is not None and detr.preprocessing.size == "short side 64, long side 96"
    np.testing.assert_allclose(detr.preprocessing.mean, [123.675, 116.28, 103.53], atol=1e-3)
    fine = transformers_model(tmp_path / "y", "rt_detr_v2", names)
    first = open_teacher(Source(transformers=Transformers(model=fine)), CPU)
    assert first.preprocessing is not None and first.preprocessing.size == "stretched to 64 x 64"
    assert first.preprocessing.std == (255.0, 255.0, 255.0)
    config = fine / "preprocessor_config.json"
    config.write_text(config.read_text().replace("64", "96"))
    assert open_teacher(Source(transformers=Transformers(model=fine)), CPU).sha256 != first.sha256


def test_a_name_on_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the library's cache, without a network; what is not in it is one line."""
    from huggingface_hub import constants

    from compress.cli.init import _source

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    kept = tmp_path / "models--owner--small"
    folder = transformers_model(kept / "snapshots" / "0123", "rt_detr_v2", dict(enumerate(NAMES)))
    (kept / "refs").mkdir()
    (kept / "refs" / "main").write_text("0123")
    monkeypatch.chdir(tmp_path)
    teacher = open_teacher(_source("owner/small"), CPU)
    assert teacher.class_names == NAMES
    assert teacher.sha256 == open_teacher(Source(transformers=Transformers(model=folder)), CPU).sha256
    with pytest.raises(
        UserError, match=r"teacher.transformers.model: owner/other, on the Hub: cannot be had: "
    ) as caught:
        open_teacher(_source("owner/other"), CPU)
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="nowhere: no such folder, and no name of the Hub"):
        open_teacher(Source(transformers=Transformers(model=Path("nowhere"))), CPU)


def test_transformers_mistakes_are_one_line(tmp_path: Path) -> None:
    folder = transformers_model(tmp_path / "m", "rt_detr_v2", {0: "a", 1: "b"})

    def refused(message: str) -> None:
        with pytest.raises(UserError, match=message) as caught:
            open_teacher(Source(transformers=Transformers(model=folder)), CPU)
        assert "\n" not in str(caught.value)

    config = (folder / "config.json").read_text()
    (folder / "config.json").write_text(config.replace('"d_model": 16', '"d_model": 32'))
    refused("m: (its weights do not fit its config|transformers cannot load it)")
    (folder / "config.json").write_text('{"model_type": "bert"}')
    refused("m: transformers cannot load it as a detector")
    (folder / "config.json").unlink()
    refused("no config.json in it")
