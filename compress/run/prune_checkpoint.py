"""A checkpoint without some of its channels, as another checkpoint; nothing is trained.

made = prune_checkpoint(CheckpointPruning("teacher.safetensors", out, Cut(gflops=0.5), ...), print)
made.sizes, made.maps
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from compress.config.base import ZOO_PREFIX
from compress.config.data import Split
from compress.config.deploy import Deploy
from compress.config.prune import Cut
from compress.data.coco import CocoDetection
from compress.data.transforms import eval_transform
from compress.detectors.base import Detector
from compress.detectors.build import model_of, model_size
from compress.detectors.checkpoints import NATIVE_SUFFIX, ModelRecord, save_detector
from compress.run.folder import writing
from compress.run.prune import Images, PruningPlan, measure_sensitivity, prune_detector
from compress.run.pruned import NOT_TRAINED, load_whole, pruned_from
from deploy.core.errors import UserError
from deploy.core.files import CHECKPOINT_SUFFIXES, need_place
from deploy.core.image_folder import spread
from deploy.core.storage import is_file


@dataclass(frozen=True)
class CheckpointPruning:
    """Plan of a checkpoint that is cut.

    checkpoint: FILE.safetensors, an mmdet FILE.pth or zoo:NAME. out: the file to write.
    size, resize_short_long, deploy: as of `PruningPlan`.
    labels: training images, of which `settings.images` are looked at; None: none are. optional: only mAP is measured on
        them, which is left out, with a line saying why, where they are of no use.
    """

    checkpoint: str
    out: Path
    settings: Cut
    size: tuple[int, int]
    resize_short_long: tuple[int, int]
    deploy: Deploy
    labels: Split | None = None
    optional: bool = False

    @property
    def sensitivities(self) -> Path:
        """What was measured of each layer, beside the checkpoint: `runs/first/teacher.sensitivities.json`."""
        return beside(self.checkpoint).with_name(f"{_stem(self.checkpoint)}.sensitivities.json")


@dataclass(frozen=True)
class PrunedCheckpoint:
    """A checkpoint that was cut.

    figures: of `prune_detector`.
    sizes: `params_m` and `gflops`, whole and pruned. maps: mAP (percent) on `images` training images, whole and pruned;
        None where there are none.
    """

    path: Path
    figures: dict[str, Any]
    sizes: tuple[dict[str, float], dict[str, float]]
    maps: tuple[float, float] | None
    images: int


def beside(checkpoint: str) -> Path:
    """`runs/first/teacher.pth` → `runs/first/teacher.pruned.safetensors`; of a zoo's, in the working directory."""
    return Path(checkpoint.removeprefix(ZOO_PREFIX)).with_name(f"{_stem(checkpoint)}.pruned{NATIVE_SUFFIX}")


def need_new_file(out: Path, checkpoint: str, *, force: bool) -> None:
    """Raise UserError, before the long work, for a name that a pruned checkpoint cannot have. force: another may be
    there already."""
    if out.suffix != NATIVE_SUFFIX:
        raise UserError(f"{out}: does not end in {NATIVE_SUFFIX}, as the name of a pruned checkpoint does")
    need_place(out)
    if out.exists() and Path(checkpoint).exists() and out.samefile(checkpoint):
        raise UserError(f"{out}: is the checkpoint that is cut; give another name")
    if out.exists() and not force:
        raise UserError(f"{out}: is there already; give another name, or --force (in Python force=True) to replace it")


