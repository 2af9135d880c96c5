"""Explicit quantization: QuantizeLinear and DequantizeLinear nodes in the format of a target.

| | `tensorrt` | `cpu` (ONNX Runtime) |
|---|---|---|
| activations | int8, symmetric (zero point 0) | uint8, with a zero point |
| weights | int8, symmetric, a scale a channel | the same |
| biases | float | int32, as its integer convolution wants them |
| where | at the inputs of a layer; the result stays float (no second rounding before a norm or a sum) | also at its \
output, or ONNX Runtime has no integer kernel for it; a ReLU becomes the zero point |

ONNX Runtime's integer convolution for uint8 × int8 adds pairs of products in 16 bits on x86 processors without VNNI
instructions, and saturates. There the weights are kept to 7 bits (`reduce_range`).

At last a `cpu` graph is changed to what runs faster there with the same results (`deploy.quantize.cpu_form`).
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping
from typing import Literal

import numpy as np
import onnx
from onnx import numpy_helper, shape_inference

from deploy.core.errors import UserError
from deploy.graph.structure import Layer, Structure, structure_of
from deploy.quantize.cpu_form import for_cpu
from deploy.quantize.grids import Grid, as_override

Target = Literal["tensorrt", "cpu"]


def quantize(
    model: onnx.ModelProto,
    ranges: Mapping[str, tuple[float, float]],
    target: Target,
    *,
    keep_float: Collection[str] | None = None,
    reduce_range: bool = False,
    grids: Mapping[str, Grid] | None = None,
) -> onnx.ModelProto:
    """`model` with its layers in int8; it is left as it is. `ranges`: see `activation_ranges`.

    keep_float: names of the layers that stay in float; None: the output layers. grids: trained scales and zero points
    of tensors, in place of those that follow from `ranges`. Raises UserError for a graph that is
    quantized, for a name that is not a layer, and when no layer is left to quantize.
    """
    from onnxruntime.quantization import CalibrationMethod, QuantType
    from onnxruntime.quantization.calibrate import TensorsData
    from onnxruntime.quantization.qdq_quantizer import QDQQuantizer

    if any(node.op_type in ("QuantizeLinear", "DequantizeLinear") for node in model.graph.node):
        raise UserError("the graph is quantized already; start from the float one")
    structure = structure_of(model.graph)
    keep_float = structure.output_names if keep_float is None else keep_float
    unknown = sorted(set(keep_float) - {layer.name for layer in structure.layers})
    if unknown:
        raise UserError(f"no layer is called {unknown[0]}: choose from {', '.join(x.name for x in structure.layers)}")
    chosen = [layer for layer in structure.layers if layer.name not in keep_float]
    if not chosen:
        raise UserError("every layer is kept in float: nothing would be quantized")
    symmetric = target == "tensorrt"
    source = shape_inference.infer_shapes(model)  # a copy; the quantizer changes it
    halves = {v.name for v in source.graph.value_info if v.type.tensor_type.elem_type == onnx.TensorProto.FLOAT16}
    halves |= _widen(source.graph, {layer.weight for layer in chosen})
    limits = {name: (np.float32(low), np.float32(high)) for name, (low, high) in ranges.items()}
    level = logging.root.level
    logging.root.setLevel(logging.ERROR)  # it advises preparations that an exported graph has behind it
    try:
        quantizer = QDQQuantizer(
            source,
            True,  # a scale a channel
            reduce_range and not symmetric,
            QuantType.QInt8,
            QuantType.QInt8 if symmetric else QuantType.QUInt8,
            TensorsData(CalibrationMethod.MinMax, limits),
            _nodes(model.graph, structure, chosen, target),
            [],
            [*{node.op_type for node in model.graph.node if node.name in structure.body}],
            {
                "ActivationSymmetric": symmetric,
                "WeightSymmetric": True,
                "QuantizeBias": not symmetric,
                "OpTypesToExcludeOutputQuantization": ["Conv", "Gemm", "MatMul"] if symmetric else [],
                "TensorQuantOverrides": {name: as_override(grid, target) for name, grid in (grids or {}).items()},
            },
        )
        quantizer.quantize_model()
        quantizer.model.topological_sort()  # it appends its nodes at the end
        result: onnx.ModelProto = quantizer.model.model
        _narrow_scales(result.graph, halves)
    finally:
        logging.root.setLevel(level)
    result.producer_name, result.producer_version = model.producer_name, model.producer_version
    del result.graph.value_info[:]
    if target == "cpu":
        for_cpu(result)
    return result


def check_format(model: onnx.ModelProto, target: Target) -> None:
    """Raise ValueError unless every Q and DQ in `model` is what `target` wants (the table above)."""
    values = {item.name: item for item in model.graph.initializer}
    wanted = onnx.TensorProto.INT8 if target == "tensorrt" else onnx.TensorProto.UINT8
    seen = False
    for node in model.graph.node:
        if node.op_type not in ("QuantizeLinear", "DequantizeLinear"):
            continue
        seen = True
        scale, zero = numpy_helper.to_array(values[node.input[1]]), values[node.input[2]]
        if not (np.isfinite(scale).all() and (scale > 0).all()):
            raise ValueError(f"{node.name}: a scale is not a positive number")
        constant = node.input[0] in values
        if not constant and zero.data_type != wanted:
            raise ValueError(f"{node.name}: activations are {onnx.TensorProto.DataType.Name(zero.data_type)}")
        if constant and target == "tensorrt" and zero.data_type != onnx.TensorProto.INT8:
            raise ValueError(f"{node.name}: a {onnx.TensorProto.DataType.Name(zero.data_type)} constant, no weight")
        if (constant or target == "tensorrt") and numpy_helper.to_array(zero).any():
            raise ValueError(f"{node.name}: the zero point is not 0")
    if not seen:
        raise ValueError("nothing is quantized")


# ----------------------------------------------------------------------------------------------------


def _widen(graph: onnx.GraphProto, weights: Collection[str]) -> set[str]:
    """Turn float16 weights into float32, and return their names: of a float16 one whose scale would be below 6.1e-5,
    which a weight of 0.007 has, onnxruntime makes nothing but zeros."""
    found = set()
    for item in graph.initializer:
        if item.name in weights and item.data_type == onnx.TensorProto.FLOAT16:
            item.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(item).astype(np.float32), item.name))
            found.add(item.name)
    return found


def _narrow_scales(graph: onnx.GraphProto, halves: Collection[str]) -> None:
    """Give the scales of values and weights in float16 that type, the smallest above 0 at least."""
    for item in graph.initializer:
        if item.name.removesuffix("_scale") in halves and item.name.endswith("_scale"):
            scale = np.maximum(numpy_helper.to_array(item).astype(np.float16), np.float16(2**-24))
            item.CopyFrom(numpy_helper.from_array(np.asarray(scale), item.name))


def _nodes(graph: onnx.GraphProto, structure: Structure, chosen: list[Layer], target: Target) -> list[str]:
    """The nodes whose inputs (and outputs, on the CPU) are quantized: the layers', and a ReLU or Clip right behind."""
    names = [node for layer in chosen for node in layer.nodes]
    if target == "cpu":
        results = {node.output[0] for node in graph.node if node.name in names}
        names += [node.name for node in graph.node if node.op_type in ("Relu", "Clip") and node.input[0] in results]
    return names
