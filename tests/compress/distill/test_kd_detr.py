"""Query distillation: against float64 NumPy, and what holds between models of two kinds."""

from __future__ import annotations

import copy
import re
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("scipy")

from compress.config.methods import Methods
from compress.config.model import Model
from compress.detectors.build import build_detector
from compress.detectors.queries import QueryPrediction
from compress.detectors.transformers.lw_detr import RfDetr
from compress.detectors.transformers.query_detector import QueryDetector
from compress.detectors.transformers.real_time_detr import DFine, RealTimeDetr, RTDetrV2
from compress.distill.build import build_methods
from compress.distill.kd_detr import KDDETR, certainty_at, sigmoid_kl, softmax_kl
from compress.distill.weighting import TrainingPosition
from compress.training.learner import Learner, total_loss
from deploy.core.errors import UserError
from tests.helpers import tiny_detr
from tests.helpers.methods import build, build_uet

PAIRS = ((DFine, DFine), (RTDetrV2, RTDetrV2), (RTDetrV2, DFine), (DFine, RfDetr), (RfDetr, DFine))


def numbers(x: torch.Tensor) -> np.ndarray:
    return x.detach().double().numpy()


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def corners(box: np.ndarray) -> np.ndarray:
    return np.array([box[0] - box[2] / 2, box[1] - box[3] / 2, box[0] + box[2] / 2, box[1] + box[3] / 2])


def giou(a: np.ndarray, b: np.ndarray) -> float:
    a, b = corners(a), corners(b)
    sides = np.clip(np.minimum(a[2:], b[2:]) - np.maximum(a[:2], b[:2]), 0, None)
    inside = sides.prod()
    union = (a[2:] - a[:2]).prod() + (b[2:] - b[:2]).prod() - inside
    around = (np.maximum(a[2:], b[2:]) - np.minimum(a[:2], b[:2])).prod()
    return float(inside / union - (around - union) / around)


def reference(layers: list[QueryPrediction], teacher: QueryPrediction, *, sigmoid: bool) -> dict[str, float]:
    """The terms with the published weights, query by query."""
    found = dict.fromkeys(("kd_detr_cls", "kd_detr_l1", "kd_detr_giou"), 0.0)
    theirs, boxes_t = numbers(teacher.logits), numbers(teacher.boxes)
    weights = (1 / (1 + np.exp(-theirs))).max(-1)
    for layer in layers:
        ours, boxes_s = numbers(layer.logits), numbers(layer.boxes)
        for place, w in np.ndenumerate(weights):
            if sigmoid:
                t, s = (1 / (1 + np.exp(-x[place])) for x in (theirs, ours))
                distance = (t * np.log(t / s) + (1 - t) * np.log((1 - t) / (1 - s))).sum()
            else:
                t, s = softmax(theirs[place] / 10), softmax(ours[place] / 10)
                distance = 100 * (t * np.log(t / s)).mean()
            found["kd_detr_cls"] += w * distance
            found["kd_detr_l1"] += 5 * w * np.abs(boxes_s[place] - boxes_t[place]).sum()
            found["kd_detr_giou"] += 2 * w * (1 - giou(boxes_s[place], boxes_t[place]))
    return {name: value / weights.sum() for name, value in found.items()}


@pytest.mark.parametrize(("student", "teacher"), PAIRS)
@pytest.mark.parametrize("classes", ["softmax", "sigmoid"])
def test_terms_equal_a_reference(student: type[QueryDetector], teacher: type[QueryDetector], classes: str) -> None:
    """Every layer of the student against the teacher's last, on the teacher's queries."""
    batch = tiny_detr.batch()
    still = {"dropout": 0.0} if student is RfDetr else {}
    ours, theirs = tiny_detr.outputs(tiny_detr.tiny(student, **still).train(), tiny_detr.other(teacher), batch)
    terms = build(KDDETR, classes=classes)(ours, theirs, batch)
    layers = ours.detector.predict_at(ours.features, theirs.queries.queries)
    assert len(layers) >= 3
    wanted = reference(layers, theirs.queries, sigmoid=classes == "sigmoid")
    assert terms.keys() == wanted.keys()
    for name, value in wanted.items():
        assert terms[name].item() == pytest.approx(value, rel=2e-4), name
        assert value > 0.01
    total_loss(terms).backward()
    assert all(x.grad is None for x in theirs.detector.parameters())
    heads = [p for name, p in ours.detector.named_parameters() if re.search(r"(decoder|network)\.class_embed", name)]
    assert heads and all(float(p.grad.norm()) > 0 for p in heads if p.grad is not None)


def test_divergences_have_the_gradients_of_their_values() -> None:
    generator = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, 3, 4, dtype=torch.float64, generator=generator)
    student.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: softmax_kl(x, teacher, 10.0), student)
    assert torch.autograd.gradcheck(lambda x: sigmoid_kl(x, teacher), student)
    for found in (softmax_kl(teacher, teacher, 3.0), sigmoid_kl(teacher, teacher)):
        torch.testing.assert_close(found, torch.zeros_like(found), atol=1e-12, rtol=0)


