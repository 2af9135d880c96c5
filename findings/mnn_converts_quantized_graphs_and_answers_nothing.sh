#!/usr/bin/env bash
# MNN 3.6.1, mnnconvert of a convolution between QuantizeLinear and DequantizeLinear nodes, run by its Python package.
# Expected: onnxruntime's numbers, or an error of the converter or of the network.
# Happens: the converter says "Converted Success!" and ends with 0; the network's answer is an empty list and no
# exception. Its log speaks of a convolution that got 3 as batch and 1 as channels: the first two axes are exchanged.
# Seen:
#   converter: exit 0, Converted Success!
#   network: 0 outputs, one was asked for
# Exits with 1 when that changes.
set -euo pipefail
venv=$(mktemp -d)
trap 'rm -rf "$venv"' EXIT
python3 -m venv "$venv"
"$venv/bin/pip" install -q MNN==3.6.1 onnx==1.23.2 numpy
cd "$venv"
"$venv/bin/python" - <<'PYTHON'
import subprocess
import sys

import MNN.expr as F
import MNN.nn as nn
import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

random = np.random.default_rng(0)
constants = {
    "w": random.integers(-127, 128, (4, 3, 3, 3)).astype(np.int8),
    "w_scale": np.full(4, 0.01, np.float32),
    "w_zero": np.zeros(4, np.int8),
    "x_scale": np.float32(0.02),
    "x_zero": np.uint8(0),
}
nodes = [
    helper.make_node("QuantizeLinear", ["x", "x_scale", "x_zero"], ["x_8"]),
    helper.make_node("DequantizeLinear", ["x_8", "x_scale", "x_zero"], ["x_back"]),
    helper.make_node("DequantizeLinear", ["w", "w_scale", "w_zero"], ["w_back"], axis=0),
    helper.make_node("Conv", ["x_back", "w_back"], ["y"], pads=[1, 1, 1, 1]),
]
graph = helper.make_graph(
    nodes,
    "quantized",
    [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 3, 8, 8])],
    [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 4, 8, 8])],
    [numpy_helper.from_array(value, name) for name, value in constants.items()],
)
model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
onnx.checker.check_model(model)
onnx.save(model, "quantized.onnx")
words = ["-f", "ONNX", "--modelFile", "quantized.onnx", "--MNNModel", "quantized.mnn", "--bizCode", "x"]
done = subprocess.run([sys.executable, "-m", "MNN.tools.mnnconvert", *words], capture_output=True, text=True)
succeeded = "Converted Success!" in done.stdout + done.stderr
print(f"converter: exit {done.returncode}, {'Converted Success!' if succeeded else 'no success'}")
network = nn.load_module_from_file("quantized.mnn", ["x"], ["y"])
found = network.forward([F.const(random.random((1, 3, 8, 8), np.float32), [1, 3, 8, 8], F.NCHW)])
print(f"network: {len(found)} outputs, one was asked for")
sys.exit(0 if done.returncode == 0 and succeeded and not found else 1)
PYTHON
