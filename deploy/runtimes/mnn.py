"""A file of `deploy.targets.mnn` in MNN, on its CPU. No torch; `MNN` is imported when one opens."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path
from typing import Any

import numpy as np

from deploy.core.card import card_beside
from deploy.core.environment import usable_cores
from deploy.core.errors import UserError
from deploy.core.import_path import import_extra
from deploy.runtimes.base import DetectionBatch, check_images, in_form

_OUTPUTS = ["boxes", "scores", "labels", "count"]


class MNNRunner:
    """Runs `path` on the CPU in float32 (MNN's precision `high`; its default may compute in less where the processor
    can). threads: None: one a core.

    Raises UserError when MNN or the card beside the file is missing.
    """

    backend, on_cpu = "mnn cpu", True

    def __init__(self, path: Path, *, threads: int | None = None) -> None:
        path = Path(path)
        if not path.is_file():
            raise UserError(f"{path}: no such file")
        self.threads = threads
        self.card = card_beside(path)
        self._expr, nn = load_mnn()
        with contextlib.redirect_stdout(io.StringIO()):
            manager = nn.create_runtime_manager(
                ({"backend": "CPU", "numThread": threads or usable_cores(), "precision": "high"},)
            )
            self._network = nn.load_module_from_file(str(path), ["images"], _OUTPUTS, runtime_manager=manager)
        if self._network is None:
            raise UserError(f"{path}: MNN cannot load it")

    def __call__(self, images: np.ndarray) -> DetectionBatch:
        check_images(images, self.card)
        return in_form(self.card, self._run, images)

    def _run(self, images: np.ndarray) -> list[np.ndarray]:
        given = self._expr.const(np.ascontiguousarray(images), list(images.shape), self._expr.NCHW, self._expr.uint8)
        found = self._network.forward([given])
        if len(found) != len(_OUTPUTS):  # MNN tells of no error
            raise UserError(f"{self.card.name}: MNN gave {len(found)} outputs, not {len(_OUTPUTS)}: it cannot run this")
        return [value.read().copy() for value in found]  # a view of memory that the next call takes


def load_mnn() -> tuple[Any, Any]:
    """`MNN.expr` and `MNN.nn`. Raises UserError when the package is missing."""
    return import_extra("MNN.expr", "mnn", "MNN"), import_extra("MNN.nn", "mnn", "MNN")
