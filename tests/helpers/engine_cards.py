"""Cards of engines that do not exist."""

from __future__ import annotations

import hashlib
from typing import Any

from deploy.tensorrt.card import EngineCard, EngineOptions, Layers, Machine, Profile, TensorSpec
from tests.helpers.tiny_onnx import CARD, SIZE

T4 = Machine(
    library="TensorRT", version="10.13.3", gpu="Tesla T4", compute_capability="7.5", driver="580.65", cuda="13.0",
    platform="Linux x86_64",
)  # fmt: skip
FP32 = {"fp32": 1.0}


def engine_card(content: bytes = b"engine", **changes: Any) -> EngineCard:
    """A card as the builder writes it, for an engine with these bytes."""
    batches, shape = changes.pop("batches", (1, 8, 32)), [3, *SIZE]
    values: dict[str, Any] = {
        "engine": "tiny.engine",
        "engine_sha256": hashlib.sha256(content).hexdigest(),
        "engine_bytes": len(content),
        "onnx": "tiny.onnx",
        "onnx_sha256": "0" * 64,
        "structure_sha256": "1" * 64,
        "precision": None,
        "machine": T4,
        "options": EngineOptions(batches=batches),
        "profiles": [
            Profile(input="images", **{k: [b, *shape] for k, b in zip(("min", "opt", "max"), batches, strict=True)})
        ],
        "inputs": [TensorSpec(name="images", dtype="uint8", shape=[-1, *shape])],
        "outputs": [
            TensorSpec(name="boxes", dtype="fp32", shape=[-1, CARD.max_detections, 4]),
            TensorSpec(name="scores", dtype="fp32", shape=[-1, CARD.max_detections]),
            TensorSpec(name="labels", dtype="int64", shape=[-1, CARD.max_detections]),
            TensorSpec(name="count", dtype="int32", shape=[-1]),
        ],
        "network": Layers(count=6, share=FP32),
        "layers": None,
        "build_seconds": 1.0,
        "model": CARD,
        "created": "2026-01-01T00:00:00+00:00",
    }
    return EngineCard(**{**values, **changes})
