"""Sizes of the detectors of transformers, as values of the library's configurations: the published ones, and `tiny` and
`tiny2x` of the first two, which are ours.

The published ones are as the authors' configurations have them (D-FINE: github.com/Peterande/D-FINE, RT-DETRv2:
github.com/lyuwenyu/RT-DETR, RF-DETR: github.com/roboflow/rf-detr, LW-DETR: github.com/Atten4Vis/LW-DETR).
"""

from __future__ import annotations

from typing import Any


def _hgnet(
    stem: list[int], mid: list[int], out: list[int], blocks: list[int], layers: int, *, affine: bool, first: int = 2
) -> dict[str, Any]:
    """HGNetV2 of four stages; its maps from stage `first` on go out."""
    return {
        "model_type": "hgnet_v2",
        "stem_channels": stem,
        "hidden_sizes": out,
        "stage_in_channels": [stem[-1], *out[:-1]],
        "stage_mid_channels": mid,
        "stage_out_channels": out,
        "stage_num_blocks": blocks,
        "stage_downsample": [False, True, True, True],
        "stage_light_block": [False, False, True, True],
        "stage_kernel_size": [3, 3, 5, 5],
        "stage_numb_of_layers": [layers] * 4,
        "use_learnable_affine_block": affine,
        "out_indices": list(range(first, 5)),
    }


_B0 = ([3, 16, 16], [16, 32, 64, 128], [64, 256, 512, 1024], [1, 1, 2, 1], 3)

D_FINE: dict[str, dict[str, Any]] = {
    "n": {
        "backbone_config": _hgnet(*_B0, affine=True, first=3),
        "encoder_in_channels": [512, 1024],
        "encoder_hidden_dim": 128,
        "encoder_ffn_dim": 512,
        "encode_proj_layers": [1],
        "feat_strides": [16, 32],
        "num_feature_levels": 2,
        "d_model": 128,
        "decoder_in_channels": [128, 128],
        "decoder_ffn_dim": 512,
        "decoder_n_points": [6, 6],
        "decoder_layers": 3,
        "hidden_expansion": 0.34,
        "depth_mult": 0.5,
    },
    "s": {
        "backbone_config": _hgnet(*_B0, affine=True),
        "encoder_in_channels": [256, 512, 1024],
        "decoder_n_points": [3, 6, 3],
        "decoder_layers": 3,
        "hidden_expansion": 0.5,
        "depth_mult": 0.34,
    },
    "m": {
        "backbone_config": _hgnet([3, 24, 32], [32, 64, 128, 256], [96, 384, 768, 1536], [1, 1, 3, 1], 4, affine=True),
        "encoder_in_channels": [384, 768, 1536],
        "decoder_n_points": [3, 6, 3],
        "decoder_layers": 4,
        "depth_mult": 0.67,
    },
    "l": {
        "backbone_config": _hgnet(
            [3, 32, 48], [48, 96, 192, 384], [128, 512, 1024, 2048], [1, 1, 3, 1], 6, affine=False
        ),
        "encoder_in_channels": [512, 1024, 2048],
        "decoder_n_points": [3, 6, 3],
        "decoder_layers": 6,
    },
    "x": {
        "backbone_config": _hgnet(
            [3, 32, 64], [64, 128, 256, 512], [128, 512, 1024, 2048], [1, 2, 5, 2], 6, affine=False
        ),
        "encoder_in_channels": [512, 1024, 2048],
        "encoder_hidden_dim": 384,
        "encoder_ffn_dim": 2048,
        "decoder_in_channels": [384, 384, 384],
        "decoder_n_points": [3, 6, 3],
        "decoder_layers": 6,
    },
}


def _resnet(kind: str, depths: list[int]) -> dict[str, Any]:
    widths = [64, 128, 256, 512] if kind == "basic" else [256, 512, 1024, 2048]
    stages = ["stage2", "stage3", "stage4"]
    return {
        "model_type": "rt_detr_resnet",
        "layer_type": kind,
        "hidden_sizes": widths,
        "depths": depths,
        "out_features": stages,
    }


