"""A file of `deploy.targets.tract` in tract, the runtime of Rust, by its Python package. No torch; `tract` is imported
when one opens. It computes on one thread."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from deploy.core.card import OUTPUTS, scanned_card
from deploy.core.errors import UserError, first_line
from deploy.core.import_path import import_extra
from deploy.runtimes.base import DetectionBatch, check_images, in_form, need_input


class TractRunner:
    """Runs `path` on the CPU, an image at a time. Raises UserError when tract is missing, and for a file of another
    form."""

    backend, on_cpu = "tract cpu", True

    def __init__(self, path: Path) -> None:
        path = Path(path)
        if not path.is_file():
            raise UserError(f"{path}: no such file")
        tract = import_extra("tract", "tract")
        self.card = scanned_card(path)
        if self.card.form.batch is None or self.card.form.labels != "int32":
            raise UserError(f"{path}: tract takes a fixed batch and int32 labels: compress export {path} --for tract")
        try:
            model = tract.onnx().load(str(path)).into_model()
            shapes = [[int(side) for side in fact.dims()] for fact in model.input_facts()]
            gives = model.output_count()
            self._model = model.into_runnable()
        except Exception as error:  # its own type, made when the library is there
            raise UserError(f"{path}: tract cannot load it: {first_line(error)}") from error
        if (len(shapes), gives) != (1, len(OUTPUTS)):
            raise UserError(f"{path}: not a deployable file: it takes {len(shapes)} inputs and gives {gives} outputs")
        need_input(path, self.card, shapes[0], (self.card.form.batch, 3, *self.card.input_size))

    def __call__(self, images: np.ndarray) -> DetectionBatch:
        check_images(images, self.card)
        return in_form(self.card, self._run, images)

    def _run(self, images: np.ndarray) -> list[np.ndarray]:
        # Outputs have the names of their nodes, so that only their order says which is which.
        return [value.to_numpy() for value in self._model.run([np.ascontiguousarray(images)])]
