"""A small recipe, and how a test loads variations of it."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from compress.config.recipe import Recipe
from deploy.core.errors import UserError

Load = Callable[..., Recipe]
"""`load(text, *overrides)`: the recipe of a text, loaded from a file r.yaml in the working directory."""

TEXT = """\
name: example
data:
  synthetic: {train: 8, val: 4, size: 64}
  short: 64
  long: 64
student:
  backbone: nano
teacher:
  model:
    backbone: resnet18
  train:
    epochs: 2
    batch_size: 4
methods:
  bckd:
    weight: 1.5
train:
  epochs: 3
  batch_size: 4
  optimizer:
    lr: 1e-3
"""


def problems(load: Load, text: str, *overrides: str) -> list[str]:
    with pytest.raises(UserError) as caught:
        load(text, *overrides)
    return str(caught.value).splitlines()
