"""CrossKD: cross-head knowledge distillation (Wang et al., CVPR 2024).

The student's head features, taken from a late layer of each tower after convolution and norm and before the ReLU, are
scaled like the teacher's and go through the rest of the teacher's head. These cross-head predictions z_x, d_x imitate
the teacher's z_t, d_t; the student's own predictions see the ground truth alone.

    align(s) = (s - mean s) / (std s + 1e-6) * std t + mean t
    L_cls = sum_i v_i * sum_c BCE(z_x, sigmoid(z_t)) * |sigmoid(z_x) - sigmoid(z_t)| / A
    L_reg = sum_i r_i * sum_{4 sides} sum_{17 bins} p_t (log p_t - log p_x) / 4 / R,   p = softmax(d)
    L_giou = sum_i r_i * (1 - GIoU(box of d_x, box of d_t)) / R
    v_i = 1 for valid locations;  r_i = v_i * max_c sigmoid(z_t[i, c]);  R = sum of r over all levels

Means and standard deviations (n - 1) of `align` are per level and channel, over images and locations. The sums run
over all levels. A is the number of positives of the batch (mean over processes); R is of this process alone, as
published. L_cls is BCKD's classification term on other logits, without its gate on levels without positives. The
KL divergence sums over the bins at T = 1 (LD: mean at T = 10).
Detached: the teacher's predictions, its statistics in `align`, r, and the teacher's weights; gradient runs through
its layers to the student's features, and through the student's statistics. The factor |.| of L_cls is not detached.
Published settings for GFL: after 3 of 4 layers, L_cls 1, L_reg 4, no L_giou. A later configuration of the authors has
L_reg 3 and L_giou 2. Formulas confirmed against the authors' code; implemented from the formulas alone.
Ours: heads of other depths; a level with a single element a channel (std 0 instead of undefined).

The student's maps are caught by forward hooks while it trains, as it computes them anyway. The teacher's statistics
are computed from its pyramid maps, by running the first layers of its towers again without gradient.
"""

from __future__ import annotations

import weakref
from collections import deque
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from compress.config.methods import Crosskd
from compress.data.batch import Batch
from compress.detectors.base import Capability, DensePrediction, decode_level
from compress.detectors.gfl import GFL, ConvNorm
from compress.distill.method import BOTH, BuildContext, Method, Outputs
from deploy.core.errors import UserError
from kernels.ops.binary_kd_loss import binary_kd_loss
from kernels.ops.iou_loss import giou_loss

EPS = 1e-6  # of the student's standard deviation


class CrossKD(Method):
    """Distillation through the teacher's head.

    Holds neither model; hooks on `student` remain until the method is gone. A deep copy of the student does not feed
    the method.

    Args:
        student: the model that will train; where its features cross, its towers must be as wide as the teacher's.
        teacher: read for the shape of its head only; forward uses `Outputs.detector`.
        weight: factor on all terms.
        cls_weight, reg_weight, giou_weight: of the terms; a term of weight 0 is left out.
        split: layers of the student's towers before the crossing; None: all but the last, at least one.
        teacher_split: layers of the teacher's towers that are skipped; None: all but the last, at least one.
        compiled: run the dense classification pass through torch.compile.

    Raises:
        UserError: heads of different classes or number of levels, a head without layers, a split that the towers do
            not have, or towers of different width there.
    """

    needs = frozenset({Capability.DENSE, Capability.DISTRIBUTIONS})

    def __init__(
        self,
        student: GFL,
        teacher: GFL,
        *,
        cls_weight: float,
        reg_weight: float,
        giou_weight: float,
        weight: float = 1.0,
        split: int | None = None,
        teacher_split: int | None = None,
        compiled: bool = False,
    ) -> None:
        super().__init__()
        split = _split("split", "student", student, split)
        self.teacher_split = _split("teacher_split", "teacher", teacher, teacher_split)
        _check_heads(student, teacher, split, self.teacher_split)
        self.weights = {
            "crosskd_cls": weight * cls_weight,
            "crosskd_reg": weight * reg_weight,
            "crosskd_giou": weight * giou_weight,
        }
        self.terms = [
            name for name, value in zip(self.weights, (cls_weight, reg_weight, giou_weight), strict=True) if value != 0
        ]
        self.compiled = compiled
        self._taps = []
        for tower in (student.head.cls_convs, student.head.reg_convs):
            layer = tower[split - 1]
            assert isinstance(layer, ConvNorm)
            tap = _Tap(len(student.head.scales))
            weakref.finalize(self, layer.norm.register_forward_hook(tap).remove)
            self._taps.append(tap)

    @property
    def looks_at(self) -> frozenset[Capability]:
        return BOTH  # the statistics of the teacher's towers come from its maps

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> dict[str, Tensor]:
        return {name: value.sum() for name, value in self.by_level(student, teacher).items()}

    def by_level(self, student: Outputs, teacher: Outputs) -> dict[str, Tensor]:
        """The terms as [L] tensors: `crosskd_cls`, `crosskd_reg` and `crosskd_giou`."""
        assert student.targets is not None, "the student's targets carry the normaliser"
        cls_maps, reg_maps = (tap.take() for tap in self._taps)
        if [x.shape[2:] for x in cls_maps] != [x.shape[2:] for x in student.prediction.logits]:
            raise RuntimeError(
                "CrossKD has no head features of the student for this batch: the student's head must run once, in "
                "training mode and with gradients enabled, before each call"
            )
        crossed = cross_head(cls_maps, reg_maps, teacher, self.teacher_split)
        losses = imitation(
            crossed,
            teacher.prediction.float().detach(),
            student.targets.assignment.valid,
            student.targets.avg_factor,
            teacher.certainty,
            terms=self.terms,
            compiled=self.compiled,
        )
        return {name: self.weights[name] * value for name, value in losses.items()}


