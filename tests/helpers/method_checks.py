"""CASE-G varied: images without boxes, crowd boxes, half precision, certainty; and comparisons."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from compress.data.batch import Batch, Target
from compress.detectors.base import DensePrediction
from compress.distill.method import Method, Outputs
from tests.helpers import gfl_case


def batch(targets: list[Target] | None = None) -> Batch:
    return Batch(torch.zeros(2, 3, 128, 128, dtype=torch.uint8), gfl_case.targets() if targets is None else targets)


def without_boxes(images: set[int]) -> list[Target]:
    """CASE-G's targets, some images without any ground truth."""

    def empty(target: Target) -> Target:
        return dataclasses.replace(
            target, boxes=target.boxes[:0], labels=target.labels[:0], ignore=target.ignore[:0]
        )  # fmt: skip

    return [empty(x) if i in images else x for i, x in enumerate(gfl_case.targets())]


def outputs(targets: list[Target]) -> tuple[Outputs, Outputs]:
    """`gfl_case.outputs` with other ground truth."""
    student, teacher = gfl_case.outputs()
    student.targets = student.detector.assign(student.prediction, targets)
    return student, teacher


def bfloat16(model: Outputs) -> Outputs:
    """Return the same outputs as a model under autocast gives them."""
    prediction = DensePrediction(
        [x.bfloat16() for x in model.prediction.logits],
        [x.bfloat16() for x in model.prediction.distribution],
        model.prediction.strides,
    )
    return dataclasses.replace(model, features=[x.bfloat16() for x in model.features], prediction=prediction)


def certain(teacher: Outputs, value: float) -> Outputs:
    """The teacher with the same certainty everywhere."""
    maps = [torch.full((x.shape[0], *x.shape[2:]), value) for x in teacher.prediction.logits]
    return dataclasses.replace(teacher, certainty=maps)


def total(losses: dict[str, Tensor]) -> Tensor:
    return torch.stack([x.sum() for x in losses.values()]).sum()


def assert_same(a: dict[str, Tensor], b: dict[str, Tensor], *, rtol: float = 0.0) -> None:
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=rtol, atol=0, msg=lambda text, name=name: f"{name}: {text}")


def leaves(prediction: DensePrediction) -> list[Tensor]:
    return [*prediction.logits, *prediction.distribution]


def check_common(method: Method, weightless: Method, student: Outputs, teacher: Outputs) -> None:
    """What holds for every method: certainty, half precision, detached teacher, exact zero; leaves get gradients.

    `weightless` is the same method with weight 0; the predictions (and maps) of `student` are leaves.
    """
    plain = method(student, teacher, batch())
    assert all(x.dtype == torch.float32 and x.dim() == 0 and x > 0 for x in plain.values())
    assert_same(method(student, certain(teacher, 1.0), batch()), plain)
    assert_same(method(student, certain(teacher, 0.5), batch()), {k: v * 0.5 for k, v in plain.items()}, rtol=1e-6)
    for value in method(student, certain(teacher, 0.0), batch()).values():
        assert value == 0
    half = method(bfloat16(student), bfloat16(teacher), batch())
    assert all(x.dtype == torch.float32 for x in half.values())
    assert_same(half, plain, rtol=0.05)

    trainable = [x.detach().requires_grad_() for x in (*teacher.features, *leaves(teacher.prediction))]
    count = len(teacher.features)
    levels = len(teacher.prediction.logits)
    prediction = DensePrediction(
        trainable[count : count + levels], trainable[count + levels :], teacher.prediction.strides
    )
    careless = dataclasses.replace(teacher, features=trainable[:count], prediction=prediction)
    total(weightless(student, careless, batch())).backward()
    assert all(x.grad is None for x in trainable)
    for leaf in (*student.features, *leaves(student.prediction)):
        assert leaf.grad is None or (leaf.grad == 0).all()
    total(method(student, careless, batch())).backward()
    assert all(x.grad is None for x in trainable)
    assert any(x.grad is not None and (x.grad != 0).any() for x in (*student.features, *leaves(student.prediction)))


def without_values(model: Outputs) -> Outputs:
    """Return the same outputs on the meta device, where an operation that must read a value (and wait for a GPU)
    fails."""

    def meta(tensors: list[Tensor]) -> list[Tensor]:
        return [x.detach().to("meta").requires_grad_(x.requires_grad) for x in tensors]

    p, targets = model.prediction, model.targets
    prediction = DensePrediction(meta(p.logits), meta(p.distribution), p.strides)
    if targets is not None:
        fields = {k: v.to("meta") for k, v in vars(targets.assignment).items()}
        targets = dataclasses.replace(
            targets,
            assignment=dataclasses.replace(targets.assignment, **fields),
            **{k: v.to("meta") for k, v in vars(targets).items() if isinstance(v, Tensor)},
        )
    return dataclasses.replace(model, features=meta(model.features), prediction=prediction, targets=targets)
