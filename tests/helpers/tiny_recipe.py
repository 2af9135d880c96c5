"""A run small enough for a test: a few generated images, the nano backbone, seconds on one core."""

from __future__ import annotations

from pathlib import Path

from compress.config.recipe import Recipe, load_recipe

TEXT = """
name: tiny
runs: {runs}
data:
  synthetic: {{train: 24, val: 8, size: 64, classes: 3, seed: 0}}
  short: 64
  long: 64
  workers: 0
  cache: true
teacher:
  model: {{backbone: nano, weights: none, neck_channels: 32, head_depth: 1}}
  train: {{steps: 3, batch_size: 4, optimizer: {{name: adamw, lr: 2e-3}}, schedule: {{name: cosine, warmup_steps: 1}}}}
student: {{backbone: nano, weights: none, neck_channels: 32, head_depth: 0}}
methods:
  bckd: {{}}
train:
  steps: 6
  batch_size: 4
  ema: 0.9
  clip_norm: 10
  optimizer: {{name: sgd, lr: 0.01}}
  schedule: {{name: cosine, warmup_steps: 2, warmup_factor: 0.1}}
deploy: {{score_threshold: 0.0, candidates: 100, benchmark: {{batch_sizes: [1], seconds: 0.02}}}}
"""


def recipe(runs: Path, *overrides: str) -> Recipe:
    """The tiny recipe with its runs below `runs`."""
    path = runs / "tiny.yaml"
    runs.mkdir(parents=True, exist_ok=True)
    path.write_text(TEXT.format(runs=runs / "runs"))
    return load_recipe(path, overrides)


def recipe_file(runs: Path, *overrides: str) -> Path:
    """Write the recipe as a file for the command line."""
    recipe(runs)
    return runs / "tiny.yaml"
