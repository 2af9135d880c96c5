"""Shapes and textures of the drawn objects of `compress.data.synthetic`, as functions of coordinates.

`u`, `v` are float32 arrays of one shape: an object's own coordinates, in units of its radius; v points down.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]  # of float32

# --- shapes: signed distance in units of the radius, negative inside; v points down ----------------------


def _disc(u: Array, v: Array) -> Array:
    return np.sqrt(u * u + v * v) - np.float32(0.92)


def _square(u: Array, v: Array) -> Array:
    return np.maximum(np.abs(u), np.abs(v)) - np.float32(0.82)


def _triangle(u: Array, v: Array) -> Array:
    return np.maximum(np.float32(0.866) * np.abs(u) - np.float32(0.5) * v, v) - np.float32(0.55)


def _star(u: Array, v: Array) -> Array:
    """Five points: three reflections fold the plane into half a point, which has one straight edge."""
    u, v = np.abs(u), -v
    for x, y in ((0.80902, -0.58779), (-0.80902, -0.58779)):
        shift = 2 * np.maximum(np.float32(x) * u + np.float32(y) * v, 0)
        u, v = u - np.float32(x) * shift, v - np.float32(y) * shift
    u = np.abs(u)
    # The edge from the tip (0, 1.08) to the notch at 36 degrees and radius 0.5.
    notch_u, notch_v, tip = 0.5 * math.sin(math.pi / 5), 0.5 * math.cos(math.pi / 5), 1.08
    length = math.hypot(notch_u, tip - notch_v)
    normal_u, normal_v = (tip - notch_v) / length, notch_u / length
    return np.float32(normal_u) * u + np.float32(normal_v) * (v - np.float32(tip))


def _cross(u: Array, v: Array) -> Array:
    u, v = np.abs(u), np.abs(v)
    return np.maximum(np.minimum(u, v) - np.float32(0.36), np.maximum(u, v) - np.float32(0.98))


def _heart(u: Array, v: Array) -> Array:
    """A square on its corner with a disc on each upper edge."""
    u = np.abs(u)
    body = np.maximum(np.abs(u + v - 0.1) - 0.72, np.abs(u - v + 0.1) - 0.72) * np.float32(0.7071)
    lobe = np.sqrt((u - np.float32(0.36)) ** 2 + (v + np.float32(0.26)) ** 2) - np.float32(0.509)
    return np.minimum(body, lobe)


def _bar(u: Array, v: Array) -> Array:
    return np.maximum(np.abs(u) - np.float32(1.0), np.abs(v) - np.float32(0.34))


def _ring(u: Array, v: Array) -> Array:
    return np.abs(np.sqrt(u * u + v * v) - np.float32(0.68)) - np.float32(0.27)


def _crescent(u: Array, v: Array) -> Array:
    bite = np.float32(0.75) - np.sqrt((u - np.float32(0.5)) ** 2 + v * v)
    return np.maximum(np.sqrt(u * u + v * v) - np.float32(0.95), bite)


SHAPES: dict[str, Callable[[Array, Array], Array]] = {
    "star": _star,
    "disc": _disc,
    "square": _square,
    "triangle": _triangle,
    "cross": _cross,
    "heart": _heart,
    "bar": _bar,
    "ring": _ring,
    "crescent": _crescent,
}
CLASS_SHAPES = ("star", "disc", "square", "triangle", "cross", "heart")
FOREIGN_SHAPES = ("bar", "ring", "crescent")


@cache
def unit_area(shape: str) -> float:
    """Area of the shape at radius 1."""
    axis = np.linspace(-1.5, 1.5, 301, dtype=np.float32)
    return float((SHAPES[shape](axis[None, :], axis[:, None]) < 0).mean()) * 9.0


# --- textures: how much of the second colour, 0..1 -----------------------

CLASS_TEXTURES = ("striped", "checked", "dotted", "shaded")
FOREIGN_TEXTURES = ("plain", "speckled")


def texture_of(name: str, u: Array, v: Array, radius: float, rng: np.random.Generator) -> Array:
    """`u`, `v` are the object's own coordinates, `radius` its size in pixels."""
    angle = rng.uniform(0, math.pi)
    c, s = np.float32(math.cos(angle)), np.float32(math.sin(angle))
    p, q = c * u + s * v, c * v - s * u
    if name == "plain":
        return np.full_like(u, np.float32(rng.uniform(0, 1)))
    if name == "shaded":
        return np.clip(np.float32(0.5) + np.float32(rng.uniform(0.5, 0.7)) * p, 0, 1)
    if name == "speckled":
        cells = rng.random((17, 17), dtype=np.float32)
        scale = np.float32(rng.uniform(2.5, 4.5))
        return cells[(q * scale).astype(np.int32) % 17, (p * scale).astype(np.int32) % 17]
    # Small objects get fewer repeats: below about five pixels a period is no more than grey.
    period_px = max(5.0, radius * rng.uniform(*_PERIODS[name]))
    frequency = np.float32(2 * math.pi * radius / period_px)
    wave_p = np.sin(p * frequency + np.float32(rng.uniform(0, 2 * math.pi)))
    if name == "striped":
        wave = wave_p
    else:
        wave_q = np.sin(q * frequency + np.float32(rng.uniform(0, 2 * math.pi)))
        wave = wave_p * wave_q * np.float32(1.6) if name == "checked" else wave_p + wave_q - np.float32(0.55)
    # An edge about one pixel wide, whatever the period.
    return np.clip(np.float32(0.5) + wave * np.float32(max(0.9, period_px / (2 * math.pi))), 0, 1)


_PERIODS = {"striped": (0.45, 0.75), "checked": (0.75, 1.1), "dotted": (0.55, 0.85)}
"""Range of the texture's period in radii."""
