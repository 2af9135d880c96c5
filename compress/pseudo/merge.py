"""Merging of what several teachers found in one image into one set of pseudo labels.

Each teacher's classes are mapped by name into one label space (`class_map`), boxes that teachers agree on become one
(`merge`), and the score decides what a box is good for (`split`): a label, a region to ignore, or nothing.

After Banitalebi-Dehkordi, "Revisiting knowledge distillation for object detection", arXiv 2105.10633. The paper gives
no merging rule and no thresholds; those here are ours.

Shape letters: n boxes, K classes of the common label space. Arrays are numpy, boxes float64 xyxy in pixels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from deploy.core.boxes import pairwise_iou
from deploy.core.errors import UserError

Merging = Literal["nms", "wbf"]

NO_CLASS = -1
"""Stands in a class map for a class that the table drops."""


REST = "*"
"""Key of a class map: every class of a teacher that is neither in the map nor in the common label space."""


@dataclass(frozen=True)
class Boxes:
    """Boxes of one image: boxes float64 [n, 4] xyxy pixels, scores float64 [n] in 0..1, labels int64 [n]."""

    boxes: np.ndarray
    scores: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.scores)

    def where(self, chosen: np.ndarray) -> Boxes:
        """The boxes that a bool mask or an index array chooses."""
        return Boxes(self.boxes[chosen], self.scores[chosen], self.labels[chosen])


def class_map(
    names: Sequence[str], union: Sequence[str], table: Mapping[str, str | None], *, teacher: str
) -> list[int]:
    """Return for each class of a teacher its label in `union`, or `NO_CLASS` where the table drops it.

    Args:
        names: the teacher's class names, in the order of its labels.
        union: names of the common label space.
        table: name at the teacher → name in `union`, None to drop the class. A name that is not in it stays itself; if
            `union` does not have it, `REST` → None drops it.
        teacher: what to call the teacher in an error.

    Raises:
        UserError: a class has no place in `union`, or `REST` has another value than None.
    """
    if table.get(REST) is not None:
        raise UserError(f"class map: the key {REST!r} stands for all other classes and can only be dropped, with null")
    place = {name: label for label, name in enumerate(union)}
    labels = []
    for name in names:
        wanted = table.get(name, name)
        if REST in table and name not in table and name not in place:
            wanted = None
        if wanted is not None and wanted not in place:
            mapped = "" if wanted == name else f", which the table calls {wanted!r},"
            raise UserError(
                f"{teacher}: its class {name!r}{mapped} is not among the categories ({', '.join(union)}); "
                f"map it to one of them, or to null to drop it ({REST!r} stands for all such classes)"
            )
        labels.append(NO_CLASS if wanted is None else place[wanted])
    if all(label == NO_CLASS for label in labels):
        raise UserError(f"{teacher}: none of its classes ({', '.join(names)}) is used")
    return labels


def union_of(teachers: Sequence[Sequence[str]], table: Mapping[str, str | None]) -> list[str]:
    """All class names of all teachers after the table, each once, in the order in which they first appear."""
    names = (table.get(name, name) for teacher in teachers for name in teacher)
    return list(dict.fromkeys(name for name in names if name is not None))


def looked_for(maps: Sequence[Sequence[int]], num_classes: int) -> np.ndarray:
    """Count the teachers that look for each class: int64 [K]. Zero is a class that is not covered.

    A class that is not covered is neither there nor absent in an image: training must not count it as background.
    """
    counts = np.zeros(num_classes, np.int64)
    for labels in maps:
        counts[sorted({label for label in labels if label != NO_CLASS})] += 1
    return counts


def in_union(found: Boxes, labels: Sequence[int]) -> Boxes:
    """A teacher's boxes with labels of the common space (`class_map`); those of dropped classes are left out."""
    mapped = np.asarray(labels, np.int64)[found.labels]
    return Boxes(found.boxes, found.scores, mapped).where(mapped != NO_CLASS)


