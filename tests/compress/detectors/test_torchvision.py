"""FCOS, RetinaNet and Faster R-CNN against torchvision's own models on the same weights and the same padded batch."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchvision.models import detection
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.fcos import FCOSHead
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.retinanet import RetinaNetHead

from compress.data.batch import Batch, Target, collate
from compress.detectors.backbones import build_backbone
from compress.detectors.base import Detector
from compress.detectors.build import model_size
from compress.detectors.gfl import GFL
from compress.detectors.torchvision.dense import BETWEEN, FCOS, RetinaNet, TorchvisionDense
from compress.detectors.torchvision.two_stage import FasterRCNN
from compress.prune.cut import shapes_of
from deploy.core.errors import UserError

K = 3
FAMILIES = ("fcos", "retinanet", "faster_rcnn")


def detector(family: str, *, anchor_scale: float = 2.0, head_depth: int = 1) -> Any:
    torch.manual_seed(0)
    backbone = build_backbone("nano", weights="none", frozen_stages=-1, norm_eval=False)
    if family == "fcos":
        built: Detector = FCOS.build(K, backbone, neck_channels=32, head_depth=head_depth)
    elif family == "retinanet":
        built = RetinaNet.build(K, backbone, neck_channels=32, head_depth=head_depth, anchor_scale=anchor_scale)
    else:
        built = FasterRCNN.build(
            K, backbone, neck_channels=32, head_depth=head_depth, anchor_scale=anchor_scale, roi_samples=512
        )
    built.mean.fill_(0), built.std.fill_(255)  # the same bits as torchvision's, which draws its samples by them
    for name, parameter in built.named_parameters():  # detections, not the same low score everywhere
        if "cls_logits" in name:
            parameter.data += 3 * torch.randn_like(parameter) * (0.05 if parameter.dim() == 4 else 1)
    return built


class Shared(nn.Module):
    """Backbone and pyramid of one of our detectors, as torchvision's models call them."""

    def __init__(self, ours: Any) -> None:
        super().__init__()
        self.out_channels = ours.feature_channels
        self.maps = lambda x: ours.neck(ours.backbone.all_maps(x) if isinstance(ours, FasterRCNN) else ours.backbone(x))

    def forward(self, x: Tensor) -> OrderedDict[str, Tensor]:
        maps = OrderedDict(
            (str(level), value)
            for level, value in enumerate(self.maps(x.contiguous(memory_format=torch.channels_last)))
        )
        if len(maps) == 4:
            maps["pool"] = maps["3"][:, :, ::2, ::2]
        return maps


def torchvision_model(ours: Any, **settings: float) -> Any:
    """torchvision's model of the same family with the weights of `ours`."""
    common: dict[str, Any] = {"image_mean": [0.0] * 3, "image_std": [1.0] * 3}
    if isinstance(ours, FasterRCNN):
        stub = Shared(ours)
        model = detection.FasterRCNN(stub, K + 1, **common)
        model.rpn, model.roi_heads = ours.rpn, ours.roi_heads
        model.roi_heads.score_thresh, model.roi_heads.nms_thresh = 0.05, 0.5
    else:
        cells = [ours.get_buffer(f"anchors{level}") for level in range(5)]
        generator = AnchorGenerator(((32,),) * 5, ((1.0,),) * 5)
        if isinstance(ours, RetinaNet):
            generator = AnchorGenerator(((8, 16, 32),) * 5, ((0.5, 1.0, 2.0),) * 5)
            head: Any = RetinaNetHead(ours.feature_channels, 9, K)
            head.regression_head._loss_type = "giou"
            model = detection.RetinaNet(Shared(ours), K, head=head, anchor_generator=generator, **common, **settings)
        else:
            head = FCOSHead(ours.feature_channels, 1, K)
            model = detection.FCOS(Shared(ours), K, head=head, anchor_generator=generator, **common, **settings)
        generator.cell_anchors = cells
        head.classification_head = ours.head.classification_head
        head.regression_head = ours.head.regression_head
    model.transform.resize = lambda image, target: (image, target)
    return model


