#!/usr/bin/env bash
# onnxruntime.quantization 1.31.1, a float16 convolution whose weights reach 0.005, symmetric int8 weights.
# Expected: weights of up to 127 with a scale of 0.005 / 127 = 3.9e-5 (float16 has numbers down to 6e-8), or a word.
# Happens: scale 1 and nothing but zeros, silently: a scale below 6.1e-5, the smallest normal float16, counts as none.
# The same weights in float32 are quantized well.
# Exits with 1 when that changes.
set -euo pipefail
venv=$(mktemp -d)
trap 'rm -rf "$venv"' EXIT
python3 -m venv "$venv"
"$venv/bin/pip" install -q onnxruntime==1.31.1 onnx==1.23.2 numpy
"$venv/bin/python" - <<'PYTHON'
import sys
import tempfile
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static


class One(CalibrationDataReader):
    def __init__(self, kind):
        self.left = [{"x": np.ones((1, 3, 4, 4), kind)}]

    def get_next(self):
        return self.left.pop() if self.left else None


weights = np.random.default_rng(0).uniform(-0.005, 0.005, (2, 3, 1, 1))
largest = {}
for kind, onnx_kind in ((np.float32, TensorProto.FLOAT), (np.float16, TensorProto.FLOAT16)):
    graph = helper.make_graph(
        [helper.make_node("Conv", ["x", "w"], ["y"], "conv")],
        "small",
        [helper.make_tensor_value_info("x", onnx_kind, [1, 3, 4, 4])],
        [helper.make_tensor_value_info("y", onnx_kind, [1, 2, 4, 4])],
        [numpy_helper.from_array(weights.astype(kind), "w")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    with tempfile.TemporaryDirectory() as folder:
        source, out = Path(folder, "float.onnx"), Path(folder, "int8.onnx")
        onnx.save(model, source)
        options = {"ActivationSymmetric": True, "WeightSymmetric": True, "QuantizeBias": False}
        quantize_static(source, out, One(kind), per_channel=True, weight_type=QuantType.QInt8,
                        activation_type=QuantType.QInt8, extra_options=options)
        values = {item.name: numpy_helper.to_array(item) for item in onnx.load(out).graph.initializer}
    largest[kind] = int(np.abs(values["w_quantized"].astype(int)).max())
    print(f"onnxruntime {onnxruntime.__version__} {kind.__name__}: scales {values['w_scale']}, largest {largest[kind]}")
sys.exit(0 if largest[np.float32] == 127 and largest[np.float16] == 0 else 1)
PYTHON
