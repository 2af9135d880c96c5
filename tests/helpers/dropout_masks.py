"""Fixed dropout masks through the operators: every backend's random numbers are replaced by a formula.

Copy k = 1..5 has rate p_k = (2 + k) / 20 and keeps element i iff (7 i + 3 k) mod 20 >= 2 + k (oracle A of UET).
"""

from __future__ import annotations

import dataclasses

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.common import dropout, dropout_table
from kernels.triton import dropout as triton_dropout

RATES = tuple((2 + k) / 20 for k in range(1, 6))
CHANNELS, POSITIONS = 4, 24  # of the maps the formula is for: a quad is an image


def install(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give every later draw of RATES these masks, on the PyTorch path and in Triton's interpreter."""
    monkeypatch.setattr(dropout, "_random", lambda index, key, key2: _numbers(index + key))
    monkeypatch.setattr(dropout, "_key", lambda drawn, image, group: (image * CHANNELS * POSITIONS, 0))
    monkeypatch.setattr(dropout, "table", _identity)
    monkeypatch.setattr(triton_dropout, "table", _identity)
    monkeypatch.setattr(triton_dropout, "philox", _philox)


def kept(elements: int) -> Tensor:
    """bool [5, elements]."""
    i = torch.arange(elements)
    return torch.stack([(7 * i + 3 * k) % 20 >= 2 + k for k in range(1, 6)])


def _identity(rates: tuple[float, ...], device: torch.device) -> dropout_table.Table:
    """The table of these rates with columns that are always their own outcome: the upper bits are the outcome."""
    true = dropout_table.table(rates, device)
    return dataclasses.replace(true, words=torch.arange(len(true.words), dtype=torch.int32, device=device))


def _numbers(i: Tensor) -> Tensor:
    outcome = torch.zeros_like(i)
    for k in range(1, 6):
        outcome = 2 * outcome + ((7 * i + 3 * k) % 20 >= 2 + k).to(i.dtype)
    return (outcome.long() << 27).to(torch.int32)


@triton.jit
def _number(i):
    outcome = i * 0
    for k in tl.static_range(1, 6):
        outcome = 2 * outcome + ((7 * i + 3 * k) % 20 >= 2 + k).to(tl.int32)
    return (outcome << 27).to(tl.uint32, bitcast=True)


@triton.jit
def _philox(c0, c1, c2, c3, k0, k1):
    i = c1 * 96 + c0
    return _number(i), _number(i + 24), _number(i + 48), _number(i + 72)
