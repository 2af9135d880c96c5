"""Vision models of transformers that are small enough for tests, saved with random weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

WIDTH = 16
COMMON: dict[str, Any] = {"hidden_size": WIDTH, "num_hidden_layers": 1, "num_attention_heads": 2}
KINDS: dict[str, tuple[str, dict[str, Any]]] = {  # name: class of the library, configuration
    "dinov2": ("Dinov2Model", {**COMMON, "patch_size": 14, "image_size": 56}),
    "dinov2_registers": (
        "Dinov2WithRegistersModel",
        {**COMMON, "patch_size": 8, "image_size": 32, "num_register_tokens": 3},
    ),
    "dinov3": (
        "DINOv3ViTModel",
        {**COMMON, "patch_size": 16, "intermediate_size": 32, "num_register_tokens": 4},
    ),
    "vit": ("ViTForImageClassification", {**COMMON, "patch_size": 8, "image_size": 32, "intermediate_size": 32}),
    "convnext": ("ConvNextModel", {"hidden_sizes": [4, 8, 8, WIDTH], "depths": [1, 1, 1, 1]}),
}
"""One of each kind of output: with a class token, with registers, with rotary positions, with positions that are
interpolated when told, a map."""
PREFIX = {"dinov2": 1, "dinov2_registers": 4, "dinov3": 5, "vit": 1}
"""Class and register tokens before the patches."""


def saved(folder: Path, kind: str = "dinov2", *, seed: int = 0, **changes: Any) -> Path:
    """Save one of `KINDS`, its configuration changed, in `folder`; of equal seeds the same weights."""
    import transformers

    from compress.detectors.transformers.load import quiet

    name, config = KINDS[kind]
    with torch.random.fork_rng(devices=[]), quiet():
        torch.manual_seed(seed)
        library = getattr(transformers, name)
        library(library.config_class(**{**config, **changes})).save_pretrained(folder)
    return folder
