"""What a run says about its images before anything is trained: findings that cost accuracy and stop nothing."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from compress.run.data import Datasets
from deploy.core.same_files import shared

MUCH_PADDING = 0.4
_NAMED = 5  # pictures that a line names


def notes_about(data: Datasets) -> list[str]:
    """One line a finding about the labels of both sets, one about a canvas that is mostly padding, and one about
    validation images that are trained on.

    Images are compared by content; only files of equal length are opened.
    """
    sets = [(data.val_split, data.val), *([(data.train_split, data.train)] if data.has_labels else [])]
    lines = [
        f"{split.annotations}: annotations left out: {', '.join(f'{n} {why}' for why, n in images.dropped.items())} "
        "(see compress data check)"
        for split, images in reversed(sets)
        if images.dropped
    ]
    lines += [f"note: {split.annotations}: {line}" for split, images in reversed(sets) for line in images.label_notes]
    if data.padding > MUCH_PADDING:
        lines.append(
            f"note: {data.padding:.0%} of the input of the exported files, {data.canvas[0]}x{data.canvas[1]} (height x "
            "width), is padding on average, which takes time and which the network sees; evaluation uses the same "
            "(deploy.input_size, docs/deployment.md)"
        )
    if data.has_labels:
        train, val = ([images.path(index) for index in range(len(images))] for images in (data.train, data.val))
        found = shared(val, train)
        if found:
            lines.append(
                f"warning: {len(found)} of {len(val)} validation images are also training images, so mAP is too high: "
                f"{_names(found)} (compress data check {data.train_split.annotations} --images {data.train_split.images} "
                f"--against {data.val_split.annotations} --against-images {data.val_split.images} lists them)"
            )
    return lines


def _names(pairs: Sequence[tuple[Path, Path]]) -> str:
    shown = [f"{one.name} (= {two.name})" if one.name != two.name else one.name for one, two in pairs[:_NAMED]]
    return ", ".join([*shown, *(["..."] if len(pairs) > _NAMED else [])])
