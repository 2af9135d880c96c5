"""mmdet's detectors as teachers: what they give equals what mmdet itself gives, and bad files are one clear line."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from mmdet.models import RetinaNet
from mmdet.structures import DetDataSample
from mmengine.config import Config
from mmengine.logging import MessageHub
from torch import Tensor

from compress.config.teacher import Mmdet
from compress.data.batch import ImageSize
from compress.detectors.base import Capability
from compress.teachers.base import DetectorTeacher, Sample, View
from compress.teachers.mmdet import Maps, MmdetDetector, open_mmdet
from deploy.core.errors import UserError
from tests.parity_mmdet import models
from tests.parity_mmdet.compare import same

DENSE = ("gfl", "ld", "atss", "retinanet", "fcos")
KINDS = (*DENSE, "faster_rcnn")
CPU = torch.device("cpu")
BATCH = (128, 192)
SIZES = ((128, 192), (100, 150))
ORIGINALS = ((256, 384), (80, 120))


@dataclass
class Case:
    name: str
    theirs: Any
    teacher: DetectorTeacher
    images: Tensor

    @property
    def ours(self) -> MmdetDetector:
        detector = self.teacher.detector
        assert isinstance(detector, MmdetDetector)
        return detector

    def normalised(self) -> Tensor:
        """Detect by mmdet: images as it reads them, BGR."""
        inputs = list(self.images.flip(1))
        return self.theirs.data_preprocessor({"inputs": inputs, "data_samples": None})["inputs"]


@pytest.fixture(scope="module", params=KINDS)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    settings = models.config(request.param)
    theirs = models.build(settings, seed=1)
    config, checkpoint = models.save(tmp_path_factory.mktemp(request.param), settings, theirs)
    state = torch.get_rng_state()
    teacher = open_mmdet(Mmdet(config=config, checkpoint=checkpoint), CPU)
    assert torch.equal(torch.get_rng_state(), state), "opening a teacher changes no random numbers"
    return Case(request.param, theirs, teacher, pictures())


def pictures() -> Tensor:
    generator = torch.Generator().manual_seed(5)
    coarse = torch.rand(2, 3, 12, 16, generator=generator)
    images = torch.nn.functional.interpolate(coarse, size=BATCH, mode="bicubic").clamp(0, 1) * 255
    return images.to(torch.uint8)


def sizes() -> list[ImageSize]:
    return [ImageSize(size, original) for size, original in zip(SIZES, ORIGINALS, strict=True)]


def samples() -> list[DetDataSample]:
    return [
        DetDataSample(
            metainfo={
                "img_shape": size,
                "ori_shape": original,
                "batch_input_shape": BATCH,
                "pad_shape": BATCH,
                "scale_factor": (size[1] / original[1], size[0] / original[0]),
            }
        )
        for size, original in zip(SIZES, ORIGINALS, strict=True)
    ]


def test_what_it_can(case: Case) -> None:
    capabilities = {Capability.BOXES, Capability.FEATURES}
    if case.name in DENSE:
        capabilities.add(Capability.DENSE)
    if case.name in ("gfl", "ld"):
        capabilities.add(Capability.DISTRIBUTIONS)
    teacher, ours = case.teacher, case.ours
    assert teacher.capabilities == ours.capabilities == capabilities
    assert ours.strides == ((4, 8, 16, 32, 64) if case.name == "faster_rcnn" else (8, 16, 32, 64, 128))
    assert ours.feature_channels == 64 and ours.num_classes == 3
    assert teacher.class_names == ("class0", "class1", "class2")
    assert teacher.file == "model.pth" and len(teacher.sha256) == 64 and teacher.view is View.RESIZED
    assert not ours.training and not any(p.requires_grad for p in ours.parameters())
    assert teacher.preprocessing is not None and teacher.preprocessing.order == (
        "BGR" if case.name == "fcos" else "RGB"
    )
    assert ours.mean.flatten().tolist() == pytest.approx([123.675, 116.28, 103.53])
    if case.name == "retinanet":
        assert ours.cells is not None
        assert [len(level) for level in ours.cells] == [9] * 5
        assert ours.cells[0][3] == pytest.approx((32, 32)) and ours.cells[4][3] == pytest.approx((512, 512))
    else:
        assert ours.cells is None


@torch.no_grad()
def test_features(case: Case) -> None:
    ours, theirs = case.ours.features(case.images), case.theirs.extract_feat(case.normalised())
    for a, b, stride in zip(ours, theirs, case.ours.strides, strict=True):
        same(case.name, "features", a, b, tolerance=1e-5)
        assert a.shape[2:] == (-(-BATCH[0] // stride), -(-BATCH[1] // stride))
        assert 0.05 < float(b.std()) < 20


@torch.no_grad()
def test_dense_outputs(case: Case) -> None:
    if case.name not in DENSE:
        features = case.ours.features(case.images)
        assert case.ours.predict(features) == Maps(features, (4, 8, 16, 32, 64))
        with pytest.raises(TypeError, match="FasterRCNN gives no dense"):
            case.ours.decode_boxes(case.ours.predict(features))
        return
    prediction = case.ours.predict(case.ours.features(case.images))
    logits, boxes, *centerness = case.theirs(case.normalised(), mode="tensor")
    raw = prediction.distribution if case.name in ("gfl", "ld") else prediction.box_deltas
    for level in range(5):
        same(case.name, "logits", prediction.logits[level], logits[level], tolerance=1e-5)
        scale = boxes[level].abs().max().clamp(min=1)  # FCOS: pixels, up to thousands
        same(case.name, "distribution or sides", raw[level] / scale, boxes[level] / scale, tolerance=1e-5)
        if centerness:
            same(case.name, "centerness", prediction.centerness[level], centerness[0][level], tolerance=1e-5)
    assert bool(centerness) == (case.name in ("atss", "fcos")) == bool(prediction.centerness)
    assert prediction.anchors == (9 if case.name == "retinanet" else 1)


@torch.no_grad()
def test_boxes(case: Case) -> None:
    """Selected by mmdet, in pixels of the file, each image within its own size."""
    ours = case.ours.decode(case.ours(case.images), sizes())
    theirs = case.theirs.predict(case.normalised(), samples(), rescale=True)
    for found, sample, original in zip(ours, theirs, ORIGINALS, strict=True):
        expected = sample.pred_instances
        assert len(expected) > 20
        assert found.labels.tolist() == expected.labels.tolist() and found.labels.dtype == torch.int64
        same(case.name, "scores", found.scores, expected.scores)
        same(case.name, "boxes, pixels of the file", found.boxes, expected.bboxes, tolerance=1e-3)
        assert (found.scores.diff() <= 0).all()
        assert float(found.boxes[:, 0::2].max()) <= original[1] and float(found.boxes[:, 1::2].max()) <= original[0]
    fewer = case.ours.decode(case.ours(case.images), sizes(), score_threshold=float(ours[0].scores[4]))
    assert len(fewer[0].scores) == 4, "strictly above the threshold"


@torch.no_grad()
def test_rows_of_the_dense_outputs(case: Case) -> None:
    """`decode_boxes` and the scores have the same order: each detection is found again, box and score in one row."""
    if case.name not in DENSE:
        return
    prediction = case.ours(case.images)
    boxes = case.ours.decode_boxes(prediction)
    logits = torch.cat([prediction.class_logits(level) for level in range(5)], 2)  # [B, K, A]
    assert boxes.shape == (2, logits.shape[2], 4) and logits.shape[1] == 3
    found = case.ours.decode(prediction, sizes())[0]
    height, width = BATCH
    clipped = boxes[0].clone()
    clipped[:, 0::2] = clipped[:, 0::2].clamp(0, width)
    clipped[:, 1::2] = clipped[:, 1::2].clamp(0, height)
    scores = logits[0].sigmoid()
    if prediction.centerness:
        scores = scores * torch.cat([x[0].flatten() for x in prediction.centerness]).sigmoid()
    matched = 0
    for box, score, label in zip(found.boxes / 2, found.scores, found.labels, strict=True):
        difference = (clipped - box).abs().amax(1) + (scores[label] - score).abs()
        matched += bool(difference.min() < 1e-3)
    assert matched == len(found.scores) > 20


def test_gfl_of_other_bins_has_no_dense_outputs(tmp_path: Path) -> None:
    settings = models.config("gfl", width=32)
    settings.model.bbox_head.reg_max = 8
    config, checkpoint = models.save(tmp_path, settings, models.build(settings))
    teacher = open_mmdet(Mmdet(config=config, checkpoint=checkpoint), CPU)
    assert teacher.capabilities == {Capability.FEATURES, Capability.BOXES}


def test_as_a_teacher_of_boxes(case: Case) -> None:
    image = case.images[0]
    (found,) = case.teacher.detect([Sample(image, 0, sizes()[0], "a.png")], score_threshold=0.15)
    expected = case.theirs.predict(case.normalised()[:1], samples()[:1], rescale=True)[0].pred_instances
    expected = expected[expected.scores >= 0.15]
    assert found.labels.tolist() == expected.labels.tolist() and len(found.labels)
    same(case.name, "boxes, pixels of the file", found.boxes, expected.bboxes, tolerance=1e-3)


# --- files ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    settings = models.config("retinanet", width=32)
    return models.save(tmp_path_factory.mktemp("files"), settings, models.build(settings))


def error(config: Path, checkpoint: Path) -> str:
    with pytest.raises(UserError) as caught:
        open_mmdet(Mmdet(config=config, checkpoint=checkpoint), CPU)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_files_that_are_not_there(files: tuple[Path, Path], tmp_path: Path) -> None:
    config, checkpoint = files
    assert "teacher.mmdet.config" in error(tmp_path / "absent.py", checkpoint)
    assert "teacher.mmdet.checkpoint" in error(config, tmp_path / "absent.pth")


def test_configs_that_do_not_work(files: tuple[Path, Path], tmp_path: Path) -> None:
    _, checkpoint = files
    broken = tmp_path / "config.py"
    for text, expected in (
        ("model = dict(type=", "cannot be read"),
        ("raise RuntimeError('no GPU')", "no GPU"),
        ("a = 1", "no `model`"),
        ("model = dict(type='NoSuchDetector')", "NoSuchDetector"),
        ("model = dict(type='RetinaNet', backbone=dict(type='ResNet', depth=18))", "cannot be built"),
        ("model = dict(type='ResNet', depth=18)", "not a detector of images"),
    ):
        broken.write_text(text)
        assert expected in error(broken, checkpoint), text


def test_checkpoints_that_do_not_fit(files: tuple[Path, Path], tmp_path: Path) -> None:
    config, checkpoint = files
    content = torch.load(checkpoint)
    state = content["state_dict"]
    changed = tmp_path / "model.pth"
    removed = {key: value for key, value in state.items() if key != "bbox_head.retina_cls.bias"}
    for weights, expected in (
        (removed, "missing 1 key(s): bbox_head.retina_cls.bias"),
        (state | {"roi_head.x": torch.zeros(1)}, "unexpected 1 key(s): roi_head.x"),
        (state | {"bbox_head.retina_cls.bias": torch.zeros(5)}, "size mismatch for bbox_head.retina_cls.bias"),
        ({"epoch": 3}, "no state_dict"),
    ):
        torch.save({"state_dict": weights}, changed)
        assert expected in error(config, changed)
    changed.write_bytes(checkpoint.read_bytes()[:5000])
    assert "not a readable torch checkpoint" in error(config, changed)
    torch.save({"state_dict": state, "hook": Path("x")}, changed)
    assert "Python objects" in error(config, changed)


def test_a_checkpoint_as_a_training_run_leaves_it(files: tuple[Path, Path], tmp_path: Path) -> None:
    """mmengine's runner also writes buffers of logged numbers, which torch does not read by itself; and `module.`."""
    config, checkpoint = files
    content = torch.load(checkpoint)
    hub = MessageHub.get_instance("a run")
    for step in range(3):
        hub.update_scalar("train/loss", 0.5 * step)
        hub.update_scalar("train/lr", torch.tensor(0.1))
    hub.update_info("epoch", 1)
    content["message_hub"] = hub.state_dict()
    content["meta"]["dataset_meta"] = {"CLASSES": ("a", "b", "c"), "PALETTE": [(1, 2, 3)]}
    content["state_dict"] = {f"module.{key}": value for key, value in content["state_dict"].items()}
    written = tmp_path / "epoch_1.pth"
    torch.save(content, written)
    assert open_mmdet(Mmdet(config=config, checkpoint=written), CPU).class_names == ("a", "b", "c")