def build(settings: Crosskd, context: BuildContext) -> CrossKD:
    """The method of a recipe."""
    models = cast(GFL, context.student), cast(GFL, context.teacher)
    return CrossKD(*models, **settings.constants(), weight=context.weight, compiled=context.compiled)


def cross_head(cls_maps: list[Tensor], reg_maps: list[Tensor], teacher: Outputs, split: int) -> DensePrediction:
    """Predictions of the teacher's head, from layer `split` on, for the student's maps [B, C, h, w] of each tower."""
    head = cast(GFL, teacher.detector).head
    logits, distribution = [], []
    for level, scale in enumerate(head.scales):
        features = teacher.features[level].float()
        classes = _rest(head.cls_convs, cls_maps[level].float(), features, split, level)
        sides = _rest(head.reg_convs, reg_maps[level].float(), features, split, level)
        logits.append(_frozen(head.gfl_cls, classes))
        distribution.append(_frozen(scale, _frozen(head.gfl_reg, sides)))
    return DensePrediction(logits, distribution, teacher.prediction.strides)


def align_scale(student: Tensor, teacher: Tensor) -> Tensor:
    """Give the student's map [B, C, h, w] the teacher's mean and standard deviation per channel; same dtype."""
    mean, std = _statistics(student)
    with torch.no_grad():
        wanted_mean, wanted_std = _statistics(teacher)
    return (student - mean) / (std + EPS) * wanted_std + wanted_mean


def imitation(
    crossed: DensePrediction,
    teacher: DensePrediction,
    valid: Tensor,
    avg_factor: Tensor,
    certainty: list[Tensor] | None,
    *,
    terms: list[str],
    compiled: bool = False,
) -> dict[str, Tensor]:
    """The unweighted losses `terms` as [L] tensors.

    Args:
        crossed: cross-head predictions; teacher: without gradient. Both float32.
        valid: bool [B, A]; avg_factor: scalar A.
        certainty: of the teacher, see `Outputs`. It multiplies the sums, not R.
    """
    confidence = []  # r, [B, M] a level
    sums: dict[str, list[Tensor]] = {name: [] for name in terms}
    for level, v in enumerate(valid.split([h * w for h, w in teacher.level_sizes], 1)):
        z_x, z_t = crossed.logits[level].flatten(2), teacher.logits[level].flatten(2)  # [B, K, M]
        d_x, d_t = crossed.distribution[level], teacher.distribution[level]
        r = z_t.amax(1).sigmoid() * v
        confidence.append(r)
        weight = v.to(r.dtype)
        if certainty is not None:
            c = certainty[level].flatten(1)
            r, weight = r * c, weight * c
        if "crosskd_cls" in sums:
            sums["crosskd_cls"].append(binary_kd_loss(z_x, z_t, weight, compiled=compiled)[0])
        if "crosskd_reg" in sums:
            sums["crosskd_reg"].append((side_divergence(d_x, d_t) * r).sum() / 4)
        if "crosskd_giou" in sums:
            sums["crosskd_giou"].append((giou_loss(decode_level(d_x), decode_level(d_t)) * r).sum())
    total = torch.stack([r.sum() for r in confidence]).sum()
    divisors = {"crosskd_cls": avg_factor + torch.finfo(torch.float32).eps, "crosskd_reg": total, "crosskd_giou": total}
    return {name: torch.stack(values) / divisors[name] for name, values in sums.items()}


