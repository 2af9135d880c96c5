#!/usr/bin/env bash
# onnx2tf 2.6.9 (ai-edge-litert 2.1.2), an ONNX graph that quantizes to uint8, enlarges the numbers (Resize, nearest) and
# turns them back, as graphs of onnxruntime's quantizer do in its QOperator format: copying bytes is cheaper than floats.
# Expected: the numbers of onnxruntime, since a nearest neighbour is a copy.
# Happens: onnx2tf stores the numbers as int8, with a zero point that is 128 less, but lets the result of the Resize be
# read with the types of the graph. Where the zero point was below 128, LiteRT cannot load the file, for a uint8 tensor
# with a negative zero point. From 128 on it loads and runs, and what is past the middle of the range comes back 256
# steps off: with a scale of 0.02, an error of 5.12 on values of at most 1. The converter ends with 0 and says nothing.
# Seen:
#   zero point 0: does not load: unsupported zero-point value (-128) for UINT8 tensor
#   zero point 100: does not load: unsupported zero-point value (-28) for UINT8 tensor
#   zero point 128: largest error 5.12 on values up to 1.00
#   zero point 140: largest error 5.12 on values up to 1.00
#   zero point 200: largest error 0.00 on values up to 1.00
# Exits with 1 when that changes. (The package asks for Python 3.12; it runs on 3.11 as well.)
set -euo pipefail
venv=$(mktemp -d)
trap 'rm -rf "$venv"' EXIT
python3 -m venv "$venv"
"$venv/bin/pip" install -q --ignore-requires-python onnx2tf==2.6.9
cd "$venv"
PATH="$venv/bin:$PATH" "$venv/bin/python" - 2>/dev/null <<'PYTHON'
import re
import subprocess
import sys

import numpy as np
import onnx
import onnxruntime
from ai_edge_litert.interpreter import Interpreter
from onnx import TensorProto, helper, numpy_helper

values = np.linspace(-1, 1, 4 * 8 * 8, dtype=np.float32).reshape(1, 4, 8, 8)
seen = {}
for zero_point in (0, 100, 128, 140, 200):
    constants = {
        "scale": np.float32(0.02),
        "zero": np.uint8(zero_point),
        "twice": np.array([1, 1, 2, 2], np.float32),
    }
    how = {"mode": "nearest", "nearest_mode": "floor", "coordinate_transformation_mode": "asymmetric"}
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "scale", "zero"], ["x_8"]),
        helper.make_node("Resize", ["x_8", "", "twice"], ["y_8"], **how),
        helper.make_node("DequantizeLinear", ["y_8", "scale", "zero"], ["y"]),
    ]
    graph = helper.make_graph(
        nodes,
        "enlarged",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 4, 8, 8])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 4, 16, 16])],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)], ir_version=9)
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, "enlarged.onnx")
    session = onnxruntime.InferenceSession("enlarged.onnx", providers=["CPUExecutionProvider"])
    (wanted,) = session.run(None, {"x": values})
    words = ["onnx2tf", "-i", "enlarged.onnx", "-o", "made", "-osd", "-n"]
    subprocess.run(words, check=True, capture_output=True)
    try:
        interpreter = Interpreter("made/enlarged_float32.tflite")
        interpreter.allocate_tensors()
        network = interpreter.get_signature_runner()
        (found,) = network(x=values.transpose(0, 2, 3, 1)).values()
        found = found.transpose(0, 3, 1, 2) if found.shape[-1] == 4 else found
        error, largest = np.abs(found - wanted).max(), np.abs(wanted).max()
        seen[zero_point] = f"largest error {error:.2f} on values up to {largest:.2f}"
    except RuntimeError as error:
        reason = re.search(r"unsupported zero-point value \(-\d+\) for UINT8 tensor", str(error))
        seen[zero_point] = f"does not load: {reason.group()}"
    print(f"zero point {zero_point}: {seen[zero_point]}")
fails = all("does not load" in seen[zero_point] for zero_point in (0, 100))
wrong = all("error 5.12" in seen[zero_point] for zero_point in (128, 140))
sys.exit(0 if fails and wrong and "error 0.00" in seen[200] else 1)
PYTHON