def test_class_names(files: tuple[Path, Path], tmp_path: Path) -> None:
    """The checkpoint's first, then the config's, then those of the config's data set; never of another number."""
    config, checkpoint = files
    content = torch.load(checkpoint)
    written = tmp_path / "model.pth"

    def names(meta: dict[str, Any], config: Path = config) -> tuple[str, ...] | None:
        torch.save({"meta": meta, "state_dict": content["state_dict"]}, written)
        return open_mmdet(Mmdet(config=config, checkpoint=written), CPU).class_names

    assert names({"CLASSES": ["x", "y", "z"]}) == ("x", "y", "z")
    assert names({}) == ("class0", "class1", "class2")
    assert names({"CLASSES": [str(i) for i in range(80)]}) == ("class0", "class1", "class2")
    settings = Config.fromfile(config)
    settings.test_dataloader.dataset.pop("metainfo")
    settings.dump(tmp_path / "config.py")
    assert names({}, tmp_path / "config.py") is None
    settings.test_dataloader.dataset.type = "CrowdHumanDataset"
    settings.model.bbox_head.num_classes = 1
    settings.dump(tmp_path / "config.py")
    model = models.build(settings)
    content["state_dict"] = model.state_dict()
    assert names({}, tmp_path / "config.py") == ("person",)


def test_a_model_that_needs_more_than_an_image(files: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    def predict(self: Any, images: Tensor, samples: list[DetDataSample], rescale: bool = True) -> None:
        raise KeyError("text")

    monkeypatch.setattr(RetinaNet, "predict", predict)
    assert "RetinaNet cannot detect in a plain image (KeyError: 'text')" in error(*files)
