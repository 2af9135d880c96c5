"""The CUDA C++ kernels: their arithmetic on the host, what nvcc makes of them, and, on a GPU, they themselves."""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils import cpp_extension

from kernels.common import backend
from kernels.common.dropout import Dropout
from kernels.common.dropout_table import table
from kernels.csrc import build as cuda
from kernels.ops import cuda as cuda_calls
from kernels.ops import iou_loss as iou
from kernels.ops.mc_dropout import mc_dropout
from tests.helpers.kernel_boxes import KINDS, boxes
from tests.helpers.kernel_sass import by_targets

CSRC = cuda.SOURCES

HOST = """
#include "dropout.h"
#include "iou.h"

extern "C" void pairs(const float* a, const float* b, float* out, int n, float eps, int kind) {
  for (int i = 0; i < n; ++i) {
    const Box p{a[4 * i], a[4 * i + 1], a[4 * i + 2], a[4 * i + 3]};
    const Box q{b[4 * i], b[4 * i + 1], b[4 * i + 2], b[4 * i + 3]};
    const PairLoss r = kind == 0   ? pair_loss<Kind::iou>(p, q, eps)
                       : kind == 1 ? pair_loss<Kind::giou>(p, q, eps)
                       : kind == 2 ? pair_loss<Kind::diou>(p, q, eps)
                                   : pair_loss<Kind::ciou>(p, q, eps);
    const float row[9] = {r.loss,    r.by_a.x1, r.by_a.y1, r.by_a.x2, r.by_a.y2,
                          r.by_b.x1, r.by_b.y1, r.by_b.x2, r.by_b.y2};
    for (int j = 0; j < 9; ++j) out[9 * i + j] = row[j];
  }
}

extern "C" void factors(const unsigned* stream, const int* groups, const int* words, const float* means,
                        const float* variances, int group_count, int copies, float per_copy, float per_pair, bool whole,
                        int combine, int images, int channels, int positions, float* factor, float* variance) {
  const Draw draw{stream[0], stream[1], stream[2],   stream[3], groups, words, means,
                  variances, group_count, copies, per_copy, per_pair, whole, Combine(combine)};
  const int quads = (channels + 3) / 4;
  for (int b = 0; b < images; ++b)
    for (int c = 0; c < channels; ++c)
      for (int s = 0; s < positions; ++s, ++factor, ++variance) {
        const Quad q = draw_quad(draw, s, b * quads + c / 4);
        *factor = q.factor[c % 4];
        *variance = q.variance[c % 4];
      }
}
"""


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    compiler = shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        pytest.skip("no C++ compiler on this machine")
    folder = tmp_path_factory.mktemp("host")
    (folder / "host.cpp").write_text(HOST)
    library = folder / "host.so"
    command = [
        compiler,
        "-std=c++17",
        "-O1",
        "-Wall",
        "-Werror",
        "-Wno-unknown-pragmas",
        "-shared",
        "-fPIC",
        f"-I{CSRC}",
        "-o",
        str(library),
    ]
    subprocess.run([*command, str(folder / "host.cpp")], check=True)
    return ctypes.CDLL(str(library))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("made", ["boxes", "integers"])
def test_pairs_of_boxes_on_the_host(host: ctypes.CDLL, kind: iou.Kind, made: str) -> None:
    g = torch.Generator().manual_seed(3)
    a, b = (boxes(200, g, made) for _ in range(2))
    out = torch.empty(200, 9)
    host.pairs(_of(a), _of(b), _of(out), 200, ctypes.c_float(1e-6), KINDS.index(kind))
    wide = [x.double().requires_grad_() for x in (a, b)]
    rows = iou.iou_loss_rows(*wide, kind=kind)
    gradients = torch.autograd.grad(rows.sum(), wide)
    expected = torch.cat((rows[:, None], *gradients), 1).detach()
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max().clamp(max=1)))


