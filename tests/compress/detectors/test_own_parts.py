"""Detectors and backbones of a user's own, by import path: built, trained, saved, loaded; and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open

from compress.config.families import FAMILY_FACTS
from compress.config.model import Model
from compress.data.batch import Batch, ImageSize, Target, collate
from compress.detectors.build import FAMILIES, build_detector, detector_class, model_of, model_size
from compress.detectors.checkpoints import HEADER_KEY, ModelRecord, load_detector, save_detector
from compress.export.deployable import Deployable
from deploy.core.errors import UserError
from tests.helpers import own_parts

PARTS = "tests.helpers.own_parts"
POINTS = Model(detector=f"{PARTS}:Points", options={"width": 16})


def batch() -> Batch:
    generator = torch.Generator().manual_seed(0)
    samples = []
    for index, (height, width) in enumerate([(64, 96), (60, 90)]):
        image = torch.randint(0, 256, (3, height, width), dtype=torch.uint8, generator=generator)
        boxes = torch.tensor([[4.0, 6.0, 50.0, 58.0], [30.0, 2.0, 80.0, 40.0]])
        ignore = torch.zeros(2, dtype=torch.bool)
        size = (height, width)
        samples.append((image, Target(boxes, torch.tensor([0, 2]), ignore, None, index, size, (2 * height, 2 * width))))
    return collate(samples)


def test_an_own_detector_learns_with_what_the_base_class_gives() -> None:
    """Assignment and decoding are inherited."""
    detector = build_detector(POINTS, 3, seed=0)
    assert isinstance(detector, own_parts.Points) and detector.family == POINTS.detector
    data = batch()
    optimizer = torch.optim.AdamW(detector.parameters(), 3e-3)
    losses = []
    for _ in range(60):
        prediction = detector(data.images)
        targets = detector.assign(prediction, data.targets)
        loss = torch.stack(list(detector.loss(prediction, targets).values())).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    found = detector.eval().decode(detector(data.images), data.sizes, score_threshold=0.05)
    boxes, truth = found[0].boxes[:10, None], 2 * data.targets[0].boxes
    assert len(boxes) and float(boxes[..., 2].max()) <= 2 * 96, "pixels of the file"
    sides = boxes[..., 2:].minimum(truth[:, 2:]) - boxes[..., :2].maximum(truth[:, :2])
    assert float(sides.clamp(min=0).prod(-1).max()) > 1000, "it looks where the objects are"
    assert model_size(detector, (64, 96))["params_m"] > 0


def test_the_same_seed_gives_the_same_own_detector() -> None:
    first, second, other = (build_detector(POINTS, 3, seed=seed).state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert not all(torch.equal(first[key], other[key]) for key in first)


@pytest.mark.parametrize(
    "model",
    [
        POINTS,
        Model(detector=f"{PARTS}:Points", backbone=f"{PARTS}:Stem", backbone_options={"width": 8}),
        Model(detector=f"{PARTS}:Points", backbone=f"{PARTS}:stem", backbone_options={"width": 8}),
        Model(detector="gfl", backbone=f"{PARTS}:Stem", neck_channels=32, head_depth=1),
    ],
)
def test_round_trip(model: Model, tmp_path: Path) -> None:
    detector = build_detector(model, 3, seed=0)
    record = ModelRecord(model=model_of(detector), num_classes=3, class_names=("a", "b", "c"))
    save_detector(tmp_path / "own.safetensors", detector, metadata=record)
    loaded, found = load_detector(tmp_path / "own.safetensors")
    assert found == record and found.model == model and found.has_own_parts
    assert type(loaded) is type(detector) and loaded.family == detector.family
    ours, theirs = detector.state_dict(), loaded.state_dict()
    assert list(ours) == list(theirs) and all(torch.equal(ours[key], theirs[key]) for key in ours)
    with safe_open(tmp_path / "own.safetensors", framework="pt") as file:
        assert file.metadata()[HEADER_KEY].startswith('{"schema_version":2,'), "0.1 refuses it in one line"


def test_an_object_is_saved_by_its_class(tmp_path: Path) -> None:
    detector = own_parts.Points(2)
    model = model_of(detector)
    assert model.detector == f"{PARTS}:Points"
    save_detector(tmp_path / "a.safetensors", detector, metadata=ModelRecord(model=model, num_classes=2))
    assert torch.equal(load_detector(tmp_path / "a.safetensors")[0].logits.weight, detector.logits.weight)
    wide = own_parts.Points(2, width=24)
    with pytest.raises(UserError, match="must make the same model of the same arguments"):
        save_detector(tmp_path / "b.safetensors", wide, metadata=ModelRecord(model=model_of(wide), num_classes=2))
    wide.options = {"width": 24}
    save_detector(tmp_path / "b.safetensors", wide, metadata=ModelRecord(model=model_of(wide), num_classes=2))


def test_a_constructor_that_makes_another_model_each_time(tmp_path: Path) -> None:
    detector = build_detector(Model(detector=f"{PARTS}:Growing"), 2, seed=0)
    with pytest.raises(UserError, match="could not be loaded"):
        save_detector(
            tmp_path / "a.safetensors", detector, metadata=ModelRecord(model=model_of(detector), num_classes=2)
        )
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"detector": "no.such.module:Detector"}, "model.detector: cannot import no.such.module: no such module"),
        ({"detector": f"{PARTS}:Absent"}, f"model.detector: {PARTS} has no Absent"),
        ({"detector": "subprocess:run", "options": {"args": "exit 1"}}, "subprocess:run is not a subclass of compress"),
        ({"detector": f"{PARTS}:Stem"}, f"{PARTS}:Stem is not a subclass of compress.detectors.base.Detector"),
        ({"detector": f"{PARTS}:NoStrides"}, "does not set strides, feature_channels, mean, std"),
        (
            {"detector": f"{PARTS}:Points", "options": {"colour": "red"}},
            f"model.detector: {PARTS}:Points cannot be built: TypeError: Points.__init__",
        ),
        (
            {"backbone": "subprocess:run", "backbone_options": {"args": "exit 1"}},
            "model.backbone: subprocess:run is not a backbone; name a subclass of torch.nn.Module",
        ),
        ({"backbone": f"{PARTS}:unannotated", "backbone_options": {"width": 8}}, "is not a backbone"),
        ({"backbone": f"{PARTS}:NoWidths"}, "needs the attribute out_channels"),
        ({"backbone": f"{PARTS}:Stem", "detector": "faster_rcnn"}, "all_maps(images) -> [C2, C3, C4, C5]"),
    ],
)
def test_parts_that_cannot_be_used(settings: dict[str, Any], message: str) -> None:
    """One line each; nothing that is neither a detector nor a module is called."""
    with pytest.raises(UserError) as error:
        build_detector(Model(**settings), 3, seed=0)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_a_checkpoint_whose_class_is_not_here(tmp_path: Path) -> None:
    path = tmp_path / "own.safetensors"
    detector = build_detector(POINTS, 3, seed=0)
    save_detector(path, detector, metadata=ModelRecord(model=POINTS, num_classes=3))
    content = path.read_bytes()
    path.write_bytes(content.replace(b"tests.helpers.own_parts:Points", b"tests.helpers.own_partz:Points"))
    with pytest.raises(UserError, match=r"cannot import tests\.helpers\.own_partz: no such module") as error:
        load_detector(path)
    assert str(error.value).startswith(f"{path}: ") and "\n" not in str(error.value)


def test_what_version_1_wrote_is_read_and_written_again_byte_for_byte() -> None:
    text = (
        '{"schema_version":1,"detector":"retinanet","backbone":"nano","num_classes":2,"neck_channels":32,"head_depth":1,'
        '"anchor_scale":2.0,"roi_samples":null,"class_names":["ä","b"],"category_ids":[1,7],"val_map":41.53,'
        '"recipe_sha256":null,"source":null}'
    )
    record = ModelRecord.model_validate_json(text)
    assert record.model == Model(
        detector="retinanet", backbone="nano", neck_channels=32, head_depth=1, anchor_scale=2.0
    )
    assert record.to_json() == text


@pytest.mark.parametrize("family", FAMILIES)
def test_recipes_and_classes_say_the_same_of_a_family(family: str) -> None:
    facts, kind = FAMILY_FACTS[family], detector_class(family)
    for ability in ("quantizable", "weights_labels", "ignores_regions"):
        assert getattr(facts, ability) == getattr(kind, ability), ability
    assert kind.family == family and list(FAMILIES) == list(FAMILY_FACTS)


@pytest.mark.parametrize("name", ["Points", "OneBoxAnObject"])
def test_deployable_finds_what_decoding_finds(name: str) -> None:
    detector = build_detector(Model(detector=f"{PARTS}:{name}"), 3, seed=3)
    torch.nn.init.normal_(detector.logits.weight, std=0.5, generator=torch.Generator().manual_seed(0))
    data = batch()
    size = (64, 96)
    module = Deployable(detector, size, score_threshold=0.3).eval()
    with torch.no_grad():
        boxes, scores, labels, count = module(data.images)
        found = detector.decode(detector(data.images), [ImageSize(size, size)] * 2, score_threshold=0.3)
    assert int(count[0]) == len(found[0].scores) > 5
    for index, expected in enumerate(found):
        n = int(count[index])
        np.testing.assert_array_equal(scores[index, :n], expected.scores)
        np.testing.assert_array_equal(labels[index, :n], expected.labels)
        np.testing.assert_array_equal(boxes[index, :n], expected.boxes)


def test_without_nms_all_boxes_stay() -> None:
    points, every = (build_detector(Model(detector=f"{PARTS}:{n}"), 3, seed=3) for n in ("Points", "OneBoxAnObject"))
    data = batch()
    counts = [
        len(detector.decode(detector(data.images), data.sizes, score_threshold=0.3, max_detections=1000)[0].scores)
        for detector in (points, every)
    ]
    assert counts[0] < counts[1]
