"""A file of `deploy.targets.litert` in LiteRT, once TensorFlow Lite, on its CPU. No torch; `ai_edge_litert` is imported
when one opens."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from deploy.core.card import OUTPUTS, Form, card_beside
from deploy.core.environment import usable_cores
from deploy.core.errors import UserError, first_line
from deploy.core.import_path import import_extra
from deploy.runtimes.base import DetectionBatch, check_images, in_form, need_card_of, need_input

FORM = Form(batch=1)
"""Of its files."""


class LiteRTRunner:
    """Runs `path` on the CPU (XNNPACK), an image at a time, which is channels last there. threads: None: one a core.

    Raises UserError when LiteRT or the card beside the file is missing, and for a file that it cannot load.
    """

    backend, on_cpu = "litert cpu", True

    def __init__(self, path: Path, *, threads: int | None = None) -> None:
        path = Path(path)
        if not path.is_file():
            raise UserError(f"{path}: no such file")
        self.threads = threads
        self.card = card_beside(path)
        need_card_of(path, self.card, FORM)
        interpreter = import_extra("ai_edge_litert.interpreter", "litert", "ai-edge-litert").Interpreter
        try:
            self._interpreter = interpreter(model_path=str(path), num_threads=threads or usable_cores())
            self._interpreter.allocate_tensors()  # or what XNNPACK cannot take is told of at the first image
            self._network = self._interpreter.get_signature_runner()
        except (ValueError, RuntimeError) as error:
            raise UserError(f"{path}: LiteRT cannot load it: {first_line(error)}") from error
        takes, gives = self._network.get_input_details(), sorted(self._network.get_output_details())
        if list(takes) != ["images"] or gives != sorted(OUTPUTS):
            raise UserError(f"{path}: not a deployable file: it takes {list(takes)} and gives {gives}")
        need_input(path, self.card, takes["images"]["shape"].tolist(), (1, *self.card.input_size, 3))

    def __call__(self, images: np.ndarray) -> DetectionBatch:
        check_images(images, self.card)
        return in_form(self.card, self._run, images)

    def _run(self, images: np.ndarray) -> list[np.ndarray]:
        found = self._network(images=np.ascontiguousarray(images.transpose(0, 2, 3, 1)))
        return [found[name] for name in OUTPUTS]
