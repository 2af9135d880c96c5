"""Settings of training with few labels: `labels` says how many there are, `pseudo_labels` what teachers add to them."""

from __future__ import annotations

import itertools
import os
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from compress.config.base import Count, Fraction, Location, Positive, Seed, Settings, broken_rule
from compress.config.teacher import Source


class Labels(Settings):
    """Only a part of the training images keeps its labels; without `pseudo_labels` the others are not used."""

    fraction: Fraction
    """Share of the images of data.train that keep their labels; every class is among them if that is possible. 0: none
    does, and only teachers label (needs pseudo_labels)."""
    seed: Seed = 0
    """Which images keep them. With one seed, a larger fraction keeps the images of a smaller one."""


class FineTune(Settings):
    """The second stage: the student goes on learning, from the labelled images alone and without the teacher. Exactly
    one of `epochs` and `steps`. What is not given is as in `train`."""

    epochs: Positive | None = None
    """Length in passes over the labelled images."""
    steps: Positive | None = None
    """Length in optimizer steps."""
    batch_size: Positive | None = None
    """Images in one optimizer step, no more than have labels; null: train.batch_size."""
    lr: Annotated[float, Field(gt=0)] | None = None
    """Learning rate at the start, from which a half cosine falls to zero; null: a tenth of train.optimizer.lr."""
    warmup_steps: Count = 0
    """Optimizer steps of linear warm-up before it."""

    @model_validator(mode="after")
    def _rules(self) -> FineTune:
        if self.epochs is None and self.steps is None:
            raise broken_rule("", "no length; give epochs or steps")
        if self.epochs is not None and self.steps is not None:
            raise broken_rule("steps", "excludes epochs; keep one of the two")
        if self.steps is not None and self.warmup_steps >= self.steps:
            raise broken_rule(
                "warmup_steps",
                f"{self.warmup_steps} warm-up steps leave nothing of {self.steps} steps; set it to {self.steps // 10}",
            )
        return self


class PseudoLabels(Settings):
    """Teachers label images without labels, the student trains on these and on the labelled ones (arXiv 2105.10633),
    then it is fine-tuned on the labelled ones. Images without labels: those that `labels` leaves without, and folders.
    """

    teachers: tuple[Source, ...] | None = None
    """Who labels, each with the classes that it knows; null: the recipe's teacher."""
    min_map: Annotated[float, Field(ge=0, le=100)] = 0.0
    """Stop when a teacher's mAP (percent) on the validation images, over the classes that it looks for, is lower."""
    unlabeled: tuple[Location, ...] = ()
    """Folders of images, searched with all folders below them. Images of data.train and data.val that lie there, or
    files of the same content, are left out."""
    tau: Annotated[float, Field(gt=0, le=1)] | None = None
    """Lowest score of a label; null: where the teacher's file says that its F1 is best, 0.4 where none says so."""
    tau_ignore: Annotated[float, Field(gt=0, le=1)] | None = None
    """Lowest score of a region where something may be: neither object nor background; null: half of that of a label.
    Equal to tau: no regions."""
    thresholds: Literal["fixed", "best_f1"] = "fixed"
    """fixed: tau for all classes. best_f1: for each class the threshold with the best F1 on the labelled images;
    tau_ignore keeps its ratio to it."""
    merge: Literal["nms", "wbf"] = "nms"
    """Boxes of one class that agree: the best stays, or they are averaged (weighted boxes fusion)."""
    iou: Annotated[float, Field(ge=0, lt=1)] = 0.6
    """Boxes of one class with a larger IoU agree."""
    class_map: dict[str, str | None] = Field(default={})
    """Class name at a teacher: name in the data, or null to drop it. Key "*" with null drops every class of a teacher
    that the data does not have."""
    weighting: Literal["hard", "score"] = "hard"
    """hard: a label counts like a person's. score: its class target is multiplied by the teacher's score (gfl
    students only)."""
    short: Positive | None = None
    """Short side of the images that the teachers label, pixels; null: that of the student's. Teachers label best at the
    size that they were trained with. Sources that resize images themselves go on doing so."""
    long: Positive | None = None
    """Limit of their long side; given together with short."""
    batch_size: Positive = 8
    """Images that go through a teacher at once."""
    skip_unreadable: bool = False
    """Leave out images that cannot be read, and count them; otherwise the first one stops the run."""
    fine_tune: FineTune | None = FineTune(epochs=6)
    """Training on the labelled images afterwards; null: none."""

    @model_validator(mode="after")
    def _rules(self) -> PseudoLabels:
        if self.teachers == ():
            raise broken_rule("teachers", "an empty list; name a teacher, or leave it out for the recipe's")
        folders = [Path(os.path.abspath(folder)) for folder in self.unlabeled]
        for (first, a), (second, b) in itertools.permutations(zip(self.unlabeled, folders, strict=True), 2):
            if b.is_relative_to(a):
                where = "is listed twice" if a == b else f"lies in {first}, which is searched with all below it"
                raise broken_rule("unlabeled", f"{second} {where}; name it once")
        if self.tau_ignore is not None and self.tau is None:
            raise broken_rule("tau_ignore", "needs tau beside it; without tau, both are where the teacher's F1 is best")
        if self.tau_ignore is not None and self.tau is not None and self.tau_ignore > self.tau:
            raise broken_rule("tau_ignore", f"{self.tau_ignore:g} is more than tau, {self.tau:g}")
        if (self.short is None) != (self.long is None):
            raise broken_rule("short" if self.short is None else "long", "missing; short and long go together")
        if self.short is not None and self.long is not None and self.short > self.long:
            raise broken_rule("short", f"{self.short} is more than long, {self.long}")
        if self.class_map.get("*") is not None:
            raise broken_rule(
                "class_map", 'the key "*" stands for all other classes and can only be dropped, with null'
            )
        return self
