#!/usr/bin/env bash
# torch 2.14.1 and onnxscript 0.7.2, torch.onnx.export(dynamo=True) of integer division, run in onnxruntime 1.31.1.
# Expected: int64 in, int64 out: torch.div(x, 3, rounding_mode="trunc" or "floor") gives the same integers in the file as
# in torch, as x // 3 does.
# Happens: both rounding modes become Cast to float32, Div, Floor, Cast back, so from 2**24 on other integers come out,
# without a warning: 50331651 // 3 is 16777217, the file says 16777218. An index that is computed so leads elsewhere.
# `x // 3` is right, in eight nodes with an Equal of booleans among them; torch.ops.prims.div is one Div and right, too.
# Seen:
#   div trunc: torch [16777217, 366503875925], file [16777218, 366503886848]
#   div floor: torch [16777217, 366503875925], file [16777218, 366503886848]
#   //: torch [16777217, 366503875925], file [16777217, 366503875925]
#   prims.div: torch [16777217, 366503875925], file [16777217, 366503875925]
# Exits with 1 when that changes.
set -euo pipefail
venv=$(mktemp -d)
trap 'rm -rf "$venv"' EXIT
python3 -m venv "$venv"
"$venv/bin/pip" install -q torch==2.14.1 onnx==1.23.2 onnxscript==0.7.2 onnxruntime==1.31.1 numpy
cd "$venv"
"$venv/bin/python" -W ignore - <<'PYTHON'
import sys

import onnxruntime
import torch

WAYS = {
    "div trunc": lambda x: torch.div(x, 3, rounding_mode="trunc"),
    "div floor": lambda x: torch.div(x, 3, rounding_mode="floor"),
    "//": lambda x: x // 3,
    "prims.div": lambda x: torch.ops.prims.div(x, torch.tensor(3)),
}


class Divide(torch.nn.Module):
    def forward(self, x):
        return tuple(way(x) for way in WAYS.values())


x = torch.tensor([16_777_217 * 3, 2**40 + 1])
program = torch.onnx.export(Divide().eval(), (x,), dynamo=True, opset_version=20, verbose=False)
session = onnxruntime.InferenceSession(program.model_proto.SerializeToString(), providers=["CPUExecutionProvider"])
found = session.run(None, {session.get_inputs()[0].name: x.numpy()})
right = []
for name, wanted, value in zip(WAYS, Divide()(x), found):
    print(f"{name}: torch {wanted.tolist()}, file {value.tolist()}")
    right.append(wanted.tolist() == value.tolist())
sys.exit(0 if right == [False, False, True, True] else 1)
PYTHON
