"""Distillation: what a method is, and the methods."""

from __future__ import annotations

from compress import require_own_kernels

require_own_kernels()  # the losses are in our package `kernels`; another one has the same name
