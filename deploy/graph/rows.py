"""Rows that a network chose by their scores (queries): which of one run are which of another.

Rounding exchanges rows whose scores are nearly equal, so places in the list mean nothing.
"""

from __future__ import annotations

import numpy as np

Rows = tuple[np.ndarray, np.ndarray]
"""Scores [Q, K] and boxes [Q, 4] of an image."""


def twins(found: Rows, expected: Rows, units: tuple[float, float], *, within: float = np.inf) -> np.ndarray:
    """For each expected row the nearest row of `found` that is nobody else's, -1 where none is near: int64 [Q].

    Near pairs are made first. units: of score and of pixels, in which the larger of the two differences counts.
    within: the largest difference of a pair.
    """
    away = np.maximum(
        np.abs(found[0][:, None] - expected[0][None]).max(-1) / units[0],
        np.abs(found[1][:, None] - expected[1][None]).max(-1) / units[1],
    )  # [found, expected]
    partner = np.full(len(expected[0]), -1)
    free = np.ones(len(found[0]), bool)
    for row in np.argsort(away.min(0), kind="stable"):
        distance = np.where(free, away[:, row], np.inf)
        nearest = int(distance.argmin())
        if distance[nearest] <= within and free[nearest]:
            partner[row], free[nearest] = nearest, False
    return partner
