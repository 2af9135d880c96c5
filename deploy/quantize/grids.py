"""The activations of an int8 graph: which tensors are quantized, on what grid, and between which layers they lie.

Tensor names belong to one exported file; the layers around a tensor belong to the detector. So a grid that was trained
for a detector is described by layers, and finds its tensor in any export of the same detector (`trained_tensors`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import onnx
from onnx import numpy_helper
from pydantic import BaseModel, ConfigDict, Field

from deploy.core.errors import UserError
from deploy.graph.structure import Structure

Call = tuple[str, int]
"""A layer, and which of its uses: a head that five levels share is called five times."""


class Grid(BaseModel):
    """The integers of one activation tensor: real = scale * (integer - zero_point)."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    scale: float = Field(gt=0, allow_inf_nan=False)
    """A float32 number."""
    zero_point: int
    made_by: Call | None
    """The layer whose result it is, a ReLU right behind included; None: something else computes it."""
    taken_by: tuple[Call, ...]
    """The layers that compute with it."""

    @property
    def place(self) -> tuple[Call | None, tuple[Call, ...]]:
        """Identity of the tensor in any export of the detector."""
        return self.made_by, self.taken_by


class Grids(BaseModel):
    """All that training decides about an int8 file besides its weights."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    target: Literal["tensorrt", "cpu"]
    weight_bits: Literal[7, 8]
    float_layers: tuple[str, ...]
    activations: tuple[Grid, ...]

    @property
    def integers(self) -> tuple[int, int]:
        """The lowest and the highest integer of an activation."""
        return (-128, 127) if self.target == "tensorrt" else (0, 255)

    @property
    def weight_limit(self) -> int:
        """Weights lie in -limit..limit."""
        return 127 if self.weight_bits == 8 else 64


def grids_of(model: onnx.ModelProto, structure: Structure) -> dict[str, Grid]:
    """Tensor → grid of the int8 graph `model`, in the order of the graph.

    `structure` is that of the float graph, whose order tells the calls of a layer apart. Raises ValueError for a
    quantized activation that touches no layer.
    """
    values = {item.name: item for item in model.graph.initializer}
    quantized = {
        node.output[0]: node
        for node in model.graph.node
        if node.op_type == "QuantizeLinear" and node.input[0] not in values
    }
    behind = {
        node.output[0]: quantized[node.input[0]].input[0]
        for node in model.graph.node
        if node.op_type == "DequantizeLinear" and node.input[0] in quantized
    }
    made: dict[str, Call] = {}
    taken: dict[str, list[Call]] = {node.input[0]: [] for node in quantized.values()}
    nodes = {node.name: node for node in model.graph.node}
    for layer in structure.layers:
        for call, name in enumerate(layer.nodes):
            if nodes[name].input[0] in behind:
                taken[behind[nodes[name].input[0]]].append((layer.name, call))
            if nodes[name].output[0] in taken:
                made[nodes[name].output[0]] = (layer.name, call)
    found = {}
    for node in quantized.values():
        tensor = node.input[0]
        if tensor not in made and not taken[tensor]:
            raise ValueError(f"{tensor} is quantized, but no layer makes it or takes it")
        found[tensor] = Grid(
            scale=float(numpy_helper.to_array(values[node.input[1]])),
            zero_point=int(numpy_helper.to_array(values[node.input[2]])),
            made_by=made.get(tensor),
            taken_by=tuple(taken[tensor]),
        )
    return found


def trained_tensors(found: dict[str, Grid], trained: Sequence[Grid], where: str) -> dict[str, Grid]:
    """Tensor → trained grid, for the tensors of `grids_of`. Raises UserError when the two are not of one detector."""
    wanted = {grid.place: grid for grid in trained}
    if len(wanted) != len(found) or any(grid.place not in wanted for grid in found.values()):
        raise UserError(
            f"{where}: the trained grids are for {len(wanted)} activations of a detector, and this one has "
            f"{len(found)}, or others: train again"
        )
    return {tensor: wanted[grid.place] for tensor, grid in found.items()}


def as_override(grid: Grid, target: str) -> list[dict[str, np.ndarray]]:
    """The grid as an entry of onnxruntime.quantization's `TensorQuantOverrides`."""
    kind = np.int8 if target == "tensorrt" else np.uint8
    return [{"scale": np.array(grid.scale, np.float32), "zero_point": np.array(grid.zero_point, kind)}]
