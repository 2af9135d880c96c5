"""What is told of IREE is what its compiler was seen to do:
`findings/iree_compiles_no_strided_convolution_to_one_place.sh`."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from deploy.targets.iree import not_compiled


@pytest.mark.parametrize(
    ("kernel", "stride", "height", "width", "refused"),
    [
        (3, 2, 1, 1, False),
        (3, 2, 2, 2, True),
        (3, 2, 2, 5, True),
        (3, 2, 5, 2, True),
        (3, 2, 1, 2, True),
        (5, 2, 2, 2, True),
        (5, 2, 4, 4, False),
        (3, 3, 3, 3, True),
        (3, 3, 4, 4, False),
        (3, 4, 4, 4, True),
        (3, 2, 3, 3, False),
        (3, 2, 4, 4, False),
        (3, 1, 2, 2, False),
        (1, 2, 2, 2, False),
    ],
)
@pytest.mark.parametrize("batch", [1, "batch"])
def test_what_is_told_is_what_was_seen(
    kernel: int, stride: int, height: int, width: int, refused: bool, batch: int | str, tmp_path: Path
) -> None:
    weight = np.zeros((8, 8, kernel, kernel), np.float32)
    node = helper.make_node("Conv", ["x", "w"], ["y"], strides=[stride] * 2, pads=[kernel // 2] * 4)
    graph = helper.make_graph(
        [node],
        "level",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [batch, 8, height, width])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(weight, "w")],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)]), str(tmp_path / "level.onnx"))
    said = not_compiled(tmp_path / "level.onnx")
    assert (said is not None) == refused
    assert said is None or f"of one of {height}x{width}" in said
