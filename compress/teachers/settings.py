"""How a recipe names a teacher: exactly one of several sources, each with what it takes to use it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field, model_validator
from pydantic_core import PydanticCustomError

from compress.settings import Settings, broken_rule


def checkpoint_name(name: str) -> str:
    """`name` if it can be a checkpoint: a `.safetensors` or `.pth` file, or `zoo:<name>`."""
    if not (name.startswith("zoo:") and len(name) > 4) and Path(name).suffix not in (".safetensors", ".pth"):
        raise PydanticCustomError(
            "rule",
            "{problem}",
            {"problem": f"'{name}' is neither a .safetensors file, a .pth file, nor zoo:<name>"},
        )
    return name


Names = Annotated[tuple[str, ...], Field(min_length=1)]


class Torchvision(Settings):
    """A detector of torchvision."""

    model: Literal[
        "retinanet_resnet50_fpn",
        "retinanet_resnet50_fpn_v2",
        "fcos_resnet50_fpn",
        "fasterrcnn_resnet50_fpn",
        "fasterrcnn_resnet50_fpn_v2",
        "fasterrcnn_mobilenet_v3_large_fpn",
        "fasterrcnn_mobilenet_v3_large_320_fpn",
        "ssd300_vgg16",
        "ssdlite320_mobilenet_v3_large",
    ]
    """Name of the function in torchvision.models.detection that builds it."""
    weights: Literal["coco", "none"] | Path
    """coco: torchvision's own, downloaded; none: random; or a file with a state dict."""
    class_names: Names | None = None
    """Its classes in the order of its labels, without background; null: COCO's, which needs weights: coco."""


class Mmdet(Settings):
    """A detector of mmdet (extra `mmdet`)."""

    config: Path
    """Config file."""
    checkpoint: Path
    """Weights."""


class Transformers(Settings):
    """An object detector of transformers (extra `transformers`)."""

    model: Path
    """Folder with config.json, preprocessor_config.json and weights, as `save_pretrained` writes it."""


class Source(Settings):
    """Where a teacher comes from: exactly one of the keys."""

    checkpoint: Annotated[str, AfterValidator(checkpoint_name)] | None = None
    """A .safetensors file of this project, an official mmdet GFL .pth file, or zoo:<name>."""
    torchvision: Torchvision | None = None
    """A detector of torchvision."""
    mmdet: Mmdet | None = None
    """A detector of mmdet."""
    transformers: Transformers | None = None
    """A detector of transformers."""

    @property
    def given(self) -> tuple[str, ...]:
        """The sources that are given, by key."""
        return tuple(name for name in Source.model_fields if getattr(self, name) is not None)

    @model_validator(mode="after")
    def _rules(self) -> Self:
        if not self.given:
            raise broken_rule("", f"no source; give one of {', '.join(Source.model_fields)}")
        if len(self.given) > 1:
            raise broken_rule(self.given[1], f"excludes {self.given[0]}; keep one of the two")
        return self
