#!/usr/bin/env bash
# iree-base-compiler 3.13.0 (llvm-cpu), an ONNX convolution with stride and padding whose window has room for one place
# on an axis while the padded map is longer than the window, as where a pyramid's last level is halved from 2 x 2 to 1 x 1.
# Expected: a module, as for maps of 1 and 3 places; onnx.reference computes it.
# Happens: an error about an operand that should be as long as the padded map, 4, and is as long as the kernel, 3: the
# window's walk of one step was dropped, and the whole map taken for the window. With an open batch the error is another,
# about a slice that runs out of bounds. One axis of the two is enough, so a canvas of which one side is small.
# Seen:
#   3x3 kernel, stride 2, map 1x1: compiled
#   5x5 kernel, stride 2, map 4x4: compiled
#   3x3 kernel, stride 3, map 4x4: compiled
#   3x3 kernel, stride 2, map 3x3: compiled
#   3x3 kernel, stride 2, map 4x4: compiled
#   3x3 kernel, stride 1, map 2x2: compiled
#   1x1 kernel, stride 2, map 2x2: compiled
#   3x3 kernel, stride 2, map 2x2: inferred input/output operand #1 has shape's dimension #2 to be 4, but found 3
#   3x3 kernel, stride 2, map 2x5: inferred input/output operand #1 has shape's dimension #2 to be 4, but found 3
#   3x3 kernel, stride 2, map 5x2: inferred input/output operand #1 has shape's dimension #3 to be 4, but found 3
#   3x3 kernel, stride 2, map 1x2: inferred input/output operand #1 has shape's dimension #3 to be 4, but found 3
#   5x5 kernel, stride 2, map 2x2: inferred input/output operand #1 has shape's dimension #2 to be 6, but found 5
#   3x3 kernel, stride 3, map 3x3: inferred input/output operand #1 has shape's dimension #2 to be 5, but found 3
#   3x3 kernel, stride 4, map 4x4: inferred input/output operand #1 has shape's dimension #2 to be 6, but found 3
#   3x3 kernel, stride 2, map 1x1, open batch: compiled
#   5x5 kernel, stride 2, map 4x4, open batch: compiled
#   3x3 kernel, stride 3, map 4x4, open batch: compiled
#   3x3 kernel, stride 2, map 3x3, open batch: compiled
#   3x3 kernel, stride 2, map 4x4, open batch: compiled
#   3x3 kernel, stride 1, map 2x2, open batch: compiled
#   1x1 kernel, stride 2, map 2x2, open batch: compiled
#   3x3 kernel, stride 2, map 2x2, open batch: slice along dimension 1 runs out-of-bounds: 127 >= 72
#   3x3 kernel, stride 2, map 2x5, open batch: slice along dimension 2 runs out-of-bounds: 3 >= 3
#   3x3 kernel, stride 2, map 5x2, open batch: slice along dimension 3 runs out-of-bounds: 3 >= 3
#   3x3 kernel, stride 2, map 1x2, open batch: slice along dimension 1 runs out-of-bounds: 95 >= 72
#   5x5 kernel, stride 2, map 2x2, open batch: slice along dimension 1 runs out-of-bounds: 287 >= 200
#   3x3 kernel, stride 3, map 3x3, open batch: slice along dimension 1 runs out-of-bounds: 199 >= 72
#   3x3 kernel, stride 4, map 4x4, open batch: slice along dimension 1 runs out-of-bounds: 287 >= 72
# Exits with 1 when that changes.
set -euo pipefail
venv=$(mktemp -d)
trap 'rm -rf "$venv"' EXIT
python3 -m venv "$venv"
"$venv/bin/pip" install -q 'iree-base-compiler[onnx]==3.13.0' onnx==1.23.2 numpy
cd "$venv"
PATH="$venv/bin:$PATH" "$venv/bin/python" - <<'PYTHON'
import re
import subprocess
import sys

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

CPU = ["--iree-hal-target-device=local", "--iree-hal-local-target-device-backends=llvm-cpu"]


def compiled(kernel: int, stride: int, height: int, width: int, batch: int | str) -> str:
    pad = kernel // 2
    shape = [(side + 2 * pad - kernel) // stride + 1 for side in (height, width)]
    weight = np.random.default_rng(0).standard_normal((8, 8, kernel, kernel)).astype(np.float32)
    node = helper.make_node("Conv", ["x", "w"], ["y"], strides=[stride] * 2, pads=[pad] * 4)
    graph = helper.make_graph(
        [node],
        "level",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [batch, 8, height, width])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [batch, 8, *shape])],
        [numpy_helper.from_array(weight, "w")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.checker.check_model(model, full_check=True)
    (found,) = ReferenceEvaluator(model).run(None, {"x": np.ones((1, 8, height, width), np.float32)})
    assert found.shape == (1, 8, *shape)
    onnx.save(model, "level.onnx")
    subprocess.run(["iree-import-onnx", "level.onnx", "-o", "level.mlir"], check=True, capture_output=True)
    done = subprocess.run(
        ["iree-compile", "level.mlir", *CPU, "-o", "level.vmfb"], check=False, capture_output=True, text=True
    )
    if done.returncode == 0:
        return "compiled"
    return re.search(r"inferred input/output.*|slice along.*", done.stderr).group()


COMPILED = [(3, 2, 1, 1), (5, 2, 4, 4), (3, 3, 4, 4), (3, 2, 3, 3), (3, 2, 4, 4), (3, 1, 2, 2), (1, 2, 2, 2)]
REFUSED = [(3, 2, 2, 2), (3, 2, 2, 5), (3, 2, 5, 2), (3, 2, 1, 2), (5, 2, 2, 2), (3, 3, 3, 3), (3, 4, 4, 4)]
fine = True
for batch in (1, "batch"):
    for kernel, stride, height, width in COMPILED + REFUSED:
        said = compiled(kernel, stride, height, width, batch)
        what = f"{kernel}x{kernel} kernel, stride {stride}, map {height}x{width}"
        print(f"{what}{', open batch' if batch != 1 else ''}: {said}")
        fine &= (said == "compiled") == ((kernel, stride, height, width) in COMPILED)
sys.exit(0 if fine else 1)
PYTHON
