"""How labelling cuts scores and resizes images: as given, or as the teachers' own files say."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from compress.pseudo.merge import Merging
from compress.teachers.base import BoxTeacher, View, operating_point_of, size_of_training
from compress.teachers.check import described, resized_images
from deploy.core.errors import UserError

TAU, REGIONS = 0.4, 0.5
"""Lowest score of a label where nothing says another; and of a region to ignore, as a share of that of a label."""
SHORT_LONG = (800, 1333)
"""Limits of the images, pixels, where nothing says what a teacher was trained with: the usual ones for COCO."""
LARGEST = 8192
"""Side of a resized image, pixels. Far above what detectors are trained with, and far below what a machine holds."""


@dataclass(frozen=True)
class Settings:
    """Settings of labelling.

    tau: lowest score of a label; None: that of the teacher's operating point, and `TAU` where it has none.
    tau_ignore: lowest score of a region to ignore, at most that of a label; None: `REGIONS` of it. Thresholds that are
        measured class by class keep the ratio of the two.
    how, iou_threshold: see `merge.merge`.
    short, long: limits of the keep-ratio resize, pixels, for all teachers; both None: each sees images of the size that
        it was trained with, `SHORT_LONG` where nothing says.
    batch_size: images that go through a teacher at once, at most.
    """

    tau: float | None = None
    tau_ignore: float | None = None
    how: Merging = "nms"
    iou_threshold: float = 0.6
    short: int | None = None
    long: int | None = None
    batch_size: int = 8

    def __post_init__(self) -> None:
        for name, value in (("tau", self.tau), ("tau_ignore", self.tau_ignore)):
            if value is not None and not 0 < value <= 1:
                raise UserError(f"thresholds: {name} is a score above 0, at most 1, got {value}")
        if self.tau is not None:
            self._regions_from(self.tau)
        if not 0 <= self.iou_threshold < 1:
            raise UserError(f"IoU threshold of the merge: must be at least 0 and below 1, got {self.iou_threshold}")
        if self.short is None and self.long is None:
            return
        if self.short is None or self.long is None:
            raise UserError(
                f"image size: {'short' if self.short is None else 'long'} is missing; both or none are given"
            )
        if not 1 <= self.short <= self.long <= LARGEST:
            raise UserError(f"image size: 1 <= short <= long <= {LARGEST} is needed, got {self.short} and {self.long}")

    def thresholds(self, teachers: Sequence[BoxTeacher]) -> tuple[float, float, str]:
        """Lowest score of a label and of a region, and why it is that, in words.

        Raises UserError where a given `tau_ignore` is above that of a label.
        """
        tau, why = self._labels_from(teachers)
        return tau, self._regions_from(tau), why

    def _regions_from(self, tau: float) -> float:
        if self.tau_ignore is None:
            return tau * REGIONS
        if self.tau_ignore > tau:
            raise UserError(f"thresholds: tau_ignore {self.tau_ignore} is above {tau:.3g}, from where boxes are labels")
        return self.tau_ignore

    def _labels_from(self, teachers: Sequence[BoxTeacher]) -> tuple[float, str]:
        if self.tau is not None:
            return self.tau, "as given"
        measure = "labelled images give better ones: --thresholds-from, in a recipe thresholds: best_f1"
        if len(teachers) > 1:
            return TAU, f"the default for several teachers; {measure}"
        file, point = teachers[0].file, operating_point_of(teachers[0])
        if point is None or point.score == 0:
            return TAU, f"the default, since {file} does not say where its F1 is best; {measure}"
        return point.score, f"where {file} says its F1 is best, {point.f1:.3f} on {point.images} images"

    def size_for(self, teacher: BoxTeacher) -> tuple[int, int]:
        """(short, long) of the images that a teacher with `View.RESIZED` sees."""
        if self.short is not None and self.long is not None:
            return self.short, self.long
        return size_of_training(teacher) or SHORT_LONG

    def sizes(self, teachers: Sequence[BoxTeacher]) -> list[tuple[int, int]]:
        """`size_for` each; those that look at no resized image get that of the first that does: it is free."""
        own = [self.size_for(teacher) if teacher.view is View.RESIZED else None for teacher in teachers]
        free = next(filter(None, own), SHORT_LONG)
        return [free if size is None else size for size in own]

    def size_lines(self, teacher: BoxTeacher) -> list[str]:
        """A line that says which images the teacher sees, and why those; none for one that looks at no pixels."""
        if teacher.view is not View.RESIZED:
            return [] if teacher.preprocessing is None else [_sees(teacher, described(teacher.preprocessing))]
        size, own = self.size_for(teacher), size_of_training(teacher)
        text = resized_images(*size).size
        if own == size:
            return [_sees(teacher, f"{text}, as in its training")]
        if own is not None:
            return [
                f"warning: {_sees(teacher, text)}, as given; it was trained with {resized_images(*own).size}, which it "
                "sees where --short and --long are left out"
            ]
        default = "" if self.short is not None else ", the default, since its file does not say"
        return [_sees(teacher, f"{text}{default}; --short and --long should be those of its training")]


def unlike(found: float, labelled: float, where: str) -> str | None:
    """A warning where the labels found have over three times as many boxes a picture as people's, or under a third.

    found, labelled: boxes a picture, of the same classes. where: the file of people's.
    """
    if labelled == 0 or labelled / 3 <= found <= labelled * 3:
        return None
    return (
        f"warning: {found:.2f} labels a picture, and {where} has {labelled:.2f}: if the pictures are alike, most "
        "of these are wrong or missing; check the size of the images (short, long), then the threshold (tau)"
    )


# --- details --------------------------------------------------------------------------------------------


def _sees(teacher: BoxTeacher, what: str) -> str:
    return f"teacher {teacher.file} sees images: {what}"
