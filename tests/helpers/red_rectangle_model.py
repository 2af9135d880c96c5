"""A model whose right answer is known without it: it finds the red rectangle in a picture.

Its file is made by hand with the contract of the real ones: images uint8 [n, 3, 96, 128] in; boxes, scores, labels and
count out. `work` adds matrix products, to have a model that takes time.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from deploy.core.card import METADATA_KEY, ModelCard
from deploy.core.files import atomic_path

SIZE = (96, 128)
SLOTS = 3
CARD = ModelCard(
    name="red",
    class_names=["red", "large red"],
    category_ids=[7, 9],
    input_size=SIZE,
    pad_color=(0, 0, 0),
    max_detections=SLOTS,
)


def _constants(height: int, width: int) -> dict[str, np.ndarray]:
    return {
        "high": np.array(200, np.float32),
        "low": np.array(80, np.float32),
        "xs": np.arange(width, dtype=np.float32).reshape(1, 1, 1, width),
        "ys": np.arange(height, dtype=np.float32).reshape(1, 1, height, 1),
        "far": np.array(1e6, np.float32),
        "minus": np.array(-1.0, np.float32),
        "one": np.array(1.0, np.float32),
        "zero": np.array(0.0, np.float32),
        "sixtyfour": np.array(64.0, np.float32),
        "scale": np.array(0.75 / 255, np.float32),
        "offset": np.array(0.25, np.float32),
        "axes": np.array([1, 2, 3], np.int64),
        "axis1": np.array([1], np.int64),
        "two": np.array(2, np.int64),
        "starts": np.array([0], np.int64),
        "pad_boxes": np.array([0, 0, 0, 0, SLOTS - 1, 0], np.int64),
        "pad_scores": np.array([0, 0, 0, SLOTS - 1], np.int64),
        "flat": np.array([-1], np.int64),
        "izero": np.array(0, np.int64),
    }


def write_red_model(path: Path, *, work: int = 0, card: ModelCard = CARD) -> None:
    """One detection an image that has red pixels (r > 200, g and b < 80), none otherwise.

    The box is that of the red pixels; the score is 0.25 + 0.75 x mean of all values / 255, so that no two pictures
    have the same; label 1 for boxes wider than 64 px, else 0.
    """
    height, width = card.input_size
    constants = _constants(height, width)
    nodes = []

    def node(kind: str, inputs: list[str], output: str, **attributes: object) -> str:
        nodes.append(helper.make_node(kind, inputs, [output], **attributes))
        return output

    node("Cast", ["images"], "x", to=TensorProto.FLOAT)
    nodes.append(helper.make_node("Split", ["x"], ["r", "g", "b"], axis=1, num_outputs=3))
    node("And", [node("Greater", ["r", "high"], "r1"), node("Less", ["g", "low"], "g1")], "rg")
    node("And", ["rg", node("Less", ["b", "low"], "b1")], "red")
    node("Cast", ["red"], "redf", to=TensorProto.FLOAT)
    for name, grid in (("x", "xs"), ("y", "ys")):
        node("Where", ["red", grid, "far"], f"{name}_in")
        node("ReduceMin", [f"{name}_in", "axes"], f"{name}1", keepdims=0)
        node("Where", ["red", grid, "minus"], f"{name}_out")
        node("Add", [node("ReduceMax", [f"{name}_out", "axes"], f"{name}max", keepdims=0), "one"], f"{name}2")
    node("ReduceMax", ["redf", "axes"], "any", keepdims=0)
    node("Cast", ["any"], "count", to=TensorProto.INT32)
    columns = [node("Unsqueeze", [name, "axis1"], f"{name}_u") for name in ("x1", "y1", "x2", "y2")]
    node("Concat", columns, "box", axis=1)
    node("Mul", ["box", node("Unsqueeze", ["any", "axis1"], "any_u")], "box_or_zero")
    node("Unsqueeze", ["box_or_zero", "axis1"], "box_1")
    node("Pad", ["box_1", "pad_boxes", "zero"], "boxes")
    mean = node("ReduceMean", ["x", "axes"], "mean", keepdims=0)
    if work:  # a product of matrices that is multiplied by 0 and added
        generator = np.random.default_rng(0)
        constants["weight"] = generator.normal(0, 1 / 16, (256, 256)).astype(np.float32)
        constants["square"] = np.array([0, -1, 256], np.int64)
        state = node("Reshape", ["x", "square"], "state")
        for step in range(work):
            state = node("Tanh", [node("MatMul", [state, "weight"], f"p{step}")], f"t{step}")
        constants["late"] = np.array([1, 2], np.int64)
        node("Mul", [node("ReduceMean", [state, "late"], "worked", keepdims=0), "zero"], "nothing")
        mean = node("Add", [mean, "nothing"], "mean_after_work")
    node("Add", [node("Mul", [mean, "scale"], "scaled"), "offset"], "score_all")
    node("Mul", ["score_all", "any"], "score")
    node("Pad", [node("Unsqueeze", ["score", "axis1"], "score_1"), "pad_scores", "zero"], "scores")
    node("Greater", [node("Sub", ["x2", "x1"], "box_width"), "sixtyfour"], "wide")
    node("Cast", ["wide"], "label", to=TensorProto.INT64)
    node("Mul", ["label", node("Cast", ["any"], "any_i", to=TensorProto.INT64)], "label_or_zero")
    node("Pad", [node("Unsqueeze", ["label_or_zero", "axis1"], "label_1"), "pad_scores", "izero"], "labels")

    used = {name for one in nodes for name in one.input}
    graph = helper.make_graph(
        nodes,
        "red",
        [helper.make_tensor_value_info("images", TensorProto.UINT8, ["batch", 3, height, width])],
        [
            helper.make_tensor_value_info("boxes", TensorProto.FLOAT, ["batch", SLOTS, 4]),
            helper.make_tensor_value_info("scores", TensorProto.FLOAT, ["batch", SLOTS]),
            helper.make_tensor_value_info("labels", TensorProto.INT64, ["batch", SLOTS]),
            helper.make_tensor_value_info("count", TensorProto.INT32, ["batch"]),
        ],
        [numpy_helper.from_array(value, name) for name, value in constants.items() if name in used],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    entry = model.metadata_props.add()
    entry.key, entry.value = METADATA_KEY, card.model_dump_json()
    onnx.checker.check_model(model)
    with atomic_path(path) as temporary:
        onnx.save(model, temporary)


def picture(
    size_hw: tuple[int, int], box: tuple[int, int, int, int] | None, shade: int = 40, seed: int | None = None
) -> np.ndarray:
    """uint8 [h, w, 3]: grey, noisy with `seed`, with a red rectangle at `box` (xyxy, pixels)."""
    image = np.full((*size_hw, 3), shade, np.uint8)
    if seed is not None:
        image += np.random.default_rng(seed).integers(0, 30, image.shape, dtype=np.uint8)
    if box is not None:
        x1, y1, x2, y2 = box
        image[y1:y2, x1:x2] = (255, 0, 0)
    return image
