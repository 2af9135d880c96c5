"""Settings of a detector: family, backbone, neck and head; and of the one that ships, which may be cut from another."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import AfterValidator, Field, model_validator
from pydantic_core import PydanticCustomError

from compress.config.base import (
    ImportPath,
    Location,
    Options,
    Positive,
    Settings,
    added_later,
    broken_rule,
    is_checkpoint,
)
from compress.config.families import BACKBONES, FAMILY_FACTS, SPECIAL, families_with
from compress.config.messages import did_you_mean
from compress.config.prune import Prune
from deploy.core.import_path import is_import_path

if TYPE_CHECKING:
    Backbone = str
    Family = str
else:
    Backbone = Literal[tuple(BACKBONES)]
    Family = Literal[tuple(FAMILY_FACTS)]


def _weights_file(path: Path) -> Path:
    if path.suffix not in (".pth", ".pt", ".safetensors"):
        choices = ["imagenet", "none"]
        hint = did_you_mean(str(path), choices) or "; use imagenet, none, or a .pth or .safetensors file"
        raise PydanticCustomError("rule", "{problem}", {"problem": f"unknown weights '{path}'{hint}"})
    return path


def _whole_unless_pretrained(pretrained: Any, untrained: Any) -> Callable[[dict[str, Any]], Any]:
    """Default of a setting that only makes sense on a backbone of ours that comes with weights."""

    def default(fields: dict[str, Any]) -> Any:
        own = fields.get("backbone") is None or is_import_path(fields["backbone"])
        return untrained if own or fields.get("weights", "none") == "none" else pretrained

    return default


class Model(Settings):
    """A detector: backbone, feature pyramid, head."""

    detector: Family | ImportPath = "gfl"
    """gfl: Generalized Focal Loss head on a P3-P7 pyramid. fcos, retinanet: torchvision's heads and losses on the same
    levels. faster_rcnn: torchvision's two stages on P2-P6; it trains and teaches, but is not exported. d_fine,
    rt_detr_v2, rf_detr, lw_detr: real-time DETRs of transformers, with their own backbones. Or the import path of a
    class of your own."""
    size: str | None = added_later()
    """A size of a real-time DETR. d_fine: n, s, m, l or x. rt_detr_v2: r18, r34, r50m, r50 or r101; of both tiny
    and tiny2x, to train from scratch on a CPU. rf_detr: nano, small, medium, large or base. lw_detr: tiny, small,
    medium, large or xlarge. null: as `options` say."""
    init: str | None = added_later()
    """Start from a detector of the same architecture: a .safetensors file of this project, an official mmdet GFL .pth
    file or zoo:<name>; of real-time DETRs a folder of transformers or its name on the Hub. Class layers begin anew
    where the classes differ. null: random weights."""
    options: Options | None = added_later()
    """Real-time DETRs: values of the library's configuration. Otherwise arguments of a detector of your own."""
    backbone: Backbone | ImportPath | None = None
    """Feature extractor, or the import path of a function that makes one; a detector of your own may go without."""
    backbone_options: Options | None = added_later()
    """Arguments of a backbone of your own."""
    weights: Literal["imagenet", "none"] | Annotated[Location, AfterValidator(_weights_file)] = "none"
    """Start of the backbone: torchvision's ImageNet weights, random, or a file with such weights."""
    neck_channels: Annotated[int, Field(ge=32, multiple_of=32)] = 256
    """Channels of the pyramid and the head (a multiple of 32; a GroupNorm in the head takes 8 channels a group)."""
    head_depth: Annotated[int, Field(ge=0)] = 4
    """3x3 convolutions in each of the head's two towers (retinanet: at most 4). faster_rcnn: before its fully connected
    layer; 0: two fully connected layers and no convolutions."""
    head_norm: Literal["group", "batch"] = added_later("group")
    """gfl, fcos: norm behind the head's convolutions. batch: BatchNorm with statistics of each level, which files do
    without: faster, above all in int8, and padding does not move detections."""
    anchor_scale: Annotated[float, Field(gt=0)] | None = None
    """retinanet, faster_rcnn: side of the smallest anchor of a level in its strides; smaller for small objects. null:
    torchvision's, 4 and 8."""
    roi_samples: Positive | None = None
    """faster_rcnn: proposals of an image that train the second stage; fewer for small images. null: 512."""
    widths: dict[str, Annotated[tuple[Positive, ...], Field(strict=False)]] | None = added_later()
    """Channels that pruned layers have left, [out, in] or of norms [channels], by name; as in a pruned checkpoint."""
    frozen_stages: Annotated[int, Field(ge=-1, le=4)] = Field(default_factory=_whole_unless_pretrained(1, -1))
    """Stages of the backbone that do not train: -1 none, 0 the stem, n the stem and the first n of four.
    Default: 1 with weights, -1 without."""
    norm_eval: bool = Field(default_factory=_whole_unless_pretrained(True, False))
    """Keep the backbone's BatchNorm statistics as loaded. Default: true with weights, false without."""

    @model_validator(mode="after")
    def _rules(self) -> Self:
        self._check()
        return self

    def _check(self) -> None:
        self._own_part_rules()
        if self.backbone in BACKBONES and not BACKBONES[self.backbone].imagenet and self.weights == "imagenet":
            raise broken_rule("weights", f"{self.backbone} has no ImageNet weights; use none or a file")
        if self.is_own:
            return
        facts = FAMILY_FACTS[self.detector]
        if facts.most_convolutions is not None and self.head_depth > facts.most_convolutions[0]:
            raise broken_rule("head_depth", facts.most_convolutions[1])
        for key, lack in SPECIAL.items():
            if getattr(self, key) != type(self).model_fields[key].default and key not in facts.defaults:
                raise broken_rule(key, f"{self.detector} {lack}; leave it out")

    def bare(self) -> Model:
        """Return the same architecture with random weights and nothing frozen."""
        return self.model_copy(update={"weights": "none", "init": None, "frozen_stages": -1, "norm_eval": False})

    def own_parts(self) -> dict[str, str]:
        """Import paths of the user's own parts, by key."""
        given = {"detector": self.detector, "backbone": self.backbone or ""}
        return {key: path for key, path in given.items() if is_import_path(path)}

    @property
    def is_whole(self) -> bool:
        """Whether a library builds it from a configuration, with a backbone of its own."""
        return not self.is_own and FAMILY_FACTS[self.detector].whole

    @property
    def is_own(self) -> bool:
        """Whether the detector is a class of the user's."""
        return is_import_path(self.detector)

    def _init_rules(self, init: str) -> None:
        if self.is_own:
            raise broken_rule("init", "is for the built-in detectors; load weights in your own class")
        if not is_checkpoint(init):
            raise broken_rule("init", f"'{init}' is neither a .safetensors file, a .pth file, nor zoo:<name>")
        if self.weights != "none":
            raise broken_rule("weights", "are those of a backbone, and init has a whole detector's; leave them out")

    def _whole_rules(self) -> None:
        """Rules of a detector that is built as a whole."""
        for key in (
            "backbone",
            "backbone_options",
            "neck_channels",
            "head_depth",
            "widths",
            "frozen_stages",
            "norm_eval",
        ):
            if key in self.model_fields_set and getattr(self, key) != self._unset(key):
                raise broken_rule(key, f"{self.detector} is built as a whole; leave it out, or set it under options")
        if self.weights != "none":
            raise broken_rule("weights", f"are those of a backbone; a whole {self.detector} starts from init")
        sizes = FAMILY_FACTS[self.detector].sizes
        if self.size is not None and self.size not in sizes:
            raise broken_rule("size", f"{self.detector} has {', '.join(sizes)}, not {self.size}")
        if self.size is not None and self.init is not None:
            raise broken_rule("size", "is that of init; leave it out")

    @classmethod
    def _unset(cls, key: str) -> Any:
        return {"frozen_stages": -1, "norm_eval": False}.get(key, cls.model_fields[key].default)

    def _own_part_rules(self) -> None:
        own_backbone = self.backbone is not None and is_import_path(self.backbone)
        if self.is_whole:
            self._whole_rules()
            return
        if self.size is not None:
            raise broken_rule("size", f"is for {families_with('sizes')}; leave it out")
        if self.init is not None:
            self._init_rules(self.init)
        if not self.is_own:
            if self.backbone is None:
                raise broken_rule("backbone", "missing")
            if self.options is not None:
                raise broken_rule("options", f"is for a detector of your own; {self.detector} has settings by name")
        else:
            for key in ("neck_channels", "head_depth", *SPECIAL):
                if getattr(self, key) != type(self).model_fields[key].default:
                    raise broken_rule(key, "is for the built-in detectors; give it to your own under options")
        if self.backbone_options is not None and not own_backbone:
            raise broken_rule("backbone_options", "is for a backbone of your own, and backbone names none")
        if own_backbone or self.backbone is None:
            whose = "your own backbone" if own_backbone else "a detector without backbone"
            if self.weights == "imagenet" or (self.backbone is None and self.weights != "none"):
                raise broken_rule("weights", f"{whose} has none here; use none, and load them in your class")
            if self.frozen_stages >= 0:
                raise broken_rule("frozen_stages", f"{whose} freezes its stages itself; leave it out")
            if self.norm_eval:
                raise broken_rule("norm_eval", f"{whose} freezes its statistics itself; leave it out")


class Student(Model):
    """The detector that ships: built from these keys, or with `prune` and nothing else cut from another detector."""

    prune: Prune | None = added_later()
    """Cut the student from the teacher or from a checkpoint, whose weights it starts with; null: build it."""

    def _check(self) -> None:
        if self.prune is None:
            super()._check()
            return
        others = sorted(self.model_fields_set - {"prune"})
        if others:
            raise broken_rule(others[0], "is that of the detector that prune cuts; leave it out")

    def built(self) -> Model:
        """What to build, without `prune`."""
        return Model.model_construct(**{key: getattr(self, key) for key in Model.model_fields})
