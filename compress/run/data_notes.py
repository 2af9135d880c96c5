"""What a run says about its images before anything is trained: findings that cost accuracy and stop nothing."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np

from compress.config.data import Split
from compress.data.coco import CocoDetection
from deploy.core.odd_pictures import odd_pictures
from deploy.core.same_files import shared

Set = tuple[Split, CocoDetection]
"""Where a set of images is, and the set."""

MUCH_PADDING = 0.4
_NAMED = 5  # pictures that a line names


def notes_about(train: Set, val: Set, has_labels: bool = True) -> list[str]:
    """One line a finding about the labels of both sets, and one about validation images that are trained on.

    Images are compared by content; only files of equal length are opened. Some images of each set are decoded, spread
    evenly over it. has_labels: of the training set.

    Raises UserError for one that cannot be read, as the training would later.
    """
    sets = [train, val] if has_labels else [val]
    lines = [
        f"{split.annotations}: annotations left out: {', '.join(f'{n} {why}' for why, n in images.dropped.items())} "
        "(see compress data check)"
        for split, images in sets
        if images.dropped
    ]
    lines += [f"note: {split.annotations}: {line}" for split, images in sets for line in images.label_notes]
    for split, images in sets:
        files = [images.path(index) for index in range(len(images))]
        odd = odd_pictures(files, partial(_pixels, images))
        if odd is not None:
            lines.append(f"note: {split.annotations}: {odd}")
    if has_labels:
        known, judged_on = ([images.path(index) for index in range(len(images))] for _, images in sets)
        found = shared(judged_on, known)
        if found:
            lines.append(
                f"warning: {len(found)} of {len(judged_on)} validation images are also training images, so mAP is too "
                f"high: {_names(found)} (compress data check {train[0].annotations} --images {train[0].images} "
                f"--against {val[0].annotations} --against-images {val[0].images} lists them)"
            )
    return lines


def canvas_notes(canvas: tuple[int, int], padding: float) -> list[str]:
    """One line about a canvas (height, width) of which much is padding, a share from 0 to 1."""
    if padding <= MUCH_PADDING:
        return []
    return [
        f"note: {padding:.0%} of the input of the exported files, {canvas[0]}x{canvas[1]} (height x width), is padding "
        "on average, which takes time and which the network sees; evaluation uses the same canvas (deploy.input_size, "
        "docs/deployment.md)"
    ]


def _pixels(images: CocoDetection, index: int) -> np.ndarray:
    return images.image(index).permute(1, 2, 0).numpy()


def _names(pairs: Sequence[tuple[Path, Path]]) -> str:
    shown = [f"{one.name} (= {two.name})" if one.name != two.name else one.name for one, two in pairs[:_NAMED]]
    return ", ".join([*shown, *(["..."] if len(pairs) > _NAMED else [])])
