"""The fixed-iteration suppression against torchvision's, in PyTorch and in ONNX Runtime."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable

import numpy as np
import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torchvision.ops import batched_nms, nms

from compress.export.nms import class_aware_nms, select_detections
from deploy.core.card import MAX_CANDIDATES

BATCH, BOXES = 3, 24


@pytest.fixture(autouse=True, scope="module")
def one_thread():  # type: ignore[no-untyped-def]  # the tensors are tiny
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@st.composite
def crowds(draw: st.DrawFn) -> tuple[Tensor, Tensor, Tensor, float]:
    """boxes [B, N, 4], scores [B, N], labels [B, N], threshold: crowded, tied, partly empty.

    Coordinates are whole numbers, so that the class offsets that `batched_nms` adds to them are exact.
    Scores come from a few values (ties), some are zero or below (empty places); the threshold is often one
    that the IoU of small boxes hits exactly, such as 1/2 or 3/5.
    """
    seed = draw(st.integers(0, 2**32 - 1))
    extent = draw(st.sampled_from([6, 20, 100, 600]))
    classes = draw(st.sampled_from([1, 2, 5, 80]))
    levels = draw(st.sampled_from([1, 3, 10, 1000]))  # distinct scores
    empty = draw(st.sampled_from([0.0, 0.0, 0.3, 0.9, 1.0]))
    threshold = draw(st.sampled_from([0.5, 0.6, 1 / 3, 0.3, 0.7, 0.05, 0.95]))
    rng = np.random.default_rng(seed)
    corner = rng.integers(0, extent, (BATCH, BOXES, 2))
    size = rng.integers(1, draw(st.sampled_from([3, 8, 40, 300])), (BATCH, BOXES, 2))
    scores = rng.integers(1, levels + 1, (BATCH, BOXES)) / levels
    scores[rng.random((BATCH, BOXES)) < empty] = draw(st.sampled_from([0.0, -1.0]))
    labels = rng.integers(0, classes, (BATCH, BOXES))
    boxes = np.concatenate([corner, corner + size], -1)
    return (
        torch.from_numpy(boxes.astype(np.float32)),
        torch.from_numpy(scores.astype(np.float32)),
        torch.from_numpy(labels),
        threshold,
    )


def reference(boxes: Tensor, scores: Tensor, labels: Tensor, threshold: float) -> Tensor:
    """bool [B, N] by torchvision, image by image, of the places that hold something."""
    keep = torch.zeros_like(scores, dtype=torch.bool)
    for image in range(len(boxes)):
        places = (scores[image] > 0).nonzero()[:, 0]
        kept = batched_nms(boxes[image, places], scores[image, places], labels[image, places], threshold)
        keep[image, places[kept]] = True
    return keep


@settings(max_examples=600)
@given(crowds())
def test_equals_torchvision(crowd: tuple[Tensor, Tensor, Tensor, float]) -> None:
    boxes, scores, labels, threshold = crowd
    keep = class_aware_nms(boxes, scores, labels, iou_threshold=threshold)
    assert torch.equal(keep, reference(boxes, scores, labels, threshold))


@pytest.mark.parametrize("classes", [1, 80])
def test_equals_torchvision_on_large_crowds_of_fractional_boxes(classes: int) -> None:
    """1000 boxes; per class by `nms`, because the offsets of `batched_nms` round fractional coordinates."""
    generator = torch.Generator().manual_seed(classes)
    centre = torch.rand(2, 1000, 2, generator=generator) * torch.tensor([60.0, 400.0])[:, None, None]
    size = torch.rand(2, 1000, 2, generator=generator) * 40 + 60
    boxes = torch.cat([centre - size / 2, centre + size / 2], -1)
    scores = torch.rand(2, 1000, generator=generator)
    labels = torch.randint(0, classes, (2, 1000), generator=generator)
    keep = class_aware_nms(boxes, scores, labels, iou_threshold=0.6)
    for image in range(2):
        expected = torch.zeros(1000, dtype=torch.bool)
        for label in range(classes):
            of_class = (labels[image] == label).nonzero()[:, 0]
            expected[of_class[nms(boxes[image, of_class], scores[image, of_class], 0.6)]] = True
        assert torch.equal(keep[image], expected)
        assert 2 < int(expected.sum()) < 990


def test_an_iou_equal_to_the_threshold_decides_as_in_torchvision() -> None:
    """IoU 3/5 in float32 lies above 0.6 in float64, and torchvision compares the two."""
    boxes = torch.tensor([[[0.0, 0, 4, 1], [1, 0, 5, 1]]])  # intersection 3, union 5
    scores, labels = torch.tensor([[0.9, 0.8]]), torch.zeros(1, 2, dtype=torch.int64)
    for threshold in (0.6, float(np.float32(0.6)), 0.6 + 1e-9, 0.59, 0.61):
        keep = class_aware_nms(boxes, scores, labels, iou_threshold=threshold)
        assert torch.equal(keep, reference(boxes, scores, labels, threshold)), threshold


def roof(tiles: int) -> tuple[Tensor, Tensor, Tensor]:
    """A row of unit-high boxes 10 wide, each shifted by 2: neighbours have IoU 2/3, second neighbours 3/7.
    Scores fall along the row: at a threshold of 0.6 the boxes are in turn kept and suppressed."""
    x = torch.arange(tiles, dtype=torch.float32) * 2
    boxes = torch.stack([x, torch.zeros(tiles), x + 10, torch.ones(tiles)], -1)[None]
    return boxes, torch.linspace(0.9, 0.1, tiles)[None], torch.zeros(1, tiles, dtype=torch.int64)


def test_the_default_is_exact_up_to_chains_of_33_boxes() -> None:
    for tiles in (32, 33):
        keep = class_aware_nms(*roof(tiles), iou_threshold=0.6)
        assert torch.equal(keep, reference(*roof(tiles), 0.6))
        assert torch.equal(keep[0], torch.arange(tiles) % 2 == 0)


@pytest.mark.parametrize("iterations", [2, 4, 8, 32])
@pytest.mark.parametrize("excess", [1, 2, 3, 20])
def test_a_chain_that_is_too_long_leaves_duplicates_at_its_end_and_loses_nothing(iterations: int, excess: int) -> None:
    tiles = iterations + 1 + excess
    keep = class_aware_nms(*roof(tiles), iou_threshold=0.6, iterations=iterations)[0]
    greedy = reference(*roof(tiles), 0.6)[0]
    assert torch.equal(greedy, torch.arange(tiles) % 2 == 0)
    assert torch.equal(keep[: iterations + 1], greedy[: iterations + 1])  # the part within the bound is exact
    assert keep[greedy].all()  # nothing that greedy keeps is lost, anywhere
    wrong = (keep != greedy).nonzero()[:, 0].tolist()
    assert wrong == list(range(iterations + 1, tiles, 2))  # every suppressed box beyond the bound stays


@settings(max_examples=100)
@given(crowds())
def test_two_iterations_keep_a_superset(crowd: tuple[Tensor, Tensor, Tensor, float]) -> None:
    boxes, scores, labels, threshold = crowd
    keep = class_aware_nms(boxes, scores, labels, iou_threshold=threshold, iterations=2)
    assert keep[reference(boxes, scores, labels, threshold)].all()
    assert not keep[scores <= 0].any()


@pytest.mark.parametrize("iterations", [0, 1, 31, -2])
def test_odd_iterations_are_refused(iterations: int) -> None:
    with pytest.raises(ValueError, match="even and positive"):
        class_aware_nms(*roof(3), iou_threshold=0.6, iterations=iterations)


# ----------------------------------------------------------------------------------------------------


def dense(seed: int, batch: int = 2, locations: int = 60, classes: int = 4) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    corner = torch.randint(0, 60, (batch, locations, 2), generator=generator).float()
    size = torch.randint(0, 40, (batch, locations, 2), generator=generator).float()  # some boxes are empty
    # distinct scores: which of two equal candidates is cut off at the limit is for TopK to choose
    order = torch.stack([torch.randperm(locations * classes, generator=generator) for _ in range(batch)])
    scores = (order.reshape(batch, locations, classes) + 1) / (locations * classes + 1)
    return scores**2, torch.cat([corner, corner + size], -1)


def select_reference(
    scores: Tensor, boxes: Tensor, threshold: float, iou: float, limit: int, candidates: int
) -> tuple[Tensor, Tensor, Tensor]:
    """One image, the obvious way: boxes [n, 4], scores [n], labels [n]."""
    where, labels = (scores > threshold).nonzero(as_tuple=True)
    found, order = scores[where, labels].sort(descending=True)
    order, found = order[:candidates], found[:candidates]
    where, labels = where[order], labels[order]
    extent = boxes[where, 2:] - boxes[where, :2]
    real = (extent > 0).all(-1)
    where, labels, found = where[real], labels[real], found[real]
    keep = batched_nms(boxes[where], found, labels, iou)[:limit]
    return boxes[where[keep]], found[keep], labels[keep]


@pytest.mark.parametrize(
    ("threshold", "limit", "candidates"),
    [(0.05, 10, 100), (0.05, 100, 240), (0.5, 300, 300), (0.9, 5, 20), (1.0, 8, 50), (0.0, 400, 1000)],
)
def test_select_detections_equals_the_obvious_way(threshold: float, limit: int, candidates: int) -> None:
    for seed in range(10):
        scores, boxes = dense(seed)
        out_boxes, out_scores, out_labels, count = select_detections(
            scores,
            boxes,
            score_threshold=threshold,
            iou_threshold=0.5,
            max_detections=limit,
            candidates=candidates,
        )
        assert out_boxes.shape == (2, limit, 4) and out_scores.shape == out_labels.shape == (2, limit)
        assert (out_labels.dtype, count.dtype) == (torch.int64, torch.int32)
        for image in range(2):
            expected = select_reference(scores[image], boxes[image], threshold, 0.5, limit, candidates)
            n = int(count[image])
            assert n == len(expected[0]) <= limit
            for found, wanted in zip((out_boxes, out_scores, out_labels), expected, strict=True):
                assert torch.equal(found[image, :n], wanted)
                assert not found[image, n:].any()


def test_candidates_beyond_the_limit_of_tensorrt_are_refused() -> None:
    scores, boxes = dense(0)
    for candidates in (0, MAX_CANDIDATES + 1):
        with pytest.raises(ValueError, match=r"candidates must be in 1\.\.3840"):
            select_detections(
                scores,
                boxes,
                score_threshold=0.1,
                iou_threshold=0.5,
                max_detections=5,
                candidates=candidates,
            )


# ----------------------------------------------------------------------------------------------------


class _Nms(nn.Module):
    def __init__(self, threshold: float) -> None:
        super().__init__()
        self.threshold = threshold

    def forward(self, boxes: Tensor, scores: Tensor, labels: Tensor) -> Tensor:
        return class_aware_nms(boxes, scores, labels, iou_threshold=self.threshold)


class _Select(nn.Module):
    def forward(self, scores: Tensor, boxes: Tensor) -> tuple[Tensor, ...]:
        return select_detections(
            scores, boxes, score_threshold=0.05, iou_threshold=0.5, max_detections=30, candidates=100
        )


def ort_session(module: nn.Module, *arguments: Tensor) -> Callable[..., list[np.ndarray]]:
    batch = torch.export.Dim("batch", min=1, max=64)
    names = [f"input_{i}" for i in range(len(arguments))]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            module.eval(),
            arguments,
            dynamo=True,
            opset_version=20,
            dynamic_shapes=tuple({0: batch} for _ in arguments),
            input_names=names,
            verbose=False,
        )
    assert program is not None
    operators = {node.op_type for node in program.model_proto.graph.node}
    assert not operators & {"NonMaxSuppression", "Loop", "If", "NonZero", "ScatterElements", "ScatterND"}
    buffer = io.BytesIO(program.model_proto.SerializeToString())
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(buffer.getvalue(), options, providers=["CPUExecutionProvider"])
    return lambda *values: session.run(None, {k: v.numpy() for k, v in zip(names, values, strict=True)})


@pytest.fixture(scope="module")
def ort_nms() -> Callable[..., list[np.ndarray]]:
    boxes = torch.tensor([[0.0, 0, 1, 1]]).repeat(2, BOXES, 1)
    return ort_session(_Nms(0.5), boxes, torch.rand(2, BOXES), torch.zeros(2, BOXES, dtype=torch.int64))


@settings(max_examples=200)
@given(crowd=crowds(), batch=st.integers(1, BATCH))
def test_the_exported_graph_equals_torchvision(
    ort_nms: Callable[..., list[np.ndarray]], crowd: tuple[Tensor, Tensor, Tensor, float], batch: int
) -> None:
    boxes, scores, labels = (value[:batch] for value in crowd[:3])
    keep = torch.from_numpy(ort_nms(boxes, scores, labels)[0])
    assert torch.equal(keep, reference(boxes, scores, labels, 0.5))


def test_the_exported_selection_equals_torch_at_several_batch_sizes() -> None:
    run = ort_session(_Select(), *dense(0))
    for batch in (1, 2, 5, 8):
        scores, boxes = dense(batch, batch=batch)
        expected = _Select()(scores, boxes)
        assert expected[3].min() > 5
        for found, wanted in zip(run(scores, boxes), expected, strict=True):
            np.testing.assert_array_equal(found, wanted.numpy())
