"""Settings of one training: length, optimizer, schedule, precision, devices."""

from __future__ import annotations

import itertools
from typing import Annotated, Literal

from pydantic import AfterValidator, BeforeValidator, Field, model_validator
from pydantic_core import PydanticCustomError

from compress.config.base import Count, Positive, Settings, Weight, added_later, broken_rule


class Optimizer(Settings):
    """The optimizer."""

    name: Literal["sgd", "adamw"] = "sgd"
    """Which one."""
    lr: Annotated[float, Field(gt=0)] = 0.01
    """Learning rate for the recipe's batch size, after warm-up."""
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """Momentum of SGD; first beta of AdamW."""
    weight_decay: Weight = 1e-4
    """Weight decay."""
    backbone: Annotated[float, Field(gt=0)] = added_later(1.0)
    """Factor on the learning rate of the backbone; the authors of DETRs take 0.1 to 0.5."""
    decay_norms: bool = added_later(True)
    """Weight decay applies to norms and biases, too."""


def _rising(values: tuple[int, ...]) -> tuple[int, ...]:
    if any(a >= b for a, b in itertools.pairwise(values)):
        raise PydanticCustomError("rule", "the numbers must increase")
    return values


class Schedule(Settings):
    """The learning rate over time: linear warm-up, then steps or a half cosine down to zero."""

    name: Literal["multistep", "cosine"] = "multistep"
    """Shape after the warm-up."""
    milestones: Annotated[tuple[Positive, ...], AfterValidator(_rising)] = (8, 11)
    """multistep: epochs after which the rate is multiplied by `gamma`."""
    gamma: Annotated[float, Field(gt=0, le=1)] = 0.1
    """multistep: the factor."""
    warmup_steps: Count = 500
    """Optimizer steps of linear warm-up."""
    warmup_factor: Annotated[float, Field(gt=0, le=1)] = 0.001
    """Share of the rate at the first step."""


class Train(Settings):
    """One training run. Exactly one of `epochs` and `steps`."""

    epochs: Positive | None = None
    """Length in passes over the data."""
    steps: Positive | None = None
    """Length in optimizer steps."""
    batch_size: Positive = 16
    """Images in one optimizer step over all devices."""
    optimizer: Optimizer = Optimizer()
    """Optimizer."""
    schedule: Schedule = Schedule()
    """Learning-rate schedule."""
    ema: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Decay of the moving average of the weights, which is then what is evaluated and kept; null: none. It grows up to
    this with the steps, so that a short training has an average, too."""
    precision: Annotated[
        Literal["32", "bf16", "fp16"], BeforeValidator(lambda value: "32" if value == 32 else value)
    ] = "32"
    """Mixed precision of the network; losses are always float32."""
    views: Positive | None = added_later()
    """Give each picture so many fixed augmentations, which the epochs go through in turn; null: another one at every
    visit. `teacher.cache` needs it."""
    accumulate: Positive = 1
    """Parts that a batch is split into to save memory. Gradients add up; each part has its own normaliser."""
    clip_norm: Annotated[float, Field(gt=0)] | None = None
    """Largest gradient norm; null: no clipping."""
    eval_every: Positive | None = None
    """Epochs between evaluations; null: only at the end."""
    checkpoint_every: Positive | None = None
    """Optimizer steps between checkpoints; null: after every epoch."""
    compile: bool = False
    """Compile the dense passes of the losses with torch.compile (the first step then takes longer)."""
    kernels: Literal["auto", "triton", "cuda", "torch"] = "auto"
    """What computes losses and dropout; auto: Triton on CUDA, CUDA C++ where there is no Triton, PyTorch on CPUs."""
    devices: Positive = 1
    """Processes, one for each device."""
    accelerator: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to train; auto takes CUDA when there is a device."""
    select: Literal["best", "last"] = "best"
    """Which weights become the result: of the best evaluation, or the last."""

    @model_validator(mode="after")
    def _rules(self) -> Train:
        if self.epochs is None and self.steps is None:
            raise broken_rule("", "no length; give epochs or steps")
        if self.epochs is not None and self.steps is not None:
            raise broken_rule("steps", "excludes epochs; keep one of the two")
        parts = self.devices * self.accumulate
        if self.batch_size % parts:
            raise broken_rule("batch_size", f"{self.batch_size} is not a multiple of devices x accumulate = {parts}")
        warmup = self.schedule.warmup_steps
        if self.steps is not None and warmup >= self.steps:
            raise broken_rule(
                "schedule.warmup_steps",
                f"{warmup} warm-up steps leave nothing of {self.steps} steps; set it to {self.steps // 10}",
            )
        if self.precision == "fp16" and self.accelerator == "cpu":
            raise broken_rule("precision", "fp16 needs accelerator cuda; on the CPU use bf16 or 32")
        return self
