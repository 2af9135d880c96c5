"""Making a file for another runtime, and trying it before it gets its name."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from deploy.core.boxes import pairwise_iou
from deploy.core.card import network_precision, scanned_card
from deploy.core.errors import UserError
from deploy.core.files import naming, need_other, work_folder
from deploy.runtimes.base import Runner
from deploy.runtimes.open import open_runner
from deploy.targets.refusal import network_of
from deploy.targets.table import TARGETS, check_refusals

_PICTURES = 4
"""Of noise, on which a new file is compared with the one that it was made of."""
_FOUND, _SCORE = {"float": 0.95, "int8": 0.75}, {"float": 0.01, "int8": 0.05}
"""Share of the detections that must be there again, with scores that differ by no more. Runtimes compute int8 in their
own ways, and noise leaves many scores alike."""


def make_for(target: str, source: Path, place: Path) -> str:
    """Make the file of a target, which finds what the file finds that it is made of: the exported one, or the float one
    beside it (`Target.own_int8`). Returns a few words about it for people.

    Raises UserError as `check_refusals` and `Target.make` do, and where the runtime finds other things in it; OSError
    that names the place when its disk is full. What was at the place stays.
    """
    need_other(place, source)
    row, card = TARGETS[target], scanned_card(source)
    check_refusals(target, source, network_of(card))
    if not row.runs:
        with naming(place, f".{place.name}."):
            return row.make(source, place)
    place.parent.mkdir(parents=True, exist_ok=True)
    with work_folder(place) as folder:
        new = folder / place.name
        said = row.make(source, new)
        with _told_of(source, new, target):
            other = open_runner(new)
        if row.own_int8 and card.quantization is not None:
            from deploy.targets.own_int8 import float_beside  # imports onnx

            source = float_beside(source, card, target)
        in_bf16 = network_precision(other.card.precision) == "bf16"  # which ONNX Runtime does not compute
        runner = open_runner(source, ("openvino",) if in_bf16 else ("cpu",))
        with _told_of(source, new, target):
            again, least = _found_again(runner, other), _FOUND[_kind(other)]
        if again is None:
            said += "; not compared, nothing is found in noise: compress validate compares them on pictures"
        elif again < least:
            raise UserError(
                f"{source}: the file for {target} finds {again:.0%} of what this one finds on pictures of noise "
                f"({least:.0%} at least): {other.backend} or its converter computes something else; nothing was written"
            )
        for file in sorted(folder.iterdir(), key=lambda file: file == new):  # the file itself comes last
            os.replace(file, place.parent / file.name)
    return said


# --- details --------------------------------------------------------------------------------------------


@contextmanager
def _told_of(source: Path, new: Path, target: str) -> Iterator[None]:
    """What a runtime says of the new file is told of the one that it is made of: the new one goes away."""
    try:
        yield
    except UserError as error:
        said = str(error)
        if not said.startswith(f"{new}: "):
            raise
        raise UserError(f"{source}: the file for {target} does not run: {said.removeprefix(f'{new}: ')}") from error


def _kind(runner: Runner) -> str:
    return "float" if runner.card.quantization is None else "int8"


def _found_again(runner: Runner, other: Runner) -> float | None:
    """Share of the detections on noise that both find: of one class, an IoU of 0.9 and like scores. None: there are
    none."""
    noise = np.random.default_rng(0).integers(0, 256, (_PICTURES, 3, *runner.card.input_size), np.uint8)
    wanted, found, most = runner(noise), other(noise), _SCORE[_kind(runner)]
    total = again = 0
    for image in range(len(noise)):
        a, b = (slice(int(side.count[image])) for side in (wanted, found))
        alike = pairwise_iou(wanted.boxes[image, a], found.boxes[image, b]) >= 0.9
        alike &= np.abs(wanted.scores[image, a][:, None] - found.scores[image, b]) <= most
        alike &= wanted.labels[image, a][:, None] == found.labels[image, b]
        total += max(alike.shape)
        again += int(alike.any(1).sum())
    return again / total if total else None
