"""`import tensorrt` on TensorRT-RTX: NVIDIA's bindings under their public name, and one repair.

Methods of a network go through a table of functions. From the point where the two libraries have grown apart, the
bindings reach the wrong entry: `mark_weights_refittable` would call `addUnsqueeze`. The three methods that we need from
that part call the right entries here. `tests/deploy/tensorrt/test_build.py` sees that they do.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable

import tensorrt_bindings
from tensorrt_bindings import *  # noqa: F403

__version__ = tensorrt_bindings.__version__

_ENTRIES = {
    "mark_weights_refittable": 67,
    "unmark_weights_refittable": 68,
    "are_weights_marked_refittable": 69,
}  # of nvinfer1::apiv::VNetworkDefinition in TensorRT-RTX 1.7


def _method(entry: int) -> Callable[[object, str], bool]:
    pointer = ctypes.c_void_p
    function = ctypes.CFUNCTYPE(ctypes.c_bool, pointer, ctypes.c_char_p)

    def call(network: object, name: str) -> bool:
        """The Python object's first field is the C++ object; there, after its own table, is the implementation."""
        outer = pointer.from_address(id(network) + object.__basicsize__).value
        inner = pointer.from_address((outer or 0) + ctypes.sizeof(pointer)).value
        table = pointer.from_address(inner or 0).value
        address = pointer.from_address((table or 0) + entry * ctypes.sizeof(pointer)).value
        return function(address or 0)(inner, name.encode())

    return call


for _name, _entry in _ENTRIES.items():
    setattr(tensorrt_bindings.INetworkDefinition, _name, _method(_entry))
