"""IREE compiles an exported file as it is, but for one kind of convolution, of which `compress export` tells."""

from __future__ import annotations

from pathlib import Path

import onnx
from onnx import shape_inference

from deploy.core.storage import fetch


def not_compiled(source: Path) -> str | None:
    """What IREE 3.13 cannot compile of the ONNX file at `source`, one line for people; None: nothing that is known.

    It is a convolution with a stride that makes one place of a side on which its padded map is longer than its window,
    as where a pyramid's last level is halved from 2 x 2. The compiler's error speaks of operands and their dimensions
    (findings/iree_compiles_no_strided_convolution_to_one_place.sh).
    """
    graph = shape_inference.infer_shapes(onnx.load(str(fetch(source)))).graph
    sides = {value.name: _sides(value) for value in (*graph.value_info, *graph.input, *graph.output)}
    windows = {item.name: tuple(item.dims[2:]) for item in graph.initializer}
    for node in graph.node:
        if node.op_type != "Conv":
            continue
        window = _ints(node, "kernel_shape") or windows.get(node.input[1], ())
        before, after = sides.get(node.input[0], ()), sides.get(node.output[0], ())
        if not len(window) == len(before) == len(after):
            continue
        axes = len(window)
        strides = _ints(node, "strides") or (1,) * axes
        pads = _ints(node, "pads") or (0,) * 2 * axes
        dilations = _ints(node, "dilations") or (1,) * axes
        for axis in range(axes):
            padded, reach = before[axis] + pads[axis] + pads[axis + axes], (window[axis] - 1) * dilations[axis] + 1
            if strides[axis] > 1 and after[axis] == 1 and padded > reach > 1:
                return (
                    f"IREE 3.13 cannot compile {source}, where a convolution makes a map of "
                    f"{'x'.join(map(str, after))} of one of {'x'.join(map(str, before))}; on a larger canvas it can"
                )
    return None


# --- details --------------------------------------------------------------------------------------------


def _sides(value: onnx.ValueInfoProto) -> tuple[int, ...]:
    """(height, width) of a map; none where one is open."""
    dims = value.type.tensor_type.shape.dim[2:]
    return tuple(dim.dim_value for dim in dims) if all(dim.HasField("dim_value") for dim in dims) else ()


def _ints(node: onnx.NodeProto, name: str) -> tuple[int, ...]:
    return next((tuple(item.ints) for item in node.attribute if item.name == name), ())
