"""A file of `deploy.targets.ncnn` in ncnn, on its CPU: the network alone, decoded here. No torch; `ncnn` is imported
when one opens."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import numpy as np

from deploy.core.card import Heads, ModelCard, card_beside
from deploy.core.environment import usable_cores
from deploy.core.errors import UserError
from deploy.core.import_path import import_extra
from deploy.core.storage import is_file
from deploy.runtimes.base import DetectionBatch, check_images, in_form


class NCNNRunner:
    """Runs `path` on the CPU in float32, an image at a time. threads: None: one a core.

    Raises UserError when ncnn, the weights or the card beside the file are missing, and for a file that it cannot load.
    """

    backend, on_cpu = "ncnn cpu", True

    def __init__(self, path: Path, *, threads: int | None = None) -> None:
        path = Path(path)
        weights = weights_beside(path)
        for file in (path, weights):
            if not is_file(file):
                raise UserError(f"{file}: no such file")
        self.threads = threads
        self.card = card_beside(path, weights)
        if self.card.form.heads is None:
            raise UserError(f"{path}: its card does not say what it gives; make it with compress export --for ncnn")
        self._path = path
        self._gives = _gives(self.card, self.card.form.heads)
        self._ncnn = load_ncnn()
        self._network = self._ncnn.Net()
        options = self._network.opt
        options.num_threads = threads or usable_cores()
        options.use_fp16_packed = options.use_fp16_storage = options.use_fp16_arithmetic = False
        options.use_bf16_storage = False
        if self._network.load_param(str(path)) or self._network.load_model(str(weights)):
            raise UserError(f"{path}: ncnn cannot load it")

    def __call__(self, images: np.ndarray) -> DetectionBatch:
        check_images(images, self.card)
        return in_form(self.card, self._run, images)

    def _run(self, images: np.ndarray) -> list[np.ndarray]:
        extractor = self._network.create_extractor()  # one keeps what it computed: each image needs its own
        given = np.ascontiguousarray(images[0])
        extractor.input("images", self._ncnn.Mat(given).clone())
        found = []
        for name, wanted in self._gives.items():
            failed, value = extractor.extract(name)
            if failed:
                raise UserError(f"{self._path}: ncnn does not give {name}")
            values = np.array(value)
            if values.shape != wanted:
                sizes = " and by its card ".join("x".join(map(str, shape)) for shape in (values.shape, wanted))
                raise UserError(f"{self._path}: {name} is {sizes}: the card beside it is another model's")
            found.append(values[None])
        return found


def _gives(card: ModelCard, heads: Heads) -> dict[str, tuple[int, int, int]]:
    """The shape [C, h, w] of each output, in their order."""
    channels = {"cls": len(card.class_names), "box": 4 * heads.bins, "ctr": 1}
    shapes = {}
    for name in heads.names:
        kind, stride = name.split("_")
        height, width = (math.ceil(side / int(stride)) for side in card.input_size)
        shapes[name] = (channels[kind], height, width)
    return shapes


def load_ncnn() -> Any:
    """The package. Raises UserError when it is missing.

    Its threads spin while they wait for each other, layer by layer, which its OpenMP library is told when it is loaded.
    With as many threads as cores and other work beside them a call of 8 ms then takes up to two seconds; so they sleep.
    """
    given = os.environ.get("OMP_WAIT_POLICY")
    os.environ["OMP_WAIT_POLICY"] = given or "passive"
    try:
        return import_extra("ncnn", "ncnn")
    finally:
        if given is None:
            del os.environ["OMP_WAIT_POLICY"]


def weights_beside(path: Path) -> Path:
    """`student.ncnn.param` → `student.ncnn.bin`."""
    return path.with_suffix(".bin")
