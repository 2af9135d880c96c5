"""Image backbones: one image in, three feature maps of strides 8, 16 and 32 out.

`build_backbone("resnet50", weights="imagenet")` builds any of `BACKBONES`, whose rows stand in
`compress.config.families`; `build_own_backbone` one of a user's own. ResNet and MobileNetV3 are torchvision's own
modules under torchvision's own parameter names, so torchvision's files and mmdet's (which use the same names for
ResNet) load as they are. `Nano` is ours: small enough to train from scratch on a CPU.

Shapes: B images, H × W pixels, both multiples of 32.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from http.client import HTTPException
from pathlib import Path
from typing import Any, Literal, Self, get_type_hints

import torchvision.models as zoo
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from compress.config.families import BACKBONES as BACKBONES
from compress.detectors.weights import load_exactly, read_tensors
from deploy.core.errors import UserError, first_line
from deploy.core.import_path import call_own, import_object


def build_backbone(
    name: str, *, weights: Literal["imagenet", "none"] | Path, frozen_stages: int = 1, norm_eval: bool = True
) -> Backbone:
    """Build the backbone called `name`, one of `BACKBONES`.

    weights: "imagenet" takes torchvision's IMAGENET1K_V1 (downloaded once, then cached by torch), "none"
        leaves the random initialisation, a path loads a state dict with torchvision's names (a classifier in
        it is ignored).
    frozen_stages: -1 trains everything, 0 freezes the stem, n freezes the stem and the first n of 4 stages.
    norm_eval: keep every BatchNorm on its running statistics, in training too.

    Raises UserError for an unknown name, for weights that cannot be had and for weights that do not fit.
    """
    if name not in BACKBONES:
        raise UserError(f"backbone {name!r} is unknown; use one of {', '.join(BACKBONES)}")
    if not -1 <= frozen_stages <= 4:
        raise UserError(f"frozen_stages is {frozen_stages}; use -1 (none), 0 (stem) or 1 to 4 (stages)")
    facts = BACKBONES[name]
    backbone = KINDS[facts.kind](**facts.options)
    if weights == "imagenet":
        _load_imagenet(backbone, name)
    elif weights != "none":
        state = read_tensors(Path(weights))
        state = {key: value for key, value in state.items() if not key.startswith(("fc.", "classifier."))}
        load_exactly(backbone, state, source=str(weights))
    backbone.freeze(frozen_stages, norm_eval=norm_eval)
    return backbone


def build_own_backbone(path: str, options: Mapping[str, Any], key: str) -> nn.Module:
    """Build a user's own backbone: what is at the import path `path`, called with `options`.

    It is a subclass of torch.nn.Module, or a function whose return type says that it gives one: so a checkpoint that
    names it cannot have anything else called. The module takes normalised float images [B, 3, H, W], gives C3, C4, C5
    as `Backbone.forward` does, and has `out_channels`, their three widths.

    `key` names it in messages. Raises UserError when it is none of this.
    """
    build = import_object(path, key)
    made = build if isinstance(build, type) else _return_type(build)
    if not (isinstance(made, type) and issubclass(made, nn.Module)):
        raise UserError(
            f"{key}: {path} is not a backbone; name a subclass of torch.nn.Module, or a function that is annotated "
            "to return one"
        )
    backbone: nn.Module = call_own(build, path, key, **options)
    channels = getattr(backbone, "out_channels", None)
    if not (isinstance(channels, (tuple, list)) and len(channels) == 3 and all(type(c) is int for c in channels)):
        raise UserError(f"{key}: {path} needs the attribute out_channels, the three widths of C3, C4 and C5")
    return backbone


class Backbone(nn.Module, ABC):
    """A chain of a stem and four stages. Subclasses register the modules and say in `stages` how they chain.

    out_channels: channels of C3, C4 and C5.
    """

    out_channels: tuple[int, int, int]
    frozen_stages: int = -1
    norm_eval: bool = False

    @abstractmethod
    def stages(self) -> Sequence[Sequence[nn.Module]]:
        """The stem and the stages ending at strides 4, 8, 16 and 32, each a chain of modules."""

    def forward(self, images: Tensor) -> list[Tensor]:
        """Normalised float [B, 3, H, W] → C3, C4, C5: [B, out_channels[l], H/s, W/s] for s = 8, 16, 32."""
        return self.all_maps(images)[1:]

    def all_maps(self, images: Tensor) -> list[Tensor]:
        """Outputs of the four stages: as `forward`, with C2 (stride 4) in front."""
        maps, x = [], images
        for stage in self.stages():
            for module in stage:
                x = module(x)
            maps.append(x)
        return maps[1:]

    def freeze(self, frozen_stages: int, *, norm_eval: bool) -> None:
        """Take the stem and the first `frozen_stages` stages out of training, as `build_backbone` says."""
        self.frozen_stages, self.norm_eval = frozen_stages, norm_eval
        for number, stage in enumerate(self.stages()):
            for module in stage:
                module.requires_grad_(number > frozen_stages)
        self.train(self.training)

    def train(self, mode: bool = True) -> Self:
        """Training mode, in which frozen parts, and every BatchNorm if `norm_eval`, stay in eval mode."""
        super().train(mode)
        for stage in self.stages()[: self.frozen_stages + 1]:
            for module in stage:
                module.eval()
        if self.norm_eval:
            for child in self.modules():
                if isinstance(child, _BatchNorm):
                    child.eval()
        return self


class ResNet(Backbone):
    """torchvision's ResNet without its classifier; in the bottleneck the stride is on the 3 × 3 conv."""

    def __init__(self, name: str) -> None:
        super().__init__()
        whole = getattr(zoo, name)(weights=None)
        self.conv1, self.bn1, self.relu, self.maxpool = whole.conv1, whole.bn1, whole.relu, whole.maxpool
        self.layer1, self.layer2 = whole.layer1, whole.layer2
        self.layer3, self.layer4 = whole.layer3, whole.layer4
        channels = whole.fc.in_features
        self.out_channels = (channels // 4, channels // 2, channels)

    def stages(self) -> Sequence[Sequence[nn.Module]]:
        # The max pooling opens stage 1 so that stem and C2 come out at strides 2 and 4 for every backbone.
        return (
            (self.conv1, self.bn1, self.relu),
            (self.maxpool, self.layer1),
            (self.layer2,),
            (self.layer3,),
            (self.layer4,),
        )


class MobileNetV3(Backbone):
    """torchvision's MobileNetV3; C5 is the last 1 × 1 expansion (960 or 576 channels), as in its own FPN."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.features: nn.Sequential = getattr(zoo, name)(weights=None).features
        # The first block of each stage, and one past the last.
        if name == "mobilenet_v3_large":
            self._starts, self.out_channels = (0, 2, 4, 7, 13, 17), (40, 112, 960)
        else:
            self._starts, self.out_channels = (0, 1, 2, 4, 9, 13), (24, 48, 576)

    def stages(self) -> Sequence[Sequence[nn.Module]]:
        blocks = list(self.features)
        return [blocks[start:end] for start, end in zip(self._starts[:-1], self._starts[1:], strict=True)]


class Nano(Backbone):
    """0.34 M parameters, 44 M multiply-adds at 128 × 128; meant for training from scratch on a CPU.

    At `width` 2 every channel count doubles (1.3 M parameters): a teacher of the same kind.

    Dense convolutions only: depthwise ones do far less work but take about as long to train on a CPU. Stages
    1 to 3 end in a residual block whose 3 × 3 widens and whose 1 × 1 narrows again (the fused MBConv of
    EfficientNetV2, arXiv 2104.00298; differs: ReLU, no squeeze-excitation). Trains faster in channels_last.
    """

    def __init__(self, width: int = 1) -> None:
        super().__init__()
        c1, c2, c3, c4, c5 = (width * c for c in (16, 24, 48, 96, 96))
        self.stem = _conv(3, c1, 3, stride=2)
        self.stage1 = nn.Sequential(_conv(c1, c2, 3, stride=2), _Residual(c2, 2 * c2))
        self.stage2 = nn.Sequential(_conv(c2, c3, 3, stride=2), _Residual(c3, 2 * c3))
        self.stage3 = nn.Sequential(_conv(c3, c4, 3, stride=2), _Residual(c4, c4 + c4 // 2))
        self.stage4 = nn.Sequential(_conv(c4, c5, 3, stride=2))
        self.out_channels = (c3, c4, c5)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def stages(self) -> Sequence[Sequence[nn.Module]]:
        return ((self.stem,), (self.stage1,), (self.stage2,), (self.stage3,), (self.stage4,))


class _Residual(nn.Module):
    """x + narrow(widen(x)), [B, channels, H, W] to the same shape."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.widen = _conv(channels, width, 3)
        self.narrow = nn.Sequential(nn.Conv2d(width, channels, 1, bias=False), nn.BatchNorm2d(channels))
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.relu(x + self.narrow(self.widen(x)))
        return result


def _conv(inputs: int, outputs: int, kernel: int, *, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(inplace=True),
    )


KINDS: dict[str, Callable[..., Backbone]] = {"resnet": ResNet, "mobilenet_v3": MobileNetV3, "nano": Nano}


def _return_type(function: Any) -> Any:
    try:
        return get_type_hints(function).get("return")
    except Exception:  # no function, or an annotation that cannot be resolved
        return None


def _load_imagenet(backbone: Backbone, name: str) -> None:
    if not BACKBONES[name].imagenet:
        raise UserError(f"backbone {name} has no ImageNet weights; set weights: none")
    published = zoo.get_model_weights(name)["IMAGENET1K_V1"]
    try:
        state = published.get_state_dict(progress=False, check_hash=True)
    except (OSError, HTTPException, RuntimeError) as error:  # no network, no disk, or not the published hash
        raise UserError(
            f"ImageNet weights of {name} could not be downloaded from {published.url} ({first_line(error)}); "
            "set weights: none, or weights: FILE with a copy of that file"
        ) from error
    state = {key: value for key, value in state.items() if not key.startswith(("fc.", "classifier."))}
    load_exactly(backbone, state, source=published.url)
