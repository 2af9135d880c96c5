"""Losses and dropout of detector distillation as functions of tensors: PyTorch, Triton and CUDA C++ behind one call.

`ops` holds the operators, one a file: formula, public function, the slow `reference` that specifies it, registration.
`triton` and `csrc` hold what runs on GPUs (`ops/cuda.py` calls the latter), `common` what the operators share. Needs
torch alone.
"""

from kernels.common.backend import set_backend, use
from kernels.common.dropout import Dropout
from kernels.ops.attention_stats import attention_stats
from kernels.ops.binary_kd_loss import binary_kd_loss
from kernels.ops.distribution_iou_loss import distribution_iou_kd_loss, distribution_iou_loss
from kernels.ops.feature_distance import feature_distance, feature_distance_and_means
from kernels.ops.iou_loss import giou_loss, iou_loss, iou_loss_rows, paired_iou
from kernels.ops.mc_dropout import mc_dropout
from kernels.ops.quality_focal_loss import quality_focal_loss

__all__ = [
    "Dropout",
    "attention_stats",
    "binary_kd_loss",
    "distribution_iou_kd_loss",
    "distribution_iou_loss",
    "feature_distance",
    "feature_distance_and_means",
    "giou_loss",
    "iou_loss",
    "iou_loss_rows",
    "mc_dropout",
    "paired_iou",
    "quality_focal_loss",
    "set_backend",
    "use",
]
