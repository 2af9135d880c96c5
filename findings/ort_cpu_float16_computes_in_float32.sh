#!/usr/bin/env bash
# onnxruntime 1.31.1, CPU provider, a float16 graph: 300 * 300 * 0.001.
# Expected: infinity, as 90,000 has no float16; onnx's reference evaluator gives it.
# Happens: 90, at every optimisation level: the graph is computed in float32 and nothing is rounded in between, so a file
# that passes on the CPU may be infinite on a GPU.
# Exits with 1 when that changes.
set -euo pipefail
venv=$(mktemp -d)
trap 'rm -rf "$venv"' EXIT
python3 -m venv "$venv"
"$venv/bin/pip" install -q onnxruntime==1.31.1 onnx==1.23.2 numpy
"$venv/bin/python" - <<'PYTHON'
import sys

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator

names = ("x", "y", "z")
graph = helper.make_graph(
    [helper.make_node("Mul", ["x", "y"], ["inside"]), helper.make_node("Mul", ["inside", "z"], ["out"])],
    "overflow",
    [helper.make_tensor_value_info(name, TensorProto.FLOAT16, [1]) for name in names],
    [helper.make_tensor_value_info("out", TensorProto.FLOAT16, [1])],
)
model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
feed = {name: np.array([value], np.float16) for name, value in zip(names, (300, 300, 0.001))}
expected = ReferenceEvaluator(model).run(None, feed)[0]
found = []
for level in ("ORT_DISABLE_ALL", "ORT_ENABLE_BASIC", "ORT_ENABLE_ALL"):
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = getattr(onnxruntime.GraphOptimizationLevel, level)
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    found.append(session.run(None, feed)[0])
    print(f"onnxruntime {onnxruntime.__version__} {level}: {found[-1]}")
print(f"onnx {onnx.__version__} reference: {expected}")
hidden = np.isinf(expected).all() and all(np.isfinite(value).all() for value in found)
sys.exit(0 if hidden else 1)
PYTHON