def batch() -> tuple[Batch, list[Tensor]]:
    """Two images of different size, padded; and alone, in 0..1."""
    generator = torch.Generator().manual_seed(1)
    sizes = [(64, 96), (60, 70)]
    images = [torch.randint(0, 256, (3, *size), generator=generator, dtype=torch.uint8) for size in sizes]
    boxes = [torch.tensor([[4.0, 6, 30, 40], [20, 10, 90, 60]]), torch.tensor([[10.0, 20, 31, 44]])]
    labels = [torch.tensor([0, 2]), torch.tensor([1])]
    targets = [
        Target(b, c, torch.zeros(len(c), dtype=torch.bool), None, index, size, (2 * size[0], 3 * size[1]))
        for index, (b, c, size) in enumerate(zip(boxes, labels, sizes, strict=True))
    ]
    data = collate(list(zip(images, targets, strict=True)))
    data.images[1, :, 60:], data.images[1, :, :, 70:] = 0, 0  # torchvision pads with zeros
    return data, [image / 255 for image in images]


def losses_of(ours: Any, data: Batch) -> dict[str, Tensor]:
    prediction = ours(data.images)
    return ours.loss(prediction, ours.assign(prediction, data.targets))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("empty", [False, True])
def test_losses_are_torchvisions(family: str, empty: bool) -> None:
    ours = detector(family).train()
    data, images = batch()
    if empty:  # an image without objects
        data.targets[1].boxes, data.targets[1].labels = torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64)
        data.targets[1].ignore = torch.zeros(0, dtype=torch.bool)
    first = 1 if family == "faster_rcnn" else 0
    truth = [{"boxes": t.boxes, "labels": t.labels + first} for t in data.targets]
    model = torchvision_model(ours).train()
    torch.manual_seed(5)  # of Faster R-CNN's samples
    theirs = model(images, truth)
    torch.manual_seed(5)
    found = losses_of(ours, data)
    assert len(found) == len(theirs)
    wanted = sorted(value.item() for value in theirs.values())
    assert sorted(value.item() for value in found.values()) == pytest.approx(wanted, rel=1e-4, abs=1e-5)
    sum(found.values()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in ours.parameters())


@pytest.mark.parametrize("family", FAMILIES)
def test_detections_are_torchvisions(family: str) -> None:
    ours = detector(family).eval()
    data, images = batch()
    settings = {} if family == "faster_rcnn" else {"score_thresh": 0.05, "nms_thresh": 0.6, "detections_per_img": 100}
    model = torchvision_model(ours, **settings).eval()
    with torch.no_grad():
        theirs = model(images)
        found = ours.decode(ours(data.images), data.sizes)
    assert sum(len(row.boxes) for row in found) > 20
    for row, other in zip(found, theirs, strict=True):
        scale = torch.tensor([3.0, 2.0, 3.0, 2.0])  # our detections are in pixels of the file
        torch.testing.assert_close(row.boxes, other["boxes"] * scale, atol=1e-4, rtol=1e-5)
        torch.testing.assert_close(row.scores, other["scores"], atol=1e-5, rtol=0)
        assert torch.equal(row.labels, other["labels"] - (1 if family == "faster_rcnn" else 0))


