"""Quantized files of an exported one: their calibration images, and those that the search for float layers uses."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from compress.config.data import Split
from compress.config.deploy import Int8
from compress.console import open_console
from compress.data.digests import PictureDigests, together
from deploy.core.errors import UserError
from deploy.core.files import sha256_of, write_json, write_text
from deploy.core.odd_pictures import odd_pictures
from deploy.core.precisions import Target
from deploy.core.progress import Progress
from deploy.core.same_files import shared
from deploy.quantize.calibrate import CALIBRATION_KEY, CalibrationImages, check_apart, choose_images, list_images
from deploy.quantize.file import Quantizer, QuantizeReport
from deploy.quantize.guided import GuidedResult, search
from deploy.quantize.picture import trade_off_svg
from deploy.validate.coco import load_annotations


@dataclass(frozen=True)
class Search:
    """A search for the layers that stay in float.

    labels: COCO file and images that it is scored on.
    max_map_drop: the budget in mAP points.
    count: it is scored on so many of the images, written to `part`, none of them for calibration; None: on all.
    """

    labels: Split
    max_map_drop: float
    count: int | None = None
    part: Path | None = None


@dataclass(frozen=True)
class Quantizing:
    """Plan of what quantized files are made with, besides the float one. Images are looked for when they are asked for.

    train, val: images to calibrate on where the settings name none, and images to keep apart from; None: there are
        none.
    search: None: all layers but the last in int8.
    digests: of pictures. generated: train and val are drawn by their settings, which say everything about them.
    """

    settings: Int8
    train: Split | None = None
    val: Split | None = None
    search: Search | None = None
    digests: PictureDigests = field(default_factory=PictureDigests)
    generated: bool = False

    @cached_property
    def images(self) -> CalibrationImages:
        """Images for calibration, none of them among the validation images; says how many are left out for that.

        Raises UserError when there are none."""
        source = self.settings.calibration
        if source is not None:
            files = list_images(source)
            odd = odd_pictures(files)
            if odd is not None:
                open_console().print(f"note: {CALIBRATION_KEY}: {odd}", markup=False)
        else:
            assert self.train is not None, "without training images the settings name others"
            files = split_files(self.train.annotations, self.train.images)
        if self.val is not None:
            files = _without(files, split_files(self.val.annotations, self.val.images))
        return choose_images(files, self.settings.images, self.digests)

    @cached_property
    def search_split(self) -> Split | None:
        """Return the images that the search is scored on, checked; None: there is no search. Raises UserError."""
        if self.search is None:
            return None
        labels = self.search.labels
        if self.search.count is not None:
            assert self.search.part is not None, "a part has a file"
            labels = write_search_split(labels, self.images, self.search.count, self.search.part, self.digests)
        if not load_annotations(labels.annotations)["annotations"]:
            raise UserError(f"{labels.annotations}: no boxes to measure mAP on")
        scored = split_files(labels.annotations, labels.images)
        check_apart(self.images, scored, "the images that the search is scored on", self.digests)
        return labels

    def identity(self, *, searched: bool) -> dict[str, Any]:
        """Identify the pictures that a quantized file depends on, as JSON; empty where the settings say everything
        about them. searched: it also depends on what the search is scored on, if there is one. Raises UserError as
        `images` and `search_split` do."""
        if self.generated and self.settings.calibration is None:
            return {}
        found = {"calibration": self.images.sha256}
        split = self.search_split if searched else None
        if split is not None:
            scored = split_files(split.annotations, split.images)
            found["search"] = together([sha256_of(split.annotations), *self.digests.of(scored)])
        return found

    def check(self) -> None:
        """Look for all images now, before long work. Raises UserError."""
        assert self.images
        assert self.search is None or self.search_split


class BudgetError(RuntimeError):
    """No choice of float layers holds the loss of mAP within the budget: no file was written. `result`: the search."""

    def __init__(self, message: str, result: GuidedResult) -> None:
        super().__init__(message)
        self.result = result


def quantize_file(
    source: Path, out: Path, how: Quantizing, target: Target, *, max_batch: int, progress: Progress | None = None
) -> tuple[QuantizeReport, GuidedResult | None]:
    """Quantize the exported float file `source` in the format of `target` to `out`.

    A search leaves its measurements, `<out>.guided.json`, and a picture, `<out>.guided.svg`, beside `out`.

    Raises UserError for images that cannot be used, BudgetError when the search fails.
    """
    settings = how.settings
    quantizer = Quantizer(source, how.images, target, method=settings.method, reduce_range=settings.reduce_range)
    split = how.search_split
    if split is None or how.search is None:
        return quantizer.save(out, max_batch=max_batch), None
    measurements, budget = out.with_suffix(".guided.json"), how.search.max_map_drop
    result = search(quantizer, split.annotations, split.images, measurements, max_map_drop=budget, progress=progress)
    write_text(measurements.with_suffix(".svg"), trade_off_svg(result))
    chosen = result.chosen
    if chosen is None:
        best = min((trial.map_drop for trial in result.trials), default=float("nan"))
        raise BudgetError(
            f"{out.name}: no choice of layers loses at most {budget:g} mAP points (the best of "
            f"{len(result.trials)} lost {best:.2f}); not written",
            result,
        )
    report = quantizer.save(out, chosen.float_layers, guided_map_drop=round(chosen.map_drop, 4), max_batch=max_batch)
    return report, result


def _without(files: list[Path], judged_on: list[Path]) -> list[Path]:
    """The files whose bytes are not among those of `judged_on`. Raises UserError where none is left."""
    common = shared(files, judged_on)
    if not common:
        return files
    (first, other), own = common[0], {file for file, _ in common}
    if len(own) == len(set(files)):
        raise UserError(
            f"{CALIBRATION_KEY}: all {len(own)} calibration images are among the validation images, the first is "
            f"{first} (= {other}); name other images, such as unlabelled ones"
        )
    open_console().print(
        f"calibration: {len(own)} of {len(set(files))} images are left out, because they are validation images as "
        f"well; the first is {first} (= {other})",
        markup=False,
    )
    return [file for file in files if file not in own]


def split_files(annotations: Path, folder: Path) -> list[Path]:
    """The image files of a COCO JSON."""
    return [folder / row["file_name"] for row in load_annotations(annotations)["images"]]


def write_search_split(
    split: Split, calibration: CalibrationImages, count: int, out: Path, digest: Callable[[Path], str] = sha256_of
) -> Split:
    """Write to `out` the part of a labelled set that a search is scored on: `count` images spread evenly over those
    with boxes that are not for calibration. Raises UserError when none is left."""
    content = load_annotations(split.annotations)
    taken = set(calibration.hashes)
    labelled = {row["image_id"] for row in content["annotations"]}
    rows = [row for row in content["images"] if row["id"] in labelled]
    spread = [rows[index * len(rows) // (2 * count)] for index in range(2 * count)] if len(rows) > 2 * count else rows
    free = [row for row in spread if digest(split.images / row["file_name"]) not in taken]
    chosen = free[:: max(1, len(free) // count)][:count]
    if not chosen:
        raise UserError(
            f"deploy.int8.images: every labelled image of {split.annotations} is used for calibration, and none is "
            "left to measure mAP on; calibrate on fewer (--calibration-images), or give other labelled images (--data)"
        )
    ids = {row["id"] for row in chosen}
    annotations = [row for row in content["annotations"] if row["image_id"] in ids]
    write_json(out, {"images": chosen, "annotations": annotations, "categories": content["categories"]})
    return Split(annotations=out, images=split.images)