RT_DETR_V2: dict[str, dict[str, Any]] = {
    "r18": {
        "backbone_config": _resnet("basic", [2, 2, 2, 2]),
        "encoder_in_channels": [128, 256, 512],
        "hidden_expansion": 0.5,
        "decoder_layers": 3,
    },
    "r34": {
        "backbone_config": _resnet("basic", [3, 4, 6, 3]),
        "encoder_in_channels": [128, 256, 512],
        "hidden_expansion": 0.5,
        "decoder_layers": 4,
    },
    "r50m": {"backbone_config": _resnet("bottleneck", [3, 4, 6, 3]), "hidden_expansion": 0.5},
    "r50": {"backbone_config": _resnet("bottleneck", [3, 4, 6, 3])},
    "r101": {
        "backbone_config": _resnet("bottleneck", [3, 4, 23, 3]),
        "encoder_ffn_dim": 2048,
        "encoder_hidden_dim": 384,
        "decoder_in_channels": [384, 384, 384],
    },
}


def _tiny(width: int, own: dict[str, Any]) -> dict[str, Any]:
    """For training from scratch on a CPU: about as many GFLOPs as a GFL with the backbone nano. At `width` 2 the
    channels of the backbone double and the rest keeps its shapes, which makes a teacher.

    Weights begin with a deviation of 0.05 instead of the library's 0.01: Xavier's for 64 channels is 0.125.
    """
    widths = [width * c for c in (24, 48, 96, 96)]
    return {
        "backbone_config": {**_resnet("basic", [1, 1, 1, 1]), "embedding_size": widths[0], "hidden_sizes": widths},
        "encoder_in_channels": widths[1:],
        "encoder_hidden_dim": 64,
        "encoder_ffn_dim": 128,
        "encoder_attention_heads": 4,
        "d_model": 64,
        "decoder_in_channels": [64, 64, 64],
        "decoder_ffn_dim": 128,
        "decoder_attention_heads": 4,
        "decoder_layers": 2,
        "num_queries": 30,
        "num_denoising": 20,
        "initializer_range": 0.05,
        **own,
    }


for _name, _width in (("tiny", 1), ("tiny2x", 2)):
    D_FINE[_name] = _tiny(_width, {"depth_mult": 0.34, "decoder_n_points": [3, 4, 3]})
    RT_DETR_V2[_name] = _tiny(_width, {"hidden_expansion": 0.625})


def _rf_detr(
    layers: int, side: int, *, patch: int = 16, windows: int = 2, out: tuple[int, ...] = (3, 6, 9, 12)
) -> dict[str, Any]:
    """DINOv2 small with positions for images of `side` pixels, and `layers` layers of the decoder."""
    vit = {
        "model_type": "rf_detr_dinov2",
        "hidden_size": 384,
        "num_attention_heads": 6,
        "num_hidden_layers": 12,
        "patch_size": patch,
        "image_size": side,
        "num_windows": windows,
        "out_indices": list(out),
    }
    return {"backbone_config": vit, "decoder_layers": layers, "decoder_n_points": 2, "dropout": 0.0}


RF_DETR: dict[str, dict[str, Any]] = {
    "nano": _rf_detr(2, 384),
    "small": _rf_detr(3, 512),
    "medium": _rf_detr(4, 576),
    "large": _rf_detr(4, 704),
    "base": _rf_detr(3, 518, patch=14, windows=4, out=(2, 5, 8, 11)),
}


def _lw_detr(width: int, *, small: bool = True, layers: int = 10, queries: int = 300) -> dict[str, Any]:
    """A vision transformer of `width` channels; `small`: one map of stride 16, else two of strides 8 and 32.

    The authors count layers from 0, the library's `out_indices` from 1.
    """
    vit = {
        "model_type": "lw_detr_vit",
        "hidden_size": width,
        "num_attention_heads": 12,
        "num_hidden_layers": layers,
        "window_block_indices": [0, 2, 4] if layers == 6 else [0, 1, 3, 6, 7, 9],
        "out_indices": [2, 4, 6] if layers == 6 else [3, 5, 6, 10],
        "image_size": 1024,
    }
    wide = {"d_model": 384, "decoder_self_attention_heads": 12, "decoder_cross_attention_heads": 24}
    return {
        "backbone_config": vit,
        "num_queries": queries,
        "projector_scale_factors": [1.0] if small else [2.0, 0.5],
        "decoder_n_points": 2 if small else 4,
        **({} if small else wide),
    }


LW_DETR: dict[str, dict[str, Any]] = {
    "tiny": _lw_detr(192, layers=6, queries=100),
    "small": _lw_detr(192),
    "medium": _lw_detr(384),
    "large": _lw_detr(384, small=False),
    "xlarge": _lw_detr(768, small=False),
}