def side_divergence(student: Tensor, teacher: Tensor) -> Tensor:
    """KL of the teacher from the student, summed over bins and sides: [B, 4 * R, h, w] logits → [B, M]."""
    B, channels, h, w = student.shape
    log_x, log_t = (x.reshape(B, 4, channels // 4, h * w).log_softmax(2) for x in (student, teacher))
    return F.kl_div(log_x, log_t, reduction="none", log_target=True).sum((1, 2))


def _rest(tower: nn.ModuleList, student: Tensor, teacher_features: Tensor, split: int, level: int) -> Tensor:
    """Align the student's map with the teacher's of layer `split`, then run the teacher's later layers on it."""
    with torch.no_grad():
        teacher_map = teacher_features
        for layer in tower[: split - 1]:
            teacher_map = layer(teacher_map, level)
        last = tower[split - 1]
        assert isinstance(last, ConvNorm)
        teacher_map = last.normalised(teacher_map, level)
    x = F.relu(align_scale(student, teacher_map))
    for layer in tower[split:]:
        x = _frozen(layer, x, level)
    return x


def _frozen(layer: nn.Module, *inputs: Tensor | int) -> Tensor:
    """Run a layer whose parameters get no gradient."""
    parameters = {name: value.detach() for name, value in layer.named_parameters()}
    result: Tensor = torch.func.functional_call(layer, parameters, inputs)
    return result


def _statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation [1, C, 1, 1] of [B, C, h, w]."""
    elements = x.numel() // x.shape[1]
    std, mean = torch.std_mean(x, (0, 2, 3), correction=1 if elements > 1 else 0, keepdim=True)
    return mean, std


def _check_heads(student: GFL, teacher: GFL, split: int, teacher_split: int) -> None:
    """Refuse models of which one's features, after layer `split` of each tower, do not fit the other's head."""
    advice = "give the student the teacher's neck_channels"
    if any(model.model is not None and model.model.widths for model in (student, teacher)):
        advice = "prune with keep: [head]"
    towers = ("cls_convs", "reg_convs")
    for what, ours, theirs, advice in (
        ("classes", student.num_classes, teacher.num_classes, "train both on the same classes"),
        ("levels", len(student.head.scales), len(teacher.head.scales), "use models with the same pyramid"),
        *(
            ("channels", _channels(student, tower, split), _channels(teacher, tower, teacher_split), advice)
            for tower in towers
        ),
    ):
        if ours != theirs:
            raise UserError(
                f"methods.crosskd: the student's head has {ours} {what}, the teacher's has {theirs}, and the student's "
                f"features must go through the teacher's head; {advice}"
            )


def _channels(model: GFL, tower: str, split: int) -> int:
    """Channels of a tower after layer `split`."""
    layer = getattr(model.head, tower)[split - 1]
    assert isinstance(layer, ConvNorm)
    return layer.conv.out_channels


def _split(option: str, who: str, model: GFL, split: int | None) -> int:
    depth = len(model.head.cls_convs)
    if depth == 0:
        raise UserError(f"methods.crosskd: the {who}'s head has no convolutions; set its head_depth to 1 or more")
    if split is None:
        return max(1, depth - 1)
    if not 1 <= split <= depth:
        raise UserError(f"methods.crosskd: {option} {split} is not a layer of the {who}'s head of depth {depth}")
    return split


class _Tap:
    """Forward hook that keeps what a layer shared by all levels gave in the last training pass, one map a level.

    A copy keeps nothing: the moving average of a student must not feed the student's method.
    """

    def __init__(self, levels: int) -> None:
        self._maps: deque[Tensor] = deque(maxlen=levels)

    def __call__(self, layer: nn.Module, args: Any, output: Tensor) -> None:
        if layer.training and torch.is_grad_enabled():
            self._maps.append(output)

    def take(self) -> list[Tensor]:
        """The maps in the order of the levels; they are forgotten."""
        maps = list(self._maps)
        self._maps.clear()
        return maps

    def __reduce__(self) -> tuple[type[_Tap], tuple[int]]:
        return _Tap, (0,)  # also what deepcopy asks for
