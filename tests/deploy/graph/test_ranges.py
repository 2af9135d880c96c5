"""What of a graph fits into float16: magnitudes against NumPy, operator by operator, and what follows from them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from deploy.core.errors import UserError
from deploy.graph.half import halve, rounded, typed
from deploy.graph.ranges import measure
from deploy.graph.session import cpu_session
from tests.helpers.half_run import half_run, not_finite

IMAGES = np.random.default_rng(0).integers(1, 256, (5, 3, 6, 4), dtype=np.uint8)
X = IMAGES.astype(np.float64) / 64
WEIGHT = np.random.default_rng(1).normal(size=(4, 3, 1, 1))
Node = tuple[str, Sequence[str], dict[str, Any]]


def graph(nodes: Sequence[Node], constants: dict[str, Any], kind: int = TensorProto.DOUBLE) -> onnx.ModelProto:
    """A network of `nodes`, which takes x = images / 64 and whose last result is the output; node i gives "v<i>"."""
    made = [
        helper.make_node("Cast", ["images"], ["pixels"], "to_float", to=TensorProto.FLOAT),
        helper.make_node("Mul", ["pixels", "scale"], ["small"], "scaled"),
        helper.make_node("Cast", ["small"], ["x"], "enter", to=kind),
    ]
    for number, (op, inputs, attributes) in enumerate(nodes):
        made.append(helper.make_node(op, inputs, [f"v{number}"], f"n{number}", **attributes))
    made.append(helper.make_node("Cast", [f"v{len(nodes) - 1}"], ["out"], "leave", to=TensorProto.FLOAT))
    floating = np.float64 if kind == TensorProto.DOUBLE else np.float32
    arrays = {"scale": np.float32(1 / 64)}
    for name, value in constants.items():
        array = np.asarray(value)
        arrays[name] = array if array.dtype in (np.int64, np.bool_) else array.astype(floating)
    content = helper.make_graph(
        made,
        "network",
        [helper.make_tensor_value_info("images", TensorProto.UINT8, ["batch", 3, 6, 4])],
        [helper.make_tensor_value_info("out", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in arrays.items()],
    )
    return helper.make_model(content, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def sums(value: np.ndarray, axes: tuple[int, ...]) -> float:
    return float(np.abs(value).sum(axes).max())


HARD = np.array([1.0, -2.0, 3.0, 0.5])
AXES = {"axes": np.array([2, 3], np.int64)}
INSIDE: dict[str, tuple[Node, dict[str, Any], Callable[[], float]]] = {
    "mean": (("ReduceMean", ["x", "axes"], {}), AXES, lambda: sums(X, (2, 3))),
    "norm": (("ReduceL2", ["x", "axes"], {}), AXES, lambda: sums(X**2, (2, 3))),
    "global pool": (("GlobalAveragePool", ["x"], {}), {}, lambda: sums(X, (2, 3))),
    "pool": (("AveragePool", ["x"], {"kernel_shape": [2, 3]}), {}, lambda: 6 * X.max()),
    "layer norm": (("LayerNormalization", ["x", "w"], {"axis": -1}), {"w": np.ones(4)}, lambda: sums(X**2, (3,))),
    "instance norm": (
        ("InstanceNormalization", ["x", "w", "w"], {}), {"w": np.ones(3)}, lambda: sums(X**2, (2, 3))
    ),
    "softmax": (
        ("Softmax", ["x"], {"axis": 2}), {}, lambda: float(np.exp(X - X.max(2, keepdims=True)).sum(2).max())
    ),
    "conv": (
        ("Conv", ["x", "w"], {}), {"w": WEIGHT},
        lambda: float(np.einsum("nchw,oc->nohw", X, np.abs(WEIGHT[:, :, 0, 0])).max()),
    ),
    "product": (("MatMul", ["x", "x_turned"], {}), {}, lambda: float((X @ X.swapaxes(2, 3)).max())),
    "matrix": (("MatMul", ["x", "w"], {}), {"w": HARD[:, None]}, lambda: float((X @ np.abs(HARD)).max())),
    "hard swish": (("HardSwish", ["x"], {}), {}, lambda: 6 * X.max()),
}  # fmt: skip


@pytest.mark.parametrize("name", INSIDE)
def test_sums_inside_operators(name: str) -> None:
    node, constants, expected = INSIDE[name]
    turn: list[Node] = [("Transpose", ["x"], {"perm": [0, 1, 3, 2]})]
    node = (node[0], ["v0" if value == "x_turned" else value for value in node[1]], node[2])
    model = graph([*turn, node], constants, TensorProto.FLOAT)
    found = measure(model, ["x", "v0", "v1"], IMAGES, above=0.0)
    assert found.inside["n1"] == pytest.approx(expected(), rel=1e-4)
    assert found.largest["x"] == pytest.approx(X.max())
    if node[0] in ("Conv", "MatMul"):  # a bound that costs nothing, and is never too small
        loose = measure(model, ["x", "v0", "v1"], IMAGES, above=np.inf)
        assert loose.inside["n1"] >= found.inside["n1"] * (1 - 1e-6)


def first() -> Node:
    """A layer that hands on x, so that there is one."""
    return ("Conv", ["x", "w"], {})


EYE = np.eye(3)[:, :, None, None]
FADING = np.where(np.arange(9).reshape(3, 3, 1, 1), 4.5e-7, 1.3e-4)  # all but one have few bits left
KEPT: dict[str, tuple[list[Node], dict[str, Any], dict[str, str]]] = {
    "nothing": ([("Relu", ["v0"], {}), ("Sigmoid", ["v1"], {})], {}, {}),
    "large": ([("Mul", ["v0", "c"], {}), ("Mul", ["v1", "d"], {})], {"c": 9e3, "d": 1e-3},
              {"n1": "reaches 3.6e+04", "n2": "reaches 3.6e+04"}),
    "exponential": ([("Mul", ["v0", "c"], {}), ("Exp", ["v1"], {}), ("Log", ["v2"], {})], {"c": 4.0},
                    {"n2": "its result reaches", "n3": "v2 reaches"}),
    "shape of a large one": ([("Mul", ["v0", "c"], {}), ("Shape", ["v1"], {}), ("Mul", ["v1", "d"], {}),
                              ("Reshape", ["v3", "v2"], {})], {"c": 9e3, "d": 1e-3},
                             {"n1": "reaches 3.6e+04", "n3": "reaches 3.6e+04"}),
    "large constant": ([("Min", ["v0", "c"], {})], {"c": 1e30}, {"n1": "c reaches 1e+30"}),
    "small": ([("Mul", ["v0", "c"], {}), ("Mul", ["v1", "d"], {})], {"c": 1e-6, "d": 1e4},
              {"n1": "never exceeds 4e-06", "n2": "never exceeds 4e-06"}),
    "small bias": ([("Conv", ["v0", "w2", "b"], {})], {"w2": EYE, "b": np.full(3, 1e-6)}, {}),
    "small bias that is all": ([("Sub", ["v0", "v0"], {}), ("Conv", ["v1", "w2", "b"], {})],
                               {"w2": EYE, "b": np.full(3, 1e-6)}, {"w2": "never exceeds 1e-06"}),
    "dead branch": ([("Mul", ["v0", "c"], {}), ("Relu", ["v1"], {}), ("Add", ["v0", "v2"], {})], {"c": [1e-6]}, {}),
    "guard": ([("Add", ["v0", "c"], {})], {"c": 1e-12}, {"n1": "c never exceeds 1e-12"}),
    "divisor": ([("Mul", ["v0", "v0"], {}), ("Mul", ["v1", "v1"], {}), ("Reciprocal", ["v2"], {})], {},
                {"n2": "its result is as small as 6e-08 where it divides", "n3": "its result reaches 1.7e+07"}),
    "rounded away": ([("Conv", ["v0", "w2"], {})], {"w2": FADING},
                     {"w2": "w2 loses"}),
    "sum": ([("Mul", ["v0", "c"], {}), ("ReduceMean", ["v1", "axes"], {})], {"c": 8e2, **AXES},
            {"n2": "adds up"}),
    "cancelling": ([("Mul", ["v0", "c"], {}), ("Neg", ["v1"], {}), ("Concat", ["v1", "v2"], {"axis": 1}),
                    ("Conv", ["v3", "w2"], {})],
                   {"c": 5e3, "w2": np.ones((1, 6, 1, 1))}, {"w2": "adds up"}),
    "mask": ([("Greater", ["v0", "c"], {}), ("Where", ["v1", "v0", "d"], {}), ("Softmax", ["v2"], {})],
             {"c": 2.0, "d": -np.inf}, {}),
    "shared weight": ([("Conv", ["v0", "w2"], {}), ("Mul", ["v1", "c"], {}), ("Mul", ["v2", "c"], {}),
                       ("Conv", ["v3", "w2"], {})],
                      {"w2": EYE, "c": 1e2}, {"w2": "reaches", "n3": "reaches"}),
}  # fmt: skip


@pytest.mark.parametrize("name", KEPT)
def test_what_stays_in_float32(name: str) -> None:
    nodes, constants, expected = KEPT[name]
    model = graph([first(), *nodes], {"w": EYE, **constants})
    half, facts = halve(model, IMAGES)
    assert facts.float32.keys() == expected.keys() and facts.images == len(IMAGES)
    for kept, why in expected.items():
        assert why in facts.float32[kept]
    onnx.shape_inference.infer_shapes(half, strict_mode=True)
    wide = typed(model, {node.name for node in model.graph.node})
    values = half_run(half, {"images": IMAGES})
    assert name == "mask" or not_finite(values) == []
    for found in (values["out"], run(rounded(half))):
        np.testing.assert_allclose(found, run(wide), rtol=0.02, atol=1e-12)


def run(model: onnx.ModelProto) -> np.ndarray:
    return np.asarray(cpu_session(model.SerializeToString()).run(None, {"images": IMAGES})[0])


def test_a_graph_that_chooses_between_graphs_is_refused() -> None:
    def branch(op: str) -> onnx.GraphProto:
        result = helper.make_tensor_value_info("chosen", TensorProto.DOUBLE, None)
        return helper.make_graph([helper.make_node(op, ["v0"], ["chosen"], op)], op, [], [result])

    choice: Node = ("If", ["c"], {"then_branch": branch("Relu"), "else_branch": branch("Neg")})
    model = graph([first(), choice], {"w": EYE, "c": np.array(True)})
    with pytest.raises(UserError, match="fp16: If 'n1' chooses between graphs"):
        halve(model, IMAGES)
