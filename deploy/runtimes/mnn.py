"""A file of `deploy.targets.mnn` in MNN, on its CPU. No torch; `MNN` is imported when one opens."""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from deploy.core.card import OUTPUTS, Form, card_beside
from deploy.core.environment import usable_cores
from deploy.core.errors import UserError, first_line
from deploy.core.import_path import import_extra
from deploy.runtimes.base import DetectionBatch, check_images, in_form, need_card_of, need_input

FORM = Form(labels="int32")
"""Of its files."""


class MNNRunner:
    """Runs `path` on the CPU in float32 (MNN's precision `high`; its default may compute in less where the processor
    can). threads: None: one a core.

    Raises UserError when MNN or the card beside the file is missing, and for a file that it cannot load.
    """

    backend, on_cpu = "mnn cpu", True

    def __init__(self, path: Path, *, threads: int | None = None) -> None:
        path = Path(path)
        if not path.is_file():
            raise UserError(f"{path}: no such file")
        self.threads = threads
        self._path = path
        self.card = card_beside(path)
        need_card_of(path, self.card, FORM)
        self._expr, nn = load_mnn()
        with _stdout_as_stderr():
            manager = nn.create_runtime_manager(
                ({"backend": "CPU", "numThread": threads or usable_cores(), "precision": "high"},)
            )
            try:
                network = nn.load_module_from_file(str(path), ["images"], list(OUTPUTS), runtime_manager=manager)
            except SystemError as error:  # how its binding passes on what it raises
                said = first_line(error.__cause__ or error).removesuffix(f" {path}")
                raise UserError(f"{path}: MNN cannot load it: {said}") from error
            values = self._expr.load_as_dict(str(path))  # 20 ms; the module does not tell what it takes
        if network is None or "images" not in values:
            raise UserError(f"{path}: MNN cannot load it, or it is not a deployable file")
        need_input(path, self.card, values["images"].shape[1:], (3, *self.card.input_size))
        self._network = network

    def __call__(self, images: np.ndarray) -> DetectionBatch:
        check_images(images, self.card)
        return in_form(self.card, self._run, images)

    def _run(self, images: np.ndarray) -> list[np.ndarray]:
        given = self._expr.const(np.ascontiguousarray(images), list(images.shape), self._expr.NCHW, self._expr.uint8)
        found = self._network.forward([given])
        if len(found) != len(OUTPUTS):  # MNN tells of no error
            raise UserError(f"{self._path}: MNN gave {len(found)} outputs, not {len(OUTPUTS)}: it cannot run this")
        return [value.read().copy() for value in found]  # a view of memory that the next call takes


def load_mnn() -> tuple[Any, Any]:
    """`MNN.expr` and `MNN.nn`. Raises UserError when the package is missing."""
    with _stdout_as_stderr():
        return import_extra("MNN.expr", "mnn", "MNN"), import_extra("MNN.nn", "mnn", "MNN")


# --- details --------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _stdout_as_stderr() -> Iterator[None]:
    """Send to stderr what C++ prints to stdout, which may be for results alone."""
    try:
        stdout = os.dup(1)
    except OSError:  # it is closed
        yield
        return
    try:
        _flush_c()
        with contextlib.suppress(OSError):  # stderr is closed
            os.dup2(2, 1)
        yield
    finally:
        _flush_c()  # C keeps lines for a pipe or a file until much later
        os.dup2(stdout, 1)
        os.close(stdout)


def _flush_c() -> None:
    if sys.platform != "win32":
        ctypes.CDLL(None).fflush(None)
