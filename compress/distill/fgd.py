"""FGD: focal and global knowledge distillation (Yang et al., CVPR 2022, arXiv 2111.11837).

For each pyramid level, S the adapted student map and T the teacher's, both [B, C, h, w]:

    A_sp(x) = hw * softmax_hw(mean_c |x| / temperature)    [B, h, w]     where a map is strong
    A_ch(x) = C * softmax_c(mean_hw |x| / temperature)     [B, C]        and in which channels
    fg   = sum M_fg * A_sp(T) * A_ch(T) * (S - T)^2 / B                  at objects
    bg   = sum M_bg * A_sp(T) * A_ch(T) * (S - T)^2 / B                  elsewhere
    mask = (sum |A_ch(S) - A_ch(T)| + sum |A_sp(S) - A_sp(T)|) / B       the attention itself
    rela = sum (R_s(S) - R_t(T))^2 / B                                   relations between pixels
    R(x) = x + W2 ReLU(LN(W1 ctx(x))),   ctx(x) = sum_hw softmax_hw(w · x) * x   [B, C]   (a global context block)
    L    = alpha * fg + beta * bg + gamma * mask + relation * rela,  summed over levels

M_fg is 1 / (rows · columns) inside each ground-truth box as drawn on the map, the larger value (the smaller box)
where boxes overlap; M_bg is 1 / (number of locations in no box). Crowd boxes are not ground truth. An image
without boxes has only background.

Sums over channels and locations, divided only by the images B of this process: the weights belong to 256 channels
and to maps of 800 × 1333 pixels. Detached: the teacher's map, and with it both attention maps in fg and bg. The
student's attention has a gradient in `mask` only. R_s and R_t are trained, the teacher's too; their last layer starts
at zero.

Published settings: the defaults of a recipe for GFL and RetinaNet, others in docs/methods/fgd.md; with a student that
inherits the teacher's neck and head, and gradients clipped at a norm of 35. Equation and constants are confirmed
against the authors' code. Ours: certainty weighs locations in all terms, and an image's mean certainty weighs its
channel attention; the softmax of `ctx` has no bias, which it would not feel.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from compress.config.methods import Fgd
from compress.data.batch import Batch
from compress.detectors.base import Capability, pad_targets
from compress.distill.method import Adapter, BuildContext, Method, Outputs
from kernels.ops.attention_stats import attention_stats
from kernels.ops.attention_stats import reference as mean_magnitudes
from kernels.ops.feature_distance import feature_distance, feature_distance_and_means
from kernels.ops.feature_distance import reference as weighted_squares


class FGD(Method):
    """Focal and global distillation of pyramid maps.

    Args:
        student_channels, teacher_channels: widths of the two pyramids, the teacher's at least 2.
        levels: pyramid maps that take part, the finest first.
        weight: factor on all terms.
        adapter: 1×1 convolutions on the student's maps; auto: only where the widths differ.
        temperature: of both attention softmaxes.
        alpha, beta, gamma, relation: weights of fg, bg, mask and rela (lambda in the paper).
        box_norm: what boxes are divided by before they are drawn on a map. `img`: the size of the image, as published,
            which stretches the drawing in images smaller than the padded batch. `batch`: the size of the batch, so
            that boxes lie where the objects are; choose it where images differ much in shape.
        compiled: run the passes over the maps, but for those of `rela`, through torch.compile.
    """

    needs = frozenset({Capability.FEATURES})

    def __init__(
        self,
        student_channels: int,
        teacher_channels: int,
        *,
        levels: int,
        adapter: Literal["auto", "always"],
        temperature: float,
        alpha: float,
        beta: float,
        gamma: float,
        relation: float,
        box_norm: Literal["img", "batch"],
        weight: float = 1.0,
        compiled: bool = False,
    ) -> None:
        super().__init__()
        self.levels = levels
        self.weights = {
            "fgd_fg": weight * alpha,
            "fgd_bg": weight * beta,
            "fgd_mask": weight * gamma,
            "fgd_rela": weight * relation,
        }
        self.temperature = temperature
        self.box_norm = box_norm
        self.compiled = compiled
        self.adapter = Adapter(student_channels, teacher_channels, levels, always=adapter == "always")
        self.student_context = nn.ModuleList(ContextBlock(teacher_channels) for _ in range(levels))
        self.teacher_context = nn.ModuleList(ContextBlock(teacher_channels) for _ in range(levels))

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> dict[str, Tensor]:
        return {name: value.sum() for name, value in self.by_level(student, teacher, batch).items()}

    def by_level(self, student: Outputs, teacher: Outputs, batch: Batch) -> dict[str, Tensor]:
        """The four terms as [L] tensors."""
        student_maps = self.adapter(student.features[: self.levels])
        boxes, _, real = pad_targets(batch.targets, student_maps[0].device)
        if self.box_norm == "img":
            sizes = torch.tensor([target.size for target in batch.targets], device=boxes.device)
        else:
            sizes = torch.tensor([batch.images.shape[2:]], device=boxes.device)
        levels = []
        for level, (s, t) in enumerate(zip(student_maps, teacher.features[: self.levels], strict=True)):
            t = t.detach().float()
            certainty = None if teacher.certainty is None else teacher.certainty[level]
            with torch.no_grad():
                fg = foreground(boxes, real, sizes, (s.shape[2], s.shape[3]))
            terms = focal_terms(s, t, fg, background(fg), self.temperature, certainty, compiled=self.compiled)
            shift = self.student_context[level](s) - self.teacher_context[level](t)
            levels.append(torch.stack([*terms[:3], terms[3] + relation_rest(s, t, shift, certainty)]))
        table = torch.stack(levels, 1)  # [4, L]
        return {name: weight * row for (name, weight), row in zip(self.weights.items(), table, strict=True)}


def build(settings: Fgd, context: BuildContext) -> FGD:
    """The method of a recipe."""
    return FGD(*context.channels, **settings.constants(), weight=context.weight, compiled=context.compiled)


class ContextBlock(nn.Module):
    """Global context of a map, which is added to each of its locations: [B, C, h, w] → [B, C]; zero before training."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.mask = nn.Linear(channels, 1, bias=False)
        hidden = channels // 2
        last = nn.Linear(hidden, channels)
        self.add = nn.Sequential(nn.Linear(channels, hidden), nn.LayerNorm(hidden), nn.ReLU(), last)
        nn.init.kaiming_normal_(self.mask.weight)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)

    def forward(self, x: Tensor) -> Tensor:
        pixels = x.flatten(2)  # [B, C, M]
        share = (self.mask.weight @ pixels).softmax(2)  # [B, 1, M]
        result: Tensor = self.add((share @ pixels.transpose(1, 2))[:, 0])
        return result


