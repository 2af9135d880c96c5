"""A first recipe that fits the data, this machine and the time there is: `compress init`.

    text = starter_recipe(Wishes(name="raccoon", train=..., val=..., budget=600.0), say=print)

The size of the images follows from the pictures and the objects in them, the detector from steps that are timed here,
the length of the training from the number of images and the budget. What is chosen stands in the recipe with the
reason.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from lightning.fabric import Fabric

from compress.config.data import Data, Split
from compress.config.recipe import Recipe, load_recipe
from compress.config.teacher import BOXES_ALONE, Source
from compress.config.yaml_document import Document
from compress.data.coco import CocoDetection
from compress.data.sizes import object_shares, picture_sizes
from compress.detectors.base import Detector
from compress.detectors.build import build_detector
from compress.pseudo.images import images_in
from compress.run.data import canvas, open_splits, padding, resize_splits
from compress.run.estimate import Sets, stages_of_run
from compress.run.parts import Parts
from compress.run.plans import data_plan, on_pseudo_labels, trainings_to_come
from compress.run.starter_text import Choice, Draft, Facts, Teaching, Wishes, recipe_text
from compress.run.teacher import NO_CLASS_SHARED, untrained_teacher
from compress.run.trainings import Distillation
from compress.teachers.base import size_of_training
from compress.teachers.load import open_teacher
from compress.training.distributed import launch
from compress.training.time_left import in_words
from deploy.core.errors import UserError
from deploy.core.shown import counted
from deploy.validate.coco import read_annotations

OBJECT_PX = 16
"""Side in the network input that three quarters of the objects must have: two cells of the finest level."""
SMALLEST, GOOD, LARGEST = 128, 320, {"cpu": 640, "cuda": 1024}
"""Long side of images, pixels: the least, what is good for objects that would be large enough with less, and the most.
"""
ENOUGH = (600, 12)
"""Steps and epochs of the student that are worth it; whichever is more. Detectors of published recipes train 12."""
MOST = (2400, 36)
"""Steps and epochs after which little is gained."""
LEAST_STEPS = 40
PRETRAINED_HOURS = 2.0
"""On a CPU a budget below this is not spent on backbones of ResNet's size."""
PADDED = 0.15
"""Share of padding from which a head without statistics of the picture is taken."""

SPENT = 0.7
"""Share of the budget that a recipe is made for: machines are seldom as quiet again as while they were timed. Three
runs on two shared cores took 0.9, 1.4 and 1.6 times what was planned."""

FGD = "{weight: auto, ratio: 10, temperature: 5, beta: 5e-3, relation: 5e-5}"
"""Settings of the method that wins most in docs/methods."""


CHOICES = (
    Choice(
        {"backbone": "resnet18", "weights": "imagenet", "neck_channels": 128, "head_depth": 2},
        {"backbone": "resnet50", "weights": "imagenet", "neck_channels": 128, "head_depth": 2},
        pretrained=True,
    ),
    Choice(
        {"backbone": "nano", "neck_channels": 64, "head_depth": 1},
        {"backbone": "nano2x", "neck_channels": 64, "head_depth": 1},
    ),
    Choice(
        {"backbone": "nano", "neck_channels": 32, "head_depth": 1},
        {"backbone": "nano2x", "neck_channels": 32, "head_depth": 1},
    ),
)
"""From the best to the fastest. Student and teacher have necks and heads of one shape, so that the one inherits the
other's."""


