"""Detectors of a user's own with what people put between layers: MIDDLES, and which of their layers lose channels.

A middle takes and gives 32 channels. What torch-pruning reads wrong, or what would be another function with fewer
channels, must stay whole.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from compress.detectors.assign import location_points
from compress.detectors.base import DensePrediction, Detector

C = 32


def block(inputs: int, outputs: int, kernel: int = 3, stride: int = 1, groups: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs), nn.SiLU())


class Between(Detector):
    """A stem, the middle called `middle`, a second level, and a head that both levels share."""

    strides = (8, 16)

    def __init__(self, num_classes: int, *, middle: str = "Plain") -> None:
        super().__init__()
        self.options = {"middle": middle}
        self.num_classes, self.feature_channels = num_classes, C
        self.stem = nn.Sequential(block(3, 16, stride=2), block(16, C, stride=2), block(C, C, stride=2))
        self.middle = MIDDLES[middle][0]()
        self.down = block(C, C, stride=2)
        self.logits, self.box_deltas = nn.Conv2d(C, num_classes, 1), nn.Conv2d(C, 4, 1)
        self.set_normalisation()

    def features(self, images: Tensor) -> list[Tensor]:
        x = self.middle(self.stem(self.normalise(images)))
        return [x, self.down(x)]

    def predict(self, features: list[Tensor]) -> DensePrediction:
        sides = [F.softplus(self.box_deltas(x)) for x in features]
        return DensePrediction([self.logits(x) for x in features], [], self.strides, box_deltas=sides)

    def decode_boxes(self, prediction: DensePrediction) -> Tensor:
        points = location_points(prediction.level_sizes, prediction.strides, prediction.logits[0].device)
        sides = [
            x.flatten(2).transpose(1, 2) * s for x, s in zip(prediction.box_deltas, prediction.strides, strict=True)
        ]
        left_top, right_bottom = torch.cat(sides, 1).chunk(2, -1)
        return torch.cat((points - left_top, points + right_bottom), -1)


class OwnHeads(Between):
    """A head of its own for each level, so that their maps may differ in width."""

    def __init__(self, num_classes: int) -> None:
        super().__init__(num_classes)
        self.options = {}
        self.heads = nn.ModuleList(nn.Conv2d(C, num_classes + 4, 1) for _ in range(2))

    def predict(self, features: list[Tensor]) -> DensePrediction:
        both = [head(x).split((self.num_classes, 4), 1) for head, x in zip(self.heads, features, strict=True)]
        return DensePrediction([a for a, _ in both], [], self.strides, box_deltas=[F.softplus(b) for _, b in both])


class SecondStage(Between):
    """Looks at its maps again when it decodes, and does not say so in `traced`."""

    capabilities = frozenset(c for c in Detector.capabilities if c.name != "DENSE")


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = block(C, 48), block(48, C)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.b(self.a(x))
        return result


class Concatenated(Plain):
    """A layer reads several groups, one of them twice."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.c, self.b = block(C, 16), block(C, 24), block(16 + C + 24 + 16, C)

    def forward(self, x: Tensor) -> Tensor:
        a = self.a(x)
        result: Tensor = self.b(torch.cat((a, x, self.c(x), F.max_pool2d(a, 3, 1, 1)), 1))
        return result


class Summed(Plain):
    """Two layers beside each other, and a third one added to both."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.c, self.d, self.b = block(C, 16), block(C, 24), block(C, 40), block(40, C)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.b(torch.cat((self.a(x), self.c(x)), 1) + self.d(x))
        return result


class Weighted(Plain):
    """Summands with learned weights, one for all channels, and an activation with one."""

    def __init__(self) -> None:
        super().__init__()
        self.c, self.weight, self.act = block(C, 48, 1), nn.Parameter(torch.ones(2)), nn.PReLU()

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight.relu() / self.weight.relu().sum()
        result: Tensor = self.b(self.act(weight[0] * self.a(x) + weight[1] * self.c(x)))
        return result


class NormOverTwo(Plain):
    """GroupNorm over a concatenation, whose groups are those of its parts."""

    sizes = (16, 24)

    def __init__(self) -> None:
        super().__init__()
        self.a, self.c = nn.Conv2d(C, self.sizes[0], 3, 1, 1), nn.Conv2d(C, self.sizes[1], 1)
        self.norm = nn.GroupNorm(sum(self.sizes) // 8, sum(self.sizes))
        self.b = block(sum(self.sizes), C)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.b(self.norm(torch.cat((self.a(x), self.c(x)), 1)))
        return result


class NormAcross(NormOverTwo):
    """A norm group has channels of both."""

    sizes = (12, 20)


class Depthwise(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.c, self.b = block(C, 48, 1), block(48, 48, groups=48), block(48, C, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.b(self.c(self.a(x)))


class Excited(Plain):
    """A fully connected layer scales channels."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(48, 48)

    def forward(self, x: Tensor) -> Tensor:
        a = self.a(x)
        result: Tensor = self.b(a * self.gate(a.mean((2, 3))).sigmoid()[:, :, None, None])
        return result


