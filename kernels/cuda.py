"""The CUDA C++ versions (`csrc/`) of `iou_loss` and `mc_dropout`, for machines without Triton (Jetson, Windows).

They are compiled by torch's extension loader when first used, which takes a minute and needs nvcc and a host compiler;
torch keeps the result (in TORCH_EXTENSIONS_DIR). `python -m kernels.cuda` does it ahead of time, also on a machine
without a GPU where TORCH_CUDA_ARCH_LIST says for which ("8.7" is Jetson Orin).
"""

from __future__ import annotations

import functools
import os
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kernels.dropout import Dropout, three_dimensions
from kernels.dropout_table import table

SOURCES = Path(__file__).parent / "csrc"
KINDS = {"iou": 0, "giou": 1, "diou": 2, "ciou": 3}
COMBINE = {"none": 0, "sum": 1, "mean": 2}
WORD = (1 << 32) - 1


def iou_loss(
    boxes: Tensor, target: Tensor, weight: Tensor | None, kind: str, eps: float, boxes_grad: bool, target_grad: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss [] and the gradients to boxes and target ([N, 4] in their dtypes, or empty). All inputs contiguous."""
    weight = None if weight is None else weight.float()
    return load().iou_loss(_aligned(boxes), _aligned(target), weight, KINDS[kind], eps, boxes_grad, target_grad)


def mc_dropout(x: Tensor, dropout: Dropout, variance: bool) -> tuple[Tensor, Tensor | None]:
    """out and var, both like x. The same random numbers as the Triton kernel's."""
    source, arguments = _source(x, dropout)
    out, var = load().mc_dropout(source, arguments, variance)
    return _like(out, x), _like(var, x) if variance else None


def mc_dropout_backward(grad_out: Tensor, grad_var: Tensor, x: Tensor, dropout: Dropout) -> Tensor:
    """Gradient like x from those of out and var."""
    source, arguments = _source(x, dropout)
    gradients = (_aligned(_like(gradient, source)) for gradient in (grad_out, grad_var))
    return _like(load().mc_dropout_backward(*gradients, source, arguments), x)


@functools.cache
def load() -> Any:
    """The compiled extension.

    Raises:
        RuntimeError: there is no nvcc, or no GPU and no TORCH_CUDA_ARCH_LIST; or the compiler failed.
    """
    from torch.utils import cpp_extension

    if not _nvcc_exists():
        raise RuntimeError(
            "the CUDA C++ kernels need nvcc: install the CUDA toolkit and set CUDA_HOME, or use backend auto"
        )
    if not torch.cuda.is_available() and not os.environ.get("TORCH_CUDA_ARCH_LIST"):
        raise RuntimeError(
            "the CUDA C++ kernels are compiled for the GPU of this machine, but PyTorch finds none: set "
            "TORCH_CUDA_ARCH_LIST (e.g. 8.7) to compile for another machine, or use backend auto"
        )
    return cpp_extension.load(
        name="detector_kernels_cuda",
        sources=[str(SOURCES / name) for name in ("bindings.cpp", "iou_loss.cu", "mc_dropout.cu")],
        extra_cuda_cflags=["-O3"],
        with_cuda=True,
    )


def _nvcc_exists() -> bool:
    from torch.utils import cpp_extension

    home = cpp_extension.CUDA_HOME
    return home is not None and (Path(home) / "bin" / ("nvcc.exe" if os.name == "nt" else "nvcc")).exists()


# Layouts --------------------------------------------------------------------------------------------------------


def _source(x: Tensor, dropout: Dropout) -> tuple[Tensor, Any]:
    """x in a layout that the kernels read, and the `Arguments` of the extension."""
    B, C, S = three_dimensions(x, dropout.mode)
    channels_last = not x.is_contiguous() and x.dim() >= 3 and x.movedim(1, -1).is_contiguous()
    tables = table(dropout.rates, x.device)
    first = tables.groups[0]
    one_rate = len(tables.groups) == 1 and first.rate is not None
    arguments = load().Arguments(
        [B, C, S, int(channels_last)],
        [dropout.seed & WORD, dropout.seed >> 32, dropout.offset & WORD, dropout.offset >> 32],
        tables.header,
        tables.words,
        None if one_rate else tables.mean,
        None if one_rate else tables.variance,
        first.copies if one_rate else 0,
        first.per_copy,
        first.per_pair,
        dropout.mode == "channel",
        COMBINE[dropout.combine],
    )
    return _aligned(x if channels_last else x.contiguous()), arguments


def _like(t: Tensor, model: Tensor) -> Tensor:
    """t with the memory layout that `torch.empty_like(model)` has."""
    wanted = torch.empty_like(model, device="meta").stride()
    return t if t.stride() == wanted else torch.empty_like(model).copy_(t)


def _aligned(x: Tensor) -> Tensor:
    """A view may begin anywhere; the kernels read 16 bytes at a time."""
    return x.clone() if x.data_ptr() % 16 else x


if __name__ == "__main__":
    try:
        print(f"compiled: {load().__file__}")
    except RuntimeError as error:
        sys.exit(f"error: {str(error).splitlines()[0]}")
