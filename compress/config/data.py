"""Settings of the images: where they are, and what happens to them before the network."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, Field, model_validator
from pydantic_core import PydanticCustomError

from compress.config.base import Count, Fraction, Location, Positive, Seed, Settings, broken_rule


class Split(Settings):
    """One labelled set of images in COCO format."""

    annotations: Location
    """COCO instances JSON."""
    images: Location
    """Folder that the JSON's file names are relative to."""


class Synthetic(Settings):
    """The generated dataset: textured shapes on clutter, the same pixels for the same settings."""

    train: Positive
    """Training images."""
    val: Positive
    """Validation images."""
    size: Annotated[int, Field(ge=32, le=4096)] = 160
    """Height and width of every image."""
    classes: Annotated[int, Field(ge=2, le=24)] = 10
    """Object classes."""
    seed: Seed = 0
    """Seed of the generator."""
    style: Literal["plain", "night"] = "plain"
    """How the scenes look: night is dark, bluish, blurred and noisy. The objects are the same."""


def _ordered(pair: tuple[float, float]) -> tuple[float, float]:
    if pair[0] > pair[1]:
        raise PydanticCustomError("rule", "the smaller number comes first")
    return pair


class Data(Settings):
    """The images, and what happens to them before the network. Either `synthetic`, or `train` and `val`."""

    train: Split | Annotated[tuple[Split, ...], Field(min_length=1)] | None = None
    """Training set, or a list of them, such as people's labels and a teacher's; categories of one name are one."""
    val: Split | None = None
    """Validation set; never trained on."""
    synthetic: Synthetic | None = None
    """Generate the data instead of reading it."""
    short: Positive | Annotated[tuple[Positive, Positive], AfterValidator(_ordered)] = 800
    """Images keep their ratio and are resized until the short side is `short` or the long side is `long`,
    whichever comes first. A pair: random in the closed range while training, its maximum otherwise."""
    long: Positive = 1333
    """Limit of the long side."""
    flip: Fraction = 0.5
    """Probability of a horizontal flip while training."""
    photometric: bool = False
    """Random brightness, contrast, saturation and hue while training."""
    scale_jitter: (
        Annotated[tuple[Annotated[float, Field(gt=0)], Annotated[float, Field(gt=0)]], AfterValidator(_ordered)] | None
    ) = None
    """Random zoom while training: a factor in this range, then crop (above 1) or pad (below 1)."""
    workers: Count = 2
    """Loader processes for each training process; 0 loads in the process itself."""
    drop_empty: bool = False
    """Do not train on images without objects or with a side below 32 pixels, as mmdet does."""
    cache: bool = False
    """Keep every decoded image in memory (uint8)."""

    @model_validator(mode="after")
    def _rules(self) -> Data:
        if self.synthetic is not None and (self.train is not None or self.val is not None):
            raise broken_rule("synthetic", "excludes data.train and data.val; keep one of the two")
        if self.synthetic is None and (self.train is None or self.val is None):
            absent = " and ".join(k for k in ("train", "val") if getattr(self, k) is None)
            raise broken_rule("", f"needs train and val, or synthetic; there is no {absent}")
        short = self.short if isinstance(self.short, int) else self.short[1]
        if short > self.long:
            raise broken_rule("short", f"{short} is more than data.long, {self.long}")
        return self

    @property
    def train_sets(self) -> dict[str, Split]:
        """The sets of `train` by their keys in a recipe: `train`, or `train.0`, `train.1` and so on."""
        if self.train is None or isinstance(self.train, Split):
            return {} if self.train is None else {"train": self.train}
        return {f"train.{index}": split for index, split in enumerate(self.train)}

    @property
    def eval_short(self) -> int:
        """The short side used for evaluation, in pixels."""
        return self.short if isinstance(self.short, int) else self.short[1]
