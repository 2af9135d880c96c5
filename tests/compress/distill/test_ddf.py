"""DDF from a teacher: against the library's own term, and the move of distributions against NumPy."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("scipy")

from compress.config.methods import Methods
from compress.detectors.queries import EdgeDistributions
from compress.detectors.transformers.real_time_detr import DFine, RTDetrV2
from compress.distill.build import build_methods
from compress.distill.ddf import DDF, matches, moved
from deploy.core.errors import UserError
from tests.helpers import tiny_detr
from tests.helpers.methods import build


def distributions(seed: int, scale: float = 4.0, bins: int = 9) -> EdgeDistributions:
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(2, 5, 4, bins, dtype=torch.float64, generator=generator)
    around = 0.3 + 0.2 * torch.rand(2, 5, 4, dtype=torch.float64, generator=generator)
    offsets = torch.linspace(-3, 3, bins, dtype=torch.float64).pow(3) / 9
    return EdgeDistributions(logits, around, offsets, torch.tensor(scale, dtype=torch.float64))


def positions(x: EdgeDistributions, image: int, query: int, edge: int) -> np.ndarray:
    """Where the bins of an edge lie in the image."""
    centre, size = x.around[image, query, edge % 2].item(), x.around[image, query, 2 + edge % 2].item()
    distance = (x.scale.item() / 2 + x.offsets.numpy()) * size / x.scale.item()
    return centre + (-distance if edge < 2 else distance)


@pytest.mark.parametrize("temperature", [1.0, 5.0])
def test_probabilities_are_moved_to_the_bins_around_them(temperature: float) -> None:
    """Bin by bin, in the image; what lies outside of the student's bins goes to the outermost."""
    teacher, student = distributions(0, scale=6.0, bins=11), distributions(1)
    found = (moved(teacher, student, temperature).logits / temperature).softmax(-1)
    inside = 0
    for image, query, edge in np.ndindex(2, 5, 4):
        shares = (teacher.logits[image, query, edge] / temperature).softmax(-1).numpy()
        theirs, ours = positions(teacher, image, query, edge), positions(student, image, query, edge)
        order = np.argsort(ours)
        clipped = np.clip(theirs, ours.min(), ours.max())
        wanted = np.zeros(len(ours))
        for share, at in zip(shares, clipped, strict=True):
            above = int(np.clip(np.searchsorted(ours[order], at), 1, len(ours) - 1))
            low, high = order[above - 1], order[above]
            part = (at - ours[low]) / (ours[high] - ours[low])
            wanted[low] += share * (1 - part)
            wanted[high] += share * part
        np.testing.assert_allclose(found[image, query, edge].numpy(), wanted, atol=1e-9)
        if (clipped == theirs).all():
            inside += 1
            assert wanted @ ours == pytest.approx(shares @ theirs), "the mean edge stays"
    assert 0 < inside < 40


def test_equal_first_boxes_move_nothing() -> None:
    teacher = distributions(0)
    found = moved(teacher, dataclasses.replace(distributions(1), around=teacher.around), 5.0)
    torch.testing.assert_close((found.logits / 5).softmax(-1), (teacher.logits / 5).softmax(-1))


def test_equal_first_boxes_give_the_librarys_term() -> None:
    """Its `loss_ddf` of a layer, where the last layer is the teacher."""
    from transformers.loss.loss_d_fine import DFineLoss

    batch = tiny_detr.batch()
    ours, theirs = tiny_detr.outputs(tiny_detr.tiny(DFine).train(), tiny_detr.other(DFine), batch)
    layer, asked = ours.at(theirs.queries.queries)[-1], theirs.queries
    assert layer.edges is not None and asked.edges is not None
    asked = dataclasses.replace(asked, edges=dataclasses.replace(asked.edges, around=layer.edges.around))
    matched, objects = matches(ours, asked, batch.targets)
    assert matched.sum() == 4
    found = build(DDF).of_layer(layer, asked, matched, objects)

    detector = ours.detector
    criterion = DFineLoss(detector.network.config)  # type: ignore[union-attr]
    truth = detector.truth(asked, batch.targets)  # type: ignore[operator]
    output = {
        "pred_corners": layer.edges.logits.flatten(2),
        "ref_points": layer.edges.around,
        "pred_boxes": layer.boxes,
        "teacher_corners": asked.edges.logits.flatten(2),
        "teacher_logits": asked.logits,
    }
    wanted = criterion.loss_local(output, truth, detector.match_queries(asked, batch.targets), 4)["loss_ddf"]
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6)
    assert float(found) > 1e-3


def test_the_term_adds_the_layers_and_is_zero_for_the_teacher_itself() -> None:
    batch = tiny_detr.batch()
    ours, theirs = tiny_detr.outputs(tiny_detr.tiny(DFine).train(), tiny_detr.other(DFine), batch)
    method = build(DDF)
    whole = method(ours, theirs, batch)["ddf"]
    matched, objects = matches(ours, theirs.queries, batch.targets)
    layers = [x for x in ours.at(theirs.queries.queries) if x.edges is not None]
    assert len(layers) == 3
    parts = [method.of_layer(x, theirs.queries, matched, objects) for x in layers]
    torch.testing.assert_close(whole, 1.5 * torch.stack(parts).sum())
    whole.backward()
    grads = [p.grad for n, p in ours.detector.named_parameters() if "bbox_embed" in n]
    assert any(g is not None and float(g.norm()) > 0 for g in grads)
    assert all(p.grad is None for p in theirs.detector.parameters())
    itself = dataclasses.replace(theirs)
    assert abs(float(method(itself, theirs, batch)["ddf"])) < 1e-5


def test_gradient_is_that_of_the_value() -> None:
    batch = tiny_detr.batch()
    ours, theirs = tiny_detr.outputs(tiny_detr.tiny(DFine).train(), tiny_detr.other(DFine), batch)
    layer, asked = ours.at(theirs.queries.queries)[-1], theirs.queries
    matched, objects = matches(ours, asked, batch.targets)
    first = (slice(None), slice(0, 2))

    def few(x: EdgeDistributions) -> EdgeDistributions:
        return EdgeDistributions(x.logits[first], x.around[first], x.offsets, x.scale).map(
            lambda y: y.detach().double()
        )

    assert layer.edges is not None and asked.edges is not None
    cut = dataclasses.replace(layer, boxes=layer.boxes[first].detach().double())
    told = dataclasses.replace(asked, logits=asked.logits[first].double(), edges=few(asked.edges))

    def value(logits: torch.Tensor) -> torch.Tensor:
        edges = dataclasses.replace(few(layer.edges), logits=logits)  # type: ignore[arg-type]
        said = dataclasses.replace(cut, edges=edges)
        return build(DDF).of_layer(said, told, matched[first], objects[first].double())

    assert torch.autograd.gradcheck(value, few(layer.edges).logits.requires_grad_(), atol=1e-4)


def test_boxes_without_distributions_are_refused() -> None:
    fine, other = tiny_detr.tiny(DFine), tiny_detr.tiny(RTDetrV2)
    for student, teacher, whom in ((fine, other, "teacher"), (other, fine, "student")):
        with pytest.raises(UserError, match=f"methods.ddf needs box distributions of queries of the {whom}"):
            build_methods(Methods.model_validate({"ddf": {}}), student, teacher)
