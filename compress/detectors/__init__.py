"""Detectors: backbones, the GFL head, assignment, suppression, checkpoints."""

from __future__ import annotations

from compress import require_own_kernels

require_own_kernels()  # everything here stands on our package `kernels`; another one has the same name
