"""The glue of losses that are scalars of the batch: forward leaves the gradient behind, backward is a multiplication.

Every such loss is one registered operator that returns the loss first, then what else it computes, and the gradients
of its inputs. `register_backward` is all that autograd needs to know about it.

In float16 the upstream gradient holds the scale (2^16, say) that lifts small gradients into the range of the dtype, so
what is left must not be rounded to float16 before: it is kept in `kept_dtype`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.library import CustomOpDef  # type: ignore[attr-defined]  # public, but not in its __all__


def kept_dtype(dtype: torch.dtype) -> torch.dtype:
    """Dtype of a gradient that waits for its upstream, from the dtype of the input: float32 for float16, else equal."""
    return torch.float32 if dtype == torch.float16 else dtype


def kept_like(x: Tensor, wanted: bool) -> Tensor:
    """Memory for the left gradient of x, in its memory format; empty [0] where it is not asked for."""
    return torch.empty_like(x, dtype=kept_dtype(x.dtype)) if wanted else x.new_empty(0)


def register_backward(operator: CustomOpDef, left: Mapping[int, int]) -> None:
    """Register the backward pass of an operator whose forward pass leaves its gradients behind.

    Args:
        operator: its output 0 is the scalar loss; no gradient comes through its other outputs.
        left: index of an output → index of the input whose gradient it is. An output of another shape than that input
            is a gradient that was not asked for.
    """

    def keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.save_for_backward(*[output[index] for index in left])
        ctx.inputs = len(inputs)
        ctx.of = [(inputs[index].shape, inputs[index].dtype) for index in left.values()]

    def scale(ctx: Any, upstream: Tensor, *_: object) -> tuple[Tensor | None, ...]:
        gradients: list[Tensor | None] = [None] * ctx.inputs
        for kept, index, (shape, dtype) in zip(ctx.saved_tensors, left.values(), ctx.of, strict=True):
            if kept.shape == shape:
                gradients[index] = scaled(kept, upstream, dtype)
        return tuple(gradients)

    operator.register_autograd(scale, setup_context=keep)


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
