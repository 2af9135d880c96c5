"""Images, and small teachers of every kind."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
import torch
from onnx import parser

from compress.data.batch import ImageSize
from compress.teachers.base import Sample
from deploy.core.card import METADATA_KEY, ModelCard

CPU = torch.device("cpu")


def sample(image: np.ndarray, image_id: int = 1, name: str = "1.png") -> Sample:
    """An RGB image uint8 [h, w, 3] as a teacher gets it that looks at original images."""
    size = (image.shape[0], image.shape[1])
    return Sample(None, image_id, ImageSize(size, size), name, torch.from_numpy(image).permute(2, 0, 1))


def noise(height: int, width: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 200, (height // 8 + 1, width // 8 + 1, 3)).repeat(8, 0).repeat(8, 1)[:height, :width]
    return (coarse + rng.integers(0, 56, (height, width, 3))).astype(np.uint8)


def rectangle(height: int, width: int, box: tuple[int, int, int, int], color: tuple[int, int, int]) -> np.ndarray:
    """A black image with one filled box (xyxy)."""
    image = np.zeros((height, width, 3), np.uint8)
    x1, y1, x2, y2 = box
    image[y1:y2, x1:x2] = color
    return image


SPOT = """
<ir_version: 8, opset_import: ["" : 18]>
spot (float[1,{shape}] pixels{more}) => ({outputs})
{{
  channel = Constant<value_ints=[{channel}]>()
  one = Constant<value_ints=[1]>()
  two = Constant<value_ints=[2]>()
  zero = Constant<value_int=0>()
  step = Constant<value_int=1>()
  flat = Constant<value_ints=[-1]>()
  first = Constant<value_ints=[{index}]>()
  plane = Gather<axis={channel}>(pixels, first)
  gray = Squeeze(plane, channel)
  limit = Constant<value_float={limit}>()
  bright = Greater(gray, limit)
  on = Cast<to=1>(bright)
  cols = ReduceMax<keepdims=0>(on, one)
  rows = ReduceMax<keepdims=0>(on, two)
  wide = Shape<start=2, end=3>(gray)
  high = Shape<start=1, end=2>(gray)
  W = Cast<to=1>(wide)
  H = Cast<to=1>(high)
  wide0 = Squeeze(wide)
  high0 = Squeeze(high)
  xs = Range(zero, wide0, step)
  ys = Range(zero, high0, step)
  x = Cast<to=1>(xs)
  y = Cast<to=1>(ys)
  unit = Constant<value_float=1.0>()
  xa = Add(x, unit)
  xb = Mul(cols, xa)
  x2 = ReduceMax<keepdims=0>(xb, one)
  xc = Sub(W, x)
  xd = Mul(cols, xc)
  xe = ReduceMax<keepdims=0>(xd, one)
  x1 = Sub(W, xe)
  ya = Add(y, unit)
  yb = Mul(rows, ya)
  y2 = ReduceMax<keepdims=0>(yb, one)
  yc = Sub(H, y)
  yd = Mul(rows, yc)
  ye = ReduceMax<keepdims=0>(yd, one)
  y1 = Sub(H, ye)
{rest}
}}
"""

CORNERS = "  corners = Concat<axis=0>(x1, y1, x2, y2)\n"
CENTRE = """  half = Constant<value_float=0.5>()
  w = Sub(x2, x1)
  h = Sub(y2, y1)
  sx = Add(x1, x2)
  sy = Add(y1, y2)
  cx = Mul(sx, half)
  cy = Mul(sy, half)
  corners = Concat<axis=0>(cx, cy, w, h)
"""
SHARES = """  canvas = Concat<axis=0>(W, H, W, H)
  box = Div(corners, canvas)