def starter_recipe(wishes: Wishes, say: Callable[[str], None]) -> str:
    """The recipe as YAML text. say: takes lines about what is found and chosen.

    Raises UserError for data that cannot be used, a device that is not there, and a teacher that gives nothing to learn
    from.
    """
    if wishes.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: there is no GPU here that torch can use; compress doctor says why")
    fabric = launch(_settings_of_device(wishes))
    device = fabric.device.type
    facts = facts_of(wishes.train, wishes.val)
    shapes = "of several shapes" if facts.mixed else f"about {facts.sides[1]} x {facts.sides[0]}"
    say(
        f"{facts.images} training and {facts.val_images} validation images {shapes}, {facts.boxes} boxes of "
        f"{counted(facts.classes, 'class')}; three quarters of the objects are larger than "
        f"{facts.object_share:.1%} of the picture's long side"
    )
    taught = _teaching(wishes, facts, fabric, say)
    limits = taught.limits or image_limits(facts, LARGEST[device])
    least = min(limits[1], max(SMALLEST, _to_32(OBJECT_PX / facts.object_share)))
    batch = batch_size(facts.images)
    fitting = [choice for choice in taught.choices if not choice.pretrained or _has_time(wishes, device)]
    draft = Draft(fitting[-1], limits, enough(facts.images, batch), batch)
    sets = _opened(draft, wishes, facts, taught)
    for choice in fitting:
        say(f"timing a {choice.student['backbone']} student with {choice.student['neck_channels']} channels ...")
        draft = replace(draft, choice=choice)
        seconds, fixed = _cost(draft, sets, wishes, facts, taught, fabric)
        last = choice is fitting[-1]
        floor = max(min(limits[1], SMALLEST), least // 2) if last else max(least, 0.7 * limits[1])
        shrunk = _shrunk(limits, SPENT * wishes.budget - fixed, seconds, floor, last=last)
        if shrunk is not None:
            break
    if shrunk is not None and shrunk != limits:  # a step has a part that does not go with the pixels
        draft = replace(draft, limits=shrunk)
        say(f"timing it on images of {_sizes(shrunk)} ...")
        sets = _resized(sets, draft, wishes, facts, taught)
        seconds, fixed = _cost(draft, sets, wishes, facts, taught, fabric)
    steps = steps_for(draft.steps, seconds, SPENT * wishes.budget - fixed, facts.images, batch)
    draft = replace(draft, steps=steps, seconds=fixed + seconds * steps / draft.steps)
    draft = replace(draft, head_norm=_head_norm(draft, sets.val))
    for line in reasons(draft, facts, limits):
        say(line)
    if draft.seconds > 1.15 * wishes.budget:
        say(f"note: the budget of {in_words(wishes.budget)} is too short for any run; this one takes about "
            f"{in_words(draft.seconds)}")  # fmt: skip
    text = recipe_text(draft, wishes, facts, taught, device)
    _read(text)
    return text


def facts_of(train: Split, val: Split) -> Facts:
    """Look at the annotations of both sets.

    Raises UserError for files that cannot be used, and without a box.
    """
    documents = [read_annotations(split.annotations, sizes=True, images=split.images) for split in (train, val)]
    sizes = picture_sizes(documents[0])
    shares = object_shares(documents[0], sizes)
    if not shares or not documents[1]["annotations"]:
        empty = (val if shares else train).annotations
        raise UserError(f"{empty}: it has no box to {'evaluate on' if shares else 'train on'}")
    boxes = [row for row in documents[0]["annotations"] if not row.get("iscrowd")]
    sides = np.array(list(sizes.values()), float)
    ratios = sides[:, 0] / sides[:, 1]
    counts = np.unique([row["image_id"] for row in boxes], return_counts=True)[1]
    return Facts(
        images=len(sizes),
        val_images=len(documents[1]["images"]),
        boxes=len(shares),
        names={row["id"]: row["name"] for row in documents[0]["categories"]},
        sides=(int(np.median(sides.min(1))), int(np.median(sides.max(1)))),
        mixed=bool(np.quantile(ratios, 0.95) > 1.1 * np.quantile(ratios, 0.05)),
        object_share=max(1e-4, float(np.quantile(shares, 0.25))),
        most_objects=int(counts.max()),
        bytes=int((sides[:, 0] * sides[:, 1]).sum()) * 3,
    )


def image_limits(facts: Facts, largest: int) -> tuple[int, int]:
    """(short, long) in pixels: so large that three quarters of the objects have OBJECT_PX, GOOD at least, within limits
    and no larger than the pictures. Pictures of several shapes get a square, which they fill with their long side."""
    long = _to_32(min(max(OBJECT_PX / facts.object_share, GOOD), largest, facts.sides[1]))
    if facts.mixed:
        return long, long
    return max(32, min(long, round(long * facts.sides[0] / facts.sides[1]))), long


def batch_size(images: int) -> int:
    """Images of a step: 8, from 5,000 images on 16; of very few, at most half of them."""
    return max(1, min(16 if images >= 5000 else 8, images // 2))


def enough(images: int, batch: int) -> int:
    """Steps of the student that are worth it."""
    return max(ENOUGH[0], ENOUGH[1] * images // batch)


def steps_for(steps: int, seconds: float, available: float, images: int, batch: int) -> int:
    """Steps that fit: `steps` took so many seconds. Two figures are kept."""
    most = max(MOST[0], MOST[1] * images // batch)
    fitting = int(min(most, max(LEAST_STEPS, steps * available / seconds)))
    digits = 10 ** max(0, int(math.log10(fitting)) - 1)
    return fitting // digits * digits


def reasons(draft: Draft, facts: Facts, limits: tuple[int, int]) -> list[str]:
    """Lines that say what was chosen, and what the budget did not allow."""
    px = facts.object_share * draft.long_side(facts)
    lines = [
        f"chosen: {draft.choice.student['backbone']} student, images of {_sizes(draft.limits)}, "
        f"{draft.steps} steps of {draft.batch}: {draft.epochs(facts, draft.steps):.0f} epochs",
    ]
    if px < OBJECT_PX * 0.9:
        lines.append(f"note: a quarter of the objects are smaller than {px:.0f} px then; larger images would help")
    if draft.limits != limits:
        lines.append(f"note: images of {_sizes(limits)} would be better; the budget does not allow them")
    wanted = enough(facts.images, draft.batch)
    if draft.steps < 0.9 * wanted:
        lines.append(f"note: {wanted} steps would be good; the budget allows {draft.steps}")
    return lines


# --- details --------------------------------------------------------------------------------------------


def _teaching(wishes: Wishes, facts: Facts, fabric: Fabric, say: Callable[[str], None]) -> Teaching:
    """What the student can learn from. say: takes a line about a teacher of other classes."""
    source = wishes.teacher
    if source is None:
        return Teaching(CHOICES, method=f"fgd: {FGD}", inherit=True)
    names = facts.names
    teacher = open_teacher(source, fabric.device, categories=names)
    detector = teacher.detector
    refusals = []
    if detector is not None and not set(source.given) & set(BOXES_ALONE):
        shaped = [replace(choice, student=_shaped(choice, detector)) for choice in CHOICES]
        choices = tuple({str(choice.student): choice for choice in shaped}.values())  # some are now one
        if not set(teacher.class_names or names.values()) & set(names.values()):
            say(f"teacher {teacher.file}: {NO_CLASS_SHARED}")
        known = list(teacher.class_names or names.values())
        same = known == list(names.values()) and detector.num_classes == len(names)
        for method, inherit in _ways(detector, source, same=same):
            try:
                _try(method, inherit, choices[-1], detector, len(names))
            except UserError as error:
                refusals.append(str(error))
            else:
                return Teaching(choices, detector, source, method, inherit, size_of_training(teacher))
    if wishes.unlabeled is None:
        why = refusals[0] if refusals else "it gives boxes alone"
        raise UserError(
            f"--from: no method can learn from {teacher.file}: {why}; it can label pictures: name a folder of "
            "them with --unlabeled"
        )
    return Teaching(CHOICES, source=source)


def _ways(detector: Detector, source: Source, *, same: bool) -> list[tuple[str, bool]]:
    """Methods in the order of what they win here, each with whether the student inherits."""
    ways = [(f"fgd: {FGD}", False), ("pkd: {weight: auto, ratio: 10, levels: 2}", False)]
    if same and source.checkpoint is not None and detector.feature_channels % 32 == 0:
        ways.insert(0, (f"fgd: {FGD}", True))
    return [*ways, ("bckd: {weight: 3}", False)] if same else ways


def _shaped(choice: Choice, detector: Detector) -> dict[str, Any]:
    """The student with the teacher's width of neck, where a small one can have it."""
    channels = detector.feature_channels
    return dict(choice.student) | ({"neck_channels": channels} if channels % 32 == 0 and channels <= 128 else {})


def _try(method: str, inherit: bool, choice: Choice, detector: Detector, classes: int) -> None:
    """Raise UserError where student, teacher and method do not fit each other."""
    parts = {"student": {**choice.student, "weights": "none"}, "methods": _data(method)}
    recipe = load_recipe(_SKELETON | parts, partial=True)
    student = build_detector(recipe.student.built(), classes, 0, key="student")
    Distillation(recipe.methods, inherit).check(student, detector)


_SKELETON = {
    "name": "skeleton",
    "data": {"synthetic": {"train": 8, "val": 8}},
    "train": {"steps": 8, "schedule": {"warmup_steps": 1}},
}


def _settings_of_device(wishes: Wishes) -> Any:
    return load_recipe(
        _SKELETON | {"student": {"backbone": "nano"}}, [f"train.accelerator={wishes.device or 'auto'}"]
    ).train


def _has_time(wishes: Wishes, device: str) -> bool:
    return device == "cuda" or wishes.budget >= PRETRAINED_HOURS * 3600


def _opened(draft: Draft, wishes: Wishes, facts: Facts, taught: Teaching) -> Sets:
    """The images at the size of the draft."""
    recipe = _read(recipe_text(draft, wishes, facts, taught, "cpu"))
    train, val, size = open_splits(data_plan(recipe), wishes.train, wishes.val, cache=False)
    return Sets(train, val, len(train), len(val), recipe.data.cache, size)


def _resized(sets: Sets, draft: Draft, wishes: Wishes, facts: Facts, taught: Teaching) -> Sets:
    """The same images at the size of the draft; the annotations are not read once more."""
    recipe = _read(recipe_text(draft, wishes, facts, taught, "cpu"))
    size = resize_splits(sets.train, sets.val, data_plan(recipe))
    return replace(sets, cached=recipe.data.cache, canvas=size)


def _cost(
    draft: Draft, sets: Sets, wishes: Wishes, facts: Facts, taught: Teaching, fabric: Fabric
) -> tuple[float, float]:
    """Seconds of the trainings, and of the rest of the run."""
    recipe = _read(recipe_text(draft, wishes, facts, taught, fabric.device.type))
    teacher = taught.given
    if taught.source is None and recipe.teacher is not None:
        teacher = untrained_teacher(recipe.teacher, facts.classes)
    if teacher is not None:
        teacher.to(fabric.device)
    plans = trainings_to_come(recipe, Parts(), teacher, distillation=True)
    more = 0 if wishes.unlabeled is None else len(images_in(wishes.unlabeled))
    labelled = on_pseudo_labels(recipe)
    stages = stages_of_run(
        fabric, plans, sets, given=taught.given, unlabelled=more, labelled=labelled, deploy=recipe.deploy
    )
    names = {plan.name for plan in plans}
    trainings = sum(stage.seconds for stage in stages if stage.name in names)
    return trainings, sum(stage.seconds for stage in stages) - trainings


def _read(text: str) -> Recipe:
    return load_recipe(_data(text))


def _data(text: str) -> dict[str, Any]:
    return Document("recipe").read(text)


def _shrunk(
    limits: tuple[int, int], available: float, seconds: float, floor: float, *, last: bool
) -> tuple[int, int] | None:
    """The limits, or smaller ones with which a training fits that takes so many seconds at `limits`.

    floor: of the long side. With a smaller one the training is not worth it, so None; `last`: it is all there is.
    """
    if seconds <= available:
        return limits
    factor = math.sqrt(max(available, 1e-9) / seconds)  # time goes with the pixels
    long = _to_32(limits[1] * factor)
    if long < floor:
        if not last:
            return None
        long = _to_32(floor)
    return max(32, min(long, round(limits[0] * long / limits[1]))), long


def _head_norm(draft: Draft, val: CocoDetection) -> str:
    """The norm that fits: padding moves the statistics that GroupNorm takes of a picture."""
    short, long = draft.limits
    data = Data.model_construct(short=short, long=long)
    return "batch" if padding(val, data, canvas(val, data)) > PADDED else "group"


def _to_32(side: float) -> int:
    return max(32, round(side / 32) * 32)


def _sizes(limits: tuple[int, int]) -> str:
    return f"{limits[1]} x {limits[0]}" if limits[0] != limits[1] else f"at most {limits[0]} px"
