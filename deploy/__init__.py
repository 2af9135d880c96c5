"""Ship a detector: export, check, measure and serve it. Needs no torch except in `deploy.graph.export`.

model = deploy.open("student.onnx")
model.detect("street.jpg")
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from deploy.core.detections import Detections as Detections
    from deploy.model import Model as Model
    from deploy.model import open_model as open

__all__ = ["Detections", "Model", "open"]

_HOMES = {
    "Detections": ("deploy.core.detections", "Detections"),
    "Model": ("deploy.model", "Model"),
    "open": ("deploy.model", "open_model"),
}


def __getattr__(name: str) -> Any:
    """Names of the face are imported when they are first used: `import deploy` alone loads nothing."""
    if name not in _HOMES:
        raise AttributeError(f"module 'deploy' has no attribute '{name}'")
    module, attribute = _HOMES[name]
    return getattr(import_module(module), attribute)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
