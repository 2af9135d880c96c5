"""What makes exports cheaper in tests that are about something else. `torch.onnx.export` takes seconds of CPU time.

The fixture `few_rounds` of tests/conftest.py is for whole test files; its fixture `convert_once` is for all of them.
"""

from __future__ import annotations

import fcntl
import hashlib
import io
import os
import pickle
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import onnx
import pytest
from torch import Tensor, nn

from compress.export.nms import select_detections
from deploy.core.files import atomic_path
from deploy.graph import export
from tests.helpers.tiny_onnx import export_tiny

DEFAULTS = select_detections.__kwdefaults__
ALL = DEFAULTS["iterations"]


@contextmanager
def rounds(count: int) -> Iterator[None]:
    """Suppression has so many rounds, in PyTorch as in an exported graph: 4 instead of 32 save a third of an export.

    tests/deploy/graph/test_export.py and tests/compress/export/test_nms.py have all of them.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(DEFAULTS, "iterations", count)
        yield


ABOUT_CONVERSION = ("tests/deploy/graph/", "tests/compress/export/")
"""Tests that convert anew, whatever was converted before."""


@contextmanager
def conversions(folder: Path) -> Iterator[None]:
    """A module is converted once for all processes that share `folder`; the same class with the same weights then gives
    the same graph."""
    convert = export._convert

    def once(module: nn.Module, images: np.ndarray, opset: int) -> onnx.ModelProto:
        if os.environ.get("PYTEST_CURRENT_TEST", "").startswith(ABOUT_CONVERSION):
            return convert(module, images, opset)
        try:
            key = hashlib.sha256(_content(module, images.shape, opset, DEFAULTS["iterations"])).hexdigest()
        except (pickle.PicklingError, AttributeError, TypeError):  # with hooks, as `marked_for_half` sets them
            return convert(module, images, opset)
        file = folder / f"{key}.onnx"
        if not file.exists():
            with atomic_path(file) as temporary:
                temporary.write_bytes(convert(module, images, opset).SerializeToString())
        return onnx.load(file)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(export, "_convert", once)
        yield


def shared_folder(factory: pytest.TempPathFactory, name: str) -> Path:
    """A folder of the whole session, whatever the number of workers."""
    base = factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        base = base.parent  # each worker has a folder of its own in that of the session
    folder = base / name
    folder.mkdir(exist_ok=True)
    return folder


def _content(*values: object) -> bytes:
    buffer = io.BytesIO()
    _Pickler(buffer).dump(values)
    return buffer.getvalue()


class _Pickler(pickle.Pickler):
    """Tensors by their values; PyTorch's own way writes where they lie in memory."""

    def persistent_id(self, value: object) -> object:
        if isinstance(value, Tensor):
            return str(value.dtype), tuple(value.shape), value.detach().cpu().numpy().tobytes()
        return None


def tiny_file(factory: pytest.TempPathFactory) -> Path:
    """The file of `export_tiny`: made once in a session, whatever the number of workers; each has a copy of its own."""
    folder = shared_folder(factory, "tiny-once")
    with open(folder / "lock", "w") as lock, rounds(ALL):
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "tiny.onnx").exists():
            export_tiny(folder / "tiny.onnx")
    return Path(shutil.copy(folder / "tiny.onnx", factory.mktemp("tiny")))
