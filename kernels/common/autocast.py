"""Registered operators and autocast: their bodies run outside of the caller's autocast region."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, TypeVar

import torch

F = TypeVar("F", bound=Callable[..., Any])


def without_autocast(function: F) -> F:
    """Wrap the body of a registered operator so that it runs outside of the caller's autocast region.

    Registered operators are not cast themselves, but matrix products inside of them would be. The device is that of the
    first argument, a tensor.
    """

    @functools.wraps(function)
    def body(*args: Any) -> Any:
        with torch.autocast(args[0].device.type, enabled=False):
            return function(*args)

    body.__signature__ = inspect.signature(function, eval_str=True)  # type: ignore[attr-defined]  # a schema is made of it
    return body  # type: ignore[return-value]
