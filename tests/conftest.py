"""Triton's interpreter for machines without a GPU. Here, and not in tests/kernels, because the choice is made when
triton is imported first, and torchvision imports it."""

from __future__ import annotations

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
