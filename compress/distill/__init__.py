"""Distillation: what a method is, the methods, and where the teacher comes from."""

from __future__ import annotations

from compress import require_own_kernels

require_own_kernels()  # the losses are in our package `kernels`; another one has the same name