def prune_checkpoint(plan: CheckpointPruning, say: Callable[[str], None]) -> PrunedCheckpoint:
    """Write the pruned detector, its weights inherited; the file is whole or absent, and replaces one of its name.

    It keeps class names and category ids, has no mAP and no recipe, and names the checkpoint as its source.

    Raises UserError for a file that is no checkpoint, one that was pruned before or trained on the grids of its int8
    file, images that are missing or of other classes, and as `prune_detector`.
    """
    detector, record, cutting, images = _opened(plan, say)
    smaller, figures = prune_detector(detector, record, cutting, say)
    described = {"model": model_of(smaller), "source": pruned_from(plan.checkpoint)} | NOT_TRAINED
    with writing(plan.out):
        save_detector(plan.out, smaller, metadata=ModelRecord.model_validate(dict(record) | described))
    maps, count = None, 0
    if images is not None:
        with _may_be_of_no_use(plan, say):
            maps, count = (images.mean_ap(detector), images.mean_ap(smaller)), len(images)
    sizes = model_size(detector, plan.size), model_size(smaller, plan.size)
    return PrunedCheckpoint(plan.out, figures, sizes, maps, count)


def sensitivity_of(plan: CheckpointPruning, say: Callable[[str], None]) -> dict[str, Any]:
    """Measure what the loss of channels costs each layer; nothing but `plan.sensitivities` is written, which an
    interrupted measurement continues from.

    Returns `map` of the whole detector, `images`, and `rows` of `name` and `points`, pairs of the share of the channels
    that stays and the mAP. Raises UserError as `prune_checkpoint`.
    """
    detector, record, cutting, _ = _opened(plan, say)
    return measure_sensitivity(detector, record, cutting, say)


# --- details --------------------------------------------------------------------------------------------


def _stem(checkpoint: str) -> str:
    path = Path(checkpoint.removeprefix(ZOO_PREFIX))
    return path.stem if path.suffix in CHECKPOINT_SUFFIXES else path.name


def _opened(
    plan: CheckpointPruning, say: Callable[[str], None]
) -> tuple[Detector, ModelRecord, PruningPlan, Images | None]:
    """What is cut and how, and the images that its mAP is measured on."""
    detector, record = load_whole(plan.checkpoint, None)
    if plan.settings.shares == "sensitivity":
        need_place(plan.sensitivities)
    cutting = PruningPlan(
        settings=plan.settings,
        size=plan.size,
        resize_short_long=plan.resize_short_long,
        images=None,
        deploy=plan.deploy,
        sensitivities=plan.sensitivities,
    )
    images = None
    if plan.labels is not None:
        with _may_be_of_no_use(plan, say):
            cutting = replace(cutting, images=_labelled(plan, plan.labels, record))
            looked_at = Images(cutting)
            looked_at.need_objects()  # before anything long begins
            images = looked_at
    return detector, record, cutting, images


@contextmanager
def _may_be_of_no_use(plan: CheckpointPruning, say: Callable[[str], None]) -> Iterator[None]:
    """Take an error of the images for a note, where they are optional."""
    try:
        yield
    except UserError as error:
        if not plan.optional:
            raise
        say(f"note: mAP is not measured: {error}")


def _labelled(plan: CheckpointPruning, split: Split, record: ModelRecord) -> CocoDetection:
    """Open the images, which must have the checkpoint's classes and, those that are looked at, be there."""
    images = CocoDetection(split.annotations, split.images, eval_transform(*plan.resize_short_long, plan.size))
    problem = _other_classes(record, images.categories)
    if problem is not None:
        raise UserError(
            f"{split.annotations}: {problem}; give images that are labelled with the classes of the checkpoint"
        )
    if images.num_boxes == 0:
        raise UserError(f"{split.annotations}: it has no box to measure mAP on")
    looked_at = spread(range(len(images)), plan.settings.images)
    lost = [path for path in map(images.path, looked_at) if not is_file(path, ask=False)]
    if lost:
        more = f" (and {len(lost) - 1} more of {len(looked_at)})" if len(lost) > 1 else ""
        raise UserError(f"{lost[0]}: an image of {split.annotations}{more}: the file is missing")
    return images


def _other_classes(record: ModelRecord, found: Sequence[str]) -> str | None:
    if record.num_classes != len(found):
        return f"it has {len(found)} classes, and the checkpoint knows {record.num_classes}"
    for label, (theirs, ours) in enumerate(zip(record.class_names or found, found, strict=True)):
        if theirs != ours:
            return f"its label {label} is {ours!r}, and the checkpoint's is {theirs!r}"
    return None