# Arithmetic, in the dtype of its arguments; float32 takes the fused operators ---------------------------


def attention(x: Tensor, temperature: float, *, compiled: bool = False) -> tuple[Tensor, Tensor]:
    """Spatial attention [B, h, w] (mean 1 an image) and channel attention [B, C] (mean 1) of a map [B, C, h, w]."""
    means = attention_stats(x, compiled=compiled) if x.dtype == torch.float32 else mean_magnitudes(x)
    return attention_of(*means, temperature)


def attention_of(over_channels: Tensor, over_positions: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Compute both attentions, as `attention` does, from the means of |x|, [B, h, w] and [B, C]."""
    (B, h, w), C = over_channels.shape, over_positions.shape[1]
    spatial = (over_channels.flatten(1) / temperature).softmax(1).view(B, h, w) * (h * w)
    channel = (over_positions / temperature).softmax(1) * C
    return spatial, channel


def focal_terms(
    student: Tensor,
    teacher: Tensor,
    fg: Tensor,
    bg: Tensor,
    temperature: float,
    certainty: Tensor | None,
    *,
    compiled: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """fg, bg, mask and sum (S - T)^2 / B (what `rela` is before training): scalars.

    student, teacher: [B, C, h, w]. fg, bg: masks [B, h, w]. certainty: [B, h, w] or None.
    """
    B = student.shape[0]
    with torch.no_grad():
        spatial, channel = attention(teacher, temperature, compiled=compiled)
        ones = torch.ones_like(spatial)
        everywhere = ones if certainty is None else certainty.to(ones.dtype)
        focal = torch.stack((fg * spatial, bg * spatial)) * everywhere  # [2, B, h, w]
    ones = torch.ones_like(channel)
    if student.dtype == torch.float32:
        focal_sums, *student_means = feature_distance_and_means(student, teacher, focal, channel, compiled=compiled)
        plain = feature_distance(student, teacher, everywhere, ones, compiled=compiled)
    else:
        focal_sums, *student_means = weighted_squares(student, teacher, focal, channel), *mean_magnitudes(student)
        plain = weighted_squares(student, teacher, everywhere, ones)
    fg_term, bg_term = focal_sums.unbind()
    student_spatial, student_channel = attention_of(student_means[0], student_means[1], temperature)
    channel_term = (student_channel - channel).abs().sum(1) @ everywhere.mean((1, 2))
    mask_term = channel_term + ((student_spatial - spatial).abs() * everywhere).sum()
    return fg_term / B, bg_term / B, mask_term / B, plain / B


def relation_rest(student: Tensor, teacher: Tensor, shift: Tensor, certainty: Tensor | None) -> Tensor:
    """Part of `rela` that the contexts' difference `shift` [B, C] adds to sum (S - T)^2 / B: the scalar

        (sum (S - T + shift)^2 - sum (S - T)^2) / B = sum shift * (2 * sum_hw (S - T) + hw * shift) / B

    In this form the maps are only summed, and no third one of their size arises.
    """
    B, _, h, w = student.shape
    if certainty is None:
        difference, mass = student.sum((2, 3)) - teacher.sum((2, 3)), float(h * w)
        return (shift * (2 * difference + mass * shift)).sum() / B
    weights = certainty.to(student.dtype).flatten(1)[:, None]  # [B, 1, M]
    difference = (weights @ student.flatten(2).transpose(1, 2) - weights @ teacher.flatten(2).transpose(1, 2))[:, 0]
    return (shift * (2 * difference + weights.sum(2) * shift)).sum() / B


def foreground(boxes: Tensor, real: Tensor, sizes: Tensor, grid: tuple[int, int]) -> Tensor:
    """M_fg [B, h, w] of a level.

    boxes: [B, G, 4] xyxy in pixels. real: bool [B, G]; the others are not drawn. sizes: (height, width) [B, 2] or
    [1, 2] in pixels, what boxes are divided by. grid: (h, w). A box covers the columns floor(x1) to ceil(x2) and the
    rows floor(y1) to ceil(y2) of the map, both ends included; they are counted before the map's edge cuts them.
    (The authors round one step more, which can move a side that lies exactly between two cells to the next.)
    """
    h, w = grid
    if boxes.shape[1] == 0:
        return boxes.new_zeros(boxes.shape[0], h, w)
    height, width = sizes[:, :1], sizes[:, 1:]
    x1, y1, x2, y2 = boxes.unbind(2)  # each [B, G]
    left, right = (x1 * w / width).floor(), (x2 * w / width).ceil()
    top, bottom = (y1 * h / height).floor(), (y2 * h / height).ceil()
    value = real / ((right - left + 1) * (bottom - top + 1))
    column = torch.arange(w, device=boxes.device)
    row = torch.arange(h, device=boxes.device)
    inside_x = (column >= left[..., None]) & (column <= right[..., None])  # [B, G, w]
    inside_y = (row >= top[..., None]) & (row <= bottom[..., None])  # [B, G, h]
    return ((inside_y * value[..., None])[..., None] * inside_x[:, :, None]).amax(1)


def background(fg: Tensor) -> Tensor:
    """M_bg [B, h, w]: equal shares of 1 for the locations in no box; zeros where boxes cover the whole map."""
    outside = (fg == 0).to(fg.dtype)
    return outside / outside.sum((1, 2), keepdim=True).clamp(min=1)
