"""mmdet configurations as a user would write them, small where their size does not matter, with random weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from mmdet.registry import MODELS
from mmengine.config import Config
from mmengine.registry import init_default_scope
from torch import nn

RGB = {"mean": [123.675, 116.28, 103.53], "std": [58.395, 57.12, 57.375], "bgr_to_rgb": True, "pad_size_divisor": 32}
BGR = {"mean": [103.53, 116.28, 123.675], "std": [57.375, 57.12, 58.395], "bgr_to_rgb": False, "pad_size_divisor": 32}
STRIDES = [8, 16, 32, 64, 128]
ONE_ANCHOR = {"ratios": [1.0], "octave_base_scale": 8, "scales_per_octave": 1, "strides": STRIDES}
SELECTION = {"nms_pre": 1000, "min_bbox_size": 0, "score_thr": 0.05, "max_per_img": 100}


def config(name: str, *, classes: int = 3, depth: int = 18, width: int = 64, convs: int = 1) -> Config:
    """The configuration of detector `name`: gfl, ld, atss, retinanet, fcos or faster_rcnn."""
    names = [f"class{i}" for i in range(classes)]
    dataset = {
        "type": "CocoDataset",
        "metainfo": {"classes": tuple(names)},
        "ann_file": "instances.json",
        "data_prefix": {"img": "images/"},
        "pipeline": [],
        "test_mode": True,
    }
    return Config(
        {
            "default_scope": "mmdet",
            "model": {**_trunk(name, depth, width), **_head(name, classes, width, convs)},
            "test_dataloader": {"batch_size": 1, "num_workers": 0, "dataset": dataset},
        }
    )


def _trunk(name: str, depth: int, width: int) -> dict[str, Any]:
    channels = [64, 128, 256, 512] if depth < 50 else [256, 512, 1024, 2048]
    neck: dict[str, Any] = {"type": "FPN", "in_channels": channels, "out_channels": width, "num_outs": 5}
    if name != "faster_rcnn":
        neck |= {"start_level": 1, "add_extra_convs": "on_input" if name == "retinanet" else "on_output"}
    if name == "fcos":
        neck["relu_before_extra_convs"] = True
    return {
        "data_preprocessor": {"type": "DetDataPreprocessor", **(BGR if name == "fcos" else RGB)},
        "backbone": {
            "type": "ResNet",
            "depth": depth,
            "num_stages": 4,
            "out_indices": (0, 1, 2, 3),
            "frozen_stages": 1,
            "norm_cfg": {"type": "BN", "requires_grad": True},
            "norm_eval": True,
            "style": "pytorch",
        },
        "neck": neck,
    }


def _head(name: str, classes: int, width: int, convs: int) -> dict[str, Any]:
    common = {"num_classes": classes, "in_channels": width, "feat_channels": width, "stacked_convs": convs}
    focal = {"type": "FocalLoss", "use_sigmoid": True, "gamma": 2.0, "alpha": 0.25, "loss_weight": 1.0}
    atss = {"assigner": {"type": "ATSSAssigner", "topk": 9}, "allowed_border": -1, "pos_weight": -1, "debug": False}
    gfl = {
        "anchor_generator": {"type": "AnchorGenerator", **ONE_ANCHOR},
        "loss_cls": {"type": "QualityFocalLoss", "use_sigmoid": True, "beta": 2.0, "loss_weight": 1.0},
        "loss_dfl": {"type": "DistributionFocalLoss", "loss_weight": 0.25},
        "loss_bbox": {"type": "GIoULoss", "loss_weight": 2.0},
        "reg_max": 16,
    }
    match name:
        case "gfl":
            return {
                "type": "GFL",
                "bbox_head": {"type": "GFLHead", **common, **gfl},
                "train_cfg": atss,
                "test_cfg": {**SELECTION, "nms": {"type": "nms", "iou_threshold": 0.6}},
            }
        case "ld":  # as in mmdet's own: names a teacher that a user of the student need not have
            ld = {"type": "KnowledgeDistillationKLDivLoss", "loss_weight": 0.25, "T": 10}
            return {
                "type": "KnowledgeDistillationSingleStageDetector",
                "teacher_config": "configs/gfl/gfl_r101_fpn_ms-2x_coco.py",
                "teacher_ckpt": "absent.pth",
                "bbox_head": {"type": "LDHead", **common, **gfl, "loss_ld": ld},
                "train_cfg": atss,
                "test_cfg": {**SELECTION, "nms": {"type": "nms", "iou_threshold": 0.6}},
            }
        case "atss":
            coder = {"type": "DeltaXYWHBBoxCoder", "target_means": [0.0] * 4, "target_stds": [0.1, 0.1, 0.2, 0.2]}
            return {
                "type": "ATSS",
                "bbox_head": {
                    "type": "ATSSHead",
                    **common,
                    "anchor_generator": {"type": "AnchorGenerator", **ONE_ANCHOR},
                    "bbox_coder": coder,
                    "loss_cls": focal,
                    "loss_bbox": {"type": "GIoULoss", "loss_weight": 2.0},
                    "loss_centerness": {"type": "CrossEntropyLoss", "use_sigmoid": True, "loss_weight": 1.0},
                },
                "train_cfg": atss,
                "test_cfg": {**SELECTION, "nms": {"type": "nms", "iou_threshold": 0.6}},
            }
        case "retinanet":
            return {
                "type": "RetinaNet",
                "bbox_head": {
                    "type": "RetinaHead",
                    **common,
                    "anchor_generator": {
                        "type": "AnchorGenerator",
                        "octave_base_scale": 4,
                        "scales_per_octave": 3,
                        "ratios": [0.5, 1.0, 2.0],
                        "strides": STRIDES,
                    },
                    "bbox_coder": {"type": "DeltaXYWHBBoxCoder"},
                    "loss_cls": focal,
                    "loss_bbox": {"type": "L1Loss", "loss_weight": 1.0},
                },
                "test_cfg": {**SELECTION, "nms": {"type": "nms", "iou_threshold": 0.5}},
            }
        case "fcos":
            return {
                "type": "FCOS",
                "bbox_head": {
                    "type": "FCOSHead",
                    **common,
                    "strides": STRIDES,
                    "loss_cls": focal,
                    "loss_bbox": {"type": "IoULoss", "loss_weight": 1.0},
                    "loss_centerness": {"type": "CrossEntropyLoss", "use_sigmoid": True, "loss_weight": 1.0},
                },
                "test_cfg": {**SELECTION, "nms": {"type": "nms", "iou_threshold": 0.5}},
            }
        case "faster_rcnn":
            return _two_stages(classes, width)
    raise AssertionError(name)


def _two_stages(classes: int, width: int) -> dict[str, Any]:
    coder = {"type": "DeltaXYWHBBoxCoder", "target_means": [0.0] * 4}
    cross_entropy, l1 = {"type": "CrossEntropyLoss", "loss_weight": 1.0}, {"type": "L1Loss", "loss_weight": 1.0}
    return {
        "type": "FasterRCNN",
        "train_cfg": None,
        "rpn_head": {
            "type": "RPNHead",
            "in_channels": width,
            "feat_channels": width,
            "anchor_generator": {
                "type": "AnchorGenerator",
                "scales": [8],
                "ratios": [0.5, 1.0, 2.0],
                "strides": [4, 8, 16, 32, 64],
            },
            "bbox_coder": {**coder, "target_stds": [1.0] * 4},
            "loss_cls": {**cross_entropy, "use_sigmoid": True},
            "loss_bbox": l1,
        },
        "roi_head": {
            "type": "StandardRoIHead",
            "bbox_roi_extractor": {
                "type": "SingleRoIExtractor",
                "roi_layer": {"type": "RoIAlign", "output_size": 7, "sampling_ratio": 0},
                "out_channels": width,
                "featmap_strides": [4, 8, 16, 32],
            },
            "bbox_head": {
                "type": "Shared2FCBBoxHead",
                "in_channels": width,
                "fc_out_channels": 64,
                "roi_feat_size": 7,
                "num_classes": classes,
                "bbox_coder": {**coder, "target_stds": [0.1, 0.1, 0.2, 0.2]},
                "reg_class_agnostic": False,
                "loss_cls": {**cross_entropy, "use_sigmoid": False},
                "loss_bbox": l1,
            },
        },
        "test_cfg": {
            "rpn": {
                "nms_pre": 100,
                "max_per_img": 50,
                "nms": {"type": "nms", "iou_threshold": 0.7},
                "min_bbox_size": 0,
            },
            "rcnn": {"score_thr": 0.05, "nms": {"type": "nms", "iou_threshold": 0.5}, "max_per_img": 100},
        },
    }


def build(settings: Config, seed: int = 0) -> nn.Module:
    """The model in eval mode. Its random weights make activations of ordinary size and detections of all scores."""
    init_default_scope("mmdet")
    torch.manual_seed(seed)
    model_settings = settings.copy().model
    if model_settings.type == "KnowledgeDistillationSingleStageDetector":
        for key in ("teacher_config", "teacher_ckpt"):
            model_settings.pop(key)
        model_settings.type = "SingleStageDetector"
    model: nn.Module = MODELS.build(model_settings)
    randomize(model)
    return model.eval()


@torch.no_grad()
def randomize(model: nn.Module) -> None:
    """Convolutions that keep the variance, norms that are not the identity, class biases around a score of 0.2."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            if module.bias is not None:
                module.bias.uniform_(-0.1, 0.1)
        elif isinstance(module, nn.Linear):
            nn.init.xavier_normal_(module.weight, gain=0.3)
        elif isinstance(module, nn.BatchNorm2d):
            module.weight.uniform_(0.4, 0.8)
            module.bias.uniform_(-0.2, 0.2)
            module.running_mean.uniform_(-0.2, 0.2)
            module.running_var.uniform_(0.8, 1.5)
        elif isinstance(module, nn.GroupNorm):
            module.weight.uniform_(0.5, 1.2)
            module.bias.uniform_(-0.2, 0.2)
        if name.endswith((".gfl_cls", ".atss_cls", ".retina_cls", ".conv_cls")):
            module.bias.sub_(2.0)
        if name.endswith((".atss_reg", ".retina_reg", ".conv_reg", ".rpn_reg")):
            module.weight.mul_(0.3)
        if name.endswith(".scale") or type(module).__name__ == "Scale":
            module.scale.uniform_(0.8, 1.2)


def save(folder: Path, settings: Config, model: nn.Module, classes: tuple[str, ...] | None = None) -> tuple[Path, Path]:
    """config.py and model.pth in `folder`, as mmengine writes them: weights and `meta.dataset_meta`."""
    folder.mkdir(parents=True, exist_ok=True)
    written = folder / "config.py"
    settings.dump(written)
    meta = {"mmengine_version": "0.10.7", "epoch": 1, "iter": 10, "cfg": settings.pretty_text}
    if classes is not None:
        meta["dataset_meta"] = {"classes": classes}
    torch.save({"meta": meta, "state_dict": model.state_dict()}, folder / "model.pth")
    return written, folder / "model.pth"
