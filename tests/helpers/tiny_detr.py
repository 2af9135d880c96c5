"""Detectors of transformers that are small enough for tests, and what the library makes of the same weights."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from compress.data.batch import Batch, Target
from compress.detectors.base import Capability, freeze
from compress.detectors.transformers.load import fresh
from compress.detectors.transformers.lw_detr import LwDetr, RfDetr
from compress.detectors.transformers.query_detector import QueryDetector
from compress.detectors.transformers.real_time_detr import DFine, RTDetrV2
from compress.distill.method import Outputs
from compress.distill.teacher_outputs import run_teacher

CLASSES = 5
SIZE = (96, 128)
SQUARE = (128, 128)  # of others the library mixes the locations of RF-DETR's windows
COMMON: dict[str, Any] = {
    "encoder_hidden_dim": 32,
    "encoder_ffn_dim": 64,
    "encoder_attention_heads": 4,
    "d_model": 32,
    "decoder_in_channels": [32, 32, 32],
    "decoder_ffn_dim": 64,
    "decoder_attention_heads": 4,
    "decoder_layers": 3,
    "num_queries": 30,
    "num_denoising": 10,
}
GROUPS: dict[str, Any] = {
    "d_model": 32,
    "c2f_num_blocks": 1,
    "decoder_layers": 3,
    "decoder_ffn_dim": 64,
    "decoder_self_attention_heads": 4,
    "decoder_cross_attention_heads": 4,
    "decoder_n_points": 2,
    "num_queries": 20,
    "group_detr": 3,
    "dropout": 0.1,
}
VIT: dict[str, Any] = {"hidden_size": 32, "num_attention_heads": 2, "num_hidden_layers": 4, "out_indices": [1, 3]}
OPTIONS: dict[type[QueryDetector], dict[str, Any]] = {
    DFine: {
        **COMMON,
        "backbone_config": {
            "model_type": "hgnet_v2",
            "stem_channels": [3, 8, 8],
            "hidden_sizes": [16, 32, 64, 96],
            "stage_in_channels": [8, 16, 32, 64],
            "stage_mid_channels": [8, 8, 16, 16],
            "stage_out_channels": [16, 32, 64, 96],
            "stage_num_blocks": [1, 1, 1, 1],
            "stage_numb_of_layers": [1, 1, 1, 1],
            "out_indices": [2, 3, 4],
        },
        "encoder_in_channels": [32, 64, 96],
        "decoder_n_points": [2, 3, 2],
        "hidden_expansion": 0.5,
        "depth_mult": 0.34,
    },
    RTDetrV2: {
        **COMMON,
        "backbone_config": {
            "model_type": "rt_detr_resnet",
            "embedding_size": 8,
            "hidden_sizes": [8, 16, 32, 64],
            "depths": [1, 1, 1, 1],
            "layer_type": "basic",
            "out_features": ["stage2", "stage3", "stage4"],
        },
        "encoder_in_channels": [16, 32, 64],
        "hidden_expansion": 0.5,
    },
    RfDetr: {
        **GROUPS,
        "backbone_config": {
            **VIT,
            "model_type": "rf_detr_dinov2",
            "patch_size": 16,
            "image_size": 64,
            "num_windows": 2,
        },
    },
    LwDetr: {
        **GROUPS,
        "backbone_config": {
            **VIT,
            "model_type": "lw_detr_vit",
            "image_size": 128,
            "pretrain_image_size": 64,
            "num_windows": 4,
            "window_block_indices": [1],
        },
        "projector_scale_factors": [2.0, 0.5],
    },
}


def tiny(kind: type[QueryDetector], **options: Any) -> QueryDetector:
    """One with random weights, the same at each call."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return kind.build(CLASSES, size=None, options={**OPTIONS[kind], **options}, init=None)


def with_statistics(kind: type[QueryDetector], images: np.ndarray, **options: Any) -> QueryDetector:
    """One with random weights, the BatchNorm statistics of `images` and scores that spread: where all places score
    alike, rounding chooses others."""
    detector = tiny(kind, **options).train()
    for module in detector.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = None  # so that one pass is enough
    with torch.no_grad():
        detector(torch.from_numpy(images))
        if isinstance(detector, LwDetr):
            heads = [detector.network.model.enc_out_class_embed[0], detector.network.class_embed]
        else:
            heads = [detector.network.enc_score_head]
        for head in heads:
            head.weight.mul_(10)
    return detector.eval()