@pytest.mark.parametrize("kind", [DFine, RTDetrV2, RfDetr])
def test_a_student_on_its_own_queries_says_what_it_said(kind: type[QueryDetector]) -> None:
    """So `predict_at` is `predict` with other beginnings: the place that a query came from is found again."""
    detector, batch = tiny_detr.tiny(kind).eval(), tiny_detr.batch()
    with torch.no_grad():
        features = detector.features(batch.images)
        said = detector.predict(features)
        again = detector.predict_at(features, said.queries)[-1]
    torch.testing.assert_close(again.logits, said.logits, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(again.boxes, said.boxes, atol=1e-5, rtol=1e-5)


def step(kind: type[QueryDetector], methods: dict[str, Any]) -> tuple[Learner, dict[str, torch.Tensor]]:
    student, teacher = tiny_detr.tiny(kind).train(), tiny_detr.other(kind)
    built = build_methods(Methods.model_validate(methods), student, teacher)
    learner = Learner(student, built, teacher, None)
    torch.manual_seed(0)
    losses = learner(tiny_detr.batch(), TrainingPosition(1, 10, 5))
    total_loss(losses).backward()
    return learner, losses


@pytest.mark.parametrize("kind", [DFine, RTDetrV2, RfDetr])
def test_weight_0_is_plain_training(kind: type[QueryDetector]) -> None:
    """To the bit: neither gradients nor statistics of BatchNorm notice the second pass through the decoder."""
    plain, _ = step(kind, {})
    names = ("kd_detr", "ddf") if kind is DFine else ("kd_detr",)
    taught, losses = step(kind, {name: {"weight": 0.0} for name in names})
    assert {"kd_detr_l1"} <= losses.keys()
    for (name, a), (_, b) in zip(plain.student.named_parameters(), taught.student.named_parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None), name
        assert a.grad is None or (b.grad is not None and torch.equal(a.grad, b.grad)), name
    for (name, a), (_, b) in zip(plain.student.named_buffers(), taught.student.named_buffers(), strict=True):
        assert torch.equal(a, b), name


def test_methods_share_the_pass_through_the_decoder(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    asked = RealTimeDetr.predict_at
    monkeypatch.setattr(RealTimeDetr, "predict_at", lambda self, *args: calls.append(args) or asked(self, *args))
    _, losses = step(DFine, {"kd_detr": {}, "ddf": {}})
    assert len(calls) == 1 and float(losses["ddf"]) > 0


def test_random_queries_go_on_where_they_were() -> None:
    batch = tiny_detr.batch()
    ours, theirs = tiny_detr.outputs(tiny_detr.tiny(RTDetrV2).train(), tiny_detr.other(DFine), batch)
    method, plain = build(KDDETR, random_queries=6), build(KDDETR)
    first, second = (method(ours, theirs, batch)["kd_detr_l1"] for _ in range(2))
    assert first != second and first != plain(ours, theirs, batch)["kd_detr_l1"]
    resumed = build(KDDETR, random_queries=6)
    resumed(ours, theirs, batch)
    again = build(KDDETR, random_queries=6)
    again.load_state_dict(resumed.state_dict())
    assert again(ours, theirs, batch)["kd_detr_l1"] == second
    assert build(KDDETR, random_queries=6, seed=5)(ours, theirs, batch)["kd_detr_l1"] != first


def test_uet_underneath_lets_the_decoder_run_on_sampled_maps() -> None:
    batch = tiny_detr.batch()
    ours, theirs = tiny_detr.outputs(tiny_detr.tiny(RTDetrV2).train(), tiny_detr.other(RTDetrV2), batch)
    uet = build_uet(build(KDDETR), certainty=True)
    sampled = copy.deepcopy(uet).sample(theirs)
    assert not torch.equal(sampled.queries.logits, theirs.queries.logits)
    maps, _ = copy.deepcopy(uet)._draw(theirs.features)
    torch.testing.assert_close(sampled.queries.logits, theirs.detector.predict(maps).logits)
    terms = uet(ours, theirs, batch)
    certain = certainty_at(sampled, sampled.queries.queries)
    assert isinstance(certain, torch.Tensor) and float(certain.std()) > 0
    ones = copy.copy(sampled)
    ones.certainty = None
    assert terms["kd_detr_l1"] != build(KDDETR)(ours, ones, batch)["kd_detr_l1"]
    ones.certainty = [torch.full_like(x, 0.5) for x in sampled.certainty or ()]
    plain = build(KDDETR)(ours, sampled.__class__(ones.features, ones.prediction, ones.detector), batch)
    torch.testing.assert_close(build(KDDETR)(ours, ones, batch)["kd_detr_l1"], plain["kd_detr_l1"] / 2)


def test_models_that_cannot_are_refused() -> None:
    dense = build_detector(Model(backbone="nano", neck_channels=32, head_depth=1), tiny_detr.CLASSES, 0)
    detr = tiny_detr.tiny(RTDetrV2)
    wanted = "methods.kd_detr needs queries of the"
    with pytest.raises(UserError, match=f"{wanted} teacher, which gfl cannot give"):
        build_methods(Methods.model_validate({"kd_detr": {}}), detr, dense)
    with pytest.raises(UserError, match=f"{wanted} student, which gfl cannot give"):
        build_methods(Methods.model_validate({"kd_detr": {}}), dense, detr)
    one = RTDetrV2.build(1, size=None, options=tiny_detr.OPTIONS[RTDetrV2], init=None)
    with pytest.raises(UserError, match=r"methods.kd_detr.classes: a softmax over one class says nothing"):
        build_methods(Methods.model_validate({"kd_detr": {}}), one, one)
    build_methods(Methods.model_validate({"kd_detr": {"classes": "sigmoid"}}), one, one)
