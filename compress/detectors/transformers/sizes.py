"""Sizes of the detectors of transformers, as values of the library's configurations: the published ones, and `tiny` and
`tiny2x`, which are ours.

The published ones are as the authors' configurations have them (D-FINE: github.com/Peterande/D-FINE, RT-DETRv2:
github.com/lyuwenyu/RT-DETR).
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

    Layers as narrow as these do not get going from the library's initial weights, a normal distribution of 0.01.
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
