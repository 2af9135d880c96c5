"""Real-time DETRs that are small enough for tests, and what the library makes of the same weights."""

from __future__ import annotations

from typing import Any

import torch

from compress.data.batch import Batch, Target
from compress.detectors.base import Capability, freeze
from compress.detectors.transformers.real_time_detr import DFine, RealTimeDetr, RTDetrV2
from compress.distill.method import Outputs
from compress.distill.teacher_outputs import run_teacher

CLASSES = 5
SIZE = (96, 128)
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
OPTIONS: dict[type[RealTimeDetr], dict[str, Any]] = {
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
}


def tiny(kind: type[RealTimeDetr], **options: Any) -> RealTimeDetr:
    """One with random weights, the same at each call."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return kind.build(CLASSES, size=None, options={**OPTIONS[kind], **options}, init=None)


def library_model(detector: RealTimeDetr) -> Any:
    """The library's whole model around the same network."""
    import transformers

    model = getattr(transformers, detector.library)(detector.network.config)
    model.model = detector.network
    model.class_embed, model.bbox_embed = detector.network.decoder.class_embed, detector.network.decoder.bbox_embed
    return model.train(detector.training)


def batch(*, empty: bool = True) -> Batch:
    """Three images of random pixels: with three objects, with one and a crowd, and with none."""
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, (3, 3, *SIZE), dtype=torch.uint8, generator=generator)
    boxes = torch.tensor([[8.0, 16, 56, 72], [72, 24, 120, 64], [30, 40, 44, 60]])
    targets = []
    for index, count in enumerate((3, 2, 0 if empty else 1)):
        ignore = torch.zeros(count, dtype=torch.bool)
        if index == 1:
            ignore[1] = True
        labels = torch.tensor([0, 2, 4])[:count]
        targets.append(Target(boxes[:count].clone(), labels, ignore, None, index, SIZE, SIZE))
    return Batch(images, targets)


def outputs(student: RealTimeDetr, teacher: RealTimeDetr, pictures: Batch) -> tuple[Outputs, Outputs]:
    """What a method gets of both; the student's with gradient."""
    features = student.features(pictures.images)
    prediction = student.predict_in_training(features, pictures.targets)
    targets = student.assign(prediction, pictures.targets)
    taught = run_teacher(teacher, pictures.images, frozenset({Capability.DENSE}))
    return Outputs(features, prediction, student, targets), taught


def other(kind: type[RealTimeDetr], **options: Any) -> RealTimeDetr:
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