@pytest.mark.parametrize("family", ["fcos", "retinanet"])
def test_dense_boxes_and_scores_are_those_of_the_detections(family: str) -> None:
    ours = detector(family).eval()
    data, _ = batch()
    with torch.no_grad():
        prediction = ours(data.images)
        boxes, scores = ours.decode_boxes(prediction), prediction.scores()
        found = ours.decode(prediction, data.sizes)[0]
    assert boxes.shape[1] == scores.shape[1] == sum(prediction.counts)
    best = scores[0].flatten().argmax()
    assert scores[0].flatten()[best] == pytest.approx(float(found.scores[0]), abs=1e-6)
    assert int(best % K) == int(found.labels[0])
    x1, y1, x2, y2 = (boxes[0, best // K] * torch.tensor([3.0, 2.0, 3.0, 2.0])).tolist()
    inside = [min(max(x1, 0), 288), min(max(y1, 0), 128), min(max(x2, 0), 288), min(max(y2, 0), 128)]
    assert found.boxes[0].tolist() == pytest.approx(inside, abs=1e-3)


@pytest.mark.parametrize(("height", "width"), [(96, 160), (32, 64), (256, 384)])
def test_anchors_are_torchvisions(height: int, width: int) -> None:
    ours = detector("retinanet", anchor_scale=4.0)
    maps = [torch.zeros(1, 1, -(-height // s), -(-width // s)) for s in ours.strides]
    generator = detection.retinanet._default_anchorgen()
    theirs = generator(ImageList(torch.zeros(1, 3, height, width), [(height, width)]), maps)[0]
    prediction = ours(torch.zeros(1, 3, height, width, dtype=torch.uint8))
    assert torch.equal(torch.cat(ours.anchors(prediction)), theirs)


def test_places_of_retinanet_and_its_logits_are_in_one_order() -> None:
    """class_logits, anchors and assignment agree: raise one anchor's logit, and its box comes out first."""
    ours = detector("retinanet").eval()
    data, _ = batch()
    prediction = ours(data.images[:1]).detach()
    place = 3 * 9 + 7  # location 3 of the first level, anchor 7
    y, x = divmod(3, prediction.level_sizes[0][1])
    prediction.logits[0][0, 7 * K + 1, y, x] = 20.0
    assert int(prediction.class_logits(0)[0].argmax() % prediction.counts[0]) == place
    prediction.box_deltas[0][0, 7 * 4 : 8 * 4, y, x] = 0.0
    anchor = torch.cat(ours.anchors(prediction))[place]
    assert torch.allclose(ours.decode_boxes(prediction)[0, place], anchor, atol=1e-5)


def test_assignment_tells_methods_what_counts() -> None:
    ours: TorchvisionDense = detector("retinanet")
    data, _ = batch()
    prediction = ours(data.images)
    targets = ours.assign(prediction, data.targets)
    gt = targets.assignment.gt_index
    assert (gt == BETWEEN).any() and not targets.assignment.valid[gt == BETWEEN].any()
    assert targets.avg_factor == targets.assignment.num_positives.clamp(min=1).sum()
    assert targets.level_positives.sum() == (gt >= 0).sum()
    assert targets.assignment.is_box.tolist() == [[True, True], [True, False]]
    crowd = data.targets[0]
    crowd.ignore[0] = True
    again = ours.assign(prediction, data.targets)
    assert again.boxes[0, 0].tolist() == crowd.boxes[1].tolist() and again.assignment.is_box.sum() == 2


@pytest.mark.parametrize("family", ["fcos", "retinanet"])
def test_what_nobody_looked_for_has_no_loss(family: str) -> None:
    ours = detector(family).train()
    data, _ = batch()
    whole = losses_of(ours, data)["loss_cls"]
    prediction = ours(data.images)
    data.targets[1].unlabeled_classes = torch.tensor([0, 2])
    loss = ours.loss(prediction, ours.assign(prediction, data.targets))["loss_cls"]
    assert 0 < float(loss) < float(whole)
    gradient = torch.autograd.grad(loss, prediction.logits[0])[0].unflatten(1, (prediction.anchors, K))
    assert (gradient[1, :, [0, 2]] == 0).all() and (gradient[1, :, 1] != 0).any() and (gradient[0] != 0).any()
    data.targets[1].unlabeled_classes = None
    target = data.targets[0]
    target.ignore = target.uncertain = torch.tensor([False, True])
    alone = replace(
        target, boxes=target.boxes[1:], labels=target.labels[1:], ignore=torch.tensor([False]), uncertain=None
    )
    background = ours.assign(prediction, [alone, data.targets[1]]).assignment.gt_index[0] == -1
    targets = ours.assign(prediction, data.targets)
    region = torch.zeros(len(data.targets), K, len(background), dtype=torch.bool)
    region[0, target.labels[1]] = ~background & (targets.assignment.gt_index[0] < 0)
    assert region.any() and targets.unknown is not None and torch.equal(targets.unknown, region)
    gradients = torch.autograd.grad(ours.loss(prediction, targets)["loss_cls"], prediction.logits)
    rows = [x.unflatten(1, (prediction.anchors, K)).flatten(3).permute(0, 2, 3, 1).flatten(2) for x in gradients]
    every = torch.cat(rows, 2)
    assert (every[region] == 0).all() and (every[~region] != 0).float().mean() > 0.9
    data.targets[0].scores = torch.tensor([0.5, 0.7])
    with pytest.raises(UserError, match="weight"):
        losses_of(ours, data)


def test_faster_rcnn_refuses_pseudo_labels_that_it_cannot_honour() -> None:
    ours = detector("faster_rcnn").train()
    data, _ = batch()
    data.targets[0].uncertain = torch.tensor([False, False])
    losses_of(ours, data)
    data.targets[0].uncertain = torch.tensor([False, True])
    with pytest.raises(UserError, match="regions to ignore"):
        losses_of(ours, data)


def test_the_loss_of_two_processes_is_that_of_their_batch() -> None:
    ours = detector("fcos").eval()
    data, _ = batch()
    whole = losses_of(ours, data)
    halves = [Batch(data.images[i : i + 1], data.targets[i : i + 1]) for i in range(2)]
    predictions = [ours(half.images) for half in halves]
    plain = [ours.assign(p, half.targets) for p, half in zip(predictions, halves, strict=True)]
    total = plain[0].level_positives + plain[1].level_positives
    for found in plain:
        found.level_positives, found.world_size = total, 2
    parts = [ours.loss(p, found) for p, found in zip(predictions, plain, strict=True)]
    for name, value in whole.items():
        assert float((parts[0][name] + parts[1][name]) / 2) == pytest.approx(float(value), rel=1e-5)


def test_operations_of_faster_rcnn_do_not_depend_on_its_weights() -> None:
    """By hand: 4 x 32 more proposals of the fully connected layers, whatever the proposals of these weights are."""
    size = (64, 64)
    found = {}
    for samples, seed in ((32, 0), (32, 1), (64, 0)):
        torch.manual_seed(seed)
        backbone = build_backbone("nano", weights="none", frozen_stages=-1, norm_eval=False)
        built = FasterRCNN.build(
            K, backbone, neck_channels=32, head_depth=0, anchor_scale=2.0, roi_samples=samples
        ).eval()
        found[samples, seed] = model_size(built, size)["gflops"]
    assert found[32, 0] == found[32, 1] and found[64, 0] == model_size(shapes_of(built), size)["gflops"]
    C, wide = 32, 128
    flops = 2 * 128 * (C * 49 * wide + wide * wide + wide * (K + 1) + wide * 4 * (K + 1))
    assert found[64, 0] - found[32, 0] == pytest.approx(flops / 1e9, abs=1e-4)


def test_deeper_heads_and_wrong_questions() -> None:
    assert len(detector("retinanet", head_depth=0).head.classification_head.conv) == 0
    assert len(detector("fcos", head_depth=2).head.regression_head.conv) == 6
    two_stage = detector("faster_rcnn", head_depth=0)
    with pytest.raises(TypeError, match="faster_rcnn gives no dense"):
        two_stage.decode_boxes(None)
    assert isinstance(GFL(2, build_backbone("nano", weights="none", frozen_stages=-1, norm_eval=False)), Detector)
