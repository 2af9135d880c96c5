"""Teachers of torchvision with random weights, against its own models used by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torchvision.models import detection

from compress.config.teacher import Source, Torchvision
from compress.data.batch import Target
from compress.detectors.base import Capability
from compress.detectors.checkpoints import COCO_CATEGORIES
from compress.teachers.base import BoxTeacher
from compress.teachers.load import open_teacher
from compress.teachers.torchvision import TorchvisionTeacher, build_torchvision, detector_of
from deploy.core.errors import UserError
from tests.helpers.teacher_files import CPU, noise, sample

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


def near(found: Any, wanted: Any) -> None:
    """Within 1e-4 of the scale of the values."""
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-4 * max(1.0, float(wanted.abs().max())))


@pytest.mark.parametrize("name", ["fcos_resnet50_fpn", "retinanet_resnet50_fpn", "retinanet_resnet50_fpn_v2"])
def test_methods_learn_from_the_whole_model(name: Any) -> None:
    """Maps, logits, boxes and losses of torchvision's own `forward` on the same random weights; and of some classes."""
    torch.manual_seed(0)
    model: Any = getattr(detection, name)(weights=None, weights_backbone=None, num_classes=4)
    model.eval()
    layer = model.head.classification_head.cls_logits
    torch.nn.init.normal_(layer.weight, std=0.15), torch.nn.init.normal_(layer.bias, mean=-1, std=0.5)
    model.transform.min_size, model.transform.max_size = (96,), 128
    model.score_thresh, model.nms_thresh, model.detections_per_img, model.topk_candidates = 0.05, 0.6, 100, 1000
    pixels = torch.stack([torch.from_numpy(noise(96, 128, seed)).permute(2, 0, 1) for seed in range(2)])
    images = list(pixels / 255)
    boxes = [torch.tensor([[4.0, 6, 60, 80], [50, 40, 120, 90]]), torch.tensor([[10.0, 20, 31, 44]])]
    labels = [torch.tensor([1, 3]), torch.tensor([2])]
    targets = [
        Target(of_image, classes, torch.zeros(len(classes), dtype=torch.bool), None, 0, (96, 128), (96, 128))
        for of_image, classes in zip(boxes, labels, strict=True)
    ]
    ours, some = detector_of(model, range(4)), detector_of(model, [1, 3])
    assert ours is not None and some is not None and Capability.DENSE in ours.capabilities
    with torch.no_grad():
        seen, _ = model.transform(images)
        maps, theirs = ours.features(pixels), list(model.backbone(seen.tensors).values())
        assert len(maps) == len(theirs) == 5
        for found, wanted in zip(maps, theirs, strict=True):
            near(found, wanted)
        logits = model.head(theirs)["cls_logits"]
        near(_logits(ours.predict(maps)), logits)
        near(_logits(some.predict(maps)), logits[:, :, [1, 3]])
        prediction = ours.predict(maps)
        for found, wanted in zip(
            ours.decode(prediction, [target.image_size for target in targets]), model(images), strict=True
        ):
            assert len(found.boxes) == len(wanted["boxes"]) == 100
            near(found.boxes, wanted["boxes"])
            near(found.scores, wanted["scores"])
            assert torch.equal(found.labels, wanted["labels"])
        truth = [{"boxes": of_image, "labels": classes} for of_image, classes in zip(boxes, labels, strict=True)]
        losses = ours.loss(prediction, ours.assign(prediction, targets))
        names = {"classification": "loss_cls", "bbox_regression": "loss_bbox", "bbox_ctrness": "loss_centerness"}
        model.train()  # only then torchvision gives losses
        for module in model.modules():
            module.train(module.training and not isinstance(module, torch.nn.BatchNorm2d))
        wanted = {names[key]: value for key, value in model(images, truth).items()}
        assert losses.keys() == wanted.keys()
        for key, value in wanted.items():
            near(losses[key], value)


def _logits(prediction: Any) -> torch.Tensor:
    return torch.cat([prediction.class_logits(level) for level in range(5)], 2).transpose(1, 2)


def test_what_two_stages_teach() -> None:
    """The maps of the whole model; boxes and scores of the second stage for given proposals, for 80 classes of 91."""
    teacher = torchvision("fasterrcnn_resnet50_fpn", names=None, short=64, long=96)
    assert isinstance(teacher, TorchvisionTeacher) and teacher.detector is not None
    assert teacher.detector.num_classes == 80 and Capability.DENSE not in teacher.capabilities
    pixels = torch.from_numpy(noise(64, 96)).permute(2, 0, 1)
    with torch.no_grad():
        maps = teacher.detector.features(pixels[None])
        theirs = list(teacher._model.backbone(teacher._model.transform.normalize(pixels / 255)[None]).values())
    assert len(maps) == len(teacher.detector.strides) == 4
    for found, wanted in zip(maps, theirs, strict=False):
        near(found, wanted)
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
        ("weights: coco has COCO's 80 classes already", ("ssdlite320_mobilenet_v3_large", "coco", ("a",))),
    ):
        with pytest.raises(UserError, match=message) as caught:
            torchvision(*arguments)
        assert "\n" not in str(caught.value)


def test_labels_without_a_class_are_left_out() -> None:
    source = Torchvision(model="ssdlite320_mobilenet_v3_large", weights="none", class_names=("a", None, "N/A", "b"))
    model, labels, names = build_torchvision(source)
    assert (labels, names) == ([1, 4], ("a", "b"))
    assert model.head.classification_head.num_columns == 5