@pytest.mark.parametrize("mode", ["elementwise", "channel"])
@pytest.mark.parametrize("rates", [(0.1,) * 10, (0.05, 0.05, 0.1, 0.3), tuple(0.02 * k for k in range(1, 11))])
def test_dropout_draws_what_triton_draws(
    host: ctypes.CDLL, device: torch.device, mode: str, rates: tuple[float, ...]
) -> None:
    shape = (2, 6, 11)
    dropout = Dropout(rates, seed=(5 << 40) + 17, offset=(3 << 33) + 4, mode=mode, combine="mean")  # type: ignore[arg-type]
    with backend.use("triton"):
        expected, expected_variance = mc_dropout(torch.ones(shape, device=device), dropout)
    tables = table(rates, torch.device("cpu"))
    first = tables.groups[0]
    one_rate = len(tables.groups) == 1 and first.rate is not None
    words = [dropout.seed & cuda_calls.WORD, dropout.seed >> 32, dropout.offset & cuda_calls.WORD, dropout.offset >> 32]
    factor, variance = torch.empty(shape), torch.empty(shape)
    host.factors(
        (ctypes.c_uint32 * 4)(*words),
        *(_of(x) for x in (tables.header, tables.words, tables.mean, tables.variance)),
        len(tables.groups),
        first.copies if one_rate else 0,
        ctypes.c_float(first.per_copy),
        ctypes.c_float(first.per_pair),
        ctypes.c_bool(mode == "channel"),
        cuda_calls.COMBINE[dropout.combine],
        *shape,
        _of(factor),
        _of(variance),
    )
    assert expected_variance is not None and len(factor.unique()) > 2
    torch.testing.assert_close(factor, expected.cpu())
    torch.testing.assert_close(variance, expected_variance.cpu())


@by_targets
@pytest.mark.parametrize("source", ["iou_loss.cu", "mc_dropout.cu"])
def test_nvcc_needs_no_local_memory(source: str, targets: tuple[int, ...], tmp_path: Path) -> None:
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("no nvcc on this machine")
    known = subprocess.run([nvcc, "--list-gpu-code"], capture_output=True, text=True, check=True).stdout.split()
    missing = [target for target in targets if f"sm_{target}" not in known]
    assert not missing, f"nvcc knows only {known}: install one that has {missing}"
    architectures = [word for target in targets for word in ("-gencode", f"arch=compute_{target},code=sm_{target}")]
    command = [nvcc, "-std=c++17", "-O3", "-fatbin", *architectures, "-Xptxas", "-v", "-o", str(tmp_path / "out")]
    report = subprocess.run([*command, str(CSRC / source)], capture_output=True, text=True, check=True).stderr
    functions = re.findall(r"Compiling entry function '(\w+)' for 'sm_(\d+)'", report)
    memory = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", report)
    assert {int(target) for _, target in functions} == set(targets)
    assert len(memory) == len(functions) >= 12 * len(targets)
    assert [row for row in zip(functions, memory, strict=True) if row[1] != ("0", "0", "0")] == []


def test_what_is_missing_is_said_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda.load.cache_clear()
    monkeypatch.setattr(cpp_extension, "CUDA_HOME", None)
    with pytest.raises(RuntimeError, match=r"^the CUDA C\+\+ kernels need nvcc: .*$"):
        cuda.load()
    monkeypatch.setattr(cuda, "_nvcc_exists", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    with pytest.raises(RuntimeError, match=r"^the CUDA C\+\+ kernels are compiled for the GPU .*$"):
        cuda.load()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU: the extension cannot run")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_extension_equals_triton(dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(0)
    results = []
    for name in ("cuda", "triton"):
        g.manual_seed(0)
        a, b = (boxes(1001, g).cuda().to(dtype).requires_grad_() for _ in range(2))
        with backend.use(name):  # type: ignore[arg-type]
            loss = iou.iou_loss(a, b, torch.rand(1001, generator=g).cuda(), kind="ciou")
        results.append((loss, *torch.autograd.grad(loss * 3, (a, b))))
    torch.testing.assert_close(
        *results, rtol=2e-3 if dtype == torch.float16 else None, atol=None if dtype != torch.float16 else 1e-3
    )
    dropout = Dropout((0.1,) * 5 + (0.2,) * 5, seed=7)
    for shape in ((2, 6, 5, 8), (2, 8, 5, 7), (3, 5), (2, 7, 3, 3)):
        for layout in (torch.contiguous_format, torch.channels_last)[: 1 + (len(shape) == 4)]:
            x = torch.randn(shape, generator=g).cuda().to(dtype).contiguous(memory_format=layout)
            drawn = []
            for name in ("cuda", "triton"):
                leaf = x.detach().requires_grad_()
                with backend.use(name):  # type: ignore[arg-type]
                    out, var = mc_dropout(leaf, dropout)
                    (gradient,) = torch.autograd.grad((out * 2 + var).sum(), leaf)
                drawn.append((out, var, gradient))
            torch.testing.assert_close(*drawn)


def _of(x: Tensor) -> ctypes.c_void_p:
    assert x.is_contiguous()
    return ctypes.c_void_p(x.data_ptr())
