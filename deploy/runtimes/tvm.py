"""A file of `deploy.targets.tvm`, compiled by Apache TVM for this machine's CPU when it is opened, which takes seconds.
No torch; `tvm` and `onnx` are imported then."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from deploy.core.card import OUTPUTS, scanned_card
from deploy.core.errors import UserError, first_line
from deploy.core.import_path import import_extra
from deploy.runtimes.base import DetectionBatch, check_images, in_form, need_input


class TVMRunner:
    """Runs `path` on the CPU, an image at a time, untuned and on one thread: detections are those that ship, latency
    is not.

    Raises UserError when TVM is missing, and for a file of another form or one that it cannot compile.
    """

    backend, on_cpu = "tvm cpu", True

    def __init__(self, path: Path) -> None:
        path = Path(path)
        if not path.is_file():
            raise UserError(f"{path}: no such file")
        self.card = scanned_card(path)
        if self.card.form.batch is None:
            raise UserError(f"{path}: TVM takes a fixed batch: compress export {path} --for tvm")
        self._tvm = import_extra("tvm", "tvm", "apache-tvm")
        self._run_graph = self._compiled(path)

    def __call__(self, images: np.ndarray) -> DetectionBatch:
        check_images(images, self.card)
        return in_form(self.card, self._run, images)

    def _run(self, images: np.ndarray) -> list[np.ndarray]:
        return [value.numpy() for value in self._run_graph(self._tvm.runtime.tensor(np.ascontiguousarray(images)))]

    def _compiled(self, path: Path) -> Any:
        onnx = import_extra("onnx", "tvm")
        relax = import_extra("tvm.relax", "tvm", "apache-tvm")
        frontend = import_extra("tvm.relax.frontend.onnx", "tvm", "apache-tvm")
        try:
            model = onnx.load(str(path))
            self._check(path, model.graph)
            module = frontend.from_onnx(model)
            # Code for the processor at hand (`mcpu`) took 1.9 times as long as this, with vectors of 512 bits.
            library = relax.build(module, self._tvm.target.Target("llvm"))
            return relax.VirtualMachine(library, self._tvm.cpu())["main"]
        except UserError:
            raise
        except Exception as error:  # dozens of types, from Python and from its library
            raise UserError(f"{path}: TVM cannot compile it: {first_line(error)}") from error

    def _check(self, path: Path, graph: Any) -> None:
        """Raise UserError for a graph that is not the card's, before it is compiled."""
        weights = {value.name for value in graph.initializer}
        given = [value for value in graph.input if value.name not in weights]
        inputs, outputs = ([value.name for value in values] for values in (given, graph.output))
        heads = self.card.form.heads
        if inputs != ["images"] or outputs != (list(OUTPUTS) if heads is None else heads.names):
            raise UserError(f"{path}: not a deployable file: it takes {inputs} and gives {outputs}")
        shape = [side.dim_value for side in given[0].type.tensor_type.shape.dim]
        need_input(path, self.card, shape, (self.card.form.batch, 3, *self.card.input_size))
