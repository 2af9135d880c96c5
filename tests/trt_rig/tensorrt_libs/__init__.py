"""Puts TensorRT-RTX and the bridge into the process: `tensorrt_bindings` imports this before its own library."""

from __future__ import annotations

import ctypes
from importlib import util
from pathlib import Path

# In the order of their dependencies: the library, its parser, then the bridge that answers in their place.
PATTERNS = ("libtensorrt_rtx.so.1.*", "libtensorrt_onnxparser_rtx.so.1.*")


def _load() -> None:
    found = util.find_spec("onnxruntime_ep_nv_tensorrt_rtx")
    folders = [] if found is None else list(found.submodule_search_locations or [])
    if not folders:
        raise ImportError("the rig needs the package onnxruntime-ep-nv-tensorrt-rtx-cu13")
    libraries = [library for pattern in PATTERNS for library in sorted(Path(folders[0]).glob(pattern))]
    for library in (*libraries, *sorted(Path(__file__).parent.glob("bridge_*.so"))):
        ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)


_load()