class Flattened(Plain):
    """A fully connected layer reads all locations of a channel."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.linear, self.b = block(C, 16), nn.Linear(16 * 16, C), block(C, C)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.b(x + self.linear(F.adaptive_avg_pool2d(self.a(x), 4).flatten(1))[:, :, None, None])
        return result


class Bare(Plain):
    """Norms without weights, one of them of each image."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.Sequential(
            nn.BatchNorm2d(48, affine=False), nn.InstanceNorm2d(48), nn.GroupNorm(6, 48, affine=False)
        )

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.b(self.norms(self.a(x)))
        return result


class Attending(Plain):
    """A transformer layer: its LayerNorm normalises all channels together, its hidden layer is free."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.attention = nn.LayerNorm(C), nn.MultiheadAttention(C, 4, batch_first=True)
        self.a, self.b = nn.Linear(C, 48), nn.Linear(48, C)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(2).transpose(1, 2)
        normed = self.norm(tokens)
        tokens = tokens + self.attention(normed, normed, normed, need_weights=False)[0]
        tokens = tokens + self.b(F.gelu(self.a(tokens)))
        return tokens.transpose(1, 2).reshape(x.shape)


class Chunked(Plain):
    """Halves of one layer go different ways."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.c, self.b = block(C, C, 1), block(C // 2, C // 2), block(C + C // 2, C)

    def forward(self, x: Tensor) -> Tensor:
        left, right = self.a(x).chunk(2, 1)
        result: Tensor = self.b(torch.cat((left, right, right + self.c(right)), 1))
        return result


class Sliced(Plain):
    def forward(self, x: Tensor) -> Tensor:
        a = self.a(x)
        result: Tensor = self.b(torch.cat((a[:, 16:], a[:, :16]), 1))
        return result


class Shuffled(Plain):
    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.b(F.channel_shuffle(self.a(x), 4))
        return result


class Flipped(Plain):
    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.b(self.a(x).flip(1))
        return result


class PixelShuffled(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = block(C, 64, stride=2), block(16, C)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.b(F.pixel_shuffle(self.a(x), 2))
        return result


class Gated(Plain):
    """One channel scales all."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Conv2d(48, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        a = self.a(x)
        result: Tensor = self.b(self.gate(a).sigmoid() * a)
        return result


class Averaged(Plain):
    """A mean over channels is another one over fewer."""

    def forward(self, x: Tensor) -> Tensor:
        a = self.a(x)
        result: Tensor = self.b(a - a.mean(1, keepdim=True))
        return result


class Scaled(Plain):
    """A parameter and a buffer of as many numbers as there are channels."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(48, 1, 1))
        self.register_buffer("shift", torch.ones(C, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.b(self.a(x) * self.weight) + self.shift
        return result


class InGroups(Plain):
    """Convolutions of several groups, and one with two filters a channel."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.c, self.b = block(C, C, groups=4), block(C, 64, groups=C), block(64, C)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.b(self.c(self.a(x)))
        return result


class Upsampled(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.up = block(C, 48, stride=2), nn.ConvTranspose2d(48, C, 2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.up(self.a(x))


class Functional(Plain):
    """The weight of a layer, without the layer."""

    def forward(self, x: Tensor) -> Tensor:
        conv = self.b[0]
        assert isinstance(conv, nn.Conv2d)
        return F.conv2d(self.a(x), conv.weight, padding=1)


class Parametrized(Plain):
    def __init__(self) -> None:
        super().__init__()
        nn.utils.parametrizations.weight_norm(self.a[0])  # type: ignore[arg-type]


class Coupled(Plain):
    """Two layers that must lose the same channels, which gradients do not show: one of them is detached."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.c = block(C, 48, 1), block(48, C)

    def forward(self, x: Tensor) -> Tensor:
        gate = self.gate(x)
        result: Tensor = self.b(self.a(x) * gate.detach().sigmoid()) + self.c(gate)
        return result


MIDDLES: dict[str, tuple[type[Plain], set[str]]] = {
    "Plain": (Plain, {"a", "b"}),
    "Concatenated": (Concatenated, {"a", "b", "c"}),
    "Summed": (Summed, {"a", "b", "c", "d"}),
    "Weighted": (Weighted, {"a", "b", "c"}),
    "NormOverTwo": (NormOverTwo, {"a", "b", "c", "norm"}),
    "NormAcross": (NormAcross, {"b"}),
    "Depthwise": (Depthwise, {"a", "b", "c"}),
    "Excited": (Excited, {"a", "b", "gate"}),
    "Flattened": (Flattened, {"a", "b", "linear"}),
    "Bare": (Bare, {"a", "b", "norms"}),
    "Attending": (Attending, {"a"}),
    "Chunked": (Chunked, {"b"}),
    "Sliced": (Sliced, {"b"}),
    "Shuffled": (Shuffled, {"b"}),
    "Flipped": (Flipped, {"b"}),
    "PixelShuffled": (PixelShuffled, {"b"}),
    "Gated": (Gated, {"b"}),
    "Coupled": (Coupled, {"b", "c"}),
    "Averaged": (Averaged, {"b"}),
    "Scaled": (Scaled, set()),
    "InGroups": (InGroups, {"b"}),
    "Upsampled": (Upsampled, set()),
    "Functional": (Functional, set()),
    "Parametrized": (Parametrized, {"b"}),
}
"""By name: the middle, and its parts that make channels which can leave."""
