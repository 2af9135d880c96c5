"""VFM alignment, from RT-DETRv4 (Liao et al., arXiv 2510.25257): a map of the student points where the patch tokens of
a frozen vision foundation model point.

F is the student's map of one stride, [B, C_s, h, w]; T the model's tokens on the same grid, [B, d, h, w], a location of
F being covered by n × n patches (`tokens_per_side`), of which the mean is taken; P one linear layer C_s → d:

    L = loss_weight * mean_b mean_{i in V_b} (1 - cos(P(F)_{b,i}, T_{b,i}))

V_b are the locations that the image covers at least in part: not those of the padding alone. Mean over an image's
locations, then over the images: in a batch of images of one size that is the published mean over both, and several
processes with equal shares of a batch have the loss of one. Only directions are compared, so neither scale matters.

The model sees the whole padded canvas, resized so that its patches fall on the grid without interpolating tokens: by
n · patch / stride. With a patch of 16 at stride 32 that is 1, the authors' setting.

Nothing of a teacher is used. Detached: T. The model is outside of the module tree: in no checkpoint, no optimizer and
no gradient bucket. Published: stride 32, the encoder's map, n = 2, DINOv3 ViT-B/16, loss_weight 5 to 20; there the
weight is then adapted to a share of the encoder's gradient, for which `weight: auto` stands here.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from compress.config.methods import Vfm
from compress.data.batch import Batch
from compress.detectors.base import Capability
from compress.distill.method import BuildContext, Method, Outputs
from compress.distill.vision_model import VisionModel, load_vision_model
from deploy.core.errors import UserError

MODEL = "methods.vfm.model"


class VFM(Method):
    """Alignment of one map with the tokens of a vision model.

    Args:
        student_channels: C_s.
        model: frozen.
        level: of the student's pyramid. stride: of that level, in pixels.
        tokens_per_side: n.
        loss_weight: the authors' constant. weight: factor on it.
    """

    needs = frozenset({Capability.FEATURES})
    needs_teacher = False

    def __init__(
        self,
        student_channels: int,
        model: VisionModel,
        *,
        level: int,
        stride: int,
        tokens_per_side: int = 2,
        loss_weight: float = 5.0,
        weight: float = 1.0,
    ) -> None:
        super().__init__()
        self.model = model
        self.level, self.stride, self.tokens_per_side = level, stride, tokens_per_side
        self.loss_weight, self.weight = loss_weight, weight
        self.projection = nn.Linear(student_channels, model.width)

    def forward(self, student: Outputs, teacher: Outputs | None, batch: Batch) -> dict[str, Tensor]:
        features = student.features[self.level]
        grid = (features.shape[2], features.shape[3])
        half = features.dtype in (torch.float16, torch.bfloat16)
        with torch.autocast(features.device.type, dtype=features.dtype if half else None, enabled=half):
            tokens = self.tokens(batch.images, grid)
        projected = self.projection(features.float().flatten(2).transpose(1, 2))  # [B, h * w, d]
        sizes = [size.network for size in batch.sizes]
        loss = misalignment(projected, tokens, covered(sizes, grid, self.stride, features.device))
        return {"vfm": loss * self.loss_weight * self.weight}

    def tokens(self, images: Tensor, grid: tuple[int, int]) -> Tensor:
        """T, float32 [B, h * w, d], of uint8 images [B, 3, H, W]."""
        height, width = (side * self.stride for side in grid)
        # a map of stride 64 may reach beyond the canvas, which is a multiple of 32
        images = images.float()
        if images.shape[2:] != (height, width):
            images = F.pad(images, (0, width - images.shape[3], 0, height - images.shape[2]), mode="replicate")
        n = self.tokens_per_side
        tokens = F.avg_pool2d(self.model.tokens(images, (grid[0] * n, grid[1] * n)), n)
        return tokens.flatten(2).transpose(1, 2)


def misalignment(projected: Tensor, tokens: Tensor, valid: Tensor) -> Tensor:
    """1 - cos between vectors [B, N, d], mean over an image's valid locations (bool [B, N], one at least), then over
    the images: a scalar."""
    distance = (1 - F.cosine_similarity(projected, tokens, dim=-1)) * valid
    return (distance.sum(1) / valid.sum(1)).mean()


def covered(sizes: list[tuple[int, int]], grid: tuple[int, int], stride: int, device: torch.device) -> Tensor:
    """Locations of a map that an image reaches: bool [B, h * w]. sizes: (height, width) of the images in the batch."""
    rows, columns = (torch.arange(side, device=device) * stride for side in grid)
    inside = [(rows < height)[:, None] & (columns < width) for height, width in sizes]
    return torch.stack(inside).flatten(1)


def build(settings: Vfm, context: BuildContext) -> VFM:
    """Load the model, once the student is known to have the map. Raises UserError."""
    strides = context.student.strides
    if settings.stride not in strides:
        raise UserError(
            f"methods.vfm.stride: the student ({context.student.family}) has maps of stride "
            f"{', '.join(map(str, strides))}, not {settings.stride}"
        )
    constants = settings.constants()
    model = load_vision_model(MODEL, constants.pop("model"))
    level = strides.index(settings.stride)
    return VFM(context.student.feature_channels, model, level=level, **constants, weight=context.weight)


def identity(settings: Vfm) -> dict[str, Any]:
    """What the frozen model is, as JSON."""
    return load_vision_model(MODEL, settings.model).identity()
