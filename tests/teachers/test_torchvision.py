"""Teachers of torchvision with random weights, against its own models used by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torchvision.models import detection

from compress.detectors.base import Capability
from compress.detectors.checkpoints import COCO_CATEGORIES
from compress.teachers.base import BoxTeacher
from compress.teachers.load import open_teacher
from compress.teachers.settings import Source, Torchvision
from compress.teachers.torchvision import TorchvisionTeacher
from deploy.errors import UserError
from tests.teachers.makers import CPU, noise, sample

NAMES = ("a", "b", "c")
PICTURES = [noise(60, 80), noise(60, 80, 1), noise(90, 50, 2)]
SAMPLES = [sample(picture, index) for index, picture in enumerate(PICTURES)]


def torchvision(model: Any, weights: Any = "none", names: tuple[str, ...] | None = NAMES, **more: Any) -> BoxTeacher:
    settings = Torchvision(model=model, weights=weights, class_names=names, **more)
    return open_teacher(Source(torchvision=settings), CPU)


@pytest.mark.parametrize(
    "name", ["ssdlite320_mobilenet_v3_large", "fasterrcnn_mobilenet_v3_large_320_fpn", "fcos_resnet50_fpn"]
)
def test_torchvision_gives_what_it_gives(tmp_path: Path, name: Any) -> None:
    """A file of weights, images of two sizes in one call; each image alone in torchvision's own model."""
    torch.manual_seed(3)
    model: Any = getattr(detection, name)(weights=None, weights_backbone=None, num_classes=4).eval()
    limits: dict[str, int] = {}
    if not name.startswith("ssd"):
        limits = {"short": 64, "long": 96}
        model.transform.min_size, model.transform.max_size = (64,), 96
    if name.startswith("fasterrcnn"):
        model.roi_heads.score_thresh = 0.2
    else:
        model.score_thresh = 0.2 if name.startswith("ssd") else 0.05
    threshold = 0.05 if name.startswith("fcos") else 0.2
    torch.save(model.state_dict(), tmp_path / "weights.pth")
    teacher = torchvision(name, tmp_path / "weights.pth", **limits)
    assert teacher.class_names == NAMES and teacher.file == "weights.pth"
    counts = 0
    for picture, found in zip(PICTURES, teacher.detect(SAMPLES, score_threshold=threshold), strict=True):
        with torch.no_grad():
            (alone,) = model([torch.from_numpy(picture).permute(2, 0, 1) / 255])
        sides = alone["boxes"][:, 2:] - alone["boxes"][:, :2]
        kept = (alone["labels"] > 0) & (sides > 0).all(1)  # FCOS scores the background too, and has empty boxes
        np.testing.assert_allclose(found.scores, alone["scores"][kept], atol=1e-5)
        np.testing.assert_allclose(found.boxes, alone["boxes"][kept], atol=0.02)
        assert (found.labels + 1).tolist() == alone["labels"][kept].tolist()
        counts += len(found.labels)
    assert counts > 5


@pytest.mark.parametrize("name", ["retinanet_resnet50_fpn", "fcos_resnet50_fpn", "fasterrcnn_resnet50_fpn"])
def test_what_methods_learn_from_is_the_same_model(name: Any) -> None:
    """The maps of torchvision's own backbone, and its detections of the classes that are left of 91."""
    teacher = torchvision(name, names=None, short=64, long=96)
    assert isinstance(teacher, TorchvisionTeacher) and teacher.detector is not None
    whole, ours = teacher._model, teacher.detector
    assert ours.num_classes == 80 and Capability.FEATURES in teacher.capabilities
    assert (Capability.DENSE in teacher.capabilities) == (not name.startswith("faster"))
    pixels = torch.from_numpy(noise(64, 96)).permute(2, 0, 1)
    with torch.no_grad():
        normalised = whole.transform.normalize(pixels / 255)[None]
        theirs = list(whole.backbone(normalised).values())
        maps = ours.features(pixels[None])
        for mine, other in zip(maps, theirs, strict=False):
            torch.testing.assert_close(mine, other, rtol=1e-3, atol=1e-3)
        assert len(maps) == len(ours.strides) == (4 if name.startswith("faster") else 5)
        if name.startswith("faster"):
            return  # its proposals are limited before classes are known, so classes that are dropped leave a trace
        prediction = ours.predict(maps)
        scores = prediction.scores()[0]
        outputs = whole.head(theirs)
        raw = outputs["cls_logits"][0].sigmoid()
        if name.startswith("fcos"):
            raw = (raw * outputs["bbox_ctrness"][0].sigmoid()).sqrt()
        torch.testing.assert_close(scores, raw[:, list(COCO_CATEGORIES)], rtol=1e-3, atol=1e-5)