def pictures() -> np.ndarray:
    """Smooth pictures with contrast, uint8 [4, 3, H, W]."""
    rng = np.random.default_rng(0)
    coarse = torch.from_numpy(rng.uniform(0, 255, (4, 3, 6, 8)).astype(np.float32))
    return torch.nn.functional.interpolate(coarse, SIZE, mode="bicubic").clamp(0, 255).byte().numpy()


def library_model(detector: QueryDetector) -> Any:
    """The library's whole model around the same network."""
    import transformers

    if isinstance(detector, LwDetr):
        return detector.network
    model = getattr(transformers, detector.library)(detector.network.config)
    model.model = detector.network
    model.class_embed, model.bbox_embed = detector.network.decoder.class_embed, detector.network.decoder.bbox_embed
    return model.train(detector.training)


def size_for(kind: type[QueryDetector]) -> tuple[int, int]:
    """A size of images on which the library computes what it should."""
    return SQUARE if kind is RfDetr else SIZE


def batch(*, empty: bool = True, size: tuple[int, int] = SIZE) -> Batch:
    """Three images of random pixels: with three objects, with one and a crowd, and with none."""
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, (3, 3, *size), dtype=torch.uint8, generator=generator)
    boxes = torch.tensor([[8.0, 16, 56, 72], [72, 24, 120, 64], [30, 40, 44, 60]])
    targets = []
    for index, count in enumerate((3, 2, 0 if empty else 1)):
        ignore = torch.zeros(count, dtype=torch.bool)
        if index == 1:
            ignore[1] = True
        labels = torch.tensor([0, 2, 4])[:count]
        targets.append(Target(boxes[:count].clone(), labels, ignore, None, index, size, size))
    return Batch(images, targets)


def outputs(student: QueryDetector, teacher: QueryDetector, pictures: Batch) -> tuple[Outputs, Outputs]:
    """What a method gets of both; the student's with gradient."""
    features = student.features(pictures.images)
    prediction = student.predict_in_training(features, pictures.targets)
    targets = student.assign(prediction, pictures.targets)
    taught = run_teacher(teacher, pictures.images, frozenset({Capability.DENSE}))
    return Outputs(features, prediction, student, targets), taught


def other(kind: type[QueryDetector], **options: Any) -> QueryDetector:
    """A frozen teacher with other weights than `tiny`, and classes that it is sure of."""
    teacher = tiny(kind, **options)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in teacher.named_parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator)
                parameter += noise * (0.3 if "_embed" in name else 0.03)
    freeze(teacher)
    return teacher


class StillDFine(DFine):
    """A D-FINE with which two processes compute what one does, as a user's own detector: its BatchNorm runs on its
    statistics, no noisy copies of labels are drawn, and the term whose normaliser is that of a process has weight 0."""

    def __init__(self, num_classes: int) -> None:
        options = {**OPTIONS[DFine], "num_denoising": 0, "weight_loss_ddf": 0.0}
        super().__init__(num_classes, fresh(self.library, num_classes, options))
        self.options = {}  # arguments of this constructor

    def train(self, mode: bool = True) -> StillDFine:
        super().train(mode)
        keep_statistics(self)
        return self


class StillRfDetr(RfDetr):
    """An RF-DETR with which two processes compute what one does: nothing is dropped, BatchNorm keeps its statistics."""

    def __init__(self, num_classes: int) -> None:
        super().__init__(num_classes, fresh(self.library, num_classes, {**OPTIONS[RfDetr], "dropout": 0.0}))
        self.options = {}  # arguments of this constructor

    def train(self, mode: bool = True) -> StillRfDetr:
        super().train(mode)
        keep_statistics(self)
        return self


def keep_statistics(network: torch.nn.Module) -> None:
    """BatchNorm normalises by its statistics, and takes up none."""
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.eval()
