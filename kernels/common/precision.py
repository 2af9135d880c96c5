"""What the operators do for precision: autocast stays outside, and gradients left by a forward pass are scaled late.

A loss that is a scalar of the batch knows its gradient when it has run, and keeps it; backward multiplies it by the
upstream gradient. In float16 that upstream holds the scale (2^16, say) that lifts small gradients into the range of
the dtype, so what is kept must not be rounded to float16 before.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

F = TypeVar("F", bound=Callable[..., Any])


def without_autocast(function: F) -> F:
    """The body of a registered operator, run outside of the caller's autocast region.

    Registered operators are not cast themselves, but matrix products inside of them would be. The device is that of the
    first argument, a tensor.
    """

    @functools.wraps(function)
    def body(*args: Any) -> Any:
        with torch.autocast(args[0].device.type, enabled=False):
            return function(*args)

    body.__signature__ = inspect.signature(function, eval_str=True)  # type: ignore[attr-defined]  # a schema is made of it
    return body  # type: ignore[return-value]


def kept_dtype(dtype: torch.dtype) -> torch.dtype:
    """Of a gradient that waits for its upstream, from the dtype of the input: float32 for float16, else the same."""
    return torch.float32 if dtype == torch.float16 else dtype


def scaled(kept: Tensor, upstream: Tensor, dtype: torch.dtype) -> Tensor:
    """kept * upstream in the dtype of the input: the backward pass.

    Raises:
        RuntimeError: a graph of this backward pass is wanted (create_graph). The kept gradient is a constant to
            autograd: second derivatives would be 0 without a word.
    """
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise RuntimeError(
            "this loss keeps the gradient of its forward pass and cannot be differentiated twice (create_graph=True); "
            "the `reference` beside it can"
        )
    return (kept * upstream).to(dtype)