def test_two_stages_keep_the_classes_that_are_chosen() -> None:
    """Boxes and scores of the second stage for given proposals, of 80 classes out of 91."""
    teacher = torchvision("fasterrcnn_resnet50_fpn", names=None, short=64, long=96)
    assert isinstance(teacher, TorchvisionTeacher) and teacher.detector is not None
    whole: Any = teacher._model.roi_heads.box_predictor
    ours: Any = teacher.detector.roi_heads.box_predictor  # type: ignore[union-attr]
    x = torch.randn(3, whole.cls_score.in_features)
    kept = [0, *COCO_CATEGORIES]
    torch.testing.assert_close(ours(x)[0], whole(x)[0][:, kept])
    torch.testing.assert_close(ours(x)[1].view(3, 81, 4), whole(x)[1].view(3, 91, 4)[:, kept])


@pytest.mark.parametrize("name", ["ssdlite320_mobilenet_v3_large", "fasterrcnn_mobilenet_v3_large_320_fpn"])
def test_boxes_alone(name: Any) -> None:
    teacher = torchvision(name)
    assert teacher.detector is None and teacher.capabilities == {Capability.BOXES}


def test_random_weights_are_the_same_everywhere() -> None:
    torch.manual_seed(5)
    first = torchvision("ssdlite320_mobilenet_v3_large")
    torch.manual_seed(6)
    assert first.sha256 == torchvision("ssdlite320_mobilenet_v3_large").sha256


def test_coco_has_eighty_classes(tmp_path: Path) -> None:
    """Weights of 91 outputs without class names: the gaps in COCO's ids are no classes."""
    model = detection.ssdlite320_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=91)
    torch.save(model.state_dict(), tmp_path / "coco.pth")
    teacher = torchvision("ssdlite320_mobilenet_v3_large", tmp_path / "coco.pth", names=None)
    assert teacher.class_names is not None and len(teacher.class_names) == 80
    assert (teacher.class_names[0], teacher.class_names[-1]) == ("person", "toothbrush")
    (found,) = teacher.detect(SAMPLES[:1], score_threshold=0.001)
    assert 0 <= found.labels.min() <= found.labels.max() < 80


def test_torchvision_mistakes_are_one_line(tmp_path: Path) -> None:
    model = detection.ssdlite320_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=4)
    torch.save(model.state_dict(), tmp_path / "w.pth")
    for message, arguments in (
        ("none.pth: no such file", ("ssdlite320_mobilenet_v3_large", tmp_path / "none.pth")),
        (
            "w.pth: weights do not fit the model; wrong shape",
            ("ssdlite320_mobilenet_v3_large", tmp_path / "w.pth", ("a",)),
        ),
        ("w.pth: weights do not fit the model; missing", ("fasterrcnn_mobilenet_v3_large_320_fpn", tmp_path / "w.pth")),
        ("weights: coco knows COCO's 80 classes", ("ssdlite320_mobilenet_v3_large", "coco", ("a",))),
    ):
        with pytest.raises(UserError, match=message) as caught:
            torchvision(*arguments)
        assert "\n" not in str(caught.value)