def merge(teachers: Sequence[Boxes], *, how: Merging, iou_threshold: float, counts: np.ndarray) -> Boxes:
    """One set of boxes from those of several teachers, best score first. The order of the teachers does not matter.

    Args:
        teachers: what each found, with labels of the common space.
        how: `nms`: per class the best box stays and removes those with a larger IoU than `iou_threshold`.
            `wbf`: boxes that agree become their mean, see `fuse`.
        counts: int64 [K], see `looked_for`.
    """
    together = Boxes(
        np.concatenate([np.empty((0, 4)), *(found.boxes for found in teachers)]),
        np.concatenate([np.empty(0), *(found.scores for found in teachers)]),
        np.concatenate([np.empty(0, np.int64), *(found.labels for found in teachers)]),
    )
    source = np.repeat(np.arange(len(teachers)), [len(found) for found in teachers])
    order = _best_first(together)
    together, source = together.where(order), source[order]
    merged = []
    for label in np.unique(together.labels):
        of_label = together.labels == label
        of_class = together.where(of_label)
        if how == "nms":
            merged.append(of_class.where(_suppress(of_class.boxes, iou_threshold)))
        else:
            merged.append(fuse(of_class, source[of_label], int(counts[label]), iou_threshold))
    if not merged:
        return together
    result = Boxes(
        np.concatenate([part.boxes for part in merged]),
        np.concatenate([part.scores for part in merged]),
        np.concatenate([part.labels for part in merged]),
    )
    return result.where(_best_first(result))


def fuse(found: Boxes, source: np.ndarray, teachers: int, iou_threshold: float) -> Boxes:
    """Weighted boxes fusion (Solovyev et al., arXiv 1910.13302) of boxes of one class, best score first.

    A box joins the cluster whose fused box overlaps it most, if the IoU exceeds `iou_threshold`, and otherwise starts
    one. The fused box is the mean of the cluster weighted by score. Its score is the mean, over the `teachers` that
    look for this class, of the best score that each has in the cluster, zero for one that has none: what only one of
    two teachers saw has half its score. With one box a teacher that is the paper's score; a teacher that reports an
    object twice would vote twice in the paper's.

    Args:
        source: int64 [n], the number of the teacher that found each box.
        teachers: how many teachers look for this class, at least those in `source`.
    """
    members: list[list[int]] = []
    fused = np.empty((0, 4))
    for index, box in enumerate(found.boxes):
        overlaps = pairwise_iou(box[None], fused)[0]
        best = int(overlaps.argmax()) if len(overlaps) else 0
        if len(overlaps) and overlaps[best] > iou_threshold:
            members[best].append(index)
            fused[best] = np.average(found.boxes[members[best]], axis=0, weights=found.scores[members[best]])
        else:
            members.append([index])
            fused = np.concatenate([fused, box[None]])
    scores = [
        sum(max(found.scores[i] for i in cluster if source[i] == one) for one in sorted({*source[cluster]})) / teachers
        for cluster in members
    ]
    return Boxes(fused, np.array(scores, np.float64), np.repeat(found.labels[:1], len(members)))


def split(found: Boxes, tau: np.ndarray, tau_ignore: np.ndarray) -> tuple[Boxes, Boxes]:
    """Labels (score ≥ tau of their class) and regions to ignore (tau_ignore ≤ score < tau). Both float [K]."""
    label = found.scores >= tau[found.labels]
    region = ~label & (found.scores >= tau_ignore[found.labels])
    return found.where(label), found.where(region)


# --- details --------------------------------------------------------------------------------------------


def _best_first(found: Boxes) -> np.ndarray:
    """Order boxes by score, and for equal scores by label and corners: no tie depends on the order in which boxes
    came."""
    x1, y1, x2, y2 = found.boxes.T
    return np.lexsort((y2, x2, y1, x1, found.labels, -found.scores))


def _suppress(boxes: np.ndarray, iou_threshold: float) -> np.ndarray:
    """Greedy suppression of boxes [n, 4], best first: bool [n], True for those that stay."""
    overlaps = pairwise_iou(boxes, boxes) > iou_threshold
    stays = np.ones(len(boxes), np.bool_)
    for index in range(len(boxes)):
        if stays[index]:
            stays[index + 1 :] &= ~overlaps[index, index + 1 :]
    return stays
