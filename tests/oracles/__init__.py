"""Numbers made once with the official implementations; how each was made is told in docs/oracles.md."""

import json
from pathlib import Path

import torch

ORACLES = json.loads((Path(__file__).parent / "oracles.json").read_text())
TEACHERS = json.loads((Path(__file__).parent / "teachers.json").read_text())


def sine(shape: tuple[int, ...], a: float, b: float, c: float, d: float = 0.0) -> torch.Tensor:
    """d + a * sin(b * i + c) for i = 0, 1, … in row-major order, float64."""
    i = torch.arange(int(torch.tensor(shape).prod()), dtype=torch.float64)
    return (d + a * torch.sin(b * i + c)).reshape(shape)