"""
PIXELS = "  box = Identity(corners)\n"


def spot(
    path: Path,
    *,
    rest: str,
    outputs: str,
    shape: str = "3,H,W",
    limit: float = 128.0,
    channel: int = 1,
    index: int = 0,
    more: str = "",
) -> Path:
    """An ONNX detector that finds the bright rectangle of an image, [1, 4] corners x1, y1, x2, y2 on its canvas.

    rest: what it makes of x1, y1, x2, y2, W and H (float [1]). limit: what is bright, in the channel `index`.
    """
    text = SPOT.format(shape=shape, outputs=outputs, limit=limit, channel=channel, index=index, rest=rest, more=more)
    model = parser.parse_model(text)
    onnx.checker.check_model(model)
    onnx.save(model, path)
    return path


def constant(path: Path, outputs: dict[str, np.ndarray], shape: tuple[int | str, ...] = (1, 3, 128, 128)) -> Path:
    """An ONNX file that gives these arrays, whatever the image: the output side of a detector of another library."""
    image = onnx.helper.make_tensor_value_info("images", onnx.TensorProto.FLOAT, shape)
    nodes, given = [], []
    for name, array in outputs.items():
        nodes.append(onnx.helper.make_node("Constant", [], [name], value=onnx.numpy_helper.from_array(array)))
        given.append(
            onnx.helper.make_tensor_value_info(name, onnx.helper.np_dtype_to_tensor_dtype(array.dtype), array.shape)
        )
    graph = onnx.helper.make_graph(nodes, "constant", [image], given)
    onnx.save(onnx.helper.make_model(graph, ir_version=8, opset_imports=[onnx.helper.make_opsetid("", 18)]), path)
    return path


DEPLOYABLE = """
<ir_version: 8, opset_import: ["" : 18]>
spot (uint8[B,3,64,96] images) => (float[B,1,4] boxes, float[B,1] scores, int64[B,1] labels, int32[B] count)
{
  one = Constant<value_ints=[1]>()
  two = Constant<value_ints=[2]>()
  pixels = Cast<to=1>(images)
  gray = ReduceMean<keepdims=0>(pixels, one)
  limit = Constant<value_float=200.0>()
  bright = Greater(gray, limit)
  on = Cast<to=1>(bright)
  cols = ReduceMax<keepdims=0>(on, one)
  rows = ReduceMax<keepdims=0>(on, two)
  zero = Constant<value_int=0>()
  step = Constant<value_int=1>()
  w = Constant<value_int=96>()
  h = Constant<value_int=64>()
  W = Cast<to=1>(w)
  H = Cast<to=1>(h)
  xs = Range(zero, w, step)
  ys = Range(zero, h, step)
  x = Cast<to=1>(xs)
  y = Cast<to=1>(ys)
  unit = Constant<value_float=1.0>()
  xa = Add(x, unit)
  xb = Mul(cols, xa)
  x2 = ReduceMax(xb, one)
  xc = Sub(W, x)
  xd = Mul(cols, xc)
  xe = ReduceMax(xd, one)
  x1 = Sub(W, xe)
  ya = Add(y, unit)
  yb = Mul(rows, ya)
  y2 = ReduceMax(yb, one)
  yc = Sub(H, y)
  yd = Mul(rows, yc)
  ye = ReduceMax(yd, one)
  y1 = Sub(H, ye)
  flat = Concat<axis=1>(x1, y1, x2, y2)
  boxes = Unsqueeze(flat, one)
  share = Div(x2, W)
  scores = Identity(share)
  nothing = Sub(x1, x1)
  labels = Cast<to=7>(nothing)
  row = Squeeze(nothing, one)
  ones = Add(row, unit)
  count = Cast<to=6>(ones)
}
"""
"""A detector of this project's form, for bright rectangles on 64 x 96; its score is the right side's share of it."""


def deployable(path: Path, names: tuple[str, ...] = ("a", "b", "c")) -> Path:
    """Such a file, with its card."""
    model = parser.parse_model(DEPLOYABLE)
    card = ModelCard(
        name="spot",
        class_names=list(names),
        category_ids=list(range(1, len(names) + 1)),
        input_size=(64, 96),
        pad_color=(0, 0, 0),
        max_detections=1,
        candidates=1,
    )
    onnx.helper.set_model_props(model, {METADATA_KEY: card.model_dump_json()})
    onnx.checker.check_model(model)
    onnx.save(model, path)
    return path


def transformers_model(
    folder: Path, kind: Literal["detr", "rt_detr_v2", "d_fine", "rf_detr"], names: dict[int, str]
) -> Path:
    """A detector of transformers with random weights and its image processor, as `save_pretrained` writes them."""
    import transformers as tf

    labels: dict[str, Any] = {"id2label": names, "label2id": {name: label for label, name in names.items()}}
    widths = [8, 8, 8, 8]
    body: dict[str, Any] = {"embedding_size": 8, "hidden_sizes": widths, "depths": [1, 1, 1, 1]}
    decoder: dict[str, Any] = {
        "encoder_hidden_dim": 16, "encoder_in_channels": [8, 8, 8], "encoder_ffn_dim": 16, "encoder_attention_heads": 2,
        "d_model": 16, "num_queries": 20, "decoder_in_channels": [16, 16, 16], "decoder_ffn_dim": 16,
        "decoder_layers": 2, "decoder_attention_heads": 2, "num_denoising": 0,
    }  # fmt: skip
    three = ["stage2", "stage3", "stage4"]
    processor: Any = tf.RTDetrImageProcessor(size={"height": 64, "width": 64})
    with torch.random.fork_rng():
        torch.manual_seed(0)
        if kind == "detr":
            backbone: Any = tf.ResNetConfig(**body, layer_type="basic", out_features=["stage4"])
            config: Any = tf.DetrConfig(
                use_timm_backbone=False, use_pretrained_backbone=False, backbone=None, backbone_config=backbone,
                d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2,
                encoder_ffn_dim=16, decoder_ffn_dim=16, num_queries=20, **labels,
            )  # fmt: skip
            model: Any = tf.DetrForObjectDetection(config)
            processor = tf.DetrImageProcessor(size={"shortest_edge": 64, "longest_edge": 96})
        elif kind == "rt_detr_v2":
            backbone = tf.RTDetrResNetConfig(**body, layer_type="basic", out_features=three)
            model = tf.RTDetrV2ForObjectDetection(tf.RTDetrV2Config(backbone_config=backbone, **decoder, **labels))
        elif kind == "rf_detr":
            windows = {"num_windows": 1, "patch_size": 16, "image_size": 64, "out_indices": [1, 2]}
            backbone = tf.RfDetrDinov2Config(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, **windows)
            own = {"d_model": 16, "decoder_layers": 2, "decoder_ffn_dim": 16, "num_queries": 10, "group_detr": 2}
            heads = {"decoder_self_attention_heads": 2, "decoder_cross_attention_heads": 2}
            model = tf.RfDetrForObjectDetection(tf.RfDetrConfig(backbone_config=backbone, **own, **heads, **labels))
        else:
            backbone = tf.HGNetV2Config(
                stem_channels=[3, 8, 8], stage_in_channels=widths, stage_mid_channels=widths, stage_out_channels=widths,
                stage_num_blocks=[1, 1, 1, 1], stage_numb_of_layers=[1, 1, 1, 1], out_features=three, **body,
            )  # fmt: skip
            model = tf.DFineForObjectDetection(tf.DFineConfig(backbone_config=backbone, **decoder, **labels))
    model.eval().save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder
